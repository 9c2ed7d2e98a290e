//! A node that answers from a script: the model's name says what happens.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use capstan_api::door::{DoorListener, Reach};
use capstan_api::{ApiOptions, router, serve};
use capstan_cluster::ApiKeys;
use capstan_node::service::Service;
use capstan_proto::generate::{
    Alternative, ErrorKind, FinishReason, GenerateEvent, GenerateRequest, RequestError, TokenLogprob, Usage,
};
use capstan_proto::keys::{KeyInfo, KeyScope, NewKey};
use capstan_proto::manage::{
    ClusterStatus, DeploymentStatus, Health, LoadEvent, LoadRequest, ManageError, NodeStatus, TicketReply,
};
use capstan_proto::pairing::{NearbyNode, PairingReply};
use capstan_proto::weights::{ModelOutcome, ModelStatus, NodeDisk, PullEvent, PullRequest};
use capstan_proto::{ClusterId, DeploymentId, Epoch, NodeId};
use tokio::sync::{mpsc, oneshot};

/// The admin token of the fake node.
pub const TOKEN: &str = "0123abcd";
/// What can be asked for.
pub const MODELS: [&str; 9] = ["tiny", "org/slash", "endless", "lost", "busy", "long", "broken", "away", "silent"];

/// The scripted node.
#[derive(Default)]
pub struct Fake {
    /// Requests as they came.
    pub requests: Mutex<Vec<GenerateRequest>>,
    /// API keys, as a node keeps them; the number of one is its random bytes.
    pub keys: Mutex<(u8, ApiKeys)>,
    /// Fired when the receiver of an endless answer is dropped.
    pub dropped: Mutex<Option<oneshot::Sender<()>>>,
    /// Fired when a load has sent its last event, whoever listens.
    pub loaded: Mutex<Option<oneshot::Sender<()>>>,
}

fn alternative(token: i32, text: &str, logprob: f32) -> Alternative {
    Alternative { token, bytes: text.as_bytes().to_vec(), logprob }
}

fn token(token: i32, text: &str, logprobs: bool) -> GenerateEvent {
    let chosen = alternative(token, text, -0.5);
    let top = vec![alternative(token, text, -0.5), alternative(99, "x", f32::NEG_INFINITY)];
    let logprob = logprobs.then_some(TokenLogprob { chosen, top });
    GenerateEvent::Token { token, text: text.into(), logprob, logits: None }
}

/// The events of an answer that goes well.
pub fn script(logprobs: bool) -> Vec<GenerateEvent> {
    let usage = Usage {
        prompt_tokens: 7,
        cached_tokens: 2,
        completion_tokens: 3,
        drafted_tokens: 4,
        accepted_tokens: 1,
        ..Usage::default()
    };
    vec![
        GenerateEvent::Started { prompt: vec![1; 7] },
        token(1, "Hé", logprobs),
        token(2, "", logprobs),
        token(3, "llo", logprobs),
        GenerateEvent::Finished { reason: FinishReason::Stop, text: "!".into(), usage },
    ]
}

fn failed(kind: ErrorKind) -> GenerateEvent {
    GenerateEvent::Failed(RequestError::new(kind, format!("{kind:?} happened; do something")))
}

fn deployment(i: usize, name: &str) -> DeploymentStatus {
    DeploymentStatus {
        id: DeploymentId(i as u64),
        name: name.into(),
        model_hash: String::new(),
        architecture: "llama".into(),
        layers: 1,
        epoch: Epoch(1),
        health: Health::Ready,
        detail: String::new(),
        coordinator: NodeId([1; 32]),
        ctx: 64,
        slots: 1,
        stages: Vec::new(),
        created_unix_s: 1_700_000_000,
    }
}

#[async_trait]
impl Service for Fake {
    async fn status(&self) -> ClusterStatus {
        ClusterStatus {
            cluster: ClusterId([2; 32]),
            version: "1.2.3".into(),
            nodes: Vec::<NodeStatus>::new(),
            deployments: MODELS.iter().enumerate().map(|(i, m)| deployment(i, m)).collect(),
            agreement: String::new(),
            warnings: vec![],
        }
    }

    async fn generate(&self, request: GenerateRequest) -> Result<mpsc::Receiver<GenerateEvent>, RequestError> {
        self.requests.lock().unwrap().push(request.clone());
        let mut events = script(request.logprobs.is_some());
        let (sender, receiver) = mpsc::channel(8);
        match request.model.as_str() {
            "busy" => return Err(RequestError::new(ErrorKind::Busy, "the queue is full; come back later")),
            "long" => events = vec![failed(ErrorKind::ContextExceeded)],
            "broken" => events.truncate(2),
            "away" => return Err(RequestError::new(ErrorKind::Unavailable, "the model is loading; come back later")),
            "lost" => {
                events.truncate(2);
                events.push(failed(ErrorKind::StageLost));
            }
            "silent" => events.clear(),
            _ => {}
        }
        let endless = matches!(request.model.as_str(), "endless" | "silent");
        if request.model == "endless" {
            events.truncate(2);
        }
        for event in events {
            sender.try_send(event).unwrap();
        }
        if endless {
            let dropped = self.dropped.lock().unwrap().take();
            tokio::spawn(async move {
                sender.closed().await;
                dropped.map(|d| d.send(()))
            });
        }
        Ok(receiver)
    }

