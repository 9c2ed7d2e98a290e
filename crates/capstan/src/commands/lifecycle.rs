//! `capstan up` and `capstan stop`: the daemon's process, from outside.
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use capstan_proto::manage::TicketReply;
use clap::Args;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::cli::NodeFlags;
use crate::client::{Client, ClientError};
use crate::commands::{daemon, pair};
use crate::config::{Config, Source};
use crate::daemon_file::{Lock, log_path};
use crate::view;

/// Shown by `capstan up --help`.
pub const UP_EXAMPLES: &str = "\
The daemon goes on in the background; `capstan stop` ends it. The printed `capstan join` line is for the other machines.

Examples:
  capstan up
  capstan up --name alpha --memory-limit 96GiB
  capstan up --listen 0.0.0.0             let other machines use the API, with keys (`capstan key add NAME`)
  capstan up --foreground                 for systemd and containers; Ctrl-C or SIGTERM stops it";

/// Shown by `capstan stop --help`.
pub const STOP_EXAMPLES: &str = "\
Answers in progress here are let finish for up to a minute; answers elsewhere that need this machine wait until it is
back. Stages on this machine end with the daemon. It stays a member of its cluster and returns with `capstan up`;
`capstan leave` is the way out.

Examples:
  capstan stop
  capstan stop --now                      without waiting for answers in progress
  capstan stop --data-dir /srv/capstan";

/// How long a daemon may take to answer: it looks at every device of the machine first.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stopped daemon's process may linger: its stages end first.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);
/// When a stop that waits for something says so.
const STOP_IS_LONG: Duration = Duration::from_secs(2);
/// Between two looks at a process or a file that cannot be waited for.
const POLL: Duration = Duration::from_millis(50);
/// Size from which a new daemon begins a new log, in bytes. One older log is kept.
const LOG_BYTES_MAX: u64 = 16 << 20;
/// How much of a failed daemon's log is searched for its last words, in bytes.
const LOG_TAIL_BYTES: u64 = 64 << 10;
/// How long the ticket that `capstan up` prints is good, in seconds: time to walk to the other machines.
const UP_TICKET_TTL_S: u64 = 3600;

/// Arguments of `capstan up`.
#[derive(Args, Debug)]
pub struct UpArgs {
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    pub foreground: bool,
    /// Settings of the daemon.
    #[command(flatten)]
    pub node: NodeFlags,
}

/// Arguments of `capstan stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    /// Cut answers in progress off
    #[arg(long)]
    pub now: bool,
}

