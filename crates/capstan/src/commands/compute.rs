//! The hidden `capstan compute`: one stage, started by a daemon that talks over standard input and output.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use capstan_compute::ask;
use capstan_compute::measure::MeasureOptions;
use clap::Args;

use crate::cli::Global;
use crate::config::LogFormat;

/// Arguments of `capstan compute`.
#[derive(Args, Debug)]
pub struct ComputeArgs {
    /// Print this machine's devices as JSON and exit
    #[arg(long)]
    pub devices: bool,
    /// Measure what this machine takes to compute, with files in this folder, print it as JSON and exit
    #[arg(long, value_name = "DIR", conflicts_with = "devices")]
    pub measure: Option<PathBuf>,
    /// Print how large a stage's compute buffers are, and exit; its specification comes over standard input
    #[arg(long, conflicts_with_all = ["devices", "measure"])]
    pub dry_run: bool,
    /// Compute threads to measure with
    #[arg(long, requires = "measure")]
    pub threads: Option<u32>,
    /// Layers to put on a GPU while measuring; -1 is all
    #[arg(long, requires = "measure", default_value_t = -1, allow_negative_numbers = true)]
    pub gpu_layers: i32,
    /// What was measured before comes over standard input; only types of weights are measured that it lacks
    #[arg(long, requires = "measure")]
    pub more: bool,
}

/// Runs the stage until its daemon ends it. Standard output carries frames, so every log line goes to standard error.
pub fn run(global: &Global, args: &ComputeArgs) -> Result<ExitCode> {
    let level = global.log_level.as_deref().unwrap_or("info");
    crate::logging::init(level, global.log_format.unwrap_or(LogFormat::Text));
    crate::os::ignore_interrupt()?;
    let code = match &args.measure {
        _ if args.devices => ask::devices(),
        _ if args.dry_run => ask::dry_run(),
        Some(folder) => {
            let (folder, threads, gpu_layers) = (folder.clone(), args.threads, args.gpu_layers);
            ask::profile(MeasureOptions { folder, threads, gpu_layers, known: None }, args.more)
        }
        None => capstan_compute::child::run(),
    };
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
