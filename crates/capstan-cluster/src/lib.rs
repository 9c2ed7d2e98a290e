//! Members, tickets and who is online, as pure state: time, keys and randomness are arguments.
//!
//! | module | idea |
//! |---|---|
//! | [`members`] | a member list that converges whatever order news arrives in |
//! | [`keys`] | API keys by their hashes; a revocation is for ever |
//! | [`pairing`] | a short code, and how often it may be tried |
//! | [`ticket`] | one word that lets a node in, and the book of those that were issued |
//! | [`detector`] | who answered lately |
//!
//! Changes are values ([`members::Command`]) that are applied in one place, so that a log can replicate them.
#![forbid(unsafe_code)]

pub mod detector;
pub mod keys;
pub mod members;
pub mod pairing;
pub mod ticket;

pub use capstan_proto::control::{Member, MemberState};
pub use detector::Detector;
pub use keys::{ApiKeys, KeyError};
pub use members::{Command, MemberError, Members};
pub use pairing::{PairError, PairingCode, PairingDesk};
pub use ticket::{Ticket, TicketBook, TicketError};
