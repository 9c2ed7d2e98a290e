//! An embedding row from a quantised tensor, bit for bit as ggml's own `get_rows` reads it.
//!
//! The first stage is fed with hidden states, so whoever holds the vocabulary looks rows up in the mapped file. ggml's
//! CPU `get_rows` uses the same conversion per type, which is why split and whole agree to the last bit.
use llama_cpp_sys_2 as sys;

use crate::LlamaError;
use crate::backend::init;

/// Bytes of a row of `n` values of a ggml type, or an error when the type is unknown or `n` is not whole blocks.
pub fn row_bytes(ggml_type: u32, n: usize) -> Result<usize, LlamaError> {
    let traits = traits(ggml_type)?;
    let block = traits.blck_size as usize;
    if n == 0 || !n.is_multiple_of(block) {
        return Err(bad(format!("{n} values are not whole blocks of {block}")));
    }
    (n / block).checked_mul(traits.type_size).ok_or_else(|| bad(format!("{n} values are too many")))
}

/// The `n` values of one row of a tensor of a ggml type (`F32`, `F16`, `BF16` or any quantised one).
pub fn dequantize_row(ggml_type: u32, row: &[u8], n: usize) -> Result<Vec<f32>, LlamaError> {
    let mut out = Vec::new();
    append_row(ggml_type, row, n, &mut out)?;
    Ok(out)
}

/// As [`dequantize_row`], at the end of `out`, which is unchanged when it fails.
pub fn append_row(ggml_type: u32, row: &[u8], n: usize, out: &mut Vec<f32>) -> Result<(), LlamaError> {
    let want = row_bytes(ggml_type, n)?;
    if row.len() != want {
        return Err(bad(format!("a row of {n} values has {want} bytes, not {}", row.len())));
    }
    if ggml_type == sys::GGML_TYPE_F32 {
        out.extend(row.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        return Ok(());
    }
    let to_float = traits(ggml_type)?.to_float;
    let to_float = to_float.ok_or_else(|| bad(format!("ggml type {ggml_type} has no conversion to floats")))?;
    let count = i64::try_from(n).map_err(|_| bad(format!("{n} values are too many")))?;
    // Blocks begin with 16-bit scales, and a slice of bytes may begin anywhere.
    let aligned: Vec<u64>;
    let source = match row.as_ptr().align_offset(align_of::<u64>()) {
        0 => row.as_ptr(),
        _ => {
            aligned =
                row.chunks(8).map(|c| u64::from_ne_bytes(std::array::from_fn(|i| *c.get(i).unwrap_or(&0)))).collect();
            aligned.as_ptr().cast()
        }
    };
    let start = out.len();
    out.resize(start + n, 0.0);
    // SAFETY: `source` is aligned and holds the `want` bytes that `n` values of this type take; `out` holds `n` floats
    // from `start` on.
    unsafe { to_float(source.cast(), out[start..].as_mut_ptr(), count) };
    Ok(())
}

fn traits(ggml_type: u32) -> Result<&'static sys::ggml_type_traits, LlamaError> {
    init();
    if ggml_type >= sys::GGML_TYPE_COUNT {
        return Err(bad(format!("{ggml_type} is no ggml type")));
    }
    // SAFETY: the type is below the count; the table is a constant of the library.
    let traits = unsafe { &*sys::ggml_get_type_traits(ggml_type) };
    // Types that were removed from ggml leave an empty entry.
    if traits.blck_size <= 0 || traits.type_size == 0 {
        return Err(bad(format!("ggml type {ggml_type} is no longer supported")));
    }
    Ok(traits)
}

fn bad(reason: String) -> LlamaError {
    LlamaError::Row(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_wrong_lengths() {
        let floats = [1.5f32, -0.25, f32::MIN_POSITIVE / 4.0];
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(dequantize_row(sys::GGML_TYPE_F32, &bytes, 3).unwrap(), floats);
        let half = [0x00u8, 0x3c, 0x00, 0xc0];
        assert_eq!(dequantize_row(sys::GGML_TYPE_F16, &half, 2).unwrap(), [1.0, -2.0]);
        // Q8_0: a 16-bit scale of 0.5, then 32 signed bytes, from an odd address.
        let mut block = vec![9u8, 0x00, 0x38];
        block.extend((0..32).map(|i| (i - 16) as u8));
        let want: Vec<f32> = (0..32).map(|i| (i - 16) as f32 * 0.5).collect();
        assert_eq!(dequantize_row(sys::GGML_TYPE_Q8_0, &block[1..], 32).unwrap(), want);
        for (t, len, n) in [(sys::GGML_TYPE_Q8_0, 34, 31), (sys::GGML_TYPE_Q8_0, 33, 32), (4, 18, 32), (9999, 4, 1)] {
            assert!(dequantize_row(t, &vec![0; len], n).is_err(), "type {t}, {len} bytes, {n} values");
        }
        assert!(dequantize_row(sys::GGML_TYPE_F32, &[], 0).is_err());
        assert!(row_bytes(sys::GGML_TYPE_F32, usize::MAX).is_err());
    }
}
