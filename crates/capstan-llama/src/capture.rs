//! Takes the hidden state of a window's last layer out of the graph, and ends the graph there.
//!
//! llama.cpp's scheduler asks a callback about each node: "do you want it?", and after it is computed, "go on?". The
//! callback wants one node by name, copies it and says no, so that the norm and the head after it cost nothing. Asking
//! for one node adds no synchronisation that would not happen anyway.
use std::ffi::{CStr, CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use llama_cpp_sys_2 as sys;

use crate::LlamaError;

/// Longest name of a node of the graph, with the terminating zero.
const NODE_NAME_BYTES_MAX: usize = 64;

/// What leaves a stage that is not the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Name of the graph's node, such as `l_out-9`.
    pub node: String,
    /// Floats per row.
    pub width: usize,
}

/// What the callback has seen since [`State::begin`].
pub(crate) struct State {
    node: CString,
    width: usize,
    floats_max: usize,
    /// The rows, in the order of the micro-batch; several physical batches append.
    pub(crate) floats: Vec<f32>,
    /// How often the node appeared.
    pub(crate) seen: u32,
    /// Why what appeared was not taken.
    pub(crate) problem: Option<String>,
}

impl State {
    pub(crate) fn new(capture: &Capture) -> Result<Self, LlamaError> {
        let bad = |m: &str| LlamaError::Context(format!("{:?} is no name of a graph node: {m}", capture.node));
        if capture.node.is_empty() || capture.node.len() >= NODE_NAME_BYTES_MAX {
            return Err(bad("it must have 1 to 63 bytes"));
        }
        let node = CString::new(capture.node.as_str()).map_err(|_| bad("it contains a zero byte"))?;
        Ok(Self { node, width: capture.width, floats_max: 0, floats: Vec::new(), seen: 0, problem: None })
    }

    /// Ready for a micro-batch of so many rows.
    pub(crate) fn begin(&mut self, rows: usize) {
        self.floats_max = rows.saturating_mul(self.width);
        // The caller takes the rows away, so each micro-batch gets memory of its own.
        self.floats = Vec::with_capacity(self.floats_max);
        self.seen = 0;
        self.problem = None;
    }

    fn take(&mut self, tensor: *mut sys::ggml_tensor) -> Result<(), String> {
        self.seen += 1;
        // SAFETY: llama.cpp passes a live tensor whose data is computed.
        let t = unsafe { &*tensor };
        // SAFETY: as above; both only read the tensor's shape.
        let (contiguous, count) = unsafe { (sys::ggml_is_contiguous(tensor), sys::ggml_nelements(tensor)) };
        if t.type_ != sys::GGML_TYPE_F32 || !contiguous {
            return Err(format!(
                "it is of ggml type {} and contiguous: {contiguous}; contiguous F32 is wanted",
                t.type_
            ));
        }
        if t.ne[0] != self.width as i64 {
            return Err(format!("its rows have {} floats, not {}", t.ne[0], self.width));
        }
        let count = usize::try_from(count).map_err(|_| "its size is negative".to_owned())?;
        let start = self.floats.len();
        if start + count > self.floats_max {
            return Err(format!("it has more rows than the micro-batch ({count} floats)"));
        }
        self.floats.reserve_exact(count);
        let into = self.floats.spare_capacity_mut().as_mut_ptr().cast::<c_void>();
        // SAFETY: the tensor is contiguous F32 with `count` elements, and `into` has room for as many, all of which the
        // call writes.
        unsafe {
            sys::ggml_backend_tensor_get(tensor, into, 0, count * size_of::<f32>());
            self.floats.set_len(start + count);
        }
        Ok(())
    }
}

/// The callback for `cb_eval`; its user data is a `*mut State`.
///
/// # Safety
/// `user` points to a `State` that nobody else uses during the call, and `tensor` is a live tensor.
pub(crate) unsafe extern "C" fn on_eval(tensor: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // A panic must not unwind into C++; the missing rows are then noticed after the decode.
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `Context` passes its own state and does not touch it while llama.cpp decodes.
        let state = unsafe { &mut *user.cast::<State>() };
        // SAFETY: a tensor's name is an array inside of it, null-terminated by ggml.
        let name = unsafe { CStr::from_ptr(sys::ggml_get_name(tensor)) };
        if name != state.node.as_c_str() {
            // Not wanted; and when it was computed all the same, go on.
            return !ask;
        }
        if ask {
            return true;
        }
        if let Err(problem) = state.take(tensor) {
            state.problem.get_or_insert(problem);
        }
        false
    }))
    .unwrap_or(false)
}
