//! Why it is so, in sentences, and what each machine does for a token.
use capstan_proto::LayerRange;

use super::StageWork;
use super::choices::count;
use super::desk::Desk;
use super::fleet::Fleet;
use crate::arrange::{Arrangement, Objective};
use crate::forecast::Pipeline;
use crate::human_bytes;
use crate::machines::MACHINES_MAX;
use crate::timing::{Batch, hidden_bytes, hop_s};

impl Desk<'_> {
    /// Why the model does not fit, and what would help.
    pub fn why_not(&self, fleet: &Fleet) -> Vec<String> {
        let Ok(whole) = LayerRange::new(0, self.sizes.layers()) else {
            return vec!["The model has no layers.".to_owned()];
        };
        let need = self.need(whole);
        let usable: u64 = fleet.usable().fold(0, |sum, m| sum.saturating_add(m.usable_bytes));
        let compute = need.to_compute().saturating_mul(fleet.len() as u64);
        let total = need.weights.saturating_add(need.kv).saturating_add(compute);
        let mut lines = vec![format!(
            "{} does not fit: it needs {} ({} of weights, {} of KV cache for {} of {} tokens, {} to compute), and {} may be \
             used on {}.",
            self.question.subject.name,
            human_bytes(total),
            human_bytes(need.weights),
            human_bytes(need.kv),
            count(self.question.slots as usize, "slot"),
            self.question.ctx,
            human_bytes(compute),
            human_bytes(usable),
            count(fleet.len(), "machine"),
        )];
        if fleet.unsettled().is_some_and(|free| self.fits(&free)) {
            lines.push("It would fit if no machine were pinned or excluded.".to_owned());
        }
        let reason = self.whole_only();
        if let Some(reason) = &reason {
            lines.push(format!("It cannot be split: {reason}."));
        } else if total <= usable {
            lines.push(
                "The sum would do, but layers are not divided, and no cut leaves each machine what it can hold.".into(),
            );
        }
        let enough = (0..fleet.kinds()).filter_map(|kind| {
            let machine = fleet.machine(kind);
            let same = Fleet::same(machine, MACHINES_MAX, fleet.links.usual);
            Some(format!("{} of {}", self.fewest(&same)?, machine.name))
        });
        let enough: Vec<_> = enough.collect();
        lines.push(match (enough.is_empty(), reason) {
            (false, _) => format!("It would fit on {}.", enough.join(", or on ")),
            (true, Some(_)) => "Take a machine with more memory, or a smaller quantisation.".to_owned(),
            (true, None) => format!("Even {MACHINES_MAX} of these would not do: take machines with more memory each."),
        });
        let (ctx, slots) = (self.ctx_max(fleet), self.slots_max(fleet));
        if ctx > 0 || slots > 0 {
            let mut ways = Vec::new();
            if ctx > 0 {
                ways.push(format!("a context of {ctx} tokens"));
            }
            if slots > 0 {
                ways.push(count(slots as usize, "slot"));
            }
            lines.push(format!("With {} it would fit on these.", ways.join(", or with ")));
        }
        lines
    }

    /// Why the model cannot be split at all.
    fn whole_only(&self) -> Option<String> {
        let n = self.sizes.layers();
        if n < 2 {
            return Some("it has a single layer".to_owned());
        }
        let may = |a, b| LayerRange::new(a, b).is_ok_and(|r| self.may(r));
        if (1..n).any(|cut| may(0, cut) && may(cut, n)) {
            return None;
        }
        LayerRange::new(0, n / 2).ok().and_then(|r| (self.question.subject.window_problem)(r))
    }

    /// Why it is so.
    pub fn explain(&self, fleet: &Fleet, found: &Arrangement, pipeline: &Pipeline, fewest: usize) -> Vec<String> {
        let (used, all) = (found.stages.len(), fleet.len());
        let mut lines = vec![match (used, all) {
            (1, 1) => "The model runs whole on the machine.".to_owned(),
            (2, 2) => "Both machines are used.".to_owned(),
            (1, _) => format!("One machine of {all} is best: every further stage would add a hop to each token."),
            _ if used < all && self.question.objective == Objective::Throughput => {
                format!("{used} of {all} machines are used: the others would not make the slowest stage faster.")
            }
            _ if used < all => {
                format!("{used} of {all} machines are used: with more of them a token would take longer.")
            }
            _ => format!("All {all} machines are used."),
        }];
        lines.push(if fewest == 1 {
            "One machine can hold the model.".to_owned()
        } else {
            format!("At least {fewest} of them are needed to hold the model.")
        });
        if !found.exact {
            lines.push("There are too many orders of so many different machines to try all; this is the best of plausible ones.".into());
        }
        self.bottleneck(pipeline, &mut lines);
        lines.extend(self.more(fleet, pipeline));
        lines
    }

    fn bottleneck(&self, pipeline: &Pipeline, lines: &mut Vec<String>) {
        let work = self.work(pipeline);
        let Some(slowest) = work.iter().max_by(|a, b| a.compute_s.total_cmp(&b.compute_s)) else { return };
        let (sum, hops) = work.iter().fold((0.0, 0.0), |(c, h), w| (c + w.compute_s, h + w.hop_s));
        if work.len() > 1 {
            lines.push(format!(
                "The slowest stage is {} with layers {}: {:.1} ms of {:.1} ms that a token is computed, and {:.1} ms on the way \
                 between machines.",
                slowest.machine,
                slowest.layers,
                slowest.compute_s * 1e3,
                sum * 1e3,
                hops * 1e3
            ));
        }
        let read: u64 = work.iter().map(|w| w.weight_bytes).fold(0, u64::saturating_add);
        let weights_s: f64 =
            pipeline.stages.iter().zip(&work).map(|(s, w)| w.weight_bytes as f64 / s.rates.weight_bytes_per_s).sum();
        let (share, what) = (weights_s / (sum + hops).max(f64::MIN_POSITIVE), human_bytes(read));
        let limit = match (share, hops / (sum + hops).max(f64::MIN_POSITIVE)) {
            (_, on_the_way) if on_the_way > 0.5 => "the links",
            (share, _) if share > 0.5 => "memory bandwidth",
            _ => "the KV cache and the start of kernels",
        };
        lines.push(format!(
            "The bottleneck is {limit}: a token reads {what} of weights, which takes {:.1} ms; the rest is the KV cache at {} \
             tokens and the start of kernels.",
            weights_s * 1e3,
            self.depth_tokens()
        ));
        let left = |s: &&crate::forecast::Placed| s.usable_bytes.saturating_sub(s.need.total());
        if let Some(tight) = pipeline.stages.iter().min_by_key(left).filter(|s| left(s) < s.usable_bytes / 20) {
            lines.push(format!(
                "{} is nearly full: {} of {}.",
                tight.machine,
                human_bytes(tight.need.total()),
                human_bytes(tight.usable_bytes)
            ));
        }
    }

    /// What each machine does for one step of the micro-batch that layers are dealt out for.
    pub fn work(&self, pipeline: &Pipeline) -> Vec<StageWork> {
        let batch = self.batch(pipeline.stages.len());
        let (rows, times) = (batch.rows(), pipeline.stage_s(batch));
        let several = pipeline.stages.len() > 1;
        let stage = |(i, s): (usize, &crate::forecast::Placed)| {
            let profile = self.profile();
            let layers = profile.layers.get(s.layers.start() as usize..s.layers.end() as usize).unwrap_or_default();
            let depth = match batch {
                Batch::Decode { depth_tokens, .. } | Batch::Chunk { depth_tokens, .. } => depth_tokens,
            };
            let (mut weight_bytes, mut kv_bytes) = (0u64, 0u64);
            for l in layers {
                let one = l.expert_bytes as f64 / f64::from(l.experts.max(1));
                let routed = (one * l.distinct_experts(rows)) as u64;
                weight_bytes = weight_bytes.saturating_add(l.shared_bytes()).saturating_add(routed);
                let seen = l.visible_tokens(depth.saturating_add(1)).saturating_mul(l.kv_bytes_per_token);
                let state = l.recurrent_state_bytes.saturating_mul(2);
                kv_bytes = kv_bytes.saturating_add(seen.saturating_add(state).saturating_mul(u64::from(rows)));
            }
            if s.layers.end() == self.sizes.layers() {
                weight_bytes = weight_bytes.saturating_add(profile.output_bytes);
            }
            let hop = pipeline.ring.get(i).filter(|_| several);
            StageWork {
                machine: s.machine.clone(),
                layers: s.layers.to_string(),
                rows,
                weight_bytes,
                kv_bytes,
                compute_s: times[i],
                hop_s: hop.map_or(0.0, |&link| hop_s(profile, link, rows)),
                sent_bytes: if several { hidden_bytes(profile, rows) } else { 0 },
            }
        };
        pipeline.stages.iter().enumerate().map(stage).collect()
    }
}
