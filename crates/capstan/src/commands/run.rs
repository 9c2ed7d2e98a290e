//! `capstan run`: chat with a model in the terminal, or one answer for a script.
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use capstan_proto::limits::PROMPT_BYTES_MAX;
use capstan_proto::manage::{ClusterStatus, Health, LoadRequest};
use capstan_proto::weights::PullRequest;
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};

use crate::chat::{Answer, Message, Piece, Stats};
use crate::cli::ModelFlags;
use crate::client::Client;
use crate::commands::plan::Wanted;
use crate::commands::{INTERRUPTED, models};
use crate::config::Config;
use crate::view;

/// Shown by `capstan run --help`.
pub const EXAMPLES: &str = "\
In the chat: Ctrl-C stops an answer, Ctrl-D or /bye leaves, /clear forgets the conversation.
With a PROMPT, or when standard input is not a terminal: one answer, then exit.

Examples:
  capstan run kimi
  capstan run hf:unsloth/Qwen3-8B-GGUF:Q4_K_M
  capstan run model.gguf --system \"Answer in one sentence.\" --temperature 0.2
  capstan run kimi \"Why is the sky blue?\" --verbose
  git diff | capstan run kimi --system \"Write a commit message for this change.\"";

const HELP: &str = "\
/bye     leave (also Ctrl-D)
/clear   forget the conversation
/help    this
Ctrl-C   stop an answer";

/// Lines of past prompts that are kept in the data folder.
const HISTORY_LINES_MAX: usize = 1000;

/// Arguments of `capstan run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// A model's name as `capstan status` or `capstan models` shows it, a GGUF file, or what `capstan pull` takes
    pub model: String,
    /// What to ask; `-` reads it from standard input
    pub prompt: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer [default: what the context holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// How freely it chooses; 0 always takes the likeliest token [default: 1]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Choose among the likeliest tokens whose probabilities sum to this [default: 1]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Choose among this many of the likeliest tokens; 0 is all [default: 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Drop tokens less likely than this share of the likeliest [default: 0]
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Divide the weight of recent tokens by this; 1 is off [default: 1]
    #[arg(long, value_name = "R")]
    pub repeat_penalty: Option<f64>,
    /// The same seed gives the same choices [default: random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u32>,
    /// End the answer before this text; may be given again
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Show time to first token and speeds after each answer
    #[arg(long, short)]
    pub verbose: bool,
    /// GGUF of a draft model, should the model have to be loaded
    #[arg(long, value_name = "DRAFT.gguf")]
    pub draft: Option<PathBuf>,
    /// What its placement is to be best at, should the model have to be loaded [default: latency]
    #[arg(long, value_enum)]
    pub objective: Option<Wanted>,
    /// Caches and scheduling, should the model have to be loaded.
    #[command(flatten)]
    pub model_flags: ModelFlags,
}

impl RunArgs {
    /// The members of a request that were asked for; the others are the daemon's to choose.
    fn sampling(&self) -> Map<String, Value> {
        let values = [
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("repeat_penalty", self.repeat_penalty.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("stop", (!self.stop.is_empty()).then(|| json!(self.stop))),
        ];
        values.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))).collect()
    }
}

