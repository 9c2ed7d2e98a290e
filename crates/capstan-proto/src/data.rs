//! What travels through the pipeline: micro-batches, with the KV operations that precede them in band, and drop notices
//! that overtake them.
//!
//! A micro-batch's frame is a postcard header and then the hidden states as raw little-endian `f32`, so that megabytes
//! are copied once and not walked by a serializer. The dtype is `f32`: bit-exact.
use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError, PREFIX};
use crate::{Epoch, limits};

/// Version of the data protocol; both ends of a link must speak the same.
pub const DATA_VERSION: u32 = 2;
/// ALPN of the links between stages.
pub const DATA_ALPN: &[u8] = b"capstan/data/2";

/// The first frame of a link, sent by the stage that dials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataHello {
    /// [`DATA_VERSION`].
    pub version: u32,
    /// The deployment both stages belong to.
    pub deployment: crate::DeploymentId,
    /// The epoch whose micro-batches will follow.
    pub epoch: Epoch,
    /// Index of the stage that dials.
    pub from_stage: u16,
}

/// One row of a micro-batch: one token of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The sequence's place in every stage's KV cache.
    pub slot: u32,
    /// Position of the token in its sequence, from 0.
    pub pos: u32,
    /// Whether the last stage computes logits for it.
    pub output: bool,
}

/// An operation on the KV cache. Every stage applies the same ones in the same order, in band.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvOp {
    /// Forget a slot's whole sequence.
    Clear {
        /// Which.
        slot: u32,
    },
    /// Forget a slot's positions from `from` on. Only right for plain KV (design §3).
    Trim {
        /// Which.
        slot: u32,
        /// First position to forget.
        from: u32,
    },
    /// Let `to` (which must be empty) hold a copy of `from`'s whole sequence.
    Copy {
        /// Source.
        from: u32,
        /// Target.
        to: u32,
    },
    /// Write what a slot holds, once this micro-batch's rows are computed, to a KV snapshot of this mark, which is one
    /// of its own for each. Where that cannot be done nothing happens.
    Save {
        /// Which.
        slot: u32,
        /// By which the snapshot is asked for.
        mark: u64,
    },
    /// Fill an empty slot from the snapshot of this mark, before any row of the epoch. A stage that cannot sends a
    /// [`KvOp::Clear`] of the slot on in its place, so that the driver learns of it.
    Restore {
        /// Which.
        slot: u32,
        /// Of which snapshot.
        mark: u64,
    },
}

/// How rows that were computed in vain are taken back from a model's memory of a sequence (design §3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rollback {
    /// Plain KV: [`KvOp::Trim`].
    #[default]
    Trim,
    /// Recurrent state cannot be trimmed: [`KvOp::Copy`] to a spare sequence before each guess, and back.
    Copy,
    /// Neither is right: nothing is guessed and no prefix is reused.
    None,
}

/// What a stage computes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// Token ids, one a row: only where one stage is the whole model.
    Tokens(Vec<i32>),
    /// Hidden states, row after row.
    Hidden(Vec<f32>),
}

/// A piece of work for a stage.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// Placement it belongs to; any other is refused.
    pub epoch: Epoch,
    /// Counts micro-batches within the epoch, from 0, without gaps.
    pub step: u64,
    /// Applied before the rows.
    pub ops: Vec<KvOp>,
    /// Sequence-major: rows of a slot are consecutive with ascending positions, slots ascend.
    pub rows: Vec<Row>,
    /// One token or one hidden state a row.
    pub payload: Payload,
}

/// A micro-batch on its way, with what the stages before say of it.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchFrame {
    /// What is to be computed.
    pub batch: MicroBatch,
    /// How long each stage so far has computed on it, in microseconds, stage 0 first; 0 where it was void.
    pub stage_us: Vec<u32>,
}

/// These steps need not be computed any more, wherever they are: their operations are applied, their rows are not
/// computed, and they travel on without rows.
///
/// A notice has a lane of its own on each link, so that it overtakes the micro-batches it names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropNotice {
    /// Placement the steps belong to.
    pub epoch: Epoch,
    /// Which, ascending; at most [`limits::IN_FLIGHT_MAX`].
    pub steps: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct Header<'a> {
    epoch: Epoch,
    step: u64,
    ops: Cow<'a, [KvOp]>,
    rows: Cow<'a, [Row]>,
    /// Floats per row.
    width: u32,
    stage_us: Cow<'a, [u32]>,
}

/// Why a frame was refused.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The frame itself is bad.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The frame decodes but breaks a rule of this module.
    #[error("a frame of the pipeline is malformed: {0}; the link is closed")]
    Malformed(&'static str),
}

