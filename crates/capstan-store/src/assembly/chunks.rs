//! What is missing of a file, cut so that whoever can supply some of a chunk can supply all of it.
use std::collections::BTreeSet;

use capstan_proto::weights::{AssembleOrder, Piece};

use crate::ranges::Ranges;

/// Smallest and largest chunk in bytes, and how many there are to be of a file. Small ones share the work well between
/// sources; each costs a request.
const CHUNK_BYTES_MIN: u64 = 4 << 20;
/// See [`CHUNK_BYTES_MIN`].
const CHUNK_BYTES_MAX: u64 = 256 << 20;
/// See [`CHUNK_BYTES_MIN`].
const CHUNKS: u64 = 64;

/// Bytes that are missing, and the providers that have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Where they are in the original, and where they belong.
    pub piece: Piece,
    /// Which of the order's providers have them, and where in each they begin.
    pub providers: Vec<(usize, u64)>,
}

/// The chunks of an order that are not there yet, in the order of the file.
pub(super) fn chunks(order: &AssembleOrder, done: &Ranges) -> Vec<Chunk> {
    let step = (order.bytes / CHUNKS).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX);
    let providers: Vec<Vec<Piece>> = (order.providers.iter())
        .map(|provider| {
            let mut pieces = provider.pieces.clone();
            pieces.sort();
            pieces
        })
        .collect();
    let borders: BTreeSet<(u16, u64)> =
        providers.iter().flatten().flat_map(|p| [(p.file, p.from), (p.file, p.from_end())]).collect();
    let mut chunks = Vec::new();
    for piece in &order.pieces {
        for missing in done.missing(piece.to..piece.to.saturating_add(piece.bytes)) {
            let (mut at, end) = (missing.start, missing.end);
            while at < end {
                let from = piece.from + (at - piece.to);
                let border = borders.range((piece.file, from + 1)..).next().filter(|(file, _)| *file == piece.file);
                let to_border = border.map_or(u64::MAX, |(_, border)| border - from);
                let bytes = (end - at).min(step).min(to_border);
                let piece = Piece { file: piece.file, from, to: at, bytes };
                let providers = (providers.iter().enumerate())
                    .filter_map(|(i, pieces)| Some((i, offset(pieces, &piece)?)))
                    .collect();
                chunks.push(Chunk { piece, providers });
                at += bytes;
            }
        }
    }
    chunks
}

/// Where in a provider a piece of the original begins, if all of it is there.
fn offset(pieces: &[Piece], wanted: &Piece) -> Option<u64> {
    let after = pieces.partition_point(|p| (p.file, p.from) <= (wanted.file, wanted.from));
    let has = pieces.get(after.checked_sub(1)?)?;
    let all = has.file == wanted.file && has.from_end() >= wanted.from_end();
    all.then(|| has.to + (wanted.from - has.from))
}

#[cfg(test)]
mod tests {
    use capstan_proto::weights::Provider;
    use capstan_proto::{ContentHash, ModelId};

    use super::*;

    #[test]
    fn chunks_cover_what_is_missing_once_and_know_who_has_it() {
        let piece = |from, to, bytes| Piece { file: 0, from, to, bytes };
        let provider = |pieces| Provider { hash: ContentHash([0; 32]), bytes: 1000, holders: vec![], pieces };
        let order = AssembleOrder {
            model: ModelId([0; 32]),
            what: "m".into(),
            bytes: 300,
            header: vec![],
            pieces: vec![piece(1000, 50, 100), piece(500, 150, 100)],
            files: vec![],
            // The second has the end of the first piece and the beginning of the second, in another order.
            providers: vec![
                provider(vec![piece(1000, 7, 40)]),
                provider(vec![piece(500, 0, 10), piece(1030, 10, 200)]),
            ],
        };
        let done = [(60, 70)].into_iter().collect();
        let all = chunks(&order, &done);
        let covered: Ranges = all.iter().map(|c| (c.piece.to, c.piece.to + c.piece.bytes)).collect();
        assert_eq!(covered.bytes(), 190);
        assert_eq!(all.iter().map(|c| c.piece.bytes).sum::<u64>(), 190, "nothing twice");
        let at = |to| all.iter().find(|c| c.piece.to == to).unwrap();
        assert_eq!(at(50).providers, [(0, 7)]);
        assert_eq!(at(70).providers, [(0, 27)]);
        assert_eq!((at(80).piece.bytes, &at(80).providers), (10, &vec![(0, 37), (1, 10)]));
        assert_eq!(at(90).providers, [(1, 20)]);
        assert_eq!((at(150).piece.bytes, &at(150).providers), (10, &vec![(1, 0)]));
        assert!(at(160).providers.is_empty());
    }
}
