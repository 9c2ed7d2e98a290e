//! What the HTTP layer asks of a node, as a trait, so that each side is tested without the other.
use std::net::SocketAddr;

use async_trait::async_trait;
use capstan_proto::generate::{GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::keys::{KeyInfo, KeyScope, NewKey};
use capstan_proto::manage::{ClusterStatus, LoadEvent, LoadRequest, ManageError, TicketReply};
use capstan_proto::pairing::{NearbyNode, PairingReply};
use tokio::sync::mpsc;

use crate::weights::Weights;

/// A node of a cluster, as its API and its command line see it.
#[async_trait]
pub trait Service: Weights {
    /// Members and deployments, as this node knows them. Cheap.
    async fn status(&self) -> ClusterStatus;
    /// Starts an answer, wherever the driver is. Dropping the receiver cancels it and frees its slot.
    async fn generate(&self, request: GenerateRequest) -> Result<mpsc::Receiver<GenerateEvent>, RequestError>;
    /// Starts to load a model from a file of this node. Dropping the receiver does not stop the load.
    async fn load(&self, request: LoadRequest) -> Result<mpsc::Receiver<LoadEvent>, ManageError>;
    /// Stops serving a model, on all its nodes.
    async fn unload(&self, name: String) -> Result<(), ManageError>;
    /// A new ticket that lets another node join.
    async fn ticket(&self, ttl_s: u64, reusable: bool) -> Result<TicketReply, ManageError>;
    /// Joins the cluster of a ticket. Only a node that is alone and serves nothing may.
    async fn join(&self, ticket: String) -> Result<ClusterStatus, ManageError>;
    /// Opens a pairing: one other machine may join by a short code.
    async fn open_pairing(&self, ttl_s: u64) -> Result<PairingReply, ManageError>;
    /// Joins the cluster of a pairing code, shown by the machine at this address, or by one that is found.
    async fn pair(&self, code: String, at: Option<SocketAddr>) -> Result<ClusterStatus, ManageError>;
    /// Machines of the network that wait to be joined.
    async fn nearby(&self) -> Result<Vec<NearbyNode>, ManageError>;
    /// The API keys of the cluster, revoked ones included.
    async fn keys(&self) -> Result<Vec<KeyInfo>, ManageError>;
    /// Makes an API key that is good at every node.
    async fn add_key(&self, name: String, scope: KeyScope) -> Result<NewKey, ManageError>;
    /// Revokes the API keys of this name for ever, and says how many those were.
    async fn revoke_key(&self, name: String) -> Result<usize, ManageError>;
    /// Name and scope of the good API key that this text is; none when it is none.
    fn check_key(&self, shown: &str) -> Option<(String, KeyScope)>;
    /// Leaves the cluster; the node is alone in a new one afterwards.
    async fn leave(&self) -> Result<(), ManageError>;
    /// Takes another node out of the cluster for good: its key is refused everywhere from now on.
    async fn remove_node(&self, name: String) -> Result<ClusterStatus, ManageError>;
    /// Loads what has a stage on this node anew elsewhere. Returns when that is done.
    async fn drain_node(&self, name: String) -> Result<ClusterStatus, ManageError>;
    /// Stops the daemon: answers in progress are let finish for a while, then its children end and its peers are told.
    /// Returns when that is done.
    async fn stop(&self);
    /// The same without waiting for answers; a stop that waits for them waits no longer.
    async fn stop_now(&self);
}
