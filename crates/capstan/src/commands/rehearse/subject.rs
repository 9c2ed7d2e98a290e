//! What is rehearsed: the header of a file that is here or elsewhere, or one made from the catalogue's shape; with all of
//! its layers, or so many as `--scale` says.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use capstan_gguf::{Model, ModelProfile, synthetic};
use capstan_planner::{header, models};
use capstan_proto::LayerRange;
use capstan_proto::control::MADE_UP_HEADER_BYTES_MAX;
use capstan_store::remote::{ModelName, Remote};
use tempfile::NamedTempFile;

/// Memory of a node that is left for buffers and the process when a scale is proposed, in bytes.
const ALLOWANCE_BYTES: u64 = 768 << 20;
/// llama.cpp rounds a slot's context up to a multiple of this.
const CTX_STEP: u64 = 256;

/// What is rehearsed.
#[derive(Debug)]
pub(super) struct Subject {
    /// Name for people.
    pub(super) name: String,
    /// The model as it is, without weights.
    pub(super) model: Model,
    /// Its layers that are rehearsed.
    pub(super) range: LayerRange,
    header: Vec<u8>,
    file_bytes: u64,
    /// What is rehearsed, in numbers.
    pub(super) rehearsed: ModelProfile,
    /// The whole model in numbers.
    pub(super) whole: ModelProfile,
}

impl Subject {
    /// What a user's words mean, cut down to `scale` layers.
    pub(super) async fn find(text: &str, scale: Option<u32>) -> Result<Self> {
        let (name, model) = found(text).await?;
        let range = layers(model.n_layers(), model.leading_dense(), scale)?;
        let (mut header, mut file_bytes) = model.excerpt_header(range, true)?;
        if header.len() > MADE_UP_HEADER_BYTES_MAX {
            (header, file_bytes) = model.excerpt_header(range, false)?;
        }
        let rehearsed = synthetic::model(&header, file_bytes, Path::new(&name))?.profile();
        Ok(Self { whole: model.profile(), name, range, header, file_bytes, rehearsed, model })
    }

    /// Layers of the whole model.
    pub(super) fn layers_all(&self) -> u32 {
        self.model.n_layers()
    }

    /// A file of holes that has the model's size, for the daemon to plan by. It takes no space, and is removed when it is
    /// dropped; a daemon that starts removes what a killed command left.
    pub(super) fn outline(&self, data_dir: &Path) -> Result<NamedTempFile> {
        let folder = data_dir.join("rehearsals");
        let sorry = || format!("the model's outline cannot be written to {}", folder.display());
        std::fs::create_dir_all(&folder).with_context(sorry)?;
        let file =
            tempfile::Builder::new().prefix("model-").suffix(".gguf").tempfile_in(&folder).with_context(sorry)?;
        synthetic::outline(&self.header, self.file_bytes, file.as_file()).with_context(sorry)?;
        Ok(file)
    }

    /// How many layers fit nodes with so much memory free each; none when not even one does.
    pub(super) fn scale_that_fits(&self, free_bytes: &[u64], ctx: u32, slots: u32) -> Option<u32> {
        let p = &self.whole;
        let free: u64 = free_bytes.iter().map(|f| f.saturating_sub(ALLOWANCE_BYTES)).sum();
        let head = if p.tied { 0 } else { p.output_bytes };
        let tokens = u64::from(ctx).next_multiple_of(CTX_STEP) * u64::from(slots);
        let need = |l: &capstan_gguf::LayerProfile| {
            let state = l.recurrent_state_bytes.saturating_mul(slots.into());
            l.weight_bytes.saturating_add(l.kv_bytes_per_token.saturating_mul(tokens)).saturating_add(state)
        };
        // The heaviest layer for each: a stage is whole layers, and nodes are seldom filled to the brim.
        let layer = p.layers.iter().map(need).max()?.max(1);
        let fit = free.saturating_sub(p.embedding_bytes).saturating_sub(head) / layer;
        // Nor does a node hold a part of a layer.
        let whole: u64 = free_bytes.iter().map(|f| f.saturating_sub(ALLOWANCE_BYTES) / layer).sum();
        let fit = fit.min(whole).min(u64::from(p.n_layers).saturating_sub(1)) as u32;
        (fit > 0).then_some(fit)
    }
}

