//! Who answered lately: a node is online while it was heard within a fixed time.
//!
//! Nodes poll each other once a second, so three seconds are two lost polls: enough not to cry wolf at one lost packet,
//! and short enough that a person who looks sees it.
use std::collections::BTreeMap;

use capstan_proto::NodeId;

/// How long a node counts as online after it was heard, in milliseconds.
pub const ONLINE_MS: u64 = 3000;

/// When each node was heard last.
#[derive(Clone, Debug)]
pub struct Detector {
    online_ms: u64,
    heard: BTreeMap<NodeId, u64>,
}

impl Default for Detector {
    fn default() -> Self {
        Self::new(ONLINE_MS)
    }
}

impl Detector {
    /// A detector that calls a node online for `online_ms` milliseconds after it was heard.
    pub fn new(online_ms: u64) -> Self {
        Self { online_ms, heard: BTreeMap::new() }
    }

    /// The node proved at `now_ms` that it lives. Time that runs backwards changes nothing.
    pub fn heard(&mut self, node: NodeId, now_ms: u64) {
        let last = self.heard.entry(node).or_insert(now_ms);
        *last = (*last).max(now_ms);
    }

    /// Whether the node was heard lately.
    pub fn online(&self, node: NodeId, now_ms: u64) -> bool {
        self.heard.get(&node).is_some_and(|&last| now_ms.saturating_sub(last) <= self.online_ms)
    }

    /// Whether the node was heard once and then no more. One that was forgotten (it said goodbye) did not fall silent.
    pub fn fell_silent(&self, node: NodeId, now_ms: u64) -> bool {
        self.heard.contains_key(&node) && !self.online(node, now_ms)
    }

    /// Forgets a node, so that it is offline at once.
    pub fn forget(&mut self, node: NodeId) {
        self.heard.remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn online_while_heard_lately() {
        let (mut d, a) = (Detector::new(3000), NodeId([1; 32]));
        assert!(!d.online(a, 0));
        d.heard(a, 1000);
        d.heard(a, 500);
        assert!(d.online(a, 4000) && !d.online(a, 4001));
        d.heard(a, 5000);
        assert!(d.online(a, 5000) && !d.fell_silent(a, 5000) && d.fell_silent(a, 9000));
        d.forget(a);
        assert!(!d.online(a, 5000) && !d.fell_silent(a, 9000));
    }
}
