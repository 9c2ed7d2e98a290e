//! What things take: stages, links and the driver as functions of what they are given. All in nanoseconds of virtual
//! time.
use capstan_proto::data::Row;

/// Nanoseconds of virtual time.
pub type Ns = u64;

/// Nanoseconds from microseconds, rounded.
pub fn ns(us: f64) -> Ns {
    (us * 1000.0).round() as Ns
}

/// What a micro-batch asks of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Its rows.
    pub rows: u32,
    /// Those whose logits are wanted.
    pub outputs: u32,
    /// Positions that all rows look back on together, their own included.
    pub depth: u64,
}

impl Shape {
    /// Consecutive rows of one sequence, from position `from` on; the last `outputs` of them want logits.
    pub fn chunk(from: u32, rows: u32, outputs: u32) -> Self {
        let (from, n) = (u64::from(from), u64::from(rows));
        Self { rows, outputs, depth: n * from + n * (n + 1) / 2 }
    }

    /// These rows together.
    pub fn of(rows: &[Row]) -> Self {
        Self {
            rows: rows.len() as u32,
            outputs: rows.iter().filter(|r| r.output).count() as u32,
            depth: rows.iter().map(|r| u64::from(r.pos) + 1).sum(),
        }
    }

    /// One row each of sequences at these depths.
    pub fn decode(depths: &[u32]) -> Self {
        let n = depths.len() as u32;
        Self { rows: n, outputs: n, depth: depths.iter().map(|d| u64::from(*d)).sum() }
    }
}

/// How the time of a stage grows with rows, in microseconds.
#[derive(Clone, Debug, PartialEq)]
pub enum RowCost {
    /// The same for each.
    Linear(f64),
    /// Kernels that take so many rows at once for so long, the widest first and one of a single row last. Rows that
    /// are left over go to the next narrower one, or fill the wide one in part when that is faster.
    Tiles(Vec<(u32, f64)>),
    /// As measured: microseconds of so many rows, ascending, with straight lines between them. Rows that all want logits
    /// and rows of a prompt are apart.
    Measured {
        /// Of sequences that decode.
        decode: Vec<(u32, f64)>,
        /// Of a prompt.
        prefill: Vec<(u32, f64)>,
    },
    /// Weights are read while rows are computed; whichever takes longer counts. More rows ask for more experts.
    Experts {
        /// Time to read the weights that every row needs.
        dense_us: f64,
        /// Experts of a layer.
        experts: f64,
        /// Experts that one row needs.
        used: f64,
        /// Time to read one expert in all layers of the stage.
        expert_us: f64,
        /// Time to compute one row.
        row_us: f64,
    },
}

impl RowCost {
    fn us(&self, rows: u32, decode: bool) -> f64 {
        let n = f64::from(rows);
        match *self {
            Self::Measured { decode: ref points, .. } if decode => line_us(points, n),
            Self::Measured { prefill: ref points, .. } => line_us(points, n),
            Self::Linear(us) => n * us,
            Self::Tiles(ref tiles) => tiles_us(tiles, rows),
            Self::Experts { dense_us, experts, used, expert_us, row_us } => {
                let distinct = experts * (1.0 - (1.0 - used / experts).powf(n));
                (dense_us + expert_us * distinct).max(n * row_us)
            }
        }
    }
}

fn line_us(points: &[(u32, f64)], rows: f64) -> f64 {
    let above = points.iter().position(|(n, _)| f64::from(*n) >= rows).unwrap_or(points.len());
    let at = above.clamp(1, points.len().saturating_sub(1).max(1));
    let Some([(n0, us0), (n1, us1)]) = points.get(at - 1..=at) else { return points.first().map_or(0.0, |p| p.1) };
    us0 + (us1 - us0) * (rows - f64::from(*n0)) / f64::from(n1 - n0)
}

fn tiles_us(tiles: &[(u32, f64)], rows: u32) -> f64 {
    let Some(((width, us), narrower)) = tiles.split_first() else { return 0.0 };
    let (full, left) = (rows / width, rows % width);
    f64::from(full) * us + if left == 0 { 0.0 } else { tiles_us(narrower, left).min(*us) }
}

