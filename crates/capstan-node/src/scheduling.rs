//! What a load asks of the scheduler: bounds, defaults, and what follows from the model and the number of stages.
use std::path::Path;

use capstan_planner::{PlanOptions, Sizes};
use capstan_proto::NodeId;
use capstan_proto::child::Scheduling;
use capstan_proto::data::Rollback;
use capstan_proto::limits::{DECODE_SLOWDOWN_PERCENT_MAX, DECODE_SLOWDOWN_PERCENT_MIN, SPECULATION_DEPTH_MAX};
use capstan_proto::manage::{LoadRequest, ManageError};

use crate::blueprint::Blueprint;
use crate::cutter::OpenModel;

/// A draft model guesses for one sequence at a time.
const DRAFT_SEQUENCES: u32 = 1;

/// What was asked, with the defaults filled in; the placement makes a [`Scheduling`] of it.
pub(crate) struct Wanted {
    speculation: bool,
    prefix_cache: bool,
    decode_slowdown_percent: u16,
    rollback: Rollback,
    draft: Option<OpenModel>,
}

fn bad(message: impl Into<String>) -> ManageError {
    ManageError::new(400, message)
}

impl Wanted {
    /// Checks what a request says. Blocks, for it reads the draft model's header.
    pub(crate) fn new(request: &LoadRequest, rollback: Rollback, node: &str) -> Result<Self, ManageError> {
        let defaults = Scheduling::default();
        let speculation = request.speculation.unwrap_or(true);
        if let (false, Some(_)) = (speculation, &request.draft) {
            return Err(bad("a draft model is of no use with speculation off; leave out one of the two"));
        }
        let draft = match &request.draft {
            Some(path) => Some(open_draft(Path::new(path), node)?),
            None => None,
        };
        Ok(Self {
            speculation,
            prefix_cache: request.prefix_cache.unwrap_or(defaults.prefix_cache),
            decode_slowdown_percent: match request.decode_slowdown {
                Some(times) => slowdown_percent(times)?,
                None => defaults.decode_slowdown_percent,
            },
            rollback,
            draft,
        })
    }

    /// What a deployment has: for another placement of it.
    pub(crate) fn of(b: &Blueprint) -> Self {
        let asked = b.request.as_ref().and_then(|r| r.speculation);
        // A stage that was alone had nothing to guess for.
        let speculation = asked.unwrap_or(b.request.is_some() || b.scheduling.speculation_depth > 0);
        Self {
            speculation,
            prefix_cache: b.scheduling.prefix_cache,
            decode_slowdown_percent: b.scheduling.decode_slowdown_percent,
            rollback: b.model.rollback(),
            draft: b.draft.clone(),
        }
    }

    /// What the planner is asked for a deployment on these nodes; on none, the choice is its own.
    pub(crate) fn options(&self, b: &Blueprint, nodes: Vec<NodeId>) -> PlanOptions {
        PlanOptions {
            ctx: b.ctx,
            slots: b.slots,
            spares_per_stage: self.spares_per_stage(),
            draft_bytes: self.draft_bytes(b.ctx, b.ubatch),
            ubatch: b.ubatch,
            objective: b.request.as_ref().and_then(|r| r.objective).unwrap_or_default(),
            nodes,
            layers: vec![],
        }
    }

    fn speculates(&self) -> bool {
        self.speculation && self.rollback != Rollback::None
    }

    /// Sequences that a placement keeps beyond the slots, for each of its stages.
    pub(crate) fn spares_per_stage(&self) -> u32 {
        spares_per_stage(self.speculation, self.rollback)
    }

    /// What the draft model takes beside the last stage, in bytes.
    pub(crate) fn draft_bytes(&self, ctx: u32, ubatch: u32) -> u64 {
        match &self.draft {
            Some(draft) if self.speculates() => {
                let sizes = Sizes::of(&draft.model.profile());
                draft.whole().map_or(0, |whole| sizes.need(whole, ctx, DRAFT_SEQUENCES, ubatch).total())
            }
            _ => 0,
        }
    }

