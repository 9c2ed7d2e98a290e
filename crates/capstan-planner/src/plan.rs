//! Which layers go where, or a sentence that says why nowhere.
//!
//! Memory is what decides whether a placement exists. Which nodes are used, and in which order, is what gives one token
//! the shortest way, by what was measured of nodes and links; the layers are then cut so that the slowest stage is
//! fastest, for a pipeline is as fast as that. Until all nodes are measured they count as equally fast, and as few as
//! possible are used. Among equally fast cuts the layers lie in proportion to free memory: the sum of need²/free is
//! smallest then.
//!
//! For a fixed order of nodes that is exact, by dynamic programming over allowed windows, twice: `best(i, l)` is the
//! cheapest way to put the first `l` layers on the first `i` nodes. First the largest cost of a stage is minimised, then,
//! among placements no slower than that, the sum. One pass over pairs would not do: a prefix that is second best by its
//! largest stage may become the best by its sum once a larger stage follows.
use std::cell::RefCell;
use std::collections::HashMap;

use capstan_proto::{LayerRange, NodeId, limits};

use crate::arrange::{Hops, Kind, Objective, Problem, arrange};
use crate::cost::{Need, Sizes};
use crate::human_bytes;
use crate::links::Links;
use crate::placement::{BadPlacement, Placement, StagePlan};
use crate::timing::{self, Times};

/// Up to this many nodes every order is tried before "it does not fit" is said: 325 orders at most.
const EXHAUSTIVE_NODES: usize = 5;

/// The node that has the model's file is used alone if another one would be faster by less than this: its shard need not
/// be sent.
const WORTH_SENDING: f64 = 1.1;

/// A node that may hold layers.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeResources {
    /// Its key.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Memory that stages may take, in bytes.
    pub free_bytes: u64,
    /// How long it takes for each layer to decode a row, or as many as decode at once where many are to be answered; by
    /// what was measured of it, none before.
    pub times: Option<Times>,
}

/// What the user wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Tokens a slot holds.
    pub ctx: u32,
    /// Sequences at once.
    pub slots: u32,
    /// Sequences kept beyond the slots for each stage of a pipeline, for guesses that cannot be trimmed.
    pub spares_per_stage: u32,
    /// What a draft model takes beside the last stage of a pipeline, in bytes.
    pub draft_bytes: u64,
    /// Most rows of a micro-batch.
    pub ubatch: u32,
    /// What the placement is to be best at, once the nodes are measured.
    pub objective: Objective,
    /// Use exactly these, in this order; empty leaves the choice to the planner.
    pub nodes: Vec<NodeId>,
    /// Use exactly this placement; empty leaves the choice to the planner.
    pub layers: Vec<(NodeId, LayerRange)>,
}

/// Everything that decides a placement.
pub struct PlanInput<'a> {
    /// Nodes that can be used, the one with the model's file first.
    pub nodes: Vec<NodeResources>,
    /// What connects them, by their places in `nodes`; none before it was measured.
    pub links: Option<Links>,
    /// The model.
    pub sizes: &'a Sizes,
    /// Why a window may not be a stage; none when it may. The full range always may.
    pub window_problem: &'a dyn Fn(LayerRange) -> Option<String>,
    /// Why the model can only run whole; none when it may be split.
    pub split_problem: Option<String>,
    /// What the user wants.
    pub options: PlanOptions,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A node that is not there.
    #[error("node {0:?} is no member of the cluster or does not answer; `capstan status` shows those that do")]
    UnknownNode(NodeId),
    /// A node named twice.
    #[error("node {0} is named twice; name each node once")]
    Twice(String),
    /// The ranges do not make a placement.
    #[error(transparent)]
    Layers(#[from] BadPlacement),
    /// An architecture's rule forbids a window.
    #[error(
        "the layers {range} cannot be a stage of their own: {reason}; choose other ranges or leave the choice to capstan"
    )]
    Window {
        /// Which.
        range: LayerRange,
        /// The rule.
        reason: String,
    },
    /// The model cannot be split at all.
    #[error("the model cannot be split as asked: {0}; load it without --nodes and --layers, or name one node")]
    OnlyWhole(String),
    /// More nodes than layers, or no allowed cut for so many.
    #[error("the model's {layers} layers cannot be cut into {stages} stages; name fewer nodes")]
    TooManyStages {
        /// Layers of the model.
        layers: u32,
        /// Stages wanted.
        stages: usize,
    },
    /// Too little memory.
    #[error(
        "not enough memory: the model needs {} ({} of weights, {} of KV cache for {slots} slots of {ctx} tokens, {} to \
         compute); {}; free memory there, use a smaller --ctx or --slots, or add a node",
        human_bytes(*.need_bytes), human_bytes(*.weights_bytes), human_bytes(*.kv_bytes), human_bytes(*.compute_bytes),
        shortages(.missing)
    )]
    Memory {
        /// All that is needed.
        need_bytes: u64,
        /// Of which weights.
        weights_bytes: u64,
        /// Of which KV cache.
        kv_bytes: u64,
        /// Of which compute buffers.
        compute_bytes: u64,
        /// The context it was reckoned for.
        ctx: u32,
        /// The slots it was reckoned for.
        slots: u32,
        /// Where how much is missing.
        missing: Vec<Shortage>,
    },
    /// No nodes.
    #[error("no node is online to hold the model")]
    NoNodes,
    /// Not a model.
    #[error("the model has {0} layers; 1 to {max} can be placed", max = limits::LAYERS_MAX)]
    NoLayers(u32),
}

