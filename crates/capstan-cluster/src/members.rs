//! A member list that converges: of two entries for one node the higher stamp wins, equal stamps by content, so that
//! merging is commutative, associative and idempotent and the order in which news arrives does not matter.
use std::collections::BTreeMap;
use std::net::SocketAddr;

use capstan_proto::NodeId;
use capstan_proto::control::{ADDRS_MAX, ENTRIES_MAX, Member, MemberState};
use capstan_proto::limits::{MEMBERS_MAX, NAME_BYTES_MAX};
use serde::{Deserialize, Serialize};

/// Why a change to the member list was refused. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum MemberError {
    /// No room.
    #[error("the cluster is full: it takes {MEMBERS_MAX} members; let one leave first")]
    Full,
    /// Not among the active members.
    #[error("node {0:?} is no member of this cluster; join it with a ticket")]
    NotAMember(NodeId),
    /// A name no one could type.
    #[error("{0:?} is no name for a node; take 1 to 60 letters, digits, dots, dashes or underscores")]
    BadName(String),
}

/// A change to the member list, as a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Let a node in, or back in. Its name is made unique.
    Admit {
        /// Its key.
        id: NodeId,
        /// The name it would like.
        name: String,
        /// Where it is dialled.
        addrs: Vec<SocketAddr>,
        /// Version of capstan it runs.
        version: String,
    },
    /// A member's address or version has changed.
    Refresh {
        /// Which.
        id: NodeId,
        /// The name it would like now.
        name: String,
        /// Where it is dialled now.
        addrs: Vec<SocketAddr>,
        /// What it runs now.
        version: String,
    },
    /// A member leaves.
    Leave {
        /// Which.
        id: NodeId,
    },
}

/// The member list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    entries: BTreeMap<NodeId, Member>,
}

impl Members {
    /// Takes over what `other` knows better. Returns whether anything changed.
    pub fn merge(&mut self, other: impl IntoIterator<Item = Member>) -> bool {
        let mut changed = false;
        for entry in other {
            match self.entries.get_mut(&entry.id) {
                Some(known) if (known.stamp, &*known) >= (entry.stamp, &entry) => {}
                Some(known) => {
                    *known = entry;
                    changed = true;
                }
                None => {
                    self.entries.insert(entry.id, entry);
                    changed = true;
                }
            }
        }
        changed
    }

    /// Applies a change and returns the entry it made. `now_ms` becomes its stamp, unless that would not be newer.
    pub fn apply(&mut self, change: Change, now_ms: u64) -> Result<Member, MemberError> {
        let entry = match change {
            Change::Admit { id, name, addrs, version } => {
                let is_new = !self.entries.contains_key(&id);
                if self.active().filter(|m| m.id != id).count() >= MEMBERS_MAX
                    || (is_new && self.entries.len() >= ENTRIES_MAX)
                {
                    return Err(MemberError::Full);
                }
                let name = self.free_name(&name, id)?;
                self.entry(id, name, addrs, version, MemberState::Active, now_ms)
            }
            Change::Refresh { id, name, addrs, version } => {
                let known = self.get(id).ok_or(MemberError::NotAMember(id))?;
                let name = if known.name == name { name } else { self.free_name(&name, id)? };
                self.entry(id, name, addrs, version, MemberState::Active, now_ms)
            }
            Change::Leave { id } => {
                let known = self.get(id).ok_or(MemberError::NotAMember(id))?.clone();
                self.entry(id, known.name, known.addrs, known.version, MemberState::Left, now_ms)
            }
        };
        self.entries.insert(entry.id, entry.clone());
        Ok(entry)
    }

    fn entry(
        &self,
        id: NodeId,
        name: String,
        mut addrs: Vec<SocketAddr>,
        version: String,
        state: MemberState,
        now_ms: u64,
    ) -> Member {
        addrs.truncate(ADDRS_MAX);
        let stamp = self.entries.get(&id).map_or(now_ms, |known| now_ms.max(known.stamp.saturating_add(1)));
        Member { id, name, addrs, version, state, stamp }
    }

