//! `capstan load` and `capstan unload`: which models are served, and where.
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use capstan_proto::LayerRange;
use capstan_proto::manage::{DeploymentStatus, LoadEvent, LoadRequest};
use capstan_proto::weights::{ModelStatus, PullRequest, REPLICAS_MAX};
use capstan_store::remote::ModelName;
use clap::Args;
use serde_json::json;

use crate::cli::ModelFlags;
use crate::client::Client;
use crate::commands::plan::Wanted;
use crate::commands::{INTERRUPTED, cluster, pull};
use crate::config::Config;
use crate::progress::Progress;
use crate::view;

/// Shown by `capstan load --help`.
pub const LOAD_EXAMPLES: &str = "\
MODEL is a file of this machine, from which the other nodes fetch their parts (of a split model name the first file), or
a model that was pulled, by its name or source. One that was not pulled yet is pulled first.

Examples:
  capstan load model.gguf
  capstan load hf:unsloth/Qwen3-8B-GGUF:Q4_K_M
  capstan load model-00001-of-00008.gguf --name kimi --ctx 32768 --slots 2
  capstan load model.gguf --nodes alpha,beta,gamma
  capstan load model.gguf --layers alpha=0..10,beta=10..30
  capstan load model.gguf --nodes alpha,beta --draft small.gguf";

/// Shown by `capstan unload --help`.
pub const UNLOAD_EXAMPLES: &str = "\
Examples:
  capstan unload kimi";

/// Arguments of `capstan load`.
#[derive(Args, Debug)]
pub struct LoadArgs {
    /// The GGUF file, or a model that was pulled
    pub model: std::path::PathBuf,
    /// Name to serve it by [default: the file's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Nodes to use, in pipeline order [default: as many as it needs]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub nodes: Vec<String>,
    /// Layers of each node, in pipeline order, such as A=0..10,B=10..30 [default: equal work]
    #[arg(long, value_name = "A=0..10,B=10..30", value_delimiter = ',', value_parser = parse_layers)]
    pub layers: Vec<(String, LayerRange)>,
    /// Most sequences decoded in one micro-batch; 1 makes an answer independent of what runs beside it, bit for bit
    /// [default: as many as there are slots]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub decode_batch: Option<u32>,
    /// GGUF of a small model with the same vocabulary, which guesses tokens for the idle stages to check
    #[arg(long, value_name = "DRAFT.gguf")]
    pub draft: Option<std::path::PathBuf>,
    /// Keep copies of each layer on the disks of so many nodes, so that any can be lost; 0 leaves a file where it lies
    /// [default: 2 where there are other nodes and their disks allow it]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=i64::from(REPLICAS_MAX)))]
    pub replicas: Option<u16>,
    /// What the placement is to be best at, once nodes are measured: one token soonest, most tokens from all slots
    /// together, or both nearly [default: latency]
    #[arg(long, value_enum)]
    pub objective: Option<Wanted>,
    /// Caches and scheduling.
    #[command(flatten)]
    pub model_flags: ModelFlags,
}

/// What the path of a model of the catalogue begins with.
const PULLED: &str = "pulled:";

/// Arguments of `capstan unload`.
#[derive(Args, Debug)]
pub struct UnloadArgs {
    /// The model's name, as `capstan status` shows it
    pub name: String,
}

