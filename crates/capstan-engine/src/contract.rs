//! The tests that every [`Stage`] passes, whatever computes behind it.
//!
//! They panic with a sentence, so a test calls [`check_stage`] and that is all. They compare like with like: answers
//! are wanted equal bit for bit only where micro-batches have the same shapes.
use capstan_proto::Epoch;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};

use crate::stage::{Stage, StageError, StageOutput};

/// What a stage is, for the suite.
#[derive(Clone, Debug, PartialEq)]
pub struct ContractParams {
    /// Tokens of the vocabulary; logits a row where `gives_logits`.
    pub n_vocab: usize,
    /// Floats of a hidden state.
    pub width: usize,
    /// Takes token ids (the whole model), else hidden states.
    pub takes_tokens: bool,
    /// Answers with logits (the last stage), else with hidden states.
    pub gives_logits: bool,
    /// Its slots, at least 3. Each must hold 16 positions, and a micro-batch may have 8 rows.
    pub slots: u32,
    /// Whether `Copy` is checked.
    pub copy: bool,
    /// Whether `Trim` is checked: it is right for plain KV only.
    pub trim: bool,
    /// How far two slots decoded in one micro-batch may be from each decoded alone, relative to the answer's largest
    /// number. 0 for a stage whose rows do not depend on the micro-batch's shape.
    pub batch_tolerance: f32,
}

/// Runs the whole suite. `make` gives a stage that nothing was computed on, in whatever epoch.
///
/// # Panics
/// When the stage breaks the contract, with a sentence that says how.
pub fn check_stage(mut make: impl FnMut() -> Box<dyn Stage>, params: &ContractParams) {
    assert!(params.slots >= 3, "the contract needs three slots, this stage has {}", params.slots);
    let mut fresh = || Run::new(make(), params);
    same_input_gives_same_bits(&mut fresh);
    the_past_of_a_slot_matters(&mut fresh);
    outputs_have_the_right_lengths(&mut fresh);
    other_epochs_and_steps_are_refused(&mut fresh);
    wrong_micro_batches_are_refused(&mut fresh);
    a_batch_of_operations_alone_works(&mut fresh);
    reset_empties_everything(&mut fresh);
    clear_empties_one_slot(&mut fresh);
    slots_are_independent(&mut fresh);
    slots_decode_together(&mut fresh);
    if params.copy {
        copy_copies(&mut fresh);
    }
    if params.trim {
        trim_trims(&mut fresh);
    }
}

const EPOCH: Epoch = Epoch(5);

/// Rows of one sequence: `text` names its content, so the same text in another slot has the same input.
#[derive(Clone, Copy)]
struct Piece {
    slot: u32,
    text: u64,
    from: u32,
    count: u32,
}

fn piece(slot: u32, text: u64, from: u32, count: u32) -> Piece {
    Piece { slot, text, from, count }
}

/// A stage, and the step that comes next.
struct Run<'a> {
    stage: Box<dyn Stage>,
    params: &'a ContractParams,
    epoch: Epoch,
    step: u64,
}

impl<'a> Run<'a> {
    fn new(stage: Box<dyn Stage>, params: &'a ContractParams) -> Self {
        let mut run = Self { stage, params, epoch: EPOCH, step: 0 };
        run.reset(EPOCH);
        run
    }

    fn reset(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.step = 0;
        if let Err(e) = self.stage.reset(epoch) {
            panic!("a stage must let itself be reset: {e}");
        }
    }

    /// A micro-batch for the next step; every row is flagged.
    fn batch(&self, ops: &[KvOp], pieces: &[Piece]) -> MicroBatch {
        let rows = |p: &Piece| {
            let slot = p.slot;
            (p.from..p.from + p.count).map(move |pos| Row { slot, pos, output: true })
        };
        let cells = pieces.iter().flat_map(|p| (p.from..p.from + p.count).map(|pos| (p.text, pos)));
        let payload = if self.params.takes_tokens {
            Payload::Tokens(
                cells.map(|(text, pos)| (noise(text, pos, 0) % self.params.n_vocab as u64) as i32).collect(),
            )
        } else {
            let row = |(text, pos)| (0..self.params.width as u64).map(move |i| unit(noise(text, pos, i)));
            Payload::Hidden(cells.flat_map(row).collect())
        };
        let rows = pieces.iter().flat_map(rows).collect();
        MicroBatch { epoch: self.epoch, step: self.step, ops: ops.to_vec(), rows, payload }
    }

