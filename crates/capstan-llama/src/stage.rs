//! A layer range on llama.cpp behind the engine's [`Stage`].
use std::path::PathBuf;
use std::sync::Arc;

use capstan_engine::{Stage, StageError, StageOutput, StepGuard};
use capstan_proto::Epoch;
use capstan_proto::child::{StageInfo, StageSpec};
use capstan_proto::data::{MicroBatch, Payload, Rollback, Row};

use crate::backend::{DeviceKind, devices};
use crate::context::{Context, ContextOptions};
use crate::model::{Model, ModelOptions, Progress};
use crate::{Capture, LlamaError};

/// What enters a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageInput {
    /// Token ids: the stage is the whole model.
    Tokens,
    /// Hidden states with so many floats a row.
    Hidden {
        /// Floats per row.
        width: usize,
    },
}

/// What to load as a stage, and how large.
pub struct StageOptions {
    /// The GGUF: a shard, or the whole model.
    pub path: PathBuf,
    /// Layers it must have; none does not check.
    pub layers: Option<u32>,
    /// What enters.
    pub input: StageInput,
    /// Sizes, and the hidden state that leaves.
    pub context: ContextOptions,
    /// Layers to offload to a GPU; negative is all.
    pub gpu_layers: i32,
    /// Take memory only for weights that are read; see [`ModelOptions::sparse`].
    pub sparse: bool,
    /// Who hears how far loading is.
    pub progress: Option<Progress>,
}

impl StageOptions {
    /// A whole model that takes tokens and gives logits.
    pub fn whole(path: PathBuf, context: ContextOptions) -> Self {
        Self { path, layers: None, input: StageInput::Tokens, context, gpu_layers: 0, sparse: false, progress: None }
    }

    /// What a child is told to load. Refuses a spec that contradicts itself.
    pub fn from_spec(spec: &StageSpec) -> Result<Self, LlamaError> {
        let bad = |m: String| Err(LlamaError::Context(m));
        if spec.stage >= spec.stages {
            return bad(format!("it is stage {} of {}", spec.stage, spec.stages));
        }
        let width = spec.io.hidden_width as usize;
        let last = spec.stage + 1 == spec.stages;
        let capture = match (&spec.io.capture, last) {
            (None, true) => None,
            (Some(node), false) => Some(Capture { node: node.clone(), width }),
            (None, false) => return bad("it is not the last stage, and nothing is to leave it".into()),
            (Some(node), true) => return bad(format!("it is the last stage, and {node} is to leave it")),
        };
        Ok(Self {
            path: spec.shard.clone(),
            layers: Some(spec.layers.count()),
            input: if spec.stages == 1 { StageInput::Tokens } else { StageInput::Hidden { width } },
            context: ContextOptions {
                ctx_per_slot: spec.ctx,
                slots: spec.slots,
                spares: spec.scheduling.spares(),
                ubatch: spec.ubatch,
                threads: spec.threads,
                capture,
                outputs_max: None,
                // Snapshots of hybrid memory are taken before every guess. In caches of their own each would copy all of
                // a cache; but only there do an answer's bits depend on nothing else, which `decode_batch` 1 promises.
                kv_unified: spec.scheduling.rollback == Rollback::Copy && spec.decode_batch > 1,
            },
            gpu_layers: spec.gpu_layers,
            sparse: spec.sparse,
            progress: None,
        })
    }
}

/// What a stage's compute buffers would take in bytes, by llama.cpp's own reckoning: nothing is allocated, and of the file
/// only its header is read.
pub fn dry_run(options: &StageOptions) -> Result<u64, LlamaError> {
    let model_options = ModelOptions { gpu_layers: options.gpu_layers, sizes_only: true, ..ModelOptions::default() };
    let model = Model::load(&options.path, model_options)?;
    Ok(Context::new(model, &options.context)?.memory().compute_bytes)
}

/// A layer range that llama.cpp computes.
pub struct LlamaStage {
    context: Context,
    input: StageInput,
    guard: StepGuard,
    device: String,
}

impl LlamaStage {
    /// Loads it and checks that it does what the architecture table says: one row goes in, and the named node must
    /// appear exactly once with the expected width. It begins in epoch 0 with empty slots.
    pub fn new(options: StageOptions) -> Result<Self, LlamaError> {
        let (gpu_layers, sparse, progress) = (options.gpu_layers, options.sparse, options.progress);
        let model_options = ModelOptions { gpu_layers, sparse, progress, ..ModelOptions::default() };
        let model = Model::load(&options.path, model_options)?;
        let device = device_names(model.on_processor());
        if let Some(layers) = options.layers.filter(|l| *l != model.n_layer()) {
            return Err(LlamaError::SelfCheck(format!(
                "the file has {} layers and {layers} are expected; cut the shard again",
                model.n_layer()
            )));
        }
        if let StageInput::Hidden { width } = options.input
            && (width == 0 || width > model.n_embd_inp())
        {
            return Err(LlamaError::SelfCheck(format!(
                "hidden states of {width} floats are to enter, and the file takes {}",
                model.n_embd_inp()
            )));
        }
        let context = Context::new(model, &options.context)?;
        let mut stage = Self { context, input: options.input, guard: StepGuard::default(), device };
        stage.check(options.context.capture.as_ref())?;
        Ok(stage)
    }