/// Starts the daemon unless it runs, and prints how others join.
pub async fn up(config: &Config, args: &UpArgs, json: bool) -> Result<ExitCode> {
    if args.foreground {
        return foreground(config, json).await;
    }
    let (client, started) = ensure_up(config).await?;
    announce(&client, config, started, json, true).await?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the daemon to end and waits until its process is gone.
pub async fn stop(config: &Config, args: &StopArgs, json: bool) -> Result<ExitCode> {
    let client = match Client::find(&config.data_dir.value) {
        Ok(client) => client,
        Err(ClientError::NotRunning | ClientError::Stale { .. }) => {
            if json {
                view::print_json(&json!({ "stopped": false }))?;
            } else {
                view::print_line("no daemon is running here; there is nothing to stop")?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Err(e) => return Err(e.into()),
    };
    let pid = client.daemon().pid;
    let stopping = client.stop(args.now);
    tokio::pin!(stopping);
    let stopping = tokio::select! {
        done = &mut stopping => done,
        () = sleep(STOP_IS_LONG) => {
            eprintln!("waiting for answers in progress; `capstan stop --now` cuts them off");
            stopping.await
        }
    };
    // A daemon that is on its way out already may close the connection: what counts is that its process ends.
    if let Err(e) = stopping
        && crate::os::is_alive(pid)
        && matches!(e, ClientError::Refused { .. } | ClientError::Malformed(_))
    {
        return Err(e.into());
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while crate::os::is_alive(pid) {
        if Instant::now() > deadline {
            bail!(
                "the daemon (process {pid}) has not ended after {} s; see {}, or end the process yourself",
                STOP_TIMEOUT.as_secs(),
                log_path(&config.data_dir.value).display()
            );
        }
        sleep(POLL).await;
    }
    if json {
        view::print_json(&json!({ "stopped": true, "pid": pid }))?;
    } else {
        view::print_line("the daemon has stopped")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A client of this machine's daemon, which is started if need be; and whether it was.
pub async fn ensure_up(config: &Config) -> Result<(Client, bool)> {
    let data_dir = &config.data_dir.value;
    make_data_dir(data_dir)?;
    // Two commands that start a daemon at once: the second waits, and then finds the first one's daemon.
    let _starting = start_lock(data_dir).await?;
    if let Ok(client) = Client::find(data_dir)
        && client.healthy().await
    {
        return Ok((client, false));
    }
    Ok((start(config).await?, true))
}

async fn foreground(config: &Config, json: bool) -> Result<ExitCode> {
    let data_dir = &config.data_dir.value;
    make_data_dir(data_dir)?;
    if let Ok(client) = Client::find(data_dir)
        && client.healthy().await
    {
        announce(&client, config, false, json, interactive(json)).await?;
        bail!("the daemon is running in the background already; `capstan stop` ends it");
    }
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let announced = async {
        if is_ready.await.is_ok() {
            announce(&Client::find(data_dir)?, config, true, json, interactive(json)).await?;
        }
        anyhow::Ok(())
    };
    let (ended, announced) = tokio::join!(daemon::run(config, Some(ready)), announced);
    if let Err(e) = announced {
        tracing::warn!("the join line could not be printed: {e:#}");
    }
    ended
}

/// Whether somebody reads what a daemon in the foreground prints. A service manager writes it into a log, where no
/// code and no ticket belongs.
fn interactive(json: bool) -> bool {
    json || std::io::stdout().is_terminal()
}

/// Says that the daemon is up, and, to whoever may know (`secrets`), how other machines join.
async fn announce(client: &Client, config: &Config, started: bool, json: bool, secrets: bool) -> Result<()> {
    let status = client.status().await?;
    let name = status.nodes.iter().find(|n| n.is_self).map_or(config.name.value.clone(), |n| n.name.clone());
    if !secrets {
        return view::print_line(format!(
            "capstan is up: node {}, API {}\n`capstan pair` and `capstan ticket` let other machines join",
            view::plain(&name),
            client.openai_url()
        ));
    }
    let ticket = client.ticket(UP_TICKET_TTL_S, true).await?;
    let pairing = client.open_pairing(pair::TTL_S).await?;
    if json {
        return view::print_json(&json!({
            "name": name,
            "pid": client.daemon().pid,
            "api": client.openai_url(),
            "listen": client.daemon().listen,
            "data_dir": config.data_dir.value,
            "already_running": !started,
            "ticket": ticket.ticket,
            "ticket_expires_unix_s": ticket.expires_unix_s,
            "join": format!("capstan join {}", ticket.ticket),
            "pairing": pairing,
        }));
    }
    let what = if started { "capstan is up" } else { "capstan is up already" };
    view::print_line(format!("{what}: node {}, API {}", view::plain(&name), client.openai_url()))?;
    if !started {
        let daemon_settings = [&config.name.source, &config.api_addr.source, &config.bind_addr.source];
        let doors = [&config.listen.source, &config.no_auth.source, &config.no_mdns.source];
        let others = [&config.threads.source, &config.memory_limit.source, &config.gpu_layers.source];
        if daemon_settings.iter().chain(&doors).chain(&others).any(|s| matches!(s, Source::Flag(_))) {
            eprintln!(
                "note: the running daemon keeps its settings; `capstan stop` and `capstan up` start it with new ones"
            );
        }
        view::print_line(format!("\n{}", super::cluster::describe(&status)))?;
    }
    if let Some(listen) = client.daemon().listen {
        let open = started && config.no_auth.value;
        let who = if open { "for everybody" } else { "with a key (`capstan key add NAME`)" };
        view::print_line(format!("API for other machines: http://{listen}/v1, {who}"))?;
    }
    view::print_line(pair::describe(&pairing, pair::TTL_S))?;
    print_join_line("Or, from anywhere, by ticket", &ticket, UP_TICKET_TTL_S)
}

/// Prints the line that other machines (`who`) run, and how long it is good.
pub fn print_join_line(who: &str, ticket: &TicketReply, ttl_s: u64) -> Result<()> {
    let uses = if ticket.reusable { "on any number of machines" } else { "once" };
    let valid = view::seconds(ttl_s);
    view::print_line(format!(
        "\n{who}:\n\n  capstan join {}\n\nThe ticket works {uses} for {valid}; `capstan ticket` makes another.",
        view::plain(&ticket.ticket)
    ))
}

fn make_data_dir(data_dir: &Path) -> Result<()> {
    crate::os::create_private_dir(&data_dir.join("logs")).with_context(|| {
        format!("the data folder {} cannot be made; choose another with --data-dir", data_dir.display())
    })
}

async fn start_lock(data_dir: &Path) -> Result<File> {
    let context = "the data folder cannot be locked";
    if let Some(lock) = Lock::Start.try_take(data_dir).context(context)? {
        return Ok(lock);
    }
    eprintln!("another capstan is starting the daemon; waiting for it");
    let data_dir = data_dir.to_path_buf();
    tokio::task::spawn_blocking(move || Lock::Start.take(&data_dir)).await?.context(context)
}

async fn start(config: &Config) -> Result<Client> {
    let data_dir = &config.data_dir.value;
    let path = log_path(data_dir);
    let (log, log_start) = open_log(&path).with_context(|| format!("the log {} cannot be written", path.display()))?;
    let mut child = spawn(config, log)?;
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(status) = child.try_wait()? {
            match last_error(&path, log_start) {
                Some(sentence) => bail!("the daemon did not start: {sentence}"),
                None => bail!("the daemon did not start ({status}); its log is {}", path.display()),
            }
        }
        if let Ok(client) = Client::find(data_dir)
            && client.daemon().pid == child.id()
            && client.healthy().await
        {
            return Ok(client);
        }
        if Instant::now() > deadline {
            child.kill().ok();
            child.wait().ok();
            bail!(
                "the daemon did not answer within {} s and was ended again; its log is {}",
                START_TIMEOUT.as_secs(),
                path.display()
            );
        }
        sleep(POLL).await;
    }
}

/// Starts the daemon's process with every setting spelled out, so that it comes to the same values.
fn spawn(config: &Config, log: File) -> Result<Child> {
    let exe =
        std::env::current_exe().context("the path of this program is unknown, so the daemon cannot be started")?;
    let mut command = Command::new(exe);
    command.arg("daemon").arg("--data-dir").arg(&config.data_dir.value);
    if let Some(file) = &config.file {
        command.arg("--config").arg(file);
    }
    let node_keys = [
        "name",
        "api_addr",
        "listen",
        "no_auth",
        "bind_addr",
        "no_mdns",
        "threads",
        "memory_limit",
        "disk_limit",
        "snapshot_limit",
        "gpu_layers",
        "measure",
        "log_level",
        "log_format",
    ];
    for setting in config.shown().into_iter().filter(|s| node_keys.contains(&s.key)) {
        // A default stays one: the node may know better, such as the name it had before.
        if setting.source != Source::Default {
            command.arg(format!("--{}={}", setting.key.replace('_', "-"), setting.text));
        }
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // The data folder is there as long as the daemon; the folder of this command may be gone tomorrow.
    command.current_dir(&config.data_dir.value);
    crate::os::detach(&mut command);
    command.spawn().context("the daemon's process cannot be started")
}

/// The log to append to, and where in it the new daemon's lines begin.
fn open_log(path: &Path) -> std::io::Result<(File, u64)> {
    let len = std::fs::metadata(path).map_or(0, |m| m.len());
    let begin_anew = len > LOG_BYTES_MAX;
    if begin_anew {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    let log = File::options().create(true).append(true).open(path)?;
    Ok((log, if begin_anew { 0 } else { len }))
}

/// The last error sentence that a process wrote into its log.
fn last_error(path: &Path, from: u64) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let len = log.metadata().ok()?.len();
    log.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_TAIL_BYTES)))).ok()?;
    let mut bytes = Vec::new();
    log.take(LOG_TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let start = text.rfind(&format!("\n{}", view::ERROR_PREFIX)).map(|at| at + 1).or_else(|| {
        // It may be the very first line.
        text.starts_with(view::ERROR_PREFIX).then_some(0)
    })?;
    let sentence = text[start + view::ERROR_PREFIX.len()..].trim();
    (!sentence.is_empty()).then(|| view::plain_text(sentence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_this_start_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.log");
        assert_eq!(last_error(&path, 0), None);
        std::fs::write(&path, "error: of yesterday\n").unwrap();
        let (mut log, start) = open_log(&path).unwrap();
        assert_eq!((last_error(&path, 0).as_deref(), last_error(&path, start)), (Some("of yesterday"), None));
        std::io::Write::write_all(&mut log, b"INFO x\nerror: port 1 is taken; choose another\n").unwrap();
        assert_eq!(last_error(&path, start).as_deref(), Some("port 1 is taken; choose another"));
    }
}
