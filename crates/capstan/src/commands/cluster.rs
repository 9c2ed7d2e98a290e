//! `capstan join`, `status`, `nodes`, `node`, `ticket` and `leave`: this node and the others.
use std::process::ExitCode;

use anyhow::{Result, bail};
use capstan_cluster::Ticket;
use capstan_proto::manage::{ClusterStatus, DeploymentStatus, DeviceStatus, Health, NodeStatus};
use clap::Args;
use serde_json::json;

use crate::cli::NodeFlags;
use crate::client::Client;
use crate::commands::{lifecycle, pair};
use crate::config::Config;
use crate::view::{self, Table};

/// Shown by `capstan join --help`.
pub const JOIN_EXAMPLES: &str = "\
`capstan up` on the first machine prints the whole line to run; `capstan pair` and `capstan ticket` print others.

Examples:
  capstan join                              finds machines that show a pairing code, and asks for it
  capstan join 42-K7QM2X
  capstan join 42-K7QM2X --at 192.168.1.5   where multicast DNS does not get through
  capstan join TICKET --name beta --memory-limit 96GiB
  capstan join - < ticket.txt               keeps it out of the list of processes";

/// Shown by `capstan status --help`.
pub const STATUS_EXAMPLES: &str = "\
Examples:
  capstan status
  capstan status --json | jq '.deployments[].stages[] | {node_name, layers, pid}'";

/// Shown by `capstan ticket --help`.
pub const TICKET_EXAMPLES: &str = "\
Who has the ticket may join the cluster, so treat it like a password.

Examples:
  capstan ticket                         for one machine, within an hour
  capstan ticket --reusable --ttl 1d     for any number of machines, within a day";

/// Shown by `capstan leave --help`.
pub const LEAVE_EXAMPLES: &str = "\
Models that have a stage on this node stop answering until they are loaded again without it.

Examples:
  capstan leave";

/// Longest life of a ticket, in seconds: 30 days. A longer one is a password that nobody remembers having given away.
const TTL_MAX_S: u64 = 30 * 86_400;

/// Arguments of `capstan join`.
#[derive(Args, Debug)]
pub struct JoinArgs {
    /// The code or ticket that `capstan up`, `capstan pair` or `capstan ticket` printed on a member; `-` reads it from
    /// standard input, and none asks for the code
    #[arg(value_name = "CODE|TICKET")]
    pub word: Option<String>,
    /// With a code: the machine that showed it, where it is not found by itself
    #[arg(long, value_name = "HOST[:PORT]")]
    pub at: Option<String>,
    /// Settings of the daemon.
    #[command(flatten)]
    pub node: NodeFlags,
}

/// Shown by `capstan nodes --help`.
pub const NODES_EXAMPLES: &str = "\
Examples:
  capstan nodes           voters decide together what the cluster is; learners hear of it
  capstan nodes --json";

/// Shown by `capstan node --help`.
pub const NODE_EXAMPLES: &str = "\
Examples:
  capstan node drain beta     its stages are loaded elsewhere first
  capstan node remove beta    all nodes refuse beta's key from now on, also those that are away at the moment";

/// What `capstan node` does.
#[derive(Debug, clap::Subcommand)]
pub enum NodeCommand {
    /// Load elsewhere what has a stage on a node; models that were placed by hand are named
    Drain {
        /// The node's name, or its key
        name: String,
    },
    /// Take a node out of the cluster for good: its key is refused by all nodes from now on
    Remove {
        /// The node's name, or its key
        name: String,
    },
}

/// Arguments of `capstan ticket`.
#[derive(Args, Debug)]
pub struct TicketArgs {
    /// How long it is good, such as 90s, 15m, 1h or 2d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_ttl)]
    pub ttl: u64,
    /// Let any number of machines use it
    #[arg(long)]
    pub reusable: bool,
}

/// Joins a cluster, starting the daemon if it is not running.
pub async fn join(config: &Config, args: &JoinArgs, json: bool) -> Result<ExitCode> {
    let mut up = Up { config, client: None, started: false };
    let joined = async {
        let word = pair::word(args.word.as_deref(), async || up.client().await, args.at.is_some()).await?;
        // A mistyped word starts no daemon. Whether it has expired is for the clock of its cluster to say.
        if pair::is_code(&word)? {
            let at = match &args.at {
                Some(at) => Some(pair::resolve(at).await?),
                None => None,
            };
            pair::join(&up.client().await?, &word, at).await
        } else {
            if args.at.is_some() {
                bail!("a ticket says itself where to go; --at is for pairing codes");
            }
            word.parse::<Ticket>()?;
            Ok(up.client().await?.join(&word).await?)
        }
    };
    let joined = joined.await;
    let status = match joined {
        Ok(status) => status,
        Err(error) => {
            if let (true, Some(client)) = (up.started, &up.client)
                && let Err(error) = client.stop(true).await
            {
                eprintln!("the daemon that was started for this could not be stopped again: {error}");
            }
            return Err(error);
        }
    };
    let client = up.client().await?;
    if json {
        view::print_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    let name = status.nodes.iter().find(|n| n.is_self).map_or(config.name.value.as_str(), |n| &n.name);
    let (name, cluster) = (view::plain(name), status.cluster.short());
    view::print_line(format!("joined cluster {cluster} as {name}; API {}\n", client.openai_url()))?;
    view::print_line(describe(&status))?;
    Ok(ExitCode::SUCCESS)
}

/// This machine's daemon, started when it is first needed.
struct Up<'a> {
    config: &'a Config,
    client: Option<Client>,
    started: bool,
}