impl MicroBatch {
    /// Checks the order of rows and every bound.
    pub fn check(&self) -> Result<(), DataError> {
        check_rows(&self.ops, &self.rows)?;
        let bad = |m| Err(DataError::Malformed(m));
        match &self.payload {
            Payload::Tokens(t) if t.len() != self.rows.len() => bad("one token a row is wanted"),
            Payload::Hidden(h) => width_of(&self.rows, h).map(|_| ()),
            Payload::Tokens(_) => Ok(()),
        }
    }

    /// This step without its rows: what is left of a micro-batch that need not be computed.
    pub fn without_rows(self) -> Self {
        let payload = match self.payload {
            Payload::Tokens(_) => Payload::Tokens(Vec::new()),
            Payload::Hidden(_) => Payload::Hidden(Vec::new()),
        };
        Self { rows: Vec::new(), payload, ..self }
    }

    /// The frame of a micro-batch with hidden states; see [`MicroBatch::encode_hidden`].
    pub fn encode(&self, stage_us: &[u32]) -> Result<Vec<u8>, DataError> {
        match &self.payload {
            Payload::Hidden(hidden) => self.encode_hidden(hidden, stage_us),
            Payload::Tokens(_) => Err(DataError::Malformed("tokens do not travel between stages")),
        }
    }

    /// The frame of this step with other hidden states than its own: those that a stage has just computed. Prefix,
    /// header length, header, floats; the floats are copied once.
    pub fn encode_hidden(&self, hidden: &[f32], stage_us: &[u32]) -> Result<Vec<u8>, DataError> {
        check_rows(&self.ops, &self.rows)?;
        let width = width_of(&self.rows, hidden)?;
        if width > limits::HIDDEN_WIDTH_MAX {
            return Err(DataError::Malformed("a hidden state is too wide"));
        }
        if stage_us.len() > limits::LAYERS_MAX as usize {
            return Err(DataError::Malformed("more stages have computed than there can be"));
        }
        let header = Header {
            epoch: self.epoch,
            step: self.step,
            ops: Cow::Borrowed(&self.ops),
            rows: Cow::Borrowed(&self.rows),
            width: width as u32,
            stage_us: Cow::Borrowed(stage_us),
        };
        let header = codec::encode(&header, limits::DATA_HEADER_BYTES_MAX)?;
        let len = header.len() + size_of_val(hidden);
        if len > limits::DATA_BYTES_MAX {
            return Err(CodecError::TooLarge { len, max: limits::DATA_BYTES_MAX }.into());
        }
        let mut out = vec![0; PREFIX + len];
        let (head, floats) = out.split_at_mut(PREFIX + header.len());
        head[..PREFIX].copy_from_slice(&(len as u32).to_le_bytes());
        head[PREFIX..].copy_from_slice(&header);
        floats.as_chunks_mut::<4>().0.iter_mut().zip(hidden).for_each(|(to, x)| *to = x.to_le_bytes());
        Ok(out)
    }
}

impl BatchFrame {
    /// The micro-batch in a frame's body (without the outer prefix).
    pub fn decode(body: &[u8]) -> Result<Self, DataError> {
        let bad = DataError::Malformed;
        let (prefix, rest) = body.split_first_chunk::<PREFIX>().ok_or(bad("no header"))?;
        let header_len = codec::frame_len(*prefix, limits::DATA_HEADER_BYTES_MAX)?;
        let (header, floats) = rest.split_at_checked(header_len).ok_or(bad("the header is cut off"))?;
        let h: Header = codec::decode(header)?;
        let width = h.width as usize;
        if width > limits::HIDDEN_WIDTH_MAX || h.rows.len() > limits::ROWS_MAX {
            return Err(bad("too wide or too many rows"));
        }
        if h.stage_us.len() > limits::LAYERS_MAX as usize {
            return Err(bad("more stages have computed than there can be"));
        }
        if floats.len() != h.rows.len() * width * size_of::<f32>() {
            return Err(bad("the hidden states have another length than announced"));
        }
        let hidden = floats.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        let batch = MicroBatch {
            epoch: h.epoch,
            step: h.step,
            ops: h.ops.into_owned(),
            rows: h.rows.into_owned(),
            payload: Payload::Hidden(hidden),
        };
        batch.check()?;
        Ok(Self { batch, stage_us: h.stage_us.into_owned() })
    }
}

impl DropNotice {
    /// The frame of a notice.
    pub fn encode(&self) -> Result<Vec<u8>, DataError> {
        self.check()?;
        Ok(codec::encode(self, limits::NOTICE_BYTES_MAX)?)
    }

    /// The notice in a frame's body (without the prefix).
    pub fn decode(body: &[u8]) -> Result<Self, DataError> {
        if body.len() > limits::NOTICE_BYTES_MAX {
            return Err(CodecError::TooLarge { len: body.len(), max: limits::NOTICE_BYTES_MAX }.into());
        }
        let notice: Self = codec::decode(body)?;
        notice.check()?;
        Ok(notice)
    }

