//! What each node gets of a model that is pulled, as orders: pure, from the model's header and the layers of each node.
use capstan_gguf::Model;
use capstan_proto::LayerRange;
use capstan_proto::weights::{AssembleOrder, ModelRecord, PIECES_MAX, PartKind, Piece, Provider, Span};

use crate::catalogue::pieces;

/// Most bytes that several shards need and that are fetched once, into the head that every node gets. They are tables of
/// frequencies and the like, some kilobytes; what is larger is fetched by each shard for itself.
const SHARED_BYTES_MAX: u64 = 16 << 20;

/// The original file whole.
pub(crate) fn file_order(record: &ModelRecord, file: u16, providers: Vec<Provider>) -> AssembleOrder {
    let bytes = record.files.get(usize::from(file)).map_or(0, |f| f.bytes);
    let pieces = vec![Piece { file, from: 0, to: 0, bytes }];
    let what = record.files.get(usize::from(file)).map_or(String::new(), |f| f.path.clone());
    order(record, what, bytes, Vec::new(), pieces, providers)
}

/// These bytes one after the other.
pub(crate) fn spans_order(record: &ModelRecord, spans: &[Span], providers: Vec<Provider>) -> AssembleOrder {
    let mut to = 0;
    let piece = |s: &Span| {
        let piece = Piece { file: s.file, from: s.from, to, bytes: s.bytes };
        to += s.bytes;
        piece
    };
    let pieces: Vec<Piece> = spans.iter().map(piece).collect();
    order(record, format!("what no shard of {} holds", record.name), to, Vec::new(), pieces, providers)
}

/// What a stage of these layers loads: the original file where that is all of it, else a shard.
pub(crate) fn stage_order(
    record: &ModelRecord,
    model: &Model,
    range: LayerRange,
    providers: Vec<Provider>,
) -> Result<(PartKind, AssembleOrder), String> {
    if record.files.len() == 1 && range.count() == model.n_layers() {
        return Ok((PartKind::File(0), file_order(record, 0, providers)));
    }
    let recipe = model.shard_recipe(range).map_err(|e| e.to_string())?;
    let what = format!("layers {range} of {}", record.name);
    Ok((PartKind::Layers(range), order(record, what, recipe.bytes, recipe.header, pieces(&recipe.runs), providers)))
}

fn order(
    record: &ModelRecord,
    what: String,
    bytes: u64,
    header: Vec<u8>,
    pieces: Vec<Piece>,
    mut providers: Vec<Provider>,
) -> AssembleOrder {
    // Too many pieces for a message: the smallest providers can be done without, the source has all.
    providers.sort_by_key(|p| p.pieces.len());
    let mut left = PIECES_MAX.saturating_sub(pieces.len());
    providers.retain(|p| {
        let fits = p.pieces.len() <= left;
        left -= if fits { p.pieces.len() } else { 0 };
        fits
    });
    AssembleOrder { model: record.id, what, bytes, header, pieces, files: record.files.clone(), providers }
}

/// A stretch of a file and how many shards hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    span: Span,
    shards: usize,
}

/// The whole of a file in stretches that equally many shards hold.
fn stretches(file: u16, file_bytes: u64, held: &[(u64, u64)]) -> Vec<Stretch> {
    let mut borders: Vec<(u64, i64)> = held.iter().flat_map(|(from, end)| [(*from, 1), (*end, -1)]).collect();
    borders.push((file_bytes, 0));
    borders.sort();
    let (mut at, mut depth, mut all) = (0, 0i64, Vec::<Stretch>::new());
    for (border, change) in borders {
        let border = border.min(file_bytes);
        if border > at {
            let (shards, bytes) = (depth.max(0) as usize, border - at);
            match all.last_mut().filter(|last| last.shards == shards) {
                Some(last) => last.span.bytes += bytes,
                None => all.push(Stretch { span: Span { file, from: at, bytes }, shards }),
            }
            at = border;
        }
        depth += change;
    }
    all
}

