//! Who votes: one node of one or two, three of three or four, five of more; the others learn.
//!
//! Two voters are worse than one, for they stand still when either is away; an even number is never better than the odd
//! one below it.
use std::collections::BTreeSet;

use capstan_proto::NodeId;

/// Who should vote.
///
/// `online` are the members that answer, with some patience: a restart is no reason to replace a voter. Voters that are
/// there stay; a place is filled by who is online, and a voter that is away keeps its place while nobody can take it.
/// `leader` is whoever asks: it stays, as long as it is a member, so that the vote does not wander.
pub fn voters(
    members: &BTreeSet<NodeId>,
    current: &BTreeSet<NodeId>,
    online: &BTreeSet<NodeId>,
    leader: NodeId,
) -> BTreeSet<NodeId> {
    let wanted = match members.len() {
        0 => 0,
        1 | 2 => 1,
        3 | 4 => 3,
        _ => 5,
    };
    let there = |id: &NodeId| *id == leader || online.contains(id);
    let mut able: Vec<NodeId> = members.iter().copied().filter(|id| there(id) || current.contains(id)).collect();
    able.sort_by_key(|id| (*id != leader, !there(id), !current.contains(id), *id));
    let odd = if able.len().is_multiple_of(2) { able.len().saturating_sub(1) } else { able.len() };
    able.truncate(wanted.min(odd));
    able.into_iter().collect()
}

/// How many of so many voters must answer.
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(ids: &[u8]) -> BTreeSet<NodeId> {
        ids.iter().map(|n| NodeId([*n; 32])).collect()
    }

    fn chosen(members: &[u8], current: &[u8], online: &[u8], leader: u8) -> BTreeSet<NodeId> {
        voters(&set(members), &set(current), &set(online), NodeId([leader; 32]))
    }

    #[test]
    fn as_many_as_the_cluster_allows() {
        assert_eq!(chosen(&[1], &[1], &[1], 1), set(&[1]));
        assert_eq!(chosen(&[1, 2], &[2], &[1, 2], 2), set(&[2]), "the vote does not wander");
        assert_eq!(chosen(&[1, 2, 3], &[2], &[1, 2, 3], 2), set(&[1, 2, 3]));
        assert_eq!(chosen(&[1, 2, 3], &[2], &[1, 2], 2), set(&[2]), "a third that never came cannot vote");
        assert_eq!(chosen(&[1, 2, 3, 4], &[1, 2, 3], &[1, 2, 3, 4], 1), set(&[1, 2, 3]));
        assert_eq!(chosen(&[1, 2, 3, 4], &[1, 2, 3], &[1, 2, 4], 1), set(&[1, 2, 4]), "one that is away is replaced");
        assert_eq!(chosen(&[1, 2, 3], &[1, 2, 3], &[1, 2], 1), set(&[1, 2, 3]), "unless nobody can");
        assert_eq!(chosen(&[1, 2, 3, 4, 5, 6], &[1, 2, 3], &[1, 2, 3, 4, 5, 6], 1), set(&[1, 2, 3, 4, 5]));
        assert_eq!(chosen(&[2, 3], &[1, 2, 3], &[2, 3], 1), set(&[2]), "a leader that is no member goes");
        assert_eq!((majority(1), majority(3), majority(5)), (1, 2, 3));
    }

    proptest! {
        #[test]
        fn always_odd_members_and_settled(
            members in prop::collection::btree_set(0u8..9, 1..9),
            current in prop::collection::btree_set(0u8..9, 0..6),
            online in prop::collection::btree_set(0u8..9, 0..9),
        ) {
            let list = |s: &BTreeSet<u8>| s.iter().copied().collect::<Vec<_>>();
            let leader = *members.iter().next().unwrap();
            let (m, o) = (list(&members), list(&online));
            let first = chosen(&m, &list(&current), &o, leader);
            prop_assert!(first.len() % 2 == 1 && first.len() <= 5 && first.is_subset(&set(&m)));
            let again = voters(&set(&m), &first, &set(&o), NodeId([leader; 32]));
            prop_assert_eq!(&again, &first, "asked twice, the answer stays");
        }
    }
}
