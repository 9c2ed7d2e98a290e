//! Which sequences decode together: groups that stay together while nobody joins or leaves.
//!
//! A group is sent when all its members have their tokens. Members that change groups wait for their new one once; so
//! groups are left as they are as far as the wanted sizes allow.

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

    /// Deals everybody into groups of these sizes, largest first, whose sum is [`Dealer::len`]. Those that must move
    /// go where the fewest tokens are: attention takes time with every token of a sequence, which `depth` tells.
    pub fn deal(&mut self, sizes: &[usize], depth: impl Fn(u32) -> u32) {
        debug_assert_eq!(sizes.iter().sum::<usize>(), self.len());
        let mut groups = std::mem::take(&mut self.groups);
        groups.sort_by_key(|g| std::cmp::Reverse(g.len()));
        let mut moving = std::mem::take(&mut self.new);
        groups.resize_with(groups.len().max(sizes.len()), Vec::new);
        for (i, group) in groups.iter_mut().enumerate() {
            moving.extend(group.split_off(group.len().min(sizes.get(i).copied().unwrap_or(0))));
        }
        groups.truncate(sizes.len());
        // The longest first: what is left to even out is then small.
        moving.sort_by_key(|slot| std::cmp::Reverse(depth(*slot)));
        for slot in moving {
            let open = groups.iter_mut().zip(sizes).filter(|(g, size)| g.len() < **size).map(|(g, _)| g);
            let total = |g: &Vec<u32>| g.iter().map(|s| u64::from(depth(*s))).sum::<u64>();
            match open.min_by_key(|g| total(g)) {
                Some(group) => group.push(slot),
                None => groups.push(vec![slot]),
            }
        }
        groups.iter_mut().for_each(|g| g.sort_unstable());
        groups.retain(|g| !g.is_empty());
        self.groups = groups;
        self.changed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_stay_together_where_they_can() {
        let mut d = Dealer::default();
        (0..4).for_each(|s| d.join(s));
        assert!(d.changed());
        d.deal(&[2, 2], |_| 1);
        let before = d.groups().to_vec();
        d.join(9);
        d.deal(&[3, 2], |_| 1);
        assert_eq!(d.len(), 5);
        assert!(before.iter().all(|g| d.groups().iter().any(|n| g.iter().all(|s| n.contains(s)))), "{:?}", d.groups());
        d.leave(9);
        d.leave(77);
        assert!(d.changed());
        d.deal(&[4], |_| 1);
        assert_eq!(d.groups(), [vec![0, 1, 2, 3]]);
    }

    #[test]
    fn long_sequences_are_spread() {
        let mut d = Dealer::default();
        (0..4).for_each(|s| d.join(s));
        d.deal(&[2, 2], |s| if s < 2 { 1000 } else { 10 });
        assert!(d.groups().iter().all(|g| g.iter().filter(|s| **s < 2).count() == 1), "{:?}", d.groups());
    }
}
