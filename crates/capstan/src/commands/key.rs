//! `capstan key`: what other machines show to use this API.
use std::process::ExitCode;

use anyhow::Result;
use capstan_proto::keys::KeyInfo;
use clap::{Args, Subcommand};
use serde_json::json;

use crate::client::Client;
use crate::config::Config;
use crate::view::{self, Table};

/// Shown by `capstan key --help`.
pub const EXAMPLES: &str = "\
A key is good at every node of the cluster. The API asks for one on the address of `capstan up --listen`; on this
machine itself no key is needed to use models.

Examples:
  capstan key add laptop               prints the key, this once
  capstan key add ops --manage         one that may also load, unload, and make keys
  capstan key list
  capstan key revoke laptop            refused everywhere from then on, for ever";

/// Arguments of `capstan key`.
#[derive(Args, Debug)]
pub struct KeyArgs {
    /// What to do with keys.
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it; it is not shown again
    Add {
        /// A name to know it by: letters, digits, dots, dashes, underscores
        #[arg(value_parser = key_name)]
        name: String,
        /// Let its holder manage the cluster, too: load, unload, tickets, keys, stop
        #[arg(long)]
        manage: bool,
    },
    /// Show all keys, without what is secret of them
    List,
    /// Make a key useless, at every node and for ever
    Revoke {
        /// Its name
        #[arg(value_parser = key_name)]
        name: String,
    },
}

/// Runs `capstan key`.
pub async fn run(config: &Config, args: &KeyArgs, json: bool) -> Result<ExitCode> {
    let client = Client::find(&config.data_dir.value)?;
    match &args.command {
        KeyCommand::Add { name, manage } => {
            let made = client.add_key(name, *manage).await?;
            if json {
                view::print_json(&made)?;
            } else {
                // The key alone goes to standard output, so that a script can take it.
                view::print_line(view::plain(&made.key))?;
                eprintln!(
                    "This is the only time it is shown. Clients send it as `Authorization: Bearer …` (in OpenAI \
                     clients: api_key); `capstan key revoke {name}` makes it useless."
                );
            }
        }
        KeyCommand::List => {
            let keys = client.keys().await?;
            if json { view::print_json(&keys)? } else { view::print_line(table(&keys))? }
        }
        KeyCommand::Revoke { name } => {
            client.revoke_key(name).await?;
            if json {
                view::print_json(&json!({ "revoked": name }))?;
            } else {
                view::print_line(format!(
                    "{name} is refused from now on, for ever; nodes that are away hear of it when they are back"
                ))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(keys: &[KeyInfo]) -> String {
    if keys.is_empty() {
        return "There is no API key; `capstan key add NAME` makes one.".into();
    }
    let mut table = Table::new(&["NAME", "SCOPE", "MADE", "STATE", "FINGERPRINT"], &[]);
    for key in keys {
        let state = key.revoked_unix_s.map_or("good".into(), |at| format!("revoked {}", view::date(at)));
        let made = view::date(key.created_unix_s);
        table.row(vec![key.name.clone(), key.scope.word().into(), made, state, key.fingerprint.clone()]);
    }
    table.render("")
}

fn key_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    if !text.is_empty() && text.chars().all(fits) {
        return Ok(text.into());
    }
    Err(format!("{text:?} is no name for a key; take letters, digits, dots, dashes or underscores"))
}

#[cfg(test)]
mod tests {
    use capstan_proto::keys::KeyScope;

    use super::*;

    #[test]
    fn keys_are_shown_with_their_state() {
        let key = |name: &str, revoked_unix_s| KeyInfo {
            name: name.into(),
            fingerprint: "0123456789".into(),
            scope: KeyScope::Use,
            created_unix_s: 0,
            revoked_unix_s,
        };
        let shown = table(&[key("laptop", None), key("phone", Some(86_400))]);
        assert!(shown.contains("laptop  use    1970-01-01  good"), "{shown}");
        assert!(shown.contains("revoked 1970-01-02"), "{shown}");
        assert!(table(&[]).contains("capstan key add"));
        assert!(key_name("a/b").is_err() && key_name("..%2f").is_err() && key_name("lap-top_1.x").is_ok());
    }
}
