//! The ggml tensor types: number, name, elements a block and bytes a block.

/// One tensor type of ggml.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgmlType {
    /// ggml's number, as stored in files.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements in a block; a row is a whole number of blocks.
    pub block_elements: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// Number of `f32`.
pub const F32: u32 = 0;
/// Number of `f16`.
pub const F16: u32 = 1;
/// Number of `i32`.
pub const I32: u32 = 26;

const fn t(id: u32, name: &'static str, block_elements: u64, block_bytes: u64) -> GgmlType {
    GgmlType { id, name, block_elements, block_bytes }
}

/// Every type that ggml has today. Numbers that are missing were withdrawn and are refused, as ggml does.
const TYPES: &[GgmlType] = &[
    t(F32, "f32", 1, 4),
    t(F16, "f16", 1, 2),
    t(2, "q4_0", 32, 2 + 16),
    t(3, "q4_1", 32, 4 + 16),
    t(6, "q5_0", 32, 2 + 4 + 16),
    t(7, "q5_1", 32, 4 + 4 + 16),
    t(8, "q8_0", 32, 2 + 32),
    t(9, "q8_1", 32, 4 + 32),
    t(10, "q2_K", 256, 4 + 16 + 64),
    t(11, "q3_K", 256, 2 + 64 + 32 + 12),
    t(12, "q4_K", 256, 4 + 12 + 128),
    t(13, "q5_K", 256, 4 + 12 + 128 + 32),
    t(14, "q6_K", 256, 2 + 16 + 192),
    t(15, "q8_K", 256, 4 + 256 + 32),
    t(16, "iq2_xxs", 256, 2 + 64),
    t(17, "iq2_xs", 256, 2 + 64 + 8),
    t(18, "iq3_xxs", 256, 2 + 96),
    t(19, "iq1_s", 256, 2 + 32 + 16),
    t(20, "iq4_nl", 32, 2 + 16),
    t(21, "iq3_s", 256, 2 + 104 + 4),
    t(22, "iq2_s", 256, 2 + 64 + 16),
    t(23, "iq4_xs", 256, 2 + 2 + 4 + 128),
    t(24, "i8", 1, 1),
    t(25, "i16", 1, 2),
    t(I32, "i32", 1, 4),
    t(27, "i64", 1, 8),
    t(28, "f64", 1, 8),
    t(29, "iq1_m", 256, 32 + 16 + 8),
    t(30, "bf16", 1, 2),
    t(34, "tq1_0", 256, 2 + 4 + 48),
    t(35, "tq2_0", 256, 2 + 64),
    t(39, "mxfp4", 32, 1 + 16),
    t(40, "nvfp4", 64, 4 + 32),
    t(41, "q1_0", 128, 2 + 16),
    t(42, "q2_0", 64, 2 + 16),
];

/// The type with this number, if ggml has it.
pub fn ggml_type(id: u32) -> Option<GgmlType> {
    TYPES.iter().copied().find(|t| t.id == id)
}

/// Bytes of a row of `elements`, if the type exists, the row is a whole number of blocks and the product fits.
pub fn row_bytes(id: u32, elements: u64) -> Option<u64> {
    let t = ggml_type(id)?;
    if !elements.is_multiple_of(t.block_elements) {
        return None;
    }
    (elements / t.block_elements).checked_mul(t.block_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_match_the_known_bits_per_weight() {
        // Two that people quote: Q4_K is 4.5 bits, Q6_K 6.5625 bits a weight.
        assert_eq!(row_bytes(12, 256), Some(144));
        assert_eq!(row_bytes(14, 256), Some(210));
        assert_eq!(row_bytes(12, 100), None, "not a whole number of blocks");
        assert_eq!(row_bytes(4, 32), None, "withdrawn");
        assert_eq!(row_bytes(28, u64::MAX), None, "overflow");
        assert!(TYPES.is_sorted_by_key(|t| t.id));
    }
}
