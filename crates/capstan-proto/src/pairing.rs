//! Pairing: how a machine that was only told a short code becomes a member.
//!
//! The order on a connection of [`PAIR_ALPN`], after the hellos:
//!
//! ```text
//! joining node                                 member whose user opened the pairing
//!   PairBegin { plate } ─────────────────────▶
//!                       ◀───────────────────── PairOffer::Offer { cluster, pake }
//!   PairProof { pake, proof } ───────────────▶   the proof shows that the code is known
//!                       ◀───────────────────── PairOutcome::Paired { proof, secret }
//! ```
//!
//! The code never travels: both sides prove that they know it (SPAKE2), and whoever listens or guesses learns nothing
//! but whether one guess was right. The secret is that of a ticket, which the joining node redeems at once.
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ClusterId;

/// ALPN by which a node that knows a pairing code asks for a ticket.
pub const PAIR_ALPN: &[u8] = b"capstan/pair/1";
/// Largest message of the joining node: a point of the curve and a hash.
pub const PAIR_REQUEST_BYTES_MAX: usize = 256;
/// Largest message of the member: a sentence.
pub const PAIR_REPLY_BYTES_MAX: usize = 8 << 10;

/// Which pairing is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairBegin {
    /// The code's first two digits, which are no secret.
    pub plate: u8,
}

/// What the member answers to a [`PairBegin`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairOffer {
    /// Such a pairing is open.
    Offer {
        /// The cluster that is joined.
        cluster: ClusterId,
        /// The member's message of the password-authenticated key exchange.
        pake: Vec<u8>,
    },
    /// It is not.
    Refused {
        /// HTTP status that says what kind of error.
        status: u16,
        /// For people.
        message: String,
    },
}

/// What shows that the joining node knows the code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairProof {
    /// The joining node's message of the key exchange.
    pub pake: Vec<u8>,
    /// Made from the key that the exchange gave.
    pub proof: [u8; 32],
}

/// How it ended.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairOutcome {
    /// Both know the code.
    Paired {
        /// Shows that the member knows it, too.
        proof: [u8; 32],
        /// Of a ticket for this one node.
        secret: [u8; 16],
        /// Until when the ticket is good, in seconds since 1970.
        expires_unix_s: u64,
    },
    /// The code was wrong, or too late.
    Refused {
        /// HTTP status that says what kind of error.
        status: u16,
        /// For people.
        message: String,
    },
}

// Without the secret.
impl fmt::Debug for PairOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paired { expires_unix_s, .. } => {
                f.debug_struct("Paired").field("expires_unix_s", expires_unix_s).finish_non_exhaustive()
            }
            Self::Refused { status, message } => {
                f.debug_struct("Refused").field("status", status).field("message", message).finish()
            }
        }
    }
}

/// A pairing that was opened: what `capstan pair` prints.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairingReply {
    /// What is typed on the other machine.
    pub code: String,
    /// Until when it is good, in seconds since 1970.
    pub expires_unix_s: u64,
    /// Where a machine that does not find this one by itself asks (`--at`).
    pub at: Vec<std::net::SocketAddr>,
    /// Whether other machines of the network find it by themselves.
    pub mdns: bool,
}

// Without the code.
impl fmt::Debug for PairingReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PairingReply")
            .field("expires_unix_s", &self.expires_unix_s)
            .field("at", &self.at)
            .field("mdns", &self.mdns)
            .finish_non_exhaustive()
    }
}

/// A machine whose user has opened a pairing, as it announces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearbyNode {
    /// Its name.
    pub name: String,
    /// The first two digits of its code.
    pub plate: u8,
    /// Where it was found.
    pub addrs: Vec<std::net::SocketAddr>,
}
