//! What a rehearsal found: JSON for programs, tables for people, and what it does not say.
use std::time::Duration;

use capstan_gguf::ModelProfile;
use capstan_proto::manage::{DeploymentStatus, LoadForecast};
use serde::Serialize;

use super::measure::Measured;
use super::subject::Subject;
use super::{Loaded, RehearseArgs};
use crate::view::{self, Table};

/// How long until a process has surely told its highest memory: it tells once a second.
pub(super) const SETTLE: Duration = Duration::from_millis(2500);

/// Stands for a figure that nobody knows.
const UNKNOWN: &str = "–";

/// A stage, planned and measured.
#[derive(Debug, Serialize)]
struct Stage {
    stage: u16,
    node: String,
    layers: (u32, u32),
    pid: Option<u32>,
    /// Size of its shard in bytes.
    shard_bytes: u64,
    /// Memory that the planner counted on.
    planned_bytes: u64,
    /// Memory that the process was forecast to hold at most; 0 where that was not known.
    forecast_bytes: u64,
    /// Weights, KV cache and compute buffers as the process measured them.
    memory_bytes: u64,
    kv_bytes: u64,
    compute_bytes: u64,
    /// Most memory that the process held at once; 0 where the system does not tell.
    peak_rss_bytes: u64,
}

/// All layers' speed, by what was measured on some.
#[derive(Debug, Serialize)]
struct Extrapolated {
    layers: u32,
    ttft_s: Vec<f64>,
    tokens_per_s: Vec<f64>,
}

/// What a rehearsal found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    architecture: String,
    /// Weights of the whole model.
    parameters: u64,
    /// Bytes of all its tensors.
    bytes: u64,
    layers: u32,
    layers_rehearsed: u32,
    ctx: u32,
    slots: u32,
    sparse: bool,
    load_s: f64,
    stages: Vec<Stage>,
    #[serde(flatten)]
    measured: Measured,
    /// What was forecast of what was rehearsed; none while a node or link was not measured.
    forecast: Option<LoadForecast>,
    extrapolated: Option<Extrapolated>,
    notes: Vec<String>,
}

impl Report {
    pub(super) fn new(
        args: &RehearseArgs,
        subject: &Subject,
        load_s: f64,
        loaded: Loaded,
        deployment: &DeploymentStatus,
        measured: Measured,
    ) -> Self {
        let (whole, part) = (&subject.whole, &subject.rehearsed);
        let Loaded { planned, forecast } = loaded;
        let resident = forecast.as_ref().map_or(&[][..], |f| &f.resident_bytes);
        let stages = deployment.stages.iter().map(|s| Stage {
            stage: s.stage,
            node: s.node_name.clone(),
            layers: s.layers.into(),
            pid: s.pid,
            shard_bytes: s.shard_bytes,
            planned_bytes: planned.get(usize::from(s.stage)).map_or(0, |p| p.memory_bytes),
            forecast_bytes: resident.get(usize::from(s.stage)).copied().unwrap_or(0),
            memory_bytes: s.memory_bytes,
            kv_bytes: s.kv_bytes,
            compute_bytes: s.compute_bytes,
            peak_rss_bytes: s.stats.peak_rss_bytes,
        });
        let extrapolated = (part.n_layers < whole.n_layers).then(|| {
            let (decode, prefill) = (growth(part, whole, decode_bytes), growth(part, whole, prefill_weights));
            Extrapolated {
                layers: whole.n_layers,
                ttft_s: measured.first_token.iter().map(|f| f.ttft_s * prefill).collect(),
                tokens_per_s: measured.decode.iter().map(|d| d.tokens_per_s / decode).collect(),
            }
        });
        Self {
            model: subject.name.clone(),
            architecture: whole.architecture.clone(),
            parameters: whole.total_weights,
            bytes: whole.total_bytes,
            layers: whole.n_layers,
            layers_rehearsed: part.n_layers,
            ctx: deployment.ctx,
            slots: deployment.slots,
            sparse: args.sparse,
            load_s,
            stages: stages.collect(),
            notes: notes(args, subject, forecast.is_some()),
            forecast,
            measured,
            extrapolated,
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut out = format!(
            "{} ({}): {} weights, {}, {} layers\n",
            view::plain(&self.model),
            view::plain(&self.architecture),
            count(self.parameters),
            view::bytes(self.bytes),
            self.layers
        );
        if self.layers_rehearsed < self.layers {
            out += &format!("rehearsed with {} of its layers\n", self.layers_rehearsed);
        }
        out += &format!("loaded in {:.1} s; {} slots of {} tokens\n\n", self.load_s, self.slots, self.ctx);
        let heading = ["stage", "node", "layers", "shard", "planned", "measured", "KV", "compute", "forecast", "peak"];
        let mut table = Table::new(&heading, &[0, 2, 3, 4, 5, 6, 7, 8, 9]);
        for s in &self.stages {
            let sizes = [s.shard_bytes, s.planned_bytes, s.memory_bytes, s.kv_bytes, s.compute_bytes];
            let mut row = vec![s.stage.to_string(), s.node.clone(), format!("{}..{}", s.layers.0, s.layers.1)];
            row.extend(sizes.map(view::bytes));
            let known = |bytes: u64| if bytes > 0 { view::bytes(bytes) } else { UNKNOWN.into() };
            row.extend([s.forecast_bytes, s.peak_rss_bytes].map(known));
            table.row(row);
        }
        out += &format!("{}\n\n{}\n\n{}\n", table.render("  "), self.ttft().render("  "), self.decode().render("  "));
        for note in &self.notes {
            out += &format!("\n{note}");
        }
        out
    }

    fn headings(&self, first: &'static str, second: &'static str) -> Vec<&'static str> {
        let forecast = self.forecast.as_ref().map(|_| "forecast");
        let all = self.extrapolated.as_ref().map(|_| "all layers (extrapolated)");
        [first, second].into_iter().chain(forecast).chain(all).collect()
    }

