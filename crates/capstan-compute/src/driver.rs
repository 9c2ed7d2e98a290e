//! The compute loop of the last stage: it schedules, feeds the first stage, computes its own layers and samples.
//!
//! ```text
//! requests ─▶ engine ─▶ micro-batch ─▶ embedding rows ─▶ stage 0 ─▶ … ─▶ own layers ─▶ logits ─▶ sampler ─▶ events
//!               ▲                                                                                   │
//!               └──────────────────────────────── tokens ──────────────────────────────────────────┘
//! ```
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use capstan_engine::{Engine, EngineConfig, PlannedBatch, Stage, StageOutput, SubmitError, TokenOutcome};
use capstan_llama::{LlamaStage, Vocab};
use capstan_proto::child::{FromChild, StageSpec};
use capstan_proto::data::{MicroBatch, Payload};
use capstan_proto::generate::{ErrorKind, FinishReason, GenerateEvent, GenerateRequest, RequestError};
use capstan_proto::{Epoch, RequestId};
use tokio::sync::mpsc;

use crate::answer::Answer;
use crate::child::Counters;
use crate::embed::Embedder;
use crate::prompt::PromptMaker;
use crate::wire::Input;

/// The epoch in which micro-batches flow.
struct Place {
    epoch: Epoch,
    /// To stage 0; none when this stage is the whole model.
    out: Option<mpsc::Sender<Vec<u8>>>,
}

/// What the last stage adds to its layers.
pub(crate) struct Driver {
    stage: LlamaStage,
    vocab: Vocab,
    embedder: Option<Embedder>,
    engine: Engine,
    place: Option<Place>,
    answers: HashMap<RequestId, Answer>,
    events: mpsc::Sender<FromChild>,
    counters: Arc<Counters>,
    ended: mpsc::Sender<RequestId>,
    model_name: String,
}

/// The epoch is lost, for this reason.
struct EpochLost(String);

