//! `capstan pair`, and the pairing part of `capstan join`: a short code instead of a ticket.
use std::io::{IsTerminal, Read};
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use capstan_cluster::PairingCode;
use capstan_proto::manage::ClusterStatus;
use capstan_proto::pairing::{NearbyNode, PairingReply};
use clap::Args;

use crate::client::Client;
use crate::config::{BIND_PORT, Config};
use crate::view;

/// Shown by `capstan pair --help`.
pub const EXAMPLES: &str = "\
The code lets one machine join. It works once, and is useless after three wrong tries.

Examples:
  capstan pair                    then, on the other machine: capstan join CODE
  capstan pair --ttl 30m          good for longer than the usual 10 minutes";

/// How long a code is good unless told otherwise, in seconds: time to walk to the other machine.
pub const TTL_S: u64 = 600;
/// Longest word that is read from standard input, in bytes: a ticket has less than a tenth of it.
const WORD_BYTES_MAX: u64 = 64 << 10;

/// Arguments of `capstan pair`.
#[derive(Args, Debug)]
pub struct PairArgs {
    /// How long the code is good, such as 90s or 30m; at most an hour
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = super::cluster::parse_ttl)]
    pub ttl: u64,
}

/// Opens a pairing and shows its code.
pub async fn pair(config: &Config, args: &PairArgs, json: bool) -> Result<ExitCode> {
    let reply = Client::find(&config.data_dir.value)?.open_pairing(args.ttl).await?;
    if json {
        view::print_json(&reply)?;
    } else {
        view::print_line(describe(&reply, args.ttl))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What to do with a code.
pub fn describe(reply: &PairingReply, ttl_s: u64) -> String {
    let code = view::plain(&reply.code);
    let valid = view::seconds(ttl_s);
    let at = reply.at.iter().find(|a| !a.ip().is_loopback() && a.is_ipv4()).or(reply.at.first());
    let (line, elsewhere) = match at {
        Some(at) if reply.mdns => {
            (format!("capstan join {code}"), format!(" If this machine is not found, add --at {at}."))
        }
        Some(at) => (format!("capstan join {code} --at {at}"), String::new()),
        None => (format!("capstan join {code}"), String::new()),
    };
    format!(
        "\nOn another machine of this network, run:\n\n  {line}\n\nThe code works once, for {valid}; `capstan pair` \
         shows another.{elsewhere}"
    )
}

/// The code or ticket that a command was given: as an argument, from standard input (`-`), or by asking.
pub async fn word(given: Option<&str>, client: impl AsyncFnOnce() -> Result<Client>, at: bool) -> Result<String> {
    let word = match given {
        Some("-") => {
            let mut word = String::new();
            std::io::stdin().take(WORD_BYTES_MAX).read_to_string(&mut word).context("standard input cannot be read")?;
            word
        }
        Some(word) => word.to_owned(),
        None => {
            if !at {
                let found = client().await?.nearby().await?;
                if found.is_empty() {
                    bail!(
                        "no machine of this network waits to be joined; run `capstan pair` on a member, then `capstan \
                         join CODE` here (with --at HOST:PORT where multicast DNS does not get through)"
                    );
                }
                eprintln!("{}", list(&found));
            }
            if !std::io::stdin().is_terminal() {
                bail!("nobody is there to type the code; run `capstan join CODE`");
            }
            eprint!("Code: ");
            tokio::task::spawn_blocking(|| {
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).map(|_| line)
            })
            .await?
            .context("standard input cannot be read")?
        }
    };
    // Copied from a terminal, a ticket may come with line breaks in it.
    let word: String = word.split_whitespace().collect();
    if word.is_empty() {
        bail!("there is no code; run the line that `capstan pair` or `capstan ticket` printed on a member");
    }
    Ok(word)
}

fn list(found: &[NearbyNode]) -> String {
    let lines = found.iter().map(|n| format!("  {} (its code begins with {})", view::plain(&n.name), n.plate));
    format!("These wait to be joined:\n{}", lines.collect::<Vec<_>>().join("\n"))
}

/// Joins by a code.
pub async fn join(client: &Client, code: &str, at: Option<SocketAddr>) -> Result<ClusterStatus> {
    Ok(client.join_by_code(code, at).await?)
}

/// Whether a word is a code and not a ticket; a mistyped one is refused here, before anything is started for it.
pub fn is_code(word: &str) -> Result<bool> {
    if !PairingCode::looks_like(word) {
        return Ok(false);
    }
    word.parse::<PairingCode>()?;
    Ok(true)
}

/// Where `--at` points: a name or an address, with the port of nodes unless another is said.
pub async fn resolve(at: &str) -> Result<SocketAddr> {
    let with_port = match at.parse::<std::net::IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, BIND_PORT).to_string(),
        Err(_) if at.parse::<SocketAddr>().is_ok() => at.to_owned(),
        Err(_) if at.contains(':') => at.to_owned(),
        Err(_) => format!("{at}:{BIND_PORT}"),
    };
    let mut found = tokio::net::lookup_host(&with_port)
        .await
        .with_context(|| format!("{at:?} is no address that is known here; write HOST or HOST:PORT"))?;
    found.next().with_context(|| format!("{at:?} has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_at_points() {
        for (text, want) in [
            ("127.0.0.1", "127.0.0.1:8421"),
            ("127.0.0.1:9", "127.0.0.1:9"),
            ("::1", "[::1]:8421"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(resolve(text).await.unwrap().to_string(), want);
        }
        assert!(resolve("127.0.0.1:x").await.is_err());
    }

    #[test]
    fn a_word_is_a_code_or_a_ticket() {
        assert!(is_code("42-K7QM2X").unwrap() && !is_code("capstan1abc").unwrap());
        assert!(is_code("42-K7QM2").unwrap_err().to_string().contains("too short"));
    }

    #[test]
    fn the_line_to_run_says_where_when_nobody_finds_it() {
        let mut reply = PairingReply {
            code: "42-K7QM2X".into(),
            expires_unix_s: 1,
            at: vec!["127.0.0.1:1".parse().unwrap(), "10.0.0.1:8421".parse().unwrap()],
            mdns: false,
        };
        assert!(describe(&reply, 600).contains("  capstan join 42-K7QM2X --at 10.0.0.1:8421\n"));
        reply.mdns = true;
        let shown = describe(&reply, 600);
        assert!(shown.contains("  capstan join 42-K7QM2X\n") && shown.contains("for 10 minutes"), "{shown}");
        assert!(!format!("{reply:?}").contains("K7QM2X"));
    }
}
