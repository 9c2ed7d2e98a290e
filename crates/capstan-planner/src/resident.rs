//! The memory that a stage's process will be seen to hold, which is less than what is reserved for it.
//!
//! What is reserved is what may be touched: compute buffers as for the most rows of a micro-batch at a full context. What
//! is seen is what has been touched: buffers as for the chunks that prompts are cut into. And it is seen by page: pages of
//! a mapped file count although the system may take them back, and beside them the copies that llama.cpp makes of weights
//! which it multiplies faster in another order, a second mapping of the embedding table, the tokenizer, and the process
//! itself as it was measured on that machine.
use capstan_gguf::ModelProfile;
use capstan_proto::LayerRange;
use capstan_proto::device::DeviceProfile;

use crate::cost::{Need, TOKENIZER_BYTES_PER_TOKEN};

/// A stage of a placement.
#[derive(Clone, Copy, Debug)]
pub struct Stage<'a> {
    /// The model.
    pub profile: &'a ModelProfile,
    /// Its node, as it was measured.
    pub device: &'a DeviceProfile,
    /// Its layers.
    pub layers: LayerRange,
    /// What is reserved for it.
    pub need: Need,
}

impl Stage<'_> {
    /// Bytes that its process holds once prompts of all kinds filled its context in chunks of `chunk_rows` rows, where
    /// micro-batches may have up to `ubatch`; 0 where the system does not tell what a process takes.
    pub fn bytes(&self, chunk_rows: u32, ubatch: u32) -> u64 {
        if self.device.process_bytes == 0 {
            return 0;
        }
        let share = f64::from(chunk_rows.min(ubatch)) / f64::from(ubatch.max(1));
        let buffers = (self.need.compute as f64 * share) as u64;
        let process = self.device.process_bytes.saturating_add(self.driver_bytes());
        [self.need.weights, self.copied_bytes(), self.need.kv, buffers, process]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// Weights that are held once more in another order.
    fn copied_bytes(&self) -> u64 {
        let copied = |ggml_type: u32| self.device.types.iter().any(|t| t.ggml_type == ggml_type && t.copied);
        let span = self.layers.start() as usize..self.layers.end() as usize;
        let layers = self.profile.layers.get(span).unwrap_or_default();
        let matrices = layers.iter().flat_map(|l| &l.matrices).filter(|m| copied(m.ggml_type));
        matrices.map(|m| m.bytes).fold(0, u64::saturating_add)
    }

    /// What the last stage holds besides: the tokenizer, and, where there are others, a second mapping of the embedding
    /// table, of which in time every part is looked up.
    fn driver_bytes(&self) -> u64 {
        let p = self.profile;
        let tokenizer = u64::from(p.n_vocab) * TOKENIZER_BYTES_PER_TOKEN;
        match (self.layers.end() == p.n_layers, self.layers.count() == p.n_layers) {
            (false, _) => 0,
            (true, true) => tokenizer,
            (true, false) => tokenizer.saturating_add(p.embedding_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use capstan_gguf::{LayerProfile, Matrices, Part};
    use capstan_proto::device::{Point, TypeCurve};

    use super::*;

    fn curve(ggml_type: u32, copied: bool) -> TypeCurve {
        let point = vec![Point { rows: 1, fs: 1 }];
        TypeCurve { ggml_type, per_weight: point.clone(), per_cached_weight: point, copied }
    }

    #[test]
    fn what_is_touched_is_seen() {
        let matrices = |ggml_type, bytes| Matrices { part: Part::Mixer, ggml_type, bytes, weights: 1 };
        let layer = LayerProfile { matrices: vec![matrices(8, 1000), matrices(12, 500)], ..LayerProfile::default() };
        let (model, quantisation) = crate::models::find("gpt-oss-120b").unwrap();
        let profile = ModelProfile {
            n_layers: 4,
            n_vocab: 10,
            embedding_bytes: 7000,
            layers: vec![layer; 4],
            ..model.shape.profile(model.name, quantisation)
        };
        let types = vec![curve(8, false), curve(12, true)];
        let device = DeviceProfile { types, process_bytes: 100, ..DeviceProfile::default() };
        let need = Need { weights: 1_000_000, kv: 20_000, compute: 8000, process: 5_000_000 };
        let seen = |a, b| {
            let layers = LayerRange::new(a, b).unwrap();
            Stage { profile: &profile, device: &device, layers, need }.bytes(128, 512)
        };
        let all = 1_020_000 + 100 + 8000 / 4;
        assert_eq!(seen(0, 2), all + 2 * 500);
        assert_eq!(seen(0, 4), all + 4 * 500 + 10 * TOKENIZER_BYTES_PER_TOKEN);
        assert_eq!(seen(1, 4), all + 3 * 500 + 10 * TOKENIZER_BYTES_PER_TOKEN + 7000);
        let unknown = DeviceProfile::default();
        let layers = LayerRange::new(0, 2).unwrap();
        assert_eq!(Stage { profile: &profile, device: &unknown, layers, need }.bytes(128, 512), 0);
    }
}
