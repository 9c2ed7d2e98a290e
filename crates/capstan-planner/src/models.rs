//! The built-in catalogue of large models: shapes from public configurations, each with its source.
use crate::names::{self, Unknown};
use crate::quant::{COMMON, Quantisation, dense_file, mixed_experts, mxfp4};
use crate::shape::{Attention, Experts, Recurrent, Shape, Sliding};

/// A model that can be planned for without its file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownModel {
    /// Its name.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// Its shape.
    pub shape: Shape,
    /// Billions of weights that its makers or llama.cpp give.
    pub published_billion: f64,
    /// Billions of weights that a token uses, as its makers give them; none where they give none.
    pub published_active_billion: Option<f64>,
    /// Where the shape is from.
    pub source: &'static str,
    /// Files of a known size, the usual one first. [`COMMON`] ones can be asked for beside them.
    pub files: &'static [Quantisation],
}

impl KnownModel {
    /// Its name and its other names.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        let (name, aliases) = (self.name, self.aliases);
        std::iter::once(name).chain(aliases.iter().copied())
    }

    /// The usual quantisation: the first file whose size is known, else Q4_K_M.
    pub fn usual(&self) -> &'static Quantisation {
        self.files.first().unwrap_or(&COMMON[0])
    }

    /// All quantisations, the usual one first.
    pub fn quantisations(&self) -> impl Iterator<Item = &'static Quantisation> + use<> {
        let files = self.files;
        files.iter().chain(COMMON.iter().filter(move |q| files.iter().all(|f| f.name != q.name)))
    }

    /// The quantisation of this name, in any spelling of case.
    pub fn quantisation(&self, name: &str) -> Result<&'static Quantisation, Unknown> {
        let found = self.quantisations().find(|q| q.name.eq_ignore_ascii_case(name.trim()));
        found.ok_or_else(|| {
            let all: Vec<_> = self.quantisations().map(|q| q.name).collect();
            names::unknown("quantisation", name, &all)
        })
    }
}

/// The model of a name or alias: case, blanks and punctuation do not matter. `Kimi K2.5:UD-Q2_K_XL` names a
/// quantisation too, and so does `Kimi K2.5 UD-Q2_K_XL`.
pub fn find(text: &str) -> Result<(&'static KnownModel, &'static Quantisation), Unknown> {
    let named = |name: &str| MODELS.iter().find(|m| m.names().any(|n| names::same(n, name)));
    if let Some((name, quantisation)) = text.split_once(':') {
        let model = named(name).ok_or_else(|| unknown(name))?;
        return Ok((model, model.quantisation(quantisation)?));
    }
    if let Some(model) = named(text) {
        return Ok((model, model.usual()));
    }
    let both = |m: &KnownModel, q: &Quantisation| m.names().any(|n| names::same(&format!("{n} {}", q.name), text));
    let found = MODELS.iter().find_map(|m| Some((m, m.quantisations().find(|q| both(m, q))?)));
    found.ok_or_else(|| unknown(text))
}

fn unknown(name: &str) -> Unknown {
    let all: Vec<_> = MODELS.iter().flat_map(|m| m.names()).collect();
    names::unknown("model", name, &all)
}

const fn grouped(heads: u64, kv_heads: u64, head: u64) -> Attention {
    Attention::Grouped { heads, kv_heads, head, gated: false }
}

/// DeepSeek's latent attention; its descendants differ in the number of heads only.
const fn latent(heads: u64) -> Attention {
    Attention::Latent { heads, q_rank: 1536, kv_rank: 512, nope: 128, rope: 64, value: 128 }
}

const fn experts(count: u32, used: u32, width: u64, shared_width: u64, leading_dense: u32) -> Option<Experts> {
    Some(Experts { count, used, width, shared_width, leading_dense })
}

/// A shape whose layers are all alike, with attention.
const fn plain(architecture: &'static str, layers: u32, width: u64, vocab: u64, attention: Attention) -> Shape {
    Shape {
        architecture,
        n_layers: layers,
        n_embd: width,
        n_vocab: vocab,
        context_train: 131_072,
        tied: false,
        attention,
        sliding: None,
        recurrent: None,
        dense_width: 0,
        experts: None,
    }
}

const fn dense(shape: Shape, dense_width: u64) -> Shape {
    Shape { dense_width, ..shape }
}

/// GiB with two decimals, as llama.cpp prints sizes, in bytes.
const fn gib_hundredths(n: u64) -> u64 {
    n * (1 << 30) / 100
}

const KIMI: Shape = Shape {
    context_train: 262_144,
    dense_width: 18_432,
    experts: experts(384, 8, 2048, 2048, 1),
    ..plain("deepseek2", 61, 7168, 163_840, latent(64))
};
const DEEPSEEK: Shape = Shape {
    context_train: 163_840,
    dense_width: 18_432,
    experts: experts(256, 8, 2048, 2048, 3),
    ..plain("deepseek2", 61, 7168, 129_280, latent(128))
};
const LLAMA_70B: Shape = dense(plain("llama", 80, 8192, 128_256, grouped(64, 8, 128)), 28_672);

