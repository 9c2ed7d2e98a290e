//! Why a daemon does not start, and why a call to another node failed.
use std::net::SocketAddr;
use std::path::PathBuf;

use capstan_proto::codec::CodecError;
use capstan_proto::control::{OutOfBounds, VersionMismatch};
use capstan_proto::manage::ManageError;

/// Why a node did not start. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Its folder cannot be used.
    #[error("the data folder {path:?} cannot be used: {source}; choose another with --data-dir or mend its rights")]
    DataDir {
        /// The folder or a file in it.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file in it is not what we wrote.
    #[error("{path:?} is damaged ({reason}); move it away to start anew, the node then has to join its cluster again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Another process listens there.
    #[error("UDP port {addr} is taken; is another capstan daemon running? Choose another port, or 0 for any")]
    PortTaken {
        /// Where it wanted to listen.
        addr: SocketAddr,
    },
    /// The network cannot be used.
    #[error("the node cannot listen on {addr}: {reason}; choose an address of this machine")]
    Network {
        /// Where it wanted to listen.
        addr: SocketAddr,
        /// What the system says.
        reason: String,
    },
    /// Its store of shards cannot be used.
    #[error(transparent)]
    Store(#[from] capstan_store::StoreError),
    /// The log of the cluster's state cannot be used.
    #[error("{0}")]
    Agreement(String),
    /// A name no one could type.
    #[error(transparent)]
    Name(#[from] capstan_cluster::MemberError),
}

/// Why a call to another node failed. Whether it took effect there is unknown unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Not in the member list; nothing was sent.
    #[error("node {0} is no member of this cluster")]
    NotAMember(String),
    /// No answer; nothing took effect.
    #[error("node {node} cannot be reached ({reason}); is its daemon running, and does a firewall let UDP through?")]
    Unreachable {
        /// Its name.
        node: String,
        /// What the network says.
        reason: String,
    },
    /// The connection ended in the middle.
    #[error("the connection to node {node} was lost: {reason}")]
    Lost {
        /// Its name.
        node: String,
        /// What the network says.
        reason: String,
    },
    /// The other side is there but does not want us.
    #[error("node {node} refused: {reason}")]
    Refused {
        /// Its name.
        node: String,
        /// What it says.
        reason: String,
    },
    /// The other side's cluster has removed this node.
    #[error("node {node} says that this node was removed from the cluster, for good")]
    Removed {
        /// Its name.
        node: String,
    },
    /// No common version.
    #[error(transparent)]
    Version(#[from] VersionMismatch),
    /// It runs a build that does not know this yet; nothing was sent.
    #[error(
        "node {node} speaks control protocol {agreed} with this one, and this takes {needs}; upgrade capstan on {node}"
    )]
    TooOld {
        /// Its name.
        node: String,
        /// The version that both speak.
        agreed: u32,
        /// The version that brought the request.
        needs: u32,
    },
    /// It does not know this request; nothing took effect.
    #[error("node {node} does not understand this request; does it run an older capstan? Upgrade it")]
    NotUnderstood {
        /// Its name.
        node: String,
    },
    /// It took too long.
    #[error("node {node} did not answer within {seconds} s; is it overloaded or cut off?")]
    TimedOut {
        /// Its name.
        node: String,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// A frame that is none.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A message that is too large in some part.
    #[error(transparent)]
    Bounds(#[from] OutOfBounds),
}

impl From<CallError> for ManageError {
    fn from(error: CallError) -> Self {
        ManageError::new(502, error.to_string())
    }
}
