//! llama.cpp's own RPC, unmodified: the workers and the head that the benchmark compares Capstan with.
//!
//! The head does what llama.cpp's server does: one context for all sequences, each step one batch that holds a token of
//! every sequence that decodes and then as much of the waiting prompts as fits. All the rest (which layers go where,
//! how a batch is cut, what crosses the network) is llama.cpp's.
use std::ffi::CString;
use std::net::TcpStream;
use std::path::Path;
use std::ptr::NonNull;

use capstan_proto::data::{Payload, Row};
use llama_cpp_sys_2 as sys;

use crate::backend::{init, owned};
use crate::batch::{Batch, RowShape};
use crate::{LlamaError, log};

/// `ggml_backend_rpc_add_server` of ggml-rpc.h, which the bindings leave out.
type AddServer = unsafe extern "C" fn(*const std::ffi::c_char) -> sys::ggml_backend_reg_t;
/// `ggml_backend_rpc_start_server` of ggml-rpc.h.
type StartServer =
    unsafe extern "C" fn(*const std::ffi::c_char, *const std::ffi::c_char, usize, usize, *mut sys::ggml_backend_dev_t);

/// A function of the RPC backend; an error when llama.cpp was built without it.
fn rpc_function(name: &std::ffi::CStr) -> Result<NonNull<std::ffi::c_void>, LlamaError> {
    init();
    // SAFETY: the name is null-terminated; the registry is filled before `init` returns.
    let registry = unsafe { sys::ggml_backend_reg_by_name(c"RPC".as_ptr()) };
    let missing = || LlamaError::Unsupported("llama.cpp was built without RPC; set GGML_RPC=ON for its build".into());
    if registry.is_null() {
        return Err(missing());
    }
    // SAFETY: the registry is live for the whole program, and the name is null-terminated.
    NonNull::new(unsafe { sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr()) }).ok_or_else(missing)
}

fn c_string(text: &[u8], what: &str) -> Result<CString, LlamaError> {
    CString::new(text).map_err(|_| LlamaError::Unsupported(format!("{what} contains a zero byte")))
}

/// Serves this machine's processor as an RPC worker at `address` (`host:port`), with so many threads. With a `cache`
/// folder it keeps large tensors for the next head. Does not return unless it cannot listen.
pub fn serve(address: &str, threads: usize, cache: Option<&Path>) -> LlamaError {
    match start_server(address, threads, cache) {
        Ok(()) => LlamaError::Unsupported(format!("the RPC worker stopped; perhaps {address} is taken")),
        Err(error) => error,
    }
}

fn start_server(address: &str, threads: usize, cache: Option<&Path>) -> Result<(), LlamaError> {
    let start = rpc_function(c"ggml_backend_rpc_start_server")?;
    // SAFETY: the RPC registry gives the function of this name, whose type in ggml-rpc.h is `StartServer`.
    let start = unsafe { std::mem::transmute::<NonNull<std::ffi::c_void>, StartServer>(start) };
    let address = c_string(address.as_bytes(), "the address")?;
    let cache = cache.map(|folder| c_string(folder.as_os_str().as_encoded_bytes(), "the cache's path")).transpose()?;
    let cache = cache.as_ref().map_or(std::ptr::null(), |folder| folder.as_ptr());
    // SAFETY: reads a registry that is filled by `init`.
    let mut device = unsafe { sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU) };
    if device.is_null() {
        return Err(LlamaError::Unsupported("ggml finds no processor to compute on".into()));
    }
    // SAFETY: both strings are null-terminated (or null, for no cache) and outlive the call, which reads one device.
    unsafe { start(address.as_ptr(), cache, threads, 1, &mut device) };
    Ok(())
}

/// RPC workers as ggml devices, ready to be given layers.
pub struct Workers {
    /// Ends with a null pointer, as llama.cpp wants a list of devices. ggml never frees them.
    devices: Vec<sys::ggml_backend_dev_t>,
}