    /// What was measured, what was forecast of it where a forecast is, and what follows for all layers.
    fn row(&self, first: String, unit: &str, measured: f64, forecast: Option<f64>, all: Option<&f64>) -> Vec<String> {
        let figure = |x: f64| format!("{x:.2} {unit}");
        let forecast = self.forecast.as_ref().map(|_| forecast.map_or(UNKNOWN.into(), figure));
        [first, figure(measured)].into_iter().chain(forecast).chain(all.map(|x| figure(*x))).collect()
    }

    fn ttft(&self) -> Table {
        let mut table = Table::new(&self.headings("prompt", "first token"), &[0, 1, 2, 3]);
        for (i, f) in self.measured.first_token.iter().enumerate() {
            let all = self.extrapolated.as_ref().and_then(|e| e.ttft_s.get(i));
            let mut listed = self.forecast.iter().flat_map(|f| &f.first_token);
            let forecast = listed.find(|l| l.prompt_tokens == f.prompt_tokens).map(|l| l.seconds);
            table.row(self.row(format!("{} tokens", f.prompt_tokens), "s", f.ttft_s, forecast, all));
        }
        table
    }

    fn decode(&self) -> Table {
        let mut table = Table::new(&self.headings("answers at once", "together"), &[0, 1, 2, 3]);
        for (i, d) in self.measured.decode.iter().enumerate() {
            let all = self.extrapolated.as_ref().and_then(|e| e.tokens_per_s.get(i));
            // Answers are short: what was forecast of them begins where nothing is before them.
            let mut listed = self.forecast.iter().flat_map(|f| &f.decode);
            let forecast = listed.find(|l| (l.sequences, l.depth_tokens) == (d.concurrency, 0)).map(|l| l.tokens_per_s);
            table.row(self.row(d.concurrency.to_string(), "tokens/s", d.tokens_per_s, forecast, all));
        }
        table
    }
}

/// A number of weights for people.
fn count(weights: u64) -> String {
    let n = weights as f64;
    if weights < 1_000_000_000 { format!("{:.1} million", n / 1e6) } else { format!("{:.1} billion", n / 1e9) }
}

/// Bytes that a token reads: its layers', and the head's.
fn decode_bytes(p: &ModelProfile) -> f64 {
    p.layers.iter().map(|l| l.active_bytes as f64).sum::<f64>() + p.output_bytes as f64
}

/// Weights that each row of a prompt is multiplied with; the head is for its last row only.
fn prefill_weights(p: &ModelProfile) -> f64 {
    p.layers.iter().map(|l| l.active_weights as f64).sum()
}

/// How many times as much the whole takes as the part.
fn growth(part: &ModelProfile, whole: &ModelProfile, of: fn(&ModelProfile) -> f64) -> f64 {
    of(whole) / of(part).max(1.0)
}

fn notes(args: &RehearseArgs, subject: &Subject, forecast: bool) -> Vec<String> {
    let mut notes = vec![
        "Weights were made up on each node: the load has no download and no disk in it, and guesses (speculation) were off, \
         for they depend on the text."
            .to_owned(),
    ];
    notes.push(if forecast {
        "Forecasts are what `capstan load` would say before, by what was measured of nodes and links alone.".to_owned()
    } else {
        "There is no forecast to compare with: not all of these nodes and the links between them are measured yet."
            .to_owned()
    });
    if subject.rehearsed.n_layers < subject.whole.n_layers {
        notes.push(format!(
            "Only layers {} were run. The columns for all layers are extrapolated: an answer's time by the bytes that a token \
             reads, a prompt's by the weights that it is multiplied with. Hops between nodes are counted as if they grew alike.",
            subject.range
        ));
    }
    if args.sparse {
        notes.push(
            "Memory was taken only for weights that were read, and every token chose the same experts: this proves sizes, \
             offsets, counts and limits, and says nothing about speed."
                .to_owned(),
        );
    }
    notes
}
