//! How a load is shown: bars on a terminal, plain lines elsewhere, raw events for programs.
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use capstan_proto::manage::{LoadEvent, PlannedStage};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::view;

/// How often a bar moves by itself, so that a long wait does not look like a hang.
const TICK: Duration = Duration::from_millis(120);

/// What a stage is doing while a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Cutting,
    Transfer,
    Loading,
    Loaded,
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Cutting => "cutting",
            Self::Transfer => "transfer",
            Self::Loading => "loading",
            Self::Loaded => "loaded",
        }
    }
}

struct Stage {
    label: String,
    phase: Phase,
    bar: Option<ProgressBar>,
}

/// Shows the events of one load on standard error; with JSON, on standard output.
pub struct Progress {
    json: bool,
    bars: Option<MultiProgress>,
    stages: Vec<Stage>,
}

impl Progress {
    /// Chooses by what standard error is.
    pub fn new(json: bool) -> Self {
        let bars = (!json && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Self { json, bars, stages: Vec::new() }
    }

    /// Shows one more event.
    pub fn show(&mut self, event: &LoadEvent) -> Result<()> {
        if self.json {
            return view::print_line(serde_json::to_string(event)?);
        }
        match event {
            LoadEvent::Planned { stages, explanation, .. } => self.plan(stages, explanation),
            &LoadEvent::Cutting { stage, done_bytes, total_bytes } => {
                self.step(stage, Phase::Cutting, done_bytes, total_bytes);
            }
            &LoadEvent::Transfer { stage, done_bytes, total_bytes } => {
                self.step(stage, Phase::Transfer, done_bytes, total_bytes);
            }
            &LoadEvent::Loading { stage, permille } => self.step(stage, Phase::Loading, permille.into(), 1000),
            &LoadEvent::Loaded { stage } => self.step(stage, Phase::Loaded, 1, 1),
            LoadEvent::Ready { .. } | LoadEvent::Failed { .. } => self.close(),
        }
        Ok(())
    }

    fn plan(&mut self, stages: &[PlannedStage], explanation: &[String]) {
        for line in explanation {
            self.say(&view::plain(line));
        }
        let bars = self.bars.as_ref();
        self.stages = stages
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let label = format!("stage {i} on {}, layers {}", view::plain(&s.node_name), s.layers);
                let bar = bars.map(|bars| {
                    let bar = bars.add(ProgressBar::new(1).with_prefix(label.clone()));
                    bar.set_style(style(Phase::Waiting));
                    bar.set_message(Phase::Waiting.word());
                    bar.enable_steady_tick(TICK);
                    bar
                });
                Stage { label, phase: Phase::Waiting, bar }
            })
            .collect();
    }

    fn step(&mut self, stage: u16, phase: Phase, done: u64, total: u64) {
        let Some(stage) = self.stages.get_mut(usize::from(stage)) else { return };
        let changed = std::mem::replace(&mut stage.phase, phase) != phase;
        match &stage.bar {
            Some(bar) => {
                // Length and position first: a new style is drawn at once and would show the old ones.
                bar.set_length(total.max(1));
                bar.set_position(done.min(total.max(1)));
                if changed {
                    bar.reset_eta();
                    bar.set_message(phase.word());
                    bar.set_style(style(phase));
                }
                if phase == Phase::Loaded {
                    bar.finish();
                }
            }
            None if changed => {
                let size = match phase {
                    Phase::Cutting | Phase::Transfer => format!(" {}", view::bytes(total)),
                    _ => String::new(),
                };
                eprintln!("{}: {}{size}", stage.label, phase.word());
            }
            None => {}
        }
    }

    fn say(&self, line: &str) {
        match &self.bars {
            // Above the bars, which it would otherwise tear.
            Some(bars) if bars.println(line).is_ok() => {}
            _ => eprintln!("{line}"),
        }
    }

    fn close(&mut self) {
        for bar in self.stages.iter().filter_map(|s| s.bar.as_ref()).filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.close();
    }
}

fn style(phase: Phase) -> ProgressStyle {
    let template = match phase {
        Phase::Waiting => "{prefix}  {spinner} {msg}",
        Phase::Cutting | Phase::Transfer => {
            "{prefix}  {msg:9} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}"
        }
        Phase::Loading => "{prefix}  {msg:9} [{bar:30}] {percent}%",
        Phase::Loaded => "{prefix}  {msg}",
    };
    // The templates are constants, so the plain style is never what is seen.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_valid() {
        for phase in [Phase::Waiting, Phase::Cutting, Phase::Transfer, Phase::Loading, Phase::Loaded] {
            let bar = ProgressBar::hidden();
            bar.set_style(style(phase));
        }
        assert!(ProgressStyle::with_template("{prefix} {binary_bytes_per_sec} {eta}").is_ok());
    }
}
