//! Which sequences decode together: groups that stay together while nobody joins or leaves.
//!
//! A group is sent when all its members have their tokens. Members that change groups wait for their new one once.

/// The groups of sequences that decode, by slot.
#[derive(Debug, Default)]
pub(crate) struct Dealer {
    groups: Vec<Vec<u32>>,
    /// Joined, not yet dealt.
    new: Vec<u32>,
    changed: bool,
}

impl Dealer {
    /// A sequence decodes from now on.
    pub fn join(&mut self, slot: u32) {
        self.new.push(slot);
        self.changed = true;
    }

    /// It does so no longer. Nothing happens when it never did.
    pub fn leave(&mut self, slot: u32) {
        let before = self.len();
        self.new.retain(|s| *s != slot);
        self.groups.iter_mut().for_each(|g| g.retain(|s| *s != slot));
        self.groups.retain(|g| !g.is_empty());
        self.changed |= self.len() < before;
    }

    /// Whether it decodes.
    pub fn contains(&self, slot: u32) -> bool {
        self.new.contains(&slot) || self.groups.iter().any(|g| g.contains(&slot))
    }

    /// Sequences that decode.
    pub fn len(&self) -> usize {
        self.new.len() + self.groups.iter().map(Vec::len).sum::<usize>()
    }

    pub fn groups(&self) -> &[Vec<u32>] {
        &self.groups
    }

    pub fn sizes(&self) -> Vec<usize> {
        let mut sizes: Vec<usize> = self.groups.iter().map(Vec::len).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes
    }

    /// Whether somebody joined or left since the last deal.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// Deals everybody into groups of these sizes, largest first, whose sum is [`Dealer::len`]. Neighbouring slots go
    /// together: llama.cpp computes rows of slots that are not neighbours one after the other (their KV lies in separate
    /// streams), and nothing is gained by sending them together then.
    pub fn deal(&mut self, sizes: &[usize]) {
        debug_assert_eq!(sizes.iter().sum::<usize>(), self.len());
        let mut slots = std::mem::take(&mut self.new);
        slots.extend(self.groups.drain(..).flatten());
        slots.sort_unstable();
        let mut rest = &slots[..];
        for size in sizes {
            let (group, others) = rest.split_at((*size).min(rest.len()));
            self.groups.push(group.to_vec());
            rest = others;
        }
        self.groups.retain(|g| !g.is_empty());
        self.changed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_decode_together() {
        let mut d = Dealer::default();
        [3, 0, 2, 1].into_iter().for_each(|s| d.join(s));
        assert!(d.changed());
        d.deal(&[2, 2]);
        assert_eq!(d.groups(), [vec![0, 1], vec![2, 3]]);
        d.join(9);
        d.deal(&[3, 2]);
        assert_eq!((d.len(), d.groups()), (5, &[vec![0, 1, 2], vec![3, 9]][..]));
        d.leave(9);
        d.leave(77);
        assert!(d.changed());
        d.deal(&[4]);
        assert_eq!(d.groups(), [vec![0, 1, 2, 3]]);
    }
}