/// A node that has too little memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Its name.
    pub node: String,
    /// What it has free, in bytes.
    pub free_bytes: u64,
    /// What it would need more, in bytes.
    pub missing_bytes: u64,
}

fn shortages(missing: &[Shortage]) -> String {
    let one = |s: &Shortage| {
        format!("{} lacks {} ({} are free)", s.node, human_bytes(s.missing_bytes), human_bytes(s.free_bytes))
    };
    missing.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Finds a placement.
///
/// With `layers` given, that placement or the reason why not; with `nodes` given, exactly these nodes in this order;
/// else as few nodes as possible, the node with the file among them where that is possible, as the last stage.
pub fn plan(input: &PlanInput) -> Result<Placement, PlanError> {
    let n = input.sizes.layers();
    if n == 0 || n > limits::LAYERS_MAX {
        return Err(PlanError::NoLayers(n));
    }
    let measured = input.nodes.iter().all(|n| n.times.as_ref().is_some_and(|t| t.layers_s.len() == n_layers(input)));
    let search = Search { input, measured, windows: RefCell::default() };
    if !input.options.layers.is_empty() {
        return search.explicit();
    }
    if !input.options.nodes.is_empty() {
        let order = input.options.nodes.iter().map(|&id| search.node(id)).collect::<Result<Vec<_>, _>>()?;
        for (i, node) in order.iter().enumerate() {
            if order[..i].contains(node) {
                return Err(PlanError::Twice(node.name.clone()));
            }
        }
        return search.in_order(&order, "these nodes were asked for, in this order");
    }
    search.choose()
}

fn n_layers(input: &PlanInput) -> usize {
    input.sizes.layers() as usize
}

struct Search<'a> {
    input: &'a PlanInput<'a>,
    /// Whether it is known how fast each node is.
    measured: bool,
    /// Whether a window is allowed; asked once each.
    windows: RefCell<HashMap<LayerRange, bool>>,
}