    /// Why a draft model that was asked for has nothing to do.
    pub(crate) fn remark(&self, stages: usize) -> Option<&'static str> {
        self.draft.as_ref()?;
        match (self.rollback, stages) {
            (Rollback::None, _) => Some("the draft model is not used: what this model computes cannot be taken back"),
            (_, 0 | 1) => Some("the draft model is not used: one stage has no idle time to check guesses in"),
            _ => None,
        }
    }

    /// What a placement of so many stages is told, and the draft model it uses. A guess for every stage keeps them all
    /// at work on one sequence.
    pub(crate) fn scheduling(self, stages: usize) -> (Scheduling, Option<OpenModel>) {
        let depth = if self.speculates() && stages > 1 { stages.min(usize::from(SPECULATION_DEPTH_MAX)) } else { 0 };
        let draft = self.draft.filter(|_| depth > 0);
        let scheduling = Scheduling {
            speculation_depth: depth as u16,
            draft: draft.as_ref().and_then(|d| d.model.files().first().cloned()),
            prefix_cache: self.prefix_cache,
            decode_slowdown_percent: self.decode_slowdown_percent,
            rollback: self.rollback,
        };
        (scheduling, draft)
    }
}

/// Sequences that a placement keeps beyond the slots for each of its stages: snapshots of guesses that cannot be trimmed.
pub(crate) fn spares_per_stage(speculation: bool, rollback: Rollback) -> u32 {
    u32::from(speculation && rollback == Rollback::Copy)
}

fn open_draft(path: &Path, node: &str) -> Result<OpenModel, ManageError> {
    let path = std::fs::canonicalize(path)
        .map_err(|e| bad(format!("the draft model {path:?} cannot be read on node {node}: {e}")))?;
    let draft = OpenModel::open(&path).map_err(|e| bad(format!("the draft model cannot be used: {e}")))?;
    if draft.rollback() != Rollback::Trim {
        let why = "it keeps recurrent states, which cannot follow a text that turns out otherwise";
        return Err(bad(format!("the draft model {path:?} cannot be used: {why}; take one with plain attention")));
    }
    Ok(draft)
}

fn slowdown_percent(times: f32) -> Result<u16, ManageError> {
    let percent = (times * 100.0).round();
    let (min, max) = (DECODE_SLOWDOWN_PERCENT_MIN, DECODE_SLOWDOWN_PERCENT_MAX);
    if !(f32::from(min)..=f32::from(max)).contains(&percent) {
        return Err(bad(format!("decode_slowdown is {times}; take {} to {} times", min / 100, max / 100)));
    }
    Ok(percent as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_need_idle_stages_and_a_way_back() {
        let dir = tempfile::tempdir().unwrap();
        let draft = dir.path().join("draft.gguf");
        capstan_testkit::tiny::write("llama", &draft).unwrap();
        let json = serde_json::json!({ "path": "m.gguf", "draft": draft, "decode_slowdown": 2.5 });
        let request: LoadRequest = serde_json::from_value(json).unwrap();
        let wanted = |rollback| Wanted::new(&request, rollback, "a").unwrap();
        for (rollback, stages, depth, spares) in [
            (Rollback::Trim, 2, 2, 0),
            (Rollback::Trim, 40, SPECULATION_DEPTH_MAX, 0),
            (Rollback::Trim, 1, 0, 0),
            (Rollback::Copy, 3, 3, 3),
            (Rollback::Copy, 1, 0, 0),
            (Rollback::None, 3, 0, 0),
        ] {
            let (remark, spares_per_stage) = (wanted(rollback).remark(stages), wanted(rollback).spares_per_stage());
            let (scheduling, draft) = wanted(rollback).scheduling(stages);
            let case = format!("{rollback:?} {stages}");
            assert_eq!((scheduling.speculation_depth, scheduling.spares()), (depth, spares), "{case}");
            assert_eq!((draft.is_some(), scheduling.draft.is_some()), (depth > 0, depth > 0), "{case}");
            assert_eq!(remark.is_none(), depth > 0, "{case}");
            assert!(spares_per_stage * stages as u32 >= spares, "the placement keeps room: {case}");
            assert_eq!(wanted(rollback).draft_bytes(64, 32) > 0, rollback != Rollback::None, "{case}");
            assert_eq!(scheduling.decode_slowdown_percent, 250);
        }
        let off = LoadRequest { speculation: Some(false), draft: None, ..request };
        let (scheduling, draft) = Wanted::new(&off, Rollback::Trim, "a").unwrap().scheduling(4);
        assert!(scheduling.speculation_depth == 0 && draft.is_none() && scheduling.prefix_cache);
    }
}
