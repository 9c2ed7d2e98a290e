//! Start llama.cpp once, and say which devices it can compute on.
use std::ffi::{CStr, c_char};
use std::sync::Once;

use llama_cpp_sys_2 as sys;

use crate::log;

/// Starts llama.cpp and routes its log to `tracing`. Every entry of this crate calls it; more calls do nothing.
pub fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::install();
        // SAFETY: called once, before anything else of llama.cpp.
        unsafe { sys::llama_backend_init() };
    });
}

/// What kind of device computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor, with main memory.
    Cpu,
    /// A graphics card with its own memory.
    Gpu,
    /// Graphics that share main memory.
    IntegratedGpu,
    /// Something that helps the processor, such as a BLAS library, and has no memory of its own.
    Accelerator,
}

impl DeviceKind {
    /// `cpu`, `gpu`, `igpu` or `accel`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::IntegratedGpu => "igpu",
            Self::Accelerator => "accel",
        }
    }
}

/// A device that ggml can compute on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As ggml names it, such as `CPU` or `Vulkan0`.
    pub name: String,
    /// For people: the product's name.
    pub description: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its memory in bytes.
    pub memory_total_bytes: u64,
    /// Of which free now. On Linux, for the processor, what the kernel says is available without swapping.
    pub memory_free_bytes: u64,
}

/// Whether so many layers (negative is all) are computed by something else than the processor.
pub fn offloads(gpu_layers: i32) -> bool {
    gpu_layers != 0 && devices().iter().any(|d| matches!(d.kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu))
}

/// The devices ggml was built for and finds on this machine.
pub fn devices() -> Vec<DeviceInfo> {
    init();
    // SAFETY: reads a registry that is filled before `init` returns.
    let count = unsafe { sys::ggml_backend_dev_count() };
    (0..count).filter_map(device).collect()
}

fn device(index: usize) -> Option<DeviceInfo> {
    // SAFETY: the index is below the count; devices are never removed, so the pointer stays valid.
    let dev = unsafe { sys::ggml_backend_dev_get(index) };
    if dev.is_null() {
        return None;
    }
    let (mut free, mut total) = (0usize, 0usize);
    // SAFETY: `dev` is a live device, and both sizes are written before the call returns.
    unsafe { sys::ggml_backend_dev_memory(dev, &mut free, &mut total) };
    // SAFETY: `dev` is a live device.
    let kind = match unsafe { sys::ggml_backend_dev_type(dev) } {
        sys::GGML_BACKEND_DEVICE_TYPE_CPU => DeviceKind::Cpu,
        sys::GGML_BACKEND_DEVICE_TYPE_GPU => DeviceKind::Gpu,
        sys::GGML_BACKEND_DEVICE_TYPE_IGPU => DeviceKind::IntegratedGpu,
        _ => DeviceKind::Accelerator,
    };
    if kind == DeviceKind::Cpu {
        // ggml calls all of main memory free.
        free = available_memory().map_or(free, |available| available.min(total));
    }
    // SAFETY: `dev` is a live device; its name and description live as long as it.
    let (name, description) =
        unsafe { (owned(sys::ggml_backend_dev_name(dev)), owned(sys::ggml_backend_dev_description(dev))) };
    Some(DeviceInfo { name, description, kind, memory_total_bytes: total as u64, memory_free_bytes: free as u64 })
}

fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// A copy of a C string; empty for null.
///
/// # Safety
/// `text` is null or points to a null-terminated string that stays valid during the call.
pub(crate) unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller promises it.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
