//! The command line as types: what clap parses, and what `--help` shows.
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    bench, cluster, compute, disk, doctor, key, lifecycle, models, pair, plan, pull, rehearse, run, settings,
};
use crate::config::{Auto, Listen, LogFormat, SnapshotLimit, Switch, parse};

const EXAMPLES: &str = "\
Examples:
  capstan up                                   start this machine's daemon
  capstan join CODE                            on another machine: join its cluster
  capstan load model.gguf --nodes alpha,beta   serve a model on two nodes
  capstan pull hf:OWNER/REPO:Q4_K_M            bring one from Hugging Face, to each node its layers
  capstan run model \"Why is the sky blue?\"     ask it
  capstan status                               nodes, models and stages
  capstan plan kimi-k2.5                       how many machines, and how fast, before you buy any

The API is OpenAI's: point any client at http://127.0.0.1:8420/v1.
Settings come from flags, else CAPSTAN_* variables, else the config file; `capstan config` shows them.";

/// Serve one language model from several ordinary machines.
#[derive(Debug, Parser)]
#[command(name = "capstan", version, after_help = EXAMPLES, max_term_width = 120)]
pub struct Cli {
    /// Flags that every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Args, Clone, Debug, Default)]
pub struct Global {
    /// Folder of this node's key, shards and logs [env: CAPSTAN_DATA_DIR]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub data_dir: Option<PathBuf>,
    /// Config file in TOML [env: CAPSTAN_CONFIG] [default: config.toml in the user's config folder]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub config: Option<PathBuf>,
    /// Least level that is logged, or a filter such as `warn,capstan_node=debug` [env: CAPSTAN_LOG_LEVEL]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = parse::log_level, help_heading = "Global options")]
    pub log_level: Option<String>,
    /// How logs are written [env: CAPSTAN_LOG_FORMAT]
    #[arg(long, global = true, value_name = "text|json", value_parser = parse::log_format, help_heading = "Global options")]
    pub log_format: Option<LogFormat>,
    /// Print JSON for programs
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
}

/// Settings of a daemon.
#[derive(Args, Clone, Debug, Default)]
pub struct NodeFlags {
    /// Name of this node, unique in its cluster [env: CAPSTAN_NAME] [default: the host's name]
    #[arg(long, value_parser = parse::name)]
    pub name: Option<String>,
    /// Address of the HTTP API for this machine, on loopback; port 0 lets the system choose [env: CAPSTAN_API_ADDR]
    /// [default: 127.0.0.1:8420]
    #[arg(long, value_name = "IP:PORT", value_parser = parse::api_addr)]
    pub api_addr: Option<SocketAddr>,
    /// Let other machines use the HTTP API at this address, with API keys; 0.0.0.0 is every address of this machine
    /// [env: CAPSTAN_LISTEN] [default: off]
    #[arg(long, value_name = "IP[:PORT]|off", value_parser = parse::listen)]
    pub listen: Option<Listen>,
    /// Demand no API keys of other machines that use models [env: CAPSTAN_NO_AUTH] [default: false]
    #[arg(long, value_name = "true|false", value_parser = parse::yes_no, num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub no_auth: Option<bool>,
    /// UDP address that other nodes dial; port 0 lets the system choose [env: CAPSTAN_BIND_ADDR] [default: 0.0.0.0:8421]
    #[arg(long, value_name = "IP:PORT", value_parser = parse::socket_addr)]
    pub bind_addr: Option<SocketAddr>,
    /// Leave multicast DNS alone, by which machines find each other while one of them shows a pairing code
    /// [env: CAPSTAN_NO_MDNS] [default: false]
    #[arg(long, value_name = "true|false", value_parser = parse::yes_no, num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub no_mdns: Option<bool>,
    /// Compute threads, or `auto` for every core [env: CAPSTAN_THREADS] [default: auto]
    #[arg(long, value_name = "N", value_parser = parse::auto_count)]
    pub threads: Option<Auto<u32>>,
    /// Memory that stages may take, such as 96GiB, or `auto` for what is free [env: CAPSTAN_MEMORY_LIMIT] [default: auto]
    #[arg(long, value_name = "SIZE", value_parser = parse::auto_size)]
    pub memory_limit: Option<Auto<u64>>,
    /// Disk space that models and shards may take, such as 500GB, or `auto` for what is free [env: CAPSTAN_DISK_LIMIT]
    /// [default: auto]
    #[arg(long, value_name = "SIZE", value_parser = parse::auto_size)]
    pub disk_limit: Option<Auto<u64>>,
    /// Memory that KV snapshots of a stage may take, such as 2GB, `off`, or `auto` for a quarter of what is free
    /// [env: CAPSTAN_SNAPSHOT_LIMIT] [default: auto]
    #[arg(long, value_name = "SIZE", value_parser = parse::snapshot_limit)]
    pub snapshot_limit: Option<SnapshotLimit>,
    /// Layers of a stage to put on a GPU; -1 is all [env: CAPSTAN_GPU_LAYERS] [default: -1]
    #[arg(long, value_name = "N", value_parser = parse::integer, allow_negative_numbers = true)]
    pub gpu_layers: Option<i32>,
    /// Measure this machine and its links while nothing runs on it (`auto`), or not (`off`) [env: CAPSTAN_MEASURE]
    /// [default: auto]
    #[arg(long, value_name = "auto|off", value_parser = parse::auto_off)]
    pub measure: Option<Switch>,
}

/// Settings of a load.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelFlags {
    /// Tokens a slot holds, or `auto` for the model's own context, at most 4096 [env: CAPSTAN_CTX] [default: auto]
    #[arg(long, value_name = "N", value_parser = parse::auto_count)]
    pub ctx: Option<Auto<u32>>,
    /// Requests answered at once, or `auto` [env: CAPSTAN_SLOTS] [default: auto]
    #[arg(long, value_name = "N", value_parser = parse::auto_count)]
    pub slots: Option<Auto<u32>>,
    /// Let idle stages check guessed tokens (`auto`), or not (`off`); answers do not change [env: CAPSTAN_SPECULATION]
    /// [default: auto]
    #[arg(long, value_name = "auto|off", value_parser = parse::auto_off)]
    pub speculation: Option<Switch>,
    /// Whether a prompt takes what an earlier one with the same beginning left in the caches [env: CAPSTAN_PREFIX_CACHE]
    /// [default: on]
    #[arg(long, value_name = "on|off", value_parser = parse::prefix_cache)]
    pub prefix_cache: Option<Switch>,
    /// How many times as long a decode step may take while prompts come in: less keeps answers flowing, more lets new
    /// ones begin sooner [env: CAPSTAN_DECODE_SLOWDOWN] [default: 1.75]
    #[arg(long, value_name = "TIMES", value_parser = parse::decode_slowdown)]
    pub decode_slowdown: Option<f32>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start this machine's daemon and print how other machines join
    #[command(after_help = lifecycle::UP_EXAMPLES)]
    Up(lifecycle::UpArgs),
    /// Join the cluster of a pairing code or a ticket, starting the daemon if it is not running
    #[command(after_help = cluster::JOIN_EXAMPLES)]
    Join(cluster::JoinArgs),
    /// Show nodes, devices, memory, models, stages and their health
    #[command(after_help = cluster::STATUS_EXAMPLES)]
    Status,
    /// Show a short code by which one other machine of this network joins
    #[command(after_help = pair::EXAMPLES)]
    Pair(pair::PairArgs),
    /// API keys: what other machines show to use this API
    #[command(after_help = key::EXAMPLES)]
    Key(key::KeyArgs),
    /// Show the nodes: who is online, who votes
    #[command(after_help = cluster::NODES_EXAMPLES)]
    Nodes,
    /// Take a node out of the cluster
    #[command(subcommand, after_help = cluster::NODE_EXAMPLES)]
    Node(cluster::NodeCommand),
    /// Make another join ticket
    #[command(after_help = cluster::TICKET_EXAMPLES)]
    Ticket(cluster::TicketArgs),
    /// Serve a model from a GGUF file of this machine, split over nodes
    #[command(after_help = models::LOAD_EXAMPLES)]
    Load(models::LoadArgs),
    /// Stop serving a model
    #[command(after_help = models::UNLOAD_EXAMPLES)]
    Unload(models::UnloadArgs),
    /// Bring a model into the cluster, from Hugging Face, an address or a file
    #[command(after_help = pull::EXAMPLES)]
    Pull(pull::PullArgs),
    /// Show the models that were pulled, and who has which layers
    #[command(after_help = disk::MODELS_EXAMPLES)]
    Models,
    /// Verify, remove or export a model that was pulled
    #[command(after_help = disk::MODEL_EXAMPLES)]
    Model(disk::ModelArgs),
    /// Show what lies on each node's disk
    #[command(after_help = disk::DISK_EXAMPLES)]
    Disk,
    /// Chat with a model in the terminal, loading it if need be
    #[command(after_help = run::EXAMPLES)]
    Run(run::RunArgs),
    /// How many machines a model takes, and how fast it will be, without a cluster
    #[command(after_help = plan::EXAMPLES)]
    Plan(plan::PlanArgs),
    /// Measure a running server: TTFT, ITL and throughput
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchArgs),
    /// Measure how fast a model will be here before fetching it: the real thing, with weights that are made up
    #[command(after_help = rehearse::EXAMPLES)]
    Rehearse(rehearse::RehearseArgs),
    /// Say what holds this machine back, and the commands that mend it
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Leave the cluster; this node is then alone in a new one
    #[command(after_help = cluster::LEAVE_EXAMPLES)]
    Leave,
    /// Stop this machine's daemon and its stages
    #[command(after_help = lifecycle::STOP_EXAMPLES)]
    Stop(lifecycle::StopArgs),
    /// Show every setting and where its value came from
    #[command(after_help = settings::CONFIG_EXAMPLES)]
    Config(settings::ConfigArgs),
    /// Print a completion script for a shell
    #[command(after_help = settings::COMPLETIONS_EXAMPLES)]
    Completions(settings::CompletionsArgs),
    /// Run the daemon in the foreground (what `capstan up` starts)
    #[command(hide = true)]
    Daemon(NodeFlags),
    /// Run one stage for the daemon that started this process
    #[command(hide = true)]
    Compute(compute::ComputeArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_visible_command_shows_an_example() {
        for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let usage = format!("capstan {}", command.get_name());
            assert!(help.contains(&usage), "{usage} has no example");
        }
    }
}