impl Driver {
    /// Around the loaded last stage.
    pub fn new(
        stage: LlamaStage,
        spec: &StageSpec,
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
        let config = EngineConfig {
            // Rounding depends on a micro-batch's shape. Cutting prompts by the number of stages would let the number
            // of machines change an answer; cut by size alone, a split model gives the whole one's bits.
            chunks_min: 1,
            decode_batch: spec.decode_batch,
            ..EngineConfig::new(spec.stages, spec.slots, spec.ctx, spec.ubatch)
        };
        let engine = Engine::new(config).map_err(|e| e.to_string())?;
        let driver = Self {
            stage,
            vocab,
            embedder,
            engine,
            place: None,
            answers: HashMap::new(),
            events,
            counters,
            ended,
            model_name: spec.model_name.clone(),
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
                    let epoch = self.place.as_ref().map(|p| p.epoch);
                    self.lose(&reason);
                    if let Some(epoch) = epoch {
                        self.send(FromChild::Lost { epoch, reason });
                    }
                    false
                }
            };
            let counts = self.engine.counters();
            self.counters.slots_used.store(counts.slots_used, Relaxed);
            self.counters.queued.store(counts.queued as u32, Relaxed);
        }
    }

    fn handle(&mut self, input: Input) -> Result<(), EpochLost> {
        match input {
            Input::Stop => {}
            Input::Epoch { epoch, out, done } => {
                self.lose("the stages are being connected anew");
                self.counters.reset();
                self.stage.reset(epoch).map_err(|e| EpochLost(e.to_string()))?;
                self.place = Some(Place { epoch, out });
                // The wiring task may have been replaced meanwhile; the next one sends another epoch.
                done.send(()).ok();
            }
            Input::Batch { batch, permit } => {
                if self.place.as_ref().is_none_or(|p| p.epoch != batch.epoch) {
                    tracing::debug!(epoch = %batch.epoch, "a late micro-batch was dropped");
                    return Ok(());
                }
                self.complete(&batch)?;
                drop(permit);
            }
            Input::Lost { epoch, reason } => {
                if self.place.as_ref().is_some_and(|p| p.epoch == epoch) {
                    self.lose(&reason);
                }
            }
            Input::Submit { request, body, tokens } => self.submit(request, body, tokens),
            Input::Cancel { request } => {
                self.engine.handle_cancel(request);
                self.end(request, |answer| answer.finish(FinishReason::Cancelled));
            }
        }
        Ok(())
    }

    fn submit(&mut self, request: RequestId, body: Box<GenerateRequest>, tokens: Vec<i32>) {
        let result = if self.place.is_none() {
            Err(RequestError::new(
                ErrorKind::Unavailable,
                format!("the stages of {:?} are being connected; try again in a moment", self.model_name),
            ))
        } else {
            let max_tokens = body.max_tokens;
            Answer::new(body, &tokens, &self.vocab).and_then(|answer| {
                self.engine.handle_submit(request, tokens, max_tokens).map_err(submit_error)?;
                Ok(answer)
            })
        };
        match result {
            Ok(answer) => {
                self.answers.insert(request, answer);
            }
            Err(error) => self.send_last(request, GenerateEvent::Failed(error)),
        }
    }

    /// Sends what can be sent. A stage that is the whole model computes one micro-batch and leaves the rest to the next
    /// round, so that new requests join between two; then this is true.
    fn advance(&mut self) -> Result<bool, EpochLost> {
        loop {
            let Some(place) = &self.place else { return Ok(false) };
            let (epoch, out) = (place.epoch, place.out.clone());
            let Some(planned) = self.engine.poll_micro_batch() else { break };
            self.report_started();
            let batch = self.fill(planned, epoch)?;
            match out {
                None => {
                    self.complete(&batch)?;
                    return Ok(true);
                }
                Some(out) => {
                    let frame = batch.encode().map_err(|e| EpochLost(e.to_string()))?;
                    // A closed queue means that the links broke; the wiring task says so through our own queue.
                    if out.blocking_send(frame).is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        self.report_started();
        Ok(false)
    }

    fn report_started(&mut self) {
        while let Some(started) = self.engine.poll_started() {
            if let Some(answer) = self.answers.get_mut(&started.id) {
                let event = answer.started();
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
    fn complete(&mut self, batch: &MicroBatch) -> Result<(), EpochLost> {
        let lost = |e: &dyn std::fmt::Display| EpochLost(e.to_string());
        let started = Instant::now();
        let logits = match self.stage.forward(batch).map_err(|e| lost(&e))? {
            StageOutput::Logits(logits) => logits,
            StageOutput::Hidden(_) => return Err(EpochLost("the last stage gave no logits".into())),
        };
        self.counters.add(batch.rows.len(), started.elapsed());
        let completed = self.engine.handle_completed(batch.step).map_err(|e| lost(&e))?;
        let n_vocab = self.vocab.n_tokens();
        if logits.len() != completed.output_rows * n_vocab {
            return Err(EpochLost("the last stage gave another number of logits than was asked for".into()));
        }
        // Every output is handed in before the next micro-batch is planned, so that a group stays together.
        let outputs: VecDeque<_> = completed.outputs.into();
        for (request, row) in outputs {
            self.sample(request, &logits[row * n_vocab..(row + 1) * n_vocab]);
        }
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
            self.engine.handle_finish(request);
            self.end(request, |answer| answer.finish(FinishReason::Stop));
        } else if let Some(token) = step.token {
            match self.engine.handle_token(request, token) {
                TokenOutcome::Continue | TokenOutcome::Ignored => {}
                TokenOutcome::Finished(_) => self.end(request, |answer| answer.finish(FinishReason::Length)),
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

fn submit_error(error: SubmitError) -> RequestError {
    let kind = match error {
        SubmitError::ContextExceeded { .. } => ErrorKind::ContextExceeded,
        SubmitError::Busy { .. } => ErrorKind::Busy,
        SubmitError::Empty | SubmitError::NoTokens => ErrorKind::BadRequest,
        SubmitError::Duplicate(_) => ErrorKind::Internal,
    };
    RequestError::new(kind, error.to_string())
}
