//! `capstan plan`: how many machines a model takes, and how fast it will be, before anything is bought, fetched or waited
//! for. Needs no cluster and no daemon, and no network unless the model is elsewhere; where a daemon runs, its cluster's
//! nodes are what is planned with unless others are named.
//!
//! | module | idea |
//! |---|---|
//! | [`model`] | what MODEL means, and where its numbers come from |
//! | [`machines`] | which machines, what connects them, and what is settled about them |
//! | [`list`] | what the built-in catalogue has |
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use capstan_planner::{
    Answer, Links, Machine, Objective, Question, Target, Unfit, answer, best_ubatch, picture, table, targets,
};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::config::{Auto, Config, parse};
use crate::view;
use machines::Pin;

mod list;
mod machines;
mod model;

/// Shown by `capstan plan --help`.
pub const EXAMPLES: &str = "\
Works offline, without a cluster or a daemon; where a daemon runs here and no machines are named, it plans with the nodes
of its cluster, by what was measured of them. Of a model on Hugging Face or at an address only the headers are read. Ends
with status 0 when the model fits, 1 when it does not.

Examples:
  capstan plan --list                                      models and machines that are known by name
  capstan plan \"Kimi K2.5 UD-Q2_K_XL\"                      how many machines does it take?
  capstan plan kimi-k2.5 --machines '4x\"Ryzen AI Max+ 395 128GB\"' --link 5GbE --ctx 32768
  capstan plan model-00001-of-00008.gguf --machine-file machines.toml --svg plan.svg
  capstan plan hf:unsloth/GLM-4.6-GGUF:UD-Q4_K_XL --machines '2x\"M3 Ultra 256GB\"' --target-tps 20
  capstan plan gpt-oss-120b --machines 'RTX 4090, M4 Max' --pin '#1=0..12' --objective latency --json

A file of machines (docs/planning.md tells all of it):
  link = \"5GbE\"
  [[machine]]
  name = \"box\"
  count = 2
  like = \"Ryzen AI Max+ 395 128GB\"
  memory_gib = 110";

/// What a slot holds when nothing is said, as `capstan load` has it: at most so many tokens.
const CTX_DEFAULT: u32 = 4096;
/// Slots when nothing is said, as `capstan load` has it.
const SLOTS_DEFAULT: u32 = 4;
/// Rows of a micro-batch with which the best number is looked for.
const UBATCH_FIRST: u32 = 512;

/// Arguments of `capstan plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// A GGUF file (of a split model the first), its address, `hf:OWNER/REPO[:QUANT][@REVISION]`, or a name of the catalogue
    /// with or without a quantisation, such as "Kimi K2.5 UD-Q2_K_XL"
    #[arg(required_unless_present = "list")]
    pub model: Option<String>,
    /// Show the models and machines that are known by name, with their sources
    #[arg(long)]
    pub list: bool,
    /// Machines of the catalogue, such as '4x"Ryzen AI Max+ 395 128GB", RTX 4090' [default: the nodes of the cluster that
    /// runs here, else as many Ryzen AI Max+ 395 128GB as it takes]
    #[arg(long, value_name = "LIST", conflicts_with = "machine_file")]
    pub machines: Vec<String>,
    /// Machines of your own, and the links between them: a TOML file
    #[arg(long, value_name = "FILE.toml")]
    pub machine_file: Option<PathBuf>,
    /// What connects them, such as 5GbE, wifi or rtt=0.2ms,bw=4.5Gbit [default: the file's or what was measured, else 1GbE]
    #[arg(long, value_name = "LINK")]
    pub link: Option<String>,
    /// Tokens a slot holds, or `auto` for the model's own context, at most 4096 [env: CAPSTAN_CTX] [default: auto]
    #[arg(long, value_name = "N", value_parser = parse::auto_count)]
    pub ctx: Option<Auto<u32>>,
    /// Requests answered at once, or `auto` for 4 [env: CAPSTAN_SLOTS] [default: auto]
    #[arg(long, visible_alias = "concurrency", value_name = "N", value_parser = parse::auto_count)]
    pub slots: Option<Auto<u32>>,
    /// Most rows of a micro-batch, or `auto` for those with which a prompt is through soonest [default: auto]
    #[arg(long, value_name = "N", value_parser = parse::auto_count)]
    pub ubatch: Option<Auto<u32>>,
    /// What is wanted: one token soonest, most tokens from all slots together, or both nearly
    #[arg(long, value_enum, default_value_t = Wanted::Balanced)]
    pub objective: Wanted,
    /// Also: how many machines reach so many tokens per second (of one sequence for `latency`, else of all slots)
    #[arg(long, value_name = "N", value_parser = positive)]
    pub target_tps: Option<f64>,
    /// Memory that is kept free on each machine, such as 4GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub headroom: Option<u64>,
    /// A machine, by name or by its place as #2, that must hold layers: any, or those after an equals sign
    #[arg(long, value_name = "MACHINE[=A..B]", value_parser = machines::pin)]
    pub pin: Vec<Pin>,
    /// A machine, by name or by its place as #2, that must hold none
    #[arg(long, value_name = "MACHINE")]
    pub exclude: Vec<String>,
    /// Also draw layers on machines, as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// What is wanted, as flag.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Wanted {
    /// One token soonest.
    Latency,
    /// Most tokens from all slots together.
    Throughput,
    /// The lowest latency among placements that are nearly as good for throughput.
    Balanced,
}

