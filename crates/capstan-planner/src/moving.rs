//! Whether another placement is worth loading a model anew.

/// Another placement must be faster by this share at least: forecasts are not more exact.
const GAIN_MIN: f64 = 0.15;
/// What a move saves is counted over this time, in seconds: a day like the time that was watched.
const HORIZON_S: f64 = 86_400.0;
/// It must save so many times what it costs.
const RETURN_MIN: f64 = 10.0;

/// Two placements of a model, and how much it is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    /// What a row takes now, in seconds.
    pub now_s: f64,
    /// What it would take, in seconds.
    pub then_s: f64,
    /// Rows per second that were computed while it was watched, pauses included.
    pub rows_per_s: f64,
    /// How long the model would not answer, in seconds.
    pub reload_s: f64,
}

impl Move {
    /// Whether it pays, and the sentence that says so.
    pub fn pays(&self) -> Option<String> {
        let gain = self.now_s / self.then_s - 1.0;
        let saved_s = self.rows_per_s * HORIZON_S * (self.now_s - self.then_s);
        // Written so that what is not a number does not pay.
        let worth = gain >= GAIN_MIN && saved_s >= RETURN_MIN * self.reload_s;
        worth.then(|| {
            format!(
                "another placement is {:.0} % faster and would save about {:.0} s of computing a day; loading it anew takes \
                 about {:.0} s",
                gain * 100.0,
                saved_s,
                self.reload_s
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_has_to_pay() {
        let good = Move { now_s: 0.2, then_s: 0.1, rows_per_s: 1.0, reload_s: 60.0 };
        assert!(good.pays().unwrap().contains("100 % faster"));
        for bad in [
            Move { then_s: 0.19, ..good },
            Move { rows_per_s: 0.0, ..good },
            Move { reload_s: 1000.0, ..good },
            Move { now_s: f64::NAN, ..good },
            Move { then_s: 0.3, ..good },
            Move { reload_s: f64::INFINITY, ..good },
        ] {
            assert_eq!(bad.pays(), None, "{bad:?}");
        }
    }
}
