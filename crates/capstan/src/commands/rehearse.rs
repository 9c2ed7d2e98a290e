//! `capstan rehearse`: run the real thing on the real nodes with weights that are made up, before the model is fetched.
//!
//! ```text
//! header ─▶ a file of holes ─▶ load (each node makes its own weights up) ─▶ measure over HTTP ─▶ unload
//! ```
//!
//! | module | idea |
//! |---|---|
//! | [`subject`] | what is rehearsed: a file's header, or one made from the catalogue; all layers, or so many |
//! | [`measure`] | time to the first token and tokens per second, by token ids |
//! | [`report`] | JSON for programs, tables for people |
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use capstan_proto::LayerRange;
use capstan_proto::manage::{
    ClusterStatus, DeploymentStatus, LoadEvent, LoadForecast, LoadRequest, PlannedStage, Rehearsal,
};
use clap::Args;

use crate::client::{Client, ClientError};
use crate::commands::bench::interrupt::Interrupt;
use crate::commands::{INTERRUPTED, models};
use crate::config::Config;
use crate::progress::Progress;
use crate::view;
use measure::{Measured, Trial};
use report::Report;
use subject::Subject;

mod measure;
mod report;
mod subject;

/// Shown by `capstan rehearse --help`.
pub const EXAMPLES: &str = "\
Loads a model of the same shape and quantisation onto the running cluster, each node making its weights up, measures it,
and unloads it. Of MODEL only the header is read. Answers are nonsense; memory, load and speed are real.

Examples:
  capstan rehearse hf:unsloth/Kimi-K2.5-GGUF:UD-Q2_K_XL
  capstan rehearse \"Kimi K2.5\" --nodes alpha,beta,gamma,delta --ctx 32768
  capstan rehearse model.gguf --prompt-tokens 512,4096 --concurrency 1,8
  capstan rehearse \"GLM-4.6\" --scale 8       eight layers, extrapolated to all of them";

/// Context that is a multiple of this costs no more than a smaller one.
const CTX_STEP: u32 = 256;
/// Longest prompt and answer.
const TOKENS_MAX: i64 = 1 << 20;

/// Arguments of `capstan rehearse`.
#[derive(Args, Debug)]
pub struct RehearseArgs {
    /// A GGUF file, an address, hf:OWNER/REPO:QUANT, or a name of the catalogue, such as "Kimi K2.5:UD-Q2_K_XL"
    pub model: String,
    /// Nodes to use, in pipeline order [default: as many as it needs]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub nodes: Vec<String>,
    /// Layers of each node, in pipeline order, such as A=0..10,B=10..30 [default: equal work]
    #[arg(long, value_name = "A=0..10,B=10..30", value_delimiter = ',', value_parser = models::parse_layers)]
    pub layers: Vec<(String, LayerRange)>,
    /// Tokens a slot holds [default: what the longest prompt and answer take]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    pub ctx: Option<u32>,
    /// Sequences at once [default: as many as the highest concurrency]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub slots: Option<u32>,
    /// Lengths of the prompts whose time to the first token is measured
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "128,512",
          value_parser = clap::value_parser!(u32).range(1..=TOKENS_MAX))]
    pub prompt_tokens: Vec<u32>,
    /// Tokens of each answer whose speed is measured
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=TOKENS_MAX))]
    pub tokens: u32,
    /// Answers made at once
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,4",
          value_parser = clap::value_parser!(u32).range(1..=256))]
    pub concurrency: Vec<u32>,
    /// Rehearse only so many layers, dense ones and ones with experts in proportion, and extrapolate to all of them
    #[arg(long, value_name = "LAYERS", value_parser = clap::value_parser!(u32).range(1..))]
    pub scale: Option<u32>,
    /// Take memory only for weights that are read, and let every token choose the same experts, so that a model far larger
    /// than the memory can be run. Proves sizes and limits; the speed means nothing. Linux only
    #[arg(long)]
    pub sparse: bool,
    /// Leave it loaded; `capstan unload` ends it
    #[arg(long)]
    pub keep: bool,
}

impl RehearseArgs {
    fn slots(&self) -> u32 {
        self.slots.unwrap_or_else(|| self.concurrency.iter().copied().max().unwrap_or(1))
    }

    fn ctx(&self) -> u32 {
        let longest = self.prompt_tokens.iter().copied().max().unwrap_or(0).max(measure::SHORT_PROMPT);
        self.ctx.unwrap_or_else(|| (longest + self.tokens).next_multiple_of(CTX_STEP))
    }

    fn check(&self) -> Result<()> {
        let (ctx, slots) = (self.ctx(), self.slots());
        if let Some(long) = self.prompt_tokens.iter().find(|p| **p >= ctx) {
            bail!("a prompt of {long} tokens does not fit a context of {ctx}; give a larger --ctx");
        }
        if measure::SHORT_PROMPT + self.tokens > ctx {
            bail!("answers of {} tokens do not fit a context of {ctx}; give a larger --ctx", self.tokens);
        }
        if let Some(many) = self.concurrency.iter().find(|c| **c > slots) {
            bail!("{many} answers at once take as many slots, not {slots}; leave --slots out or raise it");
        }
        Ok(())
    }
}

