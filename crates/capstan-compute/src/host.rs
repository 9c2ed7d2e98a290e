//! The daemon's side of a compute child: start it, exchange messages, notice its end at once.
use std::ffi::OsString;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use capstan_proto::child::{FromChild, StageSpec, ToChild};
use capstan_proto::codec::{self, CodecError};
use capstan_proto::device::DeviceProfile;
use capstan_proto::limits;
use capstan_proto::manage::DeviceStatus;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdout, Command};
use tokio::sync::{Notify, mpsc, watch};

use crate::os;

/// Messages that wait for the child's standard input. The child reads them at once, so a longer queue means it hangs.
const TO_CHILD_QUEUE: usize = 64;
/// Longest line of the child's log that is kept or forwarded, in bytes.
const LOG_LINE_BYTES_MAX: usize = 4096;

/// How to start a child.
#[derive(Clone, Debug)]
pub struct SpawnOptions {
    /// Program and arguments; usually this very binary and `compute`.
    pub command: Vec<OsString>,
    /// Put before each line of its log.
    pub label: String,
}

/// Why a child could not be started or reached.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The command is empty.
    #[error("no command is given to start a compute process")]
    NoCommand,
    /// The operating system refused.
    #[error(
        "the compute process {program:?} could not be started: {source}; is the capstan binary still in its place?"
    )]
    Spawn {
        /// What was started.
        program: OsString,
        /// Why not.
        source: std::io::Error,
    },
    /// It is gone. The stage is lost: start another child.
    #[error("the compute process has ended")]
    Ended,
    /// A message is too large to send; nothing was sent.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// It answered nonsense.
    #[error("the compute process gave no answer that makes sense: {0}")]
    Answer(String),
}

/// Sends messages to a child. Cheap to clone; when the last one is dropped, the child's standard input closes and it
/// ends.
#[derive(Clone, Debug)]
pub struct ChildSender {
    pid: u32,
    frames: mpsc::Sender<Vec<u8>>,
    kill: Arc<Notify>,
}

/// Receives a child's messages, then its end.
#[derive(Debug)]
pub struct ChildReceiver {
    stdout: BufReader<ChildStdout>,
    exit: watch::Receiver<Option<String>>,
    kill: Arc<Notify>,
}

/// Starts a child. It is killed when both halves are dropped.
pub fn spawn(options: SpawnOptions) -> Result<(ChildSender, ChildReceiver), HostError> {
    let (program, args) = options.command.split_first().ok_or(HostError::NoCommand)?;
    let mut child = Command::new(program)
        .args(args)
        .envs(os::child_environment())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| HostError::Spawn { program: program.clone(), source })?;
    let pid = child.id().unwrap_or(0);
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(HostError::Ended);
    };
    let (frames, mut queue) = mpsc::channel::<Vec<u8>>(TO_CHILD_QUEUE);
    tokio::spawn(async move {
        while let Some(frame) = queue.recv().await {
            if stdin.write_all(&frame).await.is_err() {
                break; // The child is gone; the waiting task below says why.
            }
        }
    });

    let last_error = Arc::new(Mutex::new(None));
    let log = tokio::spawn(forward_log(stderr, options.label, last_error.clone()));
    let kill = Arc::new(Notify::new());
    let killed = kill.clone();
    let (exit_tx, exit) = watch::channel(None);
    tokio::spawn(async move {
        let status = tokio::select! {
            status = child.wait() => status,
            () = killed.notified() => {
                // An error means that it has ended already, which is what was wanted.
                child.start_kill().ok();
                child.wait().await
            }
        };
        // The last words may still be in the pipe; it is closed by now, so this ends.
        log.await.ok();
        let words = last_error.lock().ok().and_then(|mut l| l.take());
        exit_tx.send_replace(Some(describe_exit(status, words)));
    });
    let sender = ChildSender { pid, frames, kill: kill.clone() };
    Ok((sender, ChildReceiver { stdout: BufReader::new(stdout), exit, kill }))
}

impl ChildSender {
    /// The operating system's number of the process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a message; an error means that the child has ended or the message is too large.
    pub async fn send(&self, message: ToChild) -> Result<(), HostError> {
        let frame = codec::encode(&message, limits::MESSAGE_BYTES_MAX)?;
        self.frames.send(frame).await.map_err(|_| HostError::Ended)
    }

    /// Ends the process at once. Its receiver then gives none.
    pub fn kill(&self) {
        self.kill.notify_one();
    }
}

