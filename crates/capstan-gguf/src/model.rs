//! An open model: one file or its splits, with metadata from the first and tensors from all.
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use capstan_proto::child::WindowIo;
use capstan_proto::data::Rollback;
use capstan_proto::{LayerRange, limits};

use crate::arch::windows::Windows;
use crate::arch::{self, EmbeddingScale};
use crate::bytes::FileBytes;
use crate::parse::{self, Header, TensorInfo};
use crate::shard::{self, Recipe, ShardInfo};
use crate::{GgufError, Metadata, ModelProfile, Value, cut, profile, writer};

/// Most files of a split model; each is mapped. 1 TB in files of 1 GB.
pub const FILES_MAX: u32 = 1024;
/// Most tensors of all files together.
pub const MODEL_TENSORS_MAX: usize = parse::TENSORS_MAX as usize;
/// Longest architecture name in bytes; llama.cpp's longest has 19.
const ARCHITECTURE_BYTES_MAX: usize = 64;
/// Widest hidden state in floats, as the data protocol allows it.
const WIDTH_MAX: u64 = limits::HIDDEN_WIDTH_MAX as u64;

/// A model whose header was checked; its data stays on disk until it is touched.
#[derive(Debug)]
pub struct Model {
    files: Vec<PathBuf>,
    contents: Vec<FileBytes>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    architecture: String,
    n_layers: u32,
    n_embd: u32,
    n_vocab: u32,
    windows: Windows,
}

