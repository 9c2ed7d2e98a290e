//! Keys and values in the order of the file. Arrays keep their encoded bytes: a vocabulary of 200,000 tokens costs
//! nothing until it is read, and is copied into a shard byte for byte.
use std::ops::Range;

use indexmap::IndexMap;

use crate::bytes::FileBytes;

/// The 13 kinds of values, by their number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the names say all
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The kind with this number.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(id as usize).copied()
    }
    /// Bytes of a value of fixed size; none for strings and arrays.
    pub fn fixed_bytes(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the names say all
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A scalar of fixed size from its little-endian bytes (exactly [`ValueType::fixed_bytes`] of them).
pub(crate) fn scalar(kind: ValueType, bytes: &[u8]) -> Option<Value> {
    Some(match kind {
        ValueType::U8 => Value::U8(*bytes.first()?),
        ValueType::I8 => Value::I8(*bytes.first()? as i8),
        ValueType::Bool => Value::Bool(*bytes.first()? != 0),
        ValueType::U16 => Value::U16(u16::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(bytes.try_into().ok()?)),
        ValueType::String | ValueType::Array => return None,
    })
}

impl Value {
    /// Its kind.
    pub fn kind(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }
    /// The number, if it is an integer (booleans count as 0 and 1).
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::I8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::I16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::I32(v) => Some(v.into()),
            Value::Bool(v) => Some(v.into()),
            Value::U64(v) => v.try_into().ok(),
            Value::I64(v) => Some(v),
            _ => None,
        }
    }
    /// The number, if it is an integer that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U64(v) => Some(v),
            _ => self.as_i64()?.try_into().ok(),
        }
    }
    /// The number, if it is a float.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }
    /// The text, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(s) => Some(s),
            _ => None,
        }
    }
    /// The boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }
    /// The array, if it is one.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }
    /// Append the value as a file holds it, without its kind.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => out.push(*v),
            Value::I8(v) => out.extend(v.to_le_bytes()),
            Value::U16(v) => out.extend(v.to_le_bytes()),
            Value::I16(v) => out.extend(v.to_le_bytes()),
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::String(s) => encode_string(s.as_bytes(), out),
            Value::Array(a) => {
                out.extend((a.kind as u32).to_le_bytes());
                out.extend(a.len.to_le_bytes());
                out.extend_from_slice(a.bytes());
            }
            Value::U64(v) => out.extend(v.to_le_bytes()),
            Value::I64(v) => out.extend(v.to_le_bytes()),
            Value::F64(v) => out.extend(v.to_le_bytes()),
        }
    }
}

pub(crate) fn encode_string(s: &[u8], out: &mut Vec<u8>) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend_from_slice(s);
}

/// An array, as its encoded elements.
#[derive(Clone, Debug)]
pub struct Array {
    kind: ValueType,
    len: u64,
    data: Raw,
}

#[derive(Clone, Debug)]
enum Raw {
    Owned(Vec<u8>),
    File(FileBytes, Range<usize>),
}

impl PartialEq for Array {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind && self.len == other.len && self.bytes() == other.bytes()
    }
}

