//! The command line and the settings, through the real binary; daemons only where the daemon's own process is the point.
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A user's folders, without anything of this machine's in them.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_capstan"));
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("CAPSTAN_") {
                command.env_remove(key);
            }
        }
        command.args(args).stdin(Stdio::null());
        command.env("HOME", self.0.path()).env("XDG_CONFIG_HOME", self.config()).env("XDG_DATA_HOME", self.data());
        command.env("CAPSTAN_API_ADDR", "127.0.0.1:0").env("CAPSTAN_BIND_ADDR", "127.0.0.1:0");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("capstan starts")
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn config(&self) -> std::path::PathBuf {
        self.0.path().join("config")
    }

    fn data(&self) -> std::path::PathBuf {
        self.0.path().join("data")
    }

    fn write_config(&self, text: &str) {
        let folder = self.config().join("capstan");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("config.toml"), text).expect("a config file");
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Fails unless the command failed with a sentence that contains `words`.
fn assert_refused(output: &Output, words: &str) {
    assert!(!output.status.success(), "it succeeded, but should say {words:?}");
    assert!(stderr(output).contains(words), "{words:?} is not in: {}", stderr(output));
}

#[cfg(target_os = "linux")]
#[test]
fn settings_come_from_file_variable_and_flag_in_this_order() {
    let home = Home::new();
    home.write_config("name = 'file'\nthreads = 2\nmemory_limit = '1GiB'\nslots = 3");
    let output = home
        .command(&["config", "--json", "--memory-limit", "3GiB"])
        .env("CAPSTAN_MEMORY_LIMIT", "2GiB")
        .env("CAPSTAN_THREADS", "5")
        .output()
        .expect("capstan starts");
    let shown: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let of = |key: &str| shown["settings"][key].clone();
    assert_eq!(of("memory_limit")["value"], 3u64 << 30);
    assert_eq!(of("memory_limit")["source"], "flag --memory-limit");
    assert_eq!(
        (of("threads")["value"].as_u64(), of("threads")["source"].as_str()),
        (Some(5), Some("variable CAPSTAN_THREADS"))
    );
    assert_eq!(of("name")["value"], "file");
    assert!(of("slots")["source"].as_str().expect("a source").ends_with("config.toml"));
    assert_eq!(of("ctx")["value"], Value::Null);
    assert_eq!(of("data_dir")["value"].as_str(), home.data().join("capstan").to_str());
}

#[cfg(target_os = "linux")]
#[test]
fn a_wrong_config_file_is_refused_by_every_command() {
    let home = Home::new();
    home.write_config("api_adr = '127.0.0.1:1'");
    assert_refused(&home.run(&["status"]), "unknown key \"api_adr\"; did you mean \"api_addr\"?");
    assert_refused(&home.run(&["--config", "nowhere.toml", "config"]), "cannot be read");
    // But not by the one that writes the shell's completions.
    assert!(home.run(&["completions", "zsh"]).status.success());
}

#[test]
fn without_a_daemon_each_command_says_what_to_do() {
    let home = Home::new();
    for args in [&["status"][..], &["ticket"], &["leave"], &["unload", "x"], &["run", "x", "hello"]] {
        assert_refused(&home.run(args), "no daemon is running here; start it with `capstan up`");
    }
    assert!(home.run(&["stop"]).status.success(), "there is nothing to stop, which is what was wanted");
}

#[test]
fn wrong_arguments_are_explained() {
    let home = Home::new();
    assert_refused(&home.run(&["load", "m.gguf", "--layers", "a=5..5"]), "is empty; write START..END");
    assert_refused(&home.run(&["load", "m.gguf", "--ctx", "0"]), "neither a whole number above 0 nor `auto`");
    assert_refused(&home.run(&["up", "--api-addr", "8420"]), "is not IP:PORT");
    assert_refused(&home.run(&["ticket", "--ttl", "1w"]), "write a number with s, m, h or d");
}