/// The model that is meant, and its name for people.
async fn found(text: &str) -> Result<(String, Model)> {
    let is_path = text.ends_with(".gguf") || Path::new(text).is_file();
    if text.starts_with("hf:") || text.contains("://") {
        let name: ModelName = text.parse()?;
        if let ModelName::File(path) = name {
            return open(path).await;
        }
        let model = Remote::from_env()?.model(&name).await?;
        return Ok((model.name().map_or_else(|| name.to_string(), str::to_owned), model));
    }
    if is_path {
        return open(text.into()).await;
    }
    let (known, quantisation) = models::find(text).with_context(|| format!("{text:?} is no file either"))?;
    let model = header::model(&known.shape, known.name, quantisation)?;
    Ok((format!("{} {}", known.name, quantisation.name), model))
}

async fn open(path: PathBuf) -> Result<(String, Model)> {
    let shown = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let model = tokio::task::spawn_blocking(move || Model::open(&path)).await??;
    Ok((model.name().map_or(shown, str::to_owned), model))
}

/// The layers that are rehearsed: all, or `scale` of them that hold as large a share of dense layers as the whole. Those
/// are the first ones, so the window begins where the right number of them is left.
fn layers(n: u32, dense: u32, scale: Option<u32>) -> Result<LayerRange> {
    let Some(scale) = scale.filter(|scale| *scale < n) else {
        if let Some(scale) = scale.filter(|scale| *scale > n) {
            bail!("the model has {n} layers, so --scale {scale} is too many; leave it out to rehearse all");
        }
        return Ok(LayerRange::new(0, n)?);
    };
    let share = (f64::from(dense) * f64::from(scale) / f64::from(n)).round() as u32;
    let kept = share.max(u32::from(dense > 0 && scale > 1)).min(dense);
    let start = (dense - kept).min(n - scale);
    Ok(LayerRange::new(start, start + scale)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_keeps_dense_layers_in_proportion() {
        let range = |n, dense, scale| layers(n, dense, scale).map(|r| (r.start(), r.end())).ok();
        assert_eq!(range(61, 1, None), Some((0, 61)));
        assert_eq!(range(61, 1, Some(61)), Some((0, 61)));
        assert_eq!(range(61, 1, Some(4)), Some((0, 4)));
        assert_eq!(range(61, 1, Some(1)), Some((1, 2)), "one layer is of the kind that most are");
        assert_eq!(range(61, 3, Some(20)), Some((2, 22)));
        assert_eq!(range(61, 3, Some(41)), Some((1, 42)));
        assert_eq!(range(30, 0, Some(10)), Some((0, 10)));
        assert_eq!(range(30, 0, Some(31)), None);
    }

    #[tokio::test]
    async fn a_scale_is_proposed_that_fits() {
        let subject = Subject::find("Kimi K2.5", Some(4)).await.unwrap();
        assert_eq!((subject.layers_all(), subject.rehearsed.n_layers), (61, 4));
        let gib = 1u64 << 30;
        let fits = |free: &[u64]| subject.scale_that_fits(free, 4096, 1);
        assert_eq!(fits(&[gib]), None);
        // A layer takes 5.7 GiB, the vocabulary and the head 1.5.
        let two = fits(&[20 * gib, 20 * gib]).unwrap();
        assert!((5..=6).contains(&two), "{two}");
        assert_eq!(fits(&[4096 * gib]), Some(60));
        let error = Subject::find("Kimi K9", None).await.unwrap_err();
        assert!(format!("{error:#}").contains("did you mean"), "{error:#}");
        let unknown = Subject::find("Gemma 3 27B", None).await.unwrap_err();
        assert!(unknown.to_string().contains("only for deepseek2"), "{unknown}");
    }
}
