//! How fast a placement will be: time to the first token, tokens per second, memory, loading, traffic.
//!
//! Reckoned two ways. *Capstan*: stages work at once, a prompt goes through in chunks, sequences in groups, and each
//! stage sends straight to the next. *Plain RPC*: llama.cpp's own, where one machine works at a time and the first one
//! hands everything on. Guessed tokens are left out of both: what they bring depends on the text.
use std::collections::HashMap;

use capstan_gguf::ModelProfile;
use capstan_proto::LayerRange;
use serde::Serialize;

use crate::cost::Need;
use crate::links::Link;
use crate::machines::Rates;
use crate::resident;
use crate::timing::{Batch, HOP_S, Times, hidden_bytes, hop_s, read_bytes, stage_s};

/// Prompt lengths that a forecast lists.
pub const PROMPT_TOKENS: [u32; 4] = [512, 2048, 8192, 32_768];
/// Depths that it lists.
pub const DEPTH_TOKENS: [u64; 4] = [0, 4096, 32_768, 131_072];
/// Sequences at once that it lists.
pub const SEQUENCES: [u32; 5] = [1, 2, 4, 8, 16];
/// Sizes of chunks that are tried; those above the micro-batch's limit are not.
pub(crate) const CHUNK_ROWS: [u32; 6] = [64, 128, 256, 512, 1024, 2048];
/// Sizes of chunks that are tried besides where a prompt has no more than [`SHORT_CHUNKS`] of them.
const SHORT_CHUNK_ROWS: [u32; 5] = [16, 32, 48, 96, 192];
/// Chunks with which a prompt takes no longer than so many times the least are as good: times are not more exact.
const AS_GOOD: f64 = 1.01;
/// The scheduler also tries chunks that are so many times as large as those that it has found to be best.
const TRIED: u32 = 2;
/// See [`SHORT_CHUNK_ROWS`].
const SHORT_CHUNKS: u32 = 16;
/// Rows that plain RPC computes at once: llama.cpp's default, whatever Capstan takes.
const RPC_CHUNK_ROWS: u32 = 512;
/// What each remote node adds to a step of llama.cpp's RPC, in seconds: the graph is sent and read anew, and results pass
/// through the first machine. gpt-oss-120b decodes at 33.6 tok/s on one Ryzen AI Max+ 395 and at 21.6 on four, which is
/// 5.5 ms for each of three remote ones; gpt-oss-20b at 27.95 on four, where one should reach 48, shows 4.9 ms
/// (<https://github.com/lhl/strix-halo-testing>, rpc-test).
pub const RPC_NODE_S: f64 = 5.2e-3;

/// How the machines work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wiring {
    /// Stages that all work at once.
    Capstan,
    /// llama.cpp's RPC backend.
    PlainRpc,
}

/// A stage on a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// Tells machines apart: stages with the same number share one, and take turns on it.
    pub node: usize,
    /// Tells last-level caches apart: two nodes that run on one machine share its cache.
    pub cache: usize,
    /// The machine's name.
    pub machine: String,
    /// What it reaches.
    pub rates: Rates,
    /// Memory of it that a stage may take, in bytes.
    pub usable_bytes: u64,
    /// The layers.
    pub layers: LayerRange,
    /// What they need.
    pub need: Need,
}

/// Stages in order, and the links between them.
pub struct Pipeline<'a> {
    /// The model.
    pub profile: &'a ModelProfile,
    /// In pipeline order; the last one computes the head.
    pub stages: &'a [Placed],
    /// `ring[i]` leads from stage `i` to the next one, the last one's to the first.
    pub ring: &'a [Link],
}

/// Time to the first token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FirstToken {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Until the first token of the answer.
    pub seconds: f64,
    /// Prompt tokens per second.
    pub tokens_per_s: f64,
    /// Rows of the chunks that the prompt is cut into.
    pub chunk_rows: u32,
}

/// Tokens per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Decode {
    /// Tokens before each sequence.
    pub depth_tokens: u64,
    /// Sequences at once.
    pub sequences: u32,
    /// Of all sequences together.
    pub tokens_per_s: f64,
    /// From one token of a sequence to its next.
    pub step_s: f64,
    /// Groups that they are dealt into.
    pub groups: u32,
}

