//! One run: a cluster grows, chance has its way with it, everything heals, and all must agree.
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use capstan_cluster::raft::chance::seed_this_thread;
use capstan_cluster::state::FIRST_LIFE;
use capstan_cluster::ticket::hash_of;
use capstan_cluster::{Command, Newcomer, Response, Voucher, voters};
use capstan_proto::{DeploymentId, Epoch, NodeId};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Mistake;
use super::books::{Books, Tally};
use super::driver::drive;
use super::net::{Net, Weather};
use super::node::{LIMIT, Node, Shared};
use crate::dice::{Dice, mix};

/// Nodes that there are, in the cluster or not.
const NODES: u8 = 8;
/// Deployments that are placed again and again.
const DEPLOYMENTS: u64 = 2;
/// How long everybody may take to agree once everything is healed: some elections, a change of voters.
const AGREE: Duration = Duration::from_secs(60);

/// What is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Decides everything that chance does.
    pub seed: u64,
    /// Write down what happens.
    pub trace: bool,
    /// Build something wrongly.
    pub mistake: Option<Mistake>,
}

/// A rule that was broken.
#[derive(Debug, thiserror::Error)]
#[error("seed {seed}: {rule}")]
pub struct Failure {
    /// The run.
    pub seed: u64,
    /// What must not happen.
    pub rule: String,
    /// What happened before, where it was asked for.
    pub trace: Vec<String>,
}

/// Runs a seed. The number is the run's fingerprint.
pub fn run(options: Options) -> Result<(Tally, u64), Failure> {
    let failed = |rule: String| Failure { seed: options.seed, rule, trace: vec![] };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|e| failed(format!("no runtime: {e}")))?;
    seed_this_thread(mix(options.seed, 1));
    let books = runtime.block_on(live(options));
    // Whatever still runs ends here, and not in the next run.
    drop(runtime);
    let broken = books.broken();
    let fingerprint = books.fingerprint();
    let (tally, trace) = books.close();
    match broken {
        Some(rule) => Err(Failure { seed: options.seed, rule, trace }),
        None => Ok((tally, fingerprint)),
    }
}

struct World {
    nodes: Arc<Vec<Arc<Node>>>,
    shared: Shared,
    /// What clients do at the moment.
    tasks: JoinSet<()>,
}

async fn live(options: Options) -> Books {
    let books = Books::new(options.trace);
    let net = Net::new(Dice::new(mix(options.seed, 2)), books.clone());
    let shared = Shared { net, books: books.clone(), mistake: options.mistake, started: Instant::now() };
    let nodes = (1..=NODES).map(|n| Node::new(n, shared.clone())).collect();
    let mut world = World { nodes: Arc::new(nodes), shared, tasks: JoinSet::new() };
    world.grow().await;
    world.suffer().await;
    world.heal().await;
    if books.broken().is_none() {
        world.agree().await;
        books.nothing_told_was_lost();
    }
    for node in world.nodes.iter() {
        node.stop(false).await;
    }
    books
}

impl World {
    fn draw<T>(&self, draw: impl FnOnce(&mut Dice) -> T) -> T {
        self.shared.net.draw(draw)
    }

    /// A node that runs and was let in.
    fn any(&self) -> Option<Arc<Node>> {
        let running: Vec<_> = self.nodes.iter().filter(|n| n.replica().is_some()).collect();
        if running.is_empty() { None } else { Some((*self.draw(|d| *d.pick(&running))).clone()) }
    }

    /// The first node founds the cluster, some join it.
    async fn grow(&self) {
        let first = &self.nodes[0];
        first.begin_life(FIRST_LIFE);
        first.start().await;
        first.found().await;
        let others = self.draw(|d| d.between(1, 5)) as usize;
        for node in &self.nodes[1..=others] {
            let ticket = self.ticket(first, false).await;
            if let Some(hash) = ticket {
                come_in(first.clone(), node.clone(), hash).await;
            }
        }
    }

    async fn ticket(&self, node: &Arc<Node>, reusable: bool) -> Option<[u8; 32]> {
        let hash = hash_of(&self.draw(|d| [d.bits().to_le_bytes(), d.bits().to_le_bytes()].concat().try_into().ok())?);
        // An hour: tickets that expire are the pure state's tests' business.
        let command = Command::Issue { hash, expires_unix_s: 3600, reusable };
        let issued = node.propose(command).await?;
        issued.is_ok().then_some(hash)
    }