const RPC_TEST: &str = "https://github.com/lhl/strix-halo-testing/blob/main/rpc-test/README.md";

/// The catalogue.
pub const MODELS: &[KnownModel] = &[
    KnownModel {
        name: "Kimi K2.5",
        aliases: &["kimi-k2.5-instruct", "moonshotai/Kimi-K2.5"],
        shape: KIMI,
        published_billion: 1030.0,
        published_active_billion: Some(32.0),
        source: "https://huggingface.co/moonshotai/Kimi-K2.5/blob/main/config.json",
        files: &[mixed_experts(
            "UD-Q2_K_XL",
            374_764_330_144,
            "https://huggingface.co/unsloth/Kimi-K2.5-GGUF/tree/main/UD-Q2_K_XL",
        )],
    },
    KnownModel {
        name: "Kimi K2",
        aliases: &["kimi-k2-instruct", "kimi-k2-thinking", "moonshotai/Kimi-K2-Instruct"],
        shape: Shape { context_train: 131_072, ..KIMI },
        published_billion: 1030.0,
        published_active_billion: Some(32.0),
        source: "https://huggingface.co/moonshotai/Kimi-K2-Instruct/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "DeepSeek R1",
        aliases: &["deepseek-r1-0528", "deepseek-ai/DeepSeek-R1"],
        shape: DEEPSEEK,
        published_billion: 671.0,
        published_active_billion: Some(37.0),
        source: "https://huggingface.co/deepseek-ai/DeepSeek-R1/blob/main/config.json",
        files: &[
            mixed_experts("UD-Q2_K_XL", gib_hundredths(21_103), RPC_TEST),
            mixed_experts("Q4_K_M", gib_hundredths(37_665), RPC_TEST),
        ],
    },
    KnownModel {
        name: "DeepSeek V3",
        aliases: &["deepseek-v3-0324", "deepseek-v3.1", "deepseek-ai/DeepSeek-V3"],
        shape: DEEPSEEK,
        published_billion: 671.0,
        published_active_billion: Some(37.0),
        source: "https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "GLM-4.6",
        aliases: &["glm-4.5", "glm-4.7", "zai-org/GLM-4.6"],
        shape: Shape {
            context_train: 202_752,
            dense_width: 12_288,
            experts: experts(160, 8, 1536, 1536, 3),
            ..plain("glm4moe", 92, 5120, 151_552, grouped(96, 8, 128))
        },
        published_billion: 355.0,
        published_active_billion: Some(32.0),
        source: "https://huggingface.co/zai-org/GLM-4.6/blob/main/config.json",
        files: &[mixed_experts("UD-Q4_K_XL", 204_000_000_000, "https://huggingface.co/unsloth/GLM-4.6-GGUF")],
    },
    KnownModel {
        name: "GLM-4.5-Air",
        aliases: &["zai-org/GLM-4.5-Air"],
        shape: Shape {
            dense_width: 10_944,
            experts: experts(128, 8, 1408, 1408, 1),
            ..plain("glm4moe", 46, 4096, 151_552, grouped(96, 8, 128))
        },
        published_billion: 106.0,
        published_active_billion: Some(12.0),
        source: "https://huggingface.co/zai-org/GLM-4.5-Air/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Qwen3-235B-A22B",
        aliases: &["qwen3-235b", "Qwen/Qwen3-235B-A22B"],
        shape: Shape {
            context_train: 262_144,
            experts: experts(128, 8, 1536, 0, 0),
            ..plain("qwen3moe", 94, 4096, 151_936, grouped(64, 4, 128))
        },
        published_billion: 235.0,
        published_active_billion: Some(22.0),
        source: "https://huggingface.co/Qwen/Qwen3-235B-A22B/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Qwen3-Coder-480B-A35B",
        aliases: &["qwen3-coder-480b", "qwen3-480b", "Qwen/Qwen3-Coder-480B-A35B-Instruct"],
        shape: Shape {
            context_train: 262_144,
            experts: experts(160, 8, 2560, 0, 0),
            ..plain("qwen3moe", 62, 6144, 151_936, grouped(96, 8, 128))
        },
        published_billion: 480.0,
        published_active_billion: Some(35.0),
        source: "https://huggingface.co/Qwen/Qwen3-Coder-480B-A35B-Instruct/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Qwen3-30B-A3B",
        aliases: &["qwen3-30b", "qwen3-coder-30b-a3b", "Qwen/Qwen3-30B-A3B"],
        shape: Shape {
            context_train: 262_144,
            experts: experts(128, 8, 768, 0, 0),
            ..plain("qwen3moe", 48, 2048, 151_936, grouped(32, 4, 128))
        },
        published_billion: 30.5,
        published_active_billion: Some(3.3),
        source: "https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Qwen3-Next-80B-A3B",
        aliases: &["qwen3-next", "Qwen/Qwen3-Next-80B-A3B-Instruct"],
        shape: Shape {
            context_train: 262_144,
            experts: experts(512, 10, 512, 512, 0),
            recurrent: Some(Recurrent { period: 4, key_heads: 16, value_heads: 32, head: 128, kernel: 4 }),
            ..plain(
                "qwen3next",
                48,
                2048,
                151_936,
                Attention::Grouped { heads: 16, kv_heads: 2, head: 256, gated: true },
            )
        },
        published_billion: 80.0,
        published_active_billion: Some(3.0),
        source: "https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "MiniMax-M2",
        aliases: &["minimax-m2.1", "MiniMaxAI/MiniMax-M2"],
        shape: Shape {
            context_train: 196_608,
            experts: experts(256, 8, 1536, 0, 0),
            ..plain("minimax-m2", 62, 3072, 200_064, grouped(48, 8, 128))
        },
        published_billion: 230.0,
        published_active_billion: Some(10.0),
        source: "https://huggingface.co/MiniMaxAI/MiniMax-M2/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "gpt-oss-120b",
        aliases: &["openai/gpt-oss-120b"],
        shape: Shape {
            experts: experts(128, 4, 2880, 0, 0),
            sliding: Some(Sliding { tokens: 128, period: 2 }),
            ..plain("gpt-oss", 36, 2880, 201_088, grouped(64, 8, 64))
        },
        published_billion: 116.8,
        published_active_billion: Some(5.1),
        source: "https://huggingface.co/openai/gpt-oss-120b/blob/main/config.json",
        files: &[mxfp4(gib_hundredths(5902), "https://huggingface.co/ggml-org/gpt-oss-120b-GGUF")],
    },
    KnownModel {
        name: "gpt-oss-20b",
        aliases: &["openai/gpt-oss-20b"],
        shape: Shape {
            experts: experts(32, 4, 2880, 0, 0),
            sliding: Some(Sliding { tokens: 128, period: 2 }),
            ..plain("gpt-oss", 24, 2880, 201_088, grouped(64, 8, 64))
        },
        published_billion: 20.9,
        published_active_billion: Some(3.6),
        source: "https://huggingface.co/openai/gpt-oss-20b/blob/main/config.json",
        files: &[mxfp4(
            gib_hundredths(1127),
            "https://jetsonhacks.com/wp-content/uploads/2025/10/spark-llamacpp-bench.html",
        )],
    },
    KnownModel {
        name: "Llama 3.1 405B",
        aliases: &["llama-405b", "meta-llama/Llama-3.1-405B"],
        shape: dense(plain("llama", 126, 16_384, 128_256, grouped(128, 8, 128)), 53_248),
        published_billion: 405.9,
        published_active_billion: None,
        source: "https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json",
        files: &[dense_file("Q4_K_M", gib_hundredths(22_637), RPC_TEST)],
    },
    KnownModel {
        name: "Llama 3.1 70B",
        aliases: &["llama-3.3-70b", "llama-70b", "meta-llama/Llama-3.1-70B"],
        shape: LLAMA_70B,
        published_billion: 70.6,
        published_active_billion: None,
        source: "https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Llama 3.1 8B",
        aliases: &["llama-8b", "meta-llama/Llama-3.1-8B"],
        shape: dense(plain("llama", 32, 4096, 128_256, grouped(32, 8, 128)), 14_336),
        published_billion: 8.03,
        published_active_billion: None,
        source: "https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Qwen2.5-72B",
        aliases: &["Qwen/Qwen2.5-72B-Instruct"],
        shape: dense(plain("qwen2", 80, 8192, 152_064, grouped(64, 8, 128)), 29_568),
        published_billion: 72.7,
        published_active_billion: None,
        source: "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Mistral Large 2",
        aliases: &["mistral-large-2407", "mistralai/Mistral-Large-Instruct-2407"],
        shape: dense(plain("llama", 88, 12_288, 32_768, grouped(96, 8, 128)), 28_672),
        published_billion: 122.6,
        published_active_billion: None,
        source: "https://huggingface.co/mistralai/Mistral-Large-Instruct-2407/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Mixtral 8x22B",
        aliases: &["mistralai/Mixtral-8x22B-Instruct-v0.1"],
        shape: Shape {
            context_train: 65_536,
            experts: experts(8, 2, 16_384, 0, 0),
            ..plain("llama", 56, 6144, 32_768, grouped(48, 8, 128))
        },
        published_billion: 141.0,
        published_active_billion: Some(39.0),
        source: "https://huggingface.co/mistralai/Mixtral-8x22B-Instruct-v0.1/blob/main/config.json",
        files: &[],
    },
    KnownModel {
        name: "Gemma 3 27B",
        aliases: &["google/gemma-3-27b-it"],
        shape: Shape {
            tied: true,
            sliding: Some(Sliding { tokens: 1024, period: 6 }),
            ..dense(plain("gemma3", 62, 5376, 262_208, grouped(32, 16, 128)), 21_504)
        },
        published_billion: 27.0,
        published_active_billion: None,
        source: "https://huggingface.co/google/gemma-3-27b-it/blob/main/config.json",
        files: &[],
    },
];
