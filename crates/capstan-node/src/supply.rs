//! A stage's shard of a model of the catalogue whose weights are not on the coordinator: put together on the stage's own
//! node, from what it has, what others have, and what nobody has from the source.
use capstan_proto::control::ShardRef;
use capstan_proto::weights::{ModelRecord, Part, PartKind, PartReply, PartRequest};
use capstan_proto::{ContentHash, LayerRange, NodeId};
use capstan_store::AssemblyProgress;

use crate::assembling::{self, ask};
use crate::cutter::OpenModel;
use crate::node::Shared;
use crate::plan_pull::stage_order;

/// Has the shard put together where it is needed.
pub(crate) async fn shard(
    shared: &Shared,
    model: &OpenModel,
    range: LayerRange,
    node: NodeId,
    mut progress: impl FnMut(u64, u64) + Send,
) -> Result<ShardRef, String> {
    let record = model.pulled.and_then(|id| shared.models.get(id)).ok_or("the model was removed; pull it again")?;
    let has = |part: &Part| match node == shared.id {
        true => shared.has_part(part.hash),
        false => shared.holders(part.hash).contains(&node),
    };
    if let Some(part) = fitting(&record, range).filter(|part| has(part)) {
        return Ok(ShardRef { hash: part.hash.0, bytes: part.bytes });
    }
    let providers = shared.providers(&record, &model.model);
    let (kind, order) = stage_order(&record, &model.model, range, providers)?;
    let told = |p: AssemblyProgress| progress(p.done_bytes, p.total_bytes);
    let (assembly, outside_bytes) = assembling::on(shared, node, &order, told).await.map_err(|t| t.message)?;
    if outside_bytes > 0 {
        tracing::info!(model = record.name, %range, outside_bytes, "bytes that no node had came from the source");
    }
    match ask(shared, node, PartRequest::Publish { assembly }).await? {
        PartReply::Published { hash, bytes } => {
            shared.models.add_part(record.id, Part { hash, bytes, kind });
            if node == shared.id {
                assembling::settled(shared, hash);
            }
            Ok(ShardRef { hash: hash.0, bytes })
        }
        PartReply::No(reason) => Err(reason),
        _ => Err("its node answered something else; update capstan there".into()),
    }
}

/// The part that is the shard of a range.
fn fitting(record: &ModelRecord, range: LayerRange) -> Option<&Part> {
    let whole = record.files.len() == 1 && range.count() == record.layers;
    record.parts.iter().find(|p| match p.kind {
        PartKind::Layers(r) => r == range,
        PartKind::File(0) => whole,
        _ => false,
    })
}

/// Notes a shard that was cut from a model of the catalogue: whoever has it has a copy of its layers.
pub(crate) fn note(shared: &Shared, model: &OpenModel, range: LayerRange, shard: ShardRef) {
    let Some(record) = model.pulled.and_then(|id| shared.models.get(id)) else { return };
    if model.model.shard_bytes(range) == shard.bytes && range.count() < record.layers {
        let part = Part { hash: ContentHash(shard.hash), bytes: shard.bytes, kind: PartKind::Layers(range) };
        shared.models.add_part(record.id, part);
    }
}
