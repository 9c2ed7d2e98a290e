//! The driver's thread: it sends, computes the last layers, samples and drafts, one thing at a time.
use std::sync::Arc;

use capstan_engine::{BatchKind, PlannedBatch, SubmitError, TokenOutcome};
use capstan_proto::data::Payload;
use capstan_proto::{Epoch, RequestId};

use super::{Doing, Event, Input, World};
use crate::cost::{Ns, ns};
use crate::dice::{mix, unit};
use crate::log::{Request, StepLog};
use crate::station::Frame;
use crate::text::{End, digest};

impl World {
    /// Lets the driver's thread go on, if it has nothing to do: send what can be sent, take one input, or guess.
    pub(super) fn drive(&mut self) -> Result<(), String> {
        let whole = self.stations.len() == 1;
        loop {
            if !matches!(self.doing, Doing::Nothing) {
                return Ok(());
            }
            // A whole model takes inputs between any two micro-batches; a driver sends all it can first.
            if (!whole || self.inbox.is_empty()) && self.send_next()? {
                return Ok(());
            }
            match self.inbox.pop_front() {
                Some(Input::Submit(id)) => self.submit(id)?,
                Some(Input::Cancel(id)) => self.cancel(id)?,
                Some(Input::Batch(frame)) => return self.complete(frame),
                None => return self.draft(),
            }
            self.forward_drops()?;
        }
    }

    /// Begins to send the next micro-batch, if there is one.
    fn send_next(&mut self) -> Result<bool, String> {
        let planned = self.engine.poll_micro_batch();
        while let Some(started) = self.engine.poll_started() {
            let log = self.requests.get_mut(started.id.0 as usize).ok_or("an unknown request started")?;
            log.started_ns = Some(self.now);
            log.cached = started.cached;
            self.checker.started(started, &log.request.prompt, self.now)?;
            self.note(|| format!("{started:?}"));
        }
        self.forward_drops()?;
        let Some(planned) = planned else { return Ok(false) };
        self.note(|| {
            let of = |r: &capstan_proto::data::Row| format!("{}:{}", r.slot, r.pos);
            let rows: Vec<String> = planned.rows.iter().map(of).collect();
            let rows =
                if rows.len() > 12 { format!("{} … {}", rows[0], rows[rows.len() - 1]) } else { rows.join(" ") };
            format!("plans step {} {:?} [{rows}] {:?}", planned.step, planned.kind, planned.ops)
        });
        self.checker.planned(&planned, self.engine.counters().in_flight, self.now)?;
        self.engine.check_invariants().map_err(|e| e.to_string())?;
        let frame = self.fill(planned);
        let rows = frame.batch.rows.len() as u32;
        let done = self.now + self.clock.profile.driver.send_ns(rows);
        self.doing = Doing::Sending(frame);
        self.foresee(done, Event::Driver);
        Ok(true)
    }

    fn fill(&self, planned: PlannedBatch) -> Frame {
        let tokens: Arc<[i32]> = planned.tokens.as_slice().into();
        let payload = match self.stations.len() {
            1 => Payload::Tokens(planned.tokens.clone()),
            _ => Payload::Hidden(planned.tokens.iter().flat_map(|&t| self.model.embedding(t)).collect()),
        };
        let kind = planned.kind;
        let batch = planned.into_micro_batch(Epoch(0), payload);
        Frame { batch, tokens, kind, sent_ns: self.now, spent_ns: Vec::new() }
    }

