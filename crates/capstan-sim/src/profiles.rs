//! The machines that scenarios run on, each with where its numbers come from.
use crate::cost::{LinkCost, Profile, RowCost, StageCost};

/// Floats of a hidden state of the profiles that stand for no model in particular.
const WIDTH: u32 = 4096;

/// A cost that has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Reading weights dominates and rows come almost for nothing: a GPU that decodes.
    Weights,
    /// Every row costs the same: a machine that is bound by its arithmetic.
    Rows,
    /// Rows go through kernels four and 32 wide: a CPU core with Qwen2.5-Coder-0.5B, from what llama.cpp's RPC took for
    /// 1, 2, 4, 8 streams and for prefill on two cores (design §8: 89, 142, 143, 250 ms; 93 tok/s).
    Cpu,
}

impl Machine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Weights, Self::Rows, Self::Cpu];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Rows => "rows",
            Self::Cpu => "cpu",
        }
    }

    /// One stage of so many.
    pub fn stage(self, stages: usize) -> StageCost {
        match self {
            Self::Weights => StageCost::linear(4000.0, 60.0, 0.02),
            Self::Rows => StageCost::linear(200.0, 800.0, 0.02),
            Self::Cpu => {
                // All layers on one core, from the four times above: 36 ms and 53 ms a row or 107 ms for four.
                let rows = RowCost::Tiles(vec![(32, 280_000.0), (4, 107_000.0), (1, 53_000.0)]);
                let whole = StageCost { fixed_us: 36_000.0, rows, depth_us: 8.0, head_us: 0.0, op_us: 5.0 };
                whole.times(1.0 / stages as f64)
            }
        }
    }

    /// Equal stages on one switch.
    pub fn pipeline(self, stages: usize) -> Profile {
        let (link, width) = match self {
            Self::Cpu => (LinkCost::loopback(), 896),
            _ => (lan(), WIDTH),
        };
        Profile::even(stages, self.stage(stages), link, width)
    }
}

/// Two cores of one machine with half of Qwen2.5-Coder-0.5B each, as they were measured: a decoding row takes 30 ms a
/// stage, four take 56; a row of a prompt takes 7 ms a stage in large chunks and 10 in small ones. Times stray by 5 %.
pub fn two_cores() -> Profile {
    let points = |all: &[(u32, f64)]| all.iter().map(|(rows, ms)| (*rows, ms * 1000.0)).collect();
    let decode = points(&[(1, 30.0), (2, 47.0), (4, 56.0), (8, 66.0), (16, 130.0)]);
    let prefill = points(&[(1, 30.0), (2, 40.0), (4, 55.0), (8, 80.0), (16, 140.0), (32, 240.0), (512, 3584.0)]);
    let rows = RowCost::Measured { decode, prefill };
    let stage = StageCost { fixed_us: 0.0, rows, depth_us: 1.0, head_us: 0.0, op_us: 5.0 };
    Profile { jitter: 0.05, ..Profile::even(2, stage, LinkCost::loopback(), 896) }
}

/// 10 GbE through a switch.
pub fn lan() -> LinkCost {
    LinkCost { latency_us: 60.0, bytes_per_s: 1.1e9 }
}

/// 1 GbE at some distance.
pub fn slow() -> LinkCost {
    LinkCost { latency_us: 1000.0, bytes_per_s: 117e6 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Shape, ns};

    #[test]
    fn the_cpu_is_the_one_that_was_measured() {
        let whole = Machine::Cpu.stage(1);
        for (rows, ms) in [(1, 89.0), (2, 142.0), (4, 143.0), (8, 250.0)] {
            let got = whole.ns(Shape { rows, outputs: rows, depth: 0 });
            assert!(got.abs_diff(ns(ms * 1000.0)) < ns(1000.0), "{rows} rows: {got}");
        }
        // 512 rows of prefill, both halves one after the other: 93 tok/s.
        let tokens_per_s = 512e9 / whole.ns(Shape::chunk(0, 512, 1)) as f64;
        assert!((85.0..100.0).contains(&tokens_per_s), "{tokens_per_s}");
    }
}