/// Memory on one machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeMemory {
    /// Which.
    pub machine: String,
    /// Layers `start..end`.
    pub layers: String,
    /// Weights, in bytes.
    pub weight_bytes: u64,
    /// KV cache and recurrent state, in bytes.
    pub kv_bytes: u64,
    /// Compute buffers and the process, in bytes.
    pub compute_bytes: u64,
    /// What a stage may take there, in bytes.
    pub usable_bytes: u64,
}

/// The forecast of a placement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// How the machines work together.
    pub wiring: Wiring,
    /// By prompt length.
    pub first_token: Vec<FirstToken>,
    /// By depth for one sequence, then by number of sequences at 4096 tokens.
    pub decode: Vec<Decode>,
    /// By machine.
    pub memory: Vec<NodeMemory>,
    /// Seconds until the model runs when one machine has the file and the others get their shards from it.
    pub first_load_s: f64,
    /// Seconds when each has its shard on disk; of plain RPC, which keeps nothing, the same as the first.
    pub load_s: f64,
    /// Bytes on all links together for one token of one sequence.
    pub wire_bytes_per_token: u64,
}

impl Forecast {
    /// Tokens per second of one sequence at a listed depth.
    pub fn alone(&self, depth_tokens: u64) -> Option<f64> {
        let is = |d: &&Decode| d.sequences == 1 && d.depth_tokens == depth_tokens;
        self.decode.iter().find(is).map(|d| d.tokens_per_s)
    }
}