    fn send(&mut self, batch: &MicroBatch) -> Vec<f32> {
        let output = match self.stage.forward(batch) {
            Ok(output) => output,
            Err(e) => panic!("a stage must compute a correct micro-batch: {e}\n{:?} {:?}", batch.ops, batch.rows),
        };
        self.step += 1;
        let flagged = batch.rows.iter().filter(|r| r.output).count();
        let (floats, wanted) = match (output, self.params.gives_logits) {
            (StageOutput::Logits(l), true) => (l, flagged * self.params.n_vocab),
            (StageOutput::Hidden(h), false) => (h, batch.rows.len() * self.params.width),
            (StageOutput::Logits(_), false) => panic!("a stage that is not the last must answer with hidden states"),
            (StageOutput::Hidden(_), true) => panic!("the last stage must answer with logits"),
        };
        assert_eq!(floats.len(), wanted, "an answer to {:?} has the wrong length", batch.rows);
        assert!(floats.iter().all(|x| x.is_finite()), "an answer to {:?} is not finite", batch.rows);
        floats
    }

    fn run(&mut self, ops: &[KvOp], pieces: &[Piece]) -> Vec<f32> {
        let batch = self.batch(ops, pieces);
        self.send(&batch)
    }

    fn refuse(&mut self, batch: &MicroBatch, what: &str) -> StageError {
        match self.stage.forward(batch) {
            Ok(_) => panic!("a stage must refuse {what}"),
            Err(e) => {
                assert!(!e.kv_changed(), "a stage must refuse {what} before it changes anything, but said: {e}");
                e
            }
        }
    }
}

type Fresh<'f, 'p> = &'f mut dyn FnMut() -> Run<'p>;

fn noise(text: u64, pos: u32, i: u64) -> u64 {
    let mut x =
        text.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (u64::from(pos) << 32) ^ i.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    for _ in 0..2 {
        x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x ^= x >> 32;
    }
    x
}

/// A float in -1..1.
fn unit(noise: u64) -> f32 {
    (noise >> 40) as f32 / (1 << 23) as f32 - 1.0
}

#[track_caller]
fn same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: the answers differ in length");
    if let Some(i) = (0..a.len()).find(|&i| a[i].to_bits() != b[i].to_bits()) {
        panic!("{what}: float {i} of {} is {:?} and {:?}", a.len(), a[i], b[i]);
    }
}

#[track_caller]
fn different(a: &[f32], b: &[f32], what: &str) {
    assert_ne!(a, b, "{what}: the answers must differ");
}

/// A chunk of five rows and two decoded ones, in `slot`; the last answer.
fn story(run: &mut Run, slot: u32, text: u64) -> Vec<f32> {
    run.run(&[], &[piece(slot, text, 0, 5)]);
    run.run(&[], &[piece(slot, text, 5, 1)]);
    run.run(&[], &[piece(slot, text, 6, 1)])
}

fn same_input_gives_same_bits(fresh: Fresh) {
    let (a, b) = (story(&mut fresh(), 0, 1), story(&mut fresh(), 0, 1));
    same_bits(&a, &b, "two stages with the same micro-batches");
    let c = story(&mut fresh(), 2, 1);
    same_bits(&a, &c, "the same sequence in another slot");
}

fn the_past_of_a_slot_matters(fresh: Fresh) {
    let mut a = fresh();
    a.run(&[], &[piece(0, 1, 0, 5)]);
    let mut b = fresh();
    b.run(&[], &[piece(0, 2, 0, 5)]);
    different(&a.run(&[], &[piece(0, 1, 5, 1)]), &b.run(&[], &[piece(0, 1, 5, 1)]), "one row after two pasts");
}

fn outputs_have_the_right_lengths(fresh: Fresh) {
    let mut run = fresh();
    let all = run.run(&[], &[piece(0, 1, 0, 5)]);
    for flags in [[false, true, false, false, true], [false; 5]] {
        let mut run = fresh();
        let mut batch = run.batch(&[], &[piece(0, 1, 0, 5)]);
        batch.rows.iter_mut().zip(flags).for_each(|(row, flag)| row.output = flag);
        // The lengths are checked in there.
        let some = run.send(&batch);
        if run.params.gives_logits {
            let rows = all.chunks_exact(run.params.n_vocab).zip(flags).filter(|(_, flag)| *flag);
            let wanted: Vec<f32> = rows.flat_map(|(row, _)| row.to_vec()).collect();
            let what = "the logits of flagged rows, beside those of all rows";
            let tolerance = run.params.batch_tolerance;
            close(&wanted, &some, tolerance, what);
        } else {
            same_bits(&all, &some, "hidden states come for every row, flagged or not");
        }
    }
}