    pub(super) fn driver_done(&mut self) -> Result<(), String> {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Sending(frame) if self.stations.len() == 1 => return self.complete(frame),
            Doing::Sending(frame) => {
                let link = self.links.len() - 1;
                if !self.links[link].has_room() {
                    self.doing = Doing::Blocked(frame);
                    return Ok(());
                }
                self.links[link].push(frame);
                self.pump(link)?;
            }
            Doing::Completing { frame, logits, sampling_ns } => self.completed(frame, &logits, sampling_ns)?,
            Doing::Drafting(wanted, token) => {
                self.note(|| format!("the draft for request {} is {token}", wanted.id));
                self.engine.handle_guess(&wanted, token);
                self.forward_drops()?;
            }
            Doing::Nothing | Doing::Blocked(_) => {}
        }
        self.drive()
    }

    /// Begins to compute the last stage's layers on a micro-batch.
    fn complete(&mut self, mut frame: Frame) -> Result<(), String> {
        let last = self.stations.len() - 1;
        let void = self.engine.is_void(frame.batch.step);
        if frame.kind == BatchKind::Guess {
            self.checker.void(frame.batch.step, void)?;
        } else if void {
            return Err(format!("step {} is called void, but is no guess", frame.batch.step));
        }
        if !void && frame.batch.rows.len() != frame.tokens.len() {
            return Err(format!("step {} was dropped on its way, but is not void", frame.batch.step));
        }
        let crowded = self.is_crowded();
        let (time, logits) = self.stations[last].compute(&mut frame, last, (void, crowded), &self.clock)?;
        let sampling_ns = self.clock.profile.driver.sample_ns(frame.shape().outputs);
        let (step, rows) = (frame.batch.step, frame.batch.rows.len());
        self.note(|| format!("stage {last} computes step {step}, {rows} rows, {} µs", time / 1000));
        self.doing = Doing::Completing { frame, logits, sampling_ns };
        self.foresee(self.now + time + sampling_ns, Event::Driver);
        Ok(())
    }

    fn completed(&mut self, frame: Frame, logits: &[f32], sampling_ns: Ns) -> Result<(), String> {
        let step = frame.batch.step;
        let us = |t: Ns| u32::try_from(t.div_ceil(1000)).unwrap_or(u32::MAX);
        let stage_us: Vec<u32> = frame.spent_ns.iter().map(|t| us(*t)).collect();
        self.engine.handle_times(step, &stage_us, us(self.now - sampling_ns - frame.sent_ns));
        let void = frame.batch.rows.len() != frame.tokens.len() || self.engine.is_void(step);
        let completed = self.engine.handle_completed(step).map_err(|e| e.to_string())?;
        if completed.kind != frame.kind {
            return Err(format!("step {step} was {:?} and is {:?}", frame.kind, completed.kind));
        }
        let n_vocab = self.model.n_vocab;
        if logits.len() != completed.output_rows * n_vocab {
            return Err(format!("step {step} gave {} logits for {} outputs", logits.len(), completed.output_rows));
        }
        self.steps.push(StepLog {
            step,
            kind: frame.kind,
            rows: frame.tokens.len() as u32,
            outputs: completed.outputs.len() as u32,
            void,
            sent_ns: frame.sent_ns,
            done_ns: self.now,
            spent_ns: frame.spent_ns,
        });
        for (id, index) in completed.outputs {
            let logits = logits.get(index * n_vocab..(index + 1) * n_vocab);
            self.sample(id, logits.ok_or_else(|| format!("step {step} has no output {index} for request {id}"))?)?;
        }
        self.engine.check_invariants().map_err(|e| e.to_string())?;
        if self.stations.len() > 1 {
            let last = self.stations.len() - 1;
            self.stations[last].permits -= 1;
            self.forward_drops()?;
            self.read(last)?;
        }
        self.forward_drops()
    }

    fn sample(&mut self, id: RequestId, logits: &[f32]) -> Result<(), String> {
        let log = self.requests.get_mut(id.0 as usize).ok_or("an output belongs to an unknown request")?;
        if let Some(end) = log.end {
            return Err(format!("request {id} ended with {end:?}, but an output of it came"));
        }
        let index = log.tokens.len();
        if log.wanted.digests.get(index) != Some(&digest(logits)) {
            return Err(format!("token {index} of request {id} has other logits than when it is alone"));
        }
        let Some(token) = log.request.text.next(index, logits) else {
            self.end(id, End::Model)?;
            if !self.engine.handle_finish(id) {
                return Err(format!("request {id} has an output, but cannot be finished"));
            }
            return Ok(());
        };
        log.tokens.push(token);
        log.token_ns.push(self.now);
        self.checker.token(id, token, self.now)?;
        self.note(|| format!("request {id} says token {index}: {token}"));
        match self.engine.handle_token(id, token) {
            TokenOutcome::Continue => Ok(()),
            TokenOutcome::Finished(by) => self.end(id, End::Length(by)),
            TokenOutcome::Ignored => Err(format!("the token of request {id} was ignored")),
        }
    }

    fn submit(&mut self, id: RequestId) -> Result<(), String> {
        let log = self.requests.get_mut(id.0 as usize).ok_or("an unknown request arrives")?;
        let Request { prompt, max_tokens, .. } = log.request.clone();
        match self.engine.handle_submit(id, prompt, Some(max_tokens)) {
            Ok(()) => Ok(()),
            Err(SubmitError::Busy { .. }) => {
                log.refused = true;
                Ok(())
            }
            Err(e) => Err(format!("request {id} was refused: {e}")),
        }
    }

    fn cancel(&mut self, id: RequestId) -> Result<(), String> {
        let lives = self.requests.get(id.0 as usize).is_some_and(|r| r.end.is_none() && !r.refused);
        if self.engine.handle_cancel(id) != lives {
            return Err(format!("request {id} is cancelled, and whether it lived was mistaken"));
        }
        self.engine.check_invariants().map_err(|e| e.to_string())?;
        if lives { self.end(id, End::Cancelled) } else { Ok(()) }
    }

    fn end(&mut self, id: RequestId, end: End) -> Result<(), String> {
        self.note(|| format!("request {id} ends: {end:?}"));
        self.checker.ended(id);
        let log = self.requests.get_mut(id.0 as usize).ok_or("an unknown request ends")?;
        log.end = Some(end);
        log.end_ns = Some(self.now);
        log.check().map_err(|what| format!("request {id}: {what}"))
    }

    fn forward_drops(&mut self) -> Result<(), String> {
        while let Some(steps) = self.engine.poll_drop() {
            self.checker.dropped(&steps)?;
            self.note(|| format!("drops {steps:?}"));
            if self.stations.len() > 1 {
                self.send_notice(self.links.len() - 1, steps);
            }
        }
        Ok(())
    }

    /// Asks the draft model for a guess, where there is one and the engine wants one.
    fn draft(&mut self) -> Result<(), String> {
        let cost = self.clock.profile.driver.draft_us;
        if cost == 0.0 {
            return Ok(());
        }
        let Some(wanted) = self.engine.wants_guess() else { return Ok(()) };
        let log = self.requests.get(wanted.id.0 as usize).ok_or("a guess is wanted for an unknown request")?;
        let index = wanted.tokens.len().checked_sub(log.request.prompt.len()).ok_or("a guess is wanted in a prompt")?;
        let right = unit(mix(mix(self.setup.seed, 0xD4AF7), index as u64)) < self.setup.draft_right;
        let truth = log.wanted.tokens.get(index).copied().unwrap_or(0);
        let token = if right { truth } else { (truth + 1) % self.model.n_vocab as i32 };
        self.doing = Doing::Drafting(wanted, token);
        self.foresee(self.now + ns(cost), Event::Driver);
        Ok(())
    }
}
