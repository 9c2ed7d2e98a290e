//! `capstan pull`: brings a model into the cluster.
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use capstan_proto::LayerRange;
use capstan_proto::weights::{PullEvent, PullRequest, PulledFile, REPLICAS_MAX};
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::client::Client;
use crate::commands::{INTERRUPTED, models};
use crate::config::Config;
use crate::view;

/// Shown by `capstan pull --help`.
pub const EXAMPLES: &str = "\
Each node fetches only the layers that it is to hold, and each byte comes from outside once for the whole cluster. A
pull that was cut off goes on where it stopped when it is repeated. HF_ENDPOINT, HF_TOKEN and HF_HOME of the daemon's
environment say which hub is asked, and as whom.

Examples:
  capstan pull hf:unsloth/Qwen3-8B-GGUF:Q4_K_M
  capstan pull hf:unsloth/Kimi-K2.5-GGUF:UD-Q2_K_XL@main --name kimi --nodes alpha,beta,gamma,delta
  capstan pull https://example.org/model.gguf --replicas 1
  capstan pull file:model.gguf --name mine";

/// How often a bar moves by itself, so that a long wait does not look like a hang.
const TICK: Duration = Duration::from_millis(120);

/// Arguments of `capstan pull`.
#[derive(Args, Debug)]
pub struct PullArgs {
    /// What is pulled.
    #[arg(help = "hf:OWNER/REPO[:QUANT][@REVISION], an address, or file:PATH")]
    pub source: String,
    /// What to call it [default: its file's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Nodes that are to hold its layers, in pipeline order [default: as many as it needs]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub nodes: Vec<String>,
    /// Layers of each node, in pipeline order, such as A=0..10,B=10..30 [default: as a load would place them]
    #[arg(long, value_name = "A=0..10,B=10..30", value_delimiter = ',', value_parser = models::parse_layers)]
    pub layers: Vec<(String, LayerRange)>,
    /// How many nodes are to have a copy of each layer, where their disks allow it [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(REPLICAS_MAX)))]
    pub replicas: Option<u16>,
}

