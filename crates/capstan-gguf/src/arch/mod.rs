//! What Capstan knows of architectures: one table, and what follows from it for a window of layers.
//!
//! [`table`] is the knowledge as data, [`windows`] answers whether a window may be a stage, [`edit`] adjusts the
//! metadata of one. Every rule is there because llama.cpp computes something from the number of layers, from a layer's
//! absolute number, or from the presence of a kind of layer; without it a shard fails to load or is silently wrong.
use capstan_proto::data::Rollback;

pub mod edit;
pub mod table;
pub mod windows;

/// How an architecture that enters by embeddings is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// llama.cpp's name of the architecture.
    pub name: &'static str,
    /// The graph node that holds a window's last hidden state; `{}` stands for the number of its last layer.
    pub capture: &'static str,
    /// The loader insists on `output.weight`, so stages that never read it need one of zeros.
    pub output_required: bool,
    /// The sliding-window pattern that the code assumes when the file gives a number or nothing.
    pub swa: Option<Swa>,
    /// Which layers are recurrent.
    pub mixer: Mixer,
    /// What a recurrent layer keeps for a sequence.
    pub state: State,
    /// What a looked-up embedding row is multiplied by.
    pub embedding_scale: EmbeddingScale,
    /// Everything else.
    pub quirks: &'static [Quirk],
}

/// A periodic pattern of sliding-window layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swa {
    /// One layer in so many has full attention; 0 means none has.
    pub period: u32,
    /// The full layer is the first of its period, not the last.
    pub dense_first: bool,
    /// The code sets a window even when the file names none.
    pub without_key: bool,
}

impl Swa {
    /// Whether layer `i` has a sliding window when one in `period` has not.
    pub fn is_sliding(self, i: u32, period: u32) -> bool {
        period == 0 || if self.dense_first { !i.is_multiple_of(period) } else { i % period < period - 1 }
    }
}

/// Which layers are recurrent. A hybrid window needs at least one layer of each kind: llama.cpp makes an input for both
/// kinds and asserts that it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    /// None.
    Attention,
    /// All.
    Recurrent,
    /// Each layer is both; any window is fine.
    Both,
    /// Those without KV heads.
    ByKvHeads,
    /// Those with neither KV heads nor feed-forward; what has no KV heads but a feed-forward is neither kind.
    ByKvHeadsAndFeedForward,
    /// All but every n-th, where `full_attention_interval` or else this number is n; written out in a shard.
    ByInterval(u32),
}

/// What a recurrent layer keeps for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Convolution and state of a state-space layer (Mamba, gated delta net).
    Ssm,
    /// A short convolution (LFM2).
    ShortConv,
    /// Delta attention with a state per head (Kimi).
    Kda,
    /// RWKV's.
    Wkv,
}

/// What a looked-up embedding row is multiplied by before it enters the first stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingScale {
    /// Nothing: either there is no scale, or the graph scales any input.
    One,
    /// The square root of the row's width, which the graph applies to tokens but not to embeddings.
    SqrtWidth,
}

/// What else an architecture needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// `embedding_scale` has a default other than 1, so stages after the first must say 1.
    ScaleByDefault,
    /// `residual_scale` defaults to a number computed from the number of layers: write it.
    ResidualScaleByCount,
    /// Learned positions are added to any input: zeros after the first stage.
    ZeroPositions,
    /// `output.bias` is required: zeros on stages without a head.
    ZeroOutputBias,
    /// Embedding input aborts unless there are M-RoPE sections: write ones that mean plain NEOX rope.
    WriteSections,
    /// Embedding input aborts unless the file has M-RoPE sections, and they cannot be made up.
    NeedsSections,
    /// deepseek2's loader: lite variants are known by their layers, and the default gating by layers and vocabulary.
    DeepSeekCounts,
    /// Files with a context of a million tokens and no `attention.indexer.types` use a table in the code: write it.
    IndexerTable,
    /// A window starts at a layer with an indexer of its own, for the layers after it share its choice.
    StartsAtIndexer,
    /// A window needs a layer after the leading dense ones: only those have a sparse-attention cache.
    SparseLayer,
    /// A window needs a full-attention layer.
    FullLayer,
    /// Windows start at multiples of this number, because the layer's number decides about rope.
    StartsEvery(u32),
    /// As [`Quirk::StartsEvery`] 4 with at least 4 layers, unless the file switches chunked attention off.
    Llama4,
    /// Windows start at multiples of `interleave_moe_layer_step`.
    MoeStep,
    /// At least so many layers.
    AtLeast(u32),
    /// Exactly so many layers mean something else to the loader, in a window as in a model.
    CountMatters(u32, &'static str),
    /// So many layers or more mean something else to the loader.
    CountFrom(u32, &'static str),
    /// `rope_freqs.weight` is used by full-attention layers only, and an unused tensor is an error.
    FreqsOnlyWithFull,
    /// `embedding_length_per_layer_input` and `attention.shared_kv_layers` must be absent or 0.
    NoPerLayerInput,
    /// `num_loops` must be absent or 1.
    NoLoops,
    /// `deepstack_mapping` must be absent: it adds image streams inside.
    NoDeepstack,
}

impl Rules {
    /// Whether the architecture has this quirk.
    pub fn has(&self, quirk: Quirk) -> bool {
        self.quirks.contains(&quirk)
    }
    /// Name of the node that holds the last hidden state of a window of `count` layers.
    pub fn capture_node(&self, count: u32) -> String {
        self.capture.replace("{}", &count.saturating_sub(1).to_string())
    }
    /// Whether recurrent and attention layers are mixed.
    pub fn is_hybrid(&self) -> bool {
        matches!(self.mixer, Mixer::ByKvHeads | Mixer::ByKvHeadsAndFeedForward | Mixer::ByInterval(_))
    }
}

/// The rules of an architecture, if it can be cut.
pub fn rules(architecture: &str) -> Option<&'static Rules> {
    table::TABLE.iter().find(|r| r.name == architecture)
}

/// Why a known architecture only runs whole.
pub fn whole_reason(architecture: &str) -> Option<&'static str> {
    table::WHOLE.iter().find(|(name, ..)| *name == architecture).map(|(_, why, _)| *why)
}

/// How rows computed in vain are taken back: as the proof on the tiny models found it, and not at all where there is no
/// proof. llama.cpp's own answer does not help, for it accepts some removals that it then gets wrong.
pub fn rollback(architecture: &str) -> Rollback {
    if let Some(rules) = rules(architecture) {
        return if rules.mixer == Mixer::Attention { Rollback::Trim } else { Rollback::Copy };
    }
    let whole = table::WHOLE.iter().find(|(name, ..)| *name == architecture);
    whole.map_or(Rollback::None, |(.., rollback)| *rollback)
}

/// Whether llama.cpp writes down all that it keeps of a sequence, so that one that is read again goes on as if it had never
/// been away: proved on the tiny models, like [`rollback`].
pub fn keeps_snapshots(architecture: &str) -> bool {
    rollback(architecture) != Rollback::None && !table::FORGETFUL.contains(&architecture)
}
