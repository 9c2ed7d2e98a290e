//! KV cache and compute buffers of a loaded model; applies a micro-batch's KV operations and runs its rows.
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

use capstan_engine::StageOutput;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::limits::scores_bytes;
use llama_cpp_sys_2 as sys;

use crate::batch::{Batch, RowShape};
use crate::capture::{Capture, State, on_eval};
use crate::model::Model;
use crate::{LlamaError, log};

/// llama.cpp makes each sequence's share of the cache a multiple of this many tokens.
const CTX_STEP: u32 = 256;
/// Most threads that are passed on: ggml's own bound, and more than any machine we know has.
const THREADS_MAX: u32 = 512;

/// How large a context is and what leaves it.
#[derive(Clone, Debug)]
pub struct ContextOptions {
    /// Tokens a slot holds; rounded up to a multiple of 256.
    pub ctx_per_slot: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Sequences beyond the slots that are only copied to and from: snapshots before guesses. They have no rows.
    pub spares: u32,
    /// Most rows of a micro-batch; at most the tokens that all slots hold.
    pub ubatch: u32,
    /// Compute threads; none takes every core that the process may use.
    pub threads: Option<u32>,
    /// The hidden state to take out; none computes logits.
    pub capture: Option<Capture>,
    /// Most rows of a micro-batch whose logits are wanted; none is one a slot. Memory for logits grows with it. Without
    /// meaning when hidden states are captured.
    pub outputs_max: Option<u32>,
    /// One cache for all sequences instead of one each, so that a copy shares what it copies and costs nothing. A
    /// sequence's numbers then depend on what else is in it: sums over the cache run in another order.
    pub kv_unified: bool,
}

impl Default for ContextOptions {
    fn default() -> Self {
        Self {
            ctx_per_slot: 4096,
            slots: 1,
            spares: 0,
            ubatch: 512,
            threads: None,
            capture: None,
            outputs_max: None,
            kv_unified: false,
        }
    }
}

/// Bytes a context takes beside the weights, to about 10 KB: llama.cpp tells them only in its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextMemory {
    /// KV cache and recurrent states.
    pub kv_bytes: u64,
    /// Compute and output buffers.
    pub compute_bytes: u64,
}

/// A model's working memory. Runs on the thread that calls it, which may change between calls.
pub struct Context {
    ptr: NonNull<sys::llama_context>,
    memory: sys::llama_memory_t,
    /// Owned; llama.cpp holds it as the callback's user data, so it is freed after the context.
    capture: Option<NonNull<State>>,
    width: Option<usize>,
    threads: ThreadPool,
    batch: Batch,
    /// The next position of each slot, then of each spare: what llama.cpp's cache holds, known without asking it.
    next: Vec<u32>,
    /// llama.cpp copies between caches with the next rows that it computes, not before.
    copies_wait: bool,
    slots: u32,
    ctx_per_slot: u32,
    ubatch: u32,
    outputs_max: u32,
    sizes: ContextMemory,
    model: Arc<Model>,
}

// SAFETY: llama.cpp does not tie a context to a thread; `&mut self` gives one thread at a time.
unsafe impl Send for Context {}

