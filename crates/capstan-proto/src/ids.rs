//! Names: what is compared, printed and sent to say which node, cluster, deployment, epoch or request is meant.
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that should have been 64 hexadecimal digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("expected 64 hexadecimal digits, got {0:?}")]
pub struct BadId(pub String);

macro_rules! key_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", &hex::encode(self.0)[..10])
            }
        }
        impl $name {
            /// The first ten digits: enough for a person to tell two apart.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..5])
            }
        }
        impl FromStr for $name {
            type Err = BadId;
            fn from_str(s: &str) -> Result<Self, BadId> {
                let mut out = [0; 32];
                hex::decode_to_slice(s, &mut out).map_err(|_| BadId(s.chars().take(80).collect()))?;
                Ok(Self(out))
            }
        }
        // People read JSON, so there it is hexadecimal; postcard carries the bare bytes.
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { self.0.serialize(s) }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
                } else {
                    Ok(Self(<[u8; 32]>::deserialize(d)?))
                }
            }
        }
    };
}

key_type!(
    /// A node: the ed25519 public key of its daemon's endpoint.
    NodeId
);
key_type!(
    /// A cluster: random, made once by the first node.
    ClusterId
);
key_type!(
    /// An API key: BLAKE3 of its text, by which nodes know it again without having it.
    KeyHash
);
key_type!(
    /// A model's exact version: BLAKE3 over where it comes from, its revision, and its files' names, sizes and hashes.
    ModelId
);
key_type!(
    /// What a file contains: a hash of all its bytes, BLAKE3 unless it is said otherwise.
    ContentHash
);

/// A deployment: a model being served. Unique in the cluster's life; made by the node that loads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeploymentId(pub u64);

impl fmt::Display for DeploymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The number of an applied placement. It only grows; whatever carries an older one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One API call, named by the daemon that received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
