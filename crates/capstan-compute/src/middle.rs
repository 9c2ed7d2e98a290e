//! The compute loop of every stage but the last: micro-batch in, hidden states out.
use std::time::Instant;

use bytes::Bytes;
use capstan_engine::StageOutput;
use capstan_proto::Epoch;
use capstan_proto::child::FromChild;
use capstan_proto::data::{BatchFrame, MicroBatch};
use tokio::sync::mpsc;

use crate::counters::Counters;
use crate::snapshots::{Keeps, Snapshots};
use crate::wire::{Input, Links};

/// Computes until [`Input::Stop`] or until nobody sends any more.
pub(crate) fn run(
    stage: &mut impl Keeps,
    snapshots: &mut Snapshots,
    inputs: &mut mpsc::Receiver<Input>,
    events: &mpsc::Sender<FromChild>,
    counters: &Counters,
) {
    let mut place: Option<(Epoch, Links)> = None;
    while let Some(input) = inputs.blocking_recv() {
        match input {
            Input::Stop => return,
            Input::Epoch { epoch, links, done } => {
                counters.reset();
                snapshots.reset();
                match stage.reset(epoch) {
                    Ok(()) => {
                        place = links.map(|links| (epoch, links));
                        // The wiring task may have been replaced meanwhile; the next one sends another epoch.
                        done.send(()).ok();
                    }
                    Err(error) => tracing::error!(%error, "the KV cache could not be emptied"),
                }
            }
            Input::Batch { mut frame, permit } => {
                let Some((epoch, links)) = place.as_ref().filter(|(epoch, _)| *epoch == frame.batch.epoch) else {
                    tracing::debug!(epoch = %frame.batch.epoch, "a late micro-batch was dropped");
                    continue;
                };
                let epoch = *epoch;
                snapshots.before(stage, &mut frame.batch);
                let result = forward(stage, frame, links, counters);
                drop(permit);
                match result {
                    // A closed queue means that the links broke, which the wiring task reports.
                    Ok((bytes, batch)) => {
                        links.frames.blocking_send(bytes).ok();
                        // While the next stages compute.
                        snapshots.after(stage, &batch, None);
                    }
                    Err(reason) => {
                        tracing::error!(%reason, "a micro-batch failed");
                        place = None;
                        events.blocking_send(FromChild::Lost { epoch, reason }).ok();
                    }
                }
            }
            Input::Lost { epoch, .. } => {
                place.take_if(|(current, _)| *current == epoch);
            }
            Input::Submit { .. } | Input::Cancel { .. } | Input::Snapshots(_) => {
                tracing::warn!("what is for a driver reached another stage");
            }
        }
    }
}

/// The frame for the next stage: the step with this stage's hidden states and time. A step that need not be computed
/// any more goes on without rows, so that steps stay gapless and its operations are applied everywhere.
fn forward(
    stage: &mut impl Keeps,
    frame: BatchFrame,
    links: &Links,
    counters: &Counters,
) -> Result<(Bytes, MicroBatch), String> {
    let BatchFrame { mut batch, mut stage_us } = frame;
    let started = Instant::now();
    if links.drops.begin(batch.step) {
        batch = batch.without_rows();
    }
    let hidden = match stage.forward(&batch).map_err(|e| e.to_string())? {
        StageOutput::Hidden(hidden) => hidden,
        StageOutput::Logits(_) => return Err("a stage that is not the last gave logits".into()),
    };
    let busy = started.elapsed();
    counters.add(batch.rows.len(), busy);
    stage_us.push(if batch.rows.is_empty() { 0 } else { u32::try_from(busy.as_micros()).unwrap_or(u32::MAX) });
    let bytes = batch.encode_hidden(&hidden, &stage_us).map_err(|e| e.to_string())?;
    Ok((bytes.into(), batch))
}
