//! The API keys of a cluster, as nodes know them: by hash, and converging whatever order news arrives in.
//!
//! A key is 256 random bits. Nobody guesses one, so a fast hash is enough: slow ones (Argon2 and its like) make up for
//! secrets that people choose, would cost every request milliseconds, and would let strangers make a node busy.
//! Whoever reads the hashes has no key.
//!
//! Merging takes each key that either side knows, and of two entries for one key the lesser rights and the earlier
//! revocation: so it is commutative, associative and idempotent, and a revocation is for ever.
use std::collections::BTreeMap;

use capstan_proto::KeyHash;
use capstan_proto::keys::{KEY_ENTRIES_MAX, KEYS_MAX, KeyEntry, KeyScope};
use capstan_proto::limits::NAME_BYTES_MAX;
use data_encoding::BASE32_NOPAD;

/// What every key begins with, so that people and scanners of source code know one when they see it.
pub const PREFIX: &str = "sk-capstan-";
/// Random bytes of a key.
pub const KEY_BYTES: usize = 32;
/// Longest text that is hashed when it is shown as a key, in bytes: twice an honest one.
const SHOWN_BYTES_MAX: usize = 128;
/// What the hash is for, so that it equals no other hash of the same bytes.
const CONTEXT: &str = "capstan 2026 API key";

/// Why a change to the keys was refused. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A name no one could type.
    #[error("{0:?} is no name for a key; take 1 to 60 letters, digits, dots, dashes or underscores")]
    BadName(String),
    /// There is a key of this name.
    #[error("there is a key named {0:?} already; revoke it with `capstan key revoke {0}`, or take another name")]
    Taken(String),
    /// There is none.
    #[error("there is no key named {0:?}; `capstan key list` shows all")]
    Unknown(String),
    /// No room.
    #[error("the cluster has had {KEYS_MAX} keys, and takes no more, for revoked ones are remembered for ever")]
    Full,
}

/// All keys of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiKeys {
    entries: BTreeMap<KeyHash, KeyEntry>,
}

