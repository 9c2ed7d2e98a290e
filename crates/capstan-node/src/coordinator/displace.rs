//! A node that stays away does not hold a deployment up: its layers go to the other nodes, if they can hold them, and
//! requests go on there. Where somebody chose the layers of each node, or the others have not enough memory, the
//! deployment waits for the node, and says so.
use std::time::Duration;

use capstan_planner::{Placement, StagePlan};
use capstan_proto::NodeId;
use capstan_proto::control::{StageCommand, StageFile, clip};
use capstan_proto::manage::Health;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Coordinator, Message, Stage};
use crate::blueprint::{Blueprint, Choice};
use crate::fleet::Fleet;
use crate::membership::GOODBYE_GRACE;
use crate::placing;
use crate::scheduling::Wanted;

/// How often the nodes of a deployment are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long until nodes that cannot hold the model are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How long nobody may have asked the model anything before it goes back to the nodes that were named.
const IDLE_BEFORE_HOME: Duration = Duration::from_secs(10);

/// Where a deployment is between the placement it began with and the one it has.
pub(super) struct Displacing {
    /// Counts placements, so that what was begun for an earlier one is known as such.
    pub(super) layout: u64,
    look_at: Instant,
    /// A question to the planner is under way.
    planning: bool,
    ask_at: Option<Instant>,
    /// The placement it was loaded with, while it has another.
    home: Option<Vec<StagePlan>>,
    /// Another placement failed: the nodes of this one are waited for.
    stay: bool,
    idle_since: Option<Instant>,
    may: bool,
    /// Counts questions to the planner, so that an answer that something has overtaken is known as such.
    question: u64,
    leaving: Option<Leaving>,
}

/// A node that is to be left for good.
struct Leaving {
    node: NodeId,
    /// Who waits for that.
    done: oneshot::Sender<Result<(), String>>,
    /// Who had chosen the placement.
    choice: Choice,
}

impl Displacing {
    /// Of a deployment that had these stages with another coordinator, if it had one.
    pub(super) fn new(blueprint: &Blueprint, before: Vec<StagePlan>) -> Self {
        let moved = !before.is_empty() && before.len() != blueprint.stages.len();
        Self {
            layout: 0,
            look_at: Instant::now() + LOOK_EVERY,
            planning: false,
            ask_at: None,
            home: moved.then_some(before),
            stay: false,
            idle_since: None,
            // A rehearsal measures the placement that it was given.
            may: blueprint.choice != Choice::Layers && blueprint.rehearsal.is_none(),
            question: 0,
            leaving: None,
        }
    }

    /// Whether the layers may go to other nodes.
    pub(super) fn may(&self) -> bool {
        self.may
    }

    /// When the nodes are looked at next.
    pub(super) fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Something has changed about a node.
    pub(super) fn look_soon(&mut self) {
        self.look_at = self.look_at.min(Instant::now());
    }
}

impl Coordinator {
    /// Notices nodes that do not answer any more, and decides what becomes of their layers.
    pub(super) fn look_after_nodes(&mut self) -> Result<(), String> {
        let now = Instant::now();
        self.displacing.look_at = now + LOOK_EVERY;
        if self.initial || self.health == Health::Failed {
            return Ok(());
        }
        // Its connection would tell, too, but twice as late.
        for i in 0..self.stages.len() {
            let stage = &self.stages[i];
            if stage.commands.is_some() && stage.loaded.is_some() && !self.shared.membership.online(stage.plan.node) {
                self.away(i, "it does not answer".to_owned())?;
            }
        }
        if !self.displacing.planning && self.stages.iter().any(|s| self.given_up(s, now)) {
            // One that was to take the layers over was lost itself; that comes first.
            self.not_vacated("another node was lost meanwhile; try again when the model answers".to_owned());
        }
        let asked_lately = self.displacing.ask_at.is_some_and(|t| t > now);
        if self.displacing.leaving.is_some() || !self.displacing.may || self.displacing.planning || asked_lately {
            return Ok(());
        }
        if self.stages.iter().all(|s| s.away_since.is_none()) {
            self.displacing.stay = false;
            self.look_homeward(now);
        } else if !self.displacing.stay && self.stages.iter().any(|s| self.given_up(s, now)) {
            self.ask_planner(self.blueprint.choice.there(&self.shared.membership));
        }
        Ok(())
    }

    /// Whether a stage's node has been away for so long that its layers go elsewhere.
    fn given_up(&self, stage: &Stage, now: Instant) -> bool {
        let Some(since) = stage.away_since else { return false };
        let membership = &self.shared.membership;
        if !membership.is_member(stage.plan.node) {
            return true;
        }
        if membership.online(stage.plan.node) {
            return false;
        }
        // Silence has lasted some seconds before it counts as such; a goodbye is heard at once.
        membership.fell_silent(stage.plan.node) || now.duration_since(since) > GOODBYE_GRACE
    }

