//! What other choices would bring, in tokens per second, and what was rejected.
use capstan_proto::LayerRange;

use super::desk::Desk;
use super::fleet::Fleet;
use super::{Choice, Speeds};
use crate::arrange::{Arrangement, Objective};
use crate::forecast::{CHUNK_ROWS, Pipeline};
use crate::human_bytes;
use crate::machines::{MACHINES_MAX, Machine};

/// How much faster the link is in "what a faster link would bring".
const FASTER_LINK: f64 = 10.0;
/// Kinds of machines of which one more, or one fewer, is reckoned.
const KINDS_MAX: usize = 4;
/// Contexts and slots are multiplied by these.
const TIMES_MORE: [u32; 3] = [2, 4, 8];

/// A smaller part than this is no difference.
const NO_CHANGE: f64 = 0.005;

impl Desk<'_> {
    /// The same question asked otherwise, one thing at a time; `most` are the longest context and the most slots.
    pub fn choices(&self, fleet: &Fleet, found: &Arrangement, now: &Speeds, most: (u32, u32)) -> Vec<Choice> {
        let (depth, q, (ctx_max, slots_max)) = (self.depth_tokens(), &self.question, most);
        let mut choices = Vec::new();
        let mut add =
            |of: &'static str, what: String, speeds: Option<Speeds>| choices.push(Choice { of, what, speeds });
        if fleet.is_uniform() {
            let all = fleet.len();
            for n in (1..all).chain([all + 1]).filter(|&n| n <= MACHINES_MAX && n + KINDS_MAX > all) {
                let some = if n > all { fleet.with_another(0) } else { fleet.first(n) };
                add("machines", count(n, "machine"), self.speeds(&some, depth));
            }
        } else {
            for kind in 0..fleet.kinds().min(KINDS_MAX) {
                let name = &fleet.machine(kind).name;
                if fleet.len() < MACHINES_MAX {
                    add("machines", format!("one more {name}"), self.speeds(&fleet.with_another(kind), depth));
                }
                if let Some(fewer) = fleet.without(kind).filter(|f| f.len() > 0) {
                    add("machines", format!("without one {name}"), self.speeds(&fewer, depth));
                }
            }
        }
        if fleet.len() > 1 {
            let link = format!("links {FASTER_LINK:.0} times as wide");
            add("link", link, self.speeds(&fleet.with_links(FASTER_LINK), depth));
        }
        for objective in [Objective::Latency, Objective::Balanced, Objective::Throughput] {
            if objective != q.objective && fleet.len() > 1 {
                let other = self.asking(|q| q.objective = objective);
                // Where that leads to the same arrangement there is nothing to choose.
                if other.arrange(fleet).is_none_or(|a| a.stages != found.stages) {
                    add("objective", format!("objective {}", objective.name()), other.speeds(fleet, depth));
                }
            }
        }
        for ctx in TIMES_MORE.iter().filter_map(|&times| q.ctx.checked_mul(times)).filter(|&c| c <= ctx_max) {
            let (what, end) = (format!("context of {ctx} tokens, at its end"), u64::from(ctx) - 1);
            add("context", what, self.asking(|q| q.ctx = ctx).speeds(fleet, end));
        }
        for slots in TIMES_MORE.iter().filter_map(|&times| q.slots.checked_mul(times)).filter(|&s| s <= slots_max) {
            add("slots", count(slots as usize, "slot"), self.asking(|q| q.slots = slots).speeds(fleet, depth));
        }
        for ubatch in CHUNK_ROWS.into_iter().filter(|&rows| rows > 128 && rows != q.ubatch) {
            let speeds = self.asking(|q| q.ubatch = ubatch).speeds(fleet, depth);
            // Larger ones than any chunk needs change nothing.
            let same = |s: &Speeds| (s.prompt_tokens_per_s / now.prompt_tokens_per_s - 1.0).abs() < NO_CHANGE;
            if !speeds.as_ref().is_some_and(same) {
                add("ubatch", format!("micro-batches of {ubatch} rows"), speeds);
            }
        }
        choices
    }

    /// What was not chosen, and why.
    pub fn rejected(&self, fleet: &Fleet, found: &Arrangement, pipeline: &Pipeline, fewest: usize) -> Vec<String> {
        let mut lines: Vec<String> =
            fleet.left_out().map(|m| format!("{} is left out, as was asked.", m.name)).collect();
        if fewest > 1 {
            lines.push(self.too_few(fleet, fewest));
        }
        let used = |kind: usize| found.stages.iter().filter(|s| s.0 == kind).count();
        let forced = (0..fleet.kinds()).filter_map(|kind| Some((kind, fleet.forced(kind, used(kind))?)));
        for (kind, forced) in forced.take(KINDS_MAX) {
            let name = &fleet.machine(kind).name;
            lines.push(match self.arrange(&forced) {
                None => format!("One more {name} finds no layers beside the others."),
                Some(with) => self.worse(&format!("With one more {name}"), found, with.way_s, with.slowest_s),
            });
        }
        lines.extend(self.equal_split(pipeline, found));
        lines.extend(self.forbidden());
        lines
    }

    fn too_few(&self, fleet: &Fleet, fewest: usize) -> String {
        let few = count(fewest - 1, "machine");
        let mut usable: Vec<u64> = fleet.usable().map(|m: &Machine| m.usable_bytes).collect();
        usable.sort_unstable_by(|a, b| b.cmp(a));
        let room = usable.iter().take(fewest - 1).fold(0u64, |sum, &b| sum.saturating_add(b));
        let Ok(whole) = LayerRange::new(0, self.sizes.layers()) else { return String::new() };
        let need = self.need(whole);
        let total = need.weights.saturating_add(need.kv).saturating_add(need.to_compute() * (fewest as u64 - 1));
        if total > room {
            return format!(
                "{few} would be too few: at most {} may be used there, and {} is needed.",
                human_bytes(room),
                human_bytes(total)
            );
        }
        format!("{few} would be too few: the sum would do, but no cut leaves each what it can hold.")
    }

    /// Says how much longer a token takes, by what the objective looks at.
    fn worse(&self, what: &str, found: &Arrangement, way_s: f64, slowest_s: f64) -> String {
        let (name, then, now) = match self.question.objective {
            Objective::Latency => ("a token's way", way_s, found.way_s),
            _ if (slowest_s - found.slowest_s).abs() <= 1e-9 * found.slowest_s => ("a token's way", way_s, found.way_s),
            _ => ("the slowest stage", slowest_s, found.slowest_s),
        };
        format!("{what} {name} would take {:.1} ms instead of {:.1}.", then * 1e3, now * 1e3)
    }

    /// Equal numbers of layers on the same machines.
    fn equal_split(&self, pipeline: &Pipeline, found: &Arrangement) -> Option<String> {
        let (n, stages) = (self.sizes.layers(), pipeline.stages.len() as u32);
        let cut = |i: u32| n * i / stages;
        let equal: Vec<_> = (0..stages).filter_map(|i| LayerRange::new(cut(i), cut(i + 1)).ok()).collect();
        let same = equal.iter().zip(&found.stages).all(|(a, b)| a.count().abs_diff(b.1.count()) <= 1);
        if stages < 2 || equal.len() < stages as usize || same {
            return None;
        }
        let placed: Vec<_> = pipeline
            .stages
            .iter()
            .zip(&equal)
            .map(|(s, &layers)| {
                let mut stage = s.clone();
                (stage.layers, stage.need) = (layers, self.need(layers));
                stage
            })
            .collect();
        if let Some(full) = placed.iter().find(|s| s.need.total() > s.usable_bytes) {
            return Some(format!(
                "Equal numbers of layers do not fit: {} would need {} of {}.",
                full.machine,
                human_bytes(full.need.total()),
                human_bytes(full.usable_bytes)
            ));
        }
        if let Some(bad) = equal.iter().find(|r| !self.may(**r)) {
            return Some(format!("Equal numbers of layers are not allowed: {bad} cannot be a stage."));
        }
        let other = Pipeline { profile: pipeline.profile, stages: &placed, ring: pipeline.ring };
        let times = other.stage_s(self.batch(pipeline.stages.len()));
        let hops = found.way_s - pipeline.stage_s(self.batch(pipeline.stages.len())).iter().sum::<f64>();
        let (way, slowest) = (times.iter().sum::<f64>() + hops, times.iter().copied().fold(0.0, f64::max));
        Some(self.worse("With equal numbers of layers", found, way, slowest))
    }

    /// Windows that the architecture forbids.
    fn forbidden(&self) -> Option<String> {
        let n = self.sizes.layers();
        let windows = (0..n).flat_map(|a| (a + 1..=n).map(move |b| LayerRange::new(a, b))).flatten();
        let forbidden: Vec<LayerRange> = windows.filter(|&r| !self.may(r)).collect();
        let first = *forbidden.first()?;
        let why = (self.question.subject.window_problem)(first)?;
        let all = u64::from(n) * u64::from(n + 1) / 2;
        Some(format!("{} of {all} ranges of layers cannot be stages, such as {first}: {why}.", forbidden.len()))
    }

    /// What one more machine and a faster link would bring, in sentences.
    pub fn more(&self, fleet: &Fleet, pipeline: &Pipeline) -> Vec<String> {
        let depth = self.depth_tokens();
        let now = self.speeds_of(pipeline, depth);
        let percent = |then: f64, now: f64, what: &str| match then / now - 1.0 {
            gain if gain >= NO_CHANGE => format!("{:.0} % more {what}", gain * 100.0),
            gain if gain <= -NO_CHANGE => format!("{:.0} % fewer {what}", -gain * 100.0),
            _ => format!("no more {what}"),
        };
        let change = |then: Speeds| {
            let decode = percent(self.wanted(&then), self.wanted(&now), "tokens per second");
            let prompt = percent(then.prompt_tokens_per_s, now.prompt_tokens_per_s, "tokens of a prompt per second");
            format!("{decode} and {prompt}")
        };
        let mut lines = Vec::new();
        if fleet.len() < MACHINES_MAX {
            for kind in 0..fleet.kinds().min(KINDS_MAX) {
                if let Some(then) = self.speeds(&fleet.with_another(kind), depth) {
                    lines.push(format!("One more {} would bring {}.", fleet.machine(kind).name, change(then)));
                }
            }
        }
        if pipeline.stages.len() > 1
            && let Some(then) = self.speeds(&fleet.with_links(FASTER_LINK), depth)
        {
            lines.push(format!("Links with {FASTER_LINK:.0} times the bandwidth would bring {}.", change(then)));
        }
        lines
    }
}

pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
