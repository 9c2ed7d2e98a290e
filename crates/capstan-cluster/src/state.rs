//! The state that all nodes of a cluster agree on: members, removed keys, tickets, and which placement has which epoch.
//!
//! [`State::apply`] is the only way to change it, is a function of the state and the change alone, and either changes the
//! state or refuses. A log of changes ([`crate::raft`]) therefore gives every node the same state, bit for bit.
use std::collections::{BTreeMap, VecDeque};

use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use serde::{Deserialize, Serialize};

use crate::command::{
    Command, DEPLOYMENTS_MAX, Newcomer, Outcome, Proposal, REMOVED_MAX, Refusal, Response, Seat, Voucher,
};
use crate::members::{Change, MemberError, Members};
use crate::ticket::TicketBook;

/// How many unloaded deployments are remembered, so that a placement that was asked for before and comes late does not
/// bring one back. Numbers of deployments are random and never come twice.
const WITHDRAWN_MAX: usize = 1024;

/// The life of all that were there when the cluster's log began; versions count from there.
pub const FIRST_LIFE: u64 = 1;

/// How many that left are remembered, so that a request to come in that was made before and comes late does not bring one
/// back.
const DEPARTED_MAX: usize = 1024;

/// A key that was taken out for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// The node's name at that time.
    pub name: String,
    /// The member that asked for it.
    pub by: NodeId,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Version of the state that has it: whoever has an older one may not know.
    pub version: u64,
}

/// A placement that counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// Its number. No other placement of the cluster ever has the same.
    pub epoch: Epoch,
    /// The member that coordinates it: no other may act in this epoch.
    pub coordinator: NodeId,
    /// Its stages in order.
    pub seats: Vec<Seat>,
    /// See [`Command::Place`].
    pub recipe: Vec<u8>,
    attempt: u64,
}

/// What all nodes of a cluster agree on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    cluster: Option<ClusterId>,
    version: u64,
    members: Members,
    /// Each member's life and the request that began it.
    lives: BTreeMap<NodeId, (u64, u64)>,
    /// Who left, with the request that had let it in.
    departed: VecDeque<(NodeId, u64)>,
    removed: BTreeMap<NodeId, Removal>,
    tickets: TicketBook,
    deployments: BTreeMap<DeploymentId, Placed>,
    withdrawn: VecDeque<DeploymentId>,
    /// One counter for all deployments, so that it outlives each.
    last_epoch: Epoch,
}

impl State {
    /// Makes a change, or says why not.
    pub fn apply(&mut self, proposal: &Proposal) -> Outcome {
        proposal.check()?;
        let response = self.change(proposal)?;
        self.version += 1;
        Ok(response)
    }

    fn change(&mut self, proposal: &Proposal) -> Outcome {
        let Proposal { by, at_ms, command } = proposal;
        let (by, at_ms) = (*by, *at_ms);
        if let Command::Found { cluster, members, tickets } = command {
            if self.cluster.is_some() {
                return Err(Refusal::Founded);
            }
            self.cluster = Some(*cluster);
            // Nobody merges lists any more: entries of those who left have served.
            self.members.merge(members.iter().filter(|m| m.state == crate::MemberState::Active).cloned());
            self.lives = self.members.active().map(|m| (m.id, (FIRST_LIFE, 0))).collect();
            self.tickets = tickets.clone();
            return Ok(Response::Done);
        }
        if let Command::Leave { life } = command {
            if self.life(by) != Some(*life) {
                // Asked for again; a removed node is gone as well.
                return Ok(Response::Done);
            }
            self.not_the_last()?;
            self.forget(by);
            return Ok(Response::Done);
        }
        if self.members.get(by).is_none() {
            return Err(Refusal::Stranger);
        }
        match command {
            // Dealt with above.
            Command::Found { .. } | Command::Leave { .. } => Ok(Response::Done),
            Command::Admit { node, voucher, attempt } => self.admit(node, voucher, *attempt, at_ms),
            Command::Refresh(node) => {
                if node.id != by {
                    return Err(Refusal::Stranger);
                }
                let Newcomer { id, name, addrs, version } = node.clone();
                let entry = self.members.apply(Change::Refresh { id, name, addrs, version }, at_ms)?;
                Ok(Response::Member(entry))
            }
            Command::Remove(id) => self.remove(*id, by, at_ms),
            Command::Issue { hash, expires_unix_s, reusable } => {
                self.tickets.issue_hash(*hash, *expires_unix_s, *reusable, at_ms / 1000)?;
                Ok(Response::Done)
            }
            Command::Place { deployment, previous, seats, recipe, attempt } => {
                self.place(*deployment, *previous, (seats, recipe), by, *attempt)
            }
            Command::Withdraw { deployment, previous } => self.withdraw(*deployment, *previous),
        }
    }

