//! A small model beside the driver that guesses what comes next, for a lone stream whose stages would otherwise rest.
//!
//! It follows the text by itself: its cache holds the longest prefix it shares with what is wanted, the rest is trimmed
//! and computed. It works on the compute thread while no input waits there, in pieces so small that an input that comes
//! meanwhile waits only briefly.
use std::path::Path;

use capstan_engine::StageOutput;
use capstan_llama::{Context, ContextOptions, LlamaError, Model, ModelOptions, Sampler, Vocab};
use capstan_proto::Epoch;
use capstan_proto::child::StageSpec;
use capstan_proto::data::{KvOp, MicroBatch, Payload, Row};
use capstan_proto::generate::Sampling;

/// Rows of a piece of work: a model small enough to guess computes them about as fast as the real one computes one.
const ROWS_MAX: u32 = 32;

/// What a piece of work brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// A guess.
    Guess(i32),
    /// The text is longer than one piece: go on.
    More,
    /// The text is longer than the draft model's context; there is nothing to do.
    TooLong,
}

/// The draft model and what its cache holds.
pub(crate) struct Draft {
    context: Context,
    sampler: Sampler,
    known: Vec<i32>,
}

impl Draft {
    /// Loads the whole GGUF at `path`. Its tokens must be those of `target`, the model it guesses for.
    pub fn load(path: &Path, target: &Vocab, spec: &StageSpec) -> Result<Self, String> {
        let name = path.display();
        let model = Model::load(path, ModelOptions { gpu_layers: spec.gpu_layers, ..ModelOptions::default() })
            .map_err(|e| format!("the draft model: {e}"))?;
        if let Some(difference) = difference(&model.vocab(), target) {
            return Err(format!(
                "the draft model {name} has another vocabulary than the model it is to guess for: {difference}; give a \
                 draft model of the same family, or load without one"
            ));
        }
        if model.is_recurrent() || model.is_hybrid() {
            return Err(format!(
                "the draft model {name} keeps recurrent states, which cannot follow a text that turns out otherwise; \
                 give one with plain attention, or load without one"
            ));
        }
        let options = ContextOptions {
            ctx_per_slot: spec.ctx,
            slots: 1,
            ubatch: ROWS_MAX,
            threads: spec.threads,
            ..ContextOptions::default()
        };
        let n_vocab = model.n_vocab();
        let context = Context::new(model, &options).map_err(|e| format!("the draft model: {e}"))?;
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let sampler = Sampler::with_vocab_size(&greedy, n_vocab).map_err(|e| format!("the draft model: {e}"))?;
        Ok(Self { context, sampler, known: Vec::new() })
    }

    /// One piece of work towards the token that follows `text`, which is not empty.
    pub fn advance(&mut self, text: &[i32]) -> Result<Progress, LlamaError> {
        if text.is_empty() || text.len() > self.context.ctx_per_slot() as usize {
            return Ok(Progress::TooLong);
        }
        // The last row is computed in any case, for its logits.
        let same = self.known.iter().zip(&text[..text.len() - 1]).take_while(|(a, b)| a == b).count();
        let end = text.len().min(same + ROWS_MAX as usize);
        let trim = KvOp::Trim { slot: 0, from: same as u32 };
        let rows = (same..end).map(|pos| Row { slot: 0, pos: pos as u32, output: pos + 1 == text.len() });
        let batch = MicroBatch {
            epoch: Epoch::default(),
            step: 0,
            ops: if same < self.known.len() { vec![trim] } else { Vec::new() },
            rows: rows.collect(),
            payload: Payload::Tokens(text[same..end].to_vec()),
        };
        let (StageOutput::Logits(logits) | StageOutput::Hidden(logits)) = self.context.decode(&batch)?;
        self.known.truncate(same);
        self.known.extend_from_slice(&text[same..end]);
        if end < text.len() {
            return Ok(Progress::More);
        }
        self.sampler.sample(&logits).map(Progress::Guess)
    }
}

/// The first thing in which two vocabularies differ.
fn difference(draft: &Vocab, target: &Vocab) -> Option<String> {
    let (own, wanted) = (draft.n_tokens(), target.n_tokens());
    if own != wanted {
        return Some(format!("it has {own} tokens instead of {wanted}"));
    }
    for (what, own, wanted) in [("beginning", draft.bos(), target.bos()), ("end", draft.eos(), target.eos())] {
        if own != wanted {
            return Some(format!("its {what}-of-text token is another"));
        }
    }
    let text = |vocab: &Vocab, token| String::from_utf8_lossy(&vocab.piece(token, true)).into_owned();
    (0..wanted as i32).find_map(|token| {
        if draft.piece(token, true) != target.piece(token, true) {
            return Some(format!("token {token} is {:?} instead of {:?}", text(draft, token), text(target, token)));
        }
        (draft.is_eog(token) != target.is_eog(token))
            .then(|| format!("token {token} ends an answer in one of them only"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use capstan_proto::child::WindowIo;
    use capstan_proto::{DeploymentId, LayerRange};
    use capstan_testkit::models::smollm2;
    use std::net::{IpAddr, Ipv4Addr};

    fn spec() -> StageSpec {
        StageSpec {
            deployment: DeploymentId(1),
            model_name: "target".into(),
            shard: smollm2(),
            layers: LayerRange::new(15, 30).unwrap(),
            stage: 1,
            stages: 2,
            io: WindowIo { capture: None, hidden_width: 576, embedding_scale: 1.0 },
            ctx: 256,
            slots: 1,
            ubatch: 64,
            decode_batch: 1,
            scheduling: Default::default(),
            threads: Some(1),
            gpu_layers: 0,
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            sparse: false,
        }
    }

    /// The guess for a text, and how many pieces of work it took.
    fn guess(draft: &mut Draft, text: &[i32]) -> (i32, usize) {
        for pieces in 1.. {
            match draft.advance(text).unwrap() {
                Progress::Guess(token) => return (token, pieces),
                Progress::More => {}
                Progress::TooLong => panic!("a text of {} tokens is too long", text.len()),
            }
        }
        unreachable!("every piece goes on")
    }

    #[test]
    fn it_follows_a_text_in_pieces_and_wherever_it_turns() {
        let target = Model::load(&smollm2(), ModelOptions::default()).unwrap().vocab();
        let mut draft = Draft::load(&smollm2(), &target, &spec()).unwrap();
        let mut text = target.tokenize(&"The lamp is lit at dusk. ".repeat(12), true, false).unwrap();
        // What was said so often is said again.
        let cut = text.len() - 20;
        let pieces = cut.div_ceil(ROWS_MAX as usize);
        assert!(pieces > 2, "{cut}");
        assert_eq!(guess(&mut draft, &text[..cut]), (text[cut], pieces));
        guess(&mut draft, &text);
        // Its own guesses cost a row each.
        for _ in 0..6 {
            let (token, pieces) = guess(&mut draft, &text);
            assert_eq!(pieces, 1);
            text.push(token);
        }
        // The text turned out otherwise: what is left of it is as if it had never been guessed.
        text.truncate(text.len() - 4);
        text.push(text[7]);
        let again = guess(&mut draft, &text).0;
        let mut fresh = Draft::load(&smollm2(), &target, &spec()).unwrap();
        assert_eq!(guess(&mut fresh, &text).0, again);
        assert_eq!(draft.advance(&[1; 257]).unwrap(), Progress::TooLong);
        assert_eq!(draft.advance(&[]).unwrap(), Progress::TooLong);
    }
}
