//! Embedding rows from the last stage's own file, so that the first stage is fed with hidden states like any other and
//! needs no vocabulary.
use std::path::Path;

use capstan_gguf::{Model, TensorInfo};

const TOKEN_EMBD: &str = "token_embd.weight";

/// Looks rows up in the mapped `token_embd`; only touched pages become resident.
pub(crate) struct Embedder {
    model: Model,
    table: TensorInfo,
    n_embd: usize,
    n_vocab: usize,
    scale: f32,
}

impl Embedder {
    /// Opens the shard of the last stage. Rows are multiplied by `scale`.
    pub fn open(shard: &Path, scale: f32) -> Result<Self, String> {
        let model = Model::open(shard).map_err(|e| e.to_string())?;
        let table = model.tensor(TOKEN_EMBD).ok_or("the last stage's shard holds no token embeddings")?.clone();
        let (n_embd, n_vocab) = (table.dims[0] as usize, table.dims[1] as usize);
        Ok(Self { model, table, n_embd, n_vocab, scale })
    }

    /// Hidden states of these tokens, row after row. Bit for bit what llama.cpp would look up.
    pub fn rows(&self, tokens: &[i32]) -> Result<Vec<f32>, String> {
        let data = self.model.tensor_data(&self.table);
        let row_bytes = self.table.row_bytes() as usize;
        let mut out = Vec::with_capacity(tokens.len() * self.n_embd);
        for &token in tokens {
            let index = usize::try_from(token).ok().filter(|i| *i < self.n_vocab);
            let index = index.ok_or_else(|| format!("token {token} has no embedding"))?;
            let bytes = data.get(index * row_bytes..(index + 1) * row_bytes).ok_or("the embedding table is cut off")?;
            capstan_llama::append_row(self.table.ggml_type, bytes, self.n_embd, &mut out).map_err(|e| e.to_string())?;
        }
        // A product with 1 would be exact too; most models have no scale and need no second pass.
        if self.scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= self.scale);
        }
        Ok(out)
    }
}