impl Workers {
    /// Connects to workers, in pipeline order.
    pub fn connect(addresses: &[String]) -> Result<Self, LlamaError> {
        let add = rpc_function(c"ggml_backend_rpc_add_server")?;
        // SAFETY: the RPC registry gives the function of this name, whose type in ggml-rpc.h is `AddServer`.
        let add = unsafe { std::mem::transmute::<NonNull<std::ffi::c_void>, AddServer>(add) };
        let mut devices = Vec::with_capacity(addresses.len() + 1);
        for address in addresses {
            let fail = |why: String| LlamaError::Unsupported(format!("the RPC worker {address} {why}"));
            // llama.cpp aborts when nobody listens.
            TcpStream::connect(address).map_err(|e| fail(format!("cannot be reached: {e}")))?;
            let c_address = c_string(address.as_bytes(), "the address")?;
            // SAFETY: null-terminated and of the form `host:port`, for a connection to it was just made.
            let registry = unsafe { add(c_address.as_ptr()) };
            // SAFETY: the registry is checked for null first; it lives as long as the program.
            if registry.is_null() || unsafe { sys::ggml_backend_reg_dev_count(registry) } != 1 {
                return Err(fail("does not offer one device".into()));
            }
            // SAFETY: live, and it has a device 0.
            devices.push(unsafe { sys::ggml_backend_reg_dev_get(registry, 0) });
        }
        devices.push(std::ptr::null_mut());
        Ok(Self { devices })
    }

    /// What ggml calls them.
    pub fn names(&self) -> Vec<String> {
        let devices = self.devices.iter().filter(|d| !d.is_null());
        // SAFETY: live devices, whose names live as long as they.
        devices.map(|d| unsafe { owned(sys::ggml_backend_dev_name(*d)) }).collect()
    }
}

/// How large a head's context is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadOptions {
    /// Tokens a sequence may have.
    pub ctx_per_slot: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Most rows given to llama.cpp at once.
    pub batch: u32,
    /// Most rows that it computes at once.
    pub ubatch: u32,
    /// One cache for all sequences instead of one each.
    pub kv_unified: bool,
    /// Attention writes its scores out, as Capstan's does on processors, instead of llama.cpp's choice.
    pub scores: bool,
}

/// A model whose layers all lie on RPC workers, and a context to run it.
pub struct Head {
    model: NonNull<sys::llama_model>,
    context: Option<(NonNull<sys::llama_context>, HeadOptions)>,
    batch: Batch,
    n_vocab: usize,
    /// Kept, for the model and its contexts use the devices.
    _workers: Workers,
}

