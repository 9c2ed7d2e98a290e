//! What travels through the pipeline: micro-batches, with the KV operations that precede them in band.
//!
//! A frame is a postcard header and then the hidden states as raw little-endian `f32`, so that megabytes are copied
//! once and not walked by a serializer. The dtype is `f32`: bit-exact.
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError, PREFIX};
use crate::{Epoch, limits};

/// Version of the data protocol; both ends of a link must speak the same.
pub const DATA_VERSION: u32 = 1;
/// ALPN of the links between stages.
pub const DATA_ALPN: &[u8] = b"capstan/data/1";

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

#[derive(Serialize, Deserialize)]
struct Header {
    epoch: Epoch,
    step: u64,
    ops: Vec<KvOp>,
    rows: Vec<Row>,
    /// Floats per row.
    width: u32,
}

/// Why a micro-batch was refused.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The frame itself is bad.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The frame decodes but breaks a rule of this module.
    #[error("a micro-batch is malformed: {0}; the link is closed")]
    Malformed(&'static str),
}

impl MicroBatch {
    /// Checks the order of rows and every bound.
    pub fn check(&self) -> Result<(), DataError> {
        let bad = |m| Err(DataError::Malformed(m));
        if self.rows.len() > limits::ROWS_MAX {
            return bad("too many rows");
        }
        if self.ops.len() > limits::KV_OPS_MAX {
            return bad("too many KV operations");
        }
        let op_slots = self.ops.iter().flat_map(|op| match *op {
            KvOp::Clear { slot } | KvOp::Trim { slot, .. } => [slot, slot],
            KvOp::Copy { from, to } => [from, to],
        });
        if op_slots.chain(self.rows.iter().map(|r| r.slot)).any(|s| s >= limits::SLOTS_MAX) {
            return bad("a slot is out of range");
        }
        for pair in self.rows.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            let in_order = if a.slot == b.slot { a.pos.checked_add(1) == Some(b.pos) } else { a.slot < b.slot };
            if !in_order {
                return bad("rows are not in order");
            }
        }
        match &self.payload {
            Payload::Tokens(t) if t.len() != self.rows.len() => bad("one token a row is wanted"),
            Payload::Hidden(h) if self.rows.is_empty() && !h.is_empty() => bad("hidden states without rows"),
            Payload::Hidden(h) if !self.rows.is_empty() && (h.is_empty() || h.len() % self.rows.len() != 0) => {
                bad("hidden states do not divide into rows")
            }
            _ => Ok(()),
        }
    }

    /// The frame of a micro-batch with hidden states: prefix, header length, header, floats.
    pub fn encode(&self) -> Result<Vec<u8>, DataError> {
        self.check()?;
        let Payload::Hidden(hidden) = &self.payload else {
            return Err(DataError::Malformed("tokens do not travel between stages"));
        };
        let width = if self.rows.is_empty() { 0 } else { hidden.len() / self.rows.len() };
        if width > limits::HIDDEN_WIDTH_MAX {
            return Err(DataError::Malformed("a hidden state is too wide"));
        }
        let header = Header {
            epoch: self.epoch,
            step: self.step,
            ops: self.ops.clone(),
            rows: self.rows.clone(),
            width: width as u32,
        };
        let header = codec::encode(&header, limits::MESSAGE_BYTES_MAX)?;
        let len = header.len() + hidden.len() * 4;
        if len > limits::DATA_BYTES_MAX {
            return Err(CodecError::TooLarge { len, max: limits::DATA_BYTES_MAX }.into());
        }
        let mut out = Vec::with_capacity(PREFIX + len);
        out.extend_from_slice(&(len as u32).to_le_bytes());
        out.extend_from_slice(&header);
        out.extend(hidden.iter().flat_map(|x| x.to_le_bytes()));
        Ok(out)
    }

    /// The micro-batch in a frame's body (without the outer prefix).
    pub fn decode(body: &[u8]) -> Result<Self, DataError> {
        let bad = DataError::Malformed;
        let (prefix, rest) = body.split_first_chunk::<PREFIX>().ok_or(bad("no header"))?;
        let header_len = codec::frame_len(*prefix, limits::MESSAGE_BYTES_MAX)?;
        if header_len > rest.len() {
            return Err(bad("the header is cut off"));
        }
        let (header, floats) = rest.split_at(header_len);
        let h: Header = codec::decode(header)?;
        let width = h.width as usize;
        if width > limits::HIDDEN_WIDTH_MAX || h.rows.len() > limits::ROWS_MAX {
            return Err(bad("too wide or too many rows"));
        }
        if floats.len() != h.rows.len() * width * 4 {
            return Err(bad("the hidden states have another length than announced"));
        }
        let hidden = floats.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        let batch = Self { epoch: h.epoch, step: h.step, ops: h.ops, rows: h.rows, payload: Payload::Hidden(hidden) };
        batch.check()?;
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let frame = b.encode().unwrap();
        assert_eq!(MicroBatch::decode(&frame[PREFIX..]).unwrap(), b);
    }

    #[test]
    fn malformed_frames_are_refused() {
        let frame = batch().encode().unwrap();
        for cut in PREFIX..frame.len() {
            assert!(MicroBatch::decode(&frame[PREFIX..cut]).is_err(), "cut at {cut}");
        }
        let mut unordered = batch();
        unordered.rows.swap(0, 1);
        assert!(unordered.encode().is_err());
        let mut ragged = batch();
        ragged.payload = Payload::Hidden(vec![0.0; 7]);
        assert!(ragged.encode().is_err());
        let mut far = batch();
        far.rows[2].slot = limits::SLOTS_MAX;
        assert!(far.encode().is_err());
    }
}
