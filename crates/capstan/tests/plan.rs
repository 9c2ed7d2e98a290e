//! `capstan plan` through the real binary: files, addresses, a hub, the catalogue, and what cannot be.
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use capstan_gguf::writer::{self, NewTensor};
use capstan_gguf::{Metadata, Model, Value as Gguf};
use capstan_testkit::tiny;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a file on the server is said to be as long as: only its beginning may be asked for.
const VIRTUAL_BYTES: u64 = 1 << 60;
/// Most that the header of a tiny model may take: what is asked for first.
const HEADER_BYTES: u64 = 1 << 20;

/// A user's folders, without anything of this machine's in them.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path(name), content).expect("a file");
        self.path(name).display().to_string()
    }

    /// A tiny model as a file.
    fn tiny(&self, architecture: &str) -> String {
        let path = self.path(&format!("{architecture}.gguf"));
        tiny::write(architecture, &path).expect("a tiny model");
        path.display().to_string()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_capstan"));
        for (key, _) in std::env::vars_os() {
            let key = key.to_string_lossy().into_owned();
            if key.starts_with("CAPSTAN_") || key.starts_with("HF_") || key.to_lowercase().ends_with("_proxy") {
                command.env_remove(key);
            }
        }
        command.arg("plan").args(args).stdin(Stdio::null());
        command.env("HOME", self.0.path()).env("XDG_CONFIG_HOME", self.path("config"));
        command.env("XDG_DATA_HOME", self.path("data"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("capstan starts")
    }

    /// What a plan that fits says.
    fn text(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}{}", stdout(&output), stderr(&output));
        stdout(&output)
    }

    fn json(&self, args: &[&str], status: i32) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        json_of(&self.run(&args), status)
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json_of(output: &Output, status: i32) -> Value {
    assert_eq!(output.status.code(), Some(status), "{}{}", stdout(output), stderr(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Fails unless the command failed with a sentence that contains `words`.
fn assert_refused(output: &Output, words: &str) {
    assert!(!output.status.success(), "it succeeded, but should say {words:?}");
    assert!(stderr(output).contains(words), "{words:?} is not in: {}", stderr(output));
}

/// A server of files that are far longer than what is there of them. It speaks ranges, and the hub's protocol for one
/// repository, `o/r`.
struct Server {
    address: SocketAddr,
    /// Path and bytes of each answer with content.
    sent: Arc<Mutex<Vec<(String, u64)>>>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    fn start(files: Vec<(&str, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sent, stopped) = (Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicBool::new(false)));
        let server = Self { address, sent: sent.clone(), stopped: stopped.clone() };
        let files: Arc<Vec<(String, Vec<u8>)>> = Arc::new(files.into_iter().map(|(n, b)| (n.to_owned(), b)).collect());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (files, sent) = (files.clone(), sent.clone());
                std::thread::spawn(move || serve(connection.expect("a connection"), &files, &sent));
            }
        });
        server
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn sent(&self) -> Vec<(String, u64)> {
        self.sent.lock().expect("no test thread panicked").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees the flag.
        TcpStream::connect(self.address).ok();
    }
}

/// Serves one connection until the client goes away, which is no error.
fn serve(mut out: TcpStream, files: &[(String, Vec<u8>)], sent: &Mutex<Vec<(String, u64)>>) {
    let mut input = BufReader::new(out.try_clone().expect("a socket"));
    while let Some((path, range)) = read_request(&mut input) {
        let path = path.split('?').next().unwrap_or_default().to_owned();
        let answered = if path == "/api/models/o/r/revision/main" {
            let file = |(name, _): &(String, Vec<u8>)| json!({ "rfilename": name, "size": VIRTUAL_BYTES });
            let list = json!({ "siblings": files.iter().map(file).collect::<Vec<_>>() }).to_string();
            write!(out, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{list}", list.len())
        } else {
            let name = path.strip_prefix("/o/r/resolve/main/").unwrap_or(path.trim_start_matches('/'));
            match (files.iter().find(|(n, _)| n == name), range) {
                (Some((_, bytes)), Some((from, to))) if from <= to && to < VIRTUAL_BYTES => {
                    sent.lock().expect("no test thread panicked").push((name.to_owned(), to + 1 - from));
                    let content: Vec<u8> = (from..=to).map(|i| bytes.get(i as usize).copied().unwrap_or(0)).collect();
                    let size = content.len();
                    write!(
                        out,
                        "HTTP/1.1 206 Partial Content\r\ncontent-length: {size}\r\n\
                         content-range: bytes {from}-{to}/{VIRTUAL_BYTES}\r\n\r\n"
                    )
                    .and_then(|()| out.write_all(&content))
                }
                (Some(_), _) => write!(out, "HTTP/1.1 416 Range Not Satisfiable\r\ncontent-length: 0\r\n\r\n"),
                (None, _) => write!(out, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
            }
        };
        if answered.is_err() {
            return;
        }
    }
}

/// The path of a request, and the range that it asks for.
fn read_request(input: &mut impl BufRead) -> Option<(String, Option<(u64, u64)>)> {
    let mut first = String::new();
    input.read_line(&mut first).ok().filter(|n| *n > 0)?;
    let mut range = None;
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok().filter(|n| *n > 0)?;
        if line.trim().is_empty() {
            return Some((first.split(' ').nth(1)?.to_owned(), range));
        }
        if let Some(bytes) = line.to_ascii_lowercase().trim().strip_prefix("range: bytes=") {
            let (from, to) = bytes.split_once('-')?;
            range = Some((from.parse().ok()?, to.parse().ok()?));
        }
    }
}

/// The two parts of a tiny model.
fn split(path: &Path) -> [Vec<u8>; 2] {
    let model = Model::open(path).expect("a model");
    let half = model.tensors().len() / 2;
    let part = |no: u16, tensors: &[capstan_gguf::TensorInfo]| {
        let mut metadata = if no == 0 { model.metadata().clone() } else { Metadata::new() };
        metadata.insert("split.no", Gguf::U16(no));
        metadata.insert("split.count", Gguf::U16(2));
        let new = |t: &capstan_gguf::TensorInfo| NewTensor {
            name: t.name.clone(),
            dims: t.dims.to_vec(),
            ggml_type: t.ggml_type,
        };
        let mut out = Vec::new();
        let list: Vec<_> = tensors.iter().map(new).collect();
        writer::write(&mut out, &metadata, &list, |i| model.tensor_data(&tensors[i]).to_vec()).expect("a part");
        out
    };
    [part(0, &model.tensors()[..half]), part(1, &model.tensors()[half..])]
}

#[test]
fn a_file_is_planned_for() {
    let home = Home::new();
    let file = home.tiny("llama");
    let text = home.text(&[&file, "--machines", "2x\"M4 Pro 24GB\"", "--link", "10GbE", "--ctx", "512"]);
    for words in
        ["tiny-llama fits on", "M4 Pro 24GB", "Time to the first token", "llama.cpp RPC", "Why", "Assumed", &file]
    {
        assert!(text.contains(words), "{words:?} is not in: {text}");
    }
    let plan = home.json(&[&file, "--machines", "M4 Pro 24GB", "--slots", "2"], 0);
    assert_eq!((&plan["fits"], &plan["model"], &plan["slots"]), (&json!(true), &json!("tiny-llama"), &json!(2)));
    assert_eq!(plan["fewest"], 1);
}

#[test]
fn the_first_of_split_files_is_planned_for() {
    let home = Home::new();
    let whole = home.tiny("qwen3moe");
    let parts = split(Path::new(&whole));
    let first = home.write("m-00001-of-00002.gguf", &parts[0]);
    assert_refused(&home.run(&[&first, "--machines", "RTX 4090"]), "m-00002-of-00002.gguf is missing");
    let second = home.write("m-00002-of-00002.gguf", &parts[1]);
    let memory = |file: &str| home.json(&[file, "--machines", "RTX 4090"], 0)["forecast"]["memory"].clone();
    assert_eq!(memory(&first), memory(&whole));
    assert_refused(&home.run(&[&second, "--machines", "RTX 4090"]), "give the path of the first part");
}

#[test]
fn files_that_are_no_models_are_refused_with_sentences() {
    let home = Home::new();
    let bytes = std::fs::read(home.tiny("llama")).expect("the model");
    let refused = |name: &str, content: &[u8], words: &str| {
        assert_refused(&home.run(&[&home.write(name, content)]), words);
    };
    refused("cut.gguf", &bytes[..bytes.len() / 2], "is truncated");
    refused("header.gguf", &bytes[..100], "is truncated");
    refused("text.gguf", b"not a model at all", "is not a GGUF file");
    refused("empty.gguf", b"", "gguf");
    // A count of tensors that no file can have.
    let mut hostile = bytes.clone();
    hostile[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    refused("hostile.gguf", &hostile, "is damaged or hostile");
    assert_refused(&home.run(&["nowhere.gguf"]), "there is no file nowhere.gguf");
    assert_refused(&home.run(&[&home.0.path().display().to_string()]), "is a folder");
}

#[test]
fn of_a_model_at_an_address_only_the_header_is_read() {
    let home = Home::new();
    let file = home.tiny("deepseek2");
    let bytes = std::fs::read(&file).expect("the model");
    let server = Server::start(vec![("m.gguf", bytes)]);
    let plan = home.json(&[&server.url("/m.gguf"), "--machines", "RTX 4090"], 0);
    assert_eq!(plan["forecast"]["memory"], home.json(&[&file, "--machines", "RTX 4090"], 0)["forecast"]["memory"]);
    let sent = server.sent();
    assert!(!sent.is_empty() && sent.iter().map(|s| s.1).sum::<u64>() <= HEADER_BYTES, "{sent:?}");
    assert_refused(&home.run(&[&server.url("/n.gguf")]), "does not exist; check the name");
}

/// The header of a model with a tensor of so many rows of a gibibyte each.
fn giant(rows: u64) -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let number = |key: &str, n: u32| [text(key), 4u32.to_le_bytes().to_vec(), n.to_le_bytes().to_vec()].concat();
    let tensor = |name: &str, dims: [u64; 2], offset: u64| {
        let dims = dims.iter().flat_map(|d| d.to_le_bytes()).collect::<Vec<u8>>();
        [text(name), 2u32.to_le_bytes().to_vec(), dims, 0u32.to_le_bytes().to_vec(), offset.to_le_bytes().to_vec()]
            .concat()
    };
    let row = 1u64 << 28;
    [
        b"GGUF".to_vec(),
        3u32.to_le_bytes().to_vec(),
        2u64.to_le_bytes().to_vec(),
        3u64.to_le_bytes().to_vec(),
        [text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat(),
        number("llama.block_count", 1),
        number("llama.attention.head_count", 8),
        tensor("blk.0.ffn_up.weight", [row, rows], 0),
        tensor("token_embd.weight", [64, 32], 4 * row * rows),
    ]
    .concat()
}

#[test]
fn a_server_that_claims_too_much_is_taken_at_its_word_and_no_further() {
    let home = Home::new();
    let server = Server::start(vec![("giant.gguf", giant(1 << 24)), ("over.gguf", giant(1 << 40))]);
    let plan = home.json(&[&server.url("/giant.gguf"), "--machines", "8x\"M3 Ultra 512GB\""], 1);
    assert!(plan["why"].to_string().contains("does not fit"), "{plan}");
    // More than the file is said to have.
    assert_refused(&home.run(&[&server.url("/over.gguf"), "--machines", "RTX 4090"]), "error: ");
    assert!(server.sent().iter().all(|s| s.1 <= HEADER_BYTES), "{:?}", server.sent());
}

#[test]
fn a_name_on_the_hub_is_read_part_by_part() {
    let home = Home::new();
    let whole = home.tiny("qwen3moe");
    let [first, second] = split(Path::new(&whole));
    let server = Server::start(vec![
        ("README.md", b"hello".to_vec()),
        ("Q8_0/m-Q8_0.gguf", b"no model".to_vec()),
        ("Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", first),
        ("Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", second),
    ]);
    let hub = |name: &str, json: bool| {
        let mut args = vec![name, "--machines", "RTX 4090"];
        args.extend(json.then_some("--json"));
        home.command(&args).env("HF_ENDPOINT", server.url("")).output().expect("capstan starts")
    };
    let plan = json_of(&hub("hf:o/r:Q4_K_M", true), 0);
    assert_eq!(plan["forecast"]["memory"], home.json(&[&whole, "--machines", "RTX 4090"], 0)["forecast"]["memory"]);
    assert!(plan["sources"][0].as_str().expect("a source").contains("hf:o/r:Q4_K_M"));
    let sent = server.sent();
    let files: Vec<&str> = sent.iter().map(|s| s.0.as_str()).collect();
    assert_eq!(files, ["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00002-of-00002.gguf"]);
    assert!(sent.iter().all(|s| s.1 <= HEADER_BYTES), "{sent:?}");
    assert_refused(&hub("hf:o/r:Q6_K", false), "has no GGUF file for Q6_K; it has");
    assert_refused(&hub("hf:o/r:Q8_0", false), "is not a GGUF file");
    assert_refused(&hub("hf:o/nothing", false), "does not exist; check the name");
    assert_refused(&hub("hf:o", false), "write hf:OWNER/REPO");
}

#[test]
fn no_network_is_said_clearly() {
    let home = Home::new();
    // A port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    assert_refused(&home.run(&[&format!("http://{closed}/m.gguf")]), "cannot be reached");
    let hub = home.command(&["hf:o/r"]).env("HF_ENDPOINT", format!("http://{closed}")).output();
    assert_refused(&hub.expect("capstan starts"), "is this machine connected");
    assert_refused(&home.run(&["ftp://somewhere/m.gguf"]), "begins with https://");
}

#[test]
fn the_catalogue_is_found_in_any_spelling() {
    let home = Home::new();
    let kimi = ["Kimi K2.5 UD-Q2_K_XL", "kimi-k2.5:ud-q2_k_xl", "moonshotai/Kimi-K2.5", "KIMI K2.5"];
    for name in kimi {
        let plan = home.json(&[name, "--machines", "4xRyzen AI Max+ 395 128GB", "--link", "5GbE"], 0);
        assert_eq!(plan["model"], "Kimi K2.5 UD-Q2_K_XL");
        assert!(plan["sources"][0].as_str().expect("a source").starts_with("https://"));
    }
    assert_refused(&home.run(&["kimi k9"]), "did you mean Kimi K2");
    assert_refused(&home.run(&["kimi k9"]), "nor is there a file of that name");
    assert_refused(&home.run(&["GLM-4.6:Q4_K_L"]), "Q4_K_M");
    assert_refused(&home.run(&["GLM-4.6", "--machines", "RTX 4091"]), "RTX 4090");
    assert_refused(&home.run(&["GLM-4.6", "--link", "15GbE"]), "5GbE");
    let text = home.text(&["--list"]);
    assert!(text.contains("Kimi K2.5") && text.contains("Ryzen AI Max+ 395 128GB") && text.contains("https://"));
    let list = home.json(&["--list"], 0);
    assert!(list["models"].as_array().expect("models").len() >= 15);
    let sourced = |of: &Value| of.as_array().expect("a list").iter().all(|e| e["source"].is_string());
    assert!(sourced(&list["models"]) && sourced(&list["machines"]));
}

#[test]
fn without_machines_it_says_how_many_it_takes() {
    let home = Home::new();
    let plan = home.json(&["Kimi K2.5 UD-Q2_K_XL"], 0);
    assert_eq!(
        plan["machines"].as_array().expect("machines").len(),
        plan["fewest"].as_u64().expect("a number") as usize
    );
    let notes = plan["notes"].to_string();
    assert!(notes.contains("No machines were named") && notes.contains("1GbE is assumed"), "{notes}");
    assert_refused(&home.run(&["Kimi K2.5", "--exclude", "#1"]), "name these with --machines");
}

#[test]
fn the_forecast_has_all_that_was_promised() {
    let home = Home::new();
    let machines = "4x\"Ryzen AI Max+ 395 128GB\"";
    let args =
        ["Kimi K2.5 UD-Q2_K_XL", "--machines", machines, "--link", "5GbE", "--ctx", "140000", "--concurrency", "4"];
    let plan = home.json(&args, 0);
    let list = |path: &str| plan.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default();
    let of = |path: &str, key: &str| list(path).iter().map(|d| d[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("/forecast/first_token", "prompt_tokens"), [512, 2048, 8192, 32_768]);
    assert_eq!(of("/forecast/decode", "depth_tokens"), [0, 4096, 32_768, 131_072, 4096, 4096]);
    assert_eq!(of("/forecast/decode", "sequences"), [1, 1, 1, 1, 2, 4]);
    assert_eq!(list("/forecast/memory").len(), list("/stages").len());
    assert!(plan["ubatch"].as_u64() >= Some(64) && of("/forecast/first_token", "chunk_rows").iter().all(Value::is_u64));
    for key in ["explanation", "rejected", "choices", "work", "by_machines", "assumptions"] {
        assert!(!list(&format!("/{key}")).is_empty(), "{key}");
    }
    let usual = home.json(&["Kimi K2.5 UD-Q2_K_XL", "--machines", machines], 0);
    let choices = usual["choices"].as_array().cloned().unwrap_or_default();
    for of in ["machines", "link", "objective", "context", "slots"] {
        assert!(choices.iter().any(|c| c["of"] == of), "{of}: {choices:?}");
    }
    let explained = plan["explanation"].to_string();
    for words in ["bottleneck", "One more", "times the bandwidth", "needed to hold"] {
        assert!(explained.contains(words), "{words:?} is not in {explained}");
    }
    let text = home.text(&args);
    assert!(text.lines().all(|l| l.chars().count() <= 100 || l.contains("https://")), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours");
}

#[test]
fn what_does_not_fit_ends_with_one_and_says_why() {
    let home = Home::new();
    let output = home.run(&["Llama 3.1 405B", "--machines", "RTX 4090"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains("does not fit") && stdout(&output).contains("It would fit on"),
        "{}",
        stdout(&output)
    );
    let plan = home.json(&["Llama 3.1 405B", "--machines", "2x RTX 4090", "--target-tps", "1"], 1);
    assert_eq!(plan["fits"], false);
    assert!(plan["why"][0].as_str().expect("a sentence").contains("does not fit"));
    assert!(plan["target"]["by_machine"][0]["enough"][0].as_u64() > Some(2));
    // All of the memory is kept free.
    assert_eq!(home.run(&["Llama 3.1 8B", "--machines", "RTX 4090", "--headroom", "1TiB"]).status.code(), Some(1));
}

#[test]
fn a_wanted_speed_is_answered_with_a_number_or_none() {
    let home = Home::new();
    let ask = |tps: &str| {
        let args = [
            "Llama 3.1 70B",
            "--machines",
            "2x\"RTX 3090\", M4 Max 128GB",
            "--link",
            "10GbE",
            "--objective",
            "latency",
        ];
        home.json(&[&args[..], &["--target-tps", tps]].concat(), 0)["target"]["by_machine"].clone()
    };
    let some = ask("5");
    assert_eq!(some.as_array().map(Vec::len), Some(2));
    assert!(some[0]["enough"][0].as_u64() >= Some(2), "{some}");
    let none = ask("100000");
    assert!(none[0]["enough"].is_null() && none[0]["most"][1].as_f64() > Some(1.0), "{none}");
    let text = home.text(&["Llama 3.1 8B", "--machines", "RTX 4090", "--target-tps", "100000"]);
    assert!(text.contains("No number of RTX 4090 24GB reaches 100000 tokens per second"), "{text}");
}

#[test]
fn machines_of_ones_own_pinned_and_excluded() {
    let home = Home::new();
    let toml = home.write(
        "machines.toml",
        "link = '5GbE'\n[[machine]]\nname = 'box'\ncount = 3\nlike = 'Ryzen AI Max+ 395 128GB'\n\
         [[machine]]\nname = 'tower'\nmemory_gib = 22.5\nbandwidth_gb_per_s = 850\ngemm_tflops = 60\n",
    );
    let ask = |more: &[&str]| {
        home.json(&[&["gpt-oss-120b", "--machine-file", &toml][..], more].concat(), 0)["stages"].clone()
    };
    let stages = ask(&["--pin", "tower=0..10", "--pin", "box", "--exclude", "#1"]);
    let stages = stages.as_array().expect("stages");
    assert!(stages.contains(&json!([3, "0..10"])), "{stages:?}");
    assert!(stages.iter().all(|s| s[0] != 0) && stages.iter().any(|s| s[0] == 1), "{stages:?}");
    let refused = |more: &[&str], words: &str| {
        assert_refused(&home.run(&[&["gpt-oss-120b", "--machine-file", &toml][..], more].concat()), words);
    };
    refused(&["--exclude", "tow"], "none of the machines: box, tower");
    refused(&["--pin", "#5"], "write #1 to #4");
    refused(&["--pin", "tower", "--exclude", "tower"], "more often than there are");
    refused(&["--pin", "tower=0..99"], "has 36 layers");
    refused(&["--machines", "RTX 4090"], "cannot be used with");
    let bad = home.write("bad.toml", "[[machine]]\nname = 'a'\nspeed = 3\n");
    assert_refused(&home.run(&["gpt-oss-120b", "--machine-file", &bad]), "unknown field `speed`");
    let long = home.write("long.toml", "#".repeat(70_000));
    assert_refused(&home.run(&["gpt-oss-120b", "--machine-file", &long]), "more than the");
    assert_refused(&home.run(&["gpt-oss-120b", "--machine-file", "nowhere.toml"]), "cannot be read");
}

#[test]
fn impossible_requests_are_explained() {
    let home = Home::new();
    assert_refused(&home.run(&[]), "<MODEL>");
    assert_refused(&home.run(&[""]), "a model is named by");
    assert_refused(&home.run(&["GLM-4.6", "--ctx", "0"]), "neither a whole number above 0");
    assert_refused(&home.run(&["GLM-4.6", "--slots", "100000"]), "at most 256 slots");
    assert_refused(&home.run(&["GLM-4.6", "--ubatch", "100000"]), "4096 rows");
    assert_refused(&home.run(&["GLM-4.6", "--target-tps=nan"]), "is not a number above 0");
    assert_refused(&home.run(&["GLM-4.6", "--headroom", "much"]), "is not a size");
    assert_refused(&home.run(&["GLM-4.6", "--machines", "65x RTX 4090"]), "from 1 to 64");
}

#[test]
fn the_picture_is_well_formed() {
    let home = Home::new();
    let toml = home.write(
        "machines.toml",
        "link = 'rtt=0.2ms,bw=9Gbit'\n[[machine]]\nname = '<b>&\"'\ncount = 2\nlike = 'Ryzen AI Max+ 395 64GB'\n",
    );
    let svg = home.path("plan.svg");
    let text = home.text(&["gpt-oss-120b", "--machine-file", &toml, "--svg", &svg.display().to_string()]);
    assert!(text.contains("plan.svg"));
    well_formed(&std::fs::read_to_string(svg).expect("the picture"));
    let nowhere = home.run(&["gpt-oss-120b", "--machine-file", &toml, "--svg", "/nowhere/at/all.svg"]);
    assert_refused(&nowhere, "cannot be written");
}

/// Every element is closed in order, every attribute quoted, no bare ampersand.
fn well_formed(xml: &str) {
    let (mut open, mut rest) = (Vec::new(), xml);
    while let Some(at) = rest.find('<') {
        let (text, tag) = rest.split_at(at);
        assert!(!text.contains('>'), "a bare > in {text:?}");
        for entity in text.split('&').skip(1) {
            assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|e| entity.starts_with(e)), "a bare & in {text:?}");
        }
        let end = tag.find('>').expect("a tag ends");
        let inner = &tag[1..end];
        assert_eq!(inner.matches('"').count() % 2, 0, "a quote is open in {inner:?}");
        match (inner.strip_prefix('/'), inner.ends_with('/')) {
            (Some(name), _) => assert_eq!(open.pop().as_deref(), Some(name), "closed out of order"),
            (None, false) => open.push(inner.split_whitespace().next().expect("a name").to_owned()),
            (None, true) => {}
        }
        rest = &tag[end + 1..];
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest:?}");
    assert!(xml.starts_with("<svg "));
}
