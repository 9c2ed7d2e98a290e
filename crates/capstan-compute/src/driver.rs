//! The compute loop of the last stage: it schedules, feeds the first stage, computes its own layers and samples.
//!
//! ```text
//! requests ─▶ engine ─▶ micro-batch ─▶ embedding rows ─▶ stage 0 ─▶ … ─▶ own layers ─▶ logits ─▶ sampler ─▶ events
//!               ▲                                                                                   │
//!               └──────────────────────────────── tokens ──────────────────────────────────────────┘
//! ```
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use capstan_engine::{
    Engine, EngineConfig, PlannedBatch, Saved, SequenceStats, Stage, StageOutput, SubmitError, TokenOutcome,
};
use capstan_llama::{LlamaStage, Vocab};
use capstan_proto::child::{FromChild, StageSpec};
use capstan_proto::data::{BatchFrame, DropNotice, MicroBatch, Payload};
use capstan_proto::generate::{ErrorKind, FinishReason, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::{Epoch, RequestId};
use tokio::sync::mpsc;

use crate::answer::Answer;
use crate::counters::Counters;
use crate::draft::{Draft, Progress};
use crate::embed::Embedder;
use crate::prompt::PromptMaker;
use crate::snapshots::Snapshots;
use crate::wire::{Input, Links};

/// An epoch has 2^32 marks of its own: one snapshot a millisecond for seven weeks without a failure, and then they go on
/// into those of the next.
const MARK_BITS: u32 = 32;

/// The epoch in which micro-batches flow.
struct Place {
    epoch: Epoch,
    /// To stage 0; none when this stage is the whole model.
    links: Option<Links>,
    /// Micro-batches under way, in order: when each was sent, and what is to be saved behind it.
    sent: VecDeque<(Instant, Option<Saved>)>,
}

/// What the last stage adds to its layers.
pub(crate) struct Driver {
    stage: LlamaStage,
    vocab: Vocab,
    embedder: Option<Embedder>,
    engine: Engine,
    /// What the engine had counted when the epoch began.
    counted_before: capstan_engine::Counters,
    draft: Option<Draft>,
    snapshots: Snapshots,
    /// Whether every stage keeps them in the next epoch; said anew for each.
    all_keep: bool,
    place: Option<Place>,
    answers: HashMap<RequestId, Answer>,
    events: mpsc::Sender<FromChild>,
    counters: Arc<Counters>,
    ended: mpsc::Sender<RequestId>,
    model_name: String,
    /// Tokens that a slot holds.
    ctx: usize,
}

/// The epoch is lost, for this reason.
struct EpochLost(String);

impl Driver {
    /// Around the loaded last stage.
    pub fn new(
        stage: LlamaStage,
        spec: &StageSpec,
        snapshots: Snapshots,
        events: mpsc::Sender<FromChild>,
        counters: Arc<Counters>,
        ended: mpsc::Sender<RequestId>,
    ) -> Result<(Self, PromptMaker), String> {
        let vocab = stage.model().vocab();
        let gguf = capstan_gguf::Model::open(&spec.shard).map_err(|e| e.to_string())?;
        let prompts = PromptMaker::new(vocab.clone(), gguf.metadata(), spec.ctx)?;
        let embedder = match spec.stages {
            1 => None,
            _ => Some(Embedder::open(&spec.shard, spec.io.embedding_scale)?),
        };
        let draft = match &spec.scheduling.draft {
            Some(path) if spec.scheduling.speculation_depth > 0 => Some(Draft::load(path, &vocab, spec)?),
            _ => None,
        };
        let can_keep = gguf.keeps_snapshots() && stage.model().keeps_snapshots();
        let snapshots = if can_keep { snapshots } else { Snapshots::open(None, spec.stages) };
        let engine =
            Engine::new(EngineConfig { draft: draft.is_some(), ..engine_config(spec) }).map_err(|e| e.to_string())?;
        let driver = Self {
            stage,
            vocab,
            embedder,
            counted_before: engine.counters(),
            engine,
            draft,
            snapshots,
            all_keep: false,
            place: None,
            answers: HashMap::new(),
            events,
            counters,
            ended,
            model_name: spec.model_name.clone(),
            ctx: spec.ctx as usize,
        };
        Ok((driver, prompts))
    }

    /// Serves until [`Input::Stop`] or until nobody sends any more.
    pub fn run(&mut self, inputs: &mut mpsc::Receiver<Input>) {
        // Without a second stage nothing comes back from outside: then work itself keeps the loop going.
        let mut working = false;
        loop {
            let next = if working {
                match inputs.try_recv() {
                    Ok(input) => Some(input),
                    Err(mpsc::error::TryRecvError::Empty) => None,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            } else {
                match inputs.blocking_recv() {
                    Some(input) => Some(input),
                    None => return,
                }
            };
            let outcome = match next {
                Some(Input::Stop) => return,
                Some(input) => self.handle(input),
                None => Ok(()),
            };
            working = match outcome.and_then(|()| self.advance()) {
                Ok(computed) => computed,
                Err(EpochLost(reason)) => {
                    self.give_up(reason);
                    false
                }
            };
            // What is certain goes first, but for a guess so likely that the stages before this one should not rest for it.
            while !working && self.guess(inputs.is_empty()) {
                working = match self.advance() {
                    Ok(computed) => computed || inputs.is_empty(),
                    Err(EpochLost(reason)) => {
                        self.give_up(reason);
                        false
                    }
                };
            }
            self.counters.set_engine(&self.engine.counters(), &self.counted_before);
        }
    }

    /// The epoch is lost by what happened here: the daemon must hear of it.
    fn give_up(&mut self, reason: String) {
        let epoch = self.place.as_ref().map(|p| p.epoch);
        self.lose(&reason);
        if let Some(epoch) = epoch {
            self.send(FromChild::Lost { epoch, reason });
        }
    }

    fn handle(&mut self, input: Input) -> Result<(), EpochLost> {
        match input {
            Input::Stop => {}
            Input::Epoch { epoch, links, done } => {
                self.lose("the stages are being connected anew");
                self.counters.reset();
                self.counted_before = self.engine.counters();
                self.stage.reset(epoch).map_err(|e| EpochLost(e.to_string()))?;
                self.snapshots.reset();
                // Marks of an epoch are its own, and greater than those of the ones before.
                let all_keep = std::mem::take(&mut self.all_keep);
                let keep = all_keep && self.snapshots.are_kept();
                let mark = epoch.0 << MARK_BITS;
                self.engine.handle_epoch(keep, mark, if keep { self.snapshots.kept() } else { Vec::new() });
                self.place = Some(Place { epoch, links, sent: VecDeque::new() });
                // The wiring task may have been replaced meanwhile; the next one sends another epoch.
                done.send(()).ok();
            }
            Input::Batch { frame, permit } => {
                if self.place.as_ref().is_none_or(|p| p.epoch != frame.batch.epoch) {
                    tracing::debug!(epoch = %frame.batch.epoch, "a late micro-batch was dropped");
                    return Ok(());
                }
                self.complete(frame)?;
                drop(permit);
            }
            Input::Lost { epoch, reason } => {
                if self.place.as_ref().is_some_and(|p| p.epoch == epoch) {
                    self.lose(&reason);
                }
            }
            Input::Snapshots(all_keep) => self.all_keep = all_keep,
            Input::Submit { request, body, tokens } => self.submit(request, body, tokens),
            Input::Cancel { request } => {
                self.note_speculation(request);
                self.engine.handle_cancel(request);
                self.end(request, |answer| answer.finish(FinishReason::Cancelled));
            }
        }
        Ok(())
    }

    fn submit(&mut self, request: RequestId, body: Box<GenerateRequest>, prompt: Vec<i32>) {
        match self.admit(request, body, prompt) {
            Ok(answer) => {
                self.answers.insert(request, answer);
            }
            Err(event) => self.send_last(request, event),
        }
    }

    /// Hands a request to the engine; else the event that ends it.
    fn admit(
        &mut self,
        request: RequestId,
        body: Box<GenerateRequest>,
        prompt: Vec<i32>,
    ) -> Result<Answer, GenerateEvent> {
        if self.place.is_none() {
            return Err(GenerateEvent::Failed(RequestError::new(
                ErrorKind::Unavailable,
                format!("the stages of {:?} are being connected; try again in a moment", self.model_name),
            )));
        }
        let answer = Answer::new(body, &prompt, &self.vocab).map_err(GenerateEvent::Failed)?;
        let mut tokens = prompt;
        tokens.extend_from_slice(answer.resumed());
        let full = !answer.resumed().is_empty() && tokens.len() >= self.ctx;
        if let Some(reason) = answer.ended().or(full.then_some(FinishReason::Length)) {
            return Err(answer.finish(reason));
        }
        self.engine
            .handle_resume(request, tokens, answer.resumed().len() as u32, answer.tokens_left())
            .map_err(|e| GenerateEvent::Failed(submit_error(e)))?;
        Ok(answer)
    }

    /// Sends what can be sent. A stage that is the whole model computes one micro-batch and leaves the rest to the next
    /// round, so that new requests join between two; then this is true.
    fn advance(&mut self) -> Result<bool, EpochLost> {
        loop {
            let Some(place) = &self.place else { return Ok(false) };
            let epoch = place.epoch;
            self.send_drops(epoch)?;
            let Some(mut planned) = self.engine.poll_micro_batch() else { break };
            self.report_started();
            let saved = planned.saved.take();
            let batch = self.fill(planned, epoch)?;
            let Some(place) = &mut self.place else { return Ok(false) };
            place.sent.push_back((Instant::now(), saved));
            match &place.links {
                None => {
                    self.complete(BatchFrame { batch, stage_us: Vec::new() })?;
                    return Ok(true);
                }
                Some(links) => {
                    let frame = batch.encode(&[]).map_err(|e| EpochLost(e.to_string()))?;
                    // A closed queue means that the links broke; the wiring task says so through our own queue.
                    if links.frames.blocking_send(frame.into()).is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        self.report_started();
        Ok(false)
    }

    /// Tells the other stages which steps need not be computed any more.
    fn send_drops(&mut self, epoch: Epoch) -> Result<(), EpochLost> {
        while let Some(steps) = self.engine.poll_drop() {
            let Some(links) = self.place.as_ref().and_then(|p| p.links.as_ref()) else { continue };
            let frame = DropNotice { epoch, steps }.encode().map_err(|e| EpochLost(e.to_string()))?;
            if links.notices.try_send(Bytes::from(frame)).is_err() {
                tracing::debug!("a drop notice found no room and is left out");
            }
        }
        Ok(())
    }

    /// A piece of the draft model's work, if there is any: while nothing waits for the driver, or before that.
    fn guess(&mut self, idle: bool) -> bool {
        let Some(draft) = self.draft.as_mut().filter(|_| self.place.is_some()) else { return false };
        let Some(wanted) = self.engine.wants_guess().filter(|wanted| idle || wanted.first) else { return false };
        match draft.advance(&wanted.tokens) {
            Ok(Progress::Guess(token)) => {
                self.engine.handle_guess(&wanted, token);
                true
            }
            // A long text is read in pieces, between what waits.
            Ok(Progress::More) => idle,
            Ok(Progress::TooLong) => false,
            Err(error) => {
                tracing::warn!(%error, "the draft model failed and is not used any more");
                self.draft = None;
                self.engine.handle_draft_gone();
                false
            }
        }
    }

    fn report_started(&mut self) {
        while let Some(started) = self.engine.poll_started() {
            if let Some(answer) = self.answers.get_mut(&started.id) {
                let event = answer.started(started.cached);
                self.send_event(started.id, event);
            }
        }
    }

    fn fill(&self, mut planned: PlannedBatch, epoch: Epoch) -> Result<MicroBatch, EpochLost> {
        let payload = match &self.embedder {
            None => Payload::Tokens(std::mem::take(&mut planned.tokens)),
            Some(embedder) => Payload::Hidden(embedder.rows(&planned.tokens).map_err(EpochLost)?),
        };
        Ok(planned.into_micro_batch(epoch, payload))
    }

    /// Computes this stage's layers on a micro-batch and samples from what comes out.
    fn complete(&mut self, frame: BatchFrame) -> Result<(), EpochLost> {
        let lost = |e: &dyn std::fmt::Display| EpochLost(e.to_string());
        let BatchFrame { mut batch, mut stage_us } = frame;
        let step = batch.step;
        if self.engine.is_void(step) {
            batch = batch.without_rows();
        }
        self.snapshots.before(&mut self.stage, &mut batch);
        let started = Instant::now();
        let logits = match self.stage.forward(&batch).map_err(|e| lost(&e))? {
            StageOutput::Logits(logits) => logits,
            StageOutput::Hidden(_) => return Err(EpochLost("the last stage gave no logits".into())),
        };
        let busy = started.elapsed();
        self.counters.add(batch.rows.len(), busy);
        stage_us.push(if batch.rows.is_empty() { 0 } else { micros(busy) });
        let sent = self.place.as_mut().and_then(|p| p.sent.pop_front());
        if let Some((sent, _)) = &sent {
            self.engine.handle_times(step, &stage_us, micros(sent.elapsed()));
        }
        if self.engine.restores(step) {
            self.engine.handle_restored(&Snapshots::restored(&batch));
        }
        let completed = self.engine.handle_completed(step).map_err(|e| lost(&e))?;
        let n_vocab = self.vocab.n_tokens();
        if logits.len() != completed.output_rows * n_vocab {
            return Err(EpochLost("the last stage gave another number of logits than was asked for".into()));
        }
        // Every output is handed in before the next micro-batch is planned, so that a group stays together.
        for (request, row) in completed.outputs {
            self.sample(request, &logits[row * n_vocab..(row + 1) * n_vocab]);
        }
        // Readers have their tokens by now.
        self.snapshots.after(&mut self.stage, &batch, sent.and_then(|(_, saved)| saved).as_ref());
        Ok(())
    }

    fn sample(&mut self, request: RequestId, logits: &[f32]) {
        let Some(answer) = self.answers.get_mut(&request) else {
            self.engine.handle_finish(request);
            return;
        };
        let step = match answer.step(logits, &self.vocab) {
            Ok(step) => step,
            Err(error) => {
                self.engine.handle_finish(request);
                self.end(request, |_| GenerateEvent::Failed(error));
                return;
            }
        };
        if let Some(event) = step.event {
            self.send_event(request, event);
        }
        if step.stopped {
            self.note_speculation(request);
            self.engine.handle_finish(request);
            self.end(request, |answer| answer.finish(FinishReason::Stop));
        } else if let Some(token) = step.token {
            let (stats, before) = (self.engine.sequence_stats(request), self.engine.counters().accepted);
            if let TokenOutcome::Finished(_) = self.engine.handle_token(request, token) {
                // The engine may have forgotten the sequence already, and its last token may have been guessed.
                let right = (self.engine.counters().accepted - before) as u32;
                let stats = stats.map(|s| SequenceStats { accepted: s.accepted + right, ..s });
                self.end(request, |mut answer| {
                    answer.speculated(stats.unwrap_or_default());
                    answer.finish(FinishReason::Length)
                });
            }
        }
    }

    /// The epoch cannot go on: every request that runs or waits ends, and nothing is sent until the next epoch.
    fn lose(&mut self, reason: &str) {
        if self.place.take().is_some() {
            tracing::warn!(%reason, "the epoch is lost");
        }
        self.engine.handle_lost();
        let requests: Vec<RequestId> = self.answers.keys().copied().collect();
        for request in requests {
            self.engine.handle_cancel(request);
            let message = format!(
                "a stage of {:?} was lost ({reason}); it is being started again, try again in a moment",
                self.model_name
            );
            self.end(request, |_| GenerateEvent::Failed(RequestError::new(ErrorKind::StageLost, message)));
        }
    }

    /// Notes in a request's usage what speculation did for it, while the engine still knows.
    fn note_speculation(&mut self, request: RequestId) {
        let stats = self.engine.sequence_stats(request);
        if let (Some(answer), Some(stats)) = (self.answers.get_mut(&request), stats) {
            answer.speculated(stats);
        }
    }

    fn end(&mut self, request: RequestId, event: impl FnOnce(Answer) -> GenerateEvent) {
        if let Some(answer) = self.answers.remove(&request) {
            self.send_last(request, event(answer));
        }
    }

    fn send_last(&self, request: RequestId, event: GenerateEvent) {
        self.send_event(request, event);
        self.ended.blocking_send(request).ok();
    }

    fn send_event(&self, request: RequestId, event: GenerateEvent) {
        self.send(FromChild::Event { request, event: Box::new(event) });
    }

    fn send(&self, event: FromChild) {
        // A closed queue means that the daemon is gone and the process is ending.
        self.events.blocking_send(event).ok();
    }
}

/// What the scheduler may do, from what the child is told.
fn engine_config(spec: &StageSpec) -> EngineConfig {
    let scheduling = &spec.scheduling;
    EngineConfig {
        decode_batch: spec.decode_batch,
        // Who decodes every sequence by itself wants the same bits whatever else goes on.
        fixed_shapes: spec.decode_batch == 1,
        decode_slowdown_percent: scheduling.decode_slowdown_percent,
        prefix_cache: scheduling.prefix_cache,
        speculation_depth: scheduling.speculation_depth,
        rollback: scheduling.rollback,
        spares: scheduling.spares(),
        ..EngineConfig::new(spec.stages, spec.slots, spec.ctx, spec.ubatch)
    }
}

fn micros(time: std::time::Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

fn submit_error(error: SubmitError) -> RequestError {
    let kind = match error {
        SubmitError::ContextExceeded { .. } => ErrorKind::ContextExceeded,
        SubmitError::Busy { .. } => ErrorKind::Busy,
        SubmitError::Empty | SubmitError::NoTokens => ErrorKind::BadRequest,
        SubmitError::Duplicate(_) => ErrorKind::Internal,
    };
    RequestError::new(kind, error.to_string())
}