impl From<Wanted> for Objective {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Latency => Self::Latency,
            Wanted::Throughput => Self::Throughput,
            Wanted::Balanced => Self::Balanced,
        }
    }
}

/// Plans, and shows what came out.
pub async fn plan(config: &Config, args: &PlanArgs, json: bool) -> Result<ExitCode> {
    let Some(name) = args.model.as_deref().filter(|_| !args.list) else {
        list::show(json)?;
        return Ok(ExitCode::SUCCESS);
    };
    let known = model::find(name).await?;
    let subject = known.subject();
    let train = Some(subject.profile.context_train).filter(|&t| t > 0).unwrap_or(CTX_DEFAULT);
    let fleet = machines::Fleet::of(args, &config.data_dir.value).await?;
    let question = Question {
        subject: &subject,
        machines: &fleet.machines,
        links: &fleet.links,
        ctx: config.ctx.value.0.unwrap_or(train.min(CTX_DEFAULT)),
        slots: config.slots.value.0.unwrap_or(SLOTS_DEFAULT),
        ubatch: args.ubatch.and_then(|auto| auto.0).unwrap_or(UBATCH_FIRST),
        headroom_bytes: args.headroom.unwrap_or(0),
        objective: args.objective.into(),
        wishes: &fleet.wishes,
    };
    // With no machines named, as many of the usual kind as it takes.
    let usual = fleet.as_many_as_it_takes(&question);
    let question = Question { machines: usual.as_deref().unwrap_or(&fleet.machines), ..question };
    let ubatch = match args.ubatch {
        None | Some(Auto(None)) => best_ubatch(&question).unwrap_or(question.ubatch),
        Some(Auto(Some(rows))) => rows,
    };
    let question = Question { ubatch, ..question };
    let notes = fleet.notes(usual.as_deref());
    let reached = args.target_tps.map(|wanted| targets(&question, wanted)).transpose()?;
    let answered = answer(&question);
    if let (Some(path), Ok(answer)) = (&args.svg, &answered) {
        draw(path, answer)?;
    }
    match answered {
        Ok(answer) => {
            let fitting =
                Fitting { answer: &answer, notes: &notes, machines: question.machines, links: question.links };
            show(&fitting, args.target_tps.zip(reached.as_deref()), args.svg.as_deref(), json)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(Unfit::Memory(why)) => {
            refuse(&why, &notes, args.target_tps.zip(reached.as_deref()), json)?;
            Ok(ExitCode::FAILURE)
        }
        Err(other) => Err(other.into()),
    }
}

/// An answer, and what it was asked about.
struct Fitting<'a> {
    answer: &'a Answer,
    notes: &'a [String],
    machines: &'a [Machine],
    links: &'a Links,
}

fn show(fitting: &Fitting, reached: Option<(f64, &[Target])>, svg: Option<&Path>, json: bool) -> Result<()> {
    let Fitting { answer, notes, machines, links } = fitting;
    if json {
        let mut all = Map::new();
        all.insert("fits".into(), json!(true));
        if let Value::Object(fields) = serde_json::to_value(answer)? {
            all.extend(fields);
        }
        all.insert("machines".into(), json!(machines));
        all.insert("links".into(), json!(links));
        all.insert("notes".into(), json!(notes));
        all.insert("assumptions".into(), json!(capstan_planner::forecast::assumptions()));
        if let Some((wanted, targets)) = reached {
            all.insert("target".into(), json!({ "tokens_per_s": wanted, "by_machine": targets }));
        }
        return view::print_json(&all);
    }
    let mut text = paragraphs(notes);
    text.push_str(&table::table(answer));
    if let Some((wanted, targets)) = reached {
        text.push('\n');
        text.push_str(&table::targets(targets, wanted));
    }
    if let Some(path) = svg {
        text.push('\n');
        table::wrap(&mut text, "", &format!("The picture is in {}.", path.display()));
    }
    view::print_line(view::plain_text(text.trim_end()))
}

fn refuse(why: &[String], notes: &[String], reached: Option<(f64, &[Target])>, json: bool) -> Result<()> {
    if json {
        let mut all = json!({ "fits": false, "why": why, "notes": notes });
        if let Some((wanted, targets)) = reached {
            all["target"] = json!({ "tokens_per_s": wanted, "by_machine": targets });
        }
        return view::print_json(&all);
    }
    let mut text = paragraphs(notes);
    text.push_str(&paragraphs(why));
    if let Some((wanted, targets)) = reached {
        text.push_str(&table::targets(targets, wanted));
    }
    view::print_line(view::plain_text(text.trim_end()))
}

fn paragraphs(lines: &[String]) -> String {
    let mut text = String::new();
    lines.iter().for_each(|line| table::wrap(&mut text, "", line));
    text
}

fn draw(path: &Path, answer: &Answer) -> Result<()> {
    std::fs::write(path, picture::svg(answer))
        .with_context(|| format!("the picture cannot be written to {}; name another file with --svg", path.display()))
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 => Ok(n),
        _ => Err(format!("{text:?} is not a number above 0")),
    }
}

fn size(text: &str) -> Result<u64, String> {
    match text.parse::<bytesize::ByteSize>() {
        Ok(size) => Ok(size.0),
        Err(_) => Err(format!("{text:?} is not a size; write for example 4GiB or 800MB")),
    }
}
