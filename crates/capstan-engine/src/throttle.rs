//! Whether decode steps beside a prompt are really as long as was reckoned, and how much less it gets where they are
//! longer.
//!
//! Costs say what each stage takes, but not all that happens between: threads that are woken late, memory that stages share,
//! frames that wait. A group's round trip tells the whole. So the mean round trip beside prompts is compared with that
//! without, and what is allowed is corrected slowly, downwards only.

/// Weight of a new round trip.
const NEW_SHARE: f64 = 0.1;
/// How much a round trip that is twice too long takes off the part of the share that is used.
const GAIN: f64 = 0.1;
/// The least part.
const LEAST: f64 = 0.3;

/// The correction.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Mean round trip while no prompt comes in; none before the first one since somebody joined or left.
    rest_us: Option<f64>,
    /// Of the time that a prompt may take so much is used.
    part: f64,
}

impl Default for Throttle {
    fn default() -> Self {
        Self { rest_us: None, part: 1.0 }
    }
}

impl Throttle {
    /// Others decode than before.
    pub fn forget(&mut self) {
        self.rest_us = None;
    }

    /// A group came back; `allowed` is how many times as long its way may be on the mean, if a prompt comes in.
    pub fn learn(&mut self, us: f64, allowed: Option<f64>) {
        match (self.rest_us, allowed) {
            (None, None) => self.rest_us = Some(us),
            (Some(rest), None) => self.rest_us = Some(rest + (us - rest) * NEW_SHARE),
            (Some(rest), Some(allowed)) => {
                let over = us / (rest * allowed).max(1.0) - 1.0;
                self.part = (self.part - over.clamp(-1.0, 1.0) * GAIN).clamp(LEAST, 1.0);
            }
            (None, Some(_)) => {}
        }
    }

    /// How many times as long a step may be reckoned, where it may be `allowed` times.
    pub fn reckon(&self, allowed: f64) -> f64 {
        1.0 + (allowed - 1.0) * self.part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_are_longer_than_reckoned_are_made_shorter() {
        let mut throttle = Throttle::default();
        assert_eq!(throttle.reckon(1.75), 1.75);
        (0..50).for_each(|_| throttle.learn(100.0, None));
        // Whatever is reckoned, it takes a quarter longer.
        let mut ratio = 0.0;
        for _ in 0..200 {
            ratio = 1.25 * throttle.reckon(1.75);
            throttle.learn(100.0 * ratio, Some(1.75));
        }
        assert!((1.7..1.8).contains(&ratio), "{ratio}");
        // What is shorter than reckoned is not made longer than was asked for.
        (0..200).for_each(|_| throttle.learn(100.0, Some(1.75)));
        assert_eq!(throttle.reckon(1.75), 1.75);
    }
}
