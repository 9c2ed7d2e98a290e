//! Files that a deployment's stages ask for: cut in the background, kept in this node's store for a stage of its own or
//! offered to the stage's node, withdrawn when they are not needed.
use std::path::PathBuf;

use capstan_proto::control::{ShardRef, StageCommand, StageFile};
use capstan_store::Hold;

use super::{Coordinator, Message, QUEUE};
use crate::cutter::CANCELLED;
use crate::node::Shared;
use crate::supply;
use crate::throttle::Throttle;

/// A file that is there for its stage.
pub(crate) struct Cut {
    pub(super) shard: ShardRef,
    /// What is offered to another node; none when the store has it.
    offered: Option<PathBuf>,
    /// Keeps it in the store until its stage holds it itself.
    _hold: Option<Hold>,
}

/// A file of a stage, as its coordinator knows it.
#[derive(Default)]
pub(super) struct Supply {
    pub(super) cutting: bool,
    pub(super) cut: Option<Cut>,
}

impl Cut {
    /// Takes the offer back and removes what was cut for it.
    async fn discard(self, shared: &Shared) {
        let Some(path) = self.offered else { return };
        if let Err(error) = shared.store.withdraw(&self.shard.hash).await {
            tracing::warn!(%error, "a shard could not be withdrawn");
        }
        shared.cutter.discard(&path).await;
    }
}

impl Coordinator {
    /// Answers a stage that has not got one of its files.
    pub(super) fn supply(&mut self, i: usize, file: StageFile) {
        match self.stages[i].supply(file).cut.as_ref().map(|cut| cut.shard) {
            Some(shard) => self.hand_over(i, file, shard),
            None => self.begin_cut(i, file),
        }
    }

    /// Tells a stage that its file can be had.
    fn hand_over(&self, i: usize, file: StageFile, shard: ShardRef) {
        if let Some(commands) = &self.stages[i].commands {
            commands.try_send(StageCommand::Fetch(file, shard)).ok();
        }
    }

    /// Cuts a file in the background; a draft model is only hashed.
    fn begin_cut(&mut self, i: usize, file: StageFile) {
        let blueprint = self.blueprint.clone();
        let (model, range) = match (file, blueprint.draft) {
            (StageFile::Shard, _) => (blueprint.model, self.stages[i].plan.layers),
            (StageFile::Draft, Some(draft)) if i + 1 == self.stages.len() => match draft.whole() {
                Some(range) => (draft, range),
                None => return,
            },
            // A stage that asks for what it was not told of waits in vain.
            (StageFile::Draft, _) => return,
        };
        let here = self.stages[i].plan.node == self.shared.id;
        let supply = self.stages[i].supply(file);
        if supply.cutting || self.cuts_stop.is_cancelled() {
            return;
        }
        supply.cutting = true;
        let (shared, outbox, stop) = (self.shared.clone(), self.outbox.clone(), self.cuts_stop.clone());
        let layout = self.displacing.layout;
        let node = self.stages[i].plan.node;
        tokio::spawn(async move {
            let progress = || {
                let (outbox, mut throttle) = (outbox.clone(), Throttle::default());
                move |done, total| {
                    // The next one says more, and what matters needs the room.
                    if throttle.lets(done, total) && outbox.capacity() > QUEUE / 2 {
                        outbox.try_send(Message::Cutting(layout, i, done, total)).ok();
                    }
                }
            };
            let cut = async {
                if model.elsewhere {
                    let shard = tokio::select! {
                        shard = supply::shard(&shared, &model, range, node, progress()) => shard?,
                        () = stop.cancelled() => return Err(CANCELLED.into()),
                    };
                    shared.cutter.remember(&model, range, shard);
                    return Ok(Cut { shard, offered: None, _hold: here.then(|| shared.store.hold(&shard.hash)) });
                }
                let path = shared.cutter.cut(blueprint.id, &model, range, &shared.store, &stop, progress()).await?;
                // To adopt is to move, which nobody's model may be.
                let adopted = here && shared.cutter.made(&path);
                let place = async {
                    let placed = if adopted {
                        shared.store.adopt(&path, progress()).await
                    } else {
                        shared.store.offer(&path, progress()).await
                    };
                    placed.map_err(|e| e.to_string())
                };
                let placed = tokio::select! {
                    placed = place => placed,
                    () = stop.cancelled() => Err(CANCELLED.into()),
                };
                let offer = match placed {
                    Ok(offer) => offer,
                    Err(error) => {
                        shared.cutter.discard(&path).await;
                        return Err(error);
                    }
                };
                let shard = ShardRef { hash: offer.hash, bytes: offer.bytes };
                let hold = adopted.then(|| shared.store.hold(&shard.hash));
                shared.cutter.remember(&model, range, shard);
                supply::note(&shared, &model, range, shard);
                let cut = Cut { shard, offered: (!adopted).then_some(path), _hold: hold };
                if stop.is_cancelled() {
                    cut.discard(&shared).await;
                    return Err(CANCELLED.into());
                }
                Ok(cut)
            };
            let result = cut.await;
            if let Err(unsent) = outbox.send(Message::Cut(layout, i, file, result)).await
                && let Message::Cut(_, _, _, Ok(cut)) = unsent.0
            {
                cut.discard(&shared).await;
            }
        });
    }

    /// What was asked for is there, or will not be.
    pub(super) fn was_cut(&mut self, i: usize, file: StageFile, result: Result<Cut, String>) -> Result<(), String> {
        self.stages[i].supply(file).cutting = false;
        let cut = result.map_err(|e| match file {
            StageFile::Shard => format!("the shard of {} could not be cut: {e}", self.name_stage(i)),
            StageFile::Draft => format!("the draft model could not be offered to {}: {e}", self.name_stage(i)),
        })?;
        let shard = cut.shard;
        self.stages[i].supply(file).cut = Some(cut);
        self.hand_over(i, file, shard);
        Ok(())
    }

    /// A stage has its file: what was cut for it can go.
    pub(super) fn drop_cut(&mut self, i: usize, file: StageFile) {
        if let Some(cut) = self.stages[i].supply(file).cut.take() {
            self.discard(cut);
        }
    }

    pub(super) fn discard(&self, cut: Cut) {
        let shared = self.shared.clone();
        tokio::spawn(async move { cut.discard(&shared).await });
    }
}
