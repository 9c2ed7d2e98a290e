//! Whether a window of layers may be a stage. A predicate over windows, not a list of cuts: models that mix kinds of
//! layers need certain kinds in each window.
use capstan_proto::LayerRange;

use super::{Mixer, Quirk, Rules, rules, whole_reason};
use crate::arch::table::{PER_LAYER, PER_LAYER_BARE};
use crate::metadata::Metadata;

/// What the file says about its layers, read once.
#[derive(Clone, Debug)]
pub struct Windows {
    n: u32,
    rules: Option<&'static Rules>,
    whole: Option<String>,
    sliding: Option<Vec<bool>>,
    recurrent: Option<Vec<bool>>,
    attention: Vec<bool>,
    own_indexer: Option<Vec<bool>>,
    heads: Option<Vec<i64>>,
    dense_lead: u32,
    moe_step: u32,
    chunked: bool,
    lite_48: bool,
}

/// Metadata seen through an architecture's prefix.
pub(crate) struct Facts<'a> {
    pub meta: &'a Metadata,
    pub arch: &'a str,
}

impl Facts<'_> {
    pub fn key(&self, bare: &str) -> String {
        format!("{}.{bare}", self.arch)
    }
    pub fn has(&self, bare: &str) -> bool {
        self.meta.get(&self.key(bare)).is_some()
    }
    pub fn u32(&self, bare: &str) -> Option<u32> {
        self.meta.get_u32(&self.key(bare))
    }
    pub fn f32(&self, bare: &str) -> Option<f32> {
        self.meta.get_f32(&self.key(bare))
    }
    /// Numbers or booleans; none when the key is absent or no array of these.
    pub fn list(&self, bare: &str) -> Option<Vec<i64>> {
        self.meta.get_array(&self.key(bare))?.integers()
    }
    /// Entry `i` of a list, or the scalar.
    pub fn per_layer(&self, bare: &str, i: u32) -> Option<i64> {
        let value = self.meta.get(&self.key(bare))?;
        match value.as_array() {
            Some(array) => array.get(i.into())?.as_i64(),
            None => value.as_i64(),
        }
    }
    /// Whether the file has real M-RoPE sections.
    pub fn has_sections(&self) -> bool {
        self.list("rope.dimension_sections").is_some_and(|s| matches!(s[..], [a, b, ..] if a > 0 && b > 0))
    }
    /// Tokens of the vocabulary as llama.cpp counts them when it loads hyperparameters.
    pub fn vocabulary(&self) -> u64 {
        let listed = || self.meta.get_array("tokenizer.ggml.tokens").map(|a| a.len());
        self.u32("vocab_size").map(u64::from).or_else(listed).unwrap_or(0)
    }
}

/// llama.cpp's table for files with a context of a million tokens that do not say which layers have an indexer.
pub(crate) fn glm_5_2_indexer(i: u32) -> bool {
    i < 2 || i % 4 == 2
}

impl Windows {
    /// Read the facts of a model with `n` layers, extra prediction layers not counted.
    pub fn new(meta: &Metadata, arch: &str, n: u32) -> Self {
        let f = Facts { meta, arch };
        let rules = rules(arch);
        let mut w = Self {
            n,
            rules,
            whole: None,
            sliding: sliding(&f, rules, n),
            recurrent: recurrent(&f, rules, n),
            attention: Vec::new(),
            own_indexer: None,
            heads: f.list("attention.head_count"),
            dense_lead: f.u32("leading_dense_block_count").unwrap_or(0),
            moe_step: f.u32("interleave_moe_layer_step").unwrap_or(1).max(1),
            chunked: f.u32("attention.sliding_window") != Some(0),
            lite_48: f.vocabulary() == 128_256,
        };
        if let Some(recurrent) = &w.recurrent {
            w.attention = match rules.map(|r| r.mixer) {
                Some(Mixer::ByKvHeadsAndFeedForward) => {
                    (0..n).map(|i| f.per_layer("attention.head_count_kv", i).unwrap_or(0) > 0).collect()
                }
                _ => recurrent.iter().map(|r| !r).collect(),
            };
        }
        if let Some(r) = rules.filter(|r| r.has(Quirk::StartsAtIndexer)) {
            let table = || r.has(Quirk::IndexerTable) && f.u32("context_length").unwrap_or(0) >= 1 << 20;
            let listed = f.list("attention.indexer.types").map(|l| l.iter().map(|x| *x != 0).collect::<Vec<_>>());
            w.own_indexer = listed.or_else(|| table().then(|| (0..n).map(glm_5_2_indexer).collect()));
        }
        w.whole = whole(&f, rules, n, &w);
        w
    }

