//! The built-in catalogue of machines: what one holds and how fast it reads and multiplies, with sources, and lists of
//! them as people type them.
//!
//! A data sheet gives peaks; what a model reaches of them depends on the backend. The shares are named constants per
//! kind of machine ([`Reached`]), each fitted to measurements of others that are named beside it, none to a figure that
//! a forecast is compared with.
use capstan_proto::device::DeviceProfile;
use serde::Serialize;

use crate::measured;
use crate::names::{self, Unknown};

/// Bytes of what data sheets call a gigabyte of memory.
const GIB: u64 = 1 << 30;
/// Most machines of a list: as many as the exact search is made for.
pub const MACHINES_MAX: usize = 64;
/// Longest list of machines, as text.
const LIST_BYTES_MAX: usize = 8 << 10;
/// What a fast NVMe disk reads in a row when a model is loaded, and that is assumed where nothing else is said.
pub const DISK_BYTES_PER_S: f64 = 2.0e9;

/// A machine that stages can be placed on, with what it reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Memory that a stage may take, in bytes.
    pub usable_bytes: u64,
    /// What it reaches.
    pub rates: Rates,
}

/// What a machine reaches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// What was measured on it, which then counts before the figures below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<Box<DeviceProfile>>,
    /// Weights it reads, in bytes per second.
    pub weight_bytes_per_s: f64,
    /// KV cache it reads while it decodes, in bytes per second.
    pub kv_bytes_per_s: f64,
    /// Multiplications and additions of matrices with many rows, per second.
    pub gemm_flops_per_s: f64,
    /// The same of attention.
    pub attention_flops_per_s: f64,
    /// What a layer takes besides, in seconds: the starts of its kernels.
    pub layer_overhead_s: f64,
    /// What a layer with routed experts takes on top of that.
    pub expert_overhead_s: f64,
    /// What its disk reads, in bytes per second.
    pub disk_bytes_per_s: f64,
}

/// Of the bandwidth at which weights are read, what reading the KV cache reaches. gpt-oss-120b on a Ryzen AI Max+ 395
/// decodes at 33.2 tok/s over the first 128 tokens and at 32.4 over the first 4096, which read 75 MB more a token on
/// average: 92 GB/s of 215 (<https://github.com/lhl/strix-halo-testing>, llm-bench/gpt-oss-120b-F16, Vulkan, flash
/// attention). An RTX 4090 shows 0.37 of its 1008 GB/s (<https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference>,
/// 8B Q4_K_M, tg 512 against tg 8192).
pub const KV_SHARE: f64 = 0.4;
/// Of the rate of large matrices, what attention reaches: an RTX 3090 takes 0.148 ms a token more for a prompt of 8192
/// tokens than for one of 512 (8B Q4_K_M), which is 14.6 TFLOPS of 67; a 4090 0.16 of its own (same source as
/// [`KV_SHARE`]).
pub const ATTENTION_SHARE: f64 = 0.2;

/// What a kind of machine reaches of its data sheet with llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reached {
    /// Of the nominal bandwidth, what reading weights reaches.
    pub bandwidth: f64,
    /// Of the nominal f16 rate, what matrices with very many rows reach.
    pub gemm: f64,
    /// See [`Rates::layer_overhead_s`], in microseconds.
    pub layer_overhead_us: f64,
    /// See [`Rates::expert_overhead_s`], in microseconds.
    pub expert_overhead_us: f64,
    /// What these were fitted to.
    pub source: &'static str,
}

