//! The table: every architecture that takes its hidden states as embeddings, and those known to run whole only.
use capstan_proto::data::Rollback::{self, Copy, None as Unproved, Trim};

use super::{EmbeddingScale, Mixer, Quirk, Quirk::*, Rules, State, Swa};

/// Keys after `{arch}.` whose arrays hold one entry per layer. A list, for lengths deceive: a four-layer model's
/// `rope.dimension_sections` also has four entries.
pub const PER_LAYER: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
    "attention.sliding_window_pattern",
    "attention.rope_pattern",
    "attention.recurrent_layers",
    "attention.indexer.types",
    "attention.compress_ratios",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
    "deepstack_mapping",
    "expert_shared_feed_forward_length",
];

/// Keys without the architecture's prefix whose arrays hold one entry per layer.
pub const PER_LAYER_BARE: &[&str] = &["xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"];

const fn r(name: &'static str) -> Rules {
    Rules {
        name,
        capture: "l_out-{}",
        output_required: false,
        swa: None,
        mixer: Mixer::Attention,
        state: State::Ssm,
        embedding_scale: EmbeddingScale::One,
        quirks: &[],
    }
}

impl Rules {
    const fn output(mut self) -> Self {
        self.output_required = true;
        self
    }
    const fn swa(mut self, period: u32) -> Self {
        self.swa = Some(Swa { period, dense_first: false, without_key: false });
        self
    }
    const fn swa_dense_first(mut self, period: u32) -> Self {
        self.swa = Some(Swa { period, dense_first: true, without_key: false });
        self
    }
    const fn swa_without_key(mut self, period: u32) -> Self {
        self.swa = Some(Swa { period, dense_first: false, without_key: true });
        self
    }
    const fn mixer(mut self, mixer: Mixer) -> Self {
        self.mixer = mixer;
        self
    }
    const fn state(mut self, state: State) -> Self {
        self.state = state;
        self
    }
    const fn capture(mut self, node: &'static str) -> Self {
        self.capture = node;
        self
    }
    const fn sqrt_width(mut self) -> Self {
        self.embedding_scale = EmbeddingScale::SqrtWidth;
        self
    }
    const fn quirks(mut self, quirks: &'static [Quirk]) -> Self {
        self.quirks = quirks;
        self
    }
}

const SCALE: &str = "the number of layers sets the scale of attention";
const ROPE: &str = "the number of layers chooses between rope and ALiBi";