    fn admit(&mut self, node: &Newcomer, voucher: &Voucher, attempt: u64, at_ms: u64) -> Outcome {
        let Newcomer { id, name, addrs, version } = node.clone();
        if let Some(removal) = self.removed.get(&id) {
            return Err(Refusal::Removed { name: removal.name.clone() });
        }
        let departed = self.departed.iter().find(|(gone, _)| *gone == id).map(|(_, began)| *began);
        let began = self.lives.get(&id).map(|(_, began)| *began);
        if began.is_some_and(|b| attempt < b) || departed.is_some_and(|b| attempt <= b) {
            return Err(Refusal::Overtaken);
        }
        // On a copy, so that a full cluster does not use the ticket up, nor a used ticket the room.
        let mut members = self.members.clone();
        let entry = members.apply(Change::Admit { id, name, addrs, version }, at_ms)?;
        if let Voucher::Ticket(hash) = voucher {
            let is_member = self.members.get(id).is_some();
            self.tickets.redeem_hash(hash, id, is_member, at_ms / 1000)?;
        }
        self.members = members;
        let id = entry.id;
        let life = match self.lives.get(&id) {
            Some((life, began)) if *began == attempt => *life,
            _ => self.version + 1,
        };
        self.lives.insert(id, (life, attempt));
        Ok(Response::Admitted { entry, life })
    }

    fn forget(&mut self, id: NodeId) {
        self.members.forget(id);
        if let Some((_, began)) = self.lives.remove(&id) {
            self.departed.retain(|(gone, _)| *gone != id);
            if self.departed.len() >= DEPARTED_MAX {
                self.departed.pop_front();
            }
            self.departed.push_back((id, began));
        }
    }

    fn not_the_last(&self) -> Result<(), Refusal> {
        if self.members.active().count() < 2 { Err(Refusal::LastMember) } else { Ok(()) }
    }

    fn remove(&mut self, id: NodeId, by: NodeId, at_ms: u64) -> Outcome {
        if self.removed.contains_key(&id) {
            return Ok(Response::Done);
        }
        let name = self.members.get(id).ok_or(MemberError::NotAMember(id))?.name.clone();
        self.not_the_last()?;
        if self.removed.len() >= REMOVED_MAX {
            return Err(Refusal::TooManyRemoved);
        }
        self.forget(id);
        self.removed.insert(id, Removal { name, by, at_ms, version: self.version + 1 });
        Ok(Response::Done)
    }

    fn place(
        &mut self,
        deployment: DeploymentId,
        previous: Epoch,
        (seats, recipe): (&[Seat], &[u8]),
        by: NodeId,
        attempt: u64,
    ) -> Outcome {
        let now = self.deployments.get(&deployment);
        if let Some(placed) = now
            && (placed.coordinator, placed.attempt) == (by, attempt)
        {
            return Ok(Response::Epoch(placed.epoch));
        }
        if self.withdrawn.contains(&deployment) {
            return Err(Refusal::Withdrawn);
        }
        self.is_now(deployment, previous)?;
        if let Some(outside) = seats.iter().find(|s| self.members.get(s.node).is_none()) {
            return Err(Refusal::SeatOutside(outside.node));
        }
        if now.is_none() && self.deployments.len() >= DEPLOYMENTS_MAX {
            return Err(Refusal::TooManyDeployments);
        }
        self.last_epoch = self.last_epoch.next();
        let (seats, recipe) = (seats.to_vec(), recipe.to_vec());
        let placed = Placed { epoch: self.last_epoch, coordinator: by, seats, recipe, attempt };
        self.deployments.insert(deployment, placed);
        Ok(Response::Epoch(self.last_epoch))
    }