    /// Back to all nodes that were named, when they are there again and nobody would notice.
    fn look_homeward(&mut self, now: Instant) {
        let Choice::Nodes(named) = &self.blueprint.choice else { return };
        let busy = self.stages.iter().any(|s| s.stats.slots_used > 0 || s.stats.queued > 0);
        if self.displacing.home.is_none() || self.health != Health::Ready || busy {
            self.displacing.idle_since = None;
            return;
        }
        let since = *self.displacing.idle_since.get_or_insert(now);
        if now.duration_since(since) > IDLE_BEFORE_HOME && named.iter().all(|n| self.shared.membership.online(*n)) {
            self.displacing.idle_since = None;
            self.ask_planner(named.clone());
        }
    }

    fn ask_planner(&mut self, nodes: Vec<NodeId>) {
        if nodes.is_empty() && matches!(self.blueprint.choice, Choice::Nodes(_)) {
            return;
        }
        self.displacing.planning = true;
        self.displacing.question += 1;
        let (shared, outbox, question) = (self.shared.clone(), self.outbox.clone(), self.displacing.question);
        let model = self.blueprint.model.clone();
        let options = Wanted::of(&self.blueprint).options(&self.blueprint, nodes);
        let without = self.displacing.leaving.as_ref().map(|l| l.node);
        // What the stages hold now is free by then.
        let held: Vec<_> = self.stages.iter().map(|s| (s.plan.node, s.plan.memory_bytes)).collect();
        tokio::spawn(async move {
            let fleet = Fleet::of(&shared).with_free(&held);
            let fleet = without.iter().fold(fleet, |fleet, node| fleet.without(*node));
            let placed = placing::place_on(&shared, fleet, &model, options, false).await;
            let result = placed.map(|(placement, _)| placement).map_err(|e| e.message);
            outbox.send(Message::Planned(question, result)).await.ok();
        });
    }

    /// Moves the stages away from a node, if the others can hold them.
    pub(super) fn vacate(&mut self, node: NodeId, done: oneshot::Sender<Result<(), String>>) {
        let there = self.stages.iter().any(|s| s.plan.node == node);
        let refused = match (&self.blueprint.choice, self.health) {
            _ if !there => Some(Ok(())),
            _ if self.displacing.leaving.is_some() => Some(Err("it is being moved already; try again then")),
            (_, Health::Ready | Health::Recovering) if self.displacing.may => None,
            (Choice::Layers, _) => Some(Err("somebody fixed its layers; load it again with other --layers")),
            (_, Health::Ready) => Some(Err("it is a rehearsal, which ends by itself")),
            _ => Some(Err("it is not ready; unload it, or try again when it is")),
        };
        if let Some(answer) = refused {
            done.send(answer.map_err(str::to_owned)).ok();
            return;
        }
        self.displacing.leaving = Some(Leaving { node, done, choice: self.blueprint.choice.clone() });
        let mut nodes = self.blueprint.choice.there(&self.shared.membership);
        nodes.retain(|n| *n != node);
        if nodes.is_empty() && matches!(self.blueprint.choice, Choice::Nodes(_)) {
            self.not_vacated("no other node was named for it; load it again with other --nodes".to_owned());
            return;
        }
        self.ask_planner(nodes);
    }

    /// Goes to a placement without a node, and stays away from it.
    fn leave(&mut self, node: NodeId, placement: Placement) {
        let mut nodes: Vec<_> = placement.stages().iter().map(|s| s.node).collect();
        nodes.dedup();
        self.blueprint.choice = Choice::Nodes(nodes);
        // Left to the planner it might go back.
        self.shared.deployments.pin(self.blueprint.id);
        let home = self.blueprint.stages.clone();
        let name = self.shared.membership.name_of(node);
        self.replace(placement, &format!("node {name} is drained"));
        self.displacing.home = Some(home);
    }

    pub(super) fn not_vacated(&mut self, why: String) {
        if let Some(leaving) = self.displacing.leaving.take() {
            self.blueprint.choice = leaving.choice;
            leaving.done.send(Err(why)).ok();
        }
    }

    /// The model answers: who waits for a node to be left hears whether it was.
    pub(super) fn vacated(&mut self) {
        let Some(Leaving { node, done, choice }) = self.displacing.leaving.take() else { return };
        if self.stages.iter().any(|s| s.plan.node == node) {
            self.blueprint.choice = choice;
            done.send(Err("the other nodes could not take over; see their logs".to_owned())).ok();
        } else {
            // There is nothing to go back to.
            self.displacing.home = None;
            done.send(Ok(())).ok();
        }
    }