impl Model {
    /// Open a GGUF. Of a split model give the first part; its siblings are found by name.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let bytes = FileBytes::open(path)?;
        let header = parse::header(&bytes, 0)?;
        let count = parts(&header.metadata, path)?;
        let mut model_files = vec![bytes];
        let mut headers = vec![header];
        for (no, part) in (1..count).zip(other_parts(path, 1, count)?) {
            if !part.exists() {
                return Err(GgufError::MissingPart { path: part, count });
            }
            let bytes = FileBytes::open(&part)?;
            let header = parse::header(&bytes, no as usize)?;
            check_part(&header.metadata, &part, no, count)?;
            model_files.push(bytes);
            headers.push(header);
        }
        Self::assemble(model_files, headers)
    }

    /// A model of one file whose bytes are in memory; `path` is only for messages.
    pub fn from_memory(path: &Path, bytes: Vec<u8>) -> Result<Self, GgufError> {
        let bytes = FileBytes::from_memory(path, bytes);
        let header = parse::header(&bytes, 0)?;
        if parts(&header.metadata, path)? > 1 {
            let what = "it is one of several parts, and only one is here".into();
            return Err(GgufError::Split { path: path.to_owned(), what });
        }
        Self::assemble(vec![bytes], vec![header])
    }

    pub(crate) fn assemble(contents: Vec<FileBytes>, headers: Vec<Header>) -> Result<Self, GgufError> {
        let files: Vec<PathBuf> = contents.iter().map(|f| f.path().to_owned()).collect();
        let path = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        let (mut metadata, mut tensors) = (Metadata::new(), Vec::new());
        for (i, header) in headers.into_iter().enumerate() {
            tensors.extend(header.tensors);
            if i == 0 {
                metadata = header.metadata;
            }
        }
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if index.insert(t.name.clone(), i).is_some() {
                let what = format!("the tensor {} is in two parts", t.name.escape_default());
                return Err(GgufError::Split { path: files[t.file].clone(), what });
            }
        }
        let limit = |what: &str, found: u64, max: u64| match found <= max {
            true => Ok(()),
            false => Err(GgufError::Limit { path: path.to_owned(), what: what.into(), found, max }),
        };
        limit("the number of tensors of all parts", tensors.len() as u64, MODEL_TENSORS_MAX as u64)?;
        if let Some(total) = metadata.get_u64("split.tensors.count").filter(|_| files.len() > 1)
            && total != tensors.len() as u64
        {
            let what = format!("together they have {} tensors, not {total}", tensors.len());
            return Err(GgufError::Split { path: path.to_owned(), what });
        }
        let missing = |missing: String| GgufError::NotALanguageModel { path: path.to_owned(), missing };
        let architecture = metadata
            .get_str("general.architecture")
            .filter(|a| !a.is_empty() && a.len() <= ARCHITECTURE_BYTES_MAX && a.bytes().all(|b| b.is_ascii_graphic()))
            .ok_or_else(|| missing("it names no architecture".into()))?
            .to_owned();
        let key = format!("{architecture}.block_count");
        let n_all = metadata.get_u64(&key).ok_or_else(|| missing(format!("it has no {key}")))?;
        limit(&key, n_all, limits::LAYERS_MAX.into())?;
        let extra = metadata.get_u64(&format!("{architecture}.nextn_predict_layers")).unwrap_or(0);
        let n_layers = n_all.saturating_sub(extra) as u32;
        if n_layers == 0 {
            return Err(missing(format!("it has {n_all} layers, {extra} of them for extra prediction")));
        }
        if let Some(t) = tensors.iter().find(|t| t.layer().is_some_and(|(layer, _)| u64::from(layer) >= n_all)) {
            let what = format!("it has {n_all} layers, and yet a tensor {}", t.name.escape_default());
            return Err(GgufError::Malformed { path: path.to_owned(), what });
        }
        let table = index.get("token_embd.weight").map(|i| &tensors[*i]);
        let table = table.ok_or_else(|| missing("it has no tensor token_embd.weight".into()))?;
        limit("the width of token_embd.weight", table.dims[0], WIDTH_MAX)?;
        limit("the number of tokens", table.dims[1], i32::MAX as u64)?;
        let (n_embd, n_vocab) = (table.dims[0] as u32, table.dims[1] as u32);
        let width = metadata.get_u64(&format!("{architecture}.embedding_length"));
        if table.dims[2..] != [1, 1] || n_embd == 0 || width.is_some_and(|w| w != u64::from(n_embd)) {
            let what = format!("the shape {:?} of token_embd.weight contradicts the metadata", table.dims);
            return Err(GgufError::Malformed { path: path.to_owned(), what });
        }
        let windows = Windows::new(&metadata, &architecture, n_layers);
        Ok(Self { files, contents, metadata, tensors, index, architecture, n_layers, n_embd, n_vocab, windows })
    }

    /// The files, the first part first.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.contents.iter().map(FileBytes::file_bytes).sum()
    }
    pub(crate) fn contents(&self) -> &[FileBytes] {
        &self.contents
    }
    /// Keys and values of the first file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
    /// llama.cpp's name of the architecture.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }
    /// Name for people, if the file has one.
    pub fn name(&self) -> Option<&str> {
        self.metadata.get_str("general.name")
    }
    /// Layers of the trunk; extra prediction layers are not counted.
    pub fn n_layers(&self) -> u32 {
        self.n_layers
    }
    /// All layers of the trunk.
    pub fn all_layers(&self) -> LayerRange {
        // n_layers is at least 1, so the range is not empty; the fall-back is never taken.
        LayerRange::new(0, self.n_layers).unwrap_or_else(|_| unreachable!("a model has layers"))
    }
    /// Width of the hidden state in floats.
    pub fn n_embd(&self) -> u32 {
        self.n_embd
    }
    /// Rows of the embedding table.
    pub fn n_vocab(&self) -> u32 {
        self.n_vocab
    }
    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|i| &self.tensors[*i])
    }
    /// A tensor's data, mapped: only what is touched is read. Empty for a tensor of another model that does not fit.
    pub fn tensor_data(&self, tensor: &TensorInfo) -> &[u8] {
        self.contents.get(tensor.file).and_then(|f| f.slice(tensor.offset, tensor.bytes)).unwrap_or_default()
    }
    /// One row of a tensor, or none when it has fewer.
    pub fn tensor_row(&self, tensor: &TensorInfo, row: u64) -> Option<&[u8]> {
        let size = usize::try_from(tensor.row_bytes()).ok()?;
        let start = usize::try_from(row).ok()?.checked_mul(size)?;
        self.tensor_data(tensor).get(start..start.checked_add(size)?)
    }

    /// What the planner needs to know.
    pub fn profile(&self) -> ModelProfile {
        profile::profile(self)
    }
    pub(crate) fn windows(&self) -> &Windows {
        &self.windows
    }
    /// Why this range cannot be a stage; none when it can. The full range always can.
    pub fn window_problem(&self, range: LayerRange) -> Option<String> {
        self.windows.problem(range)
    }
    /// Why the model can only run whole; none when it can be split somewhere.
    pub fn split_problem(&self) -> Option<String> {
        self.windows.split_problem()
    }
    /// The partition with the most stages that the rules allow; the full range alone when none is allowed.
    pub fn finest_partition(&self) -> Vec<LayerRange> {
        self.windows.finest_partition()
    }
    /// The layers at which the model may be cut into two stages.
    pub fn single_cuts(&self) -> Vec<u32> {
        self.windows.single_cuts()
    }
    /// How rows computed in vain are taken back from its memory of a sequence.
    pub fn rollback(&self) -> Rollback {
        arch::rollback(&self.architecture)
    }
    /// Whether what llama.cpp writes down of a sequence is all of it; layers with a sliding window are another matter.
    pub fn keeps_snapshots(&self) -> bool {
        arch::keeps_snapshots(&self.architecture)
    }
    /// How hidden states enter and leave a stage of this range.
    pub fn window_io(&self, range: LayerRange) -> WindowIo {
        let rules = self.windows.rules();
        let last = range.end() >= self.n_layers;
        WindowIo {
            capture: rules.filter(|_| !last).map(|r| r.capture_node(range.count())),
            hidden_width: self.n_embd,
            embedding_scale: match rules.map(|r| r.embedding_scale) {
                Some(EmbeddingScale::SqrtWidth) => (self.n_embd as f32).sqrt(),
                _ => 1.0,
            },
        }
    }
    /// Size in bytes of the shard of a range; 0 for a range that cannot be a stage.
    pub fn shard_bytes(&self, range: LayerRange) -> u64 {
        shard::plan(self, range).map_or(0, |p| p.total())
    }
    /// The header of the shard of a range, up to where data begins, and the size of the whole shard in bytes.
    pub fn shard_header(&self, range: LayerRange) -> Result<(Vec<u8>, u64), GgufError> {
        Ok(shard::plan(self, range)?.into_header())
    }
    /// How the shard of a range is put together.
    pub fn shard_recipe(&self, range: LayerRange) -> Result<Recipe, GgufError> {
        Ok(shard::plan(self, range)?.into_recipe(self))
    }
    /// The header of a model that has only these layers, besides its embeddings and head, and the size of its whole file
    /// in bytes: what is rehearsed. Without `texts` it has no tokenizer, which may be most of a header.
    pub fn excerpt_header(&self, range: LayerRange, texts: bool) -> Result<(Vec<u8>, u64), GgufError> {
        let mut cut = cut::excerpt(self, range)?;
        if !texts {
            cut.metadata.retain(|key| !key.starts_with("tokenizer."));
            cut.metadata.insert("tokenizer.ggml.model", Value::String("none".into()));
            cut.metadata.insert(format!("{}.vocab_size", self.architecture), Value::U32(self.n_vocab));
        }
        let tensors: Vec<_> = cut.tensors.into_iter().map(|(tensor, _)| tensor).collect();
        let layout = writer::layout(&cut.metadata, &tensors, None).ok_or_else(|| GgufError::Malformed {
            path: self.files.first().cloned().unwrap_or_default(),
            what: "its tensors do not fit into one file".into(),
        })?;
        Ok((layout.header, layout.total))
    }
    /// Layers at the start that are dense where the others have experts.
    pub fn leading_dense(&self) -> u32 {
        let key = format!("{}.leading_dense_block_count", self.architecture);
        self.metadata.get_u32(&key).unwrap_or(0).min(self.n_layers)
    }

    /// Write the shard of a range. The progress callback gets bytes done and in all; when it breaks, or anything fails,
    /// nothing is left behind. An existing file is replaced in one step.
    pub fn write_shard(
        &self,
        range: LayerRange,
        path: &Path,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<ShardInfo, GgufError> {
        shard::write(self, &shard::plan(self, range)?, path, progress)
    }
}

