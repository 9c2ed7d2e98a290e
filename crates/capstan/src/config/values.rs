//! What settings may be besides numbers and paths.
use std::fmt;
use std::net::SocketAddr;

/// A value, or `auto`: capstan decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Auto<T>(pub Option<T>);

impl<T: fmt::Display> fmt::Display for Auto<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("auto"),
        }
    }
}

/// Where the API listens for other machines; `off` is nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen(pub Option<SocketAddr>);

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(addr) => addr.fmt(f),
            None => f.write_str("off"),
        }
    }
}

/// How much memory KV snapshots of a stage may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotLimit {
    /// A part of what is free: `auto`.
    Auto,
    /// None are kept: `off`.
    Off,
    /// So many bytes.
    Bytes(u64),
}

impl SnapshotLimit {
    /// In bytes; none leaves it to the node.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Auto => None,
            Self::Off => Some(0),
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

impl fmt::Display for SnapshotLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Bytes(bytes) => write!(f, "{bytes}"),
        }
    }
}

/// A thing that is done or left, and the words for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// Done: `on`.
    On,
    /// Done where it is right and pays: `auto`.
    Auto,
    /// Left: `off`.
    Off,
}

impl Switch {
    /// Whether it is done.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Auto => "auto",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