impl Up<'_> {
    async fn client(&mut self) -> Result<Client> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let (client, started) = lifecycle::ensure_up(self.config).await?;
        (self.client, self.started) = (Some(client.clone()), started);
        Ok(client)
    }
}

/// Shows the cluster as this node sees it.
pub async fn status(config: &Config, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    let status = client.status().await?;
    if json {
        view::print_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    view::print_line(format!("Cluster {}, API {}\n", status.cluster.short(), client.openai_url()))?;
    view::print_line(describe(&status))?;
    let running = &client.daemon().version;
    if running != env!("CARGO_PKG_VERSION") {
        let ours = env!("CARGO_PKG_VERSION");
        eprintln!(
            "note: the daemon runs version {running}, this command is {ours}; `capstan stop` and `capstan up` renew it"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows the nodes alone.
pub async fn nodes(config: &Config, json: bool) -> Result<ExitCode> {
    let status = Client::find(&config.data_dir.value)?.status().await?;
    if json {
        view::print_json(&status.nodes)?;
    } else {
        view::print_line(describe_nodes(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Does something about one node.
pub async fn node(config: &Config, command: &NodeCommand, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    let (status, done) = match command {
        NodeCommand::Remove { name } => {
            let done = format!("removed {name}: its key is refused by all nodes from now on, for good");
            (client.remove_node(name).await?, done)
        }
        NodeCommand::Drain { name } => {
            let status = client.drain_node(name).await?;
            let drained = status.nodes.iter().find(|n| n.name == *name || n.id.to_string() == *name).map(|n| n.id);
            let looks_after = |d: &&DeploymentStatus| Some(d.coordinator) == drained;
            let models: Vec<_> = status.deployments.iter().filter(looks_after).map(|d| d.name.as_str()).collect();
            let mut done = format!("{name} holds no stage any more and can be stopped");
            if !models.is_empty() {
                done += &format!(
                    "; it looks after {} still: those pause for 15 s then, until another node does or it is back",
                    models.join(", ")
                );
            }
            (status, done)
        }
    };
    if json {
        view::print_json(&status)?;
    } else {
        view::print_line(format!("{}\n", view::plain(&done)))?;
        view::print_line(describe_nodes(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes another ticket.
pub async fn ticket(config: &Config, args: &TicketArgs, json: bool) -> Result<ExitCode> {
    let reply = Client::find(&config.data_dir.value)?.ticket(args.ttl, args.reusable).await?;
    if json {
        view::print_json(&reply)?
    } else {
        let who = if reply.reusable { "On the other machines, run" } else { "On the other machine, run" };
        lifecycle::print_join_line(who, &reply, args.ttl)?
    }
    Ok(ExitCode::SUCCESS)
}

/// Leaves the cluster.
pub async fn leave(config: &Config, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    client.leave().await?;
    if json {
        view::print_json(&json!({ "left": true }))?;
    } else {
        view::print_line("left the cluster; this node is alone in a new one. `capstan stop` ends its daemon")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Nodes, deployments and stages as tables.
pub fn describe(status: &ClusterStatus) -> String {
    let mut parts = vec![describe_nodes(status)];
    if status.deployments.is_empty() {
        parts.push("No model is loaded; `capstan load MODEL.gguf` loads one.".into());
    } else {
        parts.push(deployments(&status.deployments));
        parts.extend(status.deployments.iter().map(stages));
        let notes = |d: &DeploymentStatus| [d.detail.clone(), savings(d)].map(|note| (d.name.clone(), note));
        let notes = status.deployments.iter().flat_map(notes).filter(|(_, note)| !note.is_empty());
        let lines: Vec<_> = notes.map(|(name, note)| view::plain(&format!("{name}: {note}"))).collect();
        if !lines.is_empty() {
            parts.push(lines.join("\n"));
        }
    }
    parts.join("\n\n")
}

/// Nodes as a table, who votes, and what somebody should look at.
fn describe_nodes(status: &ClusterStatus) -> String {
    let notes = [&status.agreement].into_iter().chain(&status.warnings).filter(|note| !note.is_empty());
    [node_table(&status.nodes)].into_iter().chain(notes.map(|note| view::plain(note))).collect::<Vec<_>>().join("\n")
}

fn node_table(nodes: &[NodeStatus]) -> String {
    let mut table = Table::new(&["NODE", "STATE", "VOTE", "RTT", "FREE", "MEMORY", "DEVICES"], &[3, 4, 5]);
    for n in nodes {
        let name = if n.is_self { format!("{} (this node)", n.name) } else { n.name.clone() };
        table.row(vec![
            name,
            if n.online { "online".into() } else { "offline".into() },
            if n.votes { "voter".into() } else { "learner".into() },
            n.rtt_us.map_or("–".into(), view::micros),
            view::bytes(n.memory_free_bytes),
            view::bytes(n.memory_total_bytes),
            n.devices.iter().map(device).collect::<Vec<_>>().join(", "),
        ]);
    }
    table.render("")
}

fn device(d: &DeviceStatus) -> String {
    let what = if d.description.is_empty() { &d.name } else { &d.description };
    let own = if d.kind == "cpu" { String::new() } else { format!(", {} free", view::bytes(d.memory_free_bytes)) };
    format!("{} ({}{own})", what.trim(), d.kind)
}

fn deployments(deployments: &[DeploymentStatus]) -> String {
    let mut table = Table::new(&["MODEL", "HEALTH", "LAYERS", "CTX", "SLOTS", "EPOCH", "ARCHITECTURE"], &[2, 3, 4, 5]);
    for d in deployments {
        table.row(vec![
            d.name.clone(),
            health(d.health).into(),
            d.layers.to_string(),
            d.ctx.to_string(),
            d.slots.to_string(),
            d.epoch.to_string(),
            d.architecture.clone(),
        ]);
    }
    table.render("")
}

/// One deployment's stages as a table.
pub fn stages(d: &DeploymentStatus) -> String {
    let heading = ["STAGE", "NODE", "LAYERS", "SHARD", "MEMORY", "PID", "HEALTH"];
    let mut table = Table::new(&heading, &[0, 3, 4, 5]);
    for s in &d.stages {
        table.row(vec![
            s.stage.to_string(),
            s.node_name.clone(),
            s.layers.to_string(),
            view::bytes(s.shard_bytes),
            view::bytes(s.memory_bytes),
            s.pid.map_or("–".into(), |pid| pid.to_string()),
            health(s.health).into(),
        ]);
    }
    let title = if d.stages.len() == 1 { "stage" } else { "stages" };
    format!("{} {title} of {}\n{}", d.stages.len(), view::plain(&d.name), table.render("  "))
}

/// What guesses and the cache have saved since the pipeline was wired; empty when there is nothing to say.
fn savings(d: &DeploymentStatus) -> String {
    let Some(driver) = d.stages.last().map(|s| &s.stats) else { return String::new() };
    let percent = |part: u64, of: u64| part as f64 / of as f64 * 100.0;
    let mut parts = Vec::new();
    if driver.guessed > 0 {
        let right = percent(driver.accepted, driver.guessed);
        parts.push(format!("{right:.0} % of {} guessed tokens were right", driver.guessed));
    }
    if driver.cached_tokens > 0 && driver.prompt_tokens > 0 {
        let cached = percent(driver.cached_tokens, driver.prompt_tokens);
        parts.push(format!("{cached:.0} % of {} prompt tokens came from the cache", driver.prompt_tokens));
    }
    parts.join(", ")
}

/// A health in a word.
pub fn health(health: Health) -> &'static str {
    match health {
        Health::Loading => "loading",
        Health::Ready => "ready",
        Health::Recovering => "recovering",
        Health::Failed => "failed",
    }
}

/// A span of time in seconds, at most 30 days.
pub fn parse_ttl(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 0,
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
        Some(s) if (1..=TTL_MAX_S).contains(&s) => Ok(s),
        _ => Err(format!("write a number with s, m, h or d, at most {}", view::seconds(TTL_MAX_S))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn savings_are_told_when_there_are_any() {
        let mut d: DeploymentStatus = serde_json::from_value(json!({
            "id": 1, "name": "m", "model_hash": "", "architecture": "llama", "layers": 2, "epoch": 1,
            "health": "ready", "detail": "", "coordinator": capstan_proto::NodeId([1; 32]), "ctx": 64, "slots": 1,
            "created_unix_s": 1,
            "stages": [{
                "stage": 0, "node": capstan_proto::NodeId([1; 32]), "node_name": "a",
                "layers": capstan_proto::LayerRange::new(0, 2).unwrap(), "pid": 1, "shard_bytes": 1,
                "memory_bytes": 1, "device": "", "health": "ready",
                "stats": capstan_proto::child::ChildStats::default(),
            }],
        }))
        .unwrap();
        assert_eq!(savings(&d), "");
        let stats = &mut d.stages[0].stats;
        (stats.guessed, stats.accepted, stats.prompt_tokens, stats.cached_tokens) = (40, 30, 200, 0);
        assert_eq!(savings(&d), "75 % of 40 guessed tokens were right");
        d.stages[0].stats.cached_tokens = 50;
        assert!(savings(&d).ends_with("were right, 25 % of 200 prompt tokens came from the cache"));
    }

    #[test]
    fn the_life_of_a_ticket_has_units_and_a_bound() {
        assert_eq!((parse_ttl("90"), parse_ttl("15m"), parse_ttl("2d")), (Ok(90), Ok(900), Ok(172_800)));
        for bad in ["", "0", "h", "1w", "31d", "-1h", "99999999999999999999d", "1é"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
