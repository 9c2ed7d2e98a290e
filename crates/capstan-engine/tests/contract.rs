//! The contract suite finds mistakes: stages that break one rule each must not pass it.
use std::panic::{AssertUnwindSafe, catch_unwind};

use capstan_engine::contract::{ContractParams, check_stage};
use capstan_engine::{FakeModel, FakeStage, Stage, StageError, StageOutput};
use capstan_proto::data::{KvOp, MicroBatch, Payload};
use capstan_proto::{Epoch, LayerRange};

/// Changes a micro-batch before the stage inside sees it.
type Tamper = fn(&mut MicroBatch);

struct Broken {
    inside: FakeStage,
    tamper: Tamper,
    resets: bool,
    /// The steps the stage inside has seen: a stage that does not check order takes anything.
    follows_order: bool,
    step: u64,
}

impl Stage for Broken {
    fn forward(&mut self, batch: &MicroBatch) -> Result<StageOutput, StageError> {
        let mut batch = batch.clone();
        (self.tamper)(&mut batch);
        if !self.follows_order {
            batch.step = self.step;
        }
        let output = self.inside.forward(&batch)?;
        self.step += 1;
        Ok(output)
    }

    fn reset(&mut self, epoch: Epoch) -> Result<(), StageError> {
        if self.resets {
            self.step = 0;
            return self.inside.reset(epoch);
        }
        Ok(())
    }
}

fn passes(tamper: Tamper, resets: bool, follows_order: bool) -> bool {
    let model = FakeModel::small();
    let range = LayerRange::new(0, model.layers).unwrap();
    let params = ContractParams {
        n_vocab: model.n_vocab,
        width: model.width,
        takes_tokens: true,
        gives_logits: true,
        slots: model.slots,
        copy: true,
        trim: true,
        batch_tolerance: 0.0,
    };
    let make = || -> Box<dyn Stage> {
        Box::new(Broken { inside: FakeStage::new(model, range), tamper, resets, follows_order, step: 0 })
    };
    catch_unwind(AssertUnwindSafe(|| check_stage(make, &params))).is_ok()
}

#[test]
fn each_mistake_is_found() {
    assert!(passes(|_| {}, true, true), "without a mistake the suite passes");
    assert!(!passes(|_| {}, false, true), "a reset that does nothing");
    assert!(!passes(|_| {}, true, false), "steps unchecked");
    let mistakes: [(&str, Tamper); 8] = [
        ("epoch unchecked", |b| b.epoch = Epoch(5)),
        ("Clear ignored", |b| b.ops.retain(|op| !matches!(op, KvOp::Clear { .. }))),
        ("Trim ignored", |b| b.ops.retain(|op| !matches!(op, KvOp::Trim { .. }))),
        ("Copy ignored", |b| b.ops.retain(|op| !matches!(op, KvOp::Copy { .. }))),
        ("Clear of the wrong slot", |b| {
            for op in &mut b.ops {
                if let KvOp::Clear { slot } = op {
                    *slot = (*slot + 1) % 3;
                }
            }
        }),
        ("two slots in one place", |b| {
            for row in &mut b.rows {
                row.slot = if row.slot == 2 { 1 } else { row.slot };
            }
        }),
        ("flags ignored", |b| b.rows.iter_mut().for_each(|r| r.output = true)),
        ("tokens wrapped", |b| {
            if let Payload::Tokens(tokens) = &mut b.payload {
                tokens.iter_mut().for_each(|t| *t = t.rem_euclid(17));
            }
        }),
    ];
    for (what, tamper) in mistakes {
        assert!(!passes(tamper, true, true), "{what} was not found");
    }
}