/// How many parts the model has, when `path` is the first.
pub(crate) fn parts(metadata: &Metadata, path: &Path) -> Result<u32, GgufError> {
    let count = metadata.get_u64("split.count").unwrap_or(1);
    if count > u64::from(FILES_MAX) {
        let what = "the number of parts".into();
        return Err(GgufError::Limit { path: path.to_owned(), what, found: count, max: FILES_MAX.into() });
    }
    let count = count.max(1) as u32;
    let no = metadata.get_u32("split.no").unwrap_or(0);
    if count > 1 && no != 0 {
        let first = part_path(path, 0, count).unwrap_or_else(|| PathBuf::from("the one that ends in -00001"));
        return Err(GgufError::NotFirst { path: path.to_owned(), no, count, first });
    }
    Ok(count)
}

pub(crate) fn check_part(metadata: &Metadata, path: &Path, no: u32, count: u32) -> Result<(), GgufError> {
    let (found_no, found_count) = (metadata.get_u32("split.no"), metadata.get_u32("split.count"));
    if (found_no, found_count) == (Some(no), Some(count)) {
        return Ok(());
    }
    let say = |n: Option<u32>| n.map_or("nothing".into(), |n| n.to_string());
    let what =
        format!("it says split.no {} and split.count {}, expected {no} and {count}", say(found_no), say(found_count));
    Err(GgufError::Split { path: path.to_owned(), what })
}

/// The paths of the parts from number `from` on, beside the first one.
pub(crate) fn other_parts(first: &Path, from: u32, count: u32) -> Result<Vec<PathBuf>, GgufError> {
    let paths = (from..count).map(|no| part_path(first, no, count)).collect::<Option<_>>();
    paths.ok_or_else(|| GgufError::Split {
        path: first.to_owned(),
        what: format!("its name does not end in -00001-of-{count:05}.gguf, so the other parts cannot be found"),
    })
}

/// The path of part `no` (from 0) beside any part of a model of `count` parts, if that part's name has the usual form.
fn part_path(path: &Path, no: u32, count: u32) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (prefix, digits) = stem.split_at_checked(stem.len().checked_sub(6)?)?;
    let number = digits.strip_prefix('-')?;
    number.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
    Some(path.with_file_name(format!("{prefix}-{:05}-of-{count:05}.gguf", no + 1)))
}
