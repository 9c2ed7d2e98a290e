//! A pipeline of real compute processes without daemons: what the exactness tests compare.
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use capstan_compute::host::{self, ChildReceiver, ChildSender, SpawnOptions};
use capstan_gguf::Model;
use capstan_proto::child::{ChildStats, FromChild, PeerAddr, Scheduling, StageSpec, ToChild, Wiring};
use capstan_proto::data::Rollback;
use capstan_proto::generate::{FinishReason, GenerateEvent, GenerateRequest, Usage};
use capstan_proto::{DeploymentId, Epoch, LayerRange, RequestId};
use tempfile::TempDir;

/// What may differ between two pipelines that are compared.
#[derive(Clone, Debug)]
pub struct Options {
    pub ctx: u32,
    pub slots: u32,
    pub ubatch: u32,
    /// With 1 an answer's bits depend on nothing but the request.
    pub decode_batch: u32,
    /// Guesses under way; none is one a stage, as in a deployment.
    pub speculation_depth: Option<u16>,
    pub draft: Option<PathBuf>,
    pub prefix_cache: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            ctx: 512,
            slots: 2,
            ubatch: 512,
            decode_batch: 1,
            speculation_depth: None,
            draft: None,
            prefix_cache: true,
        }
    }
}

impl Options {
    /// The same without guesses.
    pub fn without_guesses(&self) -> Self {
        Self { speculation_depth: Some(0), ..self.clone() }
    }

    fn scheduling(&self, model: &Model, stages: u16) -> Scheduling {
        let depth = self.speculation_depth.unwrap_or(stages);
        Scheduling {
            speculation_depth: if stages == 1 || model.rollback() == Rollback::None { 0 } else { depth },
            draft: self.draft.clone(),
            prefix_cache: self.prefix_cache,
            rollback: model.rollback(),
            ..Scheduling::default()
        }
    }
}

struct Stage {
    sender: ChildSender,
    receiver: ChildReceiver,
    addr: PeerAddr,
}

/// Stages in compute processes of their own, wired into a ring.
pub struct Pipeline {
    stages: Vec<Stage>,
    next_request: u64,
    _shards: TempDir,
}

/// A finished answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub tokens: Vec<i32>,
    pub text: String,
    /// Logits of each step, where asked for.
    pub logits: Vec<Vec<f32>>,
    pub finish: Option<FinishReason>,
    pub usage: Usage,
}

/// The command that runs a compute process.
pub fn compute_command() -> Vec<OsString> {
    vec![env!("CARGO_BIN_EXE_capstan").into(), "compute".into()]
}

/// The layer ranges between these cuts.
pub fn windows(cuts: &[u32], n_layers: u32) -> Vec<LayerRange> {
    let starts = [0].into_iter().chain(cuts.iter().copied());
    let ends = cuts.iter().copied().chain([n_layers]);
    starts.zip(ends).map(|(a, b)| LayerRange::new(a, b).expect("cuts ascend")).collect()
}

impl Pipeline {
    /// Cuts the model, starts a process for each window, loads and wires them.
    pub async fn start(path: &Path, cuts: &[u32], options: &Options) -> Self {
        Self::try_start(path, cuts, options).await.unwrap_or_else(|reason| panic!("loading failed: {reason}"))
    }

    /// As [`Pipeline::start`]; an error is what a stage says that cannot load.
    pub async fn try_start(path: &Path, cuts: &[u32], options: &Options) -> Result<Self, String> {
        let model = Model::open(path).expect("the model opens");
        let ranges = windows(cuts, model.n_layers());
        let shards = tempfile::tempdir().expect("a temporary folder");
        let mut stages = Vec::new();
        for (index, range) in ranges.iter().enumerate() {
            let shard = if ranges.len() == 1 {
                path.to_owned()
            } else {
                assert_eq!(model.window_problem(*range), None, "{range}");
                let shard: PathBuf = shards.path().join(format!("{index}.gguf"));
                model
                    .write_shard(*range, &shard, &mut |_, _| std::ops::ControlFlow::Continue(()))
                    .expect("the shard is written");
                shard
            };
            let spec = StageSpec {
                deployment: DeploymentId(7),
                model_name: "test".into(),
                shard,
                layers: *range,
                stage: index as u16,
                stages: ranges.len() as u16,
                io: model.window_io(*range),
                ctx: options.ctx,
                slots: options.slots,
                ubatch: options.ubatch,
                decode_batch: options.decode_batch,
                scheduling: options.scheduling(&model, ranges.len() as u16),
                threads: Some(1),
                gpu_layers: 0,
                bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
                sparse: false,
            };
            let label = format!("stage {index}");
            let (sender, receiver) =
                host::spawn(SpawnOptions { command: compute_command(), label }).expect("a process starts");
            sender.send(ToChild::Load { spec: Box::new(spec), snapshots: None }).await.expect("the process listens");
            stages.push((sender, receiver));
        }
        let mut loaded = Vec::new();
        for (sender, mut receiver) in stages {
            let addr = loop {
                match receiver.recv().await {
                    Some(FromChild::Loaded { addr, .. }) => break addr,
                    Some(FromChild::Failed { reason }) => return Err(reason),
                    Some(_) => {}
                    None => panic!("the process {}", receiver.exit_reason().await),
                }
            };
            loaded.push(Stage { sender, receiver, addr });
        }
        let mut pipeline = Self { stages: loaded, next_request: 0, _shards: shards };
        pipeline.wire(Epoch(1)).await;
        Ok(pipeline)
    }

