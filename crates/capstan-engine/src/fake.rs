//! A stage that hashes where a model would multiply.
//!
//! What a layer answers depends on its index, on the row, and on everything its slot holds, in order. So a missed or
//! misplaced `Clear`, a leak between slots, a skipped or repeated position, or a wrong order changes every output that
//! follows. Rows do not depend on the micro-batch they travel in, so answers are equal for every schedule. Ranges
//! compose: `0..4` and then `4..8` is `0..8`, bit for bit.
use capstan_proto::data::{KvOp, MicroBatch, Payload};
use capstan_proto::{Epoch, LayerRange};

use crate::stage::{Stage, StageError, StageOutput, StepGuard};

/// The shape of a model whose layers hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeModel {
    /// Layers of the whole model.
    pub layers: u32,
    /// Floats of a hidden state.
    pub width: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Sequences at once.
    pub slots: u32,
}

impl FakeModel {
    /// Six layers, four floats, 17 tokens, eight slots.
    pub fn small() -> Self {
        Self { layers: 6, width: 4, n_vocab: 17, slots: 8 }
    }

    /// The hidden state that a driver feeds stage 0 with: `width` floats in -1..1.
    pub fn embedding(&self, token: i32) -> Vec<f32> {
        floats(mix(0xE3BE, token as u64), self.width)
    }
}

/// What one layer holds of one slot.
#[derive(Clone, Debug, Default)]
struct LayerKv {
    /// Position and digest of each row, in the order they came.
    entries: Vec<(u32, u64)>,
    /// Hash over `entries`.
    history: u64,
}

impl LayerKv {
    fn push(&mut self, pos: u32, digest: u64) {
        self.entries.push((pos, digest));
        self.history = mix(mix(self.history, u64::from(pos)), digest);
    }

    fn trim(&mut self, from: u32) {
        let entries = std::mem::take(&mut self.entries);
        self.history = 0;
        entries.into_iter().filter(|(pos, _)| *pos < from).for_each(|(pos, digest)| self.push(pos, digest));
    }
}

/// What a slot of a [`FakeStage`] held once.
#[derive(Clone, Debug)]
pub struct FakeSnapshot(Vec<LayerKv>);

/// A layer range of a [`FakeModel`].
#[derive(Clone, Debug)]
pub struct FakeStage {
    model: FakeModel,
    range: LayerRange,
    guard: StepGuard,
    /// For each slot one [`LayerKv`] a layer of the range.
    kv: Vec<Vec<LayerKv>>,
}

impl FakeStage {
    /// The stage for `range`, in epoch 0. The whole range takes tokens, any other takes hidden states; a range that
    /// reaches the last layer answers with logits.
    pub fn new(model: FakeModel, range: LayerRange) -> Self {
        let kv = vec![vec![LayerKv::default(); range.count() as usize]; model.slots as usize];
        Self { model, range, guard: StepGuard::default(), kv }
    }

    /// The range `0..layers` cut into `stages` ranges as even as possible; fewer when there are not so many layers.
    pub fn pipeline(model: FakeModel, stages: u16) -> Vec<Self> {
        let stages = u32::from(stages).min(model.layers);
        let cut = |i: u32| model.layers * i / stages;
        (0..stages).filter_map(|i| LayerRange::new(cut(i), cut(i + 1)).ok()).map(|r| Self::new(model, r)).collect()
    }

    fn is_last(&self) -> bool {
        self.range.end() == self.model.layers
    }

