//! API keys as they travel: what nodes know of a key, which is never the key itself.
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::control::OutOfBounds;
use crate::ids::KeyHash;
use crate::{ClusterId, limits};

/// Most keys of a cluster, revoked ones included, for a revocation is never forgotten: decades of a small cluster.
pub const KEYS_MAX: usize = 1024;
/// Most entries that one message or one node holds: two halves of a cluster may each have filled theirs while apart.
pub const KEY_ENTRIES_MAX: usize = 4 * KEYS_MAX;

/// What a key lets its holder do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyScope {
    /// Use the models.
    Use,
    /// Use the models, and manage the cluster: load, unload, tickets, keys, stop.
    Manage,
}

impl KeyScope {
    /// Whether this scope includes another.
    pub fn covers(self, needed: KeyScope) -> bool {
        self >= needed
    }

    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::Use => "use",
            Self::Manage => "manage",
        }
    }
}

/// What nodes know of a key. Of two entries with the same hash the revoked one counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyEntry {
    /// BLAKE3 of the key, which itself is kept nowhere.
    pub hash: KeyHash,
    /// For people.
    pub name: String,
    /// What it is good for.
    pub scope: KeyScope,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// When it was revoked, in seconds since 1970.
    pub revoked_unix_s: Option<u64>,
}

/// What one member tells another of the keys: a digest of all it knows, and the entries where the digests differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNews {
    /// The cluster meant.
    pub cluster: ClusterId,
    /// Digest of all entries that the sender has.
    pub digest: [u8; 32],
    /// All of them, or none where the sender only asks whether there is news.
    pub entries: Vec<KeyEntry>,
}

impl KeyNews {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.entries.len() > KEY_ENTRIES_MAX {
            return Err(OutOfBounds("the number of API keys"));
        }
        if self.entries.iter().any(|e| e.name.is_empty() || e.name.len() > limits::NAME_BYTES_MAX) {
            return Err(OutOfBounds("the length of an API key's name"));
        }
        Ok(())
    }
}

/// A key as `capstan key list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Its name.
    pub name: String,
    /// The first digits of its hash, to tell two of one name apart.
    pub fingerprint: String,
    /// What it is good for.
    pub scope: KeyScope,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: u64,
    /// When it was revoked, in seconds since 1970; none while it is good.
    pub revoked_unix_s: Option<u64>,
}

impl From<&KeyEntry> for KeyInfo {
    fn from(entry: &KeyEntry) -> Self {
        Self {
            name: entry.name.clone(),
            fingerprint: entry.hash.short(),
            scope: entry.scope,
            created_unix_s: entry.created_unix_s,
            revoked_unix_s: entry.revoked_unix_s,
        }
    }
}

/// A key that was just made; the only time that it is seen.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKey {
    /// What a client shows as `Authorization: Bearer …`.
    pub key: String,
    /// What is known of it from now on.
    #[serde(flatten)]
    pub info: KeyInfo,
}

// Without the key: what is printed for debugging may end up in a log.
impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKey").field("info", &self.info).finish_non_exhaustive()
    }
}