#[test]
fn two_starts_at_once_make_one_daemon_and_a_killed_one_is_recognised() {
    let home = Home::new();
    let starts: Vec<_> = (0..2)
        .map(|_| {
            home.command(&["up", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        })
        .collect();
    let up: Vec<Value> = starts
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{}", stderr(&output));
            serde_json::from_slice(&output.stdout).expect("JSON")
        })
        .collect();
    let _guard = StopOnDrop(&home);
    assert_eq!(up[0]["pid"], up[1]["pid"]);
    assert_ne!(up[0]["already_running"], up[1]["already_running"]);

    // The API's port is taken now: a second daemon elsewhere says so and how to go on.
    let address =
        up[0]["api"].as_str().and_then(|url| url.strip_prefix("http://")?.strip_suffix("/v1")).expect("a URL");
    let elsewhere = home.0.path().join("elsewhere");
    let refused = home.run(&["--data-dir", elsewhere.to_str().expect("UTF-8"), "up", "--api-addr", address]);
    assert_refused(&refused, "is taken by another program; choose another with --api-addr");

    // Killed as by a power cut, its daemon.json stays behind.
    let pid = up[0]["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &pid]).status().expect("kill runs").success());
    wait_until_gone(&home);
    assert_refused(&home.run(&["status"]), "has ended without tidying up");
    let again = home.json(&["up", "--json"]);
    assert_eq!((again["already_running"].as_bool(), &again["name"]), (Some(false), &up[0]["name"]));
    assert_ne!(again["pid"], up[0]["pid"]);

    let stopped = home.json(&["stop", "--json"]);
    assert_eq!(stopped["pid"], again["pid"]);
    assert!(!data_dir(&home).join("daemon.json").exists());
}

/// Ends the daemon even when the test fails.
struct StopOnDrop<'a>(&'a Home);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.run(&["stop"]);
    }
}

fn data_dir(home: &Home) -> std::path::PathBuf {
    let shown = home.json(&["config", "--json"]);
    Path::new(shown["settings"]["data_dir"]["value"].as_str().expect("a folder")).to_path_buf()
}

/// A kill is not instant: waits until the commands see that the process has ended.
fn wait_until_gone(home: &Home) {
    while !stderr(&home.run(&["status"])).contains("has ended") {
        std::thread::yield_now();
    }
}

/// Calls a daemon's API; the status and the body.
async fn call(url: &str, key: Option<&str>) -> (u16, String) {
    let mut request = reqwest::Client::builder().no_proxy().build().expect("a client").get(url);
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    let reply = request.send().await.expect("the daemon answers");
    (reply.status().as_u16(), reply.text().await.expect("a body"))
}

/// Arguments of all processes that name this folder, as `ps` shows them to everybody.
#[cfg(target_os = "linux")]
fn process_list(folder: &Path) -> String {
    let folder = folder.to_str().expect("UTF-8");
    let processes = std::fs::read_dir("/proc").expect("a process list").flatten();
    let lines = processes.filter_map(|p| std::fs::read(p.path().join("cmdline")).ok());
    let lines = lines.map(|l| String::from_utf8_lossy(&l).replace('\0', " ")).filter(|l| l.contains(folder));
    lines.collect::<Vec<_>>().join("\n")
}