impl<'a> Search<'a> {
    fn node(&self, id: NodeId) -> Result<&'a NodeResources, PlanError> {
        self.input.nodes.iter().find(|n| n.id == id).ok_or(PlanError::UnknownNode(id))
    }

    fn whole(&self) -> Result<LayerRange, PlanError> {
        LayerRange::new(0, self.input.sizes.layers()).map_err(|_| PlanError::NoLayers(0))
    }

    fn allowed(&self, range: LayerRange) -> bool {
        if range.count() == self.input.sizes.layers() {
            return true;
        }
        *self
            .windows
            .borrow_mut()
            .entry(range)
            .or_insert_with(|| self.input.split_problem.is_none() && (self.input.window_problem)(range).is_none())
    }

    /// What one of so many stages needs.
    fn need(&self, range: LayerRange, stages: usize) -> Need {
        let o = &self.input.options;
        // A model that runs whole has no idle stages to check guesses in.
        let guessing = stages > 1;
        let spares = if guessing { o.spares_per_stage.saturating_mul(stages as u32) } else { 0 };
        let mut need = self.input.sizes.need(range, o.ctx, o.slots.saturating_add(spares), o.ubatch);
        if guessing && range.end() == self.input.sizes.layers() {
            need.compute = need.compute.saturating_add(o.draft_bytes);
        }
        need
    }

    /// What a stage takes to decode a row: in seconds once all nodes are measured, before that in units that are the same
    /// for all of them.
    fn work(&self, node: &NodeResources, range: LayerRange) -> f64 {
        match &node.times {
            Some(times) if self.measured => times.stage_s(range),
            _ => self.input.sizes.work(range) as f64,
        }
    }

    fn stage(&self, node: &NodeResources, layers: LayerRange, stages: usize) -> StagePlan {
        let memory_bytes = self.need(layers, stages).total();
        StagePlan { node: node.id, node_name: node.name.clone(), layers, memory_bytes }
    }

    fn explicit(&self) -> Result<Placement, PlanError> {
        // The ranges say what comes first, in whatever order they were written.
        let mut wanted = self.input.options.layers.clone();
        wanted.sort_by_key(|(_, range)| range.start());
        let mut stages = Vec::new();
        let count = wanted.len();
        for (id, range) in wanted {
            stages.push(self.stage(self.node(id)?, range, count));
        }
        let why = vec!["the layer ranges were given".to_owned()];
        let placement = Placement::new(self.input.sizes.layers(), stages, why)?;
        if placement.stages().len() > 1
            && let Some(reason) = &self.input.split_problem
        {
            return Err(PlanError::OnlyWhole(reason.clone()));
        }
        for stage in placement.stages() {
            if !self.allowed(stage.layers) {
                let reason = (self.input.window_problem)(stage.layers).unwrap_or_default();
                return Err(PlanError::Window { range: stage.layers, reason });
            }
        }
        // A node may be named for several ranges: it needs the memory of all.
        let mut nodes: Vec<(&NodeResources, u64)> = Vec::new();
        for stage in placement.stages() {
            match nodes.iter_mut().find(|(n, _)| n.id == stage.node) {
                Some((_, need)) => *need = need.saturating_add(stage.memory_bytes),
                None => nodes.push((self.node(stage.node)?, stage.memory_bytes)),
            }
        }
        self.refuse_shortage(&nodes, count)?;
        Ok(placement)
    }

    fn refuse_shortage(&self, needs: &[(&NodeResources, u64)], stages: usize) -> Result<(), PlanError> {
        let missing: Vec<_> = needs
            .iter()
            .filter(|(node, need)| *need > node.free_bytes)
            .map(|(node, need)| Shortage {
                node: node.name.clone(),
                free_bytes: node.free_bytes,
                missing_bytes: need - node.free_bytes,
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let o = &self.input.options;
        let whole = self.need(self.whole()?, stages);
        Err(PlanError::Memory {
            need_bytes: needs.iter().fold(0u64, |sum, (_, need)| sum.saturating_add(*need)),
            weights_bytes: whole.weights,
            kv_bytes: whole.kv,
            compute_bytes: whole.to_compute().saturating_mul(needs.len() as u64),
            ctx: o.ctx,
            slots: o.slots,
            missing,
        })
    }

    fn in_order(&self, order: &[&NodeResources], why: &str) -> Result<Placement, PlanError> {
        if order.len() > 1
            && let Some(reason) = &self.input.split_problem
        {
            return Err(PlanError::OnlyWhole(reason.clone()));
        }
        let stages = order.len();
        let need = |range| self.need(range, stages).total();
        let fits = |node: &NodeResources, range| need(range) <= node.free_bytes;
        let slowest = |node: &NodeResources, range| fits(node, range).then(|| self.work(node, range));
        if let Some((bound, _)) = self.partition(order, &slowest, f64::max) {
            let uneven = |node: &NodeResources, range| {
                let need = need(range) as f64;
                (fits(node, range) && self.work(node, range) <= bound)
                    .then(|| need * need / (node.free_bytes.max(1) as f64))
            };
            if let Some((_, ranges)) = self.partition(order, &uneven, |a, b| a + b) {
                return self.explained(order, ranges, why);
            }
        }
        // Nothing fits: say what is missing where, for the cut that lacks least.
        let shortage = |node: &NodeResources, range| Some(need(range).saturating_sub(node.free_bytes) as f64);
        let too_many = PlanError::TooManyStages { layers: self.input.sizes.layers(), stages };
        let (_, ranges) = self.partition(order, &shortage, |a, b| a + b).ok_or(too_many.clone())?;
        let needs: Vec<_> = order.iter().zip(ranges).map(|(&n, r)| (n, need(r))).collect();
        self.refuse_shortage(&needs, stages)?;
        // Unreachable in exact arithmetic; a shortage of less than a float can tell still must not become a placement.
        Err(too_many)
    }

    /// The cheapest cut into one window a node, in order, and its cost: the costs of the stages, combined. None when
    /// every cut has a stage that `cost` refuses.
    fn partition(
        &self,
        order: &[&NodeResources],
        cost: &dyn Fn(&NodeResources, LayerRange) -> Option<f64>,
        combine: fn(f64, f64) -> f64,
    ) -> Option<(f64, Vec<LayerRange>)> {
        let n = self.input.sizes.layers() as usize;
        // best[l]: cost of the first l layers on the nodes so far; cut[i][l]: where node i's window begins then.
        let mut best = vec![f64::INFINITY; n + 1];
        best[0] = 0.0;
        let mut cut = Vec::with_capacity(order.len());
        for (i, node) in order.iter().enumerate() {
            let (mut next, mut from) = (vec![f64::INFINITY; n + 1], vec![0usize; n + 1]);
            // The last node takes all that is left; the others leave at least a layer for each node after them.
            let after = order.len() - 1 - i;
            let ends = if after == 0 { n..=n } else { i + 1..=n.saturating_sub(after) };
            for end in ends {
                for (start, &so_far) in best.iter().enumerate().take(end).skip(i) {
                    if so_far.is_infinite() {
                        continue;
                    }
                    let Ok(range) = LayerRange::new(start as u32, end as u32) else { continue };
                    if !self.allowed(range) {
                        continue;
                    }
                    let Some(stage) = cost(node, range) else { continue };
                    let total = combine(so_far, stage);
                    if total < next[end] {
                        next[end] = total;
                        from[end] = start;
                    }
                }
            }
            cut.push(from);
            best = next;
        }
        if best[n].is_infinite() {
            return None;
        }
        let (mut ranges, mut end) = (Vec::with_capacity(order.len()), n);
        for from in cut.iter().rev() {
            ranges.push(LayerRange::new(from[end] as u32, end as u32).ok()?);
            end = from[end];
        }
        ranges.reverse();
        Some((best[n], ranges))
    }

    fn explained(&self, order: &[&NodeResources], ranges: Vec<LayerRange>, why: &str) -> Result<Placement, PlanError> {
        let count = order.len();
        let stages: Vec<_> = order.iter().zip(ranges).map(|(node, range)| self.stage(node, range, count)).collect();
        let mut lines = vec![why.to_owned()];
        if let (Some(reason), 1) = (&self.input.split_problem, stages.len()) {
            lines.push(reason.clone());
        }
        if stages.len() > 1 {
            lines.push(self.why_so(order, &stages));
        }
        let work = |stage: &StagePlan, node: &NodeResources| self.work(node, stage.layers);
        let all = stages.iter().zip(order).map(|(s, n)| work(s, n)).sum::<f64>().max(f64::MIN_POSITIVE);
        lines.extend(stages.iter().zip(order).enumerate().map(|(i, (stage, node))| {
            let took = work(stage, node);
            let time = if self.measured { format!(" ({:.1} ms a token)", took * 1e3) } else { String::new() };
            format!(
                "stage {i}: layers {} on {}, {:.0} % of the work{time}, {} of {} free",
                stage.layers,
                stage.node_name,
                took / all * 100.0,
                human_bytes(stage.memory_bytes),
                human_bytes(node.free_bytes)
            )
        }));
        Ok(Placement::new(self.input.sizes.layers(), stages, lines)?)
    }

    /// What the cut of a pipeline was chosen for.
    fn why_so(&self, order: &[&NodeResources], stages: &[StagePlan]) -> String {
        let slowest = stages.iter().zip(order).map(|(s, n)| self.work(n, s.layers)).fold(0.0, f64::max);
        match self.partition(order, &|node, range| Some(self.work(node, range)), f64::max) {
            // Sums of measured times differ in their last bits.
            Some((even, _)) if slowest > even * 1.000_001 => {
                let saved = (1.0 - even / slowest) * 100.0;
                format!("free memory decides who holds what; with more of it a token would take {saved:.0} % less time")
            }
            _ => "the stages take about equally long to decode a token; the last one also computes the head".to_owned(),
        }
    }

    fn choose(&self) -> Result<Placement, PlanError> {
        if self.measured
            && let Some(placement) = self.fastest()
        {
            return Ok(placement);
        }
        self.fewest()
    }

    /// Nodes and order by what is wanted, then the cut by the fastest slowest stage.
    fn fastest(&self) -> Option<Placement> {
        let nodes = &self.input.nodes;
        let kind = |n: &NodeResources| {
            let times = n.times.clone()?;
            let (layers_s, head_s) = (times.layers_s, times.head_s);
            Some(Kind { count: 1, usable_bytes: n.free_bytes, layers_s, head_s, required: 0, holds: None })
        };
        let kinds = nodes.iter().map(kind).collect::<Option<Vec<_>>>()?;
        let hop = |a: usize, b: usize| match &self.input.links {
            Some(links) => timing::hop_of_s(self.input.sizes.n_embd, links.between(a, b), 1),
            None => timing::HOP_S,
        };
        let way_s = (0..nodes.len()).map(|a| (0..nodes.len()).map(|b| hop(a, b)).collect()).collect();
        let hops = Hops { way_s, wire_s: vec![vec![0.0; nodes.len()]; nodes.len()] };
        let whole = self.whole().ok()?;
        // How many stages there will be is not known yet; more of them keep more snapshots.
        let need = |range: LayerRange| self.need(range, if range == whole { 1 } else { nodes.len() }).total();
        let allowed = |range: LayerRange| self.allowed(range);
        let found = arrange(&Problem {
            layers: self.input.sizes.layers(),
            kinds: &kinds,
            hops: &hops,
            need_bytes: &need,
            allowed: &allowed,
            objective: self.input.options.objective,
        })?;
        let asked = nodes.first()?;
        let least = match self.input.options.objective {
            Objective::Latency => found.way_s,
            Objective::Throughput | Objective::Balanced => found.slowest_s,
        };
        if need(whole) <= asked.free_bytes && self.work(asked, whole) <= least * WORTH_SENDING {
            return self.in_order(&[asked], "the model fits on the node that has its file").ok();
        }
        let order: Vec<_> = found.stages.iter().filter_map(|&(kind, _)| nodes.get(kind)).collect();
        let why = match order[..] {
            [only] => format!("{} alone is fastest, by what was measured", only.name),
            _ => {
                let what = match self.input.options.objective {
                    Objective::Latency => "give a token the shortest way",
                    Objective::Throughput => "answer most at once",
                    Objective::Balanced => {
                        "answer nearly most at once, and of those that do give a token the shortest way"
                    }
                };
                format!("these {} nodes in this order {what}, by what was measured", order.len())
            }
        };
        self.in_order(&order, &why).ok()
    }

    fn fewest(&self) -> Result<Placement, PlanError> {
        let (asked, others) = self.input.nodes.split_first().ok_or(PlanError::NoNodes)?;
        let mut others: Vec<_> = others.iter().collect();
        others.sort_by_key(|n| (std::cmp::Reverse(n.free_bytes), n.id));
        if let Ok(placement) = self.in_order(&[asked], "the model fits on the node that has its file") {
            return Ok(placement);
        }
        // The full range is always allowed, so one node fails for want of memory only.
        for &node in &others {
            let why = format!("the model does not fit on {}, but on {}", asked.name, node.name);
            if let Ok(placement) = self.in_order(&[node], &why) {
                return Ok(placement);
            }
        }
        let all = self.input.nodes.len();
        if self.input.split_problem.is_some() {
            let largest = others.first().filter(|n| n.free_bytes > asked.free_bytes).copied().unwrap_or(asked);
            return self.in_order(&[largest], "");
        }
        let most = all.min(self.input.sizes.layers() as usize);
        for k in 2..=most {
            let why = format!("the model needs {k} nodes");
            let mut order: Vec<_> = others[..k - 1].to_vec();
            order.push(asked);
            if let Ok(placement) = self.in_order(&order, &why) {
                return Ok(placement);
            }
            if k < all
                && let Ok(placement) = self.in_order(&others[..k], &why)
            {
                return Ok(placement);
            }
            if all <= EXHAUSTIVE_NODES
                && let Some(placement) = self.any_order(k, &mut Vec::new(), &why)
            {
                return Ok(placement);
            }
        }
        let mut order: Vec<_> = others[..most - 1].to_vec();
        order.push(asked);
        self.in_order(&order, "")
    }

    /// The first order of `k` nodes that fits, among all.
    fn any_order(&self, k: usize, order: &mut Vec<&'a NodeResources>, why: &str) -> Option<Placement> {
        if order.len() == k {
            return self.in_order(order, why).ok();
        }
        for node in &self.input.nodes {
            if order.contains(&node) {
                continue;
            }
            order.push(node);
            let found = self.any_order(k, order, why);
            order.pop();
            if found.is_some() {
                return found;
            }
        }
        None
    }
}
