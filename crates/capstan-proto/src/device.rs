//! What a machine was measured to take, with the very kernels that serve: the device profile.
//!
//! Whole numbers, so that it compares and travels exactly: a femtosecond is 10⁻¹⁵ s. A core reads and multiplies a weight
//! of four bits in about 100,000 of them, a large graphics card in less than 1,000.
use serde::{Deserialize, Serialize};

use crate::control::OutOfBounds;

/// Most types of weights in a profile: more than ggml has.
pub const TYPES_MAX: usize = 64;
/// Most sizes of micro-batches for which something is measured.
pub const POINTS_MAX: usize = 24;
/// Longest text that tells hardware apart, in bytes.
pub const HARDWARE_BYTES_MAX: usize = 512;
/// Longest time that is believed of anything in a profile: a second, in femtoseconds.
const FS_MAX: u64 = 1_000_000_000_000_000;

/// How long something takes for a micro-batch of so many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Rows of the micro-batch.
    pub rows: u32,
    /// Femtoseconds for all of them.
    pub fs: u64,
}

/// Multiplying with weights of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeCurve {
    /// ggml's number of the type.
    pub ggml_type: u32,
    /// Per weight, ascending in rows: reading it from main memory and unpacking it once, multiplying it with every row.
    pub per_weight: Vec<Point>,
    /// The same for weights that the last-level cache holds.
    pub per_cached_weight: Vec<Point>,
    /// Whether they are held in memory of their own beside the mapped file: rearranged, or on a device.
    pub copied: bool,
}

/// How much caches help with a working set: all that is read again and again, weights and KV cache alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Its size.
    pub bytes: u64,
    /// Of what reading from main memory takes more than reading from a cache, so much is felt: 0 to 1000 thousandths.
    pub uncached_permille: u16,
}

/// What a machine takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProfile {
    /// What it was measured on: processor, devices, threads and the build. Another text asks for another measurement.
    pub hardware: String,
    /// By type of weights.
    pub types: Vec<TypeCurve>,
    /// What caches hold of working sets, ascending in bytes. Below the first nothing comes from main memory, above the last
    /// all does.
    pub working_sets: Vec<WorkingSet>,
    /// What a layer takes beside its weights and attention for rows of one sequence, ascending in rows: norms,
    /// activations, starting its operations.
    pub per_layer: Vec<Point>,
    /// The same for so many sequences with a row each, whose attention cannot be computed together.
    pub per_decode_layer: Vec<Point>,
    /// Floats of a hidden state for which these were measured.
    pub layer_width: u32,
    /// Of attention in decode, for one multiplication or addition, in femtoseconds.
    pub attention_decode_fs: u64,
    /// The same in a prompt's chunks.
    pub attention_chunk_fs: u64,
    /// To take a token's logits out and draw one at temperature 1, for an entry of the vocabulary, in femtoseconds.
    pub logit_fs: u64,
    /// From one compute thread to another over this machine's loopback: half a round trip of one row, in nanoseconds.
    pub hop_ns: u32,
    /// The last-level cache as the system tells it, in bytes, for people; 0 where it does not, or a device computes that has
    /// its own.
    pub cache_bytes: u64,
    /// What a compute process holds beside its model and buffers, in bytes; 0 where the system does not tell.
    pub process_bytes: u64,
    /// What the disk below the data folder reads in a row, past the page cache, in bytes per second; 0 where that could not
    /// be measured.
    pub disk_bytes_per_s: u64,
    /// How long the measurement took, in milliseconds.
    pub took_ms: u32,
    /// When it was made, in seconds since 1970.
    pub measured_unix_s: u64,
}

impl DeviceProfile {
    /// Refuses what no measurement gives. For profiles from elsewhere.
    pub fn check(&self) -> Result<(), OutOfBounds> {
        let points = |points: &[Point]| {
            let ascend = points.windows(2).all(|w| w[0].rows < w[1].rows);
            let sane = points.iter().all(|p| p.rows > 0 && p.fs > 0 && p.fs <= FS_MAX);
            !points.is_empty() && points.len() <= POINTS_MAX && ascend && sane
        };
        if self.hardware.len() > HARDWARE_BYTES_MAX || self.types.is_empty() || self.types.len() > TYPES_MAX {
            return Err(OutOfBounds("the number of types in a device profile"));
        }
        let curves = self.types.iter().all(|t| points(&t.per_weight) && points(&t.per_cached_weight));
        let fs = [self.attention_decode_fs, self.attention_chunk_fs, self.logit_fs];
        let single = fs.iter().all(|fs| (1..=FS_MAX).contains(fs));
        let layers = points(&self.per_layer) && points(&self.per_decode_layer);
        if !curves || !layers || !single || self.layer_width == 0 {
            return Err(OutOfBounds("a time in a device profile"));
        }
        let sets = &self.working_sets;
        let ascend = sets.windows(2).all(|w| w[0].bytes < w[1].bytes);
        if sets.len() > POINTS_MAX || !ascend || sets.iter().any(|s| s.uncached_permille > 1000) {
            return Err(OutOfBounds("a working set in a device profile"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> DeviceProfile {
        let point = |rows| Point { rows, fs: 100_000 };
        DeviceProfile {
            types: vec![TypeCurve {
                ggml_type: 12,
                per_weight: vec![point(1), point(2)],
                per_cached_weight: vec![point(1)],
                copied: true,
            }],
            per_layer: vec![point(1)],
            per_decode_layer: vec![point(1)],
            layer_width: 1024,
            attention_decode_fs: 1,
            attention_chunk_fs: 1,
            logit_fs: 1,
            ..DeviceProfile::default()
        }
    }

    #[test]
    fn what_no_measurement_gives_is_refused() {
        assert!(profile().check().is_ok());
        let wrong: [fn(&mut DeviceProfile); 9] = [
            |p| p.types.clear(),
            |p| p.types = vec![p.types[0].clone(); TYPES_MAX + 1],
            |p| p.types[0].per_weight.reverse(),
            |p| p.per_layer[0].fs = u64::MAX,
            |p| p.attention_chunk_fs = 0,
            |p| p.logit_fs = 0,
            |p| p.per_decode_layer.clear(),
            |p| p.working_sets = vec![WorkingSet { bytes: 1, uncached_permille: 1001 }],
            |p| p.hardware = "x".repeat(HARDWARE_BYTES_MAX + 1),
        ];
        for (i, spoil) in wrong.iter().enumerate() {
            let mut p = profile();
            spoil(&mut p);
            assert!(p.check().is_err(), "case {i}");
        }
    }
}
