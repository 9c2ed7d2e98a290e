//! `capstan config` and `capstan completions`: what is set, and help for the shell.
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use serde_json::{Map, Value, json};

use crate::cli::{Cli, ModelFlags, NodeFlags};
use crate::config::Config;
use crate::view::{self, Table};

/// Shown by `capstan config --help`.
pub const CONFIG_EXAMPLES: &str = "\
Each value comes from its flag, else its CAPSTAN_* variable, else the config file, else its default.

Examples:
  capstan config
  capstan config --json
  CAPSTAN_MEMORY_LIMIT=96GiB capstan config --name alpha

A config file (~/.config/capstan/config.toml) with every kind of value:
  name = \"alpha\"
  api_addr = \"127.0.0.1:8420\"
  memory_limit = \"96GiB\"
  threads = 16
  decode_slowdown = 1.75";

/// Shown by `capstan completions --help`.
pub const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  capstan completions bash > ~/.local/share/bash-completion/completions/capstan
  capstan completions zsh > ~/.zfunc/_capstan
  capstan completions fish > ~/.config/fish/completions/capstan.fish";

/// Arguments of `capstan config`.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// Settings of a daemon.
    #[command(flatten)]
    pub node: NodeFlags,
    /// Settings of a load.
    #[command(flatten)]
    pub model: ModelFlags,
}

/// Arguments of `capstan completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Shows every setting.
pub fn config(config: &Config, json: bool) -> Result<ExitCode> {
    let shown = config.shown();
    if json {
        let values: Map<String, Value> = shown
            .into_iter()
            .map(|s| (s.key.to_string(), json!({ "value": s.json, "source": s.source.to_string() })))
            .collect();
        view::print_json(&json!({ "config_file": config.file, "settings": values }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["SETTING", "VALUE", "FROM"], &[]);
    for s in shown {
        table.row(vec![s.key.into(), s.text, s.source.to_string()]);
    }
    view::print_line(table.render(""))?;
    let file = match (&config.file, Config::default_file()) {
        (Some(path), _) => format!("Config file: {}", path.display()),
        (None, Some(path)) => format!("Config file: none (it would be {})", path.display()),
        (None, None) => "Config file: none".into(),
    };
    view::print_line(format!("\n{file}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a completion script.
pub fn completions(args: &CompletionsArgs) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "capstan", &mut script);
    view::print_line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(ExitCode::SUCCESS)
}