impl Pipeline<'_> {
    /// All of it, for contexts of `ctx` tokens, `slots` sequences and micro-batches of at most `ubatch` rows.
    pub fn forecast(&self, wiring: Wiring, ctx: u32, slots: u32, ubatch: u32) -> Forecast {
        let fits = |tokens: u64| tokens < u64::from(ctx);
        let mut decode: Vec<_> =
            DEPTH_TOKENS.into_iter().filter(|&d| fits(d)).map(|depth| self.decode(wiring, 1, depth)).collect();
        let depth = DEPTH_TOKENS[1].min(u64::from(ctx.saturating_sub(1)));
        decode.extend(SEQUENCES.into_iter().filter(|&n| n > 1 && n <= slots).map(|n| self.decode(wiring, n, depth)));
        let mut prompts: Vec<u32> = PROMPT_TOKENS.into_iter().filter(|&p| fits(p.into())).collect();
        if prompts.is_empty() {
            prompts.push((ctx / 2).max(1));
        }
        let (first_load_s, load_s) = self.load_s(wiring);
        Forecast {
            wiring,
            first_token: prompts.into_iter().map(|p| self.first_token(wiring, p, ubatch)).collect(),
            decode,
            memory: self.stages.iter().map(Placed::memory).collect(),
            first_load_s,
            load_s,
            wire_bytes_per_token: self.wire_bytes(wiring),
        }
    }

    /// What each stage takes for a micro-batch, of which stages that share a cache each hold a part there.
    pub fn stage_s(&self, batch: Batch) -> Vec<f64> {
        if self.stages.iter().any(|s| s.rates.measured.is_some()) {
            let reads =
                |s: &Placed| read_bytes(self.profile, s.layers.start() as usize..s.layers.end() as usize, batch);
            let set = |cache| self.stages.iter().filter(|s| s.cache == cache).map(reads).fold(0, u64::saturating_add);
            let of = |s: &Placed| stage_s(self.profile, &s.rates, batch, s.layers, set(s.cache));
            return self.stages.iter().map(of).collect();
        }
        // Neighbours are often alike, and times are reckoned for all layers at once.
        let mut times: Option<(&Rates, Times)> = None;
        let mut stages_s = Vec::with_capacity(self.stages.len());
        for stage in self.stages {
            let alike = times.take().filter(|(rates, _)| **rates == stage.rates).map(|(_, times)| times);
            let of = alike.unwrap_or_else(|| Times::of(self.profile, &stage.rates, batch));
            stages_s.push(of.stage_s(stage.layers));
            times = Some((&stage.rates, of));
        }
        stages_s
    }

    /// What each hop takes for so many rows; one machine has none.
    fn hops_s(&self, rows: u32) -> Vec<f64> {
        match self.stages.len() {
            1 => vec![0.0],
            _ => self.ring.iter().map(|&link| hop_s(self.profile, link, rows)).collect(),
        }
    }

    /// What RPC adds for so many rows: each remote machine's share, and hidden states that go through the first machine.
    fn rpc_s(&self, rows: u32) -> f64 {
        let bytes = hidden_bytes(self.profile, rows) as f64;
        let remote = self.ring.iter().take(self.stages.len() - 1);
        remote.map(|link| RPC_NODE_S + 2.0 * link.way_s(bytes)).sum()
    }

    /// Tokens per second of so many sequences, all so deep.
    pub fn decode(&self, wiring: Wiring, sequences: u32, depth_tokens: u64) -> Decode {
        let sequences = sequences.max(1);
        let of = |groups: u32, step_s: f64| Decode {
            depth_tokens,
            sequences,
            tokens_per_s: f64::from(sequences) / step_s,
            step_s,
            groups,
        };
        let batch = |sequences| Batch::Decode { sequences, depth_tokens };
        if wiring == Wiring::PlainRpc {
            return of(1, self.stage_s(batch(sequences)).iter().sum::<f64>() + self.rpc_s(sequences));
        }
        let add = |sum: &mut Vec<f64>, stages: &[f64]| sum.iter_mut().zip(stages).for_each(|(a, b)| *a += b);
        // What a step takes if every stage had a machine of its own, and what it takes on these.
        let step = |groups: u32| {
            let (mut way, mut busy, mut wire) = (0.0f64, vec![0.0; self.stages.len()], 0.0);
            for i in 0..groups {
                // The first ones take what does not come out even.
                let rows = sequences / groups + u32::from(i < sequences % groups);
                let (stages, hops) = (self.stage_s(batch(rows)), self.hops_s(rows));
                way = way.max(stages.iter().sum::<f64>() + hops.iter().sum::<f64>());
                wire += self.wire_s(rows);
                add(&mut busy, &stages);
            }
            let most = |of: &[f64]| of.iter().copied().fold(way.max(wire), f64::max);
            (most(&busy), most(&self.by_node(&busy)))
        };
        // One group more than stages keeps all at work while one is on its way. The scheduler knows stages and not where
        // they are: on machines that hold several it may deal into more groups than are best.
        let most = sequences.min(self.stages.len() as u32 + 1);
        let tried = (1..=most).map(|groups| (groups, step(groups)));
        let best = tried.min_by(|(_, (a, _)), (_, (b, _))| a.total_cmp(b));
        best.map_or_else(|| of(1, step(1).1), |(groups, (_, step_s))| of(groups, step_s))
    }

    /// What each machine takes of what its stages take.
    fn by_node(&self, stages_s: &[f64]) -> Vec<f64> {
        let of = |node| self.stages.iter().zip(stages_s).filter(|(s, _)| s.node == node).map(|(_, t)| t).sum();
        self.stages.iter().map(|s| of(s.node)).collect()
    }

    /// For how long so many rows keep the slowest link.
    fn wire_s(&self, rows: u32) -> f64 {
        if self.stages.len() == 1 {
            return 0.0;
        }
        let bytes = hidden_bytes(self.profile, rows) as f64;
        self.ring.iter().map(|link| link.wire_s(bytes)).fold(0.0, f64::max)
    }

    /// Time to the first token of a prompt, cut as is best.
    pub fn first_token(&self, wiring: Wiring, prompt_tokens: u32, ubatch: u32) -> FirstToken {
        let of = |chunk_rows: u32| {
            let seconds = match wiring {
                Wiring::Capstan => self.flow_s(prompt_tokens, chunk_rows),
                Wiring::PlainRpc => self.one_by_one_s(prompt_tokens, chunk_rows),
            };
            FirstToken { prompt_tokens, seconds, tokens_per_s: f64::from(prompt_tokens) / seconds, chunk_rows }
        };
        if wiring == Wiring::PlainRpc {
            return of(RPC_CHUNK_ROWS);
        }
        // Few rows at once are worth a look only where there are few of them.
        let short = SHORT_CHUNK_ROWS.into_iter().filter(|rows| rows * SHORT_CHUNKS >= prompt_tokens);
        let sizes = CHUNK_ROWS.into_iter().chain(short).filter(|&rows| rows <= ubatch);
        let tried: Vec<FirstToken> = sizes.map(of).collect();
        let least = tried.iter().map(|t| t.seconds).fold(f64::INFINITY, f64::min);
        // Of almost equal ones the largest, as the scheduler does: it has the fewest frames.
        let as_good = tried.into_iter().filter(|t| t.seconds <= least * AS_GOOD);
        as_good.max_by_key(|t| t.chunk_rows).unwrap_or_else(|| of(ubatch.max(1)))
    }

    fn chunks(prompt_tokens: u32, chunk_rows: u32) -> impl Iterator<Item = Batch> {
        (0..prompt_tokens.div_ceil(chunk_rows)).map(move |i| Batch::Chunk {
            rows: chunk_rows.min(prompt_tokens - i * chunk_rows),
            depth_tokens: u64::from(i) * u64::from(chunk_rows),
        })
    }

    /// Chunks that follow each other through the stages. Each stage takes them in order; a machine with several stages
    /// takes what has been ready longest.
    fn flow_s(&self, prompt_tokens: u32, chunk_rows: u32) -> f64 {
        let chunks: Vec<Chunk> = Self::chunks(prompt_tokens, chunk_rows)
            .map(|batch| {
                let wire = self.wire_s(batch.rows());
                let stages = self.stage_s(batch).into_iter().map(|s| s.max(wire)).collect();
                Chunk { stages, hops: self.hops_s(batch.rows()) }
            })
            .collect();
        let nodes: Vec<usize> = self.stages.iter().map(|s| s.node).collect();
        flow_s(&nodes, &chunks)
    }

    fn one_by_one_s(&self, prompt_tokens: u32, chunk_rows: u32) -> f64 {
        let of = |batch: Batch| self.stage_s(batch).iter().sum::<f64>() + self.rpc_s(batch.rows());
        Self::chunks(prompt_tokens, chunk_rows).map(of).sum()
    }

    /// What the process of each stage will be seen to hold once prompts filled its context; 0 where that is not known.
    pub fn resident_bytes(&self, ctx: u32, ubatch: u32) -> Vec<u64> {
        let chunk_rows = match self.stages.len() {
            // Nothing is gained by cutting what nobody else could compute meanwhile.
            1 => ubatch,
            _ => TRIED * self.first_token(Wiring::Capstan, ctx.saturating_sub(1).max(1), ubatch).chunk_rows,
        };
        let bytes = |s: &Placed| {
            let device = s.rates.measured.as_deref()?;
            let stage = resident::Stage { profile: self.profile, device, layers: s.layers, need: s.need };
            Some(stage.bytes(chunk_rows, ubatch))
        };
        self.stages.iter().map(|s| bytes(s).unwrap_or(0)).collect()
    }

    /// Until the model runs when each machine has its shard on disk, in seconds.
    pub fn load_again_s(&self) -> f64 {
        self.load_s(Wiring::Capstan).1
    }

    /// Loading for the first time and again.
    fn load_s(&self, wiring: Wiring) -> (f64, f64) {
        let bytes = |s: &Placed| s.need.weights as f64;
        let again = self.stages.iter().map(|s| bytes(s) / s.rates.disk_bytes_per_s).fold(0.0, f64::max);
        let Some((last, remote)) = self.stages.split_last() else { return (0.0, 0.0) };
        let sent: f64 = remote.iter().map(bytes).sum();
        let slowest = self.ring.iter().take(self.stages.len() - 1).map(|l| l.bytes_per_s).fold(f64::INFINITY, f64::min);
        let read = (sent + bytes(last)) / last.rates.disk_bytes_per_s;
        let over = if remote.is_empty() { 0.0 } else { sent / slowest };
        match wiring {
            // Shards are cut and sent while they are read; then each machine loads its own.
            Wiring::Capstan => (read.max(over) + if remote.is_empty() { 0.0 } else { again }, again),
            Wiring::PlainRpc => (read.max(over), read.max(over)),
        }
    }

    fn wire_bytes(&self, wiring: Wiring) -> u64 {
        let stages = self.stages.len() as u64;
        let hidden = hidden_bytes(self.profile, 1);
        match (stages, wiring) {
            (1, _) => 0,
            (n, Wiring::Capstan) => n * hidden,
            // To each remote machine and back; the graphs, which are many times larger, are not counted.
            (n, Wiring::PlainRpc) => 2 * (n - 1) * hidden,
        }
    }
}