fn other_epochs_and_steps_are_refused(fresh: Fresh) {
    let wanted = story(&mut fresh(), 0, 1);
    let mut run = fresh();
    run.run(&[], &[piece(0, 1, 0, 5)]);
    run.run(&[], &[piece(0, 1, 5, 1)]);
    let right = run.batch(&[], &[piece(0, 1, 6, 1)]);
    for epoch in [Epoch(EPOCH.0 - 1), EPOCH.next()] {
        let e = run.refuse(&MicroBatch { epoch, ..right.clone() }, "a micro-batch of another epoch");
        assert_eq!(e, StageError::WrongEpoch { want: EPOCH, got: epoch });
    }
    for step in [0, right.step - 1, right.step + 1, u64::MAX] {
        let e = run.refuse(&MicroBatch { step, ..right.clone() }, "a micro-batch out of order");
        assert_eq!(e, StageError::OutOfOrder { want: right.step, got: step });
    }
    same_bits(&wanted, &run.send(&right), "the right micro-batch after refused ones");
    run.refuse(&right, "a micro-batch that came before");
}

fn wrong_micro_batches_are_refused(fresh: Fresh) {
    let wanted = story(&mut fresh(), 0, 1);
    let mut run = fresh();
    run.run(&[], &[piece(0, 1, 0, 5)]);
    run.run(&[], &[piece(0, 1, 5, 1)]);
    let right = run.batch(&[], &[piece(0, 1, 6, 1)]);
    let slot = run.params.slots;
    let width = run.params.width;

    let far = run.batch(&[], &[piece(slot, 1, 0, 1)]);
    run.refuse(&far, "a row of a slot it does not have");
    // The good operation before the bad one must not have been applied.
    for op in [KvOp::Clear { slot }, KvOp::Trim { slot, from: 1 }, KvOp::Copy { from: 0, to: slot }] {
        let batch = MicroBatch { ops: vec![KvOp::Clear { slot: 0 }, op], ..right.clone() };
        run.refuse(&batch, "an operation on a slot it does not have");
    }
    let other = if run.params.takes_tokens { Payload::Hidden(vec![0.5; width]) } else { Payload::Tokens(vec![1]) };
    run.refuse(&MicroBatch { payload: other, ..right.clone() }, "another kind of payload");
    if run.params.takes_tokens {
        for token in [-1, run.params.n_vocab as i32, i32::MAX] {
            if !(0..run.params.n_vocab as i32).contains(&token) {
                let payload = Payload::Tokens(vec![token]);
                run.refuse(&MicroBatch { payload, ..right.clone() }, "a token outside the vocabulary");
            }
        }
    } else {
        let payload = Payload::Hidden(vec![0.5; width + 1]);
        run.refuse(&MicroBatch { payload, ..right.clone() }, "hidden states of another width");
    }
    let mut unordered = run.batch(&[], &[piece(0, 1, 6, 2)]);
    unordered.rows.swap(0, 1);
    run.refuse(&unordered, "rows out of order");

    same_bits(&wanted, &run.send(&right), "the right micro-batch after refused ones");
}

fn a_batch_of_operations_alone_works(fresh: Fresh) {
    let wanted = story(&mut fresh(), 0, 2);
    let mut run = fresh();
    assert_eq!(run.run(&[], &[]), []);
    run.run(&[], &[piece(0, 1, 0, 5)]);
    assert_eq!(run.run(&[KvOp::Clear { slot: 0 }, KvOp::Clear { slot: 1 }], &[]), []);
    same_bits(&wanted, &story(&mut run, 0, 2), "a sequence after a micro-batch that only cleared");
}

fn reset_empties_everything(fresh: Fresh) {
    let wanted = story(&mut fresh(), 1, 2);
    let mut run = fresh();
    story(&mut run, 0, 3);
    story(&mut run, 1, 1);
    let old = run.batch(&[], &[piece(1, 1, 7, 1)]);
    run.reset(EPOCH.next());
    run.refuse(&MicroBatch { step: 0, ..old }, "a micro-batch of the epoch before a reset");
    same_bits(&wanted, &story(&mut run, 1, 2), "a sequence after a reset");
}

