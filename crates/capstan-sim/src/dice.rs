//! Chance that a seed decides: the same on every machine and in every release.
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of draws.
#[derive(Clone, Debug)]
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// The stream that belongs to this seed.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A float in 0..1.
    pub fn unit(&mut self) -> f64 {
        unit(self.bits())
    }

    /// True in this share of draws.
    pub fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// One of `low..=high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + (self.unit() * (high.saturating_sub(low) + 1) as f64) as u64
    }

    /// Between `low` and `high`, each order of magnitude as likely as any other.
    pub fn log_between(&mut self, low: f64, high: f64) -> f64 {
        low * (high / low).powf(self.unit())
    }

    /// One of these; there must be some.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.between(0, of.len() as u64 - 1) as usize]
    }

    /// A time between two events that do not know of each other.
    pub fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// Two numbers to one: chance for whoever must get the same draw whenever it asks.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_mul(0xD6E8_FEB8_6659_FD93).rotate_left(32);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A float in 0..1 from 64 bits.
pub fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_everywhere() {
        let mut dice = Dice::new(7);
        let draws: Vec<u64> = (0..4).map(|_| dice.between(0, 999)).collect();
        assert_eq!(draws, {
            let mut again = Dice::new(7);
            (0..4).map(|_| again.between(0, 999)).collect::<Vec<_>>()
        });
        assert!((0..1000).all(|_| (3..=5).contains(&dice.between(3, 5))));
        let mean = (0..10_000).map(|_| dice.exponential(10.0)).sum::<f64>() / 10_000.0;
        assert!((9.5..10.5).contains(&mean), "{mean}");
        let heads = (0..10_000u64).filter(|&i| unit(mix(3, i)) < 0.3).count();
        assert!((2850..3150).contains(&heads), "{heads}");
    }
}