impl ApiKeys {
    /// Makes a key of random bytes and gives its text, which is not kept.
    pub fn add(
        &mut self,
        name: &str,
        scope: KeyScope,
        random: &[u8; KEY_BYTES],
        now_unix_s: u64,
    ) -> Result<(String, KeyEntry), KeyError> {
        if name.is_empty()
            || name.len() > NAME_BYTES_MAX / 2
            || !name.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '-' | '_'))
        {
            return Err(KeyError::BadName(name.chars().take(80).collect()));
        }
        if self.good().any(|e| e.name == name) {
            return Err(KeyError::Taken(name.into()));
        }
        if self.entries.len() >= KEYS_MAX {
            return Err(KeyError::Full);
        }
        let key = format!("{PREFIX}{}", BASE32_NOPAD.encode(random).to_lowercase());
        let hash = hash(&key);
        let entry = KeyEntry { hash, name: name.into(), scope, created_unix_s: now_unix_s, revoked_unix_s: None };
        self.entries.insert(hash, entry.clone());
        Ok((key, entry))
    }

    /// Revokes every good key of this name: two nodes may have made one each while they did not hear of each other.
    pub fn revoke(&mut self, name: &str, now_unix_s: u64) -> Result<usize, KeyError> {
        let mut revoked = 0;
        for entry in self.entries.values_mut().filter(|e| e.name == name && e.revoked_unix_s.is_none()) {
            entry.revoked_unix_s = Some(now_unix_s);
            revoked += 1;
        }
        if revoked == 0 { Err(KeyError::Unknown(name.chars().take(80).collect())) } else { Ok(revoked) }
    }

    /// The good key that this text is. Takes as long for a wrong text as for a right one.
    pub fn check(&self, shown: &str) -> Option<&KeyEntry> {
        if shown.len() > SHOWN_BYTES_MAX {
            return None;
        }
        let shown = blake3::Hash::from(hash(shown).0);
        let mut found = None;
        // All are compared, each in constant time (that is what comparing `blake3::Hash` does).
        for entry in self.entries.values() {
            if blake3::Hash::from(entry.hash.0) == shown {
                found = Some(entry);
            }
        }
        found.filter(|e| e.revoked_unix_s.is_none())
    }

    /// Takes over what `others` know better. Returns whether anything changed.
    pub fn merge(&mut self, others: impl IntoIterator<Item = KeyEntry>) -> bool {
        let mut changed = false;
        for other in others {
            let room = self.entries.len() < KEY_ENTRIES_MAX;
            match self.entries.get_mut(&other.hash) {
                Some(known) => {
                    let both = joined(known, &other);
                    changed |= both != *known;
                    *known = both;
                }
                None if room => {
                    self.entries.insert(other.hash, other);
                    changed = true;
                }
                // Unknown keys let nobody in, so leaving one out is safe.
                None => {}
            }
        }
        changed
    }

    /// All keys, by hash, revoked ones included: what is told to others.
    pub fn entries(&self) -> impl Iterator<Item = &KeyEntry> {
        self.entries.values()
    }

    fn good(&self) -> impl Iterator<Item = &KeyEntry> {
        self.entries.values().filter(|e| e.revoked_unix_s.is_none())
    }

    /// Two nodes with the same digest know the same.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for e in self.entries.values() {
            hasher.update(&e.hash.0);
            hasher.update(&[e.scope as u8]);
            hasher.update(&e.created_unix_s.to_le_bytes());
            // None and any time differ: no time is the largest.
            hasher.update(&e.revoked_unix_s.unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(&(e.name.len() as u64).to_le_bytes());
            hasher.update(e.name.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}

impl FromIterator<KeyEntry> for ApiKeys {
    fn from_iter<I: IntoIterator<Item = KeyEntry>>(entries: I) -> Self {
        let mut keys = Self::default();
        keys.merge(entries);
        keys
    }
}

/// What both entries of one key say together. Each field by itself, so that the order of joining does not matter.
fn joined(a: &KeyEntry, b: &KeyEntry) -> KeyEntry {
    let revoked_unix_s = [a, b].iter().filter_map(|e| e.revoked_unix_s).min();
    KeyEntry {
        hash: a.hash,
        name: a.name.clone().min(b.name.clone()),
        scope: a.scope.min(b.scope),
        created_unix_s: a.created_unix_s.min(b.created_unix_s),
        revoked_unix_s,
    }
}

fn hash(key: &str) -> KeyHash {
    KeyHash(blake3::derive_key(CONTEXT, key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_is_good_until_it_is_revoked_and_never_again() {
        let mut keys = ApiKeys::default();
        let (key, entry) = keys.add("laptop", KeyScope::Use, &[7; 32], 10).unwrap();
        assert!(key.starts_with(PREFIX) && key.len() == PREFIX.len() + 52, "{key}");
        assert_eq!(keys.check(&key), Some(&entry));
        for wrong in ["", PREFIX, &key[..key.len() - 1], &key.to_uppercase(), &"x".repeat(1 << 20)] {
            assert_eq!(keys.check(wrong), None);
        }
        let before = keys.clone();
        assert_eq!(keys.add("laptop", KeyScope::Use, &[8; 32], 10), Err(KeyError::Taken("laptop".into())));
        assert!(matches!(keys.add("a b", KeyScope::Use, &[8; 32], 10), Err(KeyError::BadName(_))));
        assert_eq!(keys.revoke("laptop", 20), Ok(1));
        assert_eq!(keys.check(&key), None);
        assert_eq!(keys.revoke("laptop", 21), Err(KeyError::Unknown("laptop".into())));
        // News of the time before does not bring it back, and the name is free again.
        assert!(!keys.merge(before.entries().cloned()));
        assert_eq!(keys.check(&key), None);
        assert!(keys.add("laptop", KeyScope::Manage, &[9; 32], 30).is_ok());
    }

    #[test]
    fn neither_debug_output_nor_entries_hold_the_key() {
        let mut keys = ApiKeys::default();
        let (key, entry) = keys.add("laptop", KeyScope::Use, &[7; 32], 10).unwrap();
        let secret = key.strip_prefix(PREFIX).unwrap();
        for text in [format!("{keys:?}"), format!("{entry:?}"), format!("{:?}", keys.check("sk-capstan-x"))] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(!entry.hash.to_string().contains(secret));
    }

    #[test]
    fn the_number_of_keys_is_bounded() {
        let mut keys = ApiKeys::default();
        for n in 0..KEYS_MAX as u64 {
            let mut random = [0; 32];
            random[..8].copy_from_slice(&n.to_le_bytes());
            keys.add(&format!("k{n}"), KeyScope::Use, &random, 0).unwrap();
        }
        assert_eq!(keys.add("more", KeyScope::Use, &[9; 32], 0), Err(KeyError::Full));
        let hash = |n: u64| KeyHash(*blake3::hash(&n.to_le_bytes()).as_bytes());
        let entry = |n| KeyEntry {
            hash: hash(n),
            name: "x".into(),
            scope: KeyScope::Use,
            created_unix_s: 0,
            revoked_unix_s: None,
        };
        keys.merge((0..2 * KEY_ENTRIES_MAX as u64).map(entry));
        assert_eq!(keys.entries().count(), KEY_ENTRIES_MAX);
    }

    fn entry() -> impl Strategy<Value = KeyEntry> {
        (0u8..4, 0u8..3, any::<bool>(), 0u64..4, prop::option::of(0u64..4)).prop_map(
            |(hash, name, manage, created_unix_s, revoked_unix_s)| KeyEntry {
                hash: KeyHash([hash; 32]),
                name: format!("n{name}"),
                scope: if manage { KeyScope::Manage } else { KeyScope::Use },
                created_unix_s,
                revoked_unix_s,
            },
        )
    }

    proptest! {
        #[test]
        fn merging_converges_and_revocation_is_permanent(
            a in prop::collection::vec(entry(), 0..8),
            b in prop::collection::vec(entry(), 0..8),
            c in prop::collection::vec(entry(), 0..8),
        ) {
            let join = |x: &ApiKeys, y: &ApiKeys| { let mut x = x.clone(); x.merge(y.entries().cloned()); x };
            let [a, b, c] = [a, b, c].map(|entries| entries.into_iter().collect::<ApiKeys>());
            prop_assert_eq!(join(&a, &b), join(&b, &a));
            prop_assert_eq!(join(&join(&a, &b), &c), join(&a, &join(&b, &c)));
            let mut all = join(&a, &b);
            prop_assert_eq!(all.digest(), join(&b, &a).digest());
            prop_assert!(!all.merge(b.entries().cloned()));
            prop_assert_eq!(a.digest() == b.digest(), a == b);
            for revoked in a.entries().filter(|e| e.revoked_unix_s.is_some()) {
                prop_assert!(all.entries().any(|e| e.hash == revoked.hash && e.revoked_unix_s.is_some()));
            }
            for entry in all.entries() {
                let most = a.entries().chain(b.entries()).filter(|e| e.hash == entry.hash).map(|e| e.scope).min();
                prop_assert_eq!(Some(entry.scope), most, "merging gives no rights");
            }
        }
    }
}