fn clear_empties_one_slot(fresh: Fresh) {
    let wanted = story(&mut fresh(), 0, 2);
    let mut alone = fresh();
    story(&mut alone, 1, 3);
    let neighbour = alone.run(&[], &[piece(1, 3, 7, 1)]);

    let mut run = fresh();
    story(&mut run, 1, 3);
    story(&mut run, 0, 1);
    // In band: with the first rows of the slot's next sequence.
    run.run(&[KvOp::Clear { slot: 0 }], &[piece(0, 2, 0, 5)]);
    run.run(&[], &[piece(0, 2, 5, 1)]);
    same_bits(&wanted, &run.run(&[], &[piece(0, 2, 6, 1)]), "a sequence in a slot that was cleared");
    same_bits(&neighbour, &run.run(&[], &[piece(1, 3, 7, 1)]), "a sequence beside a slot that was cleared");
}

fn slots_are_independent(fresh: Fresh) {
    let wanted = [0, 1, 2].map(|slot| story(&mut fresh(), slot, 10 + u64::from(slot)));
    let mut run = fresh();
    for (from, count) in [(0, 5), (5, 1)] {
        for slot in [2, 0, 1] {
            run.run(&[], &[piece(slot, 10 + u64::from(slot), from, count)]);
        }
    }
    for slot in [1, 2, 0] {
        let got = run.run(&[], &[piece(slot, 10 + u64::from(slot), 6, 1)]);
        same_bits(&wanted[slot as usize], &got, "a sequence beside others, each in micro-batches of its own");
    }
}

fn slots_decode_together(fresh: Fresh) {
    // Different lengths and not neighbouring: the case where rows came back in another order than they went in.
    let texts = [(0, 10, 5), (2, 12, 7)];
    let alone: Vec<f32> = texts
        .iter()
        .flat_map(|&(slot, text, len)| {
            let mut run = fresh();
            run.run(&[], &[piece(slot, text, 0, len)]);
            run.run(&[], &[piece(slot, text, len, 1)])
        })
        .collect();
    let mut run = fresh();
    for (slot, text, len) in texts {
        run.run(&[], &[piece(slot, text, 0, len)]);
    }
    let together = run.run(&[], &texts.map(|(slot, text, len)| piece(slot, text, len, 1)));
    let tolerance = run.params.batch_tolerance;
    close(&alone, &together, tolerance, "two sequences decoded in one micro-batch, beside each decoded alone");
}

fn copy_copies(fresh: Fresh) {
    let (wanted, other) = (story(&mut fresh(), 0, 1), {
        let mut run = fresh();
        run.run(&[], &[piece(0, 1, 0, 5)]);
        run.run(&[], &[piece(0, 2, 5, 1)]);
        run.run(&[], &[piece(0, 2, 6, 1)])
    });
    let mut run = fresh();
    run.run(&[], &[piece(0, 1, 0, 5)]);
    // The copy goes another way, and neither feels the other.
    run.run(&[KvOp::Copy { from: 0, to: 2 }], &[piece(2, 2, 5, 1)]);
    run.run(&[], &[piece(0, 1, 5, 1)]);
    same_bits(&wanted, &run.run(&[], &[piece(0, 1, 6, 1)]), "a sequence that was copied from");
    same_bits(&other, &run.run(&[], &[piece(2, 2, 6, 1)]), "a sequence that goes on from a copy");
    run.run(&[KvOp::Clear { slot: 2 }, KvOp::Copy { from: 0, to: 2 }, KvOp::Clear { slot: 0 }], &[]);
    let mut long = fresh();
    story(&mut long, 0, 1);
    let next = long.run(&[], &[piece(0, 1, 7, 1)]);
    same_bits(&next, &run.run(&[], &[piece(2, 1, 7, 1)]), "a copy whose source was cleared");
}

fn trim_trims(fresh: Fresh) {
    let mut plain = fresh();
    plain.run(&[], &[piece(0, 1, 0, 4)]);
    plain.run(&[], &[piece(0, 2, 4, 1)]);
    let wanted = plain.run(&[], &[piece(0, 2, 5, 1)]);
    let mut run = fresh();
    run.run(&[], &[piece(0, 1, 0, 4)]);
    run.run(&[], &[piece(0, 1, 4, 1)]);
    run.run(&[], &[piece(0, 1, 5, 1)]);
    run.run(&[KvOp::Trim { slot: 0, from: 4 }], &[piece(0, 2, 4, 1)]);
    same_bits(&wanted, &run.run(&[], &[piece(0, 2, 5, 1)]), "a sequence that was trimmed and went another way");
}

#[track_caller]
fn close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}: the answers differ in length");
    let largest = a.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    if let Some(i) = (0..a.len()).find(|&i| (a[i] - b[i]).abs() > tolerance * largest) {
        panic!("{what}: float {i} of {} is {:?} and {:?}, the largest {largest}", a.len(), a[i], b[i]);
    }
}