    /// The hidden states of the rows, if the payload is what this range takes.
    fn input(&self, batch: &MicroBatch) -> Result<Vec<f32>, StageError> {
        let whole = self.range.start() == 0 && self.is_last();
        match &batch.payload {
            Payload::Tokens(tokens) if whole && !tokens.iter().all(|t| (0..self.model.n_vocab as i32).contains(t)) => {
                Err(StageError::Refused("a token outside the vocabulary".into()))
            }
            Payload::Tokens(tokens) if whole => Ok(tokens.iter().flat_map(|&t| self.model.embedding(t)).collect()),
            Payload::Hidden(hidden) if !whole && hidden.len() == batch.rows.len() * self.model.width => {
                Ok(hidden.clone())
            }
            Payload::Hidden(_) if !whole => Err(StageError::Refused("hidden states of another width".into())),
            _ => Err(StageError::Refused("another kind of payload than this layer range takes".into())),
        }
    }

    /// Checks the operations without applying any: slots must exist, and the target of a copy must be empty.
    fn check_ops(&self, batch: &MicroBatch) -> Result<(), StageError> {
        let slots = self.model.slots;
        let no_slot = |slot: &u32| *slot >= slots;
        let of_ops = batch.ops.iter().flat_map(|op| match *op {
            KvOp::Clear { slot } | KvOp::Trim { slot, .. } => [slot, slot],
            KvOp::Copy { from, to } => [from, to],
            KvOp::Save { slot, .. } | KvOp::Restore { slot, .. } => [slot, slot],
        });
        if let Some(slot) = of_ops.chain(batch.rows.iter().map(|r| r.slot)).find(no_slot) {
            return Err(StageError::Refused(format!("slot {slot} was named, but there are {slots}")));
        }
        // The lowest position that each slot holds is enough to know which ones are empty after each operation.
        let lowest = |kv: &Vec<LayerKv>| kv.first().and_then(|l| l.entries.iter().map(|(pos, _)| *pos).min());
        let mut lowest: Vec<Option<u32>> = self.kv.iter().map(lowest).collect();
        for op in &batch.ops {
            match *op {
                KvOp::Clear { slot } => lowest[slot as usize] = None,
                KvOp::Trim { slot, from } => lowest[slot as usize] = lowest[slot as usize].filter(|pos| *pos < from),
                KvOp::Copy { from, to } if lowest[to as usize].is_none() => lowest[to as usize] = lowest[from as usize],
                KvOp::Copy { to, .. } => {
                    return Err(StageError::Refused(format!("slot {to} is not empty, so nothing can be copied to it")));
                }
                KvOp::Save { .. } | KvOp::Restore { .. } => {}
            }
        }
        Ok(())
    }

    /// What a slot holds.
    pub fn save(&self, slot: u32) -> FakeSnapshot {
        FakeSnapshot(self.kv[slot as usize].clone())
    }

    /// Lets a slot hold what was saved.
    pub fn restore(&mut self, slot: u32, snapshot: &FakeSnapshot) {
        self.kv[slot as usize] = snapshot.0.clone();
    }

    fn apply(&mut self, op: KvOp) {
        match op {
            KvOp::Clear { slot } => self.kv[slot as usize].fill(LayerKv::default()),
            KvOp::Trim { slot, from } => self.kv[slot as usize].iter_mut().for_each(|l| l.trim(from)),
            KvOp::Copy { from, to } => self.kv[to as usize] = self.kv[from as usize].clone(),
            // Whoever has the stage does it.
            KvOp::Save { .. } | KvOp::Restore { .. } => {}
        }
    }
}

impl Stage for FakeStage {
    fn forward(&mut self, batch: &MicroBatch) -> Result<StageOutput, StageError> {
        self.guard.check(batch)?;
        let mut hidden = self.input(batch)?;
        self.check_ops(batch)?;
        batch.ops.iter().for_each(|&op| self.apply(op));
        for (row, state) in batch.rows.iter().zip(hidden.chunks_exact_mut(self.model.width.max(1))) {
            for (layer, kv) in (self.range.start()..).zip(&mut self.kv[row.slot as usize]) {
                kv.push(row.pos, digest(state));
                state.copy_from_slice(&floats(mix(u64::from(layer), kv.history), state.len()));
            }
        }
        self.guard.advance();
        if !self.is_last() {
            return Ok(StageOutput::Hidden(hidden));
        }
        let states = batch.rows.iter().zip(hidden.chunks_exact(self.model.width.max(1)));
        let flagged = states.filter(|(row, _)| row.output);
        Ok(StageOutput::Logits(flagged.flat_map(|(_, s)| floats(mix(0x4EAD, digest(s)), self.model.n_vocab)).collect()))
    }