    /// Chance has its way.
    async fn suffer(&mut self) {
        let until = self.draw(|d| d.between(3000, 7000));
        let until = Instant::now() + Duration::from_millis(until);
        while Instant::now() < until && self.shared.books.broken().is_none() {
            match self.draw(|d| d.between(0, 99)) {
                0..=14 => self.weather(),
                15..=29 => self.cut(),
                30..=44 => self.crash().await,
                45..=49 => self.blackout().await,
                _ => self.ask(),
            }
            let pause = self.draw(|d| d.between(20, 400));
            sleep(Duration::from_millis(pause)).await;
            while self.tasks.try_join_next().is_some() {}
        }
    }

    fn weather(&self) {
        let weather = self.draw(|d| Weather {
            lost: *d.pick(&[0.0, 0.02, 0.2]),
            doubled: *d.pick(&[0.0, 0.05, 0.3]),
            delay_ms: *d.pick(&[3, 40, 250]),
        });
        self.shared.books.note(|| format!("{weather:?}"), 4);
        self.shared.net.set_weather(weather);
    }

    /// Cuts some nodes off, one way or both, or heals all cuts.
    fn cut(&self) {
        let nodes: Vec<NodeId> = self.nodes.iter().map(|n| n.id).collect();
        let cuts: BTreeSet<(NodeId, NodeId)> = self.draw(|d| {
            if d.chance(0.3) {
                return BTreeSet::new();
            }
            let (share, back) = (*d.pick(&[0.2, 0.5]), d.chance(0.8));
            let here: BTreeSet<NodeId> = nodes.iter().copied().filter(|_| d.chance(share)).collect();
            let pairs = nodes.iter().flat_map(|a| nodes.iter().map(move |b| (*a, *b)));
            pairs
                .filter(|(a, b)| {
                    (here.contains(a) && !here.contains(b)) || (back && here.contains(b) && !here.contains(a))
                })
                .collect()
        });
        self.shared.books.count(|t| t.cuts += u64::from(!cuts.is_empty()));
        self.shared.books.note(|| format!("cut {cuts:?}"), (5, cuts.len()));
        self.shared.net.set_cuts(cuts);
    }

    async fn crash(&mut self) {
        if let Some(node) = self.any() {
            let power_cut = self.draw(|d| d.chance(0.8));
            self.restart_later(node, power_cut).await;
        }
    }

    /// The power of the house goes.
    async fn blackout(&mut self) {
        for node in self.nodes.clone().iter().filter(|n| n.replica().is_some()) {
            self.restart_later(node.clone(), true).await;
        }
    }

    async fn restart_later(&mut self, node: Arc<Node>, power_cut: bool) {
        node.stop(power_cut).await;
        let later = self.draw(|d| d.between(50, 3000));
        self.tasks.spawn(async move {
            sleep(Duration::from_millis(later)).await;
            node.start().await;
        });
    }

    /// Somebody asks for something.
    fn ask(&mut self) {
        let Some(node) = self.any() else { return };
        let nodes = self.nodes.clone();
        match self.draw(|d| d.between(0, 99)) {
            0..=44 => {
                let (which, stubborn, pieces) =
                    self.draw(|d| (DeploymentId(d.between(1, DEPLOYMENTS)), d.chance(0.5), d.between(3, 25) as u32));
                node.spawn(drive(nodes, node.clone(), which, stubborn, pieces));
            }
            45..=49 => {
                let which = DeploymentId(self.draw(|d| d.between(1, DEPLOYMENTS)));
                let epoch = node.state().and_then(|s| s.placed(which).map(|p| p.epoch)).unwrap_or(Epoch(0));
                let withdraw = Command::Withdraw { deployment: which, previous: epoch };
                // Rarely: a withdrawn deployment is gone for good.
                if self.draw(|d| d.chance(0.2)) {
                    self.tasks.spawn(async move {
                        node.propose(withdraw).await;
                    });
                }
            }
            50..=74 => {
                let Some(other) = self.any() else { return };
                let reusable = self.draw(|d| d.chance(0.2));
                let (a, b) = self.draw(|d| (d.between(0, 7) as usize, d.between(0, 7) as usize));
                let secret = self.draw(|d| d.bits());
                self.tasks.spawn(async move {
                    let mut bytes = [0; 16];
                    bytes[..8].copy_from_slice(&secret.to_le_bytes());
                    let hash = hash_of(&bytes);
                    let issue = Command::Issue { hash, expires_unix_s: 3600, reusable };
                    if matches!(node.propose(issue).await, Some(Ok(_))) {
                        // Two that want in by the same ticket, at two doors.
                        let (one, two) = (nodes[a].clone(), nodes[b].clone());
                        tokio::join!(come_in(node, one, hash), come_in(other, two, hash));
                    }
                });
            }
            75..=86 => {
                let whom = self.draw(|d| *d.pick(&nodes.iter().map(|n| n.id).collect::<Vec<_>>()));
                self.tasks.spawn(async move {
                    node.propose(Command::Remove(whom)).await;
                });
            }
            87..=92 => {
                self.tasks.spawn(async move {
                    let life = node.life();
                    if matches!(node.propose(Command::Leave { life }).await, Some(Ok(Response::Done)))
                        && node.life() == life
                    {
                        // What it was in is of no use to it any more.
                        node.stop(false).await;
                        node.begin_life(0);
                    }
                });
            }
            _ => {
                self.tasks.spawn(async move {
                    let Newcomer { name, .. } = node.newcomer();
                    let refreshed = Newcomer { name: format!("{name}x"), version: "2".into(), ..node.newcomer() };
                    node.propose(Command::Refresh(refreshed)).await;
                });
            }
        }
    }

