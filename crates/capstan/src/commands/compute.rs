//! The hidden `capstan compute`: one stage, started by a daemon that talks over standard input and output.
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::cli::Global;
use crate::config::LogFormat;

/// Arguments of `capstan compute`.
#[derive(Args, Debug)]
pub struct ComputeArgs {
    /// Print this machine's devices as JSON and exit
    #[arg(long)]
    pub devices: bool,
}

/// Runs the stage until its daemon ends it. Standard output carries frames, so every log line goes to standard error.
pub fn run(global: &Global, args: &ComputeArgs) -> Result<ExitCode> {
    let level = global.log_level.as_deref().unwrap_or("info");
    crate::logging::init(level, global.log_format.unwrap_or(LogFormat::Text));
    crate::os::ignore_interrupt()?;
    let code = if args.devices { capstan_compute::child::print_devices() } else { capstan_compute::child::run() };
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