/// Pulls a model and shows how it goes.
pub async fn run(config: &Config, args: &PullArgs, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    let request = PullRequest {
        source: source(&args.source)?,
        name: args.name.clone(),
        nodes: if args.layers.is_empty() { args.nodes.clone() } else { Vec::new() },
        layers: args.layers.clone(),
        replicas: args.replicas,
    };
    match follow(&client, &request, json).await? {
        Some(name) => {
            if !json {
                let name = view::plain(&name);
                view::print_line(format!("{name} is here; serve it: capstan load {name}"))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::from(INTERRUPTED)),
    }
}

/// The source as the daemon takes it: a path is made whole, for the daemon works in another folder.
pub fn source(text: &str) -> Result<String> {
    match text.strip_prefix("file:") {
        Some(path) => {
            let path = path.strip_prefix("//").unwrap_or(path);
            Ok(format!("file:{}", models::model_path(std::path::Path::new(path))?))
        }
        None if std::path::Path::new(text).is_file() => {
            Ok(format!("file:{}", models::model_path(std::path::Path::new(text))?))
        }
        None => Ok(text.to_owned()),
    }
}

/// Pulls, showing progress, and gives the model's name. None when Ctrl-C came: the pull then goes on without this command.
pub async fn follow(client: &Client, request: &PullRequest, json: bool) -> Result<Option<String>> {
    let mut shown = Shown::new(json);
    let pull = async {
        let mut events = client.pull(request).await?;
        while let Some(event) = events.next().await? {
            shown.show(&event)?;
            match event {
                PullEvent::Done { name, .. } => return Ok(name),
                PullEvent::Failed { message } => bail!("{}", view::plain_text(&message)),
                _ => {}
            }
        }
        bail!("the daemon stopped telling about the pull before it was done; repeat the command, it goes on")
    };
    let outcome = tokio::select! {
        name = pull => name.map(Some),
        _ = tokio::signal::ctrl_c() => Ok(None),
    };
    // The bars would be drawn over what follows.
    drop(shown);
    if matches!(outcome, Ok(None)) {
        eprintln!("the pull goes on in the background; `capstan models` shows what is here");
    }
    outcome
}

/// Shows the events of a pull on standard error; with JSON, on standard output.
struct Shown {
    json: bool,
    bars: Option<MultiProgress>,
    files: Vec<(PulledFile, Option<ProgressBar>)>,
    /// Of each file what is there, and how much of that came from outside in all.
    done: Vec<u64>,
    total: Option<ProgressBar>,
    verifying: Option<ProgressBar>,
}

impl Shown {
    fn new(json: bool) -> Self {
        let bars = (!json && std::io::stderr().is_terminal()).then(MultiProgress::new);
        Self { json, bars, files: Vec::new(), done: Vec::new(), total: None, verifying: None }
    }

    fn show(&mut self, event: &PullEvent) -> Result<()> {
        if self.json {
            return view::print_line(serde_json::to_string(event)?);
        }
        match event {
            PullEvent::Planned { name, revision, bytes, files } => {
                let at = revision.as_ref().map(|r| format!(" at {}", view::plain(r))).unwrap_or_default();
                let files_word = if files.len() == 1 { "file" } else { "files" };
                self.say(&format!(
                    "{}{at}: {}, in {} {files_word}",
                    view::plain(name),
                    view::bytes(*bytes),
                    files.len()
                ));
                self.plan(files);
            }
            PullEvent::Progress { file, done_bytes, total_bytes, outside_bytes } => {
                self.step(usize::from(*file), *done_bytes, *total_bytes, *outside_bytes);
            }
            PullEvent::Verifying { done_bytes, total_bytes } => self.verify(*done_bytes, *total_bytes),
            PullEvent::Done { outside_bytes, .. } => {
                self.close();
                self.say(&format!("verified; {} came from outside", view::bytes(*outside_bytes)));
            }
            PullEvent::Failed { .. } => self.close(),
        }
        Ok(())
    }

    fn bar(&self, label: String, len: u64, style: &str) -> Option<ProgressBar> {
        let bar = self.bars.as_ref()?.add(ProgressBar::new(len.max(1)).with_prefix(label));
        // The templates are constants, so the plain style is never what is seen.
        let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.enable_steady_tick(TICK);
        Some(bar)
    }

    fn plan(&mut self, files: &[PulledFile]) {
        for file in files {
            let label = format!("{}: {}", view::plain(&file.node_name), view::plain(&file.what));
            if self.bars.is_none() {
                eprintln!("{label}, {}", view::bytes(file.bytes));
            }
            let bar = self.bar(label, file.bytes, FILE_BAR);
            self.files.push((file.clone(), bar));
        }
        self.done = vec![0; files.len()];
        if files.len() > 1 {
            self.total = self.bar("in all".into(), files.iter().map(|f| f.bytes).sum(), FILE_BAR);
        }
    }

    fn step(&mut self, file: usize, done: u64, total: u64, outside: u64) {
        let (Some((known, bar)), Some(so_far)) = (self.files.get(file), self.done.get_mut(file)) else { return };
        let complete = done >= total && *so_far < total;
        *so_far = done;
        match bar {
            Some(bar) => bar.set_position(done.min(total)),
            None if complete => eprintln!("{}: {} is there", view::plain(&known.node_name), view::plain(&known.what)),
            None => {}
        }
        if let Some(bar) = &self.total {
            bar.set_position(self.done.iter().sum());
            bar.set_message(format!("{} from outside", view::bytes(outside)));
        }
    }

    fn verify(&mut self, done: u64, total: u64) {
        if self.verifying.is_none() {
            self.verifying = self.bar("verifying".into(), total, FILE_BAR);
            if self.bars.is_none() {
                eprintln!("verifying {}", view::bytes(total));
            }
        }
        if let Some(bar) = &self.verifying {
            bar.set_position(done);
        }
    }

    fn say(&self, line: &str) {
        match &self.bars {
            Some(bars) if bars.println(line).is_ok() => {}
            _ => eprintln!("{line}"),
        }
    }

    fn close(&mut self) {
        let files = self.files.iter().filter_map(|(_, bar)| bar.as_ref());
        for bar in files.chain(&self.total).chain(&self.verifying).filter(|bar| !bar.is_finished()) {
            bar.abandon();
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.close();
    }
}

const FILE_BAR: &str = "{prefix}  [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_valid_and_sources_elsewhere_are_left_alone() {
        assert!(ProgressStyle::with_template(FILE_BAR).is_ok());
        assert_eq!(source("hf:o/r:Q4_K_M@main").unwrap(), "hf:o/r:Q4_K_M@main");
        assert!(source("file:/no/such.gguf").unwrap_err().to_string().contains("there is no file"));
    }
}
