//! The nodes that answer, as the planner wants them: what they have free, how fast they were measured, what connects them.
use capstan_gguf::ModelProfile;
use capstan_planner::forecast::{Pipeline, Placed, SEQUENCES, Wiring};
use capstan_planner::machines::DISK_BYTES_PER_S;
use capstan_planner::timing::{Batch, Times};
use capstan_planner::{Link, Links, NodeResources, Objective, Placement, Rates, Sizes, StagePlan, nodes};
use capstan_proto::NodeId;
use capstan_proto::manage::{DecodeForecast, FirstTokenForecast, LoadForecast, NodeStatus};

use crate::node::Shared;

/// Depth at which nodes are compared: a short conversation.
const DEPTH_TOKENS: u64 = 512;

/// Depths at which one answer is forecast.
const DEPTHS: [u64; 4] = [0, 2048, 32_768, 131_072];
/// Prompts whose first token is forecast.
const PROMPTS: [u32; 5] = [128, 512, 2048, 8192, 32_768];

/// The nodes that answer, this one first.
#[derive(Clone)]
pub(crate) struct Fleet(Vec<NodeStatus>);

impl Fleet {
    pub(crate) fn of(shared: &Shared) -> Self {
        let others = shared.membership.others().into_iter().filter(|m| shared.membership.online(m.id));
        let named = others.filter_map(|m| Some(NodeStatus { name: m.name, ..shared.view.node(m.id).0? }));
        Self([shared.own_status()].into_iter().chain(named).collect())
    }

    /// The same with so much more free on some: what a deployment would give back.
    pub(crate) fn with_free(mut self, more: &[(NodeId, u64)]) -> Self {
        for node in &mut self.0 {
            for (_, bytes) in more.iter().filter(|(id, _)| *id == node.id) {
                node.memory_free_bytes = node.memory_free_bytes.saturating_add(*bytes);
            }
        }
        self
    }

    /// Seconds that a row of an answer takes, of a lone one or of as many as there are slots, as is wanted; none while
    /// something was not measured.
    pub(crate) fn row_s(
        &self,
        profile: &ModelProfile,
        placement: &Placement,
        objective: Objective,
        slots: u32,
    ) -> Option<f64> {
        let sequences = if objective == Objective::Latency { 1 } else { slots };
        let of = |p: &Pipeline| 1.0 / p.decode(Wiring::Capstan, sequences, DEPTH_TOKENS).tokens_per_s;
        self.with_pipeline(profile, placement, &Sizes::of(profile), (0, 0, 1), of)
    }

    /// The same without a node that is to be left.
    pub(crate) fn without(mut self, node: NodeId) -> Self {
        self.0.retain(|n| n.id != node);
        self
    }

    /// What each has free, and how long it takes for this model's layers if it was measured: for a row, or for as many as
    /// decode at once on each where many are to be answered.
    pub(crate) fn nodes(&self, profile: &ModelProfile, objective: Objective, slots: u32) -> Vec<NodeResources> {
        let sequences = match objective {
            Objective::Latency => 1,
            Objective::Throughput | Objective::Balanced => slots.div_ceil(self.0.len().max(1) as u32).max(1),
        };
        let batch = Batch::Decode { sequences, depth_tokens: DEPTH_TOKENS };
        let times = |n: &NodeStatus| Some(Times::of(profile, &Rates::measured(n.profile.clone()?), batch));
        let node = |n: &NodeStatus| NodeResources {
            id: n.id,
            name: n.name.clone(),
            free_bytes: n.memory_free_bytes,
            times: times(n),
        };
        self.0.iter().map(node).collect()
    }

