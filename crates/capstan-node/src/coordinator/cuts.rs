//! Shards that are cut for a deployment: in the background, offered to the stage's node, gone when they are not needed.
use std::path::PathBuf;

use capstan_proto::control::ShardRef;

use super::{Coordinator, Message, QUEUE};
use crate::cutter::CANCELLED;
use crate::node::Shared;
use crate::throttle::Throttle;

/// A shard that has been cut.
pub(crate) struct Cut {
    pub(super) path: PathBuf,
    /// What it is offered as; none for a stage of this node.
    pub(super) shard: Option<ShardRef>,
}

impl Cut {
    /// Takes the offer back and removes what was cut.
    async fn discard(self, shared: &Shared) {
        if let Some(shard) = self.shard
            && let Err(error) = shared.store.withdraw(&shard.hash).await
        {
            tracing::warn!(%error, "a shard could not be withdrawn");
        }
        shared.cutter.discard(&self.path).await;
    }
}

impl Coordinator {
    /// Cuts a stage's shard in the background and offers it when its node is another.
    pub(super) fn begin_cut(&mut self, i: usize) {
        let stage = &mut self.stages[i];
        if stage.cutting || self.cuts_stop.is_cancelled() {
            return;
        }
        stage.cutting = true;
        let here = stage.plan.node == self.shared.id;
        let range = stage.plan.layers;
        let (shared, blueprint, outbox) = (self.shared.clone(), self.blueprint.clone(), self.outbox.clone());
        let stop = self.cuts_stop.clone();
        tokio::spawn(async move {
            let progress = || {
                let (outbox, mut throttle) = (outbox.clone(), Throttle::default());
                move |done, total| {
                    // The next one says more, and what matters needs the room.
                    if throttle.lets(done, total) && outbox.capacity() > QUEUE / 2 {
                        outbox.try_send(Message::Cutting(i, done, total)).ok();
                    }
                }
            };
            let cut = async {
                let path =
                    shared.cutter.cut(blueprint.id, &blueprint.model, range, &shared.store, &stop, progress()).await?;
                let mut cut = Cut { path, shard: None };
                if !here {
                    let offer = tokio::select! {
                        offer = shared.store.offer(&cut.path, progress()) => offer.map_err(|e| e.to_string()),
                        () = stop.cancelled() => Err(CANCELLED.into()),
                    };
                    match offer {
                        Ok(offer) => {
                            let shard = ShardRef { hash: offer.hash, bytes: offer.bytes };
                            shared.cutter.remember(&blueprint.model, range, shard);
                            cut.shard = Some(shard);
                        }
                        Err(error) => {
                            cut.discard(&shared).await;
                            return Err(error);
                        }
                    }
                }
                if stop.is_cancelled() {
                    cut.discard(&shared).await;
                    return Err(CANCELLED.into());
                }
                Ok(cut)
            };
            let result = cut.await;
            if let Err(unsent) = outbox.send(Message::Cut(i, result)).await
                && let Message::Cut(_, Ok(cut)) = unsent.0
            {
                cut.discard(&shared).await;
            }
        });
    }

    /// A stage elsewhere has its shard: what was cut for it can go.
    pub(super) fn drop_cut(&mut self, i: usize) {
        if let Some(cut) = self.stages[i].cut.take_if(|cut| cut.shard.is_some()) {
            let shared = self.shared.clone();
            tokio::spawn(async move { cut.discard(&shared).await });
        }
    }
}
