//! KV snapshots: when a slot's caches are saved, and what a new epoch takes over from them.
//!
//! A snapshot is asked for in band, behind a micro-batch's rows, so that every stage saves the same positions. The driver
//! is the last stage: what it has saved, the others have saved or are about to. In the next epoch the first micro-batch
//! restores what the driver has; what comes back restored lies in its slot like a former sequence's prefix, and a request
//! that is handed in again goes on from there.
use capstan_proto::data::{KvOp, Rollback};

use super::Engine;
use crate::flight::BatchKind;
use crate::report::{PlannedBatch, Saved};

/// A slot is saved when so many rows were added to it: fewer are computed again about as soon as a snapshot is read.
pub(crate) const SAVE_ROWS_MIN: u32 = 32;
/// Or the rows it held divided by this, if that is more: all of a slot is written each time, so that over a long
/// sequence each row is written about so many times.
pub(crate) const SAVE_SHARE: u32 = 8;

/// What the engine knows of snapshots.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    /// Whether every stage keeps them.
    on: bool,
    /// The mark of the next one.
    next: u64,
    restoring: Restoring,
}

#[derive(Debug, Default)]
enum Restoring {
    #[default]
    No,
    /// These are to be asked for.
    Wanted(Vec<Saved>),
    /// These were asked for.
    Asked(Vec<Saved>),
}

impl Snapshots {
    pub(super) fn is_restoring(&self) -> bool {
        !matches!(self.restoring, Restoring::No)
    }
}

impl Engine {
    /// Begins an epoch, behind [`Engine::handle_lost`]: whether every stage keeps snapshots, the least mark that was never
    /// used, and what the driver has of those that were kept so far. The first micro-batch restores them.
    pub fn handle_epoch(&mut self, snapshots: bool, mark: u64, kept: Vec<Saved>) {
        // What is restored is used as a prefix is.
        let on = snapshots && self.config.prefix_cache && self.config.rollback != Rollback::None;
        let fits = |saved: &Saved| {
            saved.slot < self.config.slots && !saved.tokens.is_empty() && saved.tokens.len() < self.config.ctx as usize
        };
        let mut kept: Vec<Saved> = if on { kept.into_iter().filter(fits).collect() } else { Vec::new() };
        // Of each slot the latest.
        kept.sort_by_key(|saved| (saved.slot, std::cmp::Reverse(saved.mark)));
        kept.dedup_by_key(|saved| saved.slot);
        let restoring = if kept.is_empty() { Restoring::No } else { Restoring::Wanted(kept) };
        self.snapshots = Snapshots { on, next: mark, restoring };
    }

    /// Whether a micro-batch under way restores snapshots.
    pub fn restores(&self, step: u64) -> bool {
        self.flight.get(step).is_some_and(|sent| sent.kind == BatchKind::Restore)
    }

    /// These slots were restored by every stage; to be said before [`Engine::handle_completed`] of the micro-batch that
    /// asked for it.
    pub fn handle_restored(&mut self, slots: &[u32]) {
        let Restoring::Asked(kept) = std::mem::take(&mut self.snapshots.restoring) else { return };
        for saved in kept {
            if slots.contains(&saved.slot) {
                self.slots.refill(saved);
            } else {
                // Some stages may have restored it.
                self.ops.push(KvOp::Clear { slot: saved.slot });
            }
        }
        self.debug_check();
    }

    pub(super) fn send_restore(&mut self) -> Option<PlannedBatch> {
        let Restoring::Wanted(kept) = &mut self.snapshots.restoring else { return None };
        let kept = std::mem::take(kept);
        self.ops.extend(kept.iter().map(|saved| KvOp::Restore { slot: saved.slot, mark: saved.mark }));
        self.snapshots.restoring = Restoring::Asked(kept);
        Some(self.plan(BatchKind::Restore, Vec::new(), 0, Vec::new(), Vec::new(), Vec::new()))
    }

    /// Has the slot saved that most needs it, among those with rows in the micro-batch that is sent next: one at a time,
    /// so that no step waits for many.
    pub(super) fn save(&mut self, slots: &[u32]) -> Option<Saved> {
        if !self.snapshots.on {
            return None;
        }
        let since = |slot: &u32| self.slots.get(*slot).map_or(0, |s| s.kv_rows.saturating_sub(s.saved_rows));
        let slot = *slots.iter().max_by_key(|slot| since(slot))?;
        let sequence = self.slots.get_mut(slot)?;
        if sequence.kv_rows.saturating_sub(sequence.saved_rows) < SAVE_ROWS_MIN.max(sequence.saved_rows / SAVE_SHARE) {
            return None;
        }
        sequence.saved_rows = sequence.kv_rows;
        let mark = self.snapshots.next;
        self.snapshots.next += 1;
        let saved = Saved {
            slot,
            mark,
            tokens: sequence.tokens.get(..sequence.kv_rows as usize)?.to_vec(),
            asked: sequence.asked,
            grid_rows: sequence.grid_rows,
        };
        self.ops.push(KvOp::Save { slot, mark });
        Some(saved)
    }
}
