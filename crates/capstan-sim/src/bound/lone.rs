//! A lone stream with guesses: what pipelining could make of guesses that are right with a given chance.
use crate::cost::{Ns, Profile, Shape};

/// Mean time of a token when nothing is guessed.
pub fn plain_ns(profile: &Profile, depth: u32) -> Ns {
    profile.through_ns(Shape::decode(&[depth]))
}

/// Mean time of a token when this share of tokens is under way already when its turn comes: such a one follows the last token
/// after the slowest stage's time, any other takes the whole way. Guesses themselves cost nothing here: a draft model can
/// compute them while the last stage waits.
///
/// ```text
/// mean = (1 - share) * way + share * slowest
/// ```
pub fn guessed_ns(profile: &Profile, depth: u32, share: f64) -> Ns {
    let shape = Shape::decode(&[depth]);
    let slowest = profile.slowest_ns(shape);
    let way = plain_ns(profile, depth);
    ((1.0 - share) * way as f64 + share * slowest.min(way) as f64).round() as Ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{LinkCost, StageCost};

    #[test]
    fn guesses_that_are_always_right_make_every_stage_work() {
        let profile = Profile::even(4, StageCost::linear(1000.0, 0.0, 0.0), LinkCost::loopback(), 64);
        let way = plain_ns(&profile, 100);
        assert_eq!(guessed_ns(&profile, 100, 0.0), way);
        assert!(way > 3 * guessed_ns(&profile, 100, 1.0));
    }
}
