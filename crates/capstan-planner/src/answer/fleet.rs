//! The machines of a question, grouped into kinds that nothing tells apart, links and wishes included.
use capstan_proto::LayerRange;

use super::Wish;
use crate::arrange::Arrangement;
use crate::links::{Link, Links};
use crate::machines::Machine;

#[derive(Clone)]
pub(super) struct Fleet {
    pub machines: Vec<Machine>,
    pub links: Links,
    /// What is settled about each machine.
    wishes: Vec<Option<Wish>>,
    /// Of each kind, the places of its machines in the list, those that must be used first. Machines that must not be
    /// are of no kind.
    members: Vec<Vec<usize>>,
}

impl Fleet {
    pub fn of(machines: Vec<Machine>, links: &Links, wishes: &[(usize, Wish)]) -> Self {
        let wish = |i: usize| wishes.iter().find(|w| w.0 == i).map(|w| w.1);
        let wishes = (0..machines.len()).map(wish).collect();
        Self { machines, links: links.clone(), wishes, members: Vec::new() }.grouped()
    }

    fn grouped(mut self) -> Self {
        let (machines, links, wishes) = (&self.machines, &self.links, &self.wishes);
        let same_links = |a: usize, b: usize| {
            (0..machines.len()).filter(|&c| c != a && c != b).all(|c| links.between(a, c) == links.between(b, c))
        };
        let given = |i: usize| matches!(wishes[i], Some(Wish::Holds(_)));
        let alike = |a: usize, b: usize| {
            !given(a) && !given(b) && machines[a] == machines[b] && (links.between.is_empty() || same_links(a, b))
        };
        let mut members: Vec<Vec<usize>> = Vec::new();
        for i in (0..machines.len()).filter(|&i| wishes[i] != Some(Wish::Unused)) {
            match members.iter_mut().find(|m| alike(m[0], i)) {
                Some(kind) => kind.push(i),
                None => members.push(vec![i]),
            }
        }
        members.iter_mut().for_each(|kind| kind.sort_by_key(|&i| wishes[i] != Some(Wish::Used)));
        self.members = members;
        self
    }

    /// How many machines may be used.
    pub fn len(&self) -> usize {
        self.members.iter().map(Vec::len).sum()
    }

    pub fn kinds(&self) -> usize {
        self.members.len()
    }

    pub fn count(&self, kind: usize) -> usize {
        self.members[kind].len()
    }

    /// How many machines of a kind must be used.
    pub fn required(&self, kind: usize) -> usize {
        self.members[kind].iter().filter(|&&i| self.wishes[i] == Some(Wish::Used)).count()
    }

    /// The layers that the machine of a kind holds because it was asked for.
    pub fn holds(&self, kind: usize) -> Option<LayerRange> {
        match self.wishes[self.members[kind][0]] {
            Some(Wish::Holds(layers)) => Some(layers),
            _ => None,
        }
    }

    /// Whether nothing tells the machines apart.
    pub fn is_uniform(&self) -> bool {
        self.members.len() == 1 && self.wishes.iter().all(Option::is_none)
    }

    /// Machines that must not be used.
    pub fn left_out(&self) -> impl Iterator<Item = &Machine> {
        self.machines.iter().zip(&self.wishes).filter(|(_, w)| **w == Some(Wish::Unused)).map(|(m, _)| m)
    }

    pub fn machine(&self, kind: usize) -> &Machine {
        &self.machines[self.members[kind][0]]
    }

    /// All machines that may be used.
    pub fn usable(&self) -> impl Iterator<Item = &Machine> {
        self.members.iter().flatten().map(|&i| &self.machines[i])
    }

    /// A machine's name, with its place where others have the same.
    pub fn name_of(&self, place: usize) -> String {
        let name = &self.machines[place].name;
        let alone = self.machines.iter().filter(|m| m.name == *name).count() == 1;
        if alone { name.clone() } else { format!("{name} (no. {})", place + 1) }
    }

    /// Between a machine of one kind and another of a kind.
    pub fn link(&self, a: usize, b: usize) -> Link {
        let second = if a == b { self.members[b].get(1) } else { self.members[b].first() };
        second.map_or(self.links.usual, |&s| self.links.between(self.members[a][0], s))
    }

    /// From each stage to the next, the last one's to the first.
    pub fn ring(&self, found: &Arrangement) -> Vec<Link> {
        let n = found.stages.len();
        (0..n).map(|i| self.link(found.stages[i].0, found.stages[(i + 1) % n].0)).collect()
    }

    /// Of each stage its machine's place in the list.
    pub fn places(&self, found: &Arrangement) -> Vec<usize> {
        let mut used = vec![0; self.members.len()];
        let place = |&(kind, _): &(usize, LayerRange)| {
            used[kind] += 1;
            self.members[kind][used[kind] - 1]
        };
        found.stages.iter().map(place).collect()
    }

    /// One more machine of a kind, over the usual link.
    pub fn with_another(&self, kind: usize) -> Self {
        let mut more = self.clone();
        more.machines.push(self.machine(kind).clone());
        more.wishes.push(None);
        more.grouped()
    }

    /// The first machines only, where all are alike.
    pub fn first(&self, n: usize) -> Self {
        let mut fewer = self.clone();
        fewer.machines.truncate(n);
        fewer.wishes.truncate(n);
        fewer.grouped()
    }

    /// Without one machine of a kind: the last one.
    pub fn without(&self, kind: usize) -> Option<Self> {
        let place = *self.members[kind].last()?;
        self.with_wish(place, Wish::Unused)
    }

    /// With nothing settled; none where nothing is.
    pub fn unsettled(&self) -> Option<Self> {
        let mut free = self.clone();
        free.wishes.fill(None);
        self.wishes.iter().any(Option::is_some).then(|| free.grouped())
    }

    /// With one more machine of a kind that must be used, where there is one left.
    pub fn forced(&self, kind: usize, used: usize) -> Option<Self> {
        let mut forced = self.clone();
        for &place in self.members[kind].get(..=used)? {
            forced.wishes[place] = forced.wishes[place].or(Some(Wish::Used));
        }
        Some(forced.grouped())
    }

    fn with_wish(&self, place: usize, wish: Wish) -> Option<Self> {
        let mut other = self.clone();
        if other.wishes[place].is_some() {
            return None;
        }
        other.wishes[place] = Some(wish);
        Some(other.grouped())
    }

    /// With links that are so many times as wide.
    pub fn with_links(&self, factor: f64) -> Self {
        let faster = |l: Link| Link { bytes_per_s: l.bytes_per_s * factor, ..l };
        let mut other = self.clone();
        other.links.usual = faster(other.links.usual);
        other.links.between.iter_mut().for_each(|(_, _, link)| *link = faster(*link));
        other.grouped()
    }

    /// As many machines of one kind.
    pub fn same(machine: &Machine, n: usize, link: Link) -> Self {
        Self::of(vec![machine.clone(); n], &Links::all(link), &[])
    }
}
