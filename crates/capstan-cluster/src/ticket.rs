//! One word that lets a node in, and the book of those that were issued.
//!
//! A ticket names the cluster, the node that issued it and where that is dialled, and carries a secret that the issuer
//! knows only by its hash. A checksum tells a word that was copied wrongly from one that expired.
use std::borrow::Cow;
use std::net::SocketAddr;

use capstan_proto::control::ADDRS_MAX;
use capstan_proto::{ClusterId, NodeId};
use data_encoding::BASE32_NOPAD;
use serde::{Deserialize, Serialize};

/// What every ticket begins with: the kind of word and the version of its layout.
pub const PREFIX: &str = "capstan1";
/// Longest word that is looked at, in characters: [`ADDRS_MAX`] IPv6 addresses take a third of it.
const TEXT_MAX: usize = 4096;
/// Bytes of the checksum.
const CHECKSUM: usize = 4;
/// Most tickets that a node remembers, those kept to name the reason included.
const BOOK_MAX: usize = 1024;
/// How long a ticket is remembered after it expired, in seconds, so that its holder is told that and not "unknown".
const REMEMBER_S: u64 = 7 * 24 * 3600;

/// Why a ticket does not let a node in. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum TicketError {
    /// Not a ticket at all, or mistyped.
    #[error("this is no whole ticket ({0}); copy it again, from \"{PREFIX}\" to its last letter")]
    Damaged(Cow<'static, str>),
    /// Too old.
    #[error("the ticket expired {ago_s} s ago; make a new one with `capstan ticket` on a node of the cluster")]
    Expired {
        /// Since when, in seconds.
        ago_s: u64,
    },
    /// A one-time ticket that another node used, or this one before it left.
    #[error("the ticket was used already; make a new one with `capstan ticket` on a node of the cluster")]
    Used,
    /// The issuer knows no such secret.
    #[error(
        "the node that the ticket names does not know it; make a new one with `capstan ticket` on a node of the cluster"
    )]
    Unknown,
    /// The issuer is in another cluster now.
    #[error("the ticket is for another cluster: the node that issued it has left that one; make a new ticket there")]
    WrongCluster,
    /// The book is full.
    #[error("{BOOK_MAX} tickets are out already; wait until some have expired")]
    TooMany,
}

fn damaged(how: &'static str) -> TicketError {
    TicketError::Damaged(Cow::Borrowed(how))
}

/// What a ticket says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The cluster it is for.
    pub cluster: ClusterId,
    /// The node that issued it: the key to dial.
    pub inviter: NodeId,
    /// Where that node is dialled.
    pub addrs: Vec<SocketAddr>,
    /// What proves that it was issued.
    pub secret: [u8; 16],
    /// In seconds since 1970.
    pub expires_unix_s: u64,
    /// Whether several nodes may use it.
    pub reusable: bool,
}

// Without the secret: a ticket may end up in a log.
impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket")
            .field("cluster", &self.cluster)
            .field("inviter", &self.inviter)
            .field("addrs", &self.addrs)
            .field("expires_unix_s", &self.expires_unix_s)
            .field("reusable", &self.reusable)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Display for Ticket {
    /// The word that is copied. It contains the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut bytes = postcard::to_stdvec(self).map_err(|_| std::fmt::Error)?;
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..CHECKSUM]);
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&bytes).to_lowercase())
    }
}

impl std::str::FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        if text.len() > TEXT_MAX {
            return Err(damaged("it is too long"));
        }
        let text = text.to_ascii_lowercase();
        let body = text.strip_prefix(PREFIX).ok_or(damaged("it does not begin like one"))?;
        let bytes = BASE32_NOPAD
            .decode(body.to_ascii_uppercase().as_bytes())
            .map_err(|_| damaged("a letter is wrong or missing"))?;
        let split = bytes.len().checked_sub(CHECKSUM).ok_or(damaged("most of it is missing"))?;
        let (body, sum) = bytes.split_at(split);
        if &blake3::hash(body).as_bytes()[..CHECKSUM] != sum {
            return Err(damaged("its checksum does not fit"));
        }
        let (ticket, rest): (Ticket, _) =
            postcard::take_from_bytes(body).map_err(|_| damaged("its content is unreadable"))?;
        if !rest.is_empty() || ticket.addrs.is_empty() || ticket.addrs.len() > ADDRS_MAX {
            return Err(damaged("its content is unreadable"));
        }
        Ok(ticket)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Issued {
    /// BLAKE3 of the secret, which itself is kept nowhere. Hexadecimal keys would say the same longer.
    hash: [u8; 32],
    expires_unix_s: u64,
    reusable: bool,
    /// Who came in with a one-time ticket; the same node may ask again when the answer was lost on its way, for as long
    /// as it is a member.
    used_by: Option<NodeId>,
}

/// The tickets that a node issued.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TicketBook {
    issued: Vec<Issued>,
}

/// What is known of a ticket's secret by all but its holder.
pub fn hash_of(secret: &[u8; 16]) -> [u8; 32] {
    *blake3::hash(secret).as_bytes()
}

impl TicketBook {
    /// Notes a new ticket.
    pub fn issue(&mut self, ticket: &Ticket, now_unix_s: u64) -> Result<(), TicketError> {
        self.issue_hash(hash_of(&ticket.secret), ticket.expires_unix_s, ticket.reusable, now_unix_s)
    }