/// Every architecture that can be cut.
pub const TABLE: &[Rules] = &[
    // Any window will do.
    r("llama"),
    r("qwen2"),
    r("qwen3"),
    r("qwen3moe"),
    r("mistral3"),
    r("seed_oss"),
    r("phi3"),
    r("hunyuan-dense"),
    r("hunyuan-moe"),
    r("hy_v3"),
    r("ernie4_5"),
    r("starcoder2"),
    r("arctic"),
    r("deepseek"),
    r("chatglm"),
    r("grovemoe"),
    r("arcee"),
    r("exaone"),
    r("falcon"),
    r("olmo"),
    r("openelm"),
    r("pangu-embedded"),
    r("jais2"),
    r("maincoder"),
    r("deci"),
    r("deepseek32"),
    r("qwen2vl"),
    r("qwen3vl"),
    r("qwen3vlmoe"),
    r("nanbeige").quirks(&[NoLoops]),
    r("glm4").quirks(&[NeedsSections]),
    r("glm4moe").quirks(&[WriteSections]),
    // Any window, with a head of zeros.
    r("qwen2moe").output(),
    r("minimax-m2").output(),
    r("dbrx").output(),
    r("olmoe").output(),
    r("dots1").output(),
    r("bailingmoe").output(),
    r("bailingmoe2").output(),
    r("apertus").output(),
    r("internlm2").output(),
    r("nemotron").output(),
    r("orion").output(),
    r("xverse").output(),
    r("stablelm").output(),
    r("gptneox").output(),
    r("codeshell").output(),
    r("phi2").output().quirks(&[ZeroOutputBias]),
    r("phimoe").output().quirks(&[ZeroOutputBias]),
    // Scales that apply to any input, and learned positions.
    r("granite").quirks(&[NoDeepstack]),
    r("granitemoe").quirks(&[NoDeepstack]),
    r("minicpm").quirks(&[ScaleByDefault, ResidualScaleByCount]),
    r("grok").quirks(&[ScaleByDefault]),
    r("gpt2").quirks(&[ZeroPositions]),
    r("starcoder").quirks(&[ZeroPositions]),
    r("mpt").quirks(&[ZeroPositions]),
    // The number of layers, or a layer's number, is in the formulas.
    r("deepseek2").quirks(&[DeepSeekCounts]),
    r("mistral4").quirks(&[DeepSeekCounts]),
    r("exaone4").swa_without_key(4).quirks(&[CountMatters(64, "64 layers switch the sliding window on")]),
    r("command-r").quirks(&[CountFrom(64, "64 layers or more switch the norms of queries and keys on")]),
    r("baichuan").output().quirks(&[CountMatters(32, ROPE), CountMatters(40, ROPE)]),
    r("smollm3").quirks(&[StartsEvery(4)]),
    r("smallthinker")
        .swa_dense_first(4)
        .quirks(&[StartsEvery(4), CountMatters(4, "a window of 4 layers switches rope on everywhere")]),
    r("llama4").swa_without_key(4).quirks(&[Llama4, MoeStep]),
    r("ernie4_5-moe").quirks(&[MoeStep]),
    // Sparse attention.
    r("glm-dsa").quirks(&[IndexerTable, StartsAtIndexer]),
    r("minimax-m3").output().quirks(&[SparseLayer]),
    r("dots3note").quirks(&[StartsAtIndexer, FullLayer]),
    // Sliding windows.
    r("gpt-oss").output().swa(2),
    r("mellum").output().swa(4),
    r("exaone-moe").output().swa(4),
    r("olmo2").output().swa(4),
    r("cohere2").swa(4),
    r("cohere2moe").swa_dense_first(4),
    r("laguna").swa_dense_first(4),
    r("plamo3").swa(8),
    r("gemma3").swa(6).sqrt_width().quirks(&[CountMatters(62, SCALE)]),
    r("gemma4").sqrt_width().quirks(&[AtLeast(2), FreqsOnlyWithFull, NoPerLayerInput]),
    r("step35").output().capture("h_nextn"), // it renames the last l_out
    r("mimo2").output(),
    r("spark2_5"),
    // Recurrent and hybrid.
    r("mamba").mixer(Mixer::Recurrent),
    r("mamba2").mixer(Mixer::Recurrent),
    r("falcon-h1").mixer(Mixer::Both),
    r("qwen3next").mixer(Mixer::ByInterval(4)),
    r("qwen35").mixer(Mixer::ByInterval(4)),
    r("qwen35moe").mixer(Mixer::ByInterval(4)),
    r("kimi-linear").output().mixer(Mixer::ByKvHeads).state(State::Kda),
    r("bailingmoe3").mixer(Mixer::ByKvHeads).state(State::Kda),
    r("lfm2").mixer(Mixer::ByKvHeads).state(State::ShortConv),
    r("lfm2moe").mixer(Mixer::ByKvHeads).state(State::ShortConv),
    r("jamba").mixer(Mixer::ByKvHeads),
    r("granitehybrid").mixer(Mixer::ByKvHeads),
    r("plamo2").mixer(Mixer::ByKvHeads).capture("ffn_residual-{}"),
    // Their l_out lacks the residual.
    r("nemotron_h").mixer(Mixer::ByKvHeadsAndFeedForward).capture("nemotron_h_block_out-{}"),
    r("nemotron_h_moe").mixer(Mixer::ByKvHeadsAndFeedForward).capture("nemotron_h_block_out-{}"),
];

const SCALED: &str = "its graph scales any input, so hidden states cannot enter it as embeddings";
const NORMED: &str = "its graph normalises any input, so hidden states cannot enter it as embeddings";
const STREAMS: &str = "it carries several residual streams, which cannot enter as embeddings";

/// Architectures that are known and run whole, each with the rest of the sentence "… because" and with how its memory is
/// taken back.
pub const WHOLE: &[(&str, &str, Rollback)] = &[
    ("afmoe", SCALED, Trim),
    ("gemma", SCALED, Trim),
    ("gemma2", SCALED, Trim),
    ("bloom", NORMED, Trim),
    ("muse-glimmer", NORMED, Trim),
    ("rwkv6", NORMED, Unproved),
    // A sequence that is copied and copied back is not what it was.
    ("deepseek4", STREAMS, Unproved),
    ("glm5-next", STREAMS, Copy),
    ("hy_v4", STREAMS, Trim),
    ("qwen4exp", STREAMS, Copy),
    ("kimi-k3", "its layers mix the inputs of all earlier blocks", Copy),
    ("minimax-01", "its decay depends on a layer's number and on how many there are", Copy),
    // Even the same micro-batches do not always give their random models the same numbers.
    ("rwkv7", "all its layers use the first layer's values", Unproved),
    ("arwkv7", "all its layers use the first layer's values", Unproved),
    ("gemma3n", "each layer has an input computed from the token, and there are several residual streams", Trim),
    ("minicpm3", "its residual scale is computed from the number of layers", Trim),
    ("talkie", "every layer adds the token's embedding", Trim),
    (
        "llada-moe",
        "it is a diffusion model, which llama.cpp gives no memory of a sequence and which is not served",
        Unproved,
    ),
    ("graniteswitch", "its router needs the tokens", Unproved),
    ("hrm_text", "its layers run in loops", Unproved),
];

/// Architectures of whose sequences llama.cpp does not write everything down.
pub(super) const FORGETFUL: [&str; 1] = ["qwen4exp"];