/// Chats, or answers once.
pub async fn run(config: &Config, args: &RunArgs, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    let prompt = match args.prompt.as_deref() {
        Some("-") => Some(read_stdin()?),
        Some(text) => Some(text.to_string()),
        None if !std::io::stdin().is_terminal() => Some(read_stdin()?),
        None if json => bail!("--json wants a PROMPT, or a prompt on standard input"),
        None => None,
    };
    if prompt.as_ref().is_some_and(|p| p.trim().is_empty()) {
        bail!("the prompt is empty");
    }
    let Some(model) = ensure_loaded(&client, config, args).await? else {
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let mut chat = Chat { client, model, messages: Vec::new(), sampling: args.sampling(), verbose: args.verbose };
    chat.forget(args.system.as_deref());
    match prompt {
        Some(prompt) => once(&mut chat, prompt, json).await,
        None => converse(&mut chat, config, args.system.as_deref()).await,
    }
}

/// The name of the deployment to ask, loading it if need be. None when Ctrl-C came.
async fn ensure_loaded(client: &Client, config: &Config, args: &RunArgs) -> Result<Option<String>> {
    let status = client.status().await?;
    if let Some(name) = loaded_name(&status, &args.model) {
        return Ok(Some(name));
    }
    // Never as JSON: standard output is the answer's alone, and whoever watches sees the bars on standard error.
    let Some(path) = models::find(client, Path::new(&args.model), PullRequest::default(), false).await? else {
        return Ok(None);
    };
    let objective = args.objective.map(Wanted::into);
    let request = LoadRequest { objective, ..models::request(config, path, args.draft.as_deref())? };
    if let Some(id) = request.path.strip_prefix("pulled:")
        && let Some(served) = client
            .status()
            .await?
            .deployments
            .into_iter()
            .find(|d| (d.model_hash == id || d.name == id) && d.health != Health::Failed)
    {
        return Ok(Some(served.name));
    }
    Ok(models::follow(client, &request, false).await?.map(|deployment| deployment.name))
}

/// The deployment that a name or a path means, if there is one.
fn loaded_name(status: &ClusterStatus, model: &str) -> Option<String> {
    let file_name = PathBuf::from(model).file_name()?.to_str()?.to_string();
    let stem = file_name.strip_suffix(".gguf").unwrap_or(&file_name);
    let names = [model, stem, unsplit(stem)];
    let mut found = names.iter().filter_map(|name| status.deployments.iter().find(|d| d.name == *name));
    found.find(|d| d.health != Health::Failed).map(|d| d.name.clone())
}

/// A file's name without the `-00001-of-00008` of a split model.
fn unsplit(stem: &str) -> &str {
    let is_number = |s: &str| s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
    match stem.rsplit_once("-of-").and_then(|(rest, of)| Some((rest.rsplit_once('-')?, of))) {
        Some(((name, part), of)) if is_number(part) && is_number(of) => name,
        _ => stem,
    }
}

fn read_stdin() -> Result<String> {
    let mut text = String::new();
    let mut limited = std::io::stdin().lock().take(PROMPT_BYTES_MAX as u64 + 1);
    limited.read_to_string(&mut text).context("the prompt on standard input cannot be read; is it text?")?;
    if text.len() > PROMPT_BYTES_MAX {
        bail!("the prompt has more than {PROMPT_BYTES_MAX} bytes, which is the most that is taken");
    }
    // What `echo` adds is no part of the question.
    text.truncate(text.trim_end_matches(['\n', '\r']).len());
    Ok(text)
}

/// A conversation with one model.
struct Chat {
    client: Client,
    model: String,
    messages: Vec<Message>,
    sampling: Map<String, Value>,
    verbose: bool,
}

/// How an answer ended.
struct Ended {
    text: String,
    interrupted: bool,
    reason: Option<String>,
    stats: Option<Stats>,
}

impl Chat {
    fn forget(&mut self, system: Option<&str>) {
        self.messages = system.map(|text| Message::new("system", text)).into_iter().collect();
    }

    /// Asks, handing each piece of text on as it comes. Ctrl-C ends the answer; what was said so far stays said.
    async fn ask(&mut self, prompt: String, mut each: impl FnMut(&str) -> Result<()>) -> Result<Ended> {
        self.messages.push(Message::new("user", prompt));
        let mut ended = Ended { text: String::new(), interrupted: false, reason: None, stats: None };
        let answer = async {
            let mut answer = Answer::ask(&self.client, &self.model, &self.messages, &self.sampling).await?;
            while let Some(piece) = answer.next().await? {
                match piece {
                    Piece::Text(text) => {
                        each(&text)?;
                        ended.text.push_str(&text);
                    }
                    Piece::Done { reason, stats } => (ended.reason, ended.stats) = (reason, stats),
                }
            }
            anyhow::Ok(())
        };
        let outcome = tokio::select! {
            outcome = answer => outcome.map(|()| false),
            _ = tokio::signal::ctrl_c() => Ok(true),
        };
        match outcome {
            Ok(interrupted) => {
                ended.interrupted = interrupted;
                if interrupted && ended.text.is_empty() {
                    self.messages.pop();
                } else {
                    self.messages.push(Message::new("assistant", ended.text.clone()));
                }
                Ok(ended)
            }
            Err(e) => {
                // The question stays unanswered; asking it again must not ask it twice.
                self.messages.pop();
                Err(e)
            }
        }
    }
}

async fn once(chat: &mut Chat, prompt: String, json: bool) -> Result<ExitCode> {
    let to_terminal = std::io::stdout().is_terminal();
    let ended = chat.ask(prompt, |text| if json { Ok(()) } else { print_piece(text, to_terminal) }).await?;
    if json {
        view::print_json(&json!({
            "model": chat.model,
            "text": ended.text,
            "finish_reason": ended.reason,
            "stats": ended.stats,
        }))?;
    } else {
        view::print_line("")?;
        show_stats(chat, &ended);
    }
    Ok(if ended.interrupted { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

async fn converse(chat: &mut Chat, config: &Config, system: Option<&str>) -> Result<ExitCode> {
    let history = config.data_dir.value.join("chat-history");
    let settings = rustyline::Config::builder().max_history_size(HISTORY_LINES_MAX)?.auto_add_history(true).build();
    let mut editor = Some(DefaultEditor::with_config(settings)?);
    if let Some(editor) = &mut editor {
        // There is none the first time.
        editor.load_history(&history).ok();
    }
    eprintln!("Chatting with {}. /help shows the commands, Ctrl-D leaves.", view::plain(&chat.model));
    loop {
        let Some(mut reader) = editor.take() else { bail!("the line editor was lost") };
        // Reading a line blocks; the terminal must not hold up the runtime.
        let (reader, line) = tokio::task::spawn_blocking(move || {
            let line = reader.readline(">>> ");
            (reader, line)
        })
        .await?;
        editor = Some(reader);
        let line = match line {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => {
                eprintln!("(Ctrl-D or /bye leaves)");
                continue;
            }
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(e).context("the terminal cannot be read"),
        };
        match line.trim() {
            "" => continue,
            "/bye" | "/exit" | "/quit" => break,
            "/help" | "/?" => println!("{HELP}"),
            "/clear" => {
                chat.forget(system);
                println!("The conversation is forgotten.");
            }
            command if command.starts_with('/') && !command.contains(char::is_whitespace) => {
                println!("There is no command {command}; /help shows them.");
            }
            _ => match chat.ask(line, |text| print_piece(text, true)).await {
                Ok(ended) => {
                    println!("{}", if ended.interrupted { " (stopped)" } else { "" });
                    show_stats(chat, &ended);
                    println!();
                }
                Err(e) if view::is_broken_pipe(&e) => return Err(e),
                Err(e) => eprintln!("\n{}{e:#}\n", view::ERROR_PREFIX),
            },
        }
    }
    if let Some(mut editor) = editor
        && let Err(e) = editor.save_history(&history)
    {
        tracing::warn!("the history of prompts could not be saved: {e}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints text as it comes. To a terminal it goes without control characters, with which a model could steer it.
fn print_piece(text: &str, to_terminal: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if to_terminal {
        write!(out, "{}", view::plain_text(text))?
    } else {
        write!(out, "{text}")?
    }
    out.flush()?;
    Ok(())
}

fn show_stats(chat: &Chat, ended: &Ended) {
    if ended.reason.as_deref() == Some("length") {
        eprintln!("(the answer was cut at its longest: --max-tokens, or the context)");
    }
    if chat.verbose {
        match &ended.stats {
            Some(stats) => eprintln!("{}", stats.line()),
            None => eprintln!("no measurements came with this answer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_number_of_a_split_file_is_no_part_of_its_name() {
        assert_eq!(unsplit("kimi-00001-of-00008"), "kimi");
        for whole in ["kimi", "best-of-breed", "kimi-1-of-2", ""] {
            assert_eq!(unsplit(whole), whole);
        }
    }
}
