//! Bytes to a header. Every count, length and offset is checked against the file's size and a limit before anything is
//! allocated for it, so a file that lies costs no more than its own size.
use std::collections::HashSet;
use std::path::Path;

use crate::GgufError;
use crate::bytes::FileBytes;
use crate::metadata::{Array, Metadata, Value, ValueType, scalar};
use crate::types::{self, ggml_type};

/// Most keys: honest files have about 60.
pub const KEYS_MAX: u64 = 1 << 16;
/// Most tensors in a file: a model of 128 layers with 512 separate experts a layer has 200,000.
pub const TENSORS_MAX: u64 = 1 << 18;
/// Longest key in bytes: the format's own limit.
pub const KEY_BYTES_MAX: u64 = (1 << 16) - 1;
/// Longest string value in bytes: chat templates reach 100 KB, merges in one string 10 MB.
pub const STRING_BYTES_MAX: u64 = 64 << 20;
/// Most elements of an array: llama.cpp's own limit.
pub const ARRAY_ELEMENTS_MAX: u64 = 1 << 30;
/// Deepest arrays of arrays; llama.cpp reads none, the format allows them.
pub const ARRAY_DEPTH_MAX: u32 = 4;
/// Longest tensor name in bytes: ggml's limit, less its final zero.
pub const TENSOR_NAME_BYTES_MAX: u64 = 63;
/// Largest alignment of tensor data: the largest page size of common machines.
pub const ALIGNMENT_MAX: u32 = 1 << 16;
/// Alignment when the file does not say.
pub const ALIGNMENT_DEFAULT: u32 = 32;

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Elements in each dimension, the row first; 1 where there is no such dimension.
    pub dims: [u64; 4],
    /// How many dimensions the file gives.
    pub n_dims: u32,
    /// ggml's number of its type.
    pub ggml_type: u32,
    /// Bytes of its data.
    pub bytes: u64,
    /// Which of the model's files holds it.
    pub file: usize,
    /// Where its data starts in that file, in bytes.
    pub offset: u64,
}

impl TensorInfo {
    /// Bytes of one row of `dims[0]` elements.
    pub fn row_bytes(&self) -> u64 {
        types::row_bytes(self.ggml_type, self.dims[0]).unwrap_or(0)
    }
    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.dims[1..].iter().fold(1, |rows: u64, &dim| rows.saturating_mul(dim))
    }
    /// The layer it belongs to and its name within, for names like `blk.7.attn_q.weight`.
    pub fn layer(&self) -> Option<(u32, &str)> {
        let (number, rest) = self.name.strip_prefix("blk.")?.split_once('.')?;
        // "007" and "+7" are not how llama.cpp names a layer.
        let n: u32 = number.parse().ok()?;
        (number.len() == n.checked_ilog10().unwrap_or(0) as usize + 1 && !number.starts_with('+')).then_some((n, rest))
    }
}

/// A file's header.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in file order; their offsets count from the start of the file.
    pub tensors: Vec<TensorInfo>,
    /// Alignment of tensor data in bytes, a power of two.
    pub alignment: u32,
    /// Where tensor data starts in the file.
    pub data_start: u64,
}

/// Parse the header of a file, which becomes number `file` of a model.
pub fn header(bytes: &FileBytes, file: usize) -> Result<Header, GgufError> {
    let mut r = Reader { bytes, at: 0 };
    let path = bytes.path();
    if (bytes.len() as u64) < bytes.file_len().min(4) {
        return Err(r.short("the magic", 4));
    }
    if bytes.get(..4) != Some(b"GGUF") {
        return Err(GgufError::NotGguf(path.to_owned()));
    }
    r.at = 4;
    let version = r.u32("the version")?;
    if version & 0xffff == 0 {
        return Err(GgufError::BigEndian(path.to_owned()));
    }
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version { path: path.to_owned(), version });
    }
    // The smallest key takes 8 + 1 + 4 + 1 bytes, the smallest tensor 8 + 4 + 4 + 8.
    let n_tensors = r.count("the number of tensors", TENSORS_MAX, 24)?;
    let n_keys = r.count("the number of keys", KEYS_MAX, 14)?;
    let metadata = r.metadata(n_keys)?;
    let alignment = alignment(&metadata, path)?;
    let mut tensors = r.tensors(n_tensors, file)?;
    let data_start = if tensors.is_empty() { r.at as u64 } else { r.at.next_multiple_of(alignment as usize) as u64 };
    place(&mut tensors, bytes, alignment, data_start)?;
    Ok(Header { version, metadata, tensors, alignment, data_start })
}

