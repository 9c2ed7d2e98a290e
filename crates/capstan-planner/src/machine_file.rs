//! Machines of one's own: a TOML file, read within bounds, with errors that say what to do.
//!
//! ```toml
//! link = "5GbE"
//!
//! [[machine]]
//! name = "box"
//! count = 2
//! like = "Ryzen AI Max+ 395 128GB"
//! memory_gib = 110
//!
//! [[machine]]
//! name = "tower"
//! memory_gib = 22.5
//! bandwidth_gb_per_s = 850
//! gemm_tflops = 60
//!
//! [[between]]
//! machines = ["box", "tower"]
//! link = "rtt=0.2ms,bw=9Gbit"
//! ```
use serde::Deserialize;

use crate::links::{self, BadLink, Link, Links};
use crate::machines::{self, BadMachines, MACHINES_MAX, Machine, Rates};

/// Largest file: a hundred bytes for each of [`MACHINES_MAX`] machines and each pair of a dozen kinds.
pub const FILE_BYTES_MAX: usize = 64 << 10;
/// Longest name of a machine, in bytes.
const NAME_BYTES_MAX: usize = 128;

/// What the file describes.
#[derive(Clone, Debug, PartialEq)]
pub struct Fleet {
    /// The machines.
    pub machines: Vec<Machine>,
    /// What connects them, where the file says so.
    pub links: Option<Links>,
}

/// Why a file of machines cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFile {
    /// Too large.
    #[error(
        "the file of machines has {0} bytes, more than the {FILE_BYTES_MAX} that are read; describe fewer machines"
    )]
    TooLong(usize),
    /// No TOML, or keys that mean nothing.
    #[error("the file of machines cannot be read: {0}")]
    Toml(String),
    /// A machine that cannot be.
    #[error("machine {name:?}: {what}")]
    Machine {
        /// Which.
        name: String,
        /// What is wrong and what to write.
        what: String,
    },
    /// A link that cannot be read.
    #[error("a link in the file of machines: {0}")]
    Link(#[from] BadLink),
    /// A link between unknown machines.
    #[error("a link names the machine {0:?}, which the file does not describe; use a name that stands after `name =`")]
    NoSuch(String),
    /// Too many or none.
    #[error("the file of machines: {0}")]
    Count(BadMachines),
    /// Links of single pairs, and no usual one.
    #[error(
        "the file describes links between some machines and none for the others; add a line such as link = \"5GbE\" at its top"
    )]
    NoUsualLink,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    link: Option<String>,
    #[serde(default)]
    machine: Vec<Entry>,
    #[serde(default)]
    between: Vec<Between>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    count: Option<usize>,
    like: Option<String>,
    memory_gib: Option<f64>,
    bandwidth_gb_per_s: Option<f64>,
    kv_gb_per_s: Option<f64>,
    gemm_tflops: Option<f64>,
    attention_tflops: Option<f64>,
    layer_overhead_us: Option<f64>,
    expert_overhead_us: Option<f64>,
    disk_gb_per_s: Option<f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Between {
    machines: [String; 2],
    link: String,
}

/// Reads the text of such a file.
pub fn parse(text: &str) -> Result<Fleet, BadFile> {
    if text.len() > FILE_BYTES_MAX {
        return Err(BadFile::TooLong(text.len()));
    }
    let file: File = toml::from_str(text).map_err(|e| BadFile::Toml(e.to_string().trim_end().to_owned()))?;
    let (mut machines, mut names) = (Vec::new(), Vec::new());
    for entry in &file.machine {
        let count = entry.count.unwrap_or(1);
        if count == 0 || machines.len() + count.min(MACHINES_MAX + 1) > MACHINES_MAX {
            let total = machines.len().saturating_add(count);
            return Err(BadFile::Count(if count == 0 {
                BadMachines::Count("0".into())
            } else {
                BadMachines::TooMany(total)
            }));
        }
        let machine = entry.machine().map_err(|what| BadFile::Machine { name: shown(&entry.name), what })?;
        names.extend(std::iter::repeat_n(entry.name.as_str(), count));
        machines.extend(std::iter::repeat_n(machine, count));
    }
    if machines.is_empty() {
        return Err(BadFile::Count(BadMachines::Empty));
    }
    let usual = file.link.as_deref().map(links::parse).transpose()?;
    let mut between: Vec<(usize, usize, Link)> = Vec::new();
    for pair in &file.between {
        let link = links::parse(&pair.link)?;
        let places = |name: &String| -> Result<Vec<usize>, BadFile> {
            let found: Vec<_> = (0..names.len()).filter(|&i| names[i] == name).collect();
            if found.is_empty() { Err(BadFile::NoSuch(shown(name))) } else { Ok(found) }
        };
        let (first, second) = (places(&pair.machines[0])?, places(&pair.machines[1])?);
        for &a in &first {
            between.extend(second.iter().filter(|&&b| a != b).map(|&b| (a, b, link)));
        }
    }
    let links = match usual {
        Some(usual) => Some(Links { usual, between }),
        None if between.is_empty() => None,
        None => return Err(BadFile::NoUsualLink),
    };
    Ok(Fleet { machines, links })
}

fn shown(name: &str) -> String {
    name.chars().take(40).collect()
}

