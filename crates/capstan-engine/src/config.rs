//! The scheduler's limits and shares, checked once.
use capstan_proto::data::Rollback;
use capstan_proto::limits;

/// What the scheduler may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Stages of the pipeline; sequences that decode are dealt over as many micro-batches at most.
    pub stages: u16,
    /// Sequences at once: places in every stage's KV cache.
    pub slots: u32,
    /// Tokens that a slot holds, prompt and answer together.
    pub ctx: u32,
    /// Most rows of a micro-batch: llama.cpp's `n_ubatch`.
    pub chunk: u32,
    /// Rounding depends on the shape of a micro-batch. With this, shapes depend on nothing but the request: prompts are
    /// cut at multiples of `chunk`, whatever the stages cost and whoever decodes beside them, and only whole such chunks
    /// are taken from caches. Together with a `decode_batch` of 1 an answer has the same bits alone and among others,
    /// whole and split.
    pub fixed_shapes: bool,
    /// Most sequences decoded in one micro-batch.
    pub decode_batch: u32,
    /// Most micro-batches under way.
    pub in_flight_max: u16,
    /// The share of prefill: while prompts come in, a decode step may take this many percent of what it takes without
    /// them. 100 gives prefill what is idle anyway, and a row a step where nothing is.
    pub decode_slowdown_percent: u16,
    /// Requests that may wait beyond the free slots.
    pub queue_max: usize,
    /// Whether a prompt takes what an earlier sequence left in the caches.
    pub prefix_cache: bool,
    /// Most guessed tokens of a sequence that are under way; 0 turns speculation off.
    pub speculation_depth: u16,
    /// Whether the driver has a draft model, and answers [`wants_guess`](crate::Engine::wants_guess). Then n-grams guess
    /// only where they were right more often than it.
    pub draft: bool,
    /// Whether stages are measured at the start, while nobody asks for anything. Without it the costs are assumed until
    /// the first micro-batches are back.
    pub measure: bool,
    /// How wrong guesses and the ends of cached prefixes are taken back.
    pub rollback: Rollback,
    /// Sequences beyond `slots`, numbered on from there, for what was before each guess: where rows cannot be trimmed.
    pub spares: u32,
}

/// Why a configuration cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the scheduler's setting {name} is {value}; choose a number from {min} to {max}")]
pub struct ConfigError {
    /// The field.
    pub name: &'static str,
    /// What it was.
    pub value: u64,
    /// Smallest number that works.
    pub min: u64,
    /// Largest number that works.
    pub max: u64,
}

/// Most micro-batches under way with the usual settings. When so many more have come, one has gone all the way round.
pub fn in_flight_max(stages: u16) -> u16 {
    if stages == 1 { 1 } else { stages.saturating_mul(3) }
}

impl EngineConfig {
    /// The usual settings: everything that keeps stages busy is on.
    ///
    /// Of groups of sequences there may be twice as many as stages, and beside them a chunk for each stage. A decode step
    /// that takes 1.75 times as long leaves some room below the doubling that a reader would notice.
    pub fn new(stages: u16, slots: u32, ctx: u32, chunk: u32) -> Self {
        Self {
            stages,
            slots,
            ctx,
            chunk,
            fixed_shapes: false,
            decode_batch: slots,
            in_flight_max: in_flight_max(stages),
            decode_slowdown_percent: 175,
            queue_max: limits::QUEUE_MAX,
            prefix_cache: true,
            speculation_depth: if stages == 1 { 0 } else { stages },
            draft: false,
            measure: true,
            rollback: Rollback::Trim,
            spares: 0,
        }
    }

    /// Checks every number.
    pub fn check(&self) -> Result<(), ConfigError> {
        let slots_max = u64::from(limits::SLOTS_MAX);
        let u16_max = u64::from(u16::MAX);
        for (name, value, min, max) in [
            ("stages", u64::from(self.stages), 1, u64::from(limits::LAYERS_MAX)),
            ("slots", u64::from(self.slots), 1, slots_max),
            ("spares", u64::from(self.spares), 0, slots_max.saturating_sub(u64::from(self.slots))),
            // One token of prompt and one of answer.
            ("ctx", u64::from(self.ctx), 2, u64::from(u32::MAX)),
            ("chunk", u64::from(self.chunk), 1, limits::ROWS_MAX as u64),
            ("decode_batch", u64::from(self.decode_batch), 1, u64::from(u32::MAX)),
            ("in_flight_max", u64::from(self.in_flight_max), 1, u16_max),
            ("decode_slowdown_percent", u64::from(self.decode_slowdown_percent), 100, u16_max),
        ] {
            if !(min..=max).contains(&value) {
                return Err(ConfigError { name, value, min, max });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_named() {
        assert_eq!(EngineConfig::new(3, 8, 512, 64).check(), Ok(()));
        assert_eq!(EngineConfig::new(0, 8, 512, 64).check().unwrap_err().name, "stages");
        assert_eq!(EngineConfig::new(3, limits::SLOTS_MAX + 1, 512, 64).check().unwrap_err().name, "slots");
        assert_eq!(EngineConfig::new(3, 8, 1, 64).check().unwrap_err().name, "ctx");
        assert_eq!(EngineConfig::new(3, 8, 512, limits::ROWS_MAX as u32 + 1).check().unwrap_err().name, "chunk");
        let spares = EngineConfig { spares: 3, ..EngineConfig::new(3, limits::SLOTS_MAX - 2, 512, 64) };
        assert_eq!(spares.check().unwrap_err().name, "spares");
    }
}