    fn check(&mut self, capture: Option<&Capture>) -> Result<(), LlamaError> {
        let payload = match self.input {
            StageInput::Tokens => Payload::Tokens(vec![0]),
            // Not zero: some norms divide by the row's length.
            StageInput::Hidden { width } => Payload::Hidden(vec![0.01; width]),
        };
        let rows = vec![Row { slot: 0, pos: 0, output: true }];
        let batch = MicroBatch { epoch: Epoch::default(), step: 0, ops: Vec::new(), rows, payload };
        let result = self.context.decode(&batch);
        let fail = |m: String| Err(LlamaError::SelfCheck(m));
        if let Some(capture) = capture {
            let seen = self.context.captures_seen().unwrap_or(0);
            let node = &capture.node;
            if seen == 0 && !matches!(result, Err(LlamaError::Refused(_))) {
                return fail(format!("the graph has no node {node}; run the model whole, this cut is not understood"));
            }
            if seen > 1 {
                return fail(format!("node {node} appeared {seen} times for one row; run the model whole"));
            }
        }
        match result {
            Err(e) => return fail(e.to_string()),
            Ok(StageOutput::Logits(l)) if l.len() != self.context.model().n_vocab() => {
                return fail(format!("one row gave {} logits", l.len()));
            }
            Ok(_) => {}
        }
        self.context.clear();
        Ok(())
    }

    /// The model behind it: vocabulary, sizes.
    pub fn model(&self) -> &Arc<Model> {
        self.context.model()
    }
    /// Its working memory.
    pub fn context(&self) -> &Context {
        &self.context
    }
    /// The same, to save and restore slots.
    pub fn context_mut(&mut self) -> &mut Context {
        &mut self.context
    }
    /// What it measures, with this process's id. Weights are counted from the tensors; KV and compute buffers are what
    /// llama.cpp's log says.
    pub fn info(&self) -> StageInfo {
        let memory = self.context.memory();
        StageInfo {
            pid: std::process::id(),
            device: self.device.clone(),
            weights_bytes: self.model().size_bytes(),
            copied_bytes: self.model().copied_bytes(),
            kv_bytes: memory.kv_bytes,
            compute_bytes: memory.compute_bytes,
        }
    }

    fn check_input(&self, batch: &MicroBatch) -> Result<(), StageError> {
        let rows = batch.rows.len();
        if rows == 0 {
            return Ok(());
        }
        let refuse = |m: String| Err(StageError::Refused(m));
        match (&batch.payload, self.input) {
            (Payload::Tokens(_), StageInput::Tokens) => Ok(()),
            (Payload::Hidden(h), StageInput::Hidden { width }) if h.len() == width * rows => Ok(()),
            (Payload::Hidden(h), StageInput::Hidden { width }) => {
                refuse(format!("its hidden states have {} floats and {width} are expected", h.len() / rows))
            }
            (Payload::Tokens(_), _) => refuse("it carries tokens, and this stage takes hidden states".into()),
            (Payload::Hidden(_), _) => refuse("it carries hidden states, and this stage takes tokens".into()),
        }
    }
}

impl Stage for LlamaStage {
    fn forward(&mut self, batch: &MicroBatch) -> Result<StageOutput, StageError> {
        self.guard.check(batch)?;
        self.check_input(batch)?;
        match self.context.decode(batch) {
            Ok(output) => {
                self.guard.advance();
                Ok(output)
            }
            Err(LlamaError::Refused(m)) => Err(StageError::Refused(m)),
            Err(e) => {
                self.guard.fail();
                Err(StageError::Failed(e.to_string()))
            }
        }
    }

    fn reset(&mut self, epoch: Epoch) -> Result<(), StageError> {
        self.context.clear();
        self.guard.reset(epoch);
        Ok(())
    }
}

/// The devices that will compute, for people: the processor alone, or the graphics cards.
fn device_names(on_processor: bool) -> String {
    let computes = |kind| match kind {
        DeviceKind::Cpu => on_processor,
        DeviceKind::Gpu | DeviceKind::IntegratedGpu => !on_processor,
        DeviceKind::Accelerator => false,
    };
    let named = devices().into_iter().filter(|d| computes(d.kind)).map(|d| d.description.trim().to_owned());
    named.collect::<Vec<_>>().join(", ")
}