    /// How fast a placement will be; none while something of it was not measured.
    pub(crate) fn forecast(
        &self,
        profile: &ModelProfile,
        placement: &Placement,
        sizes: &Sizes,
        (ctx, slots, ubatch): (u32, u32, u32),
    ) -> Option<LoadForecast> {
        self.with_pipeline(profile, placement, sizes, (ctx, slots, ubatch), |pipeline| {
            let decode = |sequences: u32, depth_tokens: u64| DecodeForecast {
                sequences,
                depth_tokens,
                tokens_per_s: pipeline.decode(Wiring::Capstan, sequences, depth_tokens).tokens_per_s,
            };
            let first_token = |prompt_tokens: u32| FirstTokenForecast {
                prompt_tokens,
                seconds: pipeline.first_token(Wiring::Capstan, prompt_tokens, ubatch).seconds,
            };
            let depths = DEPTHS.into_iter().filter(|&d| d < u64::from(ctx)).map(|d| decode(1, d));
            let many = SEQUENCES.into_iter().filter(|&n| n > 1 && n <= slots).map(|n| decode(n, 0));
            LoadForecast {
                first_token: PROMPTS.into_iter().filter(|&p| p < ctx).map(first_token).collect(),
                decode: depths.chain(many).collect(),
                resident_bytes: pipeline.resident_bytes(ctx, ubatch),
                load_s: pipeline.load_again_s(),
            }
        })
    }

    /// What is said of a placement's stages and links; `sizes` are the context, the slots and the micro-batch.
    fn with_pipeline<T>(
        &self,
        profile: &ModelProfile,
        placement: &Placement,
        sizes: &Sizes,
        (ctx, slots, ubatch): (u32, u32, u32),
        of: impl FnOnce(&Pipeline) -> T,
    ) -> Option<T> {
        let placed = |s: &StagePlan| {
            let node = self.0.iter().position(|n| n.id == s.node)?;
            // Nodes of one machine share the cache of the first of them.
            let cache = self.0.iter().position(|n| nodes::on_one_machine(n, &self.0[node])).unwrap_or(node);
            Some(Placed {
                node,
                cache,
                machine: s.node_name.clone(),
                rates: Rates::measured(self.0[node].profile.clone()?),
                usable_bytes: self.0[node].memory_free_bytes,
                layers: s.layers,
                need: sizes.need(s.layers, ctx, slots, ubatch),
            })
        };
        let stages = placement.stages().iter().map(placed).collect::<Option<Vec<_>>>()?;
        let ring = self.ring(&stages)?;
        Some(of(&Pipeline { profile, stages: &stages, ring: &ring }))
    }

    /// The links from each stage to the next, the last one's to the first. Stages of one node need none.
    fn ring(&self, stages: &[Placed]) -> Option<Vec<Link>> {
        let links = self.links();
        let hop = |(i, s): (usize, &Placed)| match stages[(i + 1) % stages.len()].node {
            node if node == s.node => self.0.get(node).map(nodes::within),
            node => links.as_ref().map(|l| l.between(s.node, node)),
        };
        stages.iter().enumerate().map(hop).collect()
    }

    /// What a node's disk reads, in bytes per second.
    pub(crate) fn disk_bytes_per_s(&self, node: NodeId) -> f64 {
        let measured = self.0.iter().find(|n| n.id == node).and_then(|n| n.profile.as_ref());
        measured.map(|p| p.disk_bytes_per_s).filter(|&rate| rate > 0).map_or(DISK_BYTES_PER_S, |rate| rate as f64)
    }

    /// What connects them.
    pub(crate) fn links(&self) -> Option<Links> {
        nodes::links(&self.0)
    }
}

/// What a forecast says, for people.
pub(crate) fn sentence(forecast: &LoadForecast) -> String {
    let alone = forecast.decode.iter().find(|d| d.sequences == 1);
    let most = forecast.decode.iter().filter(|d| d.depth_tokens == 0).max_by_key(|d| d.sequences);
    let mut parts = Vec::new();
    parts.extend(alone.map(|d| format!("{:.1} tokens per second for one answer", d.tokens_per_s)));
    parts
        .extend(most.filter(|d| d.sequences > 1).map(|d| format!("{:.1} for {} at once", d.tokens_per_s, d.sequences)));
    parts.extend(
        forecast
            .first_token
            .iter()
            .find(|f| f.prompt_tokens >= 512)
            .map(|f| format!("{:.1} s to the first token after a prompt of {} tokens", f.seconds, f.prompt_tokens)),
    );
    format!("forecast: {}", parts.join(", "))
}