fn malformed(path: &Path, what: String) -> GgufError {
    GgufError::Malformed { path: path.to_owned(), what }
}

/// Text of a hostile file, short enough and safe to print.
fn show(s: &str) -> String {
    s.chars().take(80).flat_map(char::escape_default).collect()
}

fn alignment(metadata: &Metadata, path: &Path) -> Result<u32, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::U32(a)) if a.is_power_of_two() && *a <= ALIGNMENT_MAX => Ok(*a),
        Some(Value::U32(a)) => {
            Err(malformed(path, format!("general.alignment is {a}, not a power of two up to {ALIGNMENT_MAX}")))
        }
        Some(_) => Err(malformed(path, "general.alignment is not a 32-bit number".into())),
    }
}

/// Check that each tensor's data follows the one before, padded, as llama.cpp requires, and lies within the file. A file
/// whose tensors overlap would make a shard larger than the file it came from.
fn place(tensors: &mut [TensorInfo], bytes: &FileBytes, alignment: u32, data_start: u64) -> Result<(), GgufError> {
    let (path, len) = (bytes.path(), bytes.file_len());
    let mut expected = 0u64;
    for t in tensors {
        if t.offset != expected {
            let what = format!("the data of tensor {} is said to be at {} and belongs at {expected}", t.name, t.offset);
            return Err(malformed(path, what));
        }
        let end = (data_start.checked_add(expected)).and_then(|start| start.checked_add(t.bytes)).unwrap_or(u64::MAX);
        if end > len {
            let what = format!("the data of tensor {}", t.name);
            return Err(GgufError::Truncated { path: path.to_owned(), what, end, len });
        }
        t.offset = data_start + expected;
        expected = expected.saturating_add(t.bytes.next_multiple_of(u64::from(alignment)));
    }
    Ok(())
}

struct Reader<'a> {
    bytes: &'a FileBytes,
    at: usize,
}

impl<'a> Reader<'a> {
    fn path(&self) -> &Path {
        self.bytes.path()
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], GgufError> {
        match self.bytes.slice(self.at as u64, n) {
            Some(slice) => {
                self.at += slice.len();
                Ok(slice)
            }
            None => Err(self.short(what, (self.at as u64).saturating_add(n))),
        }
    }