/// What a stage takes for a micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct StageCost {
    /// For any rows at all: weights that are read once, launches.
    pub fixed_us: f64,
    /// For the rows.
    pub rows: RowCost,
    /// For each position that a row looks back on.
    pub depth_us: f64,
    /// For the head, which is read once when any row's logits are wanted; only the last stage has one.
    pub head_us: f64,
    /// For each KV operation, and for a micro-batch without rows.
    pub op_us: f64,
}

impl StageCost {
    /// Weights read once, and the same for each row.
    pub fn linear(fixed_us: f64, row_us: f64, depth_us: f64) -> Self {
        Self { fixed_us, rows: RowCost::Linear(row_us), depth_us, head_us: 0.0, op_us: 1.0 }
    }

    /// The same stage, slower or faster by a factor.
    pub fn times(&self, factor: f64) -> Self {
        let rows = match self.rows.clone() {
            RowCost::Linear(us) => RowCost::Linear(us * factor),
            RowCost::Tiles(tiles) => RowCost::Tiles(tiles.into_iter().map(|(n, us)| (n, us * factor)).collect()),
            RowCost::Measured { mut decode, mut prefill } => {
                decode.iter_mut().chain(&mut prefill).for_each(|(_, us)| *us *= factor);
                RowCost::Measured { decode, prefill }
            }
            RowCost::Experts { dense_us, experts, used, expert_us, row_us } => RowCost::Experts {
                dense_us: dense_us * factor,
                experts,
                used,
                expert_us: expert_us * factor,
                row_us: row_us * factor,
            },
        };
        Self {
            fixed_us: self.fixed_us * factor,
            rows,
            depth_us: self.depth_us * factor,
            head_us: self.head_us * factor,
            ..*self
        }
    }

    /// Time of a micro-batch of this shape, operations left aside.
    pub fn ns(&self, shape: Shape) -> Ns {
        if shape.rows == 0 {
            return ns(self.op_us);
        }
        let depth = self.depth_us * shape.depth as f64;
        let head = if shape.outputs > 0 { self.head_us } else { 0.0 };
        ns(self.fixed_us + self.rows.us(shape.rows, shape.outputs == shape.rows) + depth + head)
    }
}

/// A link between two stages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCost {
    /// One way, whatever the size.
    pub latency_us: f64,
    /// How fast it takes bytes in.
    pub bytes_per_s: f64,
}

impl LinkCost {
    /// Two processes on one machine, as measured for the transport (design §5): 85 µs for an echo, 750 MB/s.
    pub fn loopback() -> Self {
        Self { latency_us: 42.0, bytes_per_s: 750e6 }
    }

    /// Time during which the link is taken by so many bytes.
    pub fn sending_ns(&self, bytes: u64) -> Ns {
        ns(bytes as f64 / self.bytes_per_s * 1e6)
    }

    /// Time from its end to the arrival.
    pub fn latency_ns(&self) -> Ns {
        ns(self.latency_us)
    }
}

/// What the driver takes, on the compute thread of the last stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DriverCost {
    /// To plan and frame a micro-batch.
    pub batch_us: f64,
    /// To look up a row's embedding.
    pub row_us: f64,
    /// To sample from a row's logits and report the token.
    pub output_us: f64,
    /// To guess one token with the draft model; 0 without one.
    pub draft_us: f64,
}

impl DriverCost {
    /// Time to send a micro-batch of so many rows.
    pub fn send_ns(&self, rows: u32) -> Ns {
        ns(self.batch_us + self.row_us * f64::from(rows))
    }

    /// Time to sample from so many outputs.
    pub fn sample_ns(&self, outputs: u32) -> Ns {
        ns(self.output_us * f64::from(outputs))
    }
}

/// All machines and links of a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// The stages, the first one first. The driver lives with the last.
    pub stages: Vec<StageCost>,
    /// Link `i` leads from stage `i` to the next; the last one from the driver to stage 0.
    pub links: Vec<LinkCost>,
    /// The driver.
    pub driver: DriverCost,
    /// Floats of a hidden state.
    pub width: u32,
    /// How far a stage's time strays from its cost: 0.05 is up to five percent either way.
    pub jitter: f64,
    /// How far what the measurement at the start finds is from what rows take later, each number of rows by itself.
    pub mismeasured: f64,
    /// How much longer a stage takes while others work, too: stages of one machine share its memory.
    pub contention: f64,
}

/// Bytes of a frame besides hidden states: prefixes, epoch, step, times.
const FRAME_BYTES: u64 = 64;
/// Bytes of a row's slot, position and flag.
const ROW_BYTES: u64 = 6;

