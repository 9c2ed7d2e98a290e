//! One node's daemon and another's: one bidirectional QUIC stream a request, over a connection whose keys are proved.
//!
//! The order on a connection: the side that dials opens a stream and sends its [`Hello`], the other answers with its
//! own; both compute the version they share or part with a sentence. Then every further stream begins with one
//! [`Request`] frame. A stage is a **session**: the stream that asks for it stays open, carries [`StageCommand`]s one way
//! and [`StageEvent`]s the other, and the stage lives as long as the stream does, so that a coordinator that vanishes
//! leaves no process behind on other machines.
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::child::{ChildStats, PeerAddr, StageInfo, StageSpec, Wiring};
use crate::device::DeviceProfile;
use crate::generate::{GenerateRequest, RequestError};
use crate::keys::KeyNews;
use crate::manage::{DeploymentStatus, NodeStatus};
pub use crate::version::{
    CONTROL_VERSION_MAX, CONTROL_VERSION_MIN, DRAIN_SINCE, HAND_OVER_SINCE, HELLO_BYTES_MAX, Hello, KEYS_SINCE,
    RESET_BAD_REQUEST, RESET_NOT_UNDERSTOOD, SNAPSHOTS_SINCE, VersionMismatch, WEIGHTS_SINCE,
};
use crate::weights::{AssembleOrder, Catalogue, PartRequest};
use crate::{ClusterId, DeploymentId, Epoch, NodeId, limits};

/// ALPN between members of a cluster.
pub const CONTROL_ALPN: &[u8] = b"capstan/control/1";
/// ALPN by which a node that holds a ticket asks to become a member.
pub const JOIN_ALPN: &[u8] = b"capstan/join/2";
/// ALPN of the messages about the replicated state, between members.
pub const RAFT_ALPN: &[u8] = b"capstan/raft/1";
/// Largest request to join: it is read from a stranger. [`ADDRS_MAX`] addresses take less than a tenth of it.
pub const JOIN_REQUEST_BYTES_MAX: usize = 16 << 10;
/// Largest answer to a request to join: [`ENTRIES_MAX`] members of about 1 KiB each.
pub const JOIN_BYTES_MAX: usize = 2 << 20;
/// Most entries of a member list, those who left included: a small cluster's whole life.
pub const ENTRIES_MAX: usize = 4 * limits::MEMBERS_MAX;
/// Most addresses of a node: a few interfaces, each with IPv4 and IPv6.
pub const ADDRS_MAX: usize = 32;
/// Most deployments that one node coordinates.
pub const DEPLOYMENTS_MAX: usize = 64;
/// Bytes that are sent each way to measure a link: a seventh of a second over gigabit Ethernet.
pub const MEASURE_BYTES: u32 = 16 << 20;
/// Longest sentence that a peer may send, in bytes.
pub const REASON_BYTES_MAX: usize = 4096;
/// Largest header of a shard whose weights are to be made up: it travels in one message, beside the rest of an order.
/// Vocabularies with their merges take about 10 MB.
pub const MADE_UP_HEADER_BYTES_MAX: usize = limits::MESSAGE_BYTES_MAX - (1 << 20);
/// Largest file of made-up weights: a file of ext4.
pub const MADE_UP_FILE_BYTES_MAX: u64 = 16 << 40;
/// Close code of a connection that its key does not entitle to.
pub const CLOSE_NOT_A_MEMBER: u32 = 403;
/// Close code of a connection of a key that was removed from the cluster.
pub const CLOSE_REMOVED: u32 = 410;
/// Close code of a connection that came before its node knew who is a member now.
pub const CLOSE_NOT_YET: u32 = 503;
/// Close code of a connection whose sides share no version, or that broke the protocol.
pub const CLOSE_PROTOCOL: u32 = 400;

/// A message that breaks one of this module's bounds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message from another node breaks a limit ({0}); it was refused")]
pub struct OutOfBounds(pub &'static str);

/// Whether an entry of the member list counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    /// A member.
    Active,
    /// It left; the entry stays so that an older one cannot bring it back.
    Left,
}

/// One entry of the member list. Of two entries for one node the one with the higher stamp counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its key.
    pub id: NodeId,
    /// Its name, unique among active members.
    pub name: String,
    /// Where it is dialled.
    pub addrs: Vec<SocketAddr>,
    /// Version of capstan it runs.
    pub version: String,
    /// Whether it counts.
    pub state: MemberState,
    /// Grows with every change; milliseconds since 1970 when it was made, or one more than the last.
    pub stamp: u64,
}