impl ChildReceiver {
    /// The next message; none when the process has ended or said something that is no message (then it is killed).
    pub async fn recv(&mut self) -> Option<FromChild> {
        let mut prefix = [0; codec::PREFIX];
        self.stdout.read_exact(&mut prefix).await.ok()?;
        let message = async {
            let len = codec::frame_len(prefix, limits::MESSAGE_BYTES_MAX)?;
            let mut body = vec![0; len];
            if self.stdout.read_exact(&mut body).await.is_err() {
                return Ok(None);
            }
            codec::decode(&body).map(Some)
        };
        match message.await {
            Ok(message) => message,
            Err(error) => {
                tracing::error!(%error, "a compute process broke its protocol and is killed");
                self.kill.notify_one();
                None
            }
        }
    }

    /// After [`ChildReceiver::recv`] gave none: how the process ended, with the last error of its log.
    pub async fn exit_reason(&mut self) -> String {
        match self.exit.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "ended".into(),
        }
    }
}

impl Drop for ChildReceiver {
    fn drop(&mut self) {
        // Whoever does not listen any more cannot want the process either.
        self.kill.notify_one();
    }
}

async fn forward_log(stderr: tokio::process::ChildStderr, label: String, last_error: Arc<Mutex<Option<String>>>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end must not fill the memory: what exceeds the bound becomes a line of its own.
        match (&mut lines).take(LOG_LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if text.contains("ERROR") || text.contains("GGML_ASSERT") || text.contains("panicked at") {
            if let Ok(mut last) = last_error.lock() {
                *last = Some(text.to_owned());
            }
            tracing::warn!(target: "capstan::child", "{label}: {text}");
        } else if text.contains("WARN") {
            tracing::warn!(target: "capstan::child", "{label}: {text}");
        } else if text.contains("DEBUG") || text.contains("TRACE") {
            tracing::debug!(target: "capstan::child", "{label}: {text}");
        } else {
            tracing::info!(target: "capstan::child", "{label}: {text}");
        }
    }
}

fn describe_exit(status: std::io::Result<ExitStatus>, words: Option<String>) -> String {
    let how = match status {
        Ok(status) => match (status.code(), signal(&status)) {
            (Some(0), _) => "ended".to_owned(),
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".to_owned(),
        },
        Err(error) => format!("was lost ({error})"),
    };
    match words {
        Some(words) => format!("{how}; its last error was: {words}"),
        None => how,
    }
}

#[cfg(unix)]
fn signal(status: &ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(status)
}

#[cfg(not(unix))]
fn signal(_: &ExitStatus) -> Option<i32> {
    None
}

/// What computes on this machine. `command` is the same as in [`SpawnOptions`].
pub async fn devices(command: &[OsString]) -> Result<Vec<DeviceStatus>, HostError> {
    ask(command, &["--devices".into()], None).await
}

/// What this machine takes to compute, measured with files in `folder`: see [`crate::measure`].
pub async fn profile(
    command: &[OsString],
    folder: &Path,
    threads: Option<u32>,
    gpu_layers: i32,
    known: Option<&DeviceProfile>,
) -> Result<DeviceProfile, HostError> {
    let mut args = vec!["--measure".into(), folder.into(), format!("--gpu-layers={gpu_layers}").into()];
    args.extend(known.map(|_| "--more".into()));
    args.extend(threads.map(|n| format!("--threads={n}").into()));
    let known = known.map(serde_json::to_vec).transpose().map_err(|e| HostError::Answer(e.to_string()))?;
    ask(command, &args, known).await
}

/// Bytes of a stage's compute buffers: see [`crate::ask::dry_run`].
pub async fn dry_run(command: &[OsString], spec: &StageSpec) -> Result<u64, HostError> {
    let spec = serde_json::to_vec(spec).map_err(|e| HostError::Answer(e.to_string()))?;
    ask(command, &["--dry-run".into()], Some(spec)).await
}

/// What a short-lived child answers: drivers may crash, and the daemon must not.
async fn ask<T: DeserializeOwned>(
    command: &[OsString],
    question: &[OsString],
    input: Option<Vec<u8>>,
) -> Result<T, HostError> {
    let (program, args) = command.split_first().ok_or(HostError::NoCommand)?;
    let mut child = Command::new(program)
        .args(args)
        .args(question)
        // What is measured here is to hold there.
        .envs(os::child_environment())
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| HostError::Spawn { program: program.clone(), source })?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // A child that ends before it has read all of it says why with its exit.
        stdin.write_all(&input).await.ok();
    }
    let output = child.wait_with_output().await.map_err(|e| HostError::Answer(e.to_string()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let last = words.lines().last().map(|l| l.chars().take(LOG_LINE_BYTES_MAX).collect());
        return Err(HostError::Answer(describe_exit(Ok(output.status), last)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| HostError::Answer(e.to_string()))
}
