//! A node, as its API and its command line use it.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use capstan_cluster::raft::ProposeError;
use capstan_cluster::{Command, Member, Ticket};
use capstan_proto::control::{self, DrainReply, JOIN_ALPN, Join, JoinReply, Request, UnloadReply};
use capstan_proto::generate::{GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::keys::{KeyInfo, KeyScope, NewKey};
use capstan_proto::manage::{ClusterStatus, DeploymentStatus, LoadEvent, LoadRequest, ManageError, TicketReply};
use capstan_proto::pairing::{NearbyNode, PairingReply};
use iroh::endpoint::VarInt;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::control_client::connect;
use crate::membership::{not_made, now_ms};
use crate::node::Node;
use crate::service::Service;
use crate::{agreement, deployments, endpoint, frames, generate, keys, moving, pairing};

/// Longest life of a ticket, in seconds: a month.
const TICKET_TTL_MAX_S: u64 = 31 * 24 * 3600;
/// How long the inviter may take to answer.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the node that looks after a model may take to end it: its stages have eight seconds, and there is the way.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(20);

impl Node {
    /// The member with this name or key.
    fn member(&self, name: &str) -> Result<Member, ManageError> {
        self.shared.membership.find(name).ok_or_else(|| {
            let name: String = name.chars().take(100).collect();
            ManageError::new(404, format!("there is no node {name:?} in this cluster; `capstan nodes` lists them"))
        })
    }
}

/// How long another coordinator may take to load its models elsewhere: shards may have to travel.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3600);

#[async_trait]
impl Service for Node {
    async fn status(&self) -> ClusterStatus {
        self.shared.cluster_status()
    }

    async fn generate(&self, request: GenerateRequest) -> Result<mpsc::Receiver<GenerateEvent>, RequestError> {
        generate::generate(&self.shared, request).await
    }

    async fn load(&self, request: LoadRequest) -> Result<mpsc::Receiver<LoadEvent>, ManageError> {
        deployments::load(&self.shared, request).await
    }

    async fn unload(&self, name: String) -> Result<(), ManageError> {
        let shared = &self.shared;
        if let Some(own) = shared.deployments.list().into_iter().find(|d| d.name == name) {
            return shared.deployments.unload(own.id).await;
        }
        let all = shared.all_deployments();
        let Some(found) = all.iter().find(|d| d.name == name) else {
            let mut names: Vec<_> = all.into_iter().map(|d| d.name).collect();
            names.sort();
            let have =
                if names.is_empty() { "no model is loaded".into() } else { format!("loaded are {}", names.join(", ")) };
            return Err(ManageError::new(
                404,
                format!("there is no model {:?}; {have}", name.chars().take(100).collect::<String>()),
            ));
        };
        let placed = shared.membership.state().and_then(|s| s.placed(found.id).map(|p| p.epoch));
        if let Some(epoch) = placed.filter(|_| !shared.membership.online(found.coordinator)) {
            // Nobody looks after it now. Whoever does later reads in the log that it is no more.
            let withdraw = Command::Withdraw { deployment: found.id, previous: epoch };
            return shared.membership.propose(withdraw).await.map(|_| ()).map_err(not_made);
        }
        let request = Request::Unload { deployment: found.id };
        let UnloadReply(trouble) = shared.client.call(found.coordinator, &request, UNLOAD_TIMEOUT).await?;
        trouble.map_or(Ok(()), |message| Err(ManageError::new(502, message)))
    }

    async fn ticket(&self, ttl_s: u64, reusable: bool) -> Result<TicketReply, ManageError> {
        if ttl_s == 0 || ttl_s > TICKET_TTL_MAX_S {
            return Err(ManageError::new(400, format!("a ticket lives 1 to {TICKET_TTL_MAX_S} seconds, not {ttl_s}")));
        }
        let addrs = endpoint::addrs(&self.shared.endpoint);
        let ticket = self.shared.membership.issue(ttl_s, reusable, addrs).await.map_err(not_made)?;
        Ok(TicketReply { ticket: ticket.to_string(), expires_unix_s: ticket.expires_unix_s, reusable })
    }

    async fn join(&self, ticket: String) -> Result<ClusterStatus, ManageError> {
        let shared = &self.shared;
        let ticket: Ticket = ticket.parse().map_err(|e| ManageError::new(400, format!("{e}")))?;
        let _moving = shared.moving.lock().await;
        if ticket.cluster == shared.membership.cluster() {
            let message = "this node is a member of that cluster already; use the ticket on another machine";
            return Err(ManageError::new(409, message));
        }
        if !self.is_alone() {
            let message = "this node is in a cluster with others; `capstan leave` it first, then join";
            return Err(ManageError::new(409, message));
        }
        if !shared.deployments.is_empty() {
            return Err(ManageError::new(409, "this node serves models; `capstan unload` them first, then join"));
        }
        let inviter = "that issued the ticket";
        let speaks = &shared.config.speaks;
        let (connection, _) =
            connect(&shared.endpoint, speaks, ticket.inviter, inviter, &ticket.addrs, JOIN_ALPN).await?;
        let ask = async {
            let (mut send, mut recv) =
                connection.open_bi().await.map_err(|e| frames::FrameError::Stream(e.to_string()))?;
            let join = Join {
                cluster: ticket.cluster,
                secret: ticket.secret,
                name: self.name(),
                addrs: endpoint::addrs(&shared.endpoint),
                version: shared.build.into(),
                attempt: now_ms(),
            };
            frames::write(&mut send, &join, control::JOIN_REQUEST_BYTES_MAX).await?;
            send.finish().ok();
            frames::expect::<JoinReply>(&mut recv, control::JOIN_BYTES_MAX).await
        };
        let lost = |why: String| ManageError::new(502, format!("the node {inviter} did not answer: {why}; try again"));
        let reply = match timeout(JOIN_TIMEOUT, ask).await {
            Ok(reply) => reply.map_err(|e| lost(e.to_string()))?,
            Err(_) => return Err(lost(format!("nothing came within {} s", JOIN_TIMEOUT.as_secs()))),
        };
        connection.close(VarInt::from_u32(0), b"done");
        match reply {
            JoinReply::Refused { status, message } => {
                // Only what HTTP has a meaning for; a peer does not choose our status freely.
                let status = if matches!(status, 400 | 409 | 410 | 503) { status } else { 502 };
                Err(ManageError::new(status, message))
            }
            JoinReply::Welcome { cluster, life, members } => {
                let us = members.iter().any(|m| m.id == shared.id);
                if cluster != ticket.cluster || !us || members.iter().any(|m| m.check().is_err()) {
                    return Err(ManageError::new(
                        502,
                        "the node that issued the ticket answered nonsense; update capstan there",
                    ));
                }
                let old = shared.membership.enter(cluster, life, members);
                agreement::go_over(shared, old).await.map_err(|e| ManageError::new(500, e.to_string()))?;
                shared.members_changed();
                // Whoever asks now for the status sees the others.
                shared.meet_all().await;
                tracing::info!(name = self.name(), "this node has joined a cluster");
                Ok(shared.cluster_status())
            }
        }
    }

    async fn open_pairing(&self, ttl_s: u64) -> Result<PairingReply, ManageError> {
        pairing::open(&self.shared, ttl_s).await
    }

    async fn pair(&self, code: String, at: Option<SocketAddr>) -> Result<ClusterStatus, ManageError> {
        // Asked before the code is used up, and once more when the ticket is.
        if !self.is_alone() || !self.shared.deployments.is_empty() {
            let message = "this node is in a cluster with others, or serves models; `capstan leave` or `capstan \
                           unload` first, then join";
            return Err(ManageError::new(409, message));
        }
        let ticket = pairing::ticket(&self.shared, &code, at).await?;
        self.join(ticket.to_string()).await
    }

    async fn nearby(&self) -> Result<Vec<NearbyNode>, ManageError> {
        pairing::list(&self.shared).await
    }

    async fn keys(&self) -> Result<Vec<KeyInfo>, ManageError> {
        Ok(self.shared.keys.list())
    }

    async fn add_key(&self, name: String, scope: KeyScope) -> Result<NewKey, ManageError> {
        let made = self.shared.keys.add(&name, scope)?;
        keys::tell_all(&self.shared).await;
        tracing::info!(name, scope = scope.word(), "an API key was made");
        Ok(made)
    }

    async fn revoke_key(&self, name: String) -> Result<usize, ManageError> {
        let revoked = self.shared.keys.revoke(&name)?;
        keys::tell_all(&self.shared).await;
        tracing::info!(name, "an API key was revoked");
        Ok(revoked)
    }

    fn check_key(&self, shown: &str) -> Option<(String, KeyScope)> {
        self.shared.keys.check(shown)
    }

    async fn leave(&self) -> Result<(), ManageError> {
        let shared = &self.shared;
        let _moving = shared.moving.lock().await;
        if self.is_alone() {
            return Err(ManageError::new(409, "this node is alone in its cluster; there is nothing to leave"));
        }
        shared.deployments.unload_all().await;
        match shared.membership.say_goodbye().await {
            Ok(()) => {}
            Err(error @ ProposeError::Refused(_)) => return Err(not_made(error)),
            // Whoever wants to go is not held back by those who do not answer.
            Err(error) => tracing::warn!(
                %error,
                "the cluster could not be told that this node leaves; remove it there with `capstan node remove`"
            ),
        }
        agreement::be_alone(shared).await.map_err(|e| ManageError::new(500, e.to_string()))?;
        tracing::info!("this node has left its cluster");
        Ok(())
    }

    async fn remove_node(&self, name: String) -> Result<ClusterStatus, ManageError> {
        let shared = &self.shared;
        let member = self.member(&name)?;
        if member.id == shared.id {
            let message = "a node cannot remove itself; use `capstan leave`, or remove it from another node";
            return Err(ManageError::new(409, message));
        }
        shared.membership.remove(member.id).await.map_err(not_made)?;
        shared.members_changed();
        tracing::info!(node = member.name, key = %member.id.short(), "a node was removed for good");
        Ok(shared.cluster_status())
    }

    async fn drain_node(&self, name: String) -> Result<ClusterStatus, ManageError> {
        let shared = &self.shared;
        let member = self.member(&name)?;
        let mut trouble = moving::away_from(shared, member.id).await;
        let on_it = |d: &&DeploymentStatus| d.stages.iter().any(|s| s.node == member.id);
        let others: Vec<_> = shared.all_deployments().into_iter().filter(|d| d.coordinator != shared.id).collect();
        let coordinators: BTreeSet<_> = others.iter().filter(on_it).map(|d| d.coordinator).collect();
        for coordinator in coordinators {
            let request = Request::Drain { node: member.id };
            match shared.client.call(coordinator, &request, DRAIN_TIMEOUT).await {
                Ok(DrainReply(more)) => trouble.extend(more),
                Err(error) => trouble.push(error.to_string()),
            }
        }
        if trouble.is_empty() {
            Ok(shared.cluster_status())
        } else {
            Err(ManageError::new(409, format!("node {} still has stages: {}", member.name, trouble.join("; "))))
        }
    }

    async fn stop(&self) {
        self.drain().await;
        self.shut_down().await;
    }

    async fn stop_now(&self) {
        self.shared.hurry.cancel();
        self.shut_down().await;
    }
}
