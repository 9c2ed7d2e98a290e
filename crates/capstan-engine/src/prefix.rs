//! What a new prompt can take over from the caches: which slot it gets, and what must be done to the slots first.
//!
//! A finished sequence leaves its KV in its slot until the slot is needed. A prompt that begins like it goes on from
//! there; where that would destroy much more than it uses, or where the other sequence still runs, the slot is copied
//! first. Of the rest the slot that was used longest ago gives way.
use capstan_proto::data::{KvOp, Rollback};

/// Shorter prefixes are computed again: a copy or a trim costs more than so few rows.
pub(crate) const PREFIX_ROWS_MIN: usize = 16;

/// What a slot holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held<'a> {
    pub slot: u32,
    /// The tokens whose KV is there or on its way there.
    pub tokens: &'a [i32],
    /// Of these the first ones that were computed in chunks of the fixed grid.
    pub grid_rows: u32,
    /// So many of the tokens were asked, in one prompt; those behind it were computed one by one.
    pub asked: u32,
    /// So many of the tokens, or of more that were there before them, are in a snapshot of this slot.
    pub saved_rows: u32,
    /// A sequence runs in it.
    pub live: bool,
    /// Grows with use.
    pub last_used: u64,
}

/// Where a prompt goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub slot: u32,
    pub ops: Vec<KvOp>,
    /// Tokens of the prompt that are there already; less than all of them.
    pub cached: u32,
    /// Of these the first ones that were computed in chunks of the fixed grid.
    pub grid_rows: u32,
    /// Of these so many are in a snapshot of this slot.
    pub saved_rows: u32,
}

/// How prefixes may be reused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Whether at all.
    pub on: bool,
    pub rollback: Rollback,
    /// Only whole chunks of so many rows, computed as such: then nothing that is reused differs in a bit from what
    /// would be computed.
    pub grid: Option<u32>,
}

/// A seat for this prompt, of which the first `asked` tokens were asked and the rest answered in a lost epoch; none while
/// every slot has a sequence.
pub(crate) fn seat(slots: &[Held], prompt: &[i32], asked: u32, rules: Rules) -> Option<Seat> {
    let free = || slots.iter().filter(|s| !s.live);
    // An empty slot costs nothing; of the others the one used longest ago.
    let victim = |not: Option<u32>| {
        free().filter(|s| Some(s.slot) != not).min_by_key(|s| (!s.tokens.is_empty(), s.last_used, s.slot))
    };
    let source =
        slots.iter().map(|s| (usable(s, prompt, asked, rules), s)).filter(|(rows, _)| *rows >= PREFIX_ROWS_MIN);
    // Of equal ones a free slot, which needs no copy.
    let source = source.max_by_key(|(rows, s)| (*rows, !s.live, std::cmp::Reverse(s.slot)));
    let Some((rows, from)) = source else {
        let to = victim(None)?;
        return Some(Seat { slot: to.slot, ops: clear(to), cached: 0, grid_rows: 0, saved_rows: 0 });
    };
    let cached = rows as u32;
    let grid_rows = from.grid_rows.min(cached);
    let trim = |slot, held: usize| (held > rows).then_some(KvOp::Trim { slot, from: cached });
    let spoils = from.live || from.tokens.len() - rows > rows && rules.rollback == Rollback::Trim;
    if spoils && let Some(to) = victim(Some(from.slot)) {
        let mut ops = clear(to);
        ops.push(KvOp::Copy { from: from.slot, to: to.slot });
        // A live sequence may have guesses in its cache beyond its tokens.
        ops.extend(trim(to.slot, if from.live { usize::MAX } else { from.tokens.len() }));
        return Some(Seat { slot: to.slot, ops, cached, grid_rows, saved_rows: 0 });
    }
    if from.live {
        return None;
    }
    let ops = trim(from.slot, from.tokens.len()).into_iter().collect();
    Some(Seat { slot: from.slot, ops, cached, grid_rows, saved_rows: from.saved_rows.min(cached) })
}

fn clear(held: &Held) -> Vec<KvOp> {
    if held.tokens.is_empty() { Vec::new() } else { vec![KvOp::Clear { slot: held.slot }] }
}