impl Head {
    /// Loads a GGUF and offloads every layer to the workers.
    pub fn load(path: &Path, mut workers: Workers) -> Result<Self, LlamaError> {
        init();
        let fail = |reason: String| LlamaError::Load { path: path.to_owned(), reason };
        std::fs::File::open(path).map_err(|e| fail(e.to_string()))?;
        let c_path = c_string(path.as_os_str().as_encoded_bytes(), "the model's path")?;
        // SAFETY: only returns constants of the library.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.devices = workers.devices.as_mut_ptr();
        params.n_gpu_layers = -1;
        params.split_mode = sys::LLAMA_SPLIT_MODE_LAYER;
        log::forget();
        // SAFETY: the path is null-terminated; `params` holds defaults and a null-terminated list of live devices,
        // which is read during the call only.
        let model = NonNull::new(unsafe { sys::llama_model_load_from_file(c_path.as_ptr(), params) })
            .ok_or_else(|| fail(log::errors("llama.cpp gave no reason")))?;
        // SAFETY: the model is loaded; both calls only read it.
        let n_vocab = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model.as_ptr())) }.max(0) as usize;
        Ok(Self { model, context: None, batch: Batch::default(), n_vocab, _workers: workers })
    }

    /// Empties the cache and says how large the context is.
    pub fn clear(&mut self) -> Result<HeadOptions, LlamaError> {
        let (context, options) = self.opened()?;
        // SAFETY: the context is live, and no decode is running.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(context.as_ptr()), false) };
        Ok(options)
    }

    fn opened(&self) -> Result<(NonNull<sys::llama_context>, HeadOptions), LlamaError> {
        self.context.ok_or_else(|| LlamaError::Refused("there is no context yet".into()))
    }

    /// Makes a context with an empty cache in place of the one before.
    pub fn open(&mut self, options: HeadOptions) -> Result<(), LlamaError> {
        self.close();
        let n_ctx = options.ctx_per_slot.checked_mul(options.slots).filter(|n| *n > 0 && *n <= i32::MAX as u32);
        // SAFETY: a constant of the library.
        let slots_max = unsafe { sys::llama_max_parallel_sequences() };
        let (Some(n_ctx), true) = (n_ctx, options.slots as usize <= slots_max) else {
            return Err(LlamaError::Context("the context's size is out of range".into()));
        };
        if options.ubatch == 0 || options.batch < options.ubatch || options.batch > n_ctx {
            return Err(LlamaError::Context("a batch is at least a ubatch and at most the context".into()));
        }
        // SAFETY: only returns constants of the library.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = n_ctx;
        params.n_batch = options.batch;
        params.n_ubatch = options.ubatch;
        params.n_seq_max = options.slots;
        // As its server has it: a row of logits for each sequence.
        params.n_outputs_max = options.slots;
        params.n_outputs_max_per_seq = 1;
        // The head itself only looks up embedding rows; more threads would be started for each batch and help nothing.
        params.n_threads = 1;
        params.n_threads_batch = 1;
        params.no_perf = true;
        params.kv_unified = options.kv_unified;
        if options.scores {
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
        }
        log::forget();
        // SAFETY: the model is live and outlives the context (`Drop`); `params` holds defaults and checked numbers.
        let context = NonNull::new(unsafe { sys::llama_init_from_model(self.model.as_ptr(), params) })
            .ok_or_else(|| LlamaError::Context(log::errors("llama.cpp gave no reason")))?;
        self.context = Some((context, options));
        Ok(())
    }

    fn close(&mut self) {
        if let Some((context, _)) = self.context.take() {
            // SAFETY: owned, and no call runs.
            unsafe { sys::llama_free(context.as_ptr()) };
        }
    }

    /// Computes rows and returns the likeliest token of each row that is flagged as output, in order. Of each of these
    /// rows `banned` has the tokens that are not taken.
    pub fn decode(&mut self, rows: &[Row], tokens: &[i32], banned: &[&[i32]]) -> Result<Vec<i32>, LlamaError> {
        let (context, options) = self.opened()?;
        if rows.is_empty() || rows.len() > options.batch as usize || rows.len() != tokens.len() {
            return Err(LlamaError::Refused(format!("{} rows and {} tokens", rows.len(), tokens.len())));
        }
        if let Some(row) = rows.iter().find(|r| r.slot >= options.slots || r.pos >= options.ctx_per_slot) {
            return Err(LlamaError::Refused(format!("{row:?} is outside of the context")));
        }
        if let Some(token) = tokens.iter().find(|t| !usize::try_from(**t).is_ok_and(|t| t < self.n_vocab)) {
            return Err(LlamaError::Refused(format!("token {token} is not in the vocabulary")));
        }
        let outputs: Vec<usize> = rows.iter().enumerate().filter(|(_, r)| r.output).map(|(i, _)| i).collect();
        if outputs.len() > options.slots as usize || outputs.len() != banned.len() {
            return Err(LlamaError::Refused(format!("logits of {} rows are wanted", outputs.len())));
        }
        let shape = RowShape { width: 0, positions: 1, all_outputs: false };
        let payload = Payload::Tokens(tokens.to_vec());
        self.batch.fill(rows, &payload, shape);
        log::forget();
        // SAFETY: the context is live and used by this thread alone (`&mut self`); the batch's arrays live until the
        // call returns; slots, positions, tokens and the number of outputs are within the context's bounds.
        let code = unsafe { sys::llama_decode(context.as_ptr(), self.batch.raw(&payload)) };
        if code != 0 {
            return Err(LlamaError::Compute(format!("llama_decode returned {code}: {}", log::errors("no reason"))));
        }
        outputs.into_iter().zip(banned).map(|(row, banned)| self.likeliest(context, row, banned)).collect()
    }

    /// The likeliest token of a row of the last batch that is not banned; waits for the computation.
    fn likeliest(&self, context: NonNull<sys::llama_context>, row: usize, banned: &[i32]) -> Result<i32, LlamaError> {
        // SAFETY: the context is live; the index is that of a row of the last batch.
        let logits = unsafe { sys::llama_get_logits_ith(context.as_ptr(), row as i32) };
        if logits.is_null() {
            return Err(LlamaError::Compute(format!("there are no logits of row {row}")));
        }
        // SAFETY: llama.cpp's output buffer holds `n_vocab` floats for each flagged row until the next decode.
        let logits = unsafe { std::slice::from_raw_parts(logits, self.n_vocab) };
        let mut best = (0, f32::NEG_INFINITY);
        for (token, &logit) in logits.iter().enumerate() {
            if logit > best.1 && !banned.contains(&(token as i32)) {
                best = (token as i32, logit);
            }
        }
        Ok(best.0)
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        self.close();
        // SAFETY: the model is owned, and its only context is gone.
        unsafe { sys::llama_model_free(self.model.as_ptr()) };
    }
}
