//! Weights in memory: a GGUF, whole or a shard, loaded by llama.cpp.
use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use llama_cpp_sys_2 as sys;

use crate::backend::{init, offloads};
use crate::vocab::Vocab;
use crate::{LlamaError, log, sparse};

/// Told the share of the weights that is read, 0 to 1; returning false ends the load with [`LlamaError::Cancelled`].
pub type Progress = Box<dyn FnMut(f32) -> bool + Send>;

/// How to load a model.
pub struct ModelOptions {
    /// Layers to offload to a GPU; negative is all, 0 keeps everything on the processor.
    pub gpu_layers: i32,
    /// Map the file instead of reading it, where the system can: weights are then shared with the page cache.
    pub mmap: bool,
    /// Take no memory for weights and caches: only sizes are wanted, and nothing can be computed.
    pub sizes_only: bool,
    /// Take memory only for weights that are read: the file is mapped without reading ahead, and no weight is copied into
    /// a form that is faster to compute with. For files that are larger than the memory, and mostly holes.
    pub sparse: bool,
    /// Who hears how far it is.
    pub progress: Option<Progress>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { gpu_layers: 0, mmap: true, sizes_only: false, sparse: false, progress: None }
    }
}

/// A loaded model. It is only read after loading, so threads share it.
pub struct Model {
    ptr: NonNull<sys::llama_model>,
    facts: Facts,
    on_processor: bool,
    copied_bytes: u64,
    path: PathBuf,
    /// Making a context may adjust numbers of the model, so it is done by one thread at a time.
    pub(crate) making_context: Mutex<()>,
}

// SAFETY: llama.cpp does not tie a model to the thread that loaded it.
unsafe impl Send for Model {}
// SAFETY: after loading a model is only read, but for the creation of contexts, which `making_context` serialises.
unsafe impl Sync for Model {}

#[derive(Clone, Copy)]
struct Facts {
    n_vocab: u32,
    n_embd: u32,
    n_embd_inp: u32,
    n_layer: u32,
    n_head: u32,
    n_ctx_train: u32,
    positions: u32,
    size_bytes: u64,
    n_params: u64,
    recurrent: bool,
    hybrid: bool,
    window: u32,
}

