//! Ordered stages that cover every layer exactly once; no other kind can be made.
use capstan_proto::{LayerRange, NodeId};
use serde::{Deserialize, Serialize};

/// One stage of a placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagePlan {
    /// Where.
    pub node: NodeId,
    /// Its name.
    pub node_name: String,
    /// What.
    pub layers: LayerRange,
    /// Memory it is expected to take, in bytes.
    pub memory_bytes: u64,
}

/// Why stages are no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPlacement {
    /// Nothing at all.
    #[error("no layers are placed; name at least one node")]
    Empty,
    /// Layers that no stage holds.
    #[error("the layers {missing} are on no node; the model has {layers} layers, so the ranges must cover 0..{layers}")]
    Gap {
        /// Which.
        missing: LayerRange,
        /// Layers of the model.
        layers: u32,
    },
    /// Layers that two stages hold, or stages out of order.
    #[error(
        "the range {range} begins before the one in front of it ends, at layer {at}; write ranges in order, each beginning where the last ends"
    )]
    Overlap {
        /// The later range.
        range: LayerRange,
        /// Where it should begin.
        at: u32,
    },
    /// Past the end of the model.
    #[error("the range {range} goes past the end of the model, which has {layers} layers; end at {layers}")]
    TooLong {
        /// Which.
        range: LayerRange,
        /// Layers of the model.
        layers: u32,
    },
}

/// Stages in pipeline order that cover every layer of a model exactly once, and why they are so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    stages: Vec<StagePlan>,
    explanation: Vec<String>,
}

impl Placement {
    /// Proves that the stages cover layers `0..n_layers` in order, each once.
    pub fn new(n_layers: u32, stages: Vec<StagePlan>, explanation: Vec<String>) -> Result<Self, BadPlacement> {
        let mut at = 0;
        for stage in &stages {
            let range = stage.layers;
            if range.end() > n_layers {
                return Err(BadPlacement::TooLong { range, layers: n_layers });
            }
            if range.start() < at {
                return Err(BadPlacement::Overlap { range, at });
            }
            if let Ok(missing) = LayerRange::new(at, range.start()) {
                return Err(BadPlacement::Gap { missing, layers: n_layers });
            }
            at = range.end();
        }
        if at == 0 {
            return Err(BadPlacement::Empty);
        }
        match LayerRange::new(at, n_layers) {
            Ok(missing) => Err(BadPlacement::Gap { missing, layers: n_layers }),
            Err(_) => Ok(Self { stages, explanation }),
        }
    }

    /// Stages in pipeline order; the last is the driver.
    pub fn stages(&self) -> &[StagePlan] {
        &self.stages
    }

    /// For people: why it is so.
    pub fn explanation(&self) -> &[String] {
        &self.explanation
    }
}