    /// The bytes end before `end`: because the file does, or because only its beginning is here.
    fn short(&self, what: &str, end: u64) -> GgufError {
        let (path, have, len) = (self.path().to_owned(), self.bytes.len() as u64, self.bytes.file_len());
        if have < end && end <= len {
            return GgufError::HeadTooShort { path, have, need: end };
        }
        GgufError::Truncated { path, what: what.to_owned(), end, len }
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.take(4, what).map(|b| b.iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte)))
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.take(8, what).map(|b| b.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }

    fn limit(&self, what: impl Into<String>, found: u64, max: u64) -> Result<u64, GgufError> {
        if found <= max {
            return Ok(found);
        }
        Err(GgufError::Limit { path: self.path().to_owned(), what: what.into(), found, max })
    }

    /// A number of things that take at least `least` bytes each.
    fn count(&mut self, what: &str, max: u64, least: u64) -> Result<u64, GgufError> {
        let n = self.u64(what)?;
        self.limit(what, n, max)?;
        self.room(n, least, what)?;
        Ok(n)
    }

    /// Refuse a count that the rest of the file cannot hold.
    fn room(&self, n: u64, least: u64, what: &str) -> Result<(), GgufError> {
        let end = n.saturating_mul(least).saturating_add(self.at as u64);
        if end > self.bytes.len() as u64 {
            return Err(self.short(what, end));
        }
        Ok(())
    }

    fn string(&mut self, what: &str, max: u64) -> Result<&'a str, GgufError> {
        let n = self.u64(what)?;
        self.limit(format!("the length of {what}"), n, max)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes).map_err(|_| malformed(self.path(), format!("{what} is not UTF-8 text")))
    }

    fn metadata(&mut self, n_keys: u64) -> Result<Metadata, GgufError> {
        let mut metadata = Metadata::new();
        for i in 0..n_keys {
            let key = self.string(&format!("the name of key {i}"), KEY_BYTES_MAX)?;
            if key.is_empty() {
                return Err(malformed(self.path(), format!("key {i} has no name")));
            }
            if metadata.get(key).is_some() {
                return Err(malformed(self.path(), format!("the key {} is there twice", show(key))));
            }
            let what = format!("the value of {}", show(key));
            let kind = self.kind(&what)?;
            let value = match kind {
                ValueType::Array => Value::Array(self.array(&what)?),
                ValueType::String => Value::String(self.string(&what, STRING_BYTES_MAX)?.to_owned()),
                _ => self.scalar(kind, &what)?,
            };
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn kind(&mut self, what: &str) -> Result<ValueType, GgufError> {
        let id = self.u32(what)?;
        ValueType::from_id(id).ok_or_else(|| malformed(self.path(), format!("{what} has the unknown type {id}")))
    }

    fn scalar(&mut self, kind: ValueType, what: &str) -> Result<Value, GgufError> {
        let bytes = self.take(kind.fixed_bytes().unwrap_or(0) as u64, what)?;
        scalar(kind, bytes).ok_or_else(|| malformed(self.path(), format!("{what} cannot be read")))
    }

    fn array(&mut self, what: &str) -> Result<Array, GgufError> {
        let kind = self.kind(what)?;
        let n = self.u64(what)?;
        let start = self.at;
        self.elements(kind, n, what, 1)?;
        Ok(Array::in_file(kind, n, self.bytes.clone(), start..self.at))
    }

    /// Walk over the elements of an array and check them; nothing is copied.
    fn elements(&mut self, kind: ValueType, n: u64, what: &str, depth: u32) -> Result<(), GgufError> {
        self.limit(format!("the number of elements in {what}"), n, ARRAY_ELEMENTS_MAX)?;
        if let Some(size) = kind.fixed_bytes() {
            self.take(n.saturating_mul(size as u64), what)?;
            return Ok(());
        }
        if depth > ARRAY_DEPTH_MAX {
            return Err(malformed(self.path(), format!("{what} has more than {ARRAY_DEPTH_MAX} arrays in each other")));
        }
        self.room(n, 8, what)?;
        for _ in 0..n {
            if kind == ValueType::Array {
                let kind = self.kind(what)?;
                let n = self.u64(what)?;
                self.elements(kind, n, what, depth + 1)?;
            } else {
                let n = self.u64(what)?;
                self.take(n, what)?;
            }
        }
        Ok(())
    }

    fn tensors(&mut self, n_tensors: u64, file: usize) -> Result<Vec<TensorInfo>, GgufError> {
        let mut tensors = Vec::with_capacity(n_tensors as usize); // bounded by TENSORS_MAX and by the file's size
        let mut names = HashSet::new();
        for i in 0..n_tensors {
            let name = self.string(&format!("the name of tensor {i}"), TENSOR_NAME_BYTES_MAX)?;
            if !names.insert(name) {
                return Err(malformed(self.path(), format!("the tensor {} is there twice", show(name))));
            }
            let what = format!("tensor {}", show(name));
            let n_dims = self.u32(&what)?;
            self.limit(format!("the number of dimensions of {what}"), n_dims.into(), 4)?;
            let mut dims = [1; 4];
            for d in dims.iter_mut().take(n_dims as usize) {
                *d = self.u64(&what)?;
            }
            let id = self.u32(&what)?;
            let Some(kind) = ggml_type(id) else {
                return Err(GgufError::UnknownType { path: self.path().to_owned(), tensor: show(name), id });
            };
            let offset = self.u64(&what)?;
            if dims[0] % kind.block_elements != 0 {
                let (row, block) = (dims[0], kind.block_elements);
                let why = format!("{what} has rows of {row} elements, not whole blocks of {block} ({})", kind.name);
                return Err(malformed(self.path(), why));
            }
            let too_big = || malformed(self.path(), format!("the dimensions {dims:?} of {what} overflow"));
            let elements = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).ok_or_else(too_big)?;
            let bytes = (elements / kind.block_elements).checked_mul(kind.block_bytes).ok_or_else(too_big)?;
            // Leave room for padding, and stay within what ggml holds in a signed number.
            if elements > i64::MAX as u64 || bytes > (i64::MAX as u64) - u64::from(ALIGNMENT_MAX) {
                return Err(too_big());
            }
            tensors.push(TensorInfo { name: name.to_owned(), dims, n_dims, ggml_type: id, bytes, file, offset });
        }
        Ok(tensors)
    }
}