impl Entry {
    fn machine(&self) -> Result<Machine, String> {
        if self.name.trim().is_empty() || self.name.len() > NAME_BYTES_MAX {
            return Err(format!("a name has 1 to {NAME_BYTES_MAX} bytes"));
        }
        let like = self.like.as_deref().map(|l| machines::find(l).map_err(|e| e.to_string())).transpose()?;
        let figure = |what: &str, value: Option<f64>, least: f64, most: f64, example: &str| match value {
            Some(v) if !(least..=most).contains(&v) => {
                Err(format!("{what} is {v}; write a number from {least} to {most}, such as {example}"))
            }
            other => Ok(other),
        };
        let need = |what: &str, value: Option<f64>| {
            value.ok_or_else(|| format!("{what} is missing; add it, or a line such as like = \"RTX 4090\""))
        };
        let memory = figure("memory_gib", self.memory_gib, 0.1, 65536.0, "110")?;
        let bandwidth = figure("bandwidth_gb_per_s", self.bandwidth_gb_per_s, 0.1, 1e6, "215")?.map(|g| g * 1e9);
        let gemm = figure("gemm_tflops", self.gemm_tflops, 1e-3, 1e6, "16")?.map(|t| t * 1e12);
        let (usable_bytes, mut rates) = match like {
            Some(known) => {
                let mut rates = known.rates.clone();
                if let Some(rate) = bandwidth {
                    (rates.weight_bytes_per_s, rates.kv_bytes_per_s) = (rate, rate * machines::KV_SHARE);
                }
                if let Some(rate) = gemm {
                    (rates.gemm_flops_per_s, rates.attention_flops_per_s) = (rate, rate * machines::ATTENTION_SHARE);
                }
                (memory.map_or(known.usable_bytes, gib), rates)
            }
            None => {
                let rates = Rates::of(need("bandwidth_gb_per_s", bandwidth)?, need("gemm_tflops", gemm)?);
                (gib(need("memory_gib", memory)?), rates)
            }
        };
        let put = |to: &mut f64, value: Option<f64>, factor: f64| {
            if let Some(v) = value {
                *to = v * factor;
            }
        };
        put(&mut rates.kv_bytes_per_s, figure("kv_gb_per_s", self.kv_gb_per_s, 0.1, 1e6, "90")?, 1e9);
        let attention = figure("attention_tflops", self.attention_tflops, 1e-3, 1e6, "3")?;
        put(&mut rates.attention_flops_per_s, attention, 1e12);
        let layer = figure("layer_overhead_us", self.layer_overhead_us, 0.0, 1e6, "80")?;
        put(&mut rates.layer_overhead_s, layer, 1e-6);
        let expert = figure("expert_overhead_us", self.expert_overhead_us, 0.0, 1e6, "80")?;
        put(&mut rates.expert_overhead_s, expert, 1e-6);
        put(&mut rates.disk_bytes_per_s, figure("disk_gb_per_s", self.disk_gb_per_s, 1e-3, 1e3, "3.5")?, 1e9);
        Ok(Machine { name: self.name.trim().to_owned(), usable_bytes, rates })
    }
}

fn gib(gib: f64) -> u64 {
    (gib * f64::from(1 << 30)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"
        link = "5GbE"
        [[machine]]
        name = "box"
        count = 2
        like = "Ryzen AI Max+ 395 128GB"
        memory_gib = 110
        [[machine]]
        name = "tower"
        memory_gib = 22.5
        bandwidth_gb_per_s = 850
        gemm_tflops = 60
        disk_gb_per_s = 5
        [[between]]
        machines = ["box", "tower"]
        link = "rtt=0.2ms,bw=9Gbit"
    "#;

    #[test]
    fn the_example_is_read() {
        let fleet = parse(EXAMPLE).unwrap();
        let names: Vec<_> = fleet.machines.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["box", "box", "tower"]);
        assert_eq!(fleet.machines[0].usable_bytes, 110 << 30);
        assert_eq!(fleet.machines[2].rates.weight_bytes_per_s, 850e9);
        assert_eq!(fleet.machines[2].rates.disk_bytes_per_s, 5e9);
        let links = fleet.links.unwrap();
        assert_eq!(links.between(1, 2).rtt_s, 0.2e-3);
        assert_eq!(links.between(0, 1), links.usual);
    }

    #[test]
    fn a_file_that_is_wrong_is_answered_with_what_to_do() {
        let said = |text: &str| parse(text).unwrap_err().to_string();
        assert!(said("").contains("no machine"));
        assert!(said("[[machine]]\nname = \"a\"").contains("bandwidth_gb_per_s is missing"));
        assert!(said("[[machine]]\nname = \"a\"\nspeed = 3").contains("speed"), "an unknown key is named");
        assert!(said("[[machine]]\nname = \"a\"\nlike = \"RTX 4091\"").contains("RTX 4090"));
        assert!(said(&EXAMPLE.replace("22.5", "-1")).contains("memory_gib is -1"));
        assert!(said(&EXAMPLE.replace("22.5", "nan")).contains("memory_gib"));
        assert!(said(&EXAMPLE.replace("count = 2", "count = 99999999999")).contains("more than the 64"));
        assert!(said(&EXAMPLE.replace("count = 2", "count = 0")).contains("from 1 to 64"));
        assert!(said(&EXAMPLE.replace("\"tower\"]", "\"towel\"]")).contains("towel"));
        assert!(said(&EXAMPLE.replace("link = \"5GbE\"", "")).contains("at its top"));
        assert!(said(&"#".repeat(FILE_BYTES_MAX + 1)).contains("65537 bytes"));
    }
}