impl Member {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.name.is_empty() || self.name.len() > limits::NAME_BYTES_MAX {
            return Err(OutOfBounds("the length of a node's name"));
        }
        if self.addrs.len() > ADDRS_MAX {
            return Err(OutOfBounds("the number of a node's addresses"));
        }
        if self.version.len() > limits::NAME_BYTES_MAX {
            return Err(OutOfBounds("the length of a version"));
        }
        Ok(())
    }
}

/// All that one node coordinates. A newer list replaces an older one whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentList {
    /// The node that coordinates them.
    pub coordinator: NodeId,
    /// Grows with every change.
    pub stamp: u64,
    /// Its deployments.
    pub deployments: Vec<DeploymentStatus>,
}

impl DeploymentList {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.deployments.len() > DEPLOYMENTS_MAX {
            return Err(OutOfBounds("the number of deployments"));
        }
        for d in &self.deployments {
            if d.stages.is_empty() || d.stages.len() > limits::LAYERS_MAX as usize {
                return Err(OutOfBounds("the number of stages"));
            }
            if d.name.len() > limits::NAME_BYTES_MAX || d.detail.len() > REASON_BYTES_MAX {
                return Err(OutOfBounds("the length of a text"));
            }
        }
        Ok(())
    }
}

/// What a node tells another about once a second, and asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gossip {
    /// The cluster meant.
    pub cluster: ClusterId,
    /// How the sender is.
    pub node: NodeStatus,
    /// What the sender coordinates.
    pub deployments: DeploymentList,
}

impl Gossip {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.node.devices.len() > 64 || self.node.addrs.len() > ADDRS_MAX {
            return Err(OutOfBounds("the number of devices"));
        }
        if self.node.links.len() > limits::MEMBERS_MAX {
            return Err(OutOfBounds("the number of links"));
        }
        self.node.profile.as_ref().map_or(Ok(()), DeviceProfile::check)?;
        self.deployments.check()
    }
}

/// A shard by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ShardRef {
    /// BLAKE3 of the file.
    pub hash: [u8; 32],
    /// Its length in bytes.
    pub bytes: u64,
}

/// A file that a stage loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageFile {
    /// Its layers.
    Shard,
    /// Driver only: the draft model, whole.
    Draft,
}

/// A stage that the coordinator wants here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageOrder {
    /// What to load. Its paths are ignored: the node puts the places of its own copies there, and its own thread and
    /// device settings and address. A draft model is wanted where one is named, which only the driver may.
    pub spec: StageSpec,
    /// The shard, where the coordinator knows its hash without cutting it again.
    pub shard: Option<ShardRef>,
    /// The draft model, where the coordinator knows its hash.
    pub draft: Option<ShardRef>,
    /// How many stages of this deployment share the node, and so its cores.
    pub sharers: u16,
    /// Memory that the placement counts on, in bytes; the node refuses when it has less.
    pub memory_bytes: u64,
    /// Make the shard's weights up instead of bringing the shard here.
    pub made_up: Option<MadeUpShard>,
}

/// A shard whose weights each node makes up for itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeUpShard {
    /// The GGUF's header, up to where data begins.
    pub header: Vec<u8>,
    /// Size of the whole file in bytes.
    pub file_bytes: u64,
    /// Let every token choose the same experts.
    pub same_experts: bool,
}

impl MadeUpShard {
    /// Refuses what exceeds a bound. Whether the header is one is for whoever makes the file.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.header.len() > MADE_UP_HEADER_BYTES_MAX {
            return Err(OutOfBounds("the length of a made-up shard's header"));
        }
        if self.file_bytes > MADE_UP_FILE_BYTES_MAX || self.file_bytes < self.header.len() as u64 {
            return Err(OutOfBounds("the size of a made-up shard"));
        }
        Ok(())
    }
}

/// Coordinator to a stage's node, on the stage's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageCommand {
    /// The file that [`StageEvent::Need`] asked for is there to be had: take it from this node's own store, or fetch it
    /// from the coordinator.
    Fetch(StageFile, ShardRef),
    /// Take this place in the ring.
    Connect(Wiring),
    /// Driver only: the pipeline is broken; end every request in flight with this sentence.
    Abort {
        /// For people.
        reason: String,
    },
    /// End the stage.
    Stop,
    /// Driver only, before each [`StageCommand::Connect`]: whether every stage of that ring keeps KV snapshots. Without this
    /// none does. Since version 12.
    Snapshots(bool),
}