/// Ryzen AI Max: 215 of 256 GB/s; 13.6 to 17.3 TFLOPS for six dense models of 7B to 70B; what bytes / bandwidth leaves unexplained of a token is 28 to 126 µs a layer for three dense models and 94
/// to 210 µs for three with experts (Qwen3-30B-A3B, Qwen3-235B-A22B, gpt-oss-120b).
const RYZEN_AI_MAX: Reached = Reached {
    bandwidth: 215.0 / 256.0,
    gemm: 0.26,
    layer_overhead_us: 80.0,
    expert_overhead_us: 80.0,
    source: "https://github.com/lhl/strix-halo-testing/blob/main/llm-bench/README.md",
};
/// Macs: an M2 Ultra decodes an 8B model in f16 and in Q4_K_M at rates whose difference is 698 of 800 GB/s and 190 µs a
/// layer; 994 tok/s of prefill are 16.2 of 27.2 TFLOPS. The overhead of experts is taken from the Ryzen: not measured.
const APPLE: Reached = Reached {
    bandwidth: 0.87,
    gemm: 0.6,
    layer_overhead_us: 190.0,
    expert_overhead_us: 80.0,
    source: "https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference",
};
/// NVIDIA's cards: the same difference is 834 of 936 GB/s and 97 µs on a 3090, 982 of 1008 and 92 µs on a 4090; prefill
/// reaches 0.95 and 0.74 of the dense f16 rate. The overhead of experts is taken from the Ryzen: not measured.
const NVIDIA: Reached = Reached {
    bandwidth: 0.92,
    gemm: 0.8,
    layer_overhead_us: 95.0,
    expert_overhead_us: 80.0,
    source: "https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference",
};
/// DGX Spark: gpt-oss-20b at 79.7 tok/s of decode leaves 56 µs a layer at the Ryzen's share of the bandwidth; its 3610
/// tok/s of prefill are more than the share of experts below allows at the nominal f16 rate, for it also multiplies in
/// 4 and 8 bits, so that prefill is forecast too slow rather than too fast.
const GB10: Reached = Reached {
    bandwidth: 0.84,
    gemm: 1.0,
    layer_overhead_us: 56.0,
    expert_overhead_us: 0.0,
    source: "https://jetsonhacks.com/wp-content/uploads/2025/10/spark-llamacpp-bench.html",
};
/// Radeon cards: the Ryzen's shares, whose graphics unit is of the same family; the overheads of NVIDIA's cards. Not
/// measured.
const RADEON: Reached = Reached {
    bandwidth: 0.84,
    gemm: 0.26,
    layer_overhead_us: 95.0,
    expert_overhead_us: 80.0,
    source: "an assumption: the shares of the Ryzen AI Max, whose graphics unit is of the same family",
};

/// How much of the memory a stage may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Usable {
    /// All but so many GiB. For Ryzen AI Max 8: `ttm.pages_limit=31457280` gives 120 of 128 GiB to the graphics unit, and
    /// the rest is for the system. Without that setting it is half the memory, and 96 GB by the BIOS alone
    /// (`capstan doctor` says what a machine has).
    AllBut(u64),
    /// So many hundredths. For Macs 75: what macOS lets the graphics unit wire without `iogpu.wired_limit_mb`.
    Percent(u64),
}

/// A kind of machine that can be planned with before it is bought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownMachine {
    /// Its name without the memory.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// With how much memory it can be had, in GiB; what is meant when nothing is said comes last.
    pub memory_gib: &'static [u64],
    /// How much of that a stage may take.
    pub usable: Usable,
    /// Nominal bandwidth in GB/s.
    pub bandwidth_gb_per_s: f64,
    /// Nominal rate of f16 matrices in TFLOPS, without sparsity.
    pub f16_tflops: f64,
    /// What it reaches of both.
    pub reached: Reached,
    /// Where the nominal figures are from.
    pub source: &'static str,
}

impl KnownMachine {
    /// One with so much memory.
    pub fn with_memory(&self, memory_gib: u64) -> Machine {
        let usable_bytes = match self.usable {
            Usable::AllBut(gib) => memory_gib.saturating_sub(gib) * GIB,
            Usable::Percent(percent) => memory_gib * GIB / 100 * percent,
        };
        Machine { name: format!("{} {memory_gib}GB", self.name), usable_bytes, rates: self.rates() }
    }

    fn rates(&self) -> Rates {
        let weight_bytes_per_s = self.bandwidth_gb_per_s * 1e9 * self.reached.bandwidth;
        let gemm_flops_per_s = self.f16_tflops * 1e12 * self.reached.gemm;
        Rates {
            layer_overhead_s: self.reached.layer_overhead_us / 1e6,
            expert_overhead_s: self.reached.expert_overhead_us / 1e6,
            ..Rates::of(weight_bytes_per_s, gemm_flops_per_s)
        }
    }