impl Profile {
    /// Equal stages and links.
    pub fn even(stages: usize, cost: StageCost, link: LinkCost, width: u32) -> Self {
        let driver = DriverCost { batch_us: 10.0, row_us: 1.0, output_us: 20.0, draft_us: 0.0 };
        Self {
            stages: vec![cost; stages],
            links: vec![link; stages],
            driver,
            width,
            jitter: 0.0,
            mismeasured: 0.0,
            contention: 0.0,
        }
    }

    /// Bytes of a micro-batch of so many rows on a link.
    pub fn bytes(&self, rows: u32) -> u64 {
        FRAME_BYTES + u64::from(rows) * (ROW_BYTES + 4 * u64::from(self.width))
    }

    /// Time during which the micro-batch takes up stage `i`; the last one's thread also samples, and sends what is next.
    pub fn stage_ns(&self, i: usize, shape: Shape) -> Ns {
        let own = self.stages[i].ns(shape);
        if i + 1 < self.stages.len() {
            return own;
        }
        own + self.driver.sample_ns(shape.outputs) + self.driver.send_ns(shape.rows)
    }

    /// The same of a micro-batch that is computed in several runs, one after the other.
    pub fn stage_runs_ns(&self, i: usize, runs: &[Shape]) -> Ns {
        let own = runs.iter().map(|run| self.stages[i].ns(*run)).sum::<Ns>();
        let all = |of: fn(&Shape) -> u32| runs.iter().map(of).sum::<u32>();
        let driver = self.driver.sample_ns(all(|s| s.outputs)) + self.driver.send_ns(all(|s| s.rows));
        if i + 1 < self.stages.len() { own } else { own + driver }
    }

    /// Time from its being planned until its tokens are sampled, when nothing is in its way.
    pub fn through_ns(&self, shape: Shape) -> Ns {
        let stages: Ns = (0..self.stages.len()).map(|i| self.stage_ns(i, shape)).sum();
        stages + self.hops_ns(shape.rows)
    }

    /// Time on all links.
    pub fn hops_ns(&self, rows: u32) -> Ns {
        if self.stages.len() == 1 {
            return 0;
        }
        let bytes = self.bytes(rows);
        self.links.iter().map(|l| l.sending_ns(bytes) + l.latency_ns()).sum()
    }

    /// The longest time for which it takes up a stage or a link: what many of them take each.
    pub fn slowest_ns(&self, shape: Shape) -> Ns {
        let stages = (0..self.stages.len()).map(|i| self.stage_ns(i, shape));
        let links = self.links.iter().map(|l| l.sending_ns(self.bytes(shape.rows)));
        stages.chain(links.filter(|_| self.stages.len() > 1)).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_take_rows_in_groups() {
        let rows = RowCost::Tiles(vec![(4, 100.0), (1, 40.0)]);
        assert_eq!([1, 2, 3, 4, 5, 8].map(|n| rows.us(n, true)), [40.0, 80.0, 100.0, 100.0, 140.0, 200.0]);
    }

    #[test]
    fn experts_are_read_once_and_rows_are_computed() {
        let rows = RowCost::Experts { dense_us: 10.0, experts: 64.0, used: 2.0, expert_us: 1.0, row_us: 2.0 };
        assert_eq!(rows.us(1, true), 12.0);
        assert!((13.9..14.0).contains(&rows.us(2, true)), "{}", rows.us(2, true));
        assert_eq!(rows.us(1000, true), 2000.0);
    }

    #[test]
    fn between_measured_sizes_the_line_is_straight() {
        let rows = RowCost::Measured { decode: vec![(1, 30.0), (2, 50.0), (4, 60.0)], prefill: vec![(1, 7.0)] };
        assert_eq!([1, 2, 3, 4, 8].map(|n| rows.us(n, true)), [30.0, 50.0, 55.0, 60.0, 80.0]);
        assert_eq!(rows.us(3, false), 7.0);
    }

    #[test]
    fn depth_counts_every_position_looked_back_on() {
        assert_eq!(Shape::chunk(0, 4, 1).depth, 1 + 2 + 3 + 4);
        assert_eq!(Shape::chunk(10, 2, 0).depth, 11 + 12);
        assert_eq!(Shape::decode(&[3, 5]), Shape { rows: 2, outputs: 2, depth: 8 });
    }
}
