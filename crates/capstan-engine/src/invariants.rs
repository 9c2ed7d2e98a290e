//! What must always hold between the engine's parts. Debug builds check it after every call.
use crate::engine::Engine;
use crate::report::InvariantBroken;
use crate::sequence::{Phase, Sequence};

impl Engine {
    /// Checks what must always hold. It costs a walk over all slots.
    pub fn check_invariants(&self) -> Result<(), InvariantBroken> {
        let broken = |m: String| Err(InvariantBroken(m));
        let Parts { config, queue, slots, flight, dealer, spares } = self.parts();
        if flight.len() > usize::from(config.in_flight_max) {
            return broken(format!("{} micro-batches are under way", flight.len()));
        }
        if queue.len() > config.queue_max.saturating_add(slots.len() as usize) {
            return broken(format!("{} requests are queued", queue.len()));
        }
        let mut under_way = vec![0; slots.len() as usize];
        for &slot in flight.iter().flat_map(|sent| &sent.slots) {
            match under_way.get_mut(slot as usize) {
                Some(n) => *n += 1,
                None => return broken(format!("a micro-batch names slot {slot}")),
            }
        }
        let mut snapshots = spares.len();
        for (slot, sequence) in slots.iter() {
            let counted = std::mem::take(&mut under_way[slot as usize]);
            if counted != sequence.in_flight {
                return broken(format!("slot {slot} counts {}, but {counted} are under way", sequence.in_flight));
            }
            if let Some(what) = wrong(sequence, dealer.contains(slot)) {
                return broken(format!("slot {slot} with {counted} under way is {:?} and {what}", sequence.phase));
            }
            if sequence.guesses.iter().any(|g| flight.get(g.step).is_none_or(|sent| sent.void)) {
                return broken(format!("a guess of slot {slot} is not under way"));
            }
            snapshots += sequence.guesses.iter().filter(|g| g.spare.is_some()).count();
            if slots.find(sequence.id) != Some(slot) || queue.ids().any(|id| id == sequence.id) {
                return broken(format!("request {} is in two places", sequence.id));
            }
        }
        if snapshots != config.spares as usize {
            return broken(format!("{snapshots} of {} spare sequences are accounted for", config.spares));
        }
        let decoding = slots.iter().filter(|(slot, _)| dealer.contains(*slot)).count();
        if decoding != dealer.len() {
            return broken("a slot without a sequence decodes".into());
        }
        // What is left belongs to slots without a sequence.
        match under_way.iter().position(|&n| n > 0) {
            Some(slot) => broken(format!("slot {slot} is free while rows of it are under way")),
            None => Ok(()),
        }
    }
}

/// The parts that are checked against each other.
pub(crate) struct Parts<'a> {
    pub config: &'a crate::EngineConfig,
    pub queue: &'a crate::queue::Queue,
    pub slots: &'a crate::slots::Slots,
    pub flight: &'a crate::flight::Flight,
    pub dealer: &'a crate::dealer::Dealer,
    pub spares: &'a [u32],
}

/// What is wrong with a sequence, if anything.
fn wrong(sequence: &Sequence, dealt: bool) -> Option<&'static str> {
    let (kv, tokens) = (sequence.kv_rows as usize, sequence.tokens.len());
    let ready = sequence.ready_since.is_some();
    match sequence.phase {
        Phase::Prefill if kv >= tokens || ready || sequence.owed || dealt => Some("has its whole prompt"),
        Phase::Decode if ready && (kv + 1 != tokens || !sequence.guesses.is_empty() || sequence.owed || !dealt) => {
            Some("ready too soon")
        }
        Phase::Decode if !ready && kv != tokens => Some("has lost a token"),
        Phase::Decode if !ready && !sequence.owed && sequence.in_flight == 0 => Some("waits for nothing"),
        Phase::Ending if sequence.in_flight == 0 || ready || sequence.owed || dealt => Some("does not end"),
        _ => None,
    }
}