    /// The architecture's rules, if it can be cut.
    pub fn rules(&self) -> Option<&'static Rules> {
        self.rules
    }
    /// Which layers have a sliding window, where the model has such layers.
    pub fn sliding(&self) -> Option<&[bool]> {
        self.sliding.as_deref()
    }
    /// Which layers are recurrent, where the model has such layers.
    pub fn recurrent(&self) -> Option<&[bool]> {
        self.recurrent.as_deref()
    }
    /// Which layers have an indexer of their own, where only some have.
    pub fn own_indexer(&self) -> Option<&[bool]> {
        self.own_indexer.as_deref()
    }

    /// Why no window but the whole can be a stage; none when some can.
    pub fn split_problem(&self) -> Option<String> {
        if self.whole.is_some() {
            return self.whole.clone();
        }
        let parts = self.finest_partition();
        (parts.len() < 2).then(|| {
            let half = LayerRange::new(0, (self.n / 2).max(1)).ok().and_then(|r| self.problem(r));
            format!(
                "no border between its layers is allowed: {}",
                half.unwrap_or_else(|| "each needs the others".into())
            )
        })
    }

    /// Why this window cannot be a stage; none when it can. The whole always can.
    pub fn problem(&self, range: LayerRange) -> Option<String> {
        let (a, b, n) = (range.start(), range.end(), self.n);
        if b > n {
            return Some(format!("the model has only the layers 0..{n}"));
        }
        if range.count() == n {
            return None;
        }
        if self.whole.is_some() {
            return self.whole.clone();
        }
        let rules = self.rules?;
        let within = |kinds: &[bool]| kinds.get(a as usize..b as usize).unwrap_or_default().iter().any(|k| *k);
        if let Some(sliding) = &self.sliding
            && sliding.contains(&true)
            && !within(sliding)
        {
            return Some(
                "a stage of this model needs at least one sliding-window layer, and none of these is one".into(),
            );
        }
        if let Some(recurrent) = &self.recurrent
            && rules.is_hybrid()
            && !(within(recurrent) && within(&self.attention))
        {
            let why = "a stage of this hybrid model needs at least one recurrent and one attention layer";
            return Some(why.into());
        }
        if self.heads.as_ref().is_some_and(|h| h.get(a as usize) == Some(&0)) {
            return Some(format!("layer {a} has no attention heads, and a stage must not start with such a layer"));
        }
        rules.quirks.iter().find_map(|q| self.quirk(*q, range))
    }

    fn quirk(&self, quirk: Quirk, range: LayerRange) -> Option<String> {
        let (a, count) = (range.start(), range.count());
        let starts_every = |k: u32| {
            (k > 1 && a % k != 0)
                .then(|| format!("a stage of this model starts at a multiple of {k}, not at layer {a}"))
        };
        match quirk {
            Quirk::StartsEvery(k) => starts_every(k),
            Quirk::MoeStep => starts_every(self.moe_step),
            Quirk::Llama4 if self.chunked => starts_every(4).or_else(|| self.quirk(Quirk::AtLeast(4), range)),
            Quirk::AtLeast(k) => (count < k).then(|| format!("a stage of this model needs at least {k} layers")),
            Quirk::CountMatters(k, why) => (count == k).then(|| format!("a stage must not have {k} layers: {why}")),
            // Only larger models have this quirk, and those run whole; windows of smaller ones are smaller still.
            Quirk::CountFrom(..) => None,
            Quirk::DeepSeekCounts => {
                let lite = matches!(count, 26 | 27) || count == 48 && self.lite_48;
                lite.then(|| format!("a stage must not have {count} layers: llama.cpp takes it for a lite variant"))
            }
            Quirk::SparseLayer => (range.end() <= self.dense_lead)
                .then(|| "a stage of this model needs at least one layer with sparse attention".into()),
            Quirk::FullLayer => (self.sliding.is_some()
                && range_of(self.sliding.as_deref().unwrap_or_default(), range).iter().all(|s| *s))
            .then(|| "a stage of this model needs at least one full-attention layer".into()),
            Quirk::StartsAtIndexer => {
                let own = self.own_indexer.as_ref()?;
                let slides = self.sliding.as_ref().is_some_and(|s| s.get(a as usize) == Some(&true));
                let shares = own.contains(&true) && own.get(a as usize) == Some(&false) && !slides;
                shares.then(|| format!("layer {a} uses an earlier layer's indexer; start at a layer with its own"))
            }
            _ => None,
        }
    }

    /// The windows of the partition with the most stages.
    pub fn finest_partition(&self) -> Vec<LayerRange> {
        let n = self.n as usize;
        // best[a]: (stages of the finest partition of a..n, end of its first window); 0 stages: there is none.
        let mut best = vec![(0u32, 0usize); n + 1];
        for a in (0..n).rev() {
            for b in a + 1..=n {
                let rest = best[b].0;
                if (b == n || rest > 0)
                    && rest + 1 > best[a].0
                    && range(a, b).is_some_and(|r| self.problem(r).is_none())
                {
                    best[a] = (rest + 1, b);
                }
            }
        }
        let (mut parts, mut a) = (Vec::new(), 0);
        while a < n && best[a].0 > 0 {
            parts.extend(range(a, best[a].1));
            a = best[a].1;
        }
        parts
    }

    /// Layers at which the model may be cut in two.
    pub fn single_cuts(&self) -> Vec<u32> {
        let ok = |a, b| LayerRange::new(a, b).is_ok_and(|r| self.problem(r).is_none());
        (1..self.n).filter(|c| ok(0, *c) && ok(*c, self.n)).collect()
    }
}