/// A stage's node to the coordinator, on the stage's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StageEvent {
    /// The node has no copy of this file.
    Need(StageFile),
    /// The file is on its way.
    Fetching {
        /// Bytes here and verified.
        done_bytes: u64,
        /// Bytes in all.
        total_bytes: u64,
    },
    /// The file is here and verified.
    Fetched(StageFile),
    /// The child reads its weights.
    Loading {
        /// 0 to 1000.
        permille: u16,
    },
    /// The child is ready to be wired.
    Loaded {
        /// Where it listens.
        addr: PeerAddr,
        /// What it measures.
        info: StageInfo,
    },
    /// Both links of this epoch stand.
    Connected {
        /// Which.
        epoch: Epoch,
    },
    /// The epoch cannot go on, the child lives.
    Lost {
        /// Which.
        epoch: Epoch,
        /// For people.
        reason: String,
    },
    /// Counters of the child.
    Stats(ChildStats),
    /// The stage is no more; the last event.
    Ended {
        /// For people: completes "stage 1 on node beta …".
        reason: String,
    },
}

/// What a member asks of another; the first frame of a stream. It grows at its end only: see the rules in
/// [`version`](crate::version).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// Here is what I know; tell me what you know. Answered by one [`Gossip`].
    Poll(Box<Gossip>),
    /// Run this stage. Answered by [`StageEvent`]s; [`StageCommand`]s follow.
    Stage(Box<StageOrder>),
    /// Answer this request: the driver is on your side. Answered by one [`GenerateReply`], then by
    /// [`GenerateEvent`](crate::generate::GenerateEvent)s.
    /// Resetting the stream cancels it.
    Generate {
        /// The deployment.
        deployment: DeploymentId,
        /// What is asked.
        body: Box<GenerateRequest>,
    },
    /// What I coordinate has changed. Answered by [`Done`].
    Update(Box<DeploymentList>),
    /// I measure the link between us: so many bytes follow, and after your [`Done`] I want so many. At most
    /// [`MEASURE_BYTES`] each.
    Wire {
        /// Bytes after the request.
        up_bytes: u32,
        /// Bytes after the answer.
        down_bytes: u32,
    },
    /// Stop serving a model that you coordinate. Answered by [`UnloadReply`].
    Unload {
        /// The deployment.
        deployment: DeploymentId,
    },
    /// The API keys that I know, or only their digest. Answered by [`KeyNews`], with entries where the digests differ.
    Keys(Box<KeyNews>),
    /// Here is what I know of models and have of their parts; tell me what you know and have. Answered by one
    /// [`Catalogue`].
    Catalogue(Box<Catalogue>),
    /// Put this file together from what others have. Answered by [`AssembleEvent`](crate::weights::AssembleEvent)s;
    /// resetting the stream ends the work, and what has arrived stays.
    Assemble(Box<AssembleOrder>),
    /// Do something with a file of yours. Answered by one [`PartReply`](crate::weights::PartReply).
    Part(Box<PartRequest>),
    /// Move the stages that you coordinate away from a node. Answered by [`DrainReply`] when that is done.
    Drain {
        /// The node.
        node: NodeId,
    },
}

impl Request {
    /// How many kinds there are. A frame that begins with this number or a higher one is from a newer build.
    pub const KINDS: u32 = 11;

    /// The version of the protocol that brought this request.
    pub fn since(&self) -> u32 {
        match self {
            Self::Poll(_)
            | Self::Stage(_)
            | Self::Generate { .. }
            | Self::Update(_)
            | Self::Wire { .. }
            | Self::Unload { .. } => CONTROL_VERSION_MIN,
            Self::Keys(_) => KEYS_SINCE,
            Self::Catalogue(_) | Self::Assemble(_) | Self::Part(_) => WEIGHTS_SINCE,
            Self::Drain { .. } => DRAIN_SINCE,
        }
    }
}

/// What could not be moved, in sentences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReply(pub Vec<String>);

/// The answer to a request that asks for nothing back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done;

/// How an unload went: none, or a sentence that says why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnloadReply(pub Option<String>);

/// Whether a request was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GenerateReply {
    /// Events follow.
    Accepted,
    /// It was refused; nothing follows.
    Refused(RequestError),
}

/// What a node with a ticket asks, after the [`Hello`]s, on [`JOIN_ALPN`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The cluster that the ticket names.
    pub cluster: ClusterId,
    /// The ticket's one-time secret.
    pub secret: [u8; 16],
    /// The name it would like.
    pub name: String,
    /// Where it is dialled.
    pub addrs: Vec<SocketAddr>,
    /// Version of capstan it runs.
    pub version: String,
    /// Grows from one request of this node to the next; the same when a request is made again.
    pub attempt: u64,
}

// Without the secret.
impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Join")
            .field("cluster", &self.cluster)
            .field("name", &self.name)
            .field("addrs", &self.addrs)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl Join {
    /// Refuses what exceeds a bound.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        if self.name.is_empty() || self.name.len() > limits::NAME_BYTES_MAX / 2 {
            return Err(OutOfBounds("the length of a node's name"));
        }
        if self.addrs.is_empty() || self.addrs.len() > ADDRS_MAX || self.version.len() > limits::NAME_BYTES_MAX {
            return Err(OutOfBounds("the number of a node's addresses"));
        }
        Ok(())
    }
}

