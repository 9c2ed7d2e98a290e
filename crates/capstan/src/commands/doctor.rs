//! `capstan doctor`: what holds this machine back, and the commands that mend it. It changes nothing by itself.
//!
//! | module | idea |
//! |---|---|
//! | [`finding`] | what a check found, for people and for programs |
//! | [`root`] | files and programs of the system, read with limits |
//! | [`system`] | which Linux this is, and how it is told |
//! | [`processor`], [`memory`], [`graphics`], [`kernel`] | the machine |
//! | [`backends`] | what this build computes on |
//! | [`network`], [`mdns`], [`ports`] | the way to other machines |
//! | [`disk`], [`clock`] | where weights lie, what the time is |
//!
//! Each module reads first and judges then, so that a judgement can be tested with what another machine says. The facts
//! behind the judgements, and where they are from, are in `docs/hardware.md`.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::client::Client;
use crate::config::Config;
use crate::daemon_file::{DaemonFile, Found};
use crate::view;

use finding::{Check, Finding, State, count};
use graphics::Card;
use memory::Memory;
use processor::Processor;
use root::Root;
use system::System;

mod backends;
mod clock;
mod disk;
mod finding;
mod graphics;
mod kernel;
mod mdns;
mod memory;
mod network;
mod ports;
mod processor;
mod root;
mod system;

/// Shown by `capstan doctor --help`.
pub const EXAMPLES: &str = "\
Needs no daemon, no cluster and no root, and changes nothing: the commands it prints are yours to run. It writes up to
256 MiB to a file without a name in the data folder, to measure the disk, and sends one multicast packet; --skip leaves
either out. Exit status: 0 when nothing is a problem, 1 when something is. docs/hardware.md has the facts and sources.

Examples:
  capstan doctor
  capstan doctor --skip disk-speed,mdns
  capstan doctor --json | jq '.findings[] | select(.state == \"problem\")'";

/// Arguments of `capstan doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Checks to leave out, separated by commas
    #[arg(long, value_name = "CHECK", value_delimiter = ',', hide_possible_values = true)]
    skip: Vec<Check>,
    /// Read the files of another system below this folder
    #[arg(long, value_name = "DIR", default_value = "/", hide = true)]
    root: PathBuf,
}

impl DoctorArgs {
    fn wants(&self, check: Check) -> bool {
        !self.skip.contains(&check)
    }
}

/// Examines this machine and prints what it found.
pub async fn run(config: &Config, args: &DoctorArgs, json: bool) -> Result<ExitCode> {
    let findings = examine(config, args).await;
    let problems = count(&findings, State::Problem);
    if json {
        view::print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "system": std::env::consts::OS,
            "problems": problems,
            "warnings": count(&findings, State::Warning),
            "unknown": count(&findings, State::Unknown),
            "findings": findings,
        }))?;
    } else {
        view::print_line(finding::render(&findings))?;
    }
    Ok(if problems == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Makes every check, in the order of the report.
async fn examine(config: &Config, args: &DoctorArgs) -> Vec<Finding> {
    let root = Root::new(args.root.clone());
    let (system, processor, memory) = (System::read(&root), Processor::read(&root), Memory::read(&root));
    let cards = Card::read(&root);
    let is_known = processor.is_ryzen_ai_max() || cards.iter().any(Card::is_ryzen_ai_max);
    let (data_dir, api, node) = (&config.data_dir.value, config.api_addr.value, config.bind_addr.value);
    let client = Client::find(data_dir).ok();
    let daemon = match DaemonFile::find(data_dir) {
        Ok(Found::Running(daemon)) => Some(daemon),
        _ => None,
    };

    let mut findings = processor::findings(&root, &processor, memory.total);
    findings.extend(memory::findings(&root, &memory));
    findings.extend(graphics::findings(&root, &cards, &processor, &memory, &system));
    findings.extend(kernel::findings(&root, &cards, &system, is_known).await);
    if args.wants(Check::Backends) {
        findings.push(backends::finding(&cards).await);
    }
    findings.extend(network::findings(&root, node));
    if args.wants(Check::Mdns) {
        findings.push(mdns::finding().await);
    }
    findings.extend(disk::findings(&root, data_dir, args.wants(Check::DiskSpeed)).await);
    findings.extend(clock::findings(&root, client.as_ref()).await);
    for (check, kind, addr) in [(Check::ApiPort, ports::Kind::Api, api), (Check::NodePort, ports::Kind::Node, node)] {
        if args.wants(check) {
            findings.push(ports::finding(&root, kind, addr, daemon.as_ref()));
        }
    }

    findings.retain(|f| args.wants(f.check));
    let left_out = Check::value_variants().iter().filter(|check| !args.wants(**check));
    findings.extend(left_out.map(|check| Finding::unknown(*check, "left out by --skip")));
    findings.sort_by_key(|f| f.check);
    findings
}
