//! What this build of capstan can compute on. A short-lived child asks, as it does for the daemon: drivers may crash.
use std::ffi::OsString;
use std::time::Duration;

use capstan_proto::manage::DeviceStatus;

use super::finding::{Check, Finding, State};
use super::graphics::Card;
use crate::view;

/// How long the child may take; the daemon waits as long. Some drivers compile their programs first.
const ASK_TIMEOUT: Duration = Duration::from_secs(60);
/// Makers of graphics units on which llama.cpp computes: AMD, NVIDIA, Intel.
const MAKERS: [u32; 3] = [0x1002, 0x10de, 0x8086];
const LLAMA_BUILD: &str = "https://github.com/ggml-org/llama.cpp/blob/master/docs/build.md";

async fn devices() -> Result<Vec<DeviceStatus>, String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let command: [OsString; 3] = [exe.into(), "compute".into(), "--log-level=error".into()];
    let asked = tokio::time::timeout(ASK_TIMEOUT, capstan_compute::host::devices(&command)).await;
    asked.map_err(|_| format!("no answer within {} s", ASK_TIMEOUT.as_secs()))?.map_err(|e| e.to_string())
}

fn judge(devices: Result<Vec<DeviceStatus>, String>, cards: &[Card]) -> Finding {
    let check = Check::Backends;
    let devices = match devices {
        Ok(devices) => devices,
        Err(reason) => {
            return Finding::new(check, State::Problem, format!("the devices could not be listed: {reason}"))
                .why("Stages would fail the same way; a graphics driver is the likely reason. This shows all it says:")
                .mend(["capstan compute --devices --log-level debug"]);
        }
    };
    if devices.is_empty() {
        return Finding::new(check, State::Problem, "nothing can compute here")
            .why("Build capstan anew on this machine.");
    }
    let graphics = |d: &DeviceStatus| d.kind == "gpu" || d.kind == "igpu";
    let name = |d: &DeviceStatus| {
        let memory = if graphics(d) { format!(", {}", view::bytes(d.memory_total_bytes)) } else { String::new() };
        format!("{} ({}{memory})", d.name, d.description.trim())
    };
    let found = devices.iter().map(name).collect::<Vec<_>>().join(", ");
    if devices.iter().any(graphics) {
        return Finding::ok(check, found).source(LLAMA_BUILD);
    }
    if cards.iter().any(|c| MAKERS.contains(&c.vendor)) {
        return Finding::new(check, State::Problem, format!("{found} only, though a graphics unit is here"))
            .why(
                "This build has no backend for it, or its driver is not installed: `vulkaninfo --summary` says \
                whether Vulkan sees it. A build with Vulkan needs its headers and glslc (libvulkan-dev and glslc on \
                Debian and Ubuntu).",
            )
            .mend(["cargo build --release --locked --workspace --bins --features llama-cpp-sys-2/vulkan"])
            .source(LLAMA_BUILD);
    }
    Finding::ok(check, found).source(LLAMA_BUILD)
}

/// Lists the devices, and says whether one is left out.
pub async fn finding(cards: &[Card]) -> Finding {
    judge(devices().await, cards)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, kind: &str) -> DeviceStatus {
        let (name, description, kind) = (name.into(), " x ".into(), kind.into());
        DeviceStatus { name, description, kind, memory_total_bytes: 1 << 30, memory_free_bytes: 0 }
    }

    #[test]
    fn a_graphics_unit_that_is_left_out_is_a_problem() {
        let amd = [Card { vendor: 0x1002, ..Card::default() }];
        // A server's own small screen chip computes nothing.
        let matrox = [Card { vendor: 0x102b, ..Card::default() }];
        let cpu = || Ok(vec![device("CPU", "cpu")]);
        let state = |devices, cards: &[Card]| judge(devices, cards).state;
        assert_eq!((state(cpu(), &[]), state(cpu(), &matrox)), (State::Ok, State::Ok));
        assert_eq!(state(cpu(), &amd), State::Problem);
        let both = judge(Ok(vec![device("CPU", "cpu"), device("Vulkan0", "igpu")]), &amd);
        assert_eq!((both.state, both.found.as_str()), (State::Ok, "CPU (x), Vulkan0 (x, 1.0 GiB)"));
        assert_eq!((state(Ok(vec![]), &[]), state(Err("x".into()), &[])), (State::Problem, State::Problem));
    }
}