    /// One for each size of memory.
    pub fn variants(&self) -> impl Iterator<Item = Machine> + '_ {
        self.memory_gib.iter().map(|&gib| self.with_memory(gib))
    }
}

impl Rates {
    /// What follows from a reached bandwidth and a reached rate of matrices; overheads are the Ryzen's.
    pub fn of(weight_bytes_per_s: f64, gemm_flops_per_s: f64) -> Self {
        Self {
            measured: None,
            weight_bytes_per_s,
            kv_bytes_per_s: weight_bytes_per_s * KV_SHARE,
            gemm_flops_per_s,
            attention_flops_per_s: gemm_flops_per_s * ATTENTION_SHARE,
            layer_overhead_s: RYZEN_AI_MAX.layer_overhead_us / 1e6,
            expert_overhead_s: RYZEN_AI_MAX.expert_overhead_us / 1e6,
            disk_bytes_per_s: DISK_BYTES_PER_S,
        }
    }

    /// What was measured on a machine.
    pub fn measured(profile: DeviceProfile) -> Self {
        let of = Self::of(measured::weight_bytes_per_s(&profile), measured::gemm_flops_per_s(&profile));
        let disk_bytes_per_s = match profile.disk_bytes_per_s {
            0 => of.disk_bytes_per_s,
            measured => measured as f64,
        };
        Self { disk_bytes_per_s, measured: Some(Box::new(profile)), ..of }
    }
}

/// A card: what a driver and a display take is left out.
const CARD: Usable = Usable::AllBut(1);
const MAC: Usable = Usable::Percent(75);