/// The answer to a [`Join`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReply {
    /// It is a member now.
    Welcome {
        /// The cluster.
        cluster: ClusterId,
        /// Which of the new member's lives there begins.
        life: u64,
        /// All members, the new one included.
        members: Vec<Member>,
    },
    /// It is not.
    Refused {
        /// HTTP status that says what kind of error.
        status: u16,
        /// For people.
        message: String,
    },
}

/// A sentence cut to what a message may carry.
pub fn clip(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX).rev().find(|&i| reason.is_char_boundary(i)).unwrap_or(0);
        reason.truncate(end);
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number that a message of an enum begins with.
    fn number<T: Serialize>(message: &T) -> u32 {
        crate::codec::kind(&postcard::to_stdvec(message).unwrap()).unwrap()
    }

    #[test]
    fn numbers_of_messages_never_change() {
        let key = NodeId([7; 32]);
        let list = || DeploymentList { coordinator: key, stamp: 1, deployments: vec![] };
        let news = KeyNews { cluster: ClusterId([1; 32]), digest: [0; 32], entries: vec![] };
        let deployment = DeploymentId(1);
        let requests = [
            (3, Request::Update(Box::new(list()))),
            (4, Request::Wire { up_bytes: 0, down_bytes: 0 }),
            (5, Request::Unload { deployment }),
            (6, Request::Keys(Box::new(news))),
            (9, Request::Part(Box::new(PartRequest::Publish { assembly: crate::ContentHash([0; 32]) }))),
            (10, Request::Drain { node: key }),
        ];
        for (n, request) in &requests {
            assert_eq!(number(request), *n, "{request:?}");
        }
        // A kind more is one that this build does not know; adding it means raising the number and the version.
        let last = requests.iter().map(|(n, _)| *n).max();
        assert_eq!(last, Some(Request::KINDS - 1));
        let newest = requests.iter().map(|(_, r)| r.since()).max();
        assert!(newest <= Some(CONTROL_VERSION_MAX));
        let shard = ShardRef { hash: [0; 32], bytes: 1 };
        assert_eq!(number(&StageCommand::Fetch(StageFile::Shard, shard)), 0);
        assert_eq!(number(&StageCommand::Stop), 3);
        assert_eq!(number(&StageCommand::Snapshots(true)), 4);
        assert_eq!(number(&StageEvent::Need(StageFile::Draft)), 0);
        assert_eq!(number(&StageEvent::Ended { reason: String::new() }), 8);
        assert_eq!(number(&MemberState::Left), 1);
        assert_eq!(number(&JoinReply::Refused { status: 1, message: String::new() }), 1);
    }

    #[test]
    fn what_was_released_keeps_its_bytes() {
        let member = Member {
            id: NodeId([7; 32]),
            name: "ab".into(),
            addrs: vec![([127, 0, 0, 1], 300).into()],
            version: "1".into(),
            state: MemberState::Left,
            stamp: 128,
        };
        let mut want = vec![7; 32];
        want.extend([2, b'a', b'b', 1, 0, 127, 0, 0, 1, 0xac, 2, 1, b'1', 1, 0x80, 1]);
        assert_eq!(postcard::to_stdvec(&member).unwrap(), want);
        let join = Join {
            cluster: ClusterId([9; 32]),
            secret: [5; 16],
            name: "a".into(),
            addrs: vec![],
            version: String::new(),
            attempt: 300,
        };
        let mut want = [vec![9; 32], vec![5; 16]].concat();
        want.extend([1, b'a', 0, 0, 0xac, 2]);
        assert_eq!(postcard::to_stdvec(&join).unwrap(), want);
        assert!(!format!("{join:?}").contains("secret"));
    }

    #[test]
    fn bounds_are_checked() {
        let member = |name: &str, addrs: usize| Member {
            id: NodeId([1; 32]),
            name: name.into(),
            addrs: vec![([127, 0, 0, 1], 1).into(); addrs],
            version: "1".into(),
            state: MemberState::Active,
            stamp: 1,
        };
        assert!(member("a", 1).check().is_ok());
        assert!(member("", 1).check().is_err());
        assert!(member("a", ADDRS_MAX + 1).check().is_err());
        assert!(member(&"x".repeat(limits::NAME_BYTES_MAX + 1), 1).check().is_err());
    }

    #[test]
    fn a_long_sentence_is_cut_between_characters() {
        let cut = clip("é".repeat(REASON_BYTES_MAX));
        assert!(cut.len() <= REASON_BYTES_MAX && cut.chars().all(|c| c == 'é'));
        assert_eq!(clip("short".into()), "short");
    }
}