    fn withdraw(&mut self, deployment: DeploymentId, previous: Epoch) -> Outcome {
        if self.withdrawn.contains(&deployment) {
            return Ok(Response::Done);
        }
        self.is_now(deployment, previous)?;
        self.deployments.remove(&deployment);
        if self.withdrawn.len() >= WITHDRAWN_MAX {
            self.withdrawn.pop_front();
        }
        self.withdrawn.push_back(deployment);
        Ok(Response::Done)
    }

    fn is_now(&self, deployment: DeploymentId, expected: Epoch) -> Result<(), Refusal> {
        let current = self.deployments.get(&deployment).map_or(Epoch(0), |p| p.epoch);
        if current == expected { Ok(()) } else { Err(Refusal::EpochMoved { expected, current }) }
    }

    /// The cluster; none before it was founded.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// Whether a deployment was ended for good, as far as that is remembered.
    pub fn is_withdrawn(&self, deployment: DeploymentId) -> bool {
        self.withdrawn.contains(&deployment)
    }

    /// Grows by one with every change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Its members.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Which life of a member this is: a node that was let in anew kept nothing of what it was before.
    pub fn life(&self, id: NodeId) -> Option<u64> {
        self.lives.get(&id).map(|(life, _)| *life)
    }

    /// Why a key is out for good; none for all others.
    pub fn removed(&self, id: NodeId) -> Option<&Removal> {
        self.removed.get(&id)
    }

    /// All keys that are out for good.
    pub fn all_removed(&self) -> impl Iterator<Item = (&NodeId, &Removal)> {
        self.removed.iter()
    }

    /// How a deployment is placed.
    pub fn placed(&self, deployment: DeploymentId) -> Option<&Placed> {
        self.deployments.get(&deployment)
    }

    /// All placements.
    pub fn deployments(&self) -> impl Iterator<Item = (&DeploymentId, &Placed)> {
        self.deployments.iter()
    }
}

#[cfg(test)]
mod tests {
    use capstan_proto::LayerRange;
    use proptest::prelude::*;

    use super::*;
    use crate::ticket::{TicketError, hash_of};

