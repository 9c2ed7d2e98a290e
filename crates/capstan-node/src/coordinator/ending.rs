//! How a deployment ends: unloaded, its load failed, or given up for now.
use std::time::Duration;

use capstan_proto::control::{StageCommand, StageEvent, StageFile, clip};
use capstan_proto::manage::{Health, LoadEvent};
use tokio::time::timeout;

use super::{Coordinator, Message};
use crate::agreement;
use crate::session::SessionEvent;

/// How long stages may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(8);

impl Coordinator {
    /// Stops all stages and what is being cut for them, and waits until their processes are gone.
    pub(super) async fn end_stages(&mut self) {
        self.cuts_stop.cancel();
        for stage in &mut self.stages {
            stage.retry_at = None;
            if let Some(commands) = &stage.commands {
                commands.try_send(StageCommand::Stop).ok();
            }
        }
        self.rewire_at = None;
        let all_ended = async {
            while self.stages.iter().any(|s| s.commands.is_some() || s.shard.cutting || s.draft.cutting) {
                let over = match self.inbox.recv().await {
                    Some(Message::Session(
                        i,
                        g,
                        SessionEvent::Stage(StageEvent::Ended { .. }) | SessionEvent::Away(_),
                    ))
                    | Some(Message::Closed(i, g)) => (i, g),
                    Some(Message::Cut(layout, i, file, result)) if layout == self.displacing.layout => {
                        let supply = self.stages[i].supply(file);
                        supply.cutting = false;
                        supply.cut = result.ok();
                        continue;
                    }
                    Some(Message::Unload(done)) => {
                        self.unloads.push(done);
                        continue;
                    }
                    Some(Message::Cut(_, _, _, Ok(cut))) => {
                        self.discard(cut);
                        continue;
                    }
                    Some(_) => continue,
                    None => return,
                };
                if let Some(stage) = self.stages.get_mut(over.0).filter(|s| s.generation == over.1) {
                    stage.commands = None;
                }
            }
        };
        if timeout(END_TIMEOUT, all_ended).await.is_err() {
            tracing::warn!(model = self.blueprint.name, "some stages did not end in time; their nodes end them");
        }
        for i in 0..self.stages.len() {
            self.down(i);
            self.drop_cut(i, StageFile::Shard);
            self.drop_cut(i, StageFile::Draft);
        }
    }

    /// Forgets the deployment, and tells who waits for that.
    pub(super) async fn remove(&mut self) {
        self.shared.deployments.remove(self.blueprint.id);
        // After a restart the log knows its epoch better than this coordinator, which may not have been wired.
        if let Some(epoch) = self.shared.placed_here(self.blueprint.id) {
            agreement::withdraw(&self.shared, self.blueprint.id, epoch);
        }
        self.shared.cutter.clear(self.blueprint.id).await;
        self.shared.push_deployments().await;
        for done in self.unloads.drain(..) {
            done.send(()).ok();
        }
    }

    pub(super) async fn fail_load(&mut self, message: String) {
        tracing::warn!(model = self.blueprint.name, message, "a load failed");
        self.end_stages().await;
        self.remove().await;
        if let Some(progress) = self.progress.take() {
            progress.send(LoadEvent::Failed { message }).await.ok();
        }
    }

    pub(super) async fn fail(&mut self, message: String) {
        tracing::error!(model = self.blueprint.name, message, "a deployment failed");
        self.abort_requests(&message);
        self.not_vacated(message.clone());
        self.health = Health::Failed;
        self.detail = clip(message);
        self.publish();
        self.end_stages().await;
        self.publish();
    }
}
