//! The compute loop of every stage but the last: micro-batch in, hidden states out.
use std::time::Instant;

use capstan_engine::{Stage, StageOutput};
use capstan_proto::Epoch;
use capstan_proto::child::FromChild;
use capstan_proto::data::{MicroBatch, Payload};
use tokio::sync::mpsc;

use crate::child::Counters;
use crate::wire::Input;

/// Computes until [`Input::Stop`] or until nobody sends any more.
pub(crate) fn run(
    stage: &mut dyn Stage,
    inputs: &mut mpsc::Receiver<Input>,
    events: &mpsc::Sender<FromChild>,
    counters: &Counters,
) {
    let mut place: Option<(Epoch, mpsc::Sender<Vec<u8>>)> = None;
    while let Some(input) = inputs.blocking_recv() {
        match input {
            Input::Stop => return,
            Input::Epoch { epoch, out, done } => {
                counters.reset();
                match stage.reset(epoch) {
                    Ok(()) => {
                        place = out.map(|out| (epoch, out));
                        // The wiring task may have been replaced meanwhile; the next one sends another epoch.
                        done.send(()).ok();
                    }
                    Err(error) => tracing::error!(%error, "the KV cache could not be emptied"),
                }
            }
            Input::Batch { batch, permit } => {
                let Some((epoch, out)) = place.as_ref().filter(|(epoch, _)| *epoch == batch.epoch) else {
                    tracing::debug!(epoch = %batch.epoch, "a late micro-batch was dropped");
                    continue;
                };
                let epoch = *epoch;
                let started = Instant::now();
                let result = forward(stage, batch);
                drop(permit);
                match result {
                    Ok((frame, rows)) => {
                        counters.add(rows, started.elapsed());
                        // A closed queue means that the links broke, which the wiring task reports.
                        out.blocking_send(frame).ok();
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
            Input::Submit { .. } | Input::Cancel { .. } => tracing::warn!("a request reached a stage without a driver"),
        }
    }
}

/// The frame for the next stage, and how many rows it has.
fn forward(stage: &mut dyn Stage, batch: MicroBatch) -> Result<(Vec<u8>, usize), String> {
    let hidden = match stage.forward(&batch).map_err(|e| e.to_string())? {
        StageOutput::Hidden(hidden) => hidden,
        StageOutput::Logits(_) => return Err("a stage that is not the last gave logits".into()),
    };
    let rows = batch.rows.len();
    let next = MicroBatch { payload: Payload::Hidden(hidden), ..batch };
    Ok((next.encode().map_err(|e| e.to_string())?, rows))
}