impl Placed {
    fn memory(&self) -> NodeMemory {
        NodeMemory {
            machine: self.machine.clone(),
            layers: self.layers.to_string(),
            weight_bytes: self.need.weights,
            kv_bytes: self.need.kv,
            compute_bytes: self.need.to_compute(),
            usable_bytes: self.usable_bytes,
        }
    }
}

/// What a chunk takes on each stage, and from each stage to the next; the last one's way leads to the first.
struct Chunk {
    stages: Vec<f64>,
    hops: Vec<f64>,
}

/// How long chunks take through stages on these machines, one after the other in each stage.
fn flow_s(nodes: &[usize], chunks: &[Chunk]) -> f64 {
    // By stage: the chunk that comes next, until when it computes the one before, and when each arrives.
    let mut next = vec![0usize; nodes.len()];
    let mut until_s = vec![0.0f64; nodes.len()];
    let mut arrived: Vec<Vec<f64>> = vec![vec![f64::INFINITY; chunks.len()]; nodes.len()];
    let mut free_s: HashMap<usize, f64> = nodes.iter().map(|&node| (node, 0.0)).collect();
    // The driver, beside the last stage, sends the rows of embeddings to the first.
    if let Some(first) = arrived.first_mut() {
        first.iter_mut().zip(chunks).for_each(|(at, chunk)| *at = chunk.hops.last().copied().unwrap_or(0.0));
    }
    let mut done = 0.0f64;
    loop {
        // What can begin first does; of those that wait for the same machine, what has waited longest, and of those the
        // stage that is farthest.
        let ready = |s: usize| {
            let since = arrived[s].get(next[s])?.max(until_s[s]);
            Some((free_s.get(&nodes[s])?.max(since), since, s))
        };
        let waiting = (0..nodes.len()).rev().filter_map(ready);
        let first = waiting.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let Some((begins, _, s)) = first.filter(|(begins, ..)| begins.is_finite()) else { return done };
        let (chunk, at) = (&chunks[next[s]], next[s]);
        let ends = begins + chunk.stages[s];
        free_s.insert(nodes[s], ends);
        until_s[s] = ends;
        next[s] += 1;
        if let Some(following) = arrived.get_mut(s + 1) {
            following[at] = ends + chunk.hops[s];
        }
        done = done.max(ends);
    }
}

