//! How many machines of each kind are used, as one number: a mixed radix.

/// All ways to use machines.
pub(super) struct Grid {
    counts: Vec<usize>,
    pub strides: Vec<usize>,
    /// How many ways there are; the last one uses all machines.
    pub states: usize,
}

impl Grid {
    pub fn new(counts: &[usize]) -> Self {
        let mut states = 1;
        let stride = |count: &usize| {
            let this = states;
            states *= count + 1;
            this
        };
        let strides = counts.iter().map(stride).collect();
        Self { counts: counts.to_vec(), strides, states }
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

    /// Counts on to the next state, like an odometer: dividing would take most of a search's time.
    pub fn count_on(&self, used: &mut [usize]) {
        for (used, &count) in used.iter_mut().zip(&self.counts) {
            *used += 1;
            if *used <= count {
                break;
            }
            *used = 0;
        }
    }
}