/// How many tokens of the prompt can be taken from this slot.
fn usable(held: &Held, prompt: &[i32], asked: u32, rules: Rules) -> usize {
    if !rules.on {
        return 0;
    }
    // The last token's logits are wanted, so at least one row is computed.
    let common = held.tokens.iter().zip(&prompt[..prompt.len().saturating_sub(1)]).take_while(|(a, b)| a == b).count();
    let common = match rules.grid {
        // The same was asked and then answered: both were computed alike, to the last row.
        Some(_) if held.asked == asked && common >= asked as usize => common,
        Some(chunk) => {
            let rows = common.min(held.grid_rows as usize);
            rows - rows % chunk.max(1) as usize
        }
        None => common,
    };
    match rules.rollback {
        Rollback::Trim => common,
        // A state cannot be cut: all of it or nothing, and only of a sequence that stands still.
        Rollback::Copy if !held.live && common == held.tokens.len() => common,
        Rollback::Copy | Rollback::None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { on: true, rollback: Rollback::Trim, grid: None };

    fn held(slot: u32, tokens: &[i32], live: bool) -> Held<'_> {
        let rows = tokens.len() as u32;
        Held { slot, tokens, grid_rows: rows, asked: rows, saved_rows: 0, live, last_used: u64::from(slot) }
    }

    /// A seat for a prompt that is new.
    fn seat(slots: &[Held], prompt: &[i32], rules: Rules) -> Option<Seat> {
        super::seat(slots, prompt, prompt.len() as u32, rules)
    }

    /// Where everything is on the grid and nothing is saved.
    fn seat_of(slot: u32, ops: Vec<KvOp>, cached: u32) -> Seat {
        Seat { slot, ops, cached, grid_rows: cached, saved_rows: 0 }
    }

    fn text(n: i32) -> Vec<i32> {
        (0..n).collect()
    }

    #[test]
    fn an_empty_slot_first_then_the_oldest() {
        let (a, other) = (text(50), [9; 60]);
        let slots = [held(0, &a, false), held(1, &[], false)];
        assert_eq!(seat(&slots, &other, RULES), Some(seat_of(1, vec![], 0)));
        let slots = [held(0, &a, false), held(1, &a, true)];
        let want = seat_of(0, vec![KvOp::Clear { slot: 0 }], 0);
        assert_eq!(seat(&slots, &other, RULES), Some(want));
        assert_eq!(seat(&[held(0, &a, true)], &other, RULES), None);
    }

    #[test]
    fn a_prompt_goes_on_where_it_was_left() {
        let a = text(50);
        let mut next = text(50);
        next.extend([7, 7]);
        let slots = [held(0, &a, false), held(1, &[], false)];
        assert_eq!(seat(&slots, &next, RULES), Some(seat_of(0, vec![], 50)));
        // The same prompt again: its last token is computed again.
        let want = seat_of(0, vec![KvOp::Trim { slot: 0, from: 49 }], 49);
        assert_eq!(seat(&slots, &a, RULES), Some(want));
        assert_eq!(seat(&slots, &a, Rules { on: false, ..RULES }).unwrap().cached, 0);
    }

    #[test]
    fn what_would_be_spoilt_is_copied() {
        let (a, mut b) = (text(100), text(30));
        b.extend([5, 5]);
        let copy = [KvOp::Copy { from: 0, to: 1 }, KvOp::Trim { slot: 1, from: 30 }];
        for live in [false, true] {
            let slots = [held(0, &a, live), held(1, &[], false)];
            assert_eq!(seat(&slots, &b, RULES), Some(seat_of(1, copy.to_vec(), 30)));
        }
        // There is no other slot: then it is spoilt.
        let want = seat_of(0, vec![KvOp::Trim { slot: 0, from: 30 }], 30);
        assert_eq!(seat(&[held(0, &a, false)], &b, RULES), Some(want));
        assert_eq!(seat(&[held(0, &a, true)], &b, RULES), None);
    }

    #[test]
    fn short_prefixes_are_not_worth_it() {
        let a = text(PREFIX_ROWS_MIN as i32 - 1);
        assert_eq!(seat(&[held(0, &a, false)], &text(40), RULES).unwrap().cached, 0);
    }

    #[test]
    fn states_are_taken_whole_and_a_grid_in_whole_chunks() {
        let (a, mut next) = (text(50), text(50));
        next.extend([3; 60]);
        let slots = [held(0, &a, false)];
        let copy = Rules { rollback: Rollback::Copy, ..RULES };
        assert_eq!(seat(&slots, &next, copy), Some(seat_of(0, vec![], 50)));
        assert_eq!(seat(&slots, &a, copy), Some(seat_of(0, vec![KvOp::Clear { slot: 0 }], 0)));
        assert_eq!(seat(&slots, &next, Rules { rollback: Rollback::None, ..RULES }).unwrap().cached, 0);
        let grid = Rules { grid: Some(20), ..RULES };
        assert_eq!(seat(&slots, &next, grid).unwrap().cached, 40);
        let decoded = [Held { grid_rows: 20, ..held(0, &a, false) }];
        assert_eq!(seat(&decoded, &next, grid).unwrap().cached, 20);
    }

    #[test]
    fn what_was_answered_is_taken_as_it_was_computed() {
        let (begun, mut more) = (text(50), text(50));
        more.extend([3; 5]);
        let grid = Rules { grid: Some(20), ..RULES };
        // Thirty tokens were asked, of which one chunk is whole, and twenty were answered.
        let slots = [Held { grid_rows: 20, asked: 30, ..held(0, &begun, false) }];
        let seat = super::seat(&slots, &more, 30, grid).unwrap();
        // Whoever goes on from there finds on the grid what was on it.
        assert_eq!((seat.cached, seat.grid_rows), (50, 20));
        // Asked otherwise, it was computed otherwise.
        assert_eq!(super::seat(&slots, &more, 31, grid).unwrap().cached, 20);
        let mut other = text(29);
        other.extend([9; 10]);
        assert_eq!(super::seat(&slots, &other, 30, grid).unwrap().cached, 20);
    }
}
