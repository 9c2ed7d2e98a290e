//! The scheduler's limits and shares, checked once.
use capstan_proto::limits;

/// What the scheduler may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Stages of the pipeline; sequences that decode are dealt over as many micro-batches.
    pub stages: u16,
    /// Sequences at once: places in every stage's KV cache.
    pub slots: u32,
    /// Tokens that a slot holds, prompt and answer together.
    pub ctx: u32,
    /// Most rows of a micro-batch: llama.cpp's `n_ubatch`.
    pub chunk: u32,
    /// A prompt that would need fewer chunks is cut into this many, so that every stage has one, but never into chunks
    /// below [`crate::schedule::CHUNK_ROWS_MIN`]. It changes the shapes of micro-batches and thus rounding: comparisons
    /// across numbers of stages must fix it.
    pub chunks_min: u16,
    /// Most sequences decoded in one micro-batch. With 1 an answer's bits do not depend on what runs beside it.
    pub decode_batch: u32,
    /// Most micro-batches under way. One a stage keeps all of them computing; one more hides the driver's own time.
    pub in_flight_max: u16,
    /// The share: while prompts wait and sequences decode, so many decode micro-batches go between two chunks.
    pub decodes_per_prefill: u16,
    /// Requests that may wait beyond the free slots.
    pub queue_max: usize,
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

impl EngineConfig {
    /// The usual settings: prompts and sequences dealt over all stages, one micro-batch a stage under way, prefill and
    /// decode in turn.
    pub fn new(stages: u16, slots: u32, ctx: u32, chunk: u32) -> Self {
        Self {
            stages,
            slots,
            ctx,
            chunk,
            chunks_min: stages,
            decode_batch: slots,
            in_flight_max: stages,
            decodes_per_prefill: 1,
            queue_max: limits::QUEUE_MAX,
        }
    }

    /// Checks every number.
    pub fn check(&self) -> Result<(), ConfigError> {
        let slots_max = u64::from(limits::SLOTS_MAX);
        let u16_max = u64::from(u16::MAX);
        for (name, value, min, max) in [
            ("stages", u64::from(self.stages), 1, u64::from(limits::LAYERS_MAX)),
            ("slots", u64::from(self.slots), 1, slots_max),
            // One token of prompt and one of answer.
            ("ctx", u64::from(self.ctx), 2, u64::from(u32::MAX)),
            ("chunk", u64::from(self.chunk), 1, limits::ROWS_MAX as u64),
            ("chunks_min", u64::from(self.chunks_min), 1, u16_max),
            ("decode_batch", u64::from(self.decode_batch), 1, u64::from(u32::MAX)),
            ("in_flight_max", u64::from(self.in_flight_max), 1, u16_max),
            ("decodes_per_prefill", u64::from(self.decodes_per_prefill), 1, u16_max),
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
    }
}
