//! From a request to tokens: chat template and tokenizer. Runs beside the compute thread, since a long prompt takes long.
use std::time::{SystemTime, UNIX_EPOCH};

use capstan_gguf::Metadata;
use capstan_llama::Vocab;
use capstan_proto::generate::{ErrorKind, GenerateRequest, Prompt, RequestError};
use capstan_text::ChatTemplate;

/// How many bytes of text at most become one byte of a token by Unicode normalization, with room to spare.
const NORMALIZED_SHRINK: usize = 4;

/// Makes a model's prompts.
pub(crate) struct PromptMaker {
    vocab: Vocab,
    template: ChatTemplate,
    bos: String,
    /// No text longer than this fits the context, whatever its tokens are.
    text_bytes_max: usize,
    ctx: u32,
}

impl PromptMaker {
    /// From the last stage's model and its file's metadata.
    pub fn new(vocab: Vocab, metadata: &Metadata, ctx: u32) -> Result<Self, String> {
        let (bos, eos) = (vocab.bos_text(), vocab.eos_text());
        let source = metadata.get_str("tokenizer.chat_template");
        let template = ChatTemplate::new(source, &bos, &eos).or_else(|error| {
            // The model is still useful for plain completions and with the usual form of a conversation.
            tracing::warn!(%error, "the model's chat template is not understood; ChatML is used instead");
            ChatTemplate::new(None, &bos, &eos)
        });
        let longest = (0..vocab.n_tokens() as i32).map(|t| vocab.piece(t, true).len()).max().unwrap_or(0);
        let text_bytes_max = longest.max(1).saturating_mul(NORMALIZED_SHRINK).saturating_mul(ctx as usize);
        Ok(Self { template: template.map_err(|e| e.to_string())?, vocab, bos, text_bytes_max, ctx })
    }

    /// The request's prompt as tokens, all of them in the vocabulary.
    pub fn tokens(&self, request: &GenerateRequest) -> Result<Vec<i32>, RequestError> {
        request.check()?;
        let bad = |m: String| RequestError::new(ErrorKind::BadRequest, m);
        let vocab = &self.vocab;
        let in_vocabulary = |tokens: &[i32]| {
            let n_vocab = vocab.n_tokens();
            match tokens.iter().find(|t| !(0..n_vocab as i32).contains(*t)) {
                Some(token) => Err(bad(format!("token {token} is not in the vocabulary of {n_vocab} tokens"))),
                None => Ok(()),
            }
        };
        in_vocabulary(&request.resume)?;
        let tokens = match &request.prompt {
            Prompt::Tokens(tokens) => {
                in_vocabulary(tokens)?;
                tokens.clone()
            }
            Prompt::Text(text) => {
                self.check_length(text)?;
                vocab.tokenize(text, true, true).map_err(|e| bad(e.to_string()))?
            }
            Prompt::Chat { messages, tools, template_kwargs } => {
                let text =
                    self.template.render(messages, tools.as_deref(), template_kwargs.as_deref(), true, &today())?;
                self.check_length(&text)?;
                // Most templates write the beginning-of-text token themselves; twice would change the answer.
                let add_special = self.bos.is_empty() || !text.starts_with(&self.bos);
                vocab.tokenize(&text, add_special, true).map_err(|e| bad(e.to_string()))?
            }
        };
        if tokens.is_empty() {
            return Err(bad("the prompt is empty; send at least one token".into()));
        }
        Ok(tokens)
    }
}

impl PromptMaker {
    /// Refuses a text that cannot fit before minutes are spent on its tokens.
    fn check_length(&self, text: &str) -> Result<(), RequestError> {
        if text.len() <= self.text_bytes_max {
            return Ok(());
        }
        let message = format!(
            "the prompt of {} bytes cannot fit the context of {} tokens; shorten it, or load the model with a larger --ctx",
            text.len(),
            self.ctx
        );
        Err(RequestError::new(ErrorKind::ContextExceeded, message))
    }
}

/// Today's date in UTC as `YYYY-MM-DD`, for templates that tell the model.
fn today() -> String {
    let days = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() / 86_400) as i64;
    let (y, m, d) = civil_from_days(days);
    format!("{y:04}-{m:02}-{d:02}")
}

/// The Gregorian date of a day counted from 1970-01-01, by the usual shift of the year's start to March.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::civil_from_days;

    #[test]
    fn dates_are_gregorian() {
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
        assert_eq!(civil_from_days(20_454), (2026, 1, 1));
    }
}
