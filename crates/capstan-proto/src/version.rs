//! Which control protocols a build speaks, and how two builds find the newest that both speak.
//!
//! Nodes are updated one by one, so for a while an old build talks to a new one. Each says in its [`Hello`] from which
//! version to which it speaks; both reckon the highest common one, or part with a sentence that names both builds and
//! says which of the two to upgrade.
//!
//! ```text
//! capstan 0.1   4 ─ 5           agree on 5 with 0.2, on nothing with 0.4
//! capstan 0.2       5 ─ 6       (each build speaks at least what the minor version before it spoke)
//! capstan 0.4           7 ─ 8
//! ```
//!
//! # Rules for change
//!
//! Frames are postcard: fields have no names and variants are numbers. So:
//!
//! 1. **A message that was released never changes.** No field is added, removed, moved or given another type, not even
//!    an optional one: the other side would read the wrong bytes.
//! 2. **Enums grow at their end only**, and a number is never used again. Tests hold the numbers (`control::tests`).
//! 3. **What is new is a new variant of [`Request`](crate::control::Request)**, with replies of its own. It gets a line
//!    in [`HISTORY`], and [`Request::since`](crate::control::Request::since) names that version. It is sent only where
//!    the hellos agreed on that version or a later one; otherwise the caller does without, as builds did before.
//! 4. **A request that is not understood ends its stream, not the connection**: the stream is reset with
//!    [`RESET_NOT_UNDERSTOOD`], and the next request is answered.
//! 5. **The oldest version is dropped** (the first line of [`HISTORY`]) only by a build whose predecessor, one minor
//!    version before, spoke a newer one: then a rolling update still finds a common version at every step.
//!
//! [`Hello`] itself, and the tickets' and pairing's messages that strangers send, have versions in their ALPN instead.
use serde::{Deserialize, Serialize};

/// Every version that this build speaks, oldest first, with what it brought. Consecutive.
pub const HISTORY: [(u32, &str); 6] = [
    (7, "members are agreed on in a log of their own; poll, stage, generate, update, wire, unload"),
    (8, "API keys travel between members; an unknown request is answered by a reset with its own code"),
    (9, "models that are pulled: catalogues, files put together, parts"),
    (10, "stages are moved away from a node that is to be drained"),
    (11, "the log's leader hands over before it goes"),
    (12, "stages keep KV snapshots of sequences"),
];
/// Oldest control protocol that this build speaks.
pub const CONTROL_VERSION_MIN: u32 = HISTORY[0].0;
/// Newest control protocol that this build speaks.
pub const CONTROL_VERSION_MAX: u32 = HISTORY[HISTORY.len() - 1].0;
/// The version that brought API keys.
pub const KEYS_SINCE: u32 = 8;
/// The version that brought models that are pulled.
pub const WEIGHTS_SINCE: u32 = 9;
/// The version that brought draining.
pub const DRAIN_SINCE: u32 = 10;
/// The version that brought a leader that hands over.
pub const HAND_OVER_SINCE: u32 = 11;
/// The version that brought KV snapshots.
pub const SNAPSHOTS_SINCE: u32 = 12;
/// Largest [`Hello`] frame: it is read before anything is known of the other side.
pub const HELLO_BYTES_MAX: usize = 1024;
/// Code with which the answering side resets a stream whose request it does not know; as in HTTP, "not implemented".
pub const RESET_NOT_UNDERSTOOD: u32 = 501;
/// Code with which the answering side resets a stream whose request is malformed or breaks a bound.
pub const RESET_BAD_REQUEST: u32 = 400;

/// The first frame on a connection, in both directions. Its layout never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest version spoken.
    pub min: u32,
    /// Newest version spoken.
    pub max: u32,
    /// Version of capstan, for people.
    pub build: String,
}

/// Two builds that share no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this node runs capstan {ours} (control protocol {ours_min} to {ours_max}) and the other capstan {theirs} \
     (control protocol {theirs_min} to {theirs_max}), which have none in common; upgrade capstan on {older} node"
)]
pub struct VersionMismatch {
    /// Our build.
    pub ours: String,
    /// Our oldest version.
    pub ours_min: u32,
    /// Our newest version.
    pub ours_max: u32,
    /// Their build.
    pub theirs: String,
    /// Their oldest version.
    pub theirs_min: u32,
    /// Their newest version.
    pub theirs_max: u32,
    /// `this` or `the other`: which node to upgrade.
    pub older: &'static str,
}

impl Hello {
    /// What this build says.
    pub fn ours(build: impl Into<String>) -> Self {
        Self { min: CONTROL_VERSION_MIN, max: CONTROL_VERSION_MAX, build: build.into() }
    }

    /// The newest version that both sides speak.
    pub fn agree(&self, theirs: &Hello) -> Result<u32, VersionMismatch> {
        let version = self.max.min(theirs.max);
        if version >= self.min.max(theirs.min) {
            return Ok(version);
        }
        // The build's name comes from the other side and ends up on a terminal.
        let named = theirs.build.chars().filter(|c| !c.is_control()).take(64).collect();
        Err(VersionMismatch {
            ours: self.build.clone(),
            ours_min: self.min,
            ours_max: self.max,
            theirs: named,
            theirs_min: theirs.min,
            theirs_max: theirs.max,
            older: if self.max < theirs.max { "this" } else { "the other" },
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello(min: u32, max: u32) -> Hello {
        Hello { min, max, build: format!("0.{max}") }
    }

    #[test]
    fn the_newest_common_version_or_a_sentence() {
        assert_eq!(hello(1, 3).agree(&hello(2, 5)), Ok(3));
        assert_eq!(hello(2, 5).agree(&hello(1, 3)), Ok(3));
        let old = hello(1, 1).agree(&hello(2, 3)).unwrap_err();
        assert!(old.to_string().ends_with("upgrade capstan on this node"), "{old}");
        assert!(old.to_string().contains("capstan 0.1") && old.to_string().contains("capstan 0.3"), "{old}");
        assert_eq!(hello(2, 3).agree(&hello(1, 1)).unwrap_err().older, "the other");
    }

    #[test]
    fn the_table_has_no_gaps() {
        assert!(HISTORY.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1));
        assert!((CONTROL_VERSION_MIN..=CONTROL_VERSION_MAX).contains(&KEYS_SINCE));
    }

    #[test]
    fn a_hello_has_the_bytes_it_always_had() {
        // One that reads these differently cannot even say that it does not agree.
        let bytes = postcard::to_stdvec(&Hello { min: 3, max: 300, build: "0.1.0".into() }).unwrap();
        assert_eq!(bytes, [3, 0xac, 2, 5, b'0', b'.', b'1', b'.', b'0']);
    }

    proptest! {
        #[test]
        fn both_sides_reckon_the_same(a in 0u32..9, b in 0u32..9, c in 0u32..9, d in 0u32..9) {
            let (left, right) = (hello(a.min(b), a.max(b)), hello(c.min(d), c.max(d)));
            match (left.agree(&right), right.agree(&left)) {
                (Ok(one), Ok(other)) => {
                    prop_assert_eq!(one, other);
                    prop_assert!((left.min..=left.max).contains(&one) && (right.min..=right.max).contains(&one));
                }
                (Err(one), Err(other)) => prop_assert!(one.older != other.older),
                (one, other) => prop_assert!(false, "{:?} but {:?}", one, other),
            }
        }
    }
}
