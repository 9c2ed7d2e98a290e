//! Places in the KV caches: who has which, and which ones still hold what a former sequence left.
//!
//! Today a released slot is cleared with the next micro-batch. Prefix reuse would keep what it holds until the slot is
//! needed: that decision is [`Slots::release`] and [`Slots::take_clears`], nowhere else.
use capstan_proto::RequestId;
use capstan_proto::data::KvOp;

use crate::sequence::{Phase, Sequence};

#[derive(Debug, Default)]
struct Slot {
    sequence: Option<Sequence>,
    /// Rows were sent since its last `Clear`: the stages hold something for it.
    dirty: bool,
    /// A `Clear` must travel before its next row.
    clear: bool,
}

/// All slots of a deployment.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
}

impl Slots {
    pub fn new(count: u32) -> Self {
        Self { slots: (0..count).map(|_| Slot::default()).collect() }
    }

    pub fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    pub fn used(&self) -> u32 {
        self.iter().count() as u32
    }

    /// The lowest free slot.
    pub fn free(&self) -> Option<u32> {
        self.slots.iter().position(|s| s.sequence.is_none()).map(|i| i as u32)
    }

    /// Gives a free slot to a sequence.
    pub fn occupy(&mut self, slot: u32, sequence: Sequence) {
        if let Some(place) = self.slots.get_mut(slot as usize) {
            debug_assert!(place.sequence.is_none(), "slot {slot} was taken twice");
            place.sequence = Some(sequence);
        }
    }

    /// Takes a slot back. Nothing of its sequence may be under way.
    pub fn release(&mut self, slot: u32) {
        if let Some(place) = self.slots.get_mut(slot as usize) {
            debug_assert!(place.sequence.as_ref().is_none_or(|s| s.in_flight == 0), "slot {slot} is still in use");
            place.sequence = None;
            place.clear |= place.dirty;
        }
    }

    /// The operations that the next micro-batch must carry, in slot order.
    pub fn take_clears(&mut self) -> Vec<KvOp> {
        let mut ops = Vec::new();
        for (slot, place) in (0..).zip(&mut self.slots) {
            if std::mem::take(&mut place.clear) {
                place.dirty = false;
                ops.push(KvOp::Clear { slot });
            }
        }
        ops
    }

    /// Notes that rows of this slot are being sent.
    pub fn mark_dirty(&mut self, slot: u32) {
        if let Some(place) = self.slots.get_mut(slot as usize) {
            place.dirty = true;
        }
    }

    /// The sequences, in slot order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Sequence)> {
        (0..).zip(&self.slots).filter_map(|(i, s)| s.sequence.as_ref().map(|q| (i, q)))
    }

    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Sequence> {
        self.slots.get_mut(slot as usize)?.sequence.as_mut()
    }

    /// Where a request lives. A scan: there are at most 256 slots.
    pub fn find(&self, id: RequestId) -> Option<u32> {
        self.iter().find(|(_, s)| s.id == id).map(|(slot, _)| slot)
    }

    /// The sequence that was admitted first among those with chunks to send.
    pub fn next_prefill(&self) -> Option<u32> {
        self.iter().filter(|(_, s)| s.phase == Phase::Prefill).min_by_key(|(_, s)| s.admitted).map(|(slot, _)| slot)
    }

    /// The sequences whose next token can be sent, those that wait longest first.
    pub fn ready(&self) -> Vec<u32> {
        let mut ready: Vec<(u64, u32)> = self
            .iter()
            .filter_map(|(slot, s)| match s.phase {
                Phase::Ready { since, .. } => Some((since, slot)),
                _ => None,
            })
            .collect();
        ready.sort_unstable();
        ready.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Slots that are free, hold a former sequence's KV, and would never be cleared. Always none.
    pub fn leaked(&self) -> Option<u32> {
        self.slots.iter().position(|s| s.sequence.is_none() && s.dirty && !s.clear).map(|i| i as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::EngineConfig;
    use crate::queue::Request;

    fn sequence(id: u64) -> Sequence {
        let request = Request { id: RequestId(id), prompt: vec![1, 2], max_tokens: None };
        Sequence::new(request, id, &EngineConfig::new(1, 2, 16, 8))
    }

    #[test]
    fn a_slot_is_cleared_once_and_only_when_it_holds_something() {
        let mut slots = Slots::new(2);
        slots.occupy(0, sequence(1));
        slots.release(0);
        assert_eq!(slots.take_clears(), []);
        slots.occupy(0, sequence(2));
        slots.mark_dirty(0);
        slots.release(0);
        // Taken again before the Clear went out: it still goes, before the new rows.
        slots.occupy(0, sequence(3));
        assert_eq!(slots.take_clears(), [KvOp::Clear { slot: 0 }]);
        assert_eq!(slots.take_clears(), []);
        slots.release(0);
        assert_eq!(slots.take_clears(), []);
        assert_eq!((slots.used(), slots.leaked()), (0, None));
    }
}
