//! The `capstan` binary: it reads the command line and hands over to one command.
//!
//! | module | idea |
//! |---|---|
//! | [`cli`] | the command line as types |
//! | [`config`] | every setting's value, and where it came from |
//! | [`commands`] | one file a group of commands |
//! | [`daemon_file`] | how a command finds this machine's daemon |
//! | [`client`] | how it talks to it |
//! | [`lines`] | line and event streams, out of byte chunks |
//! | [`chat`] | one streamed answer |
//! | [`progress`] | how a load is shown |
//! | [`view`] | tables and sizes for people |
//! | [`logging`] | where logs go and what they look like |
//! | [`os`] | what depends on the operating system |
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

mod chat;
mod cli;
mod client;
mod commands;
mod config;
mod daemon_file;
mod lines;
mod logging;
mod os;
mod progress;
mod view;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match commands::run(cli) {
        Ok(code) => code,
        Err(e) if view::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            // `capstan up` looks for the last line of this form in a failed daemon's log.
            eprintln!("{}{e:#}", view::ERROR_PREFIX);
            ExitCode::FAILURE
        }
    }
}
