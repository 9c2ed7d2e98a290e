//! A stage's files, its shard and a draft model: found on this node's disk, or fetched from its coordinator.
use std::path::PathBuf;

use capstan_proto::control::{ShardRef, StageCommand, StageEvent, StageFile, StageOrder};
use capstan_proto::{ContentHash, NodeId};
use capstan_store::{Hold, StoreError};
use tokio::sync::mpsc;

use crate::node::Shared;
use crate::rehearsal::MadeUpFile;
use crate::runs::unless_stopped;
use crate::stages::Events;
use crate::throttle::Throttle;

/// Where a stage's files come from.
pub(crate) enum FileSource {
    /// This node coordinates: its store has them, and what need not be cut lies where it is.
    Here {
        /// A model that stays whole.
        shard: Option<PathBuf>,
        /// A draft model.
        draft: Option<PathBuf>,
    },
    /// The coordinator offers them.
    There(NodeId),
}

/// A file that may be loaded.
pub(crate) struct ArrivedFile {
    pub(crate) path: PathBuf,
    /// Keeps it on the disk for as long as the stage lives.
    _hold: Option<Hold>,
    /// Removes it when the stage has ended.
    _made_up: Option<MadeUpFile>,
}

impl ArrivedFile {
    fn kept(path: PathBuf, hold: Option<Hold>) -> Self {
        Self { path, _hold: hold, _made_up: None }
    }
}

/// What a stage's files need while they arrive.
pub(crate) struct Arrival<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) source: FileSource,
    pub(crate) events: &'a Events,
}

impl Arrival<'_> {
    /// The file to load; none when the stage was stopped while it waited. `known` is what the coordinator says it is.
    pub(crate) async fn file(
        &self,
        file: StageFile,
        known: Option<ShardRef>,
        commands: &mut mpsc::Receiver<StageCommand>,
    ) -> Result<Option<ArrivedFile>, String> {
        let what = match file {
            StageFile::Shard => "its shard",
            StageFile::Draft => "its draft model",
        };
        let trouble = |e: StoreError| format!("could not get {what}: {e}");
        if let FileSource::Here { shard, draft } = &self.source
            && let Some(path) = match file {
                StageFile::Shard => shard,
                StageFile::Draft => draft,
            }
        {
            return Ok(Some(ArrivedFile::kept(path.clone(), None)));
        }
        if let Some(known) = known {
            let hold = self.shared.store.hold(&known.hash);
            // Hashed once by each daemon, minutes for a large one; later only when its size or time has changed.
            let check = self.shared.store.local_verified(&known.hash, self.progress());
            let Some(found) = unless_stopped(commands, check).await else { return Ok(None) };
            if let Some(path) = found.map_err(trouble)? {
                self.events.must(StageEvent::Fetched(file))?;
                return Ok(Some(ArrivedFile::kept(path, Some(hold))));
            }
        }
        self.events.must(StageEvent::Need(file))?;
        let offer = loop {
            match commands.recv().await {
                Some(StageCommand::Fetch(f, offer)) if f == file => break offer,
                Some(StageCommand::Stop) | None => return Ok(None),
                Some(_) => {}
            }
        };
        let hold = self.shared.store.hold(&offer.hash);
        let got = match self.source {
            FileSource::Here { .. } => {
                let check = self.shared.store.local_verified(&offer.hash, self.progress());
                let Some(found) = unless_stopped(commands, check).await else { return Ok(None) };
                found.map_err(trouble)?.ok_or_else(|| format!("could not get {what}: it was deleted; load again"))?
            }
            FileSource::There(coordinator) => {
                let member = self.shared.membership.get(coordinator);
                let member = member.ok_or_else(|| format!("could not get {what}: its coordinator left the cluster"))?;
                let from = crate::endpoint::dial_addr(coordinator, &member.addrs)
                    .ok_or_else(|| format!("could not get {what}: a bad key"))?;
                let (store, endpoint) = (&self.shared.store, &self.shared.endpoint);
                // Others may have it, too: of a model of the catalogue, or from an earlier load.
                let mut holders = self.shared.holders(ContentHash(offer.hash));
                holders.retain(|node| *node != coordinator);
                let from = [from].into_iter().chain(self.shared.dial_addrs(&holders)).collect();
                let fetch = store.fetch_from(endpoint, from, offer.hash, offer.bytes, self.progress());
                // What has arrived when it is stopped stays for the next attempt.
                let Some(path) = unless_stopped(commands, fetch).await else { return Ok(None) };
                path.map_err(trouble)?
            }
        };
        self.events.must(StageEvent::Fetched(file))?;
        Ok(Some(ArrivedFile::kept(got, Some(hold))))
    }

    /// The stage's shard: made up here, or brought here. None when the stage was stopped meanwhile.
    pub(crate) async fn shard(
        &self,
        order: &mut StageOrder,
        commands: &mut mpsc::Receiver<StageCommand>,
    ) -> Result<Option<ArrivedFile>, String> {
        // Its header, which is megabytes, is not needed any more then.
        let Some(made_up) = order.made_up.take() else {
            return self.file(StageFile::Shard, order.shard, commands).await;
        };
        let make = self.shared.rehearsals.make(order.spec.deployment, order.spec.stage, made_up);
        let Some(file) = unless_stopped(commands, make).await else { return Ok(None) };
        let file = file.map_err(|e| format!("could not make its weights up: {e}"))?;
        Ok(Some(ArrivedFile { path: file.path().to_owned(), _hold: None, _made_up: Some(file) }))
    }

    fn progress(&self) -> impl FnMut(u64, u64) + Send {
        let mut throttle = Throttle::default();
        move |done_bytes, total_bytes| {
            if throttle.lets(done_bytes, total_bytes) {
                self.events.may(StageEvent::Fetching { done_bytes, total_bytes });
            }
        }
    }
}
