//! `capstan models`, `capstan model …` and `capstan disk`: which models are here, who has what, and what lies where.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use capstan_proto::weights::{ModelOutcome, ModelStatus, NodeDisk};
use clap::{Args, Subcommand};

use crate::client::Client;
use crate::config::Config;
use crate::view::{self, Table};

/// Shown by `capstan models --help`.
pub const MODELS_EXAMPLES: &str = "\
Examples:
  capstan models
  capstan models --json";

/// Shown by `capstan model --help`.
pub const MODEL_EXAMPLES: &str = "\
Examples:
  capstan model verify kimi
  capstan model export kimi /backup/kimi.gguf
  capstan model remove kimi";

/// Shown by `capstan disk --help`.
pub const DISK_EXAMPLES: &str = "\
The limit of a node is its setting disk_limit. What nobody uses makes way, the least recently used first; the last copy
of a layer never does.

Examples:
  capstan disk
  capstan disk --json";

/// Arguments of `capstan model`.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// What can be done with a model of the catalogue.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Read all its copies again on all nodes, and mend what is wrong
    Verify {
        /// The model's name, as `capstan models` shows it
        name: String,
    },
    /// Delete it on all nodes; a file that was pulled from a disk stays
    Remove {
        /// The model's name, as `capstan models` shows it
        name: String,
    },
    /// Write it as one ordinary GGUF
    Export {
        /// The model's name, as `capstan models` shows it
        name: String,
        /// The file to write
        path: PathBuf,
    },
}

/// Shows the models of the catalogue.
pub async fn models(config: &Config, json: bool) -> Result<ExitCode> {
    let models = Client::find(&config.data_dir.value)?.models().await?;
    if json {
        view::print_json(&models)?;
    } else if models.is_empty() {
        view::print_line("no model was pulled yet; `capstan pull --help` shows how")?;
    } else {
        view::print_line(models.iter().map(model).collect::<Vec<_>>().join("\n\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn model(m: &ModelStatus) -> String {
    let mut lines =
        vec![format!("{}  {}, {} layers, {}", view::plain(&m.name), view::bytes(m.bytes), m.layers, m.id.short())];
    let revision = m.revision.as_ref().map(|r| format!(" @ {}", view::plain(r))).unwrap_or_default();
    lines.push(format!("  from     {}{revision}", view::plain(&m.source)));
    for file in m.files.iter().filter(|f| f.sha256.is_some()) {
        let hash = file.sha256.map(|h| h.to_string()).unwrap_or_default();
        lines.push(format!("  sha256   {hash}  {}", view::plain(&file.path)));
    }
    let enough = if m.copies < m.replicas { format!(", {} wanted", m.replicas) } else { String::new() };
    lines.push(format!("  copies   {} of each layer{enough}", m.copies));
    let mut table = Table::new(&["part", "size", "blake3", "nodes"], &[1]);
    for part in &m.parts {
        let nodes = if part.nodes.is_empty() { "nobody".into() } else { part.nodes.join(", ") };
        table.row(vec![part.what.clone(), view::bytes(part.bytes), part.hash.short(), nodes]);
    }
    lines.push(table.render("  "));
    lines.join("\n")
}

/// Does something with a model of the catalogue.
pub async fn act(config: &Config, args: &ModelArgs, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    let outcome = match &args.action {
        Action::Verify { name } => client.act_on_model("verify", name, None).await?,
        Action::Remove { name } => client.act_on_model("remove", name, None).await?,
        Action::Export { name, path } => {
            let path = std::path::absolute(path)?;
            let Some(path) = path.to_str() else {
                bail!("the path {} is not valid UTF-8; choose another", path.display())
            };
            client.act_on_model("export", name, Some(path)).await?
        }
    };
    show(&outcome, json)
}

fn show(outcome: &ModelOutcome, json: bool) -> Result<ExitCode> {
    if json {
        view::print_json(outcome)?;
    } else {
        for line in &outcome.done {
            view::print_line(view::plain(line))?;
        }
        for line in &outcome.trouble {
            eprintln!("{}", view::plain(line));
        }
    }
    Ok(if outcome.trouble.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Shows what lies on which disk.
pub async fn disk(config: &Config, json: bool) -> Result<ExitCode> {
    let nodes = Client::find(&config.data_dir.value)?.disk().await?;
    if json {
        view::print_json(&nodes)?;
    } else {
        view::print_line(nodes.iter().map(node).collect::<Vec<_>>().join("\n\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn node(n: &NodeDisk) -> String {
    let limit = n.limit_bytes.map_or("no limit".into(), |l| format!("limit {}", view::bytes(l)));
    let away = if n.online { "" } else { " (does not answer; as it said last)" };
    let mut text = format!(
        "{}{away}: {} used, {} free, {limit}",
        view::plain(&n.node_name),
        view::bytes(n.used_bytes),
        view::bytes(n.free_bytes)
    );
    if !n.parts.is_empty() {
        let mut table = Table::new(&["model", "part", "size"], &[2]);
        for part in &n.parts {
            table.row(vec![part.model.clone(), part.what.clone(), view::bytes(part.bytes)]);
        }
        text = format!("{text}\n{}", table.render("  "));
    }
    text
}