/// Rehearses a model.
pub async fn run(config: &Config, args: &RehearseArgs, json: bool) -> Result<ExitCode> {
    args.check()?;
    let client = Client::find(&config.data_dir.value)?;
    let mut interrupt = Interrupt::new();
    let Some(subject) = interrupt.unless(Subject::find(&args.model, args.scale)).await else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let subject = subject?;
    let Some(status) = interrupt.unless(client.status()).await else { return Ok(ExitCode::from(INTERRUPTED)) };
    let status = status?;
    let outline = subject.outline(&config.data_dir.value)?;
    let name = format!("rehearsal-{:08x}", rand::random::<u32>());
    let request = request(args, &name, outline.path())?;

    let began = Instant::now();
    let loaded = match interrupt.unless(follow(&client, &request)).await {
        Some(Ok(loaded)) => loaded,
        Some(Err(error)) => return Err(explained(error, args, &subject, &status)),
        None => return given_up(&client, &name).await,
    };
    let load_s = began.elapsed().as_secs_f64();
    let trial = Trial::new(&client, &name, subject.model.n_vocab(), args);
    let measured = interrupt.unless(trial.measure()).await;
    let deployment = interrupt.unless(settled(&client, &name)).await;
    // Whatever came of it, nothing is to stay behind.
    if !args.keep || interrupt.came() {
        let unloaded = unload(&client, &name).await;
        if let (false, Some(Ok(_))) = (interrupt.came(), &measured) {
            unloaded?;
        }
    }
    let (Some(measured), Some(deployment)) = (measured, deployment) else {
        eprintln!("interrupted; the rehearsal is unloaded");
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let (measured, deployment): (Measured, DeploymentStatus) = (measured?, deployment?);
    let report = Report::new(args, &subject, load_s, loaded, &deployment, measured);
    if json {
        view::print_json(&report)?;
    } else {
        view::print_line(report.text())?;
        if args.keep {
            view::print_line(format!("It stays loaded; capstan unload {name} ends it."))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn request(args: &RehearseArgs, name: &str, outline: &std::path::Path) -> Result<LoadRequest> {
    Ok(LoadRequest {
        path: models::model_path(outline)?,
        name: Some(name.to_owned()),
        nodes: if args.layers.is_empty() { args.nodes.clone() } else { Vec::new() },
        layers: args.layers.clone(),
        ctx: Some(args.ctx()),
        slots: Some(args.slots()),
        decode_batch: None,
        // What is guessed in nonsense says nothing about guesses in text.
        speculation: Some(false),
        draft: None,
        prefix_cache: Some(false),
        decode_slowdown: None,
        objective: None,
        rehearsal: Some(Rehearsal { sparse: args.sparse }),
    })
}

/// A rehearsal that is loaded, and what was planned and forecast for it.
struct Loaded {
    planned: Vec<PlannedStage>,
    forecast: Option<LoadForecast>,
}

async fn follow(client: &Client, request: &LoadRequest) -> Result<Loaded> {
    // On standard error, so that standard output is the report's alone.
    let mut progress = Progress::new(false);
    let mut loaded = Loaded { planned: Vec::new(), forecast: None };
    let mut events = client.load(request).await?;
    while let Some(event) = events.next().await? {
        progress.show(&event)?;
        match event {
            LoadEvent::Planned { stages, forecast, .. } => loaded = Loaded { planned: stages, forecast },
            LoadEvent::Ready { .. } => return Ok(loaded),
            LoadEvent::Failed { message } => bail!("{}", view::plain_text(&message)),
            _ => {}
        }
    }
    bail!("the daemon stopped telling about the load before it was done; `capstan status` shows how it stands")
}

/// The error, and which `--scale` would fit where memory is what is missing.
fn explained(error: anyhow::Error, args: &RehearseArgs, subject: &Subject, status: &ClusterStatus) -> anyhow::Error {
    let short = error.to_string().contains("not enough memory");
    if !short || args.scale.is_some() || args.sparse {
        return error;
    }
    let wanted = |n: &&capstan_proto::manage::NodeStatus| {
        n.online
            && (args.nodes.is_empty() || args.nodes.contains(&n.name))
            && (args.layers.is_empty() || args.layers.iter().any(|(name, _)| *name == n.name))
    };
    let free: Vec<u64> = status.nodes.iter().filter(wanted).map(|n| n.memory_free_bytes).collect();
    match subject.scale_that_fits(&free, args.ctx(), args.slots()) {
        Some(layers) => error.context(format!(
            "all {} layers do not fit; --scale {layers} would, and is extrapolated to all of them",
            subject.layers_all()
        )),
        None => error.context("not even one layer fits beside the vocabulary; rehearse on larger nodes"),
    }
}

async fn unload(client: &Client, name: &str) -> Result<()> {
    match client.unload(name).await {
        // A load that failed or was not begun has left nothing.
        Ok(()) | Err(ClientError::Refused { status: 404, .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn given_up(client: &Client, name: &str) -> Result<ExitCode> {
    unload(client, name).await?;
    eprintln!("interrupted; the rehearsal is unloaded");
    Ok(ExitCode::from(INTERRUPTED))
}

/// How the deployment is when its processes have told what they held at most, which they do once a second.
async fn settled(client: &Client, name: &str) -> Result<DeploymentStatus> {
    tokio::time::sleep(report::SETTLE).await;
    let found = client.status().await?.deployments.into_iter().find(|d| d.name == name);
    found.ok_or_else(|| anyhow::anyhow!("the rehearsal was unloaded while it was measured"))
}