    fn reset(&mut self, epoch: Epoch) -> Result<(), StageError> {
        self.guard.reset(epoch);
        self.kv.iter_mut().for_each(|slot| slot.fill(LayerKv::default()));
        Ok(())
    }
}

/// Two numbers to one, each bit of which depends on each bit of both (splitmix64's finisher).
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23) ^ b;
    x = (x.wrapping_add(0x9E37_79B9_7F4A_7C15) ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn digest(state: &[f32]) -> u64 {
    state.iter().fold(0, |d, x| mix(d, u64::from(x.to_bits())))
}

/// `n` floats in -1..1 that follow from `seed`, each exact in 24 bits.
fn floats(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{ContractParams, check_stage};
    use capstan_proto::data::Row;

    fn params(model: FakeModel, range: LayerRange) -> ContractParams {
        let gives_logits = range.end() == model.layers;
        ContractParams {
            n_vocab: model.n_vocab,
            width: model.width,
            takes_tokens: gives_logits && range.start() == 0,
            gives_logits,
            slots: model.slots,
            copy: true,
            trim: true,
            batch_tolerance: 0.0,
        }
    }

    #[test]
    fn every_range_passes_the_contract() {
        let model = FakeModel::small();
        for (start, end) in [(0, 6), (0, 2), (2, 3), (3, 6), (5, 6)] {
            let range = LayerRange::new(start, end).unwrap();
            check_stage(|| Box::new(FakeStage::new(model, range)), &params(model, range));
        }
    }

    #[test]
    fn ranges_compose() {
        let model = FakeModel::small();
        let tokens = [3, 1, 4, 1, 5];
        let rows: Vec<Row> =
            [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1)].map(|(slot, pos)| Row { slot, pos, output: pos > 0 }).to_vec();
        let batch = |payload| MicroBatch { epoch: Epoch(0), step: 0, ops: vec![], rows: rows.clone(), payload };
        let whole = FakeStage::pipeline(model, 1)[0].forward(&batch(Payload::Tokens(tokens.to_vec()))).unwrap();
        for stages in 2..=6 {
            let mut hidden: Vec<f32> = tokens.iter().flat_map(|&t| model.embedding(t)).collect();
            for mut stage in FakeStage::pipeline(model, stages) {
                match stage.forward(&batch(Payload::Hidden(hidden.clone()))).unwrap() {
                    StageOutput::Hidden(next) => hidden = next,
                    logits => assert_eq!(logits, whole, "{stages} stages"),
                }
            }
        }
    }

    #[test]
    fn a_copy_onto_a_slot_in_use_is_refused_and_changes_nothing() {
        let model = FakeModel::small();
        let mut stage = FakeStage::pipeline(model, 1).remove(0);
        let row = |slot| Row { slot, pos: 0, output: true };
        let rows = vec![row(0), row(1)];
        let batch = |step, ops: &[KvOp], rows: Vec<Row>, tokens| MicroBatch {
            epoch: Epoch(0),
            step,
            ops: ops.to_vec(),
            rows,
            payload: Payload::Tokens(tokens),
        };
        stage.forward(&batch(0, &[], rows, vec![1, 2])).unwrap();
        let copy = KvOp::Copy { from: 0, to: 1 };
        let clear = KvOp::Clear { slot: 1 };
        assert!(stage.forward(&batch(1, &[clear, copy, copy], vec![], vec![])).is_err_and(|e| !e.kv_changed()));
        assert!(stage.forward(&batch(1, &[clear, copy, clear, copy], vec![], vec![])).is_ok());
    }
}