    /// The name, or the name with the smallest number from 2 on that no other active member has.
    pub fn free_name(&self, wanted: &str, id: NodeId) -> Result<String, MemberError> {
        let bad = || MemberError::BadName(wanted.chars().take(80).collect());
        if wanted.is_empty()
            || wanted.len() > NAME_BYTES_MAX / 2
            || !wanted.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
        {
            return Err(bad());
        }
        let taken = |name: &str| self.active().any(|m| m.id != id && m.name == name);
        if !taken(wanted) {
            return Ok(wanted.to_owned());
        }
        (2..=MEMBERS_MAX + 1).map(|n| format!("{wanted}-{n}")).find(|name| !taken(name)).ok_or_else(bad)
    }

    /// Whether another active member with a smaller key has the same name: then this one must take another.
    pub fn must_rename(&self, id: NodeId) -> bool {
        self.get(id).is_some_and(|own| self.active().any(|m| m.id < id && m.name == own.name))
    }

    /// The active member with this key.
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.entries.get(&id).filter(|m| m.state == MemberState::Active)
    }

    /// The active member with this name or key (in hexadecimal, or its first ten digits).
    pub fn find(&self, name_or_id: &str) -> Option<&Member> {
        self.active()
            .find(|m| m.name == name_or_id)
            .or_else(|| self.active().find(|m| m.id.to_string() == name_or_id || m.id.short() == name_or_id))
    }

    /// Active members, by key.
    pub fn active(&self) -> impl Iterator<Item = &Member> {
        self.entries.values().filter(|m| m.state == MemberState::Active)
    }

    /// Forgets a node, its entry included.
    pub fn forget(&mut self, id: NodeId) {
        self.entries.remove(&id);
    }

    /// All entries, by key, those who left included: what is told to others.
    pub fn entries(&self) -> impl Iterator<Item = &Member> {
        self.entries.values()
    }

    /// How many entries, those who left included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn member() -> impl Strategy<Value = Member> {
        (0u8..4, 0u64..4, any::<bool>(), 0u8..3).prop_map(|(n, stamp, left, name)| Member {
            id: id(n),
            name: format!("n{name}"),
            addrs: vec![],
            version: "1".into(),
            state: if left { MemberState::Left } else { MemberState::Active },
            stamp,
        })
    }

    fn of(entries: &[Member]) -> Members {
        let mut m = Members::default();
        m.merge(entries.iter().cloned());
        m
    }

    proptest! {
        #[test]
        fn merging_converges(
            a in prop::collection::vec(member(), 0..8),
            b in prop::collection::vec(member(), 0..8),
            c in prop::collection::vec(member(), 0..8),
        ) {
            let join = |x: &Members, y: &Members| { let mut x = x.clone(); x.merge(y.entries().cloned()); x };
            let (a, b, c) = (of(&a), of(&b), of(&c));
            prop_assert_eq!(join(&a, &b), join(&b, &a));
            prop_assert_eq!(join(&join(&a, &b), &c), join(&a, &join(&b, &c)));
            prop_assert_eq!(join(&a, &a), a.clone());
            let mut again = join(&a, &b);
            prop_assert!(!again.merge(b.entries().cloned()));
        }

        #[test]
        fn a_change_wins_over_what_it_changed(entries in prop::collection::vec(member(), 0..8), now in 0u64..5) {
            let before = of(&entries);
            let mut after = before.clone();
            after.apply(Change::Admit { id: id(1), name: "x".into(), addrs: vec![], version: "2".into() }, now).unwrap();
            let left = after.apply(Change::Leave { id: id(1) }, now).unwrap();
            let mut merged = before;
            merged.merge([left]);
            prop_assert!(merged.get(id(1)).is_none());
        }
    }

    #[test]
    fn names_are_made_unique() {
        let mut m = Members::default();
        let mut admit = |n: u8, name: &str| {
            m.apply(Change::Admit { id: id(n), name: name.into(), addrs: vec![], version: "1".into() }, 0)
        };
        assert_eq!(admit(1, "alpha").unwrap().name, "alpha");
        assert_eq!(admit(2, "alpha").unwrap().name, "alpha-2");
        assert_eq!(admit(3, "alpha").unwrap().name, "alpha-3");
        assert_eq!(admit(2, "alpha").unwrap().name, "alpha-2");
        assert!(matches!(admit(4, "a b"), Err(MemberError::BadName(_))));
        m.apply(Change::Leave { id: id(1) }, 0).unwrap();
        assert!(m.find("alpha").is_none() && m.find("alpha-2").is_some());
        assert_eq!(m.apply(Change::Leave { id: id(1) }, 0), Err(MemberError::NotAMember(id(1))));
    }
}
