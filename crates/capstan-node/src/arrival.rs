//! A stage's shard: found on this node's disk, or fetched from its coordinator.
use std::path::PathBuf;

use capstan_proto::NodeId;
use capstan_proto::control::{ShardRef, StageCommand, StageEvent, StageOrder};
use capstan_store::{Hold, StoreError};
use tokio::sync::mpsc;

use crate::node::Shared;
use crate::runs::unless_stopped;
use crate::stages::Events;
use crate::throttle::Throttle;

/// Where a stage's shard comes from.
pub(crate) enum ShardSource {
    /// A file of this node.
    Local(PathBuf),
    /// The coordinator offers it.
    Fetch(NodeId),
}

/// A shard that may be loaded.
pub(crate) struct ShardFile {
    pub(crate) path: PathBuf,
    /// Keeps it on the disk for as long as the stage lives.
    _hold: Option<Hold>,
}

/// The file to load; none when the stage was stopped while it waited.
pub(crate) async fn shard_file(
    shared: &Shared,
    order: &StageOrder,
    source: ShardSource,
    commands: &mut mpsc::Receiver<StageCommand>,
    events: &Events,
) -> Result<Option<ShardFile>, String> {
    let coordinator = match source {
        ShardSource::Local(path) => return Ok(Some(ShardFile { path, _hold: None })),
        ShardSource::Fetch(coordinator) => coordinator,
    };
    let trouble = |e: StoreError| format!("could not get its shard: {e}");
    let progress = || {
        let mut throttle = Throttle::default();
        move |done_bytes, total_bytes| {
            if throttle.lets(done_bytes, total_bytes) {
                events.may(StageEvent::Fetching { done_bytes, total_bytes });
            }
        }
    };
    if let Some(shard) = order.shard {
        let hold = shared.store.hold(&shard.hash);
        // After a restart all of it is hashed: minutes for a large one.
        let check = shared.store.local_verified(&shard.hash, progress());
        let Some(found) = unless_stopped(commands, check).await else { return Ok(None) };
        if let Some(path) = found.map_err(trouble)? {
            events.must(StageEvent::Fetched)?;
            return Ok(Some(ShardFile { path, _hold: Some(hold) }));
        }
    }
    events.must(StageEvent::NeedShard)?;
    let shard: ShardRef = loop {
        match commands.recv().await {
            Some(StageCommand::Fetch(shard)) => break shard,
            Some(StageCommand::Stop) | None => return Ok(None),
            Some(_) => {}
        }
    };
    let member =
        shared.membership.get(coordinator).ok_or("could not get its shard: its coordinator left the cluster")?;
    let from = crate::endpoint::dial_addr(coordinator, &member.addrs).ok_or("could not get its shard: a bad key")?;
    let hold = shared.store.hold(&shard.hash);
    let fetch = shared.store.fetch(&shared.endpoint, from, shard.hash, shard.bytes, progress());
    // What has arrived when it is stopped stays for the next attempt.
    let Some(path) = unless_stopped(commands, fetch).await else { return Ok(None) };
    let path = path.map_err(trouble)?;
    events.must(StageEvent::Fetched)?;
    Ok(Some(ShardFile { path, _hold: Some(hold) }))
}