/// Text of all files of a folder that a daemon writes, but for those that are there to hold a secret.
fn files(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            text += &files(&path);
        } else if !["node.key", "daemon.json"].iter().any(|name| path.ends_with(name)) {
            text += &String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default());
        }
    }
    text
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn beyond_loopback_a_key_is_demanded_and_secrets_are_in_no_log_file_or_process_list() {
    let (home, other) = (Home::new(), Home::new());
    let up = |home: &Home, more: &[&str]| {
        let args = [&["up", "--json", "--log-level", "trace", "--no-mdns"], more].concat();
        let output = home.command(&args).env("CAPSTAN_MEASURE", "off").output().expect("capstan starts");
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    // What listens by this flag demands keys, on loopback as anywhere.
    let first = up(&home, &["--listen", "127.0.0.1:0"]);
    let (_guard, second) = (StopOnDrop(&home), up(&other, &[]));
    let _other = StopOnDrop(&other);
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let (api, outside) = (text(&first["api"]), format!("http://{}/v1/models", text(&first["listen"])));
    assert!(second["listen"].is_null());

    let key = text(&home.json(&["key", "add", "laptop", "--json"])["key"]);
    let manage = home.run(&["key", "add", "desk", "--manage"]);
    let manage = String::from_utf8_lossy(&manage.stdout).trim().to_owned();
    assert!(key.starts_with("sk-capstan-") && manage.starts_with("sk-capstan-"), "{manage}");
    assert_eq!(call(&format!("{api}/models"), None).await.0, 200, "this machine needs no key");
    let (status, refused) = call(&outside, None).await;
    assert!(status == 401 && refused.contains("capstan key add"), "{refused}");
    let wrong = key.replace("sk-capstan-", "sk-capstan-x");
    let (status, refused) = call(&outside, Some(&wrong)).await;
    assert!(status == 401 && !refused.contains(&wrong), "{refused}");
    assert_eq!(call(&outside, Some(&key)).await.0, 200);
    let managing = outside.replace("/v1/models", "/capstan/v1/status");
    assert_eq!((call(&managing, Some(&key)).await.0, call(&managing, Some(&manage)).await.0), (403, 200));

    // The other machine joins by the code, read from standard input.
    let (code, at) = (text(&first["pairing"]["code"]), text(&first["pairing"]["at"][0]));
    let mut join = other.command(&["join", "-", "--at", &at]).stdin(Stdio::piped()).spawn().expect("capstan starts");
    std::io::Write::write_all(&mut join.stdin.take().expect("its input"), format!("{code}\n").as_bytes())
        .expect("it reads");
    assert!(join.wait().expect("it ends").success());
    assert_eq!(other.json(&["status", "--json"])["nodes"].as_array().expect("nodes").len(), 2);
    // A wrong code is refused with a sentence that does not repeat the right one.
    let fresh = home.json(&["pair", "--json"]);
    assert_refused(&other.run(&["join", &text(&fresh["code"]), "--at", &at]), "capstan leave");

    home.run(&["key", "revoke", "laptop"]);
    assert_eq!(call(&outside, Some(&key)).await.0, 401);
    let listed = home.run(&["key", "list"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("laptop") && listed.contains("revoked") && listed.contains("good"), "{listed}");

    let daemon: Value =
        serde_json::from_slice(&std::fs::read(data_dir(&home).join("daemon.json")).expect("a file")).expect("JSON");
    let secrets = [
        ("an API key", key),
        ("a wrong API key", wrong),
        ("a managing key", manage),
        ("a code", code[3..].to_owned()),
        ("an open code", text(&fresh["code"])[3..].to_owned()),
        ("a ticket", text(&first["ticket"])),
        ("the token", text(&daemon["token"])),
    ];
    let processes = process_list(&data_dir(&home));
    assert!(processes.contains("daemon"), "the daemon is in the list");
    let logs = std::fs::read_to_string(data_dir(&home).join("logs").join("daemon.log")).expect("a log");
    assert!(logs.contains("a machine knew the pairing code") && logs.contains("an API key was made"), "{logs}");
    for (place, text) in [
        ("the process list", processes),
        ("the first machine's files", files(&data_dir(&home))),
        ("the other machine's files", files(&data_dir(&other))),
        ("the list of keys", listed),
        ("the status", stdout(&home.run(&["status", "--json"]))),
        ("the settings", stdout(&home.run(&["config", "--json"]))),
    ] {
        for (what, secret) in &secrets {
            assert!(!text.contains(secret.as_str()), "{what} is in {place}");
        }
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_api_is_this_machines_unless_it_is_said_to_listen() {
    let home = Home::new();
    assert_refused(&home.run(&["up", "--api-addr", "0.0.0.0:0"]), "say `--listen 0.0.0.0:0`");
    assert_refused(&home.run(&["up", "--listen", "everywhere"]), "neither an address");
    assert_refused(&home.run(&["join", "42-ABCDE"]), "too short");
    assert_refused(&home.run(&["join", "--at", "127.0.0.1:1"]), "nobody is there to type the code");
    let ticket = home.run(&["join", "capstan1abc", "--at", "127.0.0.1:1"]);
    assert_refused(&ticket, "--at is for pairing codes");
    assert_refused(&home.run(&["key", "add", "a/b"]), "no name for a key");
    for args in [&["key", "list"][..], &["pair"]] {
        assert_refused(&home.run(args), "no daemon is running here");
    }
}
