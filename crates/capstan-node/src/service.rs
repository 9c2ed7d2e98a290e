//! What the HTTP layer asks of a node, as a trait, so that each side is tested without the other.
use async_trait::async_trait;
use capstan_proto::generate::{GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::manage::{ClusterStatus, LoadEvent, LoadRequest, ManageError, TicketReply};
use tokio::sync::mpsc;

/// A node of a cluster, as its API and its command line see it.
#[async_trait]
pub trait Service: Send + Sync + 'static {
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
    /// Leaves the cluster; the node is alone in a new one afterwards.
    async fn leave(&self) -> Result<(), ManageError>;
    /// Takes another node out of the cluster for good: its key is refused everywhere from now on.
    async fn remove_node(&self, name: String) -> Result<ClusterStatus, ManageError>;
    /// Loads what has a stage on this node anew elsewhere. Returns when that is done.
    async fn drain_node(&self, name: String) -> Result<ClusterStatus, ManageError>;
    /// Stops the daemon: its children end, its peers are told. Returns when that is done.
    async fn stop(&self);
}