impl Model {
    /// Loads a GGUF: a single file, or the first of `-00001-of-N` splits.
    ///
    /// Refuses what cannot answer a chat: encoders, encoder-decoder and diffusion models. The error carries
    /// llama.cpp's own last lines.
    pub fn load(path: &Path, options: ModelOptions) -> Result<Arc<Self>, LlamaError> {
        init();
        let fail = |reason: String| LlamaError::Load { path: path.to_owned(), reason };
        std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| fail("its name contains a zero byte; rename it".into()))?;
        let mut reporter = options.progress.map(|report| Reporter { report, stopped: false });
        // SAFETY: both only return constants of the library.
        let (mut params, mmap) = unsafe { (sys::llama_model_default_params(), sys::llama_supports_mmap()) };
        params.n_gpu_layers = options.gpu_layers;
        params.split_mode = sys::LLAMA_SPLIT_MODE_LAYER;
        params.no_alloc = options.sizes_only;
        // llama.cpp refuses to map what it takes no memory for.
        let mmap = options.mmap && mmap && !options.sizes_only;
        params.load_mode = if mmap { sys::LLAMA_LOAD_MODE_MMAP } else { sys::LLAMA_LOAD_MODE_NONE };
        if let Some(reporter) = &mut reporter {
            params.progress_callback = Some(on_progress);
            params.progress_callback_user_data = std::ptr::from_mut(reporter).cast();
        }
        // Copies are made of every weight of a type that has a faster form, read or not.
        params.use_extra_bufts = !options.sparse;
        let bytes = std::fs::metadata(path).map_or(0, |meta| meta.len());
        let on_touch = options.sparse.then(|| sparse::OnTouch::begin(bytes)).transpose();
        let _on_touch = on_touch.map_err(|reason| LlamaError::Sparse { path: path.to_owned(), reason })?;
        log::forget();
        // SAFETY: the path is null-terminated, `params` holds only defaults and what is set above, and the reporter
        // outlives the call, after which the callback is not used again.
        let ptr = unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) };
        let Some(ptr) = NonNull::new(ptr) else {
            if reporter.is_some_and(|r| r.stopped) {
                return Err(LlamaError::Cancelled(path.to_owned()));
            }
            return Err(fail(log::errors("llama.cpp gave no reason; is it a whole, undamaged GGUF file?")));
        };
        // From here on the model is freed by `Drop`, also when it is refused.
        let facts = read_facts(ptr);
        let on_processor = !offloads(options.gpu_layers);
        let copied_bytes = log::sizes().copied_bytes;
        let model =
            Self { ptr, facts, on_processor, copied_bytes, path: path.to_owned(), making_context: Mutex::new(()) };
        if options.sparse {
            sparse::read_page_by_page(path);
        }
        model.refuse_what_cannot_chat()?;
        Ok(Arc::new(model))
    }

    fn refuse_what_cannot_chat(&self) -> Result<(), LlamaError> {
        let m = self.ptr.as_ptr();
        // SAFETY: `m` is a loaded model; the calls only read it.
        let (encoder, decoder, diffusion) = unsafe {
            (sys::llama_model_has_encoder(m), sys::llama_model_has_decoder(m), sys::llama_model_is_diffusion(m))
        };
        let what = match (encoder, decoder, diffusion) {
            (true, true, _) => "it is an encoder-decoder model",
            (true, false, _) | (_, false, _) => "it is an encoder and generates no text",
            (_, _, true) => "it is a diffusion model, which does not generate token by token",
            _ => return Ok(()),
        };
        Err(LlamaError::Unsupported(format!("{what}; load a decoder-only model")))
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Entries of the vocabulary and so logits per row.
    pub fn n_vocab(&self) -> usize {
        self.facts.n_vocab as usize
    }
    /// Floats of a hidden state.
    pub fn n_embd(&self) -> usize {
        self.facts.n_embd as usize
    }
    /// Floats that an input row has; more than [`Model::n_embd`] where layers add further inputs (qwen3-vl).
    pub fn n_embd_inp(&self) -> usize {
        self.facts.n_embd_inp as usize
    }
    /// Layers of the trunk.
    pub fn n_layer(&self) -> u32 {
        self.facts.n_layer
    }
    /// Attention heads of a layer.
    pub fn n_head(&self) -> u32 {
        self.facts.n_head
    }
    /// Whether the processor computes it alone.
    pub fn on_processor(&self) -> bool {
        self.on_processor
    }
    /// Tokens of context it was trained for.
    pub fn n_ctx_train(&self) -> u32 {
        self.facts.n_ctx_train
    }
    /// Positions a row of hidden states has: 4 with M-RoPE, else 1.
    pub fn positions_per_row(&self) -> usize {
        self.facts.positions as usize
    }
    /// Bytes of weights that are held in memory of their own, beside the mapped file: rearranged for the processor, or on a
    /// device. To about 10 KB: llama.cpp tells it only in its log.
    pub fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }
    /// Bytes of all its tensors.
    pub fn size_bytes(&self) -> u64 {
        self.facts.size_bytes
    }
    /// Parameters.
    pub fn n_params(&self) -> u64 {
        self.facts.n_params
    }
    /// Whether a sequence's memory is one state instead of a row per token (Mamba, RWKV).
    pub fn is_recurrent(&self) -> bool {
        self.facts.recurrent
    }
    /// Whether some layers are recurrent and others attend.
    pub fn is_hybrid(&self) -> bool {
        self.facts.hybrid
    }
    /// Whether a snapshot of a sequence is as good as the sequence. Of layers with a sliding window llama.cpp saves only
    /// what the window still sees, so what is trimmed afterwards would see too little.
    pub fn keeps_snapshots(&self) -> bool {
        self.facts.window == 0
    }
    /// Its vocabulary.
    pub fn vocab(self: &Arc<Self>) -> Vocab {
        Vocab::new(self)
    }
    pub(crate) fn as_ptr(&self) -> *mut sys::llama_model {
        self.ptr.as_ptr()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: the model is owned, and every context and vocabulary keeps it alive by an `Arc`.
        unsafe { sys::llama_model_free(self.ptr.as_ptr()) };
    }
}

fn read_facts(ptr: NonNull<sys::llama_model>) -> Facts {
    let m = ptr.as_ptr();
    let count = |n: i32| n.max(0) as u32;
    // SAFETY: `m` is a loaded model; every call only reads it.
    unsafe {
        let rope = sys::llama_model_rope_type(m);
        let m_rope = rope == sys::LLAMA_ROPE_TYPE_MROPE || rope == sys::LLAMA_ROPE_TYPE_IMROPE;
        Facts {
            n_vocab: count(sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(m))),
            n_embd: count(sys::llama_model_n_embd(m)),
            n_embd_inp: count(sys::llama_model_n_embd_inp(m)),
            n_layer: count(sys::llama_model_n_layer(m)),
            n_head: count(sys::llama_model_n_head(m)),
            n_ctx_train: count(sys::llama_model_n_ctx_train(m)),
            positions: if m_rope { 4 } else { 1 },
            size_bytes: sys::llama_model_size(m),
            n_params: sys::llama_model_n_params(m),
            recurrent: sys::llama_model_is_recurrent(m),
            hybrid: sys::llama_model_is_hybrid(m),
            window: count(sys::llama_model_n_swa(m)),
        }
    }
}

struct Reporter {
    report: Progress,
    stopped: bool,
}

unsafe extern "C" fn on_progress(share: f32, user: *mut c_void) -> bool {
    // SAFETY: `load` passes its own reporter, which nobody else uses while the model is being loaded.
    let reporter = unsafe { &mut *user.cast::<Reporter>() };
    // A panic must not unwind into C++; it ends the load.
    let go_on = catch_unwind(AssertUnwindSafe(|| (reporter.report)(share))).unwrap_or(false);
    reporter.stopped |= !go_on;
    go_on
}