impl Context {
    /// A context with an empty cache.
    pub fn new(model: Arc<Model>, options: &ContextOptions) -> Result<Self, LlamaError> {
        let bad = |m: String| Err(LlamaError::Context(m));
        // SAFETY: a constant of the library.
        let sequences_max = unsafe { sys::llama_max_parallel_sequences() };
        let sequences = options.slots.saturating_add(options.spares);
        if options.slots == 0 || sequences as usize > sequences_max {
            return bad(format!(
                "{} slots and {} snapshots are asked for; choose 1 to {sequences_max} in all",
                options.slots, options.spares
            ));
        }
        if options.ubatch == 0 || options.ctx_per_slot == 0 {
            return bad("a context and a micro-batch need room for at least one token".into());
        }
        // In one cache a snapshot shares the cells of what it is a snapshot of.
        let caches = if options.kv_unified { options.slots } else { sequences };
        let per_slot = options.ctx_per_slot.checked_next_multiple_of(CTX_STEP);
        let in_all = per_slot.and_then(|c| c.checked_mul(caches)).filter(|c| *c <= i32::MAX as u32);
        let (Some(per_slot), Some(n_ctx)) = (per_slot, in_all) else {
            return bad(format!("{} slots of {} tokens are too many", options.slots, options.ctx_per_slot));
        };
        let ubatch = options.ubatch.min(per_slot * options.slots);
        // llama.cpp sizes the buffers of some hybrid models as if one sequence's rows were spread over every cache, and
        // aborts when that does not come out even.
        let spread = if options.kv_unified || !model.is_hybrid() { 1 } else { sequences };
        let n_ubatch = ubatch.next_multiple_of(spread);
        let outputs_max = match (&options.capture, options.outputs_max) {
            (Some(_), _) => ubatch,
            (None, wanted) => wanted.unwrap_or(options.slots).clamp(1, ubatch),
        };
        let capture = match &options.capture {
            None => None,
            Some(c) => Some(NonNull::from(Box::leak(Box::new(State::new(c)?)))),
        };
        let available = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let threads = options.threads.unwrap_or(available).clamp(1, THREADS_MAX);

        // SAFETY: only returns constants of the library.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = n_ctx;
        params.n_batch = n_ubatch;
        params.n_ubatch = n_ubatch;
        params.n_seq_max = sequences;
        // llama.cpp asserts that its output buffer, which has a row for each sequence at least, is within this.
        params.n_outputs_max = outputs_max.max(sequences);
        params.n_outputs_max_per_seq = 0;
        params.n_threads = threads as i32;
        params.n_threads_batch = threads as i32;
        // In a cache for all, the place of a sequence's cells depends on the others. The fused kernel adds cell after
        // cell and leaves out those of others, so that it gives the same bits wherever they lie; products of vectors do
        // not.
        let fit = scores_bytes(n_ubatch, per_slot, model.n_head()).is_some();
        let written_out = fit && model.on_processor() && !options.kv_unified;
        params.flash_attn_type =
            if written_out { sys::LLAMA_FLASH_ATTN_TYPE_DISABLED } else { sys::LLAMA_FLASH_ATTN_TYPE_AUTO };
        params.no_perf = true;
        params.swa_full = true;
        params.kv_unified = options.kv_unified;
        if let Some(state) = capture {
            params.cb_eval = Some(on_eval);
            params.cb_eval_user_data = state.as_ptr().cast();
        }
        log::forget();
        let ptr = {
            let _one_at_a_time = model.making_context.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the model is loaded and kept alive by the `Arc`; every field of `params` is a default or checked
            // above; the callback's state lives until after `llama_free`.
            unsafe { sys::llama_init_from_model(model.as_ptr(), params) }
        };
        let Some(ptr) = NonNull::new(ptr) else {
            free_capture(capture);
            let why =
                log::errors("llama.cpp gave no reason; probably memory ran out, so try fewer slots or less context");
            return bad(why);
        };
        // SAFETY: the context was just made; the calls only read it.
        let (memory, got_ubatch, got_sequences, got_per_slot) = unsafe {
            let c = ptr.as_ptr();
            (sys::llama_get_memory(c), sys::llama_n_ubatch(c), sys::llama_n_seq_max(c), sys::llama_n_ctx_seq(c))
        };
        let sizes = log::sizes();
        let context = Self {
            ptr,
            memory,
            capture,
            width: options.capture.as_ref().map(|c| c.width),
            threads: ThreadPool::attach(ptr, threads),
            batch: Batch::default(),
            next: vec![0; sequences as usize],
            copies_wait: false,
            slots: options.slots,
            ctx_per_slot: per_slot,
            ubatch: ubatch.min(got_ubatch),
            outputs_max,
            sizes: ContextMemory { kv_bytes: sizes.kv_bytes, compute_bytes: sizes.compute_bytes },
            model,
        };
        if memory.is_null() {
            return bad("the model keeps no memory of a sequence, so it cannot generate text".into());
        }
        if got_sequences != sequences || got_per_slot < per_slot {
            return bad(format!("llama.cpp made {got_sequences} slots of {got_per_slot} tokens"));
        }
        Ok(context)
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }
    /// Most rows of a micro-batch.
    pub fn ubatch(&self) -> u32 {
        self.ubatch
    }
    /// Tokens a slot holds.
    pub fn ctx_per_slot(&self) -> u32 {
        self.ctx_per_slot
    }
    /// Compute threads.
    pub fn threads(&self) -> u32 {
        self.threads.count
    }
    /// Bytes it takes beside the weights.
    pub fn memory(&self) -> ContextMemory {
        self.sizes
    }
    /// The position that a slot's next row must have.
    pub fn next_pos(&self, slot: u32) -> Option<u32> {
        self.next.get(slot as usize).copied()
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::llama_context {
        self.ptr.as_ptr()
    }

    pub(crate) fn put_next(&mut self, slot: u32, next: u32) {
        self.next[slot as usize] = next;
    }

    /// Whether a copy is still to come that would overwrite what is put into its target now.
    pub(crate) fn copies_wait(&self) -> bool {
        self.copies_wait
    }

    /// Empties every slot.
    pub fn clear(&mut self) {
        // SAFETY: the memory belongs to this live context, and no decode is running.
        unsafe { sys::llama_memory_clear(self.memory, true) };
        self.next.fill(0);
    }

    /// Applies the KV operations and computes the rows. Epoch and step are the caller's business.
    ///
    /// [`LlamaError::Refused`] leaves the cache as it was; any other error may leave it changed.
    pub fn decode(&mut self, micro_batch: &MicroBatch) -> Result<StageOutput, LlamaError> {
        let MicroBatch { ops, rows, payload, .. } = micro_batch;
        micro_batch.check().map_err(|e| LlamaError::Refused(e.to_string()))?;
        self.check_payload(rows, payload)?;
        let next = self.plan(ops, rows)?;
        self.copies_wait |= ops.iter().any(|op| matches!(op, KvOp::Copy { .. }));
        self.apply(ops)?;
        self.next = next;
        if rows.is_empty() {
            return Ok(self.output(Vec::new()));
        }
        self.compute(rows, payload)
    }

    fn check_payload(&self, rows: &[Row], payload: &Payload) -> Result<(), LlamaError> {
        let refuse = |m: String| Err(LlamaError::Refused(m));
        if rows.len() > self.ubatch as usize {
            return refuse(format!("it has {} rows, and at most {} are taken", rows.len(), self.ubatch));
        }
        let outputs = rows.iter().filter(|r| r.output).count();
        if self.capture.is_none() && outputs > self.outputs_max as usize {
            return refuse(format!("it wants logits of {outputs} rows, and at most {} are taken", self.outputs_max));
        }
        match payload {
            Payload::Tokens(tokens) => {
                let known = |t: &i32| usize::try_from(*t).is_ok_and(|t| t < self.model.n_vocab());
                if let Some(t) = tokens.iter().find(|t| !known(t)) {
                    return refuse(format!("token {t} is not in the vocabulary of {}", self.model.n_vocab()));
                }
            }
            Payload::Hidden(hidden) if !rows.is_empty() => {
                let (width, most) = (hidden.len() / rows.len(), self.model.n_embd_inp());
                if width > most {
                    return refuse(format!("its hidden states have {width} floats, and the model takes {most}"));
                }
            }
            Payload::Hidden(_) => {}
        }
        Ok(())
    }

    /// Checks operations and rows against what the slots hold, and says what they will hold.
    fn plan(&self, ops: &[KvOp], rows: &[Row]) -> Result<Vec<u32>, LlamaError> {
        let refuse = |m: String| LlamaError::Refused(m);
        let mut next = self.next.clone();
        let slot_of = |slot: u32| match (slot as usize) < self.next.len() {
            true => Ok(slot as usize),
            false => Err(refuse(format!("slot {slot} does not exist; there are {}", self.next.len()))),
        };
        for op in ops {
            match *op {
                KvOp::Clear { slot } => next[slot_of(slot)?] = 0,
                KvOp::Trim { slot, from } => {
                    let slot = slot_of(slot)?;
                    let partial = from > 0 && from < next[slot];
                    if partial && (self.model.is_recurrent() || self.model.is_hybrid()) {
                        return Err(refuse("a recurrent state cannot be trimmed, only cleared or copied".into()));
                    }
                    next[slot] = next[slot].min(from);
                }
                KvOp::Copy { from, to } => {
                    let (from, to) = (slot_of(from)?, slot_of(to)?);
                    if from == to || next[to] != 0 {
                        return Err(refuse(format!("slot {from} is to be copied to slot {to}, which is not empty")));
                    }
                    next[to] = next[from];
                }
                // Whoever has the files does it, before or after.
                KvOp::Save { slot, .. } | KvOp::Restore { slot, .. } => _ = slot_of(slot)?,
            }
        }
        let mut per_slot: Option<usize> = None;
        for group in rows.chunk_by(|a, b| a.slot == b.slot) {
            let slot = slot_of(group[0].slot)?;
            if group[0].slot >= self.slots {
                return Err(refuse(format!("sequence {slot} is for snapshots and takes no rows")));
            }
            // Captured rows come in the order in which llama.cpp regroups them. With as many rows for each slot that
            // order is the micro-batch's own; otherwise it is another, without any error.
            if *per_slot.get_or_insert(group.len()) != group.len() {
                return Err(refuse("its slots have different numbers of rows".into()));
            }
            if group[0].pos != next[slot] {
                return Err(refuse(format!(
                    "slot {slot} goes on at position {}, and the row says {}",
                    next[slot], group[0].pos
                )));
            }
            let end = group[0].pos as usize + group.len();
            if end > self.ctx_per_slot as usize {
                return Err(refuse(format!("slot {slot} holds {} tokens, and this needs {end}", self.ctx_per_slot)));
            }
            next[slot] = end as u32;
        }
        Ok(next)
    }

    fn apply(&mut self, ops: &[KvOp]) -> Result<(), LlamaError> {
        for op in ops {
            match *op {
                KvOp::Clear { slot } => {
                    // SAFETY: `plan` found the slot in range, and no decode is running. A whole sequence can always go.
                    unsafe { sys::llama_memory_seq_rm(self.memory, slot as i32, -1, -1) };
                }
                KvOp::Trim { slot, from } => {
                    // From 0 on is the whole sequence, which has to be said so: recurrent memory refuses the other form.
                    let from = if from == 0 { -1 } else { i32::try_from(from).unwrap_or(i32::MAX) };
                    // SAFETY: as above; `from` is -1 or a position.
                    if !unsafe { sys::llama_memory_seq_rm(self.memory, slot as i32, from, -1) } {
                        return Err(LlamaError::Compute(format!("slot {slot} could not be trimmed to {from} tokens")));
                    }
                }
                // SAFETY: as above; both slots are in range and differ, and the whole sequence is copied, which is what
                // separate streams ask for.
                KvOp::Copy { from, to } => unsafe {
                    sys::llama_memory_seq_cp(self.memory, from as i32, to as i32, -1, -1);
                },
                KvOp::Save { .. } | KvOp::Restore { .. } => {}
            }
        }
        Ok(())
    }

    fn compute(&mut self, rows: &[Row], payload: &Payload) -> Result<StageOutput, LlamaError> {
        let shape = RowShape {
            width: self.model.n_embd_inp(),
            positions: self.model.positions_per_row(),
            // The last layer drops the rows that nobody wants, and the next stage wants all.
            all_outputs: self.capture.is_some(),
        };
        self.batch.fill(rows, payload, shape);
        if let Some(state) = &mut self.capture {
            // SAFETY: the state is owned by this context, and llama.cpp uses it only while it decodes.
            unsafe { state.as_mut() }.begin(rows.len());
        }
        log::forget();
        // SAFETY: the context is live and used by this thread alone (`&mut self`); the batch's arrays have the lengths
        // that `n_tokens` asks for and live until the call returns; rows, positions, slots, tokens and outputs are
        // within the bounds that llama.cpp asserts (`check_payload`, `plan`).
        let code = unsafe { sys::llama_decode(self.ptr.as_ptr(), self.batch.raw(payload)) };
        if code != 0 {
            let why = log::errors(match code {
                1 => "the KV cache has no room",
                2 => "it was interrupted",
                _ => "llama.cpp gave no reason",
            });
            return Err(LlamaError::Compute(format!("llama_decode returned {code}: {why}")));
        }
        self.copies_wait = false;
        match self.capture {
            Some(_) => self.captured(rows.len()),
            None => self.logits(rows),
        }
    }

    fn captured(&mut self, rows: usize) -> Result<StageOutput, LlamaError> {
        let (Some(state), Some(width)) = (&mut self.capture, self.width) else {
            return Err(LlamaError::Compute("no hidden state is captured here".into()));
        };
        // SAFETY: the context ends the computation before the rows are read, so the callback no longer runs.
        unsafe { sys::llama_synchronize(self.ptr.as_ptr()) };
        // SAFETY: owned by this context, and llama.cpp is not decoding.
        let state = unsafe { state.as_mut() };
        if let Some(problem) = state.problem.take() {
            return Err(LlamaError::Compute(format!("the hidden state could not be taken: {problem}")));
        }
        let floats = std::mem::take(&mut state.floats);
        if floats.len() != rows * width {
            return Err(LlamaError::Compute(format!(
                "{rows} rows went in and {} floats of hidden states of {width} came out",
                floats.len()
            )));
        }
        Ok(StageOutput::Hidden(floats))
    }

    fn logits(&mut self, rows: &[Row]) -> Result<StageOutput, LlamaError> {
        let n_vocab = self.model.n_vocab();
        let wanted = rows.iter().enumerate().filter(|(_, r)| r.output);
        let mut logits = Vec::with_capacity(wanted.clone().count() * n_vocab);
        for (index, _) in wanted {
            // SAFETY: the context is live; the index is that of a row of the last batch. Waits for the computation.
            let row = unsafe { sys::llama_get_logits_ith(self.ptr.as_ptr(), index as i32) };
            if row.is_null() {
                return Err(LlamaError::Compute(format!("there are no logits of row {index}")));
            }
            // SAFETY: llama.cpp's output buffer holds `n_vocab` floats for each flagged row until the next decode.
            logits.extend_from_slice(unsafe { std::slice::from_raw_parts(row, n_vocab) });
        }
        if logits.is_empty() {
            // SAFETY: the context is live. Nothing was read that would have waited.
            unsafe { sys::llama_synchronize(self.ptr.as_ptr()) };
        }
        Ok(StageOutput::Logits(logits))
    }

    fn output(&self, floats: Vec<f32>) -> StageOutput {
        if self.capture.is_some() { StageOutput::Hidden(floats) } else { StageOutput::Logits(floats) }
    }

    /// How often the captured node appeared in the last decode; none when logits are computed.
    pub(crate) fn captures_seen(&self) -> Option<u32> {
        // SAFETY: owned by this context, and llama.cpp is not decoding.
        self.capture.map(|state| unsafe { state.as_ref() }.seen)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is owned and no call runs; the model, which it uses, is dropped after this body, and so
        // are the threads and the callback's state, which it must not outlive.
        unsafe { sys::llama_free(self.ptr.as_ptr()) };
        free_capture(self.capture.take());
    }
}

fn free_capture(state: Option<NonNull<State>>) {
    if let Some(state) = state {
        // SAFETY: it came from a leaked box in `Context::new`, and the context that used it is gone.
        drop(unsafe { Box::from_raw(state.as_ptr()) });
    }
}

/// Threads that wait for work between micro-batches. Without them ggml starts new ones for each.
struct ThreadPool {
    /// None when ggml could not make one: then it starts threads for each micro-batch.
    pool: Option<NonNull<sys::ggml_threadpool>>,
    count: u32,
}

impl ThreadPool {
    fn attach(context: NonNull<sys::llama_context>, count: u32) -> Self {
        if count == 1 {
            return Self { pool: None, count };
        }
        // SAFETY: fills a plain struct.
        let mut params = unsafe { sys::ggml_threadpool_params_default(count as i32) };
        // Waiting threads sleep: spinning would take the cores from the other stages of this machine.
        params.poll = 0;
        // SAFETY: `params` is valid for the call, which copies it.
        let pool = NonNull::new(unsafe { sys::ggml_threadpool_new(&mut params) });
        if let Some(pool) = pool {
            // SAFETY: both are live; the pool is freed after the context.
            unsafe { sys::llama_attach_threadpool(context.as_ptr(), pool.as_ptr(), pool.as_ptr()) };
        }
        Self { pool, count }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        if let Some(pool) = self.pool {
            // SAFETY: owned, and `Context` drops it after the context that used it.
            unsafe { sys::ggml_threadpool_free(pool.as_ptr()) };
        }
    }
}