    /// What the planner says.
    pub(super) fn planned(&mut self, question: u64, result: Result<Placement, String>) -> Result<(), String> {
        if question != self.displacing.question {
            return Ok(());
        }
        self.displacing.planning = false;
        self.displacing.ask_at = Some(Instant::now() + ASK_AGAIN);
        if let Some(node) = self.displacing.leaving.as_ref().map(|l| l.node) {
            match result {
                Ok(placement) => self.leave(node, placement),
                Err(reason) => self.not_vacated(format!("the other nodes cannot hold it: {reason}")),
            }
            return Ok(());
        }
        let away: Vec<_> = self.stages.iter().filter(|s| s.away_since.is_some()).map(|s| s.plan.node).collect();
        let names: Vec<_> = away.iter().map(|n| self.shared.membership.name_of(*n)).collect();
        match result {
            // It has come back in the meantime.
            Ok(placement) if placement.stages().iter().any(|s| away.contains(&s.node)) => {}
            Ok(placement) if away.is_empty() => {
                let home = self.displacing.home.take();
                self.replace(placement, "it goes back to the nodes that were named");
                // Named nodes may be there in part only, if they go once more.
                self.displacing.home = home.filter(|h| h.len() != self.stages.len());
            }
            Ok(placement) => {
                let home = self.displacing.home.take().unwrap_or_else(|| self.blueprint.stages.clone());
                self.replace(placement, &format!("without node {}", names.join(" and ")));
                self.displacing.home = Some(home);
            }
            Err(reason) if away.iter().any(|node| !self.shared.membership.is_member(*node)) => {
                let names = names.join(" and ");
                return Err(format!("node {names} left the cluster, and the others cannot take over: {reason}"));
            }
            Err(reason) if !away.is_empty() => {
                self.trouble(format!(
                    "waiting for node {}; the others cannot take over: {reason}",
                    names.join(" and ")
                ));
            }
            Err(reason) => tracing::info!(model = self.blueprint.name, reason, "the model stays where it is"),
        }
        Ok(())
    }

    /// Another placement did not come up: back to the one that worked, to wait for its nodes. False when there is none.
    pub(super) fn go_home(&mut self) -> bool {
        let Some(home) = self.displacing.home.take() else { return false };
        let layers = self.blueprint.model.model.n_layers();
        if home.iter().any(|s| !self.shared.membership.is_member(s.node)) {
            return false;
        }
        let Ok(placement) = Placement::new(layers, home, vec![]) else { return false };
        self.replace(placement, "the other nodes could not take over, so its own are waited for");
        self.displacing.stay = true;
        true
    }

    /// Ends all stages and begins anew with another placement. Requests wait meanwhile.
    fn replace(&mut self, placement: Placement, because: &str) {
        let generation = self.stages.iter().map(|s| s.generation).max().unwrap_or(0) + 1;
        self.abort_requests(&format!("the model is loaded anew, {because}"));
        self.cuts_stop.cancel();
        let fresh = CancellationToken::new();
        self._cuts_stop = fresh.clone().drop_guard();
        self.cuts_stop = fresh;
        for i in 0..self.stages.len() {
            if let Some(commands) = &self.stages[i].commands {
                // A full queue belongs to a stage that hangs; losing its commands ends it, too.
                commands.try_send(StageCommand::Stop).ok();
            }
            self.down(i);
            self.drop_cut(i, StageFile::Shard);
            self.drop_cut(i, StageFile::Draft);
        }
        self.displacing.layout += 1;
        self.displacing.planning = false;
        self.displacing.question += 1;
        let (scheduling, draft) = Wanted::of(&self.blueprint).scheduling(placement.stages().len());
        self.blueprint.scheduling = scheduling;
        self.blueprint.draft = draft;
        self.blueprint.stages = placement.stages().to_vec();
        let model = &self.blueprint.model.model;
        self.stages = self.blueprint.stages.iter().map(|plan| Stage::new(plan, model, generation)).collect();
        self.mending = false;
        let on: Vec<_> = self.blueprint.stages.iter().map(|s| format!("{} {}", s.node_name, s.layers)).collect();
        let detail = clip(format!("{because}: now {}", on.join(", ")));
        tracing::warn!(model = self.blueprint.name, detail, "a deployment is loaded anew");
        self.health = Health::Recovering;
        self.detail = detail;
        self.shared.deployments.keep(&self.blueprint);
        for i in 0..self.stages.len() {
            self.start(i);
        }
        self.publish();
    }
}
