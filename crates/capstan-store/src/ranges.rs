//! A set of byte ranges that grows: what of a file is there.
use std::collections::BTreeMap;
use std::ops::Range;

/// Byte ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a range, joining it with what it touches.
    pub fn add(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if start >= end {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            start = start.min(s);
            end = end.max(e);
            self.0.remove(&s);
        }
        self.0.insert(start, end);
    }

    /// The parts of a range that are not there.
    pub fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut at = range.start;
        let mut missing = Vec::new();
        let before = self.0.range(..=range.start).next_back().map(|(s, _)| *s).unwrap_or(range.start);
        for (&s, &e) in self.0.range(before..range.end.max(before)) {
            if s > at {
                missing.push(at..s.min(range.end));
            }
            at = at.max(e);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    /// Bytes in all ranges together.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(s, e)| e - s).sum()
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(s, e)| (*s, *e))
    }
}

impl FromIterator<(u64, u64)> for Ranges {
    fn from_iter<I: IntoIterator<Item = (u64, u64)>>(ranges: I) -> Self {
        let mut all = Self::default();
        ranges.into_iter().for_each(|(start, end)| all.add(start..end));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_agrees_with_a_list_of_bytes() {
        // Every way to add three ranges within eight bytes.
        let all: Vec<Range<u64>> = (0..8).flat_map(|s| (s..=8).map(move |e| s..e)).collect();
        for a in &all {
            for b in &all {
                let c = &all[(a.start * 7 + b.end * 5) as usize % all.len()];
                let mut set = Ranges::default();
                let mut bytes = [false; 8];
                for r in [a, b, c] {
                    set.add(r.clone());
                    r.clone().for_each(|i| bytes[i as usize] = true);
                }
                assert_eq!(set.bytes(), bytes.iter().filter(|b| **b).count() as u64);
                let list: Vec<_> = set.iter().collect();
                assert!(list.windows(2).all(|w| w[0].1 < w[1].0), "{list:?}");
                for r in &all {
                    let missing: Vec<u64> = set.missing(r.clone()).into_iter().flatten().collect();
                    let expected: Vec<u64> = r.clone().filter(|i| !bytes[*i as usize]).collect();
                    assert_eq!(missing, expected, "{r:?} of {list:?}");
                }
            }
        }
    }
}
