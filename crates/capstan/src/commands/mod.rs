//! One file a group of commands; this one hands over to them.
use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Cli, Command};
use crate::config::{Config, Flags, Source};

pub mod bench;
pub mod cluster;
pub mod compute;
pub mod daemon;
pub mod disk;
pub mod doctor;
pub mod key;
pub mod lifecycle;
pub mod models;
pub mod pair;
pub mod plan;
pub mod pull;
pub mod rehearse;
pub mod run;
pub mod settings;

/// Exit code of a command that Ctrl-C ended: 128 and the signal's number, as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Runs a command and says how it ended.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let Cli { global, command } = cli;
    let json = global.json;
    if let Command::Compute(args) = &command {
        // A stage takes everything from its daemon, so no config file can keep it from starting.
        return compute::run(&global, args);
    }
    let mut flags = Flags { global, ..Flags::default() };
    match &command {
        Command::Up(args) => flags.node = args.node.clone(),
        Command::Join(args) => flags.node = args.node.clone(),
        Command::Daemon(node) => flags.node = node.clone(),
        Command::Load(args) => flags.model = args.model_flags.clone(),
        Command::Run(args) => flags.model = args.model_flags.clone(),
        Command::Plan(args) => (flags.model.ctx, flags.model.slots) = (args.ctx, args.slots),
        Command::Config(args) => (flags.node, flags.model) = (args.node.clone(), args.model.clone()),
        _ => {}
    }
    if let Command::Completions(args) = command {
        return settings::completions(&args);
    }
    let config = Config::load(flags)?;
    let serves = matches!(&command, Command::Daemon(_)) || matches!(&command, Command::Up(args) if args.foreground);
    // A command's output is its answer; it logs below warnings only when asked to. A daemon's log is its only voice.
    let level = if !serves && config.log_level.source == Source::Default { "warn" } else { &config.log_level.value };
    crate::logging::init(level, config.log_format.value);

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        match command {
            Command::Up(args) => lifecycle::up(&config, &args, json).await,
            Command::Stop(args) => lifecycle::stop(&config, &args, json).await,
            Command::Daemon(_) => daemon::run(&config, None).await,
            Command::Join(args) => cluster::join(&config, &args, json).await,
            Command::Status => cluster::status(&config, json).await,
            Command::Pair(args) => pair::pair(&config, &args, json).await,
            Command::Key(args) => key::run(&config, &args, json).await,
            Command::Nodes => cluster::nodes(&config, json).await,
            Command::Node(command) => cluster::node(&config, &command, json).await,
            Command::Ticket(args) => cluster::ticket(&config, &args, json).await,
            Command::Leave => cluster::leave(&config, json).await,
            Command::Load(args) => models::load(&config, &args, json).await,
            Command::Unload(args) => models::unload(&config, &args, json).await,
            Command::Pull(args) => pull::run(&config, &args, json).await,
            Command::Models => disk::models(&config, json).await,
            Command::Model(args) => disk::act(&config, &args, json).await,
            Command::Disk => disk::disk(&config, json).await,
            Command::Run(args) => run::run(&config, &args, json).await,
            Command::Plan(args) => plan::plan(&config, &args, json).await,
            Command::Bench(args) => bench::run(&config, &args, json).await,
            Command::Rehearse(args) => rehearse::run(&config, &args, json).await,
            Command::Doctor(args) => doctor::run(&config, &args, json).await,
            Command::Config(_) => settings::config(&config, json),
            Command::Completions(_) | Command::Compute(_) => Ok(ExitCode::SUCCESS),
        }
    });
    // Do not wait for a thread that reads the terminal.
    runtime.shutdown_background();
    code
}
