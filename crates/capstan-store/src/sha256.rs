//! SHA-256 that can be handed on: one node hashes the bytes it has, the next goes on from its state.
//!
//! The hub states the SHA-256 of whole files, and no node of a cluster has a whole file. But a hash is computed from the
//! first byte to the last, and between two bytes it is a state of a hundred bytes; so the state travels instead of the
//! file, from whoever has the first bytes to whoever has the next ones.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use capstan_proto::weights::HashState;
use sha2::block_api::compress256;

use crate::Hash;

/// A block of the hash in bytes.
const BLOCK: usize = 64;
/// Bytes read from a file at once.
const READ_BYTES: usize = 1 << 20;
/// The state before the first byte (FIPS 180-4, 5.3.3).
const START: [u32; 8] =
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];

/// A SHA-256 under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sha256 {
    words: [u32; 8],
    tail: Vec<u8>,
    bytes: u64,
}

impl Default for Sha256 {
    fn default() -> Self {
        Self { words: START, tail: Vec::with_capacity(BLOCK), bytes: 0 }
    }
}

impl Sha256 {
    /// Goes on from a state; none when it is none.
    pub fn resume(state: &HashState) -> Option<Self> {
        let fits = state.tail.len() < BLOCK && state.bytes % BLOCK as u64 == state.tail.len() as u64;
        fits.then(|| Self { words: state.words, tail: state.tail.clone(), bytes: state.bytes })
    }

    /// The state, for whoever has the next bytes.
    pub fn state(&self) -> HashState {
        HashState { words: self.words, tail: self.tail.clone(), bytes: self.bytes }
    }

    /// Bytes hashed so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes more bytes in.
    pub fn update(&mut self, mut data: &[u8]) {
        self.bytes += data.len() as u64;
        if !self.tail.is_empty() {
            let (fill, rest) = data.split_at(data.len().min(BLOCK - self.tail.len()));
            self.tail.extend_from_slice(fill);
            data = rest;
            if self.tail.len() < BLOCK {
                return;
            }
            let (blocks, _) = self.tail.as_chunks::<BLOCK>();
            compress256(&mut self.words, blocks);
            self.tail.clear();
        }
        let (blocks, rest) = data.as_chunks::<BLOCK>();
        compress256(&mut self.words, blocks);
        self.tail.extend_from_slice(rest);
    }

    /// Takes bytes of a file in.
    pub fn update_from(&mut self, file: &File, from: u64, bytes: u64) -> io::Result<()> {
        let mut buffer = vec![0; READ_BYTES.min(usize::try_from(bytes).unwrap_or(READ_BYTES))];
        let mut at = 0;
        while at < bytes {
            let now = (bytes - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..now], from + at)?;
            self.update(&buffer[..now]);
            at += now as u64;
        }
        Ok(())
    }

    /// The hash of all bytes.
    pub fn finish(mut self) -> Hash {
        let bits = self.bytes.wrapping_mul(8);
        // A one, zeros up to eight bytes before the end of a block, and the length in bits.
        let zeros = (2 * BLOCK - 9 - self.tail.len()) % BLOCK;
        let mut end = vec![0x80];
        end.resize(1 + zeros, 0);
        end.extend(bits.to_be_bytes());
        self.update(&end);
        let mut hash = Hash::default();
        for (out, word) in hash.chunks_exact_mut(4).zip(self.words) {
            out.copy_from_slice(&word.to_be_bytes());
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::Digest;

    #[test]
    fn handed_on_at_any_byte_it_is_the_same_hash() {
        let data: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for len in [0, 1, 55, 56, 63, 64, 65, 127, 128, 1000] {
            let whole: Hash = sha2::Sha256::digest(&data[..len]).into();
            for cut in [0, len / 3, len / 2, len] {
                let mut first = Sha256::default();
                first.update(&data[..cut]);
                let mut second = Sha256::resume(&first.state()).unwrap();
                second.update(&data[cut..len]);
                assert_eq!(second.finish(), whole, "{len} cut at {cut}");
            }
        }
        let bad = HashState { words: START, tail: vec![0; 3], bytes: 64 };
        assert_eq!(Sha256::resume(&bad), None);
    }
}