    async fn heal(&mut self) {
        self.shared.books.note(|| "everything heals".into(), 6);
        self.shared.net.set_weather(Weather::CALM);
        self.shared.net.set_cuts(BTreeSet::new());
        // What clients are about ends; what started nodes again has.
        let end = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(3 * LIMIT, end).await.is_err() {
            self.tasks.abort_all();
        }
    }

    /// All members hold the same state, and the right ones vote.
    async fn agree(&self) {
        let mut why = String::new();
        let agreed = async {
            loop {
                match self.disagreement().await {
                    None => return,
                    Some(reason) => why = reason,
                }
                sleep(Duration::from_millis(100)).await;
            }
        };
        if timeout(AGREE, agreed).await.is_err() {
            self.shared.books.broke(format!("no agreement after everything was healed: {why}"));
        }
    }

    /// The members that can hear of the newest state. Who was away until nobody that it knew was left believes no stranger:
    /// a person has to let it in anew. One that knows such a one only is as lost.
    fn reached(&self, members: &BTreeSet<NodeId>, newest: u64) -> BTreeSet<NodeId> {
        let mut reached = BTreeSet::new();
        loop {
            let finds = |n: &&Arc<Node>| {
                let Some(state) = n.state().filter(|s| s.cluster().is_some()) else { return true };
                state.version() == newest || state.members().active().any(|m| reached.contains(&m.id))
            };
            let inside = self.nodes.iter().filter(|n| members.contains(&n.id));
            let more: BTreeSet<NodeId> = inside.filter(finds).map(|n| n.id).collect();
            if more == reached {
                return reached;
            }
            reached = more;
        }
    }

    async fn disagreement(&self) -> Option<String> {
        let newest = self.nodes.iter().filter_map(|n| n.replica()).max_by_key(|r| r.state().version());
        let Some(newest) = newest else { return Some("nobody runs".into()) };
        let state = newest.state();
        let members: BTreeSet<NodeId> = state.members().active().map(|m| m.id).collect();
        let reached = self.reached(&members, newest.state().version());
        let inside = || self.nodes.iter().filter(|n| reached.contains(&n.id));
        for node in inside() {
            // One that was let in and never heard so asks again, and hears.
            if let Some(life) = state.life(node.id)
                && life > node.lived()
            {
                node.stop(false).await;
                node.begin_life(life);
            }
            node.start().await;
        }
        let mut leaders = BTreeSet::new();
        for node in inside() {
            let Some(replica) = node.replica() else { return Some(format!("{:?} does not run", node.id)) };
            let standing = replica.standing();
            if *replica.state() != *state {
                return Some(format!("{:?} has another state", node.id));
            }
            let all: BTreeSet<NodeId> = standing.voters.union(&standing.learners).copied().collect();
            let settled = voters::voters(&members, &standing.voters, &reached, node.id);
            if all != members || settled.len() != standing.voters.len() {
                return Some(format!(
                    "{:?} has voters {:?} and learners {:?} of members {members:?}",
                    node.id, standing.voters, standing.learners
                ));
            }
            leaders.extend(standing.leader);
        }
        let one = leaders.len() == 1 && leaders.iter().all(|l| members.contains(&l.node));
        (!one).then(|| format!("leaders {leaders:?}"))
    }
}

/// A node that is in no cluster comes in by a ticket, at the door of another.
async fn come_in(door: Arc<Node>, node: Arc<Node>, hash: [u8; 32]) {
    // A removed one tries again and again.
    let removed = door.state().is_some_and(|s| s.removed(node.id).is_some());
    if node.life() != 0 && !removed {
        return;
    }
    let attempt = node.now_ms();
    let admit = Command::Admit { node: node.newcomer(), voucher: Voucher::Ticket(hash), attempt };
    if let Some(Ok(Response::Admitted { life, .. })) = door.propose(admit).await
        && node.life() == 0
    {
        node.begin_life(life);
        node.start().await;
    }
}