/// What of a model more than one of these shards needs, and what none of them holds. The head counts for both as held
/// already.
pub(crate) fn shared_and_rest(
    record: &ModelRecord,
    model: &Model,
    ranges: &[LayerRange],
    head: &[Span],
) -> Result<(Vec<Span>, Vec<Span>), String> {
    let mut held: Vec<Vec<(u64, u64)>> = vec![Vec::new(); record.files.len()];
    for range in ranges {
        for run in model.shard_recipe(*range).map_err(|e| e.to_string())?.runs {
            if let Some(of_file) = held.get_mut(run.file) {
                of_file.push((run.from, run.from + run.len));
            }
        }
    }
    let (mut shared, mut rest) = (Vec::new(), Vec::new());
    for (i, (file, held)) in record.files.iter().zip(&held).enumerate() {
        let of_head: Vec<_> =
            head.iter().filter(|s| usize::from(s.file) == i).map(|s| (s.from, s.from + s.bytes)).collect();
        let outside_head = |span: Span| {
            let inside = stretches(span.file, file.bytes, &of_head).into_iter().filter(|s| s.shards == 0);
            let cut = move |s: Stretch| {
                let from = s.span.from.max(span.from);
                let end = (s.span.from + s.span.bytes).min(span.from + span.bytes);
                (from < end).then(|| Span { from, bytes: end - from, ..span })
            };
            inside.filter_map(cut).collect::<Vec<_>>()
        };
        for stretch in stretches(i as u16, file.bytes, held) {
            match stretch.shards {
                0 => rest.extend(outside_head(stretch.span)),
                1 => {}
                _ => shared.extend(outside_head(stretch.span)),
            }
        }
    }
    if shared.iter().map(|s: &Span| s.bytes).sum::<u64>() > SHARED_BYTES_MAX {
        shared.clear();
    }
    Ok((shared, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_cover_a_file_and_count_its_holders() {
        let all = stretches(3, 100, &[(10, 30), (20, 40), (90, 120)]);
        let got: Vec<_> = all.iter().map(|s| (s.span.from, s.span.bytes, s.shards)).collect();
        assert_eq!(got, [(0, 10, 0), (10, 10, 1), (20, 10, 2), (30, 10, 1), (40, 50, 0), (90, 10, 1)]);
        assert_eq!(stretches(0, 5, &[]).len(), 1);
    }

    #[test]
    fn the_shards_of_all_layers_the_head_and_the_rest_are_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        for name in capstan_testkit::tiny::PROMISED {
            let path = dir.path().join("m.gguf");
            capstan_testkit::tiny::write(name, &path).unwrap();
            let model = Model::open(&path).unwrap();
            let bytes = model.bytes();
            let record = crate::pull_source::record_of_file(&path, &model, "m", 1);
            let ranges = model.finest_partition();
            let head = [Span { file: 0, from: 0, bytes: crate::catalogue::header_bytes(&model, 0, bytes) }];
            let (shared, rest) = shared_and_rest(&record, &model, &ranges, &head).unwrap();
            let mut counted = vec![0u8; bytes as usize];
            let mut count = |from: u64, bytes: u64| {
                counted[from as usize..(from + bytes) as usize].iter_mut().for_each(|c| *c += 1);
            };
            for range in &ranges {
                let recipe = model.shard_recipe(*range).unwrap();
                recipe.runs.iter().for_each(|r| count(r.from, r.len));
            }
            head.iter().chain(&rest).for_each(|s| count(s.from, s.bytes));
            let twice: u64 = counted.iter().filter(|c| **c > 1).count() as u64;
            assert!(counted.iter().all(|c| *c > 0), "{name}: a byte is in no part");
            assert_eq!(twice, shared.iter().map(|s| s.bytes).sum::<u64>(), "{name}");
        }
    }
}
