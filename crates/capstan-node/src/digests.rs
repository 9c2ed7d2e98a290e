//! The SHA-256 of a file whose bytes lie on several nodes: its state goes from node to node, in the order of the file.
use capstan_proto::NodeId;
use capstan_proto::weights::{PartReply, PartRequest, Piece, StoredFile};
use capstan_store::Hash;
use capstan_store::sha256::Sha256;

use crate::assembling::ask;
use crate::node::Shared;

/// Ranges that one node hashes in one call; a call of more is cut.
const RANGES_MAX: usize = 1 << 16;

/// A file of a node's store and which bytes of the original it holds.
pub(crate) struct Place {
    pub(crate) node: NodeId,
    pub(crate) file: StoredFile,
    pub(crate) pieces: Vec<Piece>,
}

/// A run of the original that one place has: where it begins there, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    place: usize,
    at: u64,
    bytes: u64,
}

/// The SHA-256 of an original file of `bytes` bytes. `told(done)` counts bytes.
pub(crate) async fn of(
    shared: &Shared,
    file: u16,
    bytes: u64,
    places: &[Place],
    mut told: impl FnMut(u64) + Send,
) -> Result<Hash, String> {
    let steps = steps(file, bytes, places).ok_or("some of its bytes are nowhere")?;
    let mut sha = Sha256::default();
    let mut steps = steps.into_iter().peekable();
    while let Some(first) = steps.next() {
        let mut ranges = vec![(first.at, first.bytes)];
        while let Some(next) = steps.next_if(|s| s.place == first.place && ranges.len() < RANGES_MAX) {
            ranges.push((next.at, next.bytes));
        }
        let place = &places[first.place];
        let request = PartRequest::Digest { file: place.file, ranges, state: sha.state() };
        let node = || shared.membership.name_of(place.node);
        sha = match ask(shared, place.node, request).await {
            Ok(PartReply::State(state)) => {
                Sha256::resume(&state).ok_or_else(|| format!("node {} answered nonsense", node()))?
            }
            Ok(PartReply::No(reason)) => return Err(format!("on node {}: {reason}", node())),
            Ok(_) => return Err(format!("node {} answered something else", node())),
            Err(reason) => return Err(reason),
        };
        told(sha.bytes());
    }
    if sha.bytes() != bytes {
        return Err("a node hashed another number of bytes than it was asked to".into());
    }
    Ok(sha.finish())
}

/// Who has each byte of a file, from the first to the last; none when some byte is nowhere. Whoever goes on longest is
/// taken, so that the state travels seldom.
fn steps(file: u16, bytes: u64, places: &[Place]) -> Option<Vec<Step>> {
    let mut all: Vec<(usize, Piece)> = places
        .iter()
        .enumerate()
        .flat_map(|(i, place)| place.pieces.iter().filter(|p| p.file == file && p.bytes > 0).map(move |p| (i, *p)))
        .collect();
    all.sort_by_key(|(_, p)| p.from);
    let (mut at, mut next, mut steps) = (0, 0, Vec::new());
    let mut best: Option<(usize, Piece)> = None;
    while at < bytes {
        while let Some((place, piece)) = all.get(next).filter(|(_, p)| p.from <= at) {
            if best.is_none_or(|(_, b)| piece.from_end() > b.from_end()) {
                best = Some((*place, *piece));
            }
            next += 1;
        }
        let (place, piece) = best.filter(|(_, p)| p.from_end() > at)?;
        let end = piece.from_end().min(bytes);
        steps.push(Step { place, at: piece.to + (at - piece.from), bytes: end - at });
        at = end;
    }
    Some(steps)
}

#[cfg(test)]
mod tests {
    use capstan_proto::ContentHash;

    use super::*;

    #[test]
    fn every_byte_is_hashed_once_and_in_order() {
        let place = |pieces: &[(u64, u64, u64)]| Place {
            node: NodeId([0; 32]),
            file: StoredFile::Part(ContentHash([0; 32])),
            pieces: pieces
                .iter()
                .map(|(from, to, bytes)| Piece { file: 0, from: *from, to: *to, bytes: *bytes })
                .collect(),
        };
        let places = [place(&[(0, 0, 15), (40, 15, 20)]), place(&[(10, 100, 30), (60, 7, 40)])];
        let got: Vec<_> = steps(0, 100, &places).unwrap().iter().map(|s| (s.place, s.at, s.bytes)).collect();
        assert_eq!(got, [(0, 0, 15), (1, 105, 25), (0, 15, 20), (1, 7, 40)]);
        assert_eq!(steps(0, 101, &places), None);
        assert_eq!(steps(1, 1, &places), None);
        assert_eq!(steps(0, 0, &[]), Some(vec![]));
    }
}