    fn check(&self) -> Result<(), DataError> {
        if self.steps.is_empty() || self.steps.len() > limits::IN_FLIGHT_MAX {
            return Err(DataError::Malformed("a drop notice names no step, or more than can be under way"));
        }
        if !self.steps.is_sorted_by(|a, b| a < b) {
            return Err(DataError::Malformed("a drop notice names its steps out of order"));
        }
        Ok(())
    }
}

fn check_rows(ops: &[KvOp], rows: &[Row]) -> Result<(), DataError> {
    let bad = |m| Err(DataError::Malformed(m));
    if rows.len() > limits::ROWS_MAX {
        return bad("too many rows");
    }
    if ops.len() > limits::KV_OPS_MAX {
        return bad("too many KV operations");
    }
    let op_slots = ops.iter().flat_map(|op| match *op {
        KvOp::Clear { slot } | KvOp::Trim { slot, .. } => [slot, slot],
        KvOp::Copy { from, to } => [from, to],
        KvOp::Save { slot, .. } | KvOp::Restore { slot, .. } => [slot, slot],
    });
    if op_slots.chain(rows.iter().map(|r| r.slot)).any(|s| s >= limits::SLOTS_MAX) {
        return bad("a slot is out of range");
    }
    for pair in rows.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let in_order = if a.slot == b.slot { a.pos.checked_add(1) == Some(b.pos) } else { a.slot < b.slot };
        if !in_order {
            return bad("rows are not in order");
        }
    }
    Ok(())
}