impl Array {
    /// Elements that lie in a file and were checked to be well-formed.
    pub(crate) fn in_file(kind: ValueType, len: u64, file: FileBytes, range: Range<usize>) -> Self {
        Self { kind, len, data: Raw::File(file, range) }
    }
    /// An array of `u32`.
    pub fn from_u32(values: impl IntoIterator<Item = u32>) -> Self {
        Self::fixed(ValueType::U32, values.into_iter().map(u32::to_le_bytes))
    }
    /// An array of `i32`.
    pub fn from_i32(values: impl IntoIterator<Item = i32>) -> Self {
        Self::fixed(ValueType::I32, values.into_iter().map(i32::to_le_bytes))
    }
    /// An array of `f32`.
    pub fn from_f32(values: impl IntoIterator<Item = f32>) -> Self {
        Self::fixed(ValueType::F32, values.into_iter().map(f32::to_le_bytes))
    }
    /// An array of booleans.
    pub fn from_bool(values: impl IntoIterator<Item = bool>) -> Self {
        Self::fixed(ValueType::Bool, values.into_iter().map(|b| [u8::from(b)]))
    }
    /// An array of strings.
    pub fn from_strings<S: AsRef<[u8]>>(values: impl IntoIterator<Item = S>) -> Self {
        let (mut bytes, mut len) = (Vec::new(), 0);
        for s in values {
            encode_string(s.as_ref(), &mut bytes);
            len += 1;
        }
        Self { kind: ValueType::String, len, data: Raw::Owned(bytes) }
    }
    fn fixed<const N: usize>(kind: ValueType, values: impl Iterator<Item = [u8; N]>) -> Self {
        let bytes: Vec<u8> = values.flatten().collect();
        Self { kind, len: (bytes.len() / N) as u64, data: Raw::Owned(bytes) }
    }

    /// Kind of the elements.
    pub fn kind(&self) -> ValueType {
        self.kind
    }
    /// Number of elements.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The elements as a file holds them.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Raw::Owned(bytes) => bytes,
            Raw::File(file, range) => file.get(range.clone()).unwrap_or_default(),
        }
    }
    /// Element `i` of numbers or booleans.
    pub fn get(&self, i: u64) -> Option<Value> {
        let size = self.kind.fixed_bytes()?;
        let start = usize::try_from(i).ok()?.checked_mul(size)?;
        scalar(self.kind, self.bytes().get(start..start.checked_add(size)?)?)
    }
    /// All elements, if they are integers or booleans.
    pub fn integers(&self) -> Option<Vec<i64>> {
        let size = self.kind.fixed_bytes()?;
        self.bytes().chunks_exact(size).map(|b| scalar(self.kind, b)?.as_i64()).collect()
    }
    /// The strings as bytes (tokens need not be UTF-8), if the elements are strings.
    pub fn strings(&self) -> Option<impl Iterator<Item = &[u8]>> {
        (self.kind == ValueType::String).then(|| Strings(self.bytes()))
    }
    /// The elements at these indices, in this order, if they are numbers or booleans and all exist.
    pub fn select(&self, indices: impl IntoIterator<Item = u64>) -> Option<Self> {
        let size = self.kind.fixed_bytes()?;
        let (bytes, mut out, mut len) = (self.bytes(), Vec::new(), 0);
        for i in indices {
            let start = usize::try_from(i).ok()?.checked_mul(size)?;
            out.extend_from_slice(bytes.get(start..start.checked_add(size)?)?);
            len += 1;
        }
        Some(Self { kind: self.kind, len, data: Raw::Owned(out) })
    }
}

struct Strings<'a>(&'a [u8]);

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];
    fn next(&mut self) -> Option<&'a [u8]> {
        let (len, rest) = self.0.split_first_chunk::<8>()?;
        let (s, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.0 = rest;
        Some(s)
    }
}

/// Keys and values in file order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(IndexMap<String, Value>);

impl Metadata {
    /// No keys.
    pub fn new() -> Self {
        Self::default()
    }
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }
    /// An integer that fits, of whatever width the file has it.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u64()?.try_into().ok()
    }
    /// An integer of whatever width the file has it.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }
    /// A float.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f64().map(|v| v as f32)
    }
    /// A string.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }
    /// A boolean.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }
    /// An array.
    pub fn get_array(&self, key: &str) -> Option<&Array> {
        self.get(key)?.as_array()
    }
    /// Set a key, in its old place or at the end.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) {
        self.0.insert(key.into(), value);
    }
    /// Drop a key; the others keep their order.
    pub fn remove(&mut self, key: &str) {
        self.0.shift_remove(key);
    }
    /// Keep the keys that `keep` wants.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.0.retain(|k, _| keep(k));
    }
    /// Keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }
    /// Number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