    fn id(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn newcomer(n: u8) -> Newcomer {
        Newcomer { id: id(n), name: format!("n{n}"), addrs: vec![], version: "1".into() }
    }

    fn by(n: u8, command: Command) -> Proposal {
        Proposal { by: id(n), at_ms: 1000, command }
    }

    fn place(deployment: u64, previous: u64, on: u8, attempt: u64) -> Command {
        let seats = vec![Seat { node: id(on), layers: LayerRange::new(0, 2).unwrap() }];
        let (deployment, previous, recipe) = (DeploymentId(deployment), Epoch(previous), vec![]);
        Command::Place { deployment, previous, seats, recipe, attempt }
    }

    /// A cluster of these nodes.
    fn founded(nodes: u8) -> State {
        let mut members = Members::default();
        for n in 1..=nodes {
            let Newcomer { id, name, addrs, version } = newcomer(n);
            members.apply(Change::Admit { id, name, addrs, version }, 0).unwrap();
        }
        let members = members.entries().cloned().collect();
        let mut state = State::default();
        let found = Command::Found { cluster: ClusterId([7; 32]), members, tickets: TicketBook::default() };
        assert_eq!(state.apply(&by(1, found.clone())), Ok(Response::Done));
        assert_eq!(state.apply(&by(1, found)), Err(Refusal::Founded));
        state
    }

    #[test]
    fn a_removed_key_never_comes_back() {
        let mut s = founded(2);
        let hash = hash_of(b"0123456789abcdef");
        s.apply(&by(1, Command::Issue { hash, expires_unix_s: 100, reusable: true })).unwrap();
        let admit = |n, voucher| by(1, Command::Admit { node: newcomer(n), voucher, attempt: 1 });
        s.apply(&admit(3, Voucher::Ticket(hash))).unwrap();
        assert_eq!(s.apply(&by(1, Command::Remove(id(3)))), Ok(Response::Done));
        assert_eq!(s.apply(&by(2, Command::Remove(id(3)))), Ok(Response::Done), "asked for again");
        assert_eq!(s.removed(id(3)).unwrap().by, id(1));
        assert!(matches!(s.apply(&admit(3, Voucher::Ticket(hash))), Err(Refusal::Removed { name }) if name == "n3"));
        assert!(matches!(s.apply(&admit(3, Voucher::Member)), Err(Refusal::Removed { .. })));
        assert_eq!(s.apply(&by(3, Command::Remove(id(1)))), Err(Refusal::Stranger));
        // One that left may.
        let leave = by(2, Command::Leave { life: s.life(id(2)).unwrap() });
        s.apply(&leave).unwrap();
        assert_eq!(s.apply(&leave), Ok(Response::Done));
        assert!(s.members().get(id(2)).is_none());
        s.apply(&admit(2, Voucher::Ticket(hash))).unwrap();
        assert!(s.life(id(2)).unwrap() > FIRST_LIFE, "another life");
        s.apply(&leave).unwrap();
        assert!(s.members().get(id(2)).is_some(), "what comes late does not end it");
        let leave = by(2, Command::Leave { life: s.life(id(2)).unwrap() });
        s.apply(&leave).unwrap();
        assert_eq!(s.apply(&admit(2, Voucher::Ticket(hash))), Err(Refusal::Overtaken), "nor brings it back");
        let again = Command::Admit { node: newcomer(2), voucher: Voucher::Member, attempt: 2 };
        s.apply(&by(1, again)).unwrap();
        s.apply(&by(1, Command::Remove(id(2)))).unwrap();
        assert_eq!(s.apply(&by(1, Command::Remove(id(1)))), Err(Refusal::LastMember));
    }

    #[test]
    fn a_ticket_admits_once_and_only_where_there_is_room() {
        let mut s = founded(1);
        let hash = hash_of(b"0123456789abcdef");
        s.apply(&by(1, Command::Issue { hash, expires_unix_s: 100, reusable: false })).unwrap();
        let admit = |n| by(1, Command::Admit { node: newcomer(n), voucher: Voucher::Ticket(hash), attempt: 1 });
        let mut bad = newcomer(2);
        bad.name = "a b".into();
        let bad = by(1, Command::Admit { node: bad, voucher: Voucher::Ticket(hash), attempt: 1 });
        assert!(matches!(s.apply(&bad), Err(Refusal::Member(_))));
        assert!(s.apply(&admit(2)).is_ok() && s.apply(&admit(2)).is_ok(), "its answer may have been lost");
        assert_eq!(s.apply(&admit(3)), Err(Refusal::Ticket(TicketError::Used)));
        let late = Proposal { at_ms: 100_000, ..admit(2) };
        assert!(matches!(s.apply(&late), Err(Refusal::Ticket(TicketError::Expired { .. }))));
    }

    #[test]
    fn of_two_that_place_one_wins() {
        let mut s = founded(2);
        assert_eq!(s.apply(&by(1, place(9, 0, 1, 77))), Ok(Response::Epoch(Epoch(1))));
        assert_eq!(s.apply(&by(1, place(9, 0, 1, 77))), Ok(Response::Epoch(Epoch(1))), "asked for again");
        assert_eq!(s.apply(&by(2, place(9, 1, 2, 5))), Ok(Response::Epoch(Epoch(2))));
        let moved = Refusal::EpochMoved { expected: Epoch(1), current: Epoch(2) };
        assert_eq!(s.apply(&by(1, place(9, 1, 1, 78))), Err(moved));
        assert_eq!(s.apply(&by(1, place(8, 0, 3, 1))), Err(Refusal::SeatOutside(id(3))));
        assert_eq!(s.apply(&by(2, place(8, 0, 2, 1))), Ok(Response::Epoch(Epoch(3))), "one counter for all");
        let withdraw = |previous| Command::Withdraw { deployment: DeploymentId(9), previous: Epoch(previous) };
        assert!(matches!(s.apply(&by(1, withdraw(1))), Err(Refusal::EpochMoved { .. })));
        assert_eq!(s.apply(&by(1, withdraw(2))), Ok(Response::Done));
        assert_eq!(s.apply(&by(1, withdraw(2))), Ok(Response::Done), "asked for again");
        assert!(s.is_withdrawn(DeploymentId(9)) && !s.is_withdrawn(DeploymentId(8)));
        assert_eq!(s.apply(&by(1, place(9, 0, 1, 79))), Err(Refusal::Withdrawn), "one that comes late");
    }

    #[test]
    fn what_is_refused_changes_nothing_and_what_is_too_large_is_refused() {
        let mut s = founded(1);
        let before = s.clone();
        let mut wide = place(1, 0, 1, 1);
        let Command::Place { seats, .. } = &mut wide else { unreachable!() };
        *seats = vec![seats[0]; capstan_proto::limits::LAYERS_MAX as usize + 1];
        assert!(matches!(s.apply(&by(1, wide)), Err(Refusal::OutOfBounds(_))));
        let mut wordy = place(1, 0, 1, 1);
        let Command::Place { recipe, .. } = &mut wordy else { unreachable!() };
        *recipe = vec![0; crate::command::RECIPE_BYTES_MAX + 1];
        assert!(matches!(s.apply(&by(1, wordy)), Err(Refusal::OutOfBounds(_))));
        let mut long = newcomer(2);
        long.version = "x".repeat(1000);
        let long = Command::Admit { node: long, voucher: Voucher::Member, attempt: 1 };
        assert!(matches!(s.apply(&by(1, long)), Err(Refusal::OutOfBounds(_))));
        let other = Command::Refresh(newcomer(2));
        assert_eq!(s.apply(&by(1, other)), Err(Refusal::Stranger));
        assert_eq!(s, before);
    }

    fn command() -> impl Strategy<Value = Command> {
        let n = 1u8..5;
        prop_oneof![
            (n.clone(), 0u64..2).prop_map(|(n, attempt)| Command::Admit {
                node: newcomer(n),
                voucher: Voucher::Member,
                attempt
            }),
            n.clone().prop_map(|n| Command::Remove(id(n))),
            (1u64..20).prop_map(|life| Command::Leave { life }),
            (0u64..3, 0u64..6, n, any::<u64>()).prop_map(|(d, p, on, attempt)| place(d, p, on, attempt)),
            (0u64..3, 0u64..6).prop_map(|(d, p)| Command::Withdraw { deployment: DeploymentId(d), previous: Epoch(p) }),
        ]
    }

    proptest! {
        #[test]
        fn epochs_only_grow_removal_stays_and_refusals_change_nothing(
            changes in prop::collection::vec((1u8..5, command()), 0..60),
        ) {
            let mut s = founded(3);
            let (mut out, mut last) = (std::collections::BTreeSet::new(), Epoch(0));
            for (who, command) in changes {
                let before = s.clone();
                let known = before.deployments().map(|(_, p)| p.epoch).max();
                match s.apply(&by(who, command)) {
                    Err(_) => prop_assert_eq!(&s, &before),
                    Ok(Response::Epoch(e)) if s.last_epoch != before.last_epoch => {
                        prop_assert!(e > last && known.is_none_or(|k| e > k));
                        last = e;
                    }
                    Ok(_) => {}
                }
                out.extend(s.all_removed().map(|(id, _)| *id));
                for id in &out {
                    prop_assert!(s.removed(*id).is_some() && s.members().get(*id).is_none());
                }
                prop_assert!(s.members().active().count() > 0);
            }
        }
    }
}
