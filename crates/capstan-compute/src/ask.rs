//! Questions that a short-lived child answers in one line of JSON: because drivers may crash, a daemon never asks llama.cpp
//! itself. Each function gives the child's exit code.
use std::io::{Read, Write};

use capstan_llama::StageOptions;
use capstan_proto::child::StageSpec;
use capstan_proto::device::DeviceProfile;
use capstan_proto::manage::DeviceStatus;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::measure::{MeasureOptions, measure};
use crate::os::take_stdout;

/// Longest description of a stage, or profile of a device, that is read.
const QUESTION_BYTES_MAX: u64 = 1 << 20;

/// `capstan compute --devices`: what computes here.
pub fn devices() -> i32 {
    answer("the devices", || {
        capstan_llama::init();
        let device = |d: capstan_llama::DeviceInfo| DeviceStatus {
            name: d.name,
            description: d.description,
            kind: d.kind.as_str().to_owned(),
            memory_total_bytes: d.memory_total_bytes,
            memory_free_bytes: d.memory_free_bytes,
        };
        Ok(capstan_llama::devices().into_iter().map(device).collect::<Vec<_>>())
    })
}

/// `capstan compute --measure DIR`: what this machine takes to compute. With `--more`, what was measured before comes over
/// standard input, and goes out with more types of weights.
pub fn profile(mut options: MeasureOptions, more: bool) -> i32 {
    answer("the device profile", move || {
        if more {
            let known: DeviceProfile = read_json()?;
            known.check().map_err(|e| e.to_string())?;
            options.known = Some(known);
        }
        measure(&options).map_err(|e| e.to_string())
    })
}

/// What a daemon asks about.
fn read_json<T: DeserializeOwned>() -> Result<T, String> {
    let mut text = String::new();
    std::io::stdin().take(QUESTION_BYTES_MAX).read_to_string(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

/// `capstan compute --dry-run`: bytes of a stage's compute buffers, from its specification in JSON on standard input. The
/// shard may be a file of holes with the right header; nothing else of it is read.
pub fn dry_run() -> i32 {
    answer("the stage's buffers", || {
        let spec: StageSpec = read_json()?;
        let options = StageOptions::from_spec(&spec).map_err(|e| e.to_string())?;
        capstan_llama::dry_run(&options).map_err(|e| e.to_string())
    })
}

fn answer<T: Serialize>(what: &str, of: impl FnOnce() -> Result<T, String>) -> i32 {
    // Before anything of llama.cpp: drivers print.
    let written = take_stdout().map_err(|e| e.to_string()).and_then(|mut stdout| {
        let json = serde_json::to_vec(&of()?).map_err(|e| e.to_string())?;
        stdout.write_all(&json).map_err(|e| e.to_string())
    });
    match written {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(error, "{what} could not be told");
            1
        }
    }
}
