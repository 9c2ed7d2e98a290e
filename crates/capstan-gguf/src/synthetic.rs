//! Weights made up for a header: a file of the right size that llama.cpp loads and computes on as fast as on real
//! weights, and that takes next to no space on disk.
//!
//! Most tensors are holes, which read as zeros: memory is taken for them when they are read, as for real ones. What
//! steers the computation is written: norms are ones, so that nothing vanishes; routers and embeddings are random, so
//! that different tokens choose different experts. Answers are nonsense, and that is all they are for.
//!
//! A header may come from another machine, so it is as hostile as any file, and more is refused than in a file that is
//! there: a size that its tensors do not account for, and more to write than norms, routers and embeddings ever take.
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::beginnings::{self, Beginning, Known};
use crate::{GgufError, Model, TensorInfo, parse, shard, types};

/// Most bytes that are written for a file: the embeddings of the largest vocabulary known, in f32, and as much again for
/// the routers of a thousand layers.
pub const WRITTEN_BYTES_MAX: u64 = 16 << 30;

/// Bytes made at a time.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes of random blocks, from the least to the most: any two of them are a small positive number in half precision,
/// as the scales of all quantised blocks are, so that no value is infinite or not a number.
const LEAST: u8 = 0x08;
const MOST: u8 = 0x2f;

/// Which experts a token uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Routing {
    /// Routers are random, so that tokens spread over all experts, as real ones do.
    #[default]
    Spread,
    /// Routers are holes, which choose the same experts for every token: the others are never read, and where the file
    /// is mapped take no memory.
    Same,
}

/// What a tensor that is no hole is filled with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Filling {
    /// The same number everywhere, in f32.
    Number(f32),
    /// Numbers from -1 to 1 in f32, divided by the root of the row's length.
    Evenly,
    /// Random bytes that are valid blocks of any type.
    Blocks,
}

/// Whether a tensor of this name scales what goes through it, so that ones leave that as it is.
pub fn is_norm_or_scale(name: &str) -> bool {
    let norm = name.find("norm").is_some_and(|i| name[i..].contains(".weight"));
    norm || name.contains("scale")
}

/// None for a hole.
fn filling(tensor: &TensorInfo, routing: Routing) -> Option<Filling> {
    let name = tensor.name.as_str();
    let in_f32 = tensor.ggml_type == types::F32;
    let routes = routing == Routing::Spread && name.ends_with("ffn_gate_inp.weight");
    let steers = name == "token_embd.weight" || routes;
    match in_f32 {
        false => steers.then_some(Filling::Blocks),
        true if steers => Some(Filling::Evenly),
        true if name.contains("ssm_a") => Some(Filling::Number(-1.0)),
        true if is_norm_or_scale(name) || name.starts_with("rope_") || name.contains(".rope_") => {
            Some(Filling::Number(1.0))
        }
        true => None,
    }
}

/// The model of a header whose file would have `file_bytes`; `path` is for messages. Refuses what no such file can be.
pub fn model(header: &[u8], file_bytes: u64, path: &Path) -> Result<Model, GgufError> {
    let malformed = |what: String| GgufError::Malformed { path: path.to_owned(), what };
    let beginning = Beginning { path: path.to_owned(), bytes: header.to_vec(), file_bytes };
    let Known::Model(model) = beginnings::read(std::slice::from_ref(&beginning))? else {
        return Err(malformed("its header is not complete".into()));
    };
    let end = model.tensors().iter().map(|t| t.offset.saturating_add(t.bytes)).max().unwrap_or(0);
    if file_bytes.saturating_sub(end) >= u64::from(parse::ALIGNMENT_MAX) {
        return Err(malformed(format!("it is said to have {file_bytes} bytes, and its tensors end at {end}")));
    }
    Ok(*model)
}

/// Writes a file of holes behind a header: as large as the model is said to be, a valid GGUF, and without any weights.
pub fn outline(header: &[u8], file_bytes: u64, out: &File) -> io::Result<()> {
    out.set_len(file_bytes)?;
    shard::write_at(out, header, 0)
}

/// Writes the file of a header: `header` is all of it, `file_bytes` the size of the whole file. The progress callback
/// gets bytes done and in all; when it breaks, or anything fails, nothing is left behind. Gives how many bytes are no
/// holes.
pub fn write(
    header: &[u8],
    file_bytes: u64,
    routing: Routing,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<u64, GgufError> {
    let model = model(header, file_bytes, path)?;
    let filled = |t| Some((t, filling(t, routing)?));
    let fillings: Vec<(&TensorInfo, Filling)> = model.tensors().iter().filter_map(filled).collect();
    let bytes = fillings.iter().fold(0u64, |sum, (t, _)| sum.saturating_add(t.bytes));
    if bytes > WRITTEN_BYTES_MAX {
        let what = "what its norms, routers and embeddings take".into();
        return Err(GgufError::Limit { path: path.to_owned(), what, found: bytes, max: WRITTEN_BYTES_MAX });
    }
    let total = header.len() as u64 + bytes;
    shard::create(path, total, |out| {
        outline(header, file_bytes, out)?;
        let mut done = header.len() as u64;
        for (tensor, filling) in &fillings {
            if fill(out, tensor, *filling, &mut done, total, progress)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        // Not flushed to the disk: nobody wants it after a power cut.
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(total)
}

fn fill(
    out: &File,
    tensor: &TensorInfo,
    filling: Filling,
    done: &mut u64,
    total: u64,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    // The same tensor is the same bytes on every machine and in every cut.
    let mut rng = ChaCha8Rng::seed_from_u64(tensor.bytes ^ u64::from(tensor.ggml_type));
    let mut at = 0;
    while at < tensor.bytes {
        let len = PIECE_BYTES.min(tensor.bytes - at);
        shard::write_at(out, &piece(filling, len as usize, tensor.dims[0], &mut rng), tensor.offset + at)?;
        at += len;
        *done += len;
        if progress(*done, total).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn piece(filling: Filling, len: usize, row: u64, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = vec![0; len];
    match filling {
        Filling::Number(x) => bytes.chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&x.to_le_bytes())),
        Filling::Evenly => {
            let size = 1.0 / (row.max(1) as f32).sqrt();
            bytes.chunks_exact_mut(4).for_each(|c| {
                let x = rng.next_u32() as i32 as f32 / i32::MAX as f32;
                c.copy_from_slice(&(x * size).to_le_bytes());
            });
        }
        Filling::Blocks => {
            rng.fill_bytes(&mut bytes);
            let span = u16::from(MOST - LEAST) + 1;
            bytes.iter_mut().for_each(|b| *b = LEAST + ((u16::from(*b) * span) >> 8) as u8);
        }
    }
    bytes
}