fn range(a: usize, b: usize) -> Option<LayerRange> {
    LayerRange::new(a as u32, b as u32).ok()
}

fn range_of(kinds: &[bool], range: LayerRange) -> &[bool] {
    kinds.get(range.start() as usize..range.end() as usize).unwrap_or_default()
}

fn sliding(f: &Facts<'_>, rules: Option<&Rules>, n: u32) -> Option<Vec<bool>> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    let rules = rules?;
    if rules.name == "exaone4" && n != 64 {
        return None; // only 64 layers switch it on
    }
    if let Some(list) = f.list(PATTERN) {
        return Some((0..n as usize).map(|i| list.get(i).is_some_and(|x| *x != 0)).collect());
    }
    let swa = rules.swa?;
    let on = f.u32("attention.sliding_window").map_or(swa.without_key, |w| w > 0);
    let period = f.u32(PATTERN).unwrap_or(swa.period);
    on.then(|| (0..n).map(|i| swa.is_sliding(i, period)).collect())
}

fn recurrent(f: &Facts<'_>, rules: Option<&Rules>, n: u32) -> Option<Vec<bool>> {
    let rules = rules?;
    if rules.is_hybrid()
        && let Some(list) = f.list("attention.recurrent_layers")
    {
        return Some((0..n as usize).map(|i| list.get(i).is_some_and(|x| *x != 0)).collect());
    }
    let zero = |key, i| f.per_layer(key, i).unwrap_or(0) == 0;
    match rules.mixer {
        Mixer::Attention => None,
        Mixer::Recurrent | Mixer::Both => Some(vec![true; n as usize]),
        Mixer::ByKvHeads => Some((0..n).map(|i| zero("attention.head_count_kv", i)).collect()),
        Mixer::ByKvHeadsAndFeedForward => Some(
            (0..n)
                .map(|i| {
                    // One feed-forward width for all layers says nothing about which layers have one.
                    let listed = f.list("feed_forward_length").is_some();
                    zero("attention.head_count_kv", i) && (!listed || zero("feed_forward_length", i))
                })
                .collect(),
        ),
        Mixer::ByInterval(default) => {
            let period = interval(f, default);
            Some((0..n).map(|i| (i + 1) % period != 0).collect())
        }
    }
}

