//! How many machines of each kind are used, as one number: a mixed radix.

/// Most kinds that a grid can have: more are never searched, for each at least doubles the states.
const KINDS_MAX: usize = u64::BITS as usize;

/// All ways to use machines.
pub(super) struct Grid {
    counts: Vec<usize>,
    pub strides: Vec<usize>,
    /// Kinds of which there are machines.
    kinds: Vec<usize>,
    /// How many ways there are; the last one uses all machines.
    pub states: usize,
}

/// One way after the other, counted on like an odometer: dividing would take most of a search's time.
pub(super) struct Odometer<'g> {
    grid: &'g Grid,
    /// How many of each kind are used.
    pub used: Vec<usize>,
    /// Which kinds are: a bit each, by their order among those of which there are machines.
    present: u64,
}

impl Grid {
    /// None where there are too many ways to count.
    pub fn new(counts: &[usize]) -> Option<Self> {
        let mut states = 1usize;
        let mut strides = Vec::with_capacity(counts.len());
        for count in counts {
            strides.push(states);
            states = states.checked_mul(count + 1)?;
        }
        let kinds: Vec<usize> = (0..counts.len()).filter(|&k| counts[k] > 0).collect();
        (kinds.len() < KINDS_MAX).then(|| Self { counts: counts.to_vec(), strides, kinds, states })
    }

    /// How many ways there are, even where that is no whole number any more.
    pub fn size(counts: &[usize]) -> f64 {
        counts.iter().map(|&count| count as f64 + 1.0).product()
    }

    pub fn used(&self, state: usize, k: usize) -> usize {
        state / self.strides[k] % (self.counts[k] + 1)
    }

    /// The way that uses what this one leaves.
    pub fn others(&self, state: usize) -> usize {
        self.states - 1 - state
    }

    /// From the way that uses nothing on.
    pub fn odometer(&self) -> Odometer<'_> {
        Odometer { grid: self, used: vec![0; self.counts.len()], present: 0 }
    }
}

impl Odometer<'_> {
    pub fn count_on(&mut self) {
        for (i, &k) in self.grid.kinds.iter().enumerate() {
            self.used[k] += 1;
            if self.used[k] <= self.grid.counts[k] {
                self.present |= 1 << i;
                break;
            }
            self.used[k] = 0;
            self.present &= !(1 << i);
        }
    }

    /// The kinds that are used.
    pub fn present(&self) -> impl Iterator<Item = usize> + use<'_> {
        let mut left = self.present;
        std::iter::from_fn(move || {
            let i = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            self.grid.kinds.get(i).copied()
        })
    }
}
