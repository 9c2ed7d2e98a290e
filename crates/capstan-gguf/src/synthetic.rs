//! Weights made up for a header: a file of the right size that llama.cpp loads and computes on as fast as on real
//! weights, and that takes next to no space on disk.
//!
//! Most tensors are holes, which read as zeros: memory is taken for them when they are read, as for real ones. What
//! steers the computation is written: norms are ones, so that nothing vanishes; routers and embeddings are random, so
//! that different tokens choose different experts. Answers are nonsense, and that is all they are for.
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::beginnings::{self, Beginning, Known};
use crate::{GgufError, TensorInfo, shard, types};

/// Bytes made at a time.
const PIECE_BYTES: u64 = 4 << 20;
/// Bytes of random blocks, from the least to the most: any two of them are a small positive number in half precision,
/// as the scales of all quantised blocks are, so that no value is infinite or not a number.
const LEAST: u8 = 0x08;
const MOST: u8 = 0x2f;

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
fn filling(tensor: &TensorInfo) -> Option<Filling> {
    let name = tensor.name.as_str();
    let in_f32 = tensor.ggml_type == types::F32;
    let steers = name == "token_embd.weight" || name.ends_with("ffn_gate_inp.weight");
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

/// Writes the file of a header: `header` is all of it, `file_bytes` the size of the whole file. The progress callback
/// gets bytes done and in all; when it breaks, or anything fails, nothing is left behind. Gives how many bytes are no
/// holes.
pub fn write(
    header: &[u8],
    file_bytes: u64,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<u64, GgufError> {
    let beginning = Beginning { path: path.to_owned(), bytes: header.to_vec(), file_bytes };
    let Known::Model(model) = beginnings::read(std::slice::from_ref(&beginning))? else {
        return Err(GgufError::Malformed { path: path.to_owned(), what: "its header is not complete".into() });
    };
    let fillings: Vec<(&TensorInfo, Filling)> = model.tensors().iter().filter_map(|t| Some((t, filling(t)?))).collect();
    let total = header.len() as u64 + fillings.iter().map(|(t, _)| t.bytes).sum::<u64>();
    shard::create(path, total, |out| {
        out.set_len(file_bytes)?;
        shard::write_at(out, header, 0)?;
        let mut done = header.len() as u64;
        for (tensor, filling) in &fillings {
            if fill(out, tensor, *filling, &mut done, total, progress)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        out.sync_all()?;
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
