//! Places in the KV caches: who has which, and what a former sequence left in those that nobody has.
use capstan_proto::RequestId;

use crate::prefix::Held;
use crate::report::Saved;
use crate::sequence::{Phase, Sequence};

#[derive(Debug, Default)]
struct Slot {
    sequence: Option<Sequence>,
    /// What the caches hold while no sequence is here.
    left: Vec<i32>,
    left_grid_rows: u32,
    left_asked: u32,
    left_saved_rows: u32,
    /// When its last sequence came, not when it left: so slots are given away in turns, and sequences that run at the
    /// same time are neighbours, which is what groups want.
    last_used: u64,
}

/// All slots of a deployment.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Counts uses.
    clock: u64,
}

impl Slots {
    pub fn new(count: u32) -> Self {
        Self { slots: (0..count).map(|_| Slot::default()).collect(), clock: 0 }
    }

    pub fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    pub fn used(&self) -> u32 {
        self.iter().count() as u32
    }

    /// Slots that hold nothing at all, ascending.
    pub fn empty(&self) -> Vec<u32> {
        let empty = |(_, s): &(u32, &Slot)| s.sequence.is_none() && s.left.is_empty();
        (0..).zip(&self.slots).filter(empty).map(|(slot, _)| slot).collect()
    }

    /// What each slot holds, for the choice of a seat.
    pub fn held<'a>(&'a self) -> Vec<Held<'a>> {
        let each = |(slot, s): (u32, &'a Slot)| {
            let (tokens, grid_rows, asked, saved_rows) = match &s.sequence {
                // A prefix may be copied that is still on its way: the copy travels behind it.
                Some(q) => {
                    (q.tokens.get(..q.kv_rows as usize).unwrap_or(&q.tokens), q.grid_rows, q.asked, q.saved_rows)
                }
                None => (&s.left[..], s.left_grid_rows, s.left_asked, s.left_saved_rows),
            };
            Held { slot, tokens, grid_rows, asked, saved_rows, live: s.sequence.is_some(), last_used: s.last_used }
        };
        (0..).zip(&self.slots).map(each).collect()
    }

    /// Gives a free slot to a sequence.
    pub fn occupy(&mut self, slot: u32, sequence: Sequence) {
        self.clock += 1;
        if let Some(place) = self.slots.get_mut(slot as usize) {
            debug_assert!(place.sequence.is_none(), "slot {slot} was taken twice");
            *place = Slot { sequence: Some(sequence), last_used: self.clock, ..Slot::default() };
        }
    }

    /// Takes a slot back, with what its sequence leaves in the caches if `keep`. Nothing of it may be under way.
    pub fn release(&mut self, slot: u32, keep: bool) -> Option<Sequence> {
        let place = self.slots.get_mut(slot as usize)?;
        let mut sequence = place.sequence.take()?;
        debug_assert_eq!(sequence.in_flight, 0, "slot {slot} is still in use");
        if keep {
            sequence.tokens.truncate(sequence.kv_rows as usize);
            place.left = std::mem::take(&mut sequence.tokens);
            place.left_grid_rows = sequence.grid_rows;
            place.left_asked = sequence.asked;
            place.left_saved_rows = sequence.saved_rows;
        }
        Some(sequence)
    }

    /// An empty slot holds what this snapshot says.
    pub fn refill(&mut self, saved: Saved) {
        self.clock += 1;
        if let Some(place) = self.slots.get_mut(saved.slot as usize).filter(|place| place.sequence.is_none()) {
            place.left_saved_rows = saved.tokens.len() as u32;
            place.left = saved.tokens;
            place.left_grid_rows = saved.grid_rows;
            place.left_asked = saved.asked;
            place.last_used = self.clock;
        }
    }

    /// The sequences, in slot order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Sequence)> {
        (0..).zip(&self.slots).filter_map(|(i, s)| s.sequence.as_ref().map(|q| (i, q)))
    }

    pub fn get(&self, slot: u32) -> Option<&Sequence> {
        self.slots.get(slot as usize)?.sequence.as_ref()
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
}