    /// Wires all stages under an epoch.
    pub async fn wire(&mut self, epoch: Epoch) {
        let n = self.stages.len();
        let addrs: Vec<PeerAddr> = self.stages.iter().map(|s| s.addr.clone()).collect();
        for (i, stage) in self.stages.iter().enumerate() {
            let (prev, next) = if n == 1 {
                (None, None)
            } else {
                (Some(addrs[(i + n - 1) % n].clone()), Some(addrs[(i + 1) % n].clone()))
            };
            stage.sender.send(ToChild::Connect(Wiring { epoch, prev, next })).await.expect("the process listens");
        }
        for stage in &mut self.stages {
            loop {
                match stage.receiver.recv().await {
                    Some(FromChild::Connected { epoch: got }) if got == epoch => break,
                    Some(FromChild::Lost { epoch: got, reason }) if got == epoch => panic!("not wired: {reason}"),
                    Some(_) => {}
                    None => panic!("the process {}", stage.receiver.exit_reason().await),
                }
            }
        }
    }

    /// Sends a request to the driver.
    pub async fn submit(&mut self, body: GenerateRequest) -> RequestId {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let driver = self.stages.last().expect("a pipeline has stages");
        driver.sender.send(ToChild::Submit { request, body: Box::new(body) }).await.expect("the process listens");
        request
    }

    /// Tells the driver to forget a request.
    pub async fn cancel(&mut self, request: RequestId) {
        let driver = self.stages.last().expect("a pipeline has stages");
        driver.sender.send(ToChild::Cancel { request }).await.expect("the process listens");
    }

    /// The next event of any request.
    pub async fn event(&mut self) -> (RequestId, GenerateEvent) {
        loop {
            if let FromChild::Event { request, event } = self.next().await {
                return (request, *event);
            }
        }
    }

    /// The next counters of the driver; they come when they have changed.
    pub async fn stats(&mut self) -> ChildStats {
        loop {
            if let FromChild::Stats(stats) = self.next().await {
                return stats;
            }
        }
    }

    async fn next(&mut self) -> FromChild {
        let driver = self.stages.last_mut().expect("a pipeline has stages");
        match driver.receiver.recv().await {
            Some(FromChild::Lost { reason, .. }) => panic!("the epoch was lost: {reason}"),
            Some(message) => message,
            None => panic!("the process {}", driver.receiver.exit_reason().await),
        }
    }

    /// The processes, the first stage first.
    pub fn pids(&self) -> Vec<u32> {
        self.stages.iter().map(|s| s.sender.pid()).collect()
    }

    /// Answers of several requests that run at the same time, in the order given.
    pub async fn answer_all(&mut self, bodies: Vec<GenerateRequest>) -> Vec<Answer> {
        let mut ids = Vec::new();
        for body in bodies {
            ids.push(self.submit(body).await);
        }
        let mut answers: Vec<Answer> = ids.iter().map(|_| Answer::default()).collect();
        while answers.iter().any(|a| a.finish.is_none()) {
            let (request, event) = self.event().await;
            let answer = &mut answers[ids.iter().position(|id| *id == request).expect("a known request")];
            match event {
                GenerateEvent::Started { .. } | GenerateEvent::Paused { .. } => {}
                GenerateEvent::Token { token, text, logits, .. } => {
                    answer.tokens.push(token);
                    answer.text.push_str(&text);
                    answer.logits.extend(logits);
                }
                GenerateEvent::Finished { reason, text, usage } => {
                    answer.text.push_str(&text);
                    answer.finish = Some(reason);
                    answer.usage = usage;
                }
                GenerateEvent::Failed(error) => panic!("the request failed: {error}"),
            }
        }
        answers
    }

    /// The answer of one request.
    pub async fn answer(&mut self, body: GenerateRequest) -> Answer {
        self.answer_all(vec![body]).await.remove(0)
    }
}

/// The first place where two answers differ.
pub fn difference(whole: &Answer, split: &Answer) -> Option<String> {
    if whole.tokens != split.tokens && whole.logits.is_empty() {
        return Some(format!("tokens {:?} and {:?}", whole.tokens, split.tokens));
    }
    if whole.logits.len() != split.logits.len() {
        return Some(format!("{} and {} steps", whole.logits.len(), split.logits.len()));
    }
    for (step, (a, b)) in whole.logits.iter().zip(&split.logits).enumerate() {
        if !a.iter().all(|x| x.is_finite()) {
            return Some(format!("step {step} has logits that are no numbers"));
        }
        let differs = a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        if a.len() != b.len() || differs > 0 {
            let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            return Some(format!("step {step}: {differs} of {} logits differ, by at most {worst}", a.len()));
        }
    }
    (whole.tokens != split.tokens).then(|| format!("tokens {:?} and {:?}", whole.tokens, split.tokens))
}

/// Fails with the first place where two answers differ.
pub fn assert_same_bits(whole: &Answer, split: &Answer, what: &str) {
    if let Some(difference) = difference(whole, split) {
        panic!("{what}: {difference}");
    }
}