/// Floats per row, which must be the same for each.
fn width_of(rows: &[Row], hidden: &[f32]) -> Result<usize, DataError> {
    match (rows.len(), hidden.len()) {
        (0, 0) => Ok(0),
        (0, _) => Err(DataError::Malformed("hidden states without rows")),
        (rows, floats) if floats == 0 || floats % rows != 0 => {
            Err(DataError::Malformed("hidden states do not divide into rows"))
        }
        (rows, floats) => Ok(floats / rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch() -> MicroBatch {
        MicroBatch {
            epoch: Epoch(3),
            step: 9,
            ops: vec![KvOp::Clear { slot: 1 }, KvOp::Trim { slot: 0, from: 4 }],
            rows: [(0, 4), (0, 5), (1, 0)].map(|(slot, pos)| Row { slot, pos, output: pos == 5 }).to_vec(),
            payload: Payload::Hidden((0..6).map(|i| i as f32 * 0.1).collect()),
        }
    }

    #[test]
    fn round_trip_is_bit_exact() {
        let mut b = batch();
        b.payload = Payload::Hidden(vec![f32::MIN_POSITIVE / 2.0, -0.0, 1.0e-38, f32::MAX, 0.1, -7.25]);
        let frame = b.encode(&[17, 0, u32::MAX]).unwrap();
        assert_eq!(codec::frame_len(frame[..PREFIX].try_into().unwrap(), usize::MAX).unwrap(), frame.len() - PREFIX);
        let back = BatchFrame::decode(&frame[PREFIX..]).unwrap();
        assert_eq!((back.batch, &back.stage_us[..]), (b, &[17, 0, u32::MAX][..]));
    }

    #[test]
    fn a_void_micro_batch_keeps_its_step_and_operations() {
        let void = batch().without_rows();
        assert_eq!((void.step, &void.ops, void.rows.len()), (9, &batch().ops, 0));
        let back = BatchFrame::decode(&void.encode(&[0]).unwrap()[PREFIX..]).unwrap();
        assert_eq!(back.batch, void);
    }

    #[test]
    fn a_stages_own_hidden_states_replace_those_that_came() {
        let frame = batch().encode_hidden(&[0.5; 9], &[1]).unwrap();
        let back = BatchFrame::decode(&frame[PREFIX..]).unwrap();
        assert_eq!(back.batch, MicroBatch { payload: Payload::Hidden(vec![0.5; 9]), ..batch() });
        assert!(batch().encode_hidden(&[0.5; 8], &[]).is_err(), "not the same number for each row");
        assert!(batch().encode_hidden(&[], &[]).is_err(), "rows without hidden states");
        assert!(batch().without_rows().encode_hidden(&[0.5], &[]).is_err(), "hidden states without rows");
    }

    #[test]
    fn malformed_frames_are_refused() {
        let frame = batch().encode(&[1, 2]).unwrap();
        for cut in PREFIX..frame.len() {
            assert!(BatchFrame::decode(&frame[PREFIX..cut]).is_err(), "cut at {cut}");
        }
        let mut unordered = batch();
        unordered.rows.swap(0, 1);
        assert!(unordered.encode(&[]).is_err());
        let mut ragged = batch();
        ragged.payload = Payload::Hidden(vec![0.0; 7]);
        assert!(ragged.encode(&[]).is_err());
        let mut far = batch();
        far.rows[2].slot = limits::SLOTS_MAX;
        assert!(far.encode(&[]).is_err());
        assert!(batch().encode(&[0; limits::LAYERS_MAX as usize + 1]).is_err());
        assert!(MicroBatch { payload: Payload::Tokens(vec![1; 3]), ..batch() }.encode(&[]).is_err());
    }

    #[test]
    fn a_header_that_lies_is_refused_before_anything_is_allocated_for_it() {
        let huge = [&u32::MAX.to_le_bytes()[..], &[0; 64]].concat();
        assert!(matches!(BatchFrame::decode(&huge), Err(DataError::Codec(CodecError::TooLarge { .. }))));
        let header = |rows: u32, width: u32, stages: u32| {
            let rows: Vec<Row> = (0..rows).map(|pos| Row { slot: 0, pos, output: false }).collect();
            let header = Header {
                epoch: Epoch(1),
                step: 0,
                ops: Cow::Borrowed(&[]),
                rows: rows.into(),
                width,
                stage_us: vec![0; stages as usize].into(),
            };
            codec::encode(&header, usize::MAX).unwrap()
        };
        assert!(BatchFrame::decode(&header(0, 0, 2)).is_ok());
        assert!(BatchFrame::decode(&header(1, limits::HIDDEN_WIDTH_MAX as u32 + 1, 0)).is_err());
        assert!(BatchFrame::decode(&header(1, 1, 0)).is_err(), "a float is missing");
        assert!(BatchFrame::decode(&header(limits::ROWS_MAX as u32 + 1, 0, 0)).is_err());
        assert!(BatchFrame::decode(&header(0, 0, limits::LAYERS_MAX + 1)).is_err());
    }

    #[test]
    fn notices_are_bounded_and_in_order() {
        let notice = |steps: Vec<u64>| DropNotice { epoch: Epoch(2), steps };
        let good = notice(vec![3, 4, u64::MAX]);
        let frame = good.encode().unwrap();
        assert_eq!(DropNotice::decode(&frame[PREFIX..]).unwrap(), good);
        for cut in PREFIX..frame.len() {
            assert!(DropNotice::decode(&frame[PREFIX..cut]).is_err(), "cut at {cut}");
        }
        let longest = notice((u64::MAX - limits::IN_FLIGHT_MAX as u64 + 1..=u64::MAX).collect());
        assert!(longest.encode().is_ok(), "the largest honest notice fits its bound in bytes");
        for steps in [vec![], vec![4, 3], vec![3, 3], (0..=limits::IN_FLIGHT_MAX as u64).collect()] {
            let bad = notice(steps);
            assert!(bad.encode().is_err());
            assert!(DropNotice::decode(&codec::encode(&bad, usize::MAX).unwrap()[PREFIX..]).is_err());
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = BatchFrame::decode(&bytes) {
                prop_assert!(frame.batch.check().is_ok());
            }
            if let Ok(notice) = DropNotice::decode(&bytes) {
                prop_assert!(notice.encode().is_ok());
            }
        }

        #[test]
        fn a_changed_byte_is_another_frame_or_an_error(at in 0usize..200, to in any::<u8>()) {
            let mut frame = batch().encode(&[5, 6]).unwrap();
            let at = PREFIX + at % (frame.len() - PREFIX);
            frame[at] = to;
            if let Ok(back) = BatchFrame::decode(&frame[PREFIX..]) {
                prop_assert!(back.batch.check().is_ok() && back.stage_us.len() <= limits::LAYERS_MAX as usize);
            }
        }

        #[test]
        fn honest_frames_come_back(
            step in any::<u64>(),
            slots in prop::collection::btree_set(0..limits::SLOTS_MAX, 0..6),
            width in 1usize..9,
            stage_us in prop::collection::vec(any::<u32>(), 0..5),
            bits in any::<u32>(),
        ) {
            let rows: Vec<Row> = slots.iter().map(|&slot| Row { slot, pos: slot * 3, output: slot % 2 == 0 }).collect();
            let ops = slots.iter().flat_map(|&slot| [KvOp::Clear { slot }, KvOp::Copy { from: slot, to: 0 }]).collect();
            let finite = f32::from_bits(bits & 0xbfff_ffff);
            let payload = Payload::Hidden(vec![finite; rows.len() * width]);
            let batch = MicroBatch { epoch: Epoch(1), step, ops, rows, payload };
            let back = BatchFrame::decode(&batch.encode(&stage_us).unwrap()[PREFIX..]).unwrap();
            prop_assert_eq!(back, BatchFrame { batch, stage_us });
        }
    }
}
