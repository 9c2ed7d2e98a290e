//! A GGUF from metadata and tensors: the header's bytes, and where each tensor's data belongs.
use std::io::{self, Write};

use crate::metadata::{Metadata, Value, encode_string};
use crate::parse::ALIGNMENT_DEFAULT;
use crate::types;

/// A tensor that a file will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Elements in each dimension, the row first; as many as it has dimensions, at most four.
    pub dims: Vec<u64>,
    /// ggml's number of its type.
    pub ggml_type: u32,
}

impl NewTensor {
    /// Bytes of its data; none when the type is unknown, a row is no whole number of blocks, or the product overflows.
    pub fn bytes(&self) -> Option<u64> {
        let (first, rest) = self.dims.split_first()?;
        rest.iter().try_fold(types::row_bytes(self.ggml_type, *first)?, |n, d| n.checked_mul(*d))
    }
}

/// A file's header and the place of each tensor's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Everything before the data, padded to the alignment.
    pub header: Vec<u8>,
    /// Start of each tensor's data in the file, in bytes, in the order given.
    pub offsets: Vec<u64>,
    /// Size of the file in bytes.
    pub total: u64,
}

/// Key of the string that moves the data to a wished place; readers ignore it.
pub const PADDING_KEY: &str = "capstan.layout_padding";

/// The data's alignment that this metadata asks for.
pub fn alignment(metadata: &Metadata) -> u64 {
    u64::from(metadata.get_u32("general.alignment").filter(|a| a.is_power_of_two()).unwrap_or(ALIGNMENT_DEFAULT))
}

/// Lay a file out; none when a tensor's size cannot be computed.
///
/// llama.cpp demands that data follows data without a gap but the padding to the alignment. What remains free is where
/// the first tensor starts: `place` is `(modulus, remainder)` of that offset, both multiples of the alignment; the
/// header is filled up with a string of spaces under [`PADDING_KEY`] to reach it.
pub fn layout(metadata: &Metadata, tensors: &[NewTensor], place: Option<(u64, u64)>) -> Option<Layout> {
    let align = alignment(metadata);
    let mut header = head(metadata, tensors, align, None)?;
    if let Some((modulus, remainder)) = place
        && !tensors.is_empty()
        && header.len() as u64 % modulus != remainder
    {
        let least = head(metadata, tensors, align, Some((0, 1)))?.len() as u64;
        let fill = (remainder + modulus - least % modulus) % modulus;
        header = head(metadata, tensors, align, Some((fill as usize, align)))?;
    }
    let mut at = header.len() as u64;
    let mut offsets = Vec::with_capacity(tensors.len());
    for t in tensors {
        offsets.push(at);
        at = at.checked_add(t.bytes()?.checked_next_multiple_of(align)?)?;
    }
    Some(Layout { header, offsets, total: at })
}

/// The header, padded to `pad.1` (to the alignment without `pad`), with `pad.0` spaces under the padding key.
fn head(metadata: &Metadata, tensors: &[NewTensor], align: u64, pad: Option<(usize, u64)>) -> Option<Vec<u8>> {
    let keys = metadata.iter().filter(|(k, _)| *k != PADDING_KEY);
    let spaces = pad.map(|(n, _)| Value::String(" ".repeat(n)));
    let keys: Vec<_> = keys.chain(spaces.as_ref().map(|v| (PADDING_KEY, v))).collect();
    let mut out = Vec::new();
    out.extend(b"GGUF");
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        encode_string(key.as_bytes(), &mut out);
        out.extend((value.kind() as u32).to_le_bytes());
        value.encode(&mut out);
    }
    let mut offset = 0u64;
    for t in tensors {
        encode_string(t.name.as_bytes(), &mut out);
        out.extend(u32::try_from(t.dims.len()).ok()?.to_le_bytes());
        t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(t.ggml_type.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = offset.checked_add(t.bytes()?.checked_next_multiple_of(align)?)?;
    }
    out.resize(out.len().next_multiple_of(pad.map_or(align, |(_, to)| to) as usize), 0);
    Some(out)
}

/// Write a whole file: `data(i)` gives tensor `i`'s bytes, which must be as many as its shape says.
pub fn write(
    out: &mut impl Write,
    metadata: &Metadata,
    tensors: &[NewTensor],
    mut data: impl FnMut(usize) -> Vec<u8>,
) -> io::Result<()> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let layout = layout(metadata, tensors, None).ok_or_else(|| bad("a tensor has an impossible shape"))?;
    out.write_all(&layout.header)?;
    let align = alignment(metadata);
    for (i, t) in tensors.iter().enumerate() {
        let bytes = data(i);
        if Some(bytes.len() as u64) != t.bytes() {
            return Err(bad(&format!("the data of {} has not the size of its shape", t.name)));
        }
        out.write_all(&bytes)?;
        let padding = (bytes.len() as u64).next_multiple_of(align) - bytes.len() as u64;
        out.write_all(&vec![0; padding as usize])?;
    }
    Ok(())
}
