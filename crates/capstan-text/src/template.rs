//! A model's chat template: compiled once, rendered within bounds on time, memory and depth.
//!
//! A template comes with the model's file, so it is as little trusted as the messages: the engine's fuel pays for every
//! instruction and every byte, and a template that runs out of it fails with a sentence.
use std::borrow::Cow;

use jiff::civil::Date;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde_json::json;

use crate::error::quote;
use crate::messages::{Conversation, Form, Shape, parse_kwargs, parse_tools};
use crate::{TextError, json, methods};

/// Longest template in bytes; the longest known ones have about 20 KB.
const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Fuel of every rendering: about two million instructions or 128 MB of text, a fraction of a second.
const FUEL_BASE: u64 = 2_000_000;
/// Fuel for each byte of the request, so that long conversations have what they need.
const FUEL_PER_BYTE: u64 = 8;
/// Fuel that no rendering exceeds, however long the request.
const FUEL_MAX: u64 = 32_000_000;
/// The engine's recursion limit. It is reached by macros that call themselves; each level takes stack.
const RECURSION_MAX: usize = 400;
/// Longest format that `strftime_now` takes, in bytes; a field may ask for 255 digits.
const DATE_FORMAT_BYTES_MAX: usize = 128;
/// Name of the template in error messages.
const NAME: &str = "chat_template";
/// Text that no template contains, to see where content goes.
const PROBE: &str = "capstan7probe";

/// ChatML, for models that bring no template.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A compiled chat template with the tokens it may print.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
    shape: Shape,
}

/// What `raise_exception` was called with, so that it can be told from the engine's own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles `source` (`tokenizer.chat_template` of a GGUF); none or an empty one is ChatML. `bos` and `eos` are the
    /// texts of these tokens, empty where the model has none.
    pub fn new(source: Option<&str>, bos: &str, eos: &str) -> Result<Self, TextError> {
        let source = source.filter(|s| !s.trim().is_empty()).unwrap_or(CHATML);
        if source.len() > SOURCE_BYTES_MAX {
            let len = source.len();
            return Err(TextError::Template(format!("it has {len} bytes; at most {SOURCE_BYTES_MAX} are taken")));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| TextError::Template(e.to_string()))?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_recursion_limit(RECURSION_MAX);
        env.set_unknown_method_callback(methods::call);
        env.add_filter("tojson", json::tojson);
        // No chat template needs these: the one indents nested values without paying fuel, the other shows our own state.
        env.remove_filter("pprint");
        env.remove_global("debug");
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            let raised = Raised(quote(&message));
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
        });
        let source = without_generation_blocks(source).into_owned();
        env.add_template_owned(NAME, source).map_err(|e| TextError::Template(describe(&e)))?;
        let developer = env.get_template(NAME).is_ok_and(|t| t.source().contains("developer"));
        let shape = Shape { text: true, parts: false, developer };
        let mut this = Self { env, bos: bos.to_owned(), eos: eos.to_owned(), shape };
        this.probe();
        Ok(this)
    }

    /// The prompt for a conversation.
    ///
    /// `messages` is a JSON array, `tools` a JSON array of definitions, `kwargs` a JSON object of further template
    /// variables, `today` a date like `2026-01-31` for templates that print one. The text may begin with the
    /// beginning-of-text token: whoever tokenizes it must not add a second one.
    pub fn render(
        &self,
        messages: &str,
        tools: Option<&str>,
        kwargs: Option<&str>,
        add_generation_prompt: bool,
        today: &str,
    ) -> Result<String, TextError> {
        let today: Date = today.parse().map_err(|_| TextError::Date(quote(today)))?;
        let bytes = messages.len() + tools.map_or(0, str::len) + kwargs.map_or(0, str::len);
        let conversation = Conversation::parse(messages)?;
        let mut context = parse_kwargs(kwargs)?;
        context.insert("tools".into(), parse_tools(tools)?);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let mut attempt = |form| {
            context.insert("messages".into(), conversation.shaped(self.shape, form));
            self.run(&context, bytes, today)
        };
        attempt(Form::Modern).or_else(|first| match first {
            // A second try is only worth it when the plain form differs from the modern one.
            TextError::Render(_) if messages.contains("tool_calls") => attempt(Form::Plain).map_err(|_| first),
            other => Err(other),
        })
    }

    fn run(
        &self,
        context: &serde_json::Map<String, serde_json::Value>,
        bytes: usize,
        today: Date,
    ) -> Result<String, TextError> {
        let mut env = self.env.clone();
        env.set_fuel(Some((FUEL_BASE + FUEL_PER_BYTE * bytes as u64).min(FUEL_MAX)));
        env.add_global("bos_token", self.bos.as_str());
        env.add_global("eos_token", self.eos.as_str());
        env.add_global("documents", ());
        env.add_function("strftime_now", move |format: &str| {
            if format.len() > DATE_FORMAT_BYTES_MAX {
                return Err(Error::new(ErrorKind::InvalidOperation, "strftime_now got a format that is too long"));
            }
            jiff::fmt::strtime::format(format, today.at(0, 0, 0, 0))
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        let rendered = env.get_template(NAME).and_then(|t| t.render(Value::from(Serde(context))));
        rendered.map_err(|e| match (e.kind(), raised(&e)) {
            (_, Some(message)) => TextError::Refused(message),
            (ErrorKind::OutOfFuel, _) => TextError::TooMuchWork,
            _ => TextError::Render(describe(&e)),
        })
    }

    /// Finds out whether the template takes content as a string, as an array of parts, or both.
    fn probe(&mut self) {
        let try_content = |content: serde_json::Value| {
            let messages = json!([{"role": "user", "content": content}]).to_string();
            // Both flags are on, so that the messages are passed as they are.
            let probed = Self { shape: Shape { text: true, parts: true, ..self.shape }, ..self.clone() };
            probed.render(&messages, None, None, true, "2000-01-01").ok()
        };
        let text = try_content(json!(PROBE)).is_some_and(|t| t.contains(PROBE));
        // A template that only prints content prints a whole array, with the names of its keys.
        let parts = try_content(json!([{"type": "text", "text": PROBE}]))
            .is_some_and(|t| t.contains(PROBE) && !t.contains("'type'") && !t.contains("\"type\""));
        self.shape = Shape { text: text || !parts, parts, ..self.shape };
    }
}

/// The message of a `raise_exception` among an error's causes.
fn raised(error: &Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// An error of the engine in one bounded line.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    quote(&text)
}

/// Some templates mark the assistant's text with `{% generation %}`, a tag of training code that prints nothing.
/// Here it becomes a condition that always holds, which keeps the whitespace control of the tag.
fn without_generation_blocks(source: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(len) = rest[open..].find("%}").map(|n| n + 2) else { break };
        let (before, tail) = rest.split_at(open);
        let (tag, after) = tail.split_at(len);
        let word = tag[2..len - 2].trim_matches(|c: char| matches!(c, '-' | '+') || c.is_whitespace());
        let replaced = match word {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_owned(),
        };
        out.push_str(before);
        out.push_str(&replaced);
        rest = after;
    }
    if out.is_empty() {
        return Cow::Borrowed(source);
    }
    out.push_str(rest);
    Cow::Owned(out)
}