    /// Notes a new ticket by the hash of its secret. To note the same one again changes nothing.
    pub fn issue_hash(
        &mut self,
        hash: [u8; 32],
        expires_unix_s: u64,
        reusable: bool,
        now_unix_s: u64,
    ) -> Result<(), TicketError> {
        if self.issued.iter().any(|t| t.hash == hash) {
            return Ok(());
        }
        self.issued.retain(|t| t.expires_unix_s.saturating_add(REMEMBER_S) > now_unix_s);
        if self.issued.len() >= BOOK_MAX {
            // Those that cannot let anyone in any more make room first.
            self.issued.retain(|t| t.expires_unix_s > now_unix_s && t.used_by.is_none());
        }
        if self.issued.len() >= BOOK_MAX {
            return Err(TicketError::TooMany);
        }
        self.issued.push(Issued { hash, expires_unix_s, reusable, used_by: None });
        Ok(())
    }

    /// Lets `node` in if the secret is one that was issued, is good at this time, and was not used by another; nor by
    /// itself, if it has left since (`is_member` tells): a recorded request to join must not bring back who is out.
    pub fn redeem(
        &mut self,
        secret: &[u8; 16],
        node: NodeId,
        is_member: bool,
        now_unix_s: u64,
    ) -> Result<(), TicketError> {
        self.redeem_hash(&hash_of(secret), node, is_member, now_unix_s)
    }

    /// The same by the hash of the secret.
    pub fn redeem_hash(
        &mut self,
        hash: &[u8; 32],
        node: NodeId,
        is_member: bool,
        now_unix_s: u64,
    ) -> Result<(), TicketError> {
        let hash = blake3::Hash::from(*hash);
        // blake3's comparison takes the same time whatever differs.
        let entry = self.issued.iter_mut().find(|t| blake3::Hash::from(t.hash) == hash).ok_or(TicketError::Unknown)?;
        if entry.used_by.is_some_and(|by| by != node || !is_member) {
            return Err(TicketError::Used);
        }
        if now_unix_s >= entry.expires_unix_s {
            return Err(TicketError::Expired { ago_s: now_unix_s - entry.expires_unix_s });
        }
        if !entry.reusable {
            entry.used_by = Some(node);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket(reusable: bool) -> Ticket {
        Ticket {
            cluster: ClusterId([7; 32]),
            inviter: NodeId([9; 32]),
            addrs: vec![([127, 0, 0, 1], 4711).into()],
            secret: *b"0123456789abcdef",
            expires_unix_s: 1000,
            reusable,
        }
    }

    #[test]
    fn a_word_survives_copying_and_shouting() {
        let word = ticket(false).to_string();
        assert!(word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()), "{word}");
        assert_eq!(word.parse::<Ticket>().unwrap(), ticket(false));
        assert_eq!(format!("  {}\n", word.to_uppercase()).parse::<Ticket>().unwrap(), ticket(false));
        assert!(!format!("{:?}", ticket(false)).contains("secret"));
    }

    #[test]
    fn a_book_tells_the_reasons_apart() {
        let (a, b) = (NodeId([1; 32]), NodeId([2; 32]));
        let (t, mut book) = (ticket(false), TicketBook::default());
        assert_eq!(book.redeem(&t.secret, a, false, 0), Err(TicketError::Unknown));
        book.issue(&t, 0).unwrap();
        assert_eq!(book.redeem(&t.secret, a, false, 1005), Err(TicketError::Expired { ago_s: 5 }));
        assert_eq!(book.redeem(&t.secret, a, false, 10), Ok(()));
        assert_eq!(book.redeem(&t.secret, a, true, 11), Ok(()), "its answer may have been lost");
        assert_eq!(book.redeem(&t.secret, a, false, 11), Err(TicketError::Used), "it has left");
        assert_eq!(book.redeem(&t.secret, b, true, 12), Err(TicketError::Used));
        assert_eq!(book.redeem(b"xxxxxxxxxxxxxxxx", b, false, 12), Err(TicketError::Unknown));

        let mut book = TicketBook::default();
        book.issue(&ticket(true), 0).unwrap();
        assert_eq!((book.redeem(&t.secret, a, false, 1), book.redeem(&t.secret, b, false, 2)), (Ok(()), Ok(())));
    }

    #[test]
    fn a_full_book_refuses_and_forgets_what_is_stale() {
        let mut book = TicketBook::default();
        let mut t = ticket(false);
        for n in 0..BOOK_MAX as u64 {
            t.secret[..8].copy_from_slice(&n.to_le_bytes());
            book.issue(&t, 0).unwrap();
        }
        t.secret = *b"one too many....";
        assert_eq!(book.issue(&t, 0), Err(TicketError::TooMany));
        assert_eq!(book.issue(&t, t.expires_unix_s), Ok(()));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_one_wrong_letter_is_noticed(text in ".{0,200}", at in 8usize..150, letter in "[a-z2-7]") {
            let _ = text.parse::<Ticket>();
            let word = ticket(false).to_string();
            let mut wrong = word.clone();
            let at = at.min(word.len() - 1);
            wrong.replace_range(at..at + 1, &letter);
            if wrong != word {
                prop_assert!(matches!(wrong.parse::<Ticket>(), Err(TicketError::Damaged(_))));
            }
        }
    }
}