    async fn load(&self, request: LoadRequest) -> Result<mpsc::Receiver<LoadEvent>, ManageError> {
        if request.path.is_empty() {
            return Err(ManageError::new(400, "the path is empty; name a GGUF"));
        }
        let (sender, receiver) = mpsc::channel(1);
        let loaded = self.loaded.lock().unwrap().take();
        tokio::spawn(async move {
            for stage in 0..100 {
                let _ = sender.send(LoadEvent::Loaded { stage }).await;
            }
            let _ = sender.send(LoadEvent::Ready { deployment: deployment(0, "tiny") }).await;
            loaded.map(|l| l.send(()))
        });
        Ok(receiver)
    }

    async fn unload(&self, name: String) -> Result<(), ManageError> {
        Err(ManageError::new(404, format!("{name} is not loaded; nothing was changed")))
    }

    async fn remove_node(&self, name: String) -> Result<ClusterStatus, ManageError> {
        Err(ManageError::new(404, format!("there is no node {name}; nothing was changed")))
    }

    async fn drain_node(&self, name: String) -> Result<ClusterStatus, ManageError> {
        Err(ManageError::new(404, format!("there is no node {name}; nothing was changed")))
    }

    async fn ticket(&self, ttl_s: u64, reusable: bool) -> Result<TicketReply, ManageError> {
        Ok(TicketReply { ticket: "t".into(), expires_unix_s: ttl_s, reusable })
    }

    async fn join(&self, _: String) -> Result<ClusterStatus, ManageError> {
        Err(ManageError::new(9999, "a status that is none"))
    }

    async fn open_pairing(&self, ttl_s: u64) -> Result<PairingReply, ManageError> {
        Ok(PairingReply { code: "42-ABCDEF".into(), expires_unix_s: ttl_s, at: vec![], mdns: false })
    }

    async fn pair(&self, _: String, _: Option<SocketAddr>) -> Result<ClusterStatus, ManageError> {
        Err(ManageError::new(403, "the code is wrong; try again"))
    }

    async fn nearby(&self) -> Result<Vec<NearbyNode>, ManageError> {
        Ok(vec![])
    }

    async fn keys(&self) -> Result<Vec<KeyInfo>, ManageError> {
        Ok(self.keys.lock().unwrap().1.entries().map(KeyInfo::from).collect())
    }

    async fn add_key(&self, name: String, scope: KeyScope) -> Result<NewKey, ManageError> {
        let (number, keys) = &mut *self.keys.lock().unwrap();
        *number += 1;
        let (key, entry) =
            keys.add(&name, scope, &[*number; 32], 1).map_err(|e| ManageError::new(409, e.to_string()))?;
        Ok(NewKey { key, info: KeyInfo::from(&entry) })
    }

    async fn revoke_key(&self, name: String) -> Result<usize, ManageError> {
        self.keys.lock().unwrap().1.revoke(&name, 2).map_err(|e| ManageError::new(404, e.to_string()))
    }

    fn check_key(&self, shown: &str) -> Option<(String, KeyScope)> {
        self.keys.lock().unwrap().1.check(shown).map(|e| (e.name.clone(), e.scope))
    }

    async fn leave(&self) -> Result<(), ManageError> {
        Ok(())
    }

    async fn stop(&self) {}

    async fn stop_now(&self) {}
}

#[async_trait]
impl capstan_node::Weights for Fake {
    async fn pull(&self, request: PullRequest) -> Result<mpsc::Receiver<PullEvent>, ManageError> {
        if request.source.is_empty() {
            return Err(ManageError::new(400, "the source is empty; name a model"));
        }
        let (sender, receiver) = mpsc::channel(2);
        sender.try_send(PullEvent::Verifying { done_bytes: 1, total_bytes: 2 }).unwrap();
        sender.try_send(PullEvent::Failed { message: "the disk is full".into() }).unwrap();
        Ok(receiver)
    }

    async fn models(&self) -> Vec<ModelStatus> {
        Vec::new()
    }

    async fn verify_model(&self, name: String) -> Result<ModelOutcome, ManageError> {
        Ok(ModelOutcome { name, done: vec!["read".into()], trouble: vec![] })
    }

    async fn remove_model(&self, name: String) -> Result<ModelOutcome, ManageError> {
        Err(ManageError::new(404, format!("{name} is not in the catalogue")))
    }

    async fn export_model(&self, name: String, path: PathBuf) -> Result<ModelOutcome, ManageError> {
        Ok(ModelOutcome { name, done: vec![path.display().to_string()], trouble: vec![] })
    }

    async fn disk(&self) -> Vec<NodeDisk> {
        Vec::new()
    }
}

/// A served fake node; it stops when this is dropped.
pub struct Server {
    /// The script.
    pub fake: Arc<Fake>,
    /// `http://127.0.0.1:PORT`.
    pub base: String,
    /// Ends the server.
    pub stop: Option<oneshot::Sender<()>>,
    /// Ends with the server.
    pub task: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
}

impl Server {
    /// Serves this machine's door on a free port of loopback.
    pub async fn start() -> Self {
        Self::open(Reach::Local, ApiOptions::new(TOKEN)).await
    }

    /// Serves a door on a free port of loopback.
    pub async fn open(reach: Reach, options: ApiOptions) -> Self {
        let fake = Arc::new(Fake::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let routes = router(fake.clone(), options);
        let task = tokio::spawn(serve(DoorListener::new(listener, reach), routes, async move {
            let _ = stopped.await;
        }));
        Self { fake, base: format!("http://{addr}"), stop: Some(stop), task: Some(task) }
    }
}