#[rustfmt::skip]
const fn machine(
    name: &'static str, aliases: &'static [&'static str], memory_gib: &'static [u64], usable: Usable,
    nominal: (f64, f64), reached: Reached, source: &'static str,
) -> KnownMachine {
    let (bandwidth_gb_per_s, f16_tflops) = nominal;
    KnownMachine { name, aliases, memory_gib, usable, bandwidth_gb_per_s, f16_tflops, reached, source }
}

/// The catalogue.
#[rustfmt::skip]
pub const MACHINES: &[KnownMachine] = &[
    machine("Ryzen AI Max+ 395", &["strix halo", "framework desktop", "ai max+ 395"], &[64, 96, 128],
        Usable::AllBut(8), (256.0, 59.4), RYZEN_AI_MAX, "https://llm-tracker.info/_TOORG/Strix-Halo"),
    machine("Ryzen AI Max 385", &["ai max 385"], &[32, 64], Usable::AllBut(8), (256.0, 47.5), RYZEN_AI_MAX,
        "https://www.amd.com/en/products/processors/laptop/ryzen/ai-300-series/amd-ryzen-ai-max-385.html"),
    machine("M2 Max", &["mac studio m2 max", "macbook pro m2 max"], &[32, 64, 96], MAC, (400.0, 13.6), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M2"),
    machine("M2 Ultra", &["mac studio m2 ultra"], &[64, 128, 192], MAC, (800.0, 27.2), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M2"),
    machine("M3 Max", &["macbook pro m3 max"], &[48, 64, 128], MAC, (400.0, 16.4), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M3"),
    machine("M3 Ultra", &["mac studio m3 ultra"], &[96, 256, 512], MAC, (819.0, 32.8), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M3"),
    machine("M4 Pro", &["mac mini m4 pro"], &[24, 48, 64], MAC, (273.0, 9.2), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M4"),
    machine("M4 Max", &["mac studio m4 max", "macbook pro m4 max"], &[36, 48, 64, 128], MAC, (546.0, 18.4), APPLE,
        "https://en.wikipedia.org/wiki/Apple_M4"),
    machine("DGX Spark", &["gb10", "nvidia gb10"], &[128], Usable::AllBut(8), (273.0, 62.5), GB10,
        "https://whylucian.github.io/softab/docs/hardware-specs.html"),
    machine("RTX 3090", &["geforce rtx 3090"], &[24], CARD, (936.0, 71.0), NVIDIA,
        "https://images.nvidia.com/aem-dam/en-zz/Solutions/geforce/ampere/pdf/NVIDIA-ampere-GA102-GPU-Architecture-Whitepaper-V1.pdf"),
    machine("RTX 4090", &["geforce rtx 4090"], &[24], CARD, (1008.0, 165.2), NVIDIA,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    machine("RTX 5090", &["geforce rtx 5090"], &[32], CARD, (1792.0, 209.5), NVIDIA,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"),
    machine("RTX PRO 6000", &["rtx pro 6000 blackwell"], &[96], CARD, (1792.0, 251.9), NVIDIA,
        "https://whylucian.github.io/softab/docs/hardware-specs.html"),
    machine("RTX A6000", &["a6000"], &[48], CARD, (768.0, 154.8), NVIDIA,
        "https://www.nvidia.com/en-us/design-visualization/rtx-a6000/"),
    machine("RX 7900 XTX", &["radeon rx 7900 xtx", "7900 xtx"], &[24], CARD, (960.0, 122.8), RADEON,
        "https://www.amd.com/en/products/graphics/desktops/radeon/7000-series/amd-radeon-rx-7900xtx.html"),
];

/// Why a list of machines cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadMachines {
    /// Nothing there.
    #[error("no machine is named; write for example 4x\"Ryzen AI Max+ 395 128GB\"")]
    Empty,
    /// Too much.
    #[error("{0} machines are more than the {MACHINES_MAX} that can be planned for; name fewer")]
    TooMany(usize),
    /// Too long.
    #[error("the list of machines has {0} bytes, more than the {LIST_BYTES_MAX} that are read; put them into a file")]
    TooLong(usize),
    /// A number that is none.
    #[error(
        "{0:?} does not say how many: write a whole number from 1 to {MACHINES_MAX} before the x, as in 4x\"M4 Pro 64GB\""
    )]
    Count(String),
    /// A quote that does not end.
    #[error("a quote in the list of machines does not end; write each name as \"name\"")]
    Quote,
    /// A name that is in no catalogue.
    #[error("{0}; describe a machine of your own in a TOML file")]
    Unknown(#[from] Unknown),
    /// A memory that is not sold with it.
    #[error("{name} is in the catalogue with {} GB, not with {asked}; describe another in a TOML file", list(.sold))]
    Memory {
        /// Which.
        name: &'static str,
        /// What was asked for, in GiB.
        asked: u64,
        /// What there is.
        sold: &'static [u64],
    },
}

fn list(sizes: &[u64]) -> String {
    sizes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// The machine of a name such as `Ryzen AI Max+ 395 128GB`; without a size the largest.
pub fn find(text: &str) -> Result<Machine, BadMachines> {
    let (name, asked) = split_memory(text.trim());
    let is = |m: &&KnownMachine| names::same(m.name, name) || m.aliases.iter().any(|a| names::same(a, name));
    let known = MACHINES.iter().find(is).ok_or_else(|| {
        let all: Vec<_> = MACHINES.iter().flat_map(|m| [m.name].into_iter().chain(m.aliases.iter().copied())).collect();
        names::unknown("machine", name, &all)
    })?;
    match asked {
        None => Ok(known.with_memory(*known.memory_gib.last().unwrap_or(&0))),
        Some(gib) if known.memory_gib.contains(&gib) => Ok(known.with_memory(gib)),
        Some(asked) => Err(BadMachines::Memory { name: known.name, asked, sold: known.memory_gib }),
    }
}

/// `RTX 3090 24 GB` is the name `RTX 3090` and 24.
fn split_memory(text: &str) -> (&str, Option<u64>) {
    let lower = text.to_ascii_lowercase();
    let Some(rest) = lower.strip_suffix("gib").or_else(|| lower.strip_suffix("gb")) else { return (text, None) };
    let rest = rest.trim_end();
    let digits = rest.chars().rev().take_while(char::is_ascii_digit).count();
    let at = rest.len() - digits;
    match rest[at..].parse() {
        Ok(gib) if text.is_char_boundary(at) => (text[..at].trim_end(), Some(gib)),
        _ => (text, None),
    }
}

/// The machines of a list such as `4x"Ryzen AI Max+ 395 128GB", RTX 4090`.
pub fn parse(list: &str) -> Result<Vec<Machine>, BadMachines> {
    let mut machines = Vec::new();
    for (count, name) in split_list(list)? {
        let machine = find(&name)?;
        if machines.len() + count > MACHINES_MAX {
            return Err(BadMachines::TooMany(machines.len() + count));
        }
        machines.extend(std::iter::repeat_n(machine, count));
    }
    if machines.is_empty() { Err(BadMachines::Empty) } else { Ok(machines) }
}

/// The entries of a list: how many, and of what name.
pub(crate) fn split_list(list: &str) -> Result<Vec<(usize, String)>, BadMachines> {
    if list.len() > LIST_BYTES_MAX {
        return Err(BadMachines::TooLong(list.len()));
    }
    let (mut entries, mut entry, mut quoted) = (Vec::new(), String::new(), false);
    for c in list.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                entry.push(c);
            }
            ',' | ';' if !quoted => entries.push(std::mem::take(&mut entry)),
            _ => entry.push(c),
        }
    }
    if quoted {
        return Err(BadMachines::Quote);
    }
    entries.push(entry);
    entries.iter().map(|e| e.trim()).filter(|e| !e.is_empty()).map(entry_of).collect()
}

fn entry_of(entry: &str) -> Result<(usize, String), BadMachines> {
    let unquoted = |name: &str| name.trim().trim_matches('"').trim().to_owned();
    // A count is digits before an x that is no beginning of a name, as in 7900 XTX.
    let digits = entry.len() - entry.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let rest = entry[digits..].trim_start();
    let spaced = rest.len() < entry.len() - digits;
    let after = ['x', 'X', '×', '*'].iter().find_map(|x| rest.strip_prefix(*x));
    match after.filter(|name| !spaced || name.starts_with([' ', '"'])) {
        Some(name) if digits > 0 => {
            let count = entry[..digits].parse().ok().filter(|n| (1..=MACHINES_MAX).contains(n));
            Ok((count.ok_or_else(|| BadMachines::Count(entry[..digits].chars().take(20).collect()))?, unquoted(name)))
        }
        _ => Ok((1, unquoted(entry))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_people_write_them() {
        let four = parse("4x\"Ryzen AI Max+ 395 128GB\"").unwrap();
        assert_eq!((four.len(), four[0].usable_bytes), (4, 120 << 30));
        let mixed = parse("2 x strix-halo 64 GB, RTX 4090; 1×\"Mac Studio M3 Ultra 512GB\"").unwrap();
        let names: Vec<_> = mixed.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["Ryzen AI Max+ 395 64GB", "Ryzen AI Max+ 395 64GB", "RTX 4090 24GB", "M3 Ultra 512GB"]);
        assert_eq!(parse("7900 XTX").unwrap().len(), 1, "a number that begins a name is no count");
    }

    #[test]
    fn what_cannot_be_read_is_answered_with_what_to_do() {
        let said = |list: &str| parse(list).unwrap_err().to_string();
        assert!(
            said("4x\"Ryzen AI Max 395 128GB\"").contains("Ryzen AI Max+ 395"),
            "{}",
            said("4x\"Ryzen AI Max 395\"")
        );
        assert!(said("RTX 4090 48GB").contains("with 24 GB, not with 48"), "{}", said("RTX 4090 48GB"));
        assert!(said("0x\"M4 Pro\"").contains("from 1 to 64"));
        assert!(said("65x\"M4 Pro\"").contains("from 1 to 64"));
        assert!(said("60x\"M4 Pro\", 5x\"M4 Max\"").contains("65 machines"));
        assert!(said("4x\"M4 Pro").contains("does not end"));
        assert!(said(" , ").contains("no machine"));
        assert!(said(&"x".repeat(9000)).contains("9000 bytes"));
    }

    #[test]
    fn a_ryzen_reaches_what_was_measured() {
        let rates = find("Ryzen AI Max+ 395 128GB").unwrap().rates;
        assert_eq!(rates.weight_bytes_per_s.round(), 215e9);
        assert!((rates.gemm_flops_per_s / 1e12 - 15.4).abs() < 0.1);
    }
}
