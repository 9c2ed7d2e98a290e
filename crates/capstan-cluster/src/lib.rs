//! What the nodes of a cluster agree on, who is online, and how they come to agree.
//!
//! | module | idea |
//! |---|---|
//! | [`state`], [`command`] | the replicated state as a pure function of its changes |
//! | [`members`] | the member list |
//! | [`keys`] | API keys by their hashes; a revocation is for ever |
//! | [`pairing`] | a short code, and how often it may be tried |
//! | [`ticket`] | one word that lets a node in, and the book of those that were issued |
//! | [`voters`] | who votes and who learns |
//! | [`fence`] | what keeps two epochs of a deployment apart |
//! | [`detector`] | who answered lately |
//! | [`links`] | which links have become slow |
//! | [`raft`] | the log of changes: openraft, its disk and its messages |
//!
//! All but [`raft`] is pure: time, keys and randomness are arguments. [`raft`] has no socket and no clock of its own: the
//! node gives it a [`Transport`](raft::Transport), tests a faulty one in virtual time.
#![forbid(unsafe_code)]

pub mod command;
pub mod detector;
pub mod fence;
pub mod keys;
pub mod links;
pub mod members;
pub mod pairing;
pub mod raft;
pub mod state;
pub mod ticket;
pub mod voters;

pub use capstan_proto::control::{Member, MemberState};
pub use command::{Command, Newcomer, Outcome, Proposal, Refusal, Response, Seat, Voucher};
pub use detector::Detector;
pub use keys::{ApiKeys, KeyError};
pub use links::{LinkWatch, SlowLink};
pub use members::{Change, MemberError, Members};
pub use pairing::{PairError, PairingCode, PairingDesk};
pub use state::{Placed, Removal, State};
pub use ticket::{Ticket, TicketBook, TicketError};