/// What a forecast rests on, for people.
pub fn assumptions() -> Vec<String> {
    vec![
        format!("Sending and receiving a hidden state takes {:.1} ms besides the link.", HOP_S * 1e3),
        format!(
            "Plain RPC takes {:.1} ms for each remote machine and step, as gpt-oss-120b on four Ryzen AI Max+ 395 showed.",
            RPC_NODE_S * 1e3
        ),
        "Routers choose experts evenly; real ones do not, and then fewer are read.".to_owned(),
        "All bits a weight are read equally fast; llama.cpp reads types of few bits more slowly.".to_owned(),
        "Guessed tokens are left out.".to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(count: usize, stages: &[f64], hop: f64) -> Vec<Chunk> {
        (0..count).map(|_| Chunk { stages: stages.to_vec(), hops: vec![hop; stages.len()] }).collect()
    }

    /// Three stages of a model on machines of these numbers.
    fn stages(profile: &ModelProfile, nodes: [usize; 3]) -> Vec<Placed> {
        let rates = crate::machines::find("Ryzen AI Max+ 395 128GB").unwrap().rates;
        let third = profile.n_layers / 3;
        let cuts = [(0, third), (third, 2 * third), (2 * third, profile.n_layers)];
        let placed = |(&node, (a, b)): (&usize, (u32, u32))| Placed {
            node,
            cache: node,
            machine: format!("no. {node}"),
            rates: rates.clone(),
            usable_bytes: 0,
            layers: LayerRange::new(a, b).unwrap(),
            need: Need::default(),
        };
        nodes.iter().zip(cuts).map(placed).collect()
    }

    #[test]
    fn stages_that_share_a_machine_take_turns() {
        let (model, quantisation) = crate::models::find("Llama 3.1 70B").unwrap();
        let profile = model.shape.profile(model.name, quantisation);
        let ring = [crate::links::parse("10GbE").unwrap(); 3];
        let of = |nodes| {
            let stages = stages(&profile, nodes);
            let pipeline = Pipeline { profile: &profile, stages: &stages, ring: &ring };
            let decode = |n| pipeline.decode(Wiring::Capstan, n, 0);
            let pairs = pipeline.stage_s(Batch::Decode { sequences: 2, depth_tokens: 0 });
            (decode(1), decode(8), pipeline.first_token(Wiring::Capstan, 2048, 512).seconds, pairs)
        };
        let (own, shared) = (of([0, 1, 2]), of([0, 1, 0]));
        assert_eq!(own.0, shared.0, "a lone answer is in one place at a time");
        assert_eq!(own.1.groups, shared.1.groups, "the scheduler does not know where stages are");
        assert!(own.1.groups > 1 && own.1.step_s < shared.1.step_s * 0.8, "{own:?} {shared:?}");
        // At most four groups of at least two sequences, all on the machine with two stages.
        assert!(shared.1.step_s > 0.999 * f64::from(shared.1.groups) * (shared.3[0] + shared.3[2]));
        assert!(own.2 < shared.2 && shared.2 < own.2 * 2.1);
        assert_eq!(of([0, 0, 0]).2, of([7, 7, 7]).2);
    }

    #[test]
    fn chunks_follow_each_other_through_machines_of_their_own() {
        let s =
            |count, stages: &[f64], hop| flow_s(&(0..stages.len()).collect::<Vec<_>>(), &chunks(count, stages, hop));
        assert_eq!(s(4, &[2.0], 0.0), 8.0);
        assert_eq!(s(4, &[1.0, 1.0, 1.0], 0.0), 6.0);
        // The slowest stage four times, the way there and from it.
        assert_eq!(s(4, &[1.0, 3.0, 1.0], 0.5), 0.5 + 1.0 + 0.5 + 12.0 + 0.5 + 1.0);
    }

    #[test]
    fn a_machine_with_two_stages_is_kept_at_work() {
        // The first machine has the first and the last stage, two seconds a chunk, and never waits for the other; all stages
        // of a chunk before the next one would take 24 s.
        assert_eq!(flow_s(&[0, 1, 0], &chunks(8, &[1.0, 1.0, 1.0], 0.0)), 16.0);
        // All on one machine: nothing overlaps, nothing is lost.
        assert_eq!(flow_s(&[0, 0, 0], &chunks(5, &[1.0, 2.0, 3.0], 0.0)), 30.0);
    }

    #[test]
    fn no_schedule_beats_the_busiest_machine_or_a_chunk_s_way() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..2000 {
            let (stages, count) = (1 + random(5) as usize, 1 + random(8));
            let nodes: Vec<usize> = (0..stages).map(|_| random(3) as usize).collect();
            let chunk = |_| Chunk {
                stages: (0..stages).map(|_| 0.1 + random(50) as f64 / 10.0).collect(),
                hops: (0..stages).map(|_| random(10) as f64 / 10.0).collect(),
            };
            let all: Vec<Chunk> = (0..count).map(chunk).collect();
            let taken = flow_s(&nodes, &all);
            let busy = |node: usize| -> f64 {
                all.iter().flat_map(|c| c.stages.iter().zip(&nodes)).filter(|(_, n)| **n == node).map(|(s, _)| s).sum()
            };
            let way = |c: &Chunk| c.stages.iter().sum::<f64>() + c.hops[..stages - 1].iter().sum::<f64>();
            let least = (0..3).map(busy).chain(all.iter().map(way)).fold(0.0, f64::max);
            let most: f64 = all.iter().map(|c| c.stages.iter().chain(&c.hops).sum::<f64>()).sum();
            assert!(taken >= least - 1e-9 && taken <= most + 1e-9, "{nodes:?}: {taken} of {least} to {most}");
        }
    }
}