/// Loads a model and shows its stages.
pub async fn load(config: &Config, args: &LoadArgs, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    if !args.nodes.is_empty() && !args.layers.is_empty() {
        let named: Vec<&String> = args.layers.iter().map(|(node, _)| node).collect();
        if named != args.nodes.iter().collect::<Vec<_>>() {
            bail!("--nodes and --layers name different nodes; --layers alone is enough");
        }
    }
    let wanted = PullRequest {
        name: args.name.clone(),
        nodes: if args.layers.is_empty() { args.nodes.clone() } else { Vec::new() },
        layers: args.layers.clone(),
        replicas: args.replicas,
        ..PullRequest::default()
    };
    let Some(path) = find(&client, &args.model, wanted, json).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let request = LoadRequest {
        name: args.name.clone(),
        nodes: if args.layers.is_empty() { args.nodes.clone() } else { Vec::new() },
        layers: args.layers.clone(),
        decode_batch: args.decode_batch,
        objective: args.objective.map(Wanted::into),
        ..request(config, path.clone(), args.draft.as_deref())?
    };
    let Some(deployment) = follow(&client, &request, json).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    if !json {
        view::print_line(format!("{}\n", cluster::stages(&deployment)))?;
        if !deployment.detail.is_empty() {
            view::print_line(format!("{}\n", view::plain(&deployment.detail)))?;
        }
        if !path.starts_with(PULLED) && client.status().await?.nodes.len() > 1 {
            let only = "Its weights lie on this node's disk only: while this node is away, so is the model. \
                        `capstan load FILE --replicas 2` keeps copies on others.";
            view::print_line(format!("{only}\n"))?;
        }
        let name = view::plain(&deployment.name);
        view::print_line(format!("{name} is ready at {}; chat with it: capstan run {name}", client.openai_url()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What a load calls a model: a file's path, or a model of the catalogue, pulled first if need be. None when Ctrl-C came.
/// Where there are other nodes a file goes into the catalogue, too, so that its layers are copied. `wanted` says where
/// layers should lie, and how many copies there should be of each.
pub async fn find(client: &Client, model: &Path, wanted: PullRequest, json: bool) -> Result<Option<String>> {
    let pulled = |name: &str| format!("{PULLED}{name}");
    let replicas = wanted.replicas;
    let pull = async |source: String| {
        // Of what comes from elsewhere there is one copy at least.
        let replicas = replicas.map(|n| n.max(1));
        let request = PullRequest { source, replicas, ..wanted.clone() };
        Ok::<_, anyhow::Error>(pull::follow(client, &request, json).await?.map(|name| pulled(&name)))
    };
    let Some(text) = model.to_str().filter(|_| !model.is_file()) else {
        let path = model_path(model)?;
        if replicas.map_or(client.status().await?.nodes.len() < 2, |n| n == 0) {
            return Ok(Some(path));
        }
        return match pull(format!("file:{path}")).await {
            // Copies that nobody asked for are not worth a refusal: the disk may be full.
            Err(why) if replicas.is_none() => {
                eprintln!("Its layers are not copied: {why:#}");
                Ok(Some(path))
            }
            result => result,
        };
    };
    let same = |m: &ModelStatus| {
        let pinned = m.revision.as_ref().map(|r| format!("{}@{r}", m.source));
        m.name == text || m.source == text || m.id.to_string() == text || pinned.as_deref() == Some(text)
    };
    if let Some(known) = client.models().await?.iter().find(|m| same(m)) {
        if replicas.is_some_and(|n| n > 0 && n != known.replicas) {
            // Pulled again, by the very same version, only the number of copies changes.
            let revision = known.revision.as_ref().map(|r| format!("@{r}")).unwrap_or_default();
            return pull(format!("{}{revision}", known.source)).await;
        }
        return Ok(Some(pulled(&known.id.to_string())));
    }
    match text.parse::<ModelName>() {
        Ok(ModelName::File(_)) if text.starts_with("file:") => {}
        Ok(ModelName::File(_)) | Err(_) if text.ends_with(".gguf") || text.contains(std::path::MAIN_SEPARATOR) => {
            return Ok(Some(model_path(model)?));
        }
        Ok(ModelName::File(_)) => bail!(
            "there is no file {text}, and no model of that name was pulled; `capstan models` shows those that were"
        ),
        Ok(_) => {}
        Err(e) => bail!("{e}"),
    }
    pull(pull::source(text)?).await
}

/// What is asked of the daemon, as far as the settings say it. `path` is as [`find`] gives it, or [`model_path`].
pub fn request(config: &Config, path: String, draft: Option<&Path>) -> Result<LoadRequest> {
    Ok(LoadRequest {
        path,
        name: None,
        nodes: Vec::new(),
        layers: Vec::new(),
        ctx: config.ctx.value.0,
        slots: config.slots.value.0,
        decode_batch: None,
        speculation: Some(config.speculation.value.is_on()),
        draft: draft.map(model_path).transpose()?,
        prefix_cache: Some(config.prefix_cache.value.is_on()),
        decode_slowdown: Some(config.decode_slowdown.value),
        objective: None,
        rehearsal: None,
    })
}

/// Stops serving a model.
pub async fn unload(config: &Config, args: &UnloadArgs, json: bool) -> Result<ExitCode> {
    Client::find(&config.data_dir.value)?.unload(&args.name).await?;
    if json {
        view::print_json(&json!({ "unloaded": args.name }))?;
    } else {
        view::print_line(format!("{} is no longer served", view::plain(&args.name)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Loads a model, showing progress. None when Ctrl-C came: the load then goes on without this command.
pub async fn follow(client: &Client, request: &LoadRequest, json: bool) -> Result<Option<DeploymentStatus>> {
    let mut progress = Progress::new(json);
    let load = async {
        let mut events = client.load(request).await?;
        while let Some(event) = events.next().await? {
            progress.show(&event)?;
            match event {
                LoadEvent::Ready { deployment } => return Ok(deployment),
                LoadEvent::Failed { message } => bail!("{}", view::plain_text(&message)),
                _ => {}
            }
        }
        bail!("the daemon stopped telling about the load before it was done; `capstan status` shows how it stands")
    };
    let outcome = tokio::select! {
        deployment = load => deployment.map(Some),
        _ = tokio::signal::ctrl_c() => Ok(None),
    };
    // The bars would be drawn over what follows.
    drop(progress);
    if matches!(outcome, Ok(None)) {
        eprintln!("the load goes on in the background; `capstan status` shows how it stands");
    }
    outcome
}

/// A model file's absolute path, for the daemon works in another folder.
pub fn model_path(path: &Path) -> Result<String> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => bail!("{} is not a file; name the GGUF file itself", path.display()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!("there is no file {}", path.display()),
        Err(e) => bail!("{} cannot be read: {e}", path.display()),
    }
    match std::path::absolute(path)?.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(_) => bail!("the path {} is not valid UTF-8; rename it", path.display()),
    }
}

/// `NODE=START..END`.
pub fn parse_layers(text: &str) -> Result<(String, LayerRange), String> {
    let (node, range) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NODE=START..END"))?;
    if node.is_empty() {
        return Err(format!("{text:?} names no node; write NODE=START..END"));
    }
    Ok((node.to_string(), range.parse().map_err(|e: capstan_proto::layers::BadRange| e.to_string())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_name_a_node_and_a_range() {
        assert_eq!(parse_layers("a=0..10"), Ok(("a".into(), LayerRange::new(0, 10).unwrap())));
        for bad in ["a", "=0..1", "a=1", "a=3..3", "a=5..2"] {
            assert!(parse_layers(bad).is_err(), "{bad}");
        }
    }
}