/// Every how many layers a hybrid model has full attention.
pub(crate) fn interval(f: &Facts<'_>, default: u32) -> u32 {
    f.u32("full_attention_interval").filter(|p| *p > 0).unwrap_or(default).max(1)
}

/// Why the model only runs whole, for reasons that hold for every window.
fn whole(f: &Facts<'_>, rules: Option<&Rules>, n: u32, w: &Windows) -> Option<String> {
    let arch = f.arch;
    let Some(rules) = rules else {
        return Some(match whole_reason(arch) {
            Some(why) => format!("models of the architecture {arch} run whole on one node: {why}"),
            None => format!(
                "the architecture {arch} is not in capstan's table of architectures that can be split; it runs whole on one node"
            ),
        });
    };
    if n < 2 {
        return Some("the model has a single layer".into());
    }
    if let Some((key, len)) = short_array(f, n) {
        return Some(format!("the list {key} has {len} entries for {n} layers, so it cannot be cut"));
    }
    rules.quirks.iter().find_map(|q| match *q {
        Quirk::CountMatters(k, why) if n == k && rules.name != "smallthinker" => {
            Some(format!("with {n} layers a {arch} model runs whole on one node: {why}"))
        }
        Quirk::CountFrom(k, why) if n >= k => {
            Some(format!("with {n} layers a {arch} model runs whole on one node: {why}"))
        }
        Quirk::DeepSeekCounts if matches!(n, 26 | 27) || n == 48 && w.lite_48 => {
            Some(format!("a lite variant of {arch} is known by its {n} layers, so it runs whole on one node"))
        }
        Quirk::NeedsSections if !f.has_sections() => {
            Some(format!("{arch} takes hidden states only with M-RoPE sections, and this file has none; it runs whole"))
        }
        Quirk::NoPerLayerInput if f.u32("embedding_length_per_layer_input").unwrap_or(0) > 0 => {
            Some("each layer has an input computed from the token, so the model runs whole on one node".into())
        }
        Quirk::NoPerLayerInput if f.u32("attention.shared_kv_layers").unwrap_or(0) > 0 => {
            Some("its last layers share the KV cache of earlier ones, so the model runs whole on one node".into())
        }
        Quirk::NoLoops if f.u32("num_loops").unwrap_or(1) > 1 => {
            Some("its layers run several times in a loop, so the model runs whole on one node".into())
        }
        Quirk::NoDeepstack if f.has("deepstack_mapping") => {
            Some("image streams enter between its layers, so the model runs whole on one node".into())
        }
        _ => None,
    })
}

/// A per-layer list with fewer entries than there are layers.
fn short_array(f: &Facts<'_>, n: u32) -> Option<(String, u64)> {
    let bare = PER_LAYER_BARE.iter().map(|k| (*k).to_owned());
    PER_LAYER.iter().map(|k| f.key(k)).chain(bare).find_map(|key| {
        let len = f.meta.get_array(&key)?.len();
        (len < n.into()).then_some((key, len))
    })
}
