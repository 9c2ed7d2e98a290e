//! The nodes of a cluster as the planner's machines and links, by what they tell of themselves.
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use capstan_proto::device::DeviceProfile;
use capstan_proto::manage::{LinkStatus, NodeStatus};

use crate::links::{Link, Links};
use crate::machines::{Machine, Rates};
use crate::timing::HOP_S;

/// A node with what it has free now; none before it was measured.
pub fn machine(node: &NodeStatus) -> Option<Machine> {
    let rates = Rates::measured(node.profile.clone()?);
    Some(Machine { name: node.name.clone(), usable_bytes: node.memory_free_bytes, rates })
}

/// Whether two nodes are daemons of one machine: one has all addresses of the other, or neither has any that leads further
/// than loopback. One in common proves nothing: bridges for containers have the same address on many machines.
/// What they were measured to reach, each alone, they do not reach together.
pub fn on_one_machine(a: &NodeStatus, b: &NodeStatus) -> bool {
    let outside = |n: &NodeStatus| -> BTreeSet<IpAddr> {
        n.addrs.iter().map(SocketAddr::ip).filter(|ip| !ip.is_loopback()).collect()
    };
    let (from_a, from_b) = (outside(a), outside(b));
    let inside = |n: &NodeStatus, outside: &BTreeSet<IpAddr>| outside.is_empty() && !n.addrs.is_empty();
    let within = |a: &BTreeSet<IpAddr>, b: &BTreeSet<IpAddr>| !a.is_empty() && a.is_subset(b);
    within(&from_a, &from_b) || within(&from_b, &from_a) || (inside(a, &from_a) && inside(b, &from_b))
}

/// What connects nodes, by their places in the list. Two that were not measured count as connected like the worst of those
/// that were; none where none was.
pub fn links(nodes: &[NodeStatus]) -> Option<Links> {
    let place = |id| nodes.iter().position(|n| n.id == id);
    let between: Vec<(usize, usize, Link)> = (nodes.iter().enumerate())
        .flat_map(|(a, n)| n.links.iter().filter_map(move |l| Some((a, place(l.to)?, l))))
        .map(|(a, b, l)| (a, b, link(l, ends_s(&nodes[a], &nodes[b]))))
        .collect();
    let slowest = between.iter().map(|(.., l)| *l).max_by(|a, b| a.way_s(1e4).total_cmp(&b.way_s(1e4)))?;
    Some(Links { usual: slowest, between })
}

/// What leads from a stage to another on the same node: no wire, and all else.
pub fn within(node: &NodeStatus) -> Link {
    Link { rtt_s: 0.0, bytes_per_s: f64::INFINITY, ends_s: ends_s(node, node) }
}

/// The planner takes a link to be the same both ways: the slower way counts.
fn link(l: &LinkStatus, ends_s: f64) -> Link {
    let bytes_per_s = l.up_bytes_per_s.min(l.down_bytes_per_s).max(1) as f64;
    Link { rtt_s: l.rtt_us as f64 / 1e6, bytes_per_s, ends_s }
}

/// What sending on one node and receiving on another take: half of what each takes for both.
fn ends_s(a: &NodeStatus, b: &NodeStatus) -> f64 {
    let of = |profile: &DeviceProfile| (profile.hop_ns > 0).then(|| f64::from(profile.hop_ns) * 1e-9);
    let end = |n: &NodeStatus| n.profile.as_ref().and_then(of).unwrap_or(HOP_S) / 2.0;
    end(a) + end(b)
}

#[cfg(test)]
mod tests {
    use capstan_proto::NodeId;

    use super::*;

    fn node(number: u8, hop_ns: Option<u32>, to: &[(u8, u64)]) -> NodeStatus {
        let link = |&(to, rtt_us): &(u8, u64)| LinkStatus {
            to: NodeId([to; 32]),
            rtt_us,
            up_bytes_per_s: 2_000_000,
            down_bytes_per_s: 1_000_000,
            measured_unix_s: 0,
        };
        NodeStatus {
            id: NodeId([number; 32]),
            name: format!("node {number}"),
            version: String::new(),
            addrs: vec![],
            online: true,
            is_self: number == 1,
            rtt_us: None,
            memory_total_bytes: 100,
            memory_free_bytes: 50,
            devices: vec![],
            profile: hop_ns.map(|hop_ns| DeviceProfile { hop_ns, disk_bytes_per_s: 7, ..DeviceProfile::default() }),
            links: to.iter().map(link).collect(),
            votes: false,
        }
    }

    #[test]
    fn a_measured_node_is_a_machine() {
        let machine = machine(&node(1, Some(5), &[])).unwrap();
        assert_eq!((machine.name.as_str(), machine.usable_bytes, machine.rates.disk_bytes_per_s), ("node 1", 50, 7.0));
        assert_eq!(super::machine(&node(1, None, &[])), None);
    }

    #[test]
    fn daemons_of_one_machine_share_an_address() {
        let at = |addrs: &[&str]| NodeStatus {
            addrs: addrs.iter().map(|a| a.parse().unwrap()).collect(),
            ..node(1, None, &[])
        };
        let one = at(&["192.168.1.2:1", "[fe80::1]:1", "127.0.0.1:1"]);
        assert!(on_one_machine(&one, &at(&["192.168.1.2:2"])));
        assert!(!on_one_machine(&one, &at(&["192.168.1.3:1", "127.0.0.1:1"])), "every machine has a loopback");
        assert!(!on_one_machine(&one, &at(&["127.0.0.1:2"])));
        let bridged = |own| at(&[own, "172.17.0.1:1"]);
        assert!(!on_one_machine(&bridged("192.168.1.2:1"), &bridged("192.168.1.3:1")), "a bridge for containers");
        assert!(on_one_machine(&at(&["127.0.0.1:1"]), &at(&["127.0.0.1:2"])));
        assert!(!on_one_machine(&at(&[]), &at(&[])), "nothing is known");
    }

    #[test]
    fn links_are_between_places_and_the_worst_stands_for_what_was_not_measured() {
        let nodes =
            [node(1, Some(100_000), &[(2, 400), (9, 1)]), node(2, None, &[(3, 900)]), node(3, Some(300_000), &[])];
        let links = links(&nodes).unwrap();
        assert_eq!(links.between.len(), 2, "a node that is not in the list has no place");
        let (ab, bc, ac) = (links.between(0, 1), links.between(2, 1), links.between(0, 2));
        assert!((ab.rtt_s - 400e-6).abs() < 1e-12 && ab.bytes_per_s == 1e6, "the slower way counts");
        assert!((ab.ends_s - (0.05e-3 + HOP_S / 2.0)).abs() < 1e-12);
        assert_eq!(ac, bc);
        let within = within(&nodes[2]);
        assert!(within.way_s(1e9) == 0.0 && (within.ends_s - 0.3e-3).abs() < 1e-12);
        assert_eq!(super::links(&nodes[2..]), None);
    }
}
