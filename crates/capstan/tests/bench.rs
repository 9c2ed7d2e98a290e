//! `capstan bench` through the real binary, against a small server that follows a script.
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};

use serde_json::{Value, json};

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Asked {
    /// 0 is the first question; lists of models do not count.
    number: usize,
    path: String,
    key: Option<String>,
    body: Value,
}

impl Asked {
    fn prompt(&self) -> &str {
        self.body["prompt"].as_str().expect("a prompt")
    }
}

/// What the server does with a connection, in order.
enum Act {
    /// An answer's status and headers begin.
    Head(&'static str),
    /// Bytes of the answer, sent at once.
    Bytes(Vec<u8>),
    /// The answer ends as it should; the connection stays.
    End,
    /// The connection ends in the middle.
    Cut,
    /// Nothing more happens until the client goes away.
    Hold,
    /// These bytes, again and again until the client goes away.
    Flood(Vec<u8>),
    /// Something is done between writes.
    Call(Box<dyn FnOnce() + Send>),
}

const SSE: &str = "200 OK\r\ncontent-type: text/event-stream";

/// An OpenAI-compatible server that answers each question by a script.
struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    connections: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    fn start(models: &[(&str, &str)], script: impl Fn(&Asked) -> Vec<Act> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let server = Self {
            address: listener.local_addr().expect("an address"),
            asked: Arc::default(),
            connections: Arc::default(),
            stopped: Arc::default(),
        };
        let models: Vec<Value> = models.iter().map(|(id, owner)| json!({ "id": id, "owned_by": owner })).collect();
        let models = Arc::new(json!({ "object": "list", "data": models }).to_string());
        let (asked, connections, stopped) = (server.asked.clone(), server.connections.clone(), server.stopped.clone());
        let script = Arc::new(script);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                connections.fetch_add(1, Ordering::SeqCst);
                let (asked, script, models) = (asked.clone(), script.clone(), models.clone());
                let connection = connection.expect("a connection");
                std::thread::spawn(move || serve(connection, &asked, &*script, &models));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no test thread panicked").clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees the flag.
        TcpStream::connect(self.address).ok();
    }
}

/// Serves one connection until either side ends it. A client that goes away is no error.
fn serve(mut out: TcpStream, asked: &Mutex<Vec<Asked>>, script: &dyn Fn(&Asked) -> Vec<Act>, models: &str) {
    out.set_nodelay(true).expect("a socket");
    let mut input = BufReader::new(out.try_clone().expect("a socket"));
    while let Some((path, key, body)) = read_request(&mut input) {
        let acts = if path.ends_with("/models") {
            vec![Act::Head("200 OK\r\ncontent-type: application/json"), bytes(models), Act::End]
        } else {
            let request = {
                let mut asked = asked.lock().expect("no test thread panicked");
                let request = Asked { number: asked.len(), path, key, body };
                asked.push(request.clone());
                request
            };
            script(&request)
        };
        for act in acts {
            let written = match act {
                Act::Head(head) => write!(out, "HTTP/1.1 {head}\r\ntransfer-encoding: chunked\r\n\r\n"),
                Act::Bytes(bytes) => out.write_all(&framed(&bytes)),
                Act::Flood(bytes) => {
                    while out.write_all(&framed(&bytes)).is_ok() {}
                    return;
                }
                Act::End => out.write_all(b"0\r\n\r\n"),
                Act::Cut => return,
                Act::Hold => {
                    let mut rest = Vec::new();
                    input.read_to_end(&mut rest).ok();
                    return;
                }
                Act::Call(call) => {
                    call();
                    Ok(())
                }
            };
            if written.is_err() {
                return;
            }
        }
    }
}

/// A chunk of HTTP's chunked encoding.
fn framed(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

fn read_request(input: &mut impl BufRead) -> Option<(String, Option<String>, Value)> {
    let mut line = String::new();
    input.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split(' ').nth(1)?.to_string();
    let (mut length, mut key) = (0, None);
    loop {
        line.clear();
        input.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => key = Some(value.trim().to_string()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body).ok()?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).ok()? };
    Some((path, key, body))
}

fn bytes(text: &str) -> Act {
    Act::Bytes(text.as_bytes().to_vec())
}

fn event(data: &Value) -> Act {
    bytes(&format!("data: {data}\n\n"))
}

fn text(text: &str) -> Act {
    event(&json!({ "choices": [{ "index": 0, "text": text, "finish_reason": null }], "usage": null }))
}

/// The end of an answer, with the server's counts.
fn finish(prompt_tokens: usize, completion_tokens: usize) -> Vec<Act> {
    let usage = json!({ "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens });
    vec![
        event(&json!({ "choices": [{ "index": 0, "text": "", "finish_reason": "length" }] })),
        event(&json!({ "choices": [], "usage": usage })),
        bytes("data: [DONE]\n\n"),
        Act::End,
    ]
}

/// An answer of `chunks` chunks that are said to hold `tokens` tokens; a word is a token.
fn answer(asked: &Asked, chunks: usize, tokens: usize) -> Vec<Act> {
    let mut acts = vec![Act::Head(SSE)];
    acts.extend((0..chunks).map(|_| text(" word")));
    acts.extend(finish(asked.prompt().split(' ').count(), tokens));
    acts
}

fn refusal(head: &'static str, message: &str) -> Vec<Act> {
    vec![Act::Head(head), bytes(&json!({ "error": { "message": message } }).to_string()), Act::End]
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capstan"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CAPSTAN_") {
            command.env_remove(key);
        }
    }
    command.env_remove("OPENAI_API_KEY").arg("bench").args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().expect("capstan starts")
}

fn bench(server: &Server, args: &[&str]) -> Output {
    run(&[&["--url", &server.url()], args].concat())
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report of a measurement that ended with `code`.
fn report(output: &Output, code: i32) -> Value {
    assert_eq!(output.status.code(), Some(code), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

const ONE: &[(&str, &str)] = &[("tiny", "someone")];

#[test]
fn a_grid_is_measured_with_prompts_that_differ_from_the_first_word() {
    let pair = Barrier::new(2);
    let server = Server::start(ONE, move |asked| {
        // Number 0 warms up alone; after it two are on their way at once, or nobody gets past the barrier.
        if asked.number > 0 {
            pair.wait();
        }
        answer(asked, 5, 5)
    });
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("report.json");
    let args = ["--concurrency", "2", "--prompt-tokens", "20", "--max-tokens", "5", "--seed", "9", "--json"];
    let output = bench(&server, &[&args[..], &["--output", file.to_str().expect("UTF-8")]].concat());
    let report = report(&output, 0);
    assert_eq!(stderr(&output), "", "no bar without a terminal");
    assert_eq!(report, serde_json::from_slice::<Value>(&std::fs::read(file).expect("a file")).expect("JSON"));

    let row = &report["combinations"][0];
    assert_eq!(report["combinations"].as_array().map(Vec::len), Some(1));
    assert_eq!((&row["succeeded"], &row["requests"], &row["failed"]), (&json!(4), &json!(4), &json!({})));
    assert_eq!((&row["output_tokens"], &row["output_tokens_from"]), (&json!(20), &json!("usage")));
    assert_eq!((&row["prompt_tokens"], &row["tokens_per_chunk"]), (&json!(20.0), &json!(1.0)));
    assert_eq!((&row["ttft_ms"]["count"], &row["itl_ms"]["count"]), (&json!(4), &json!(16)));
    assert!(row["output_tokens_per_s"].as_f64().is_some_and(|v| v > 0.0));
    assert_eq!((&row["prefill_tokens_per_s"], &report["notes"]), (&Value::Null, &json!([])));
    assert_eq!((&report["interrupted"], &report["settings"]["seed"]), (&json!(false), &json!(9)));

    let asked = server.asked();
    let first_words: HashSet<_> = asked.iter().filter_map(|a| a.prompt().split(' ').next()).collect();
    assert_eq!((asked.len(), first_words.len()), (5, 5));
    let standard = ["model", "max_tokens", "temperature", "seed", "stream", "stream_options", "prompt"];
    for a in &asked {
        assert_eq!(a.path, "/v1/completions");
        assert_eq!(a.body.as_object().map(|o| o.keys().map(String::as_str).collect::<Vec<_>>()), Some(standard.into()));
        assert_eq!((&a.body["model"], a.key.as_deref()), (&json!("tiny"), None));
    }
    assert!(server.connections.load(Ordering::SeqCst) <= 3, "each stream keeps its connection");
}

#[test]
fn a_seed_repeats_its_prompts_and_lengths_follow_the_servers_count() {
    // Every word counts as two tokens here.
    let start = || {
        Server::start(ONE, |asked| {
            let mut acts = vec![Act::Head(SSE), text("a")];
            acts.extend(finish(2 * asked.prompt().split(' ').count(), 1));
            acts
        })
    };
    let (first, second) = (start(), start());
    let args = ["--concurrency", "1", "--prompt-tokens", "64,20", "--requests", "2", "--max-tokens", "1", "--json"];
    for (server, seed) in [(&first, "5"), (&second, "5")] {
        let report = report(&bench(server, &[&args[..], &["--seed", seed]].concat()), 0);
        let lengths: Vec<_> = report["combinations"].as_array().into_iter().flatten().collect();
        assert_eq!((&lengths[0]["prompt_tokens"], &lengths[1]["prompt_tokens"]), (&json!(64.0), &json!(20.0)));
    }
    let prompts = |server: &Server| server.asked().iter().map(|a| a.prompt().to_string()).collect::<Vec<_>>();
    assert_eq!(prompts(&first), prompts(&second));
}

#[test]
fn failed_requests_are_counted_by_kind_and_the_rest_is_measured() {
    let server = Server::start(ONE, |asked| match asked.number {
        0 => refusal("429 Too Many Requests\r\nretry-after: 0", "the queue is full"),
        1 => vec![Act::Head(SSE), text("a"), event(&json!({ "error": { "message": "a stage was lost" } })), Act::End],
        2 => vec![Act::Head(SSE), text("a"), Act::Cut],
        3 => vec![Act::Head(SSE), text("a"), Act::End],
        4 => refusal("500 Internal Server Error", "out of luck"),
        5 => vec![Act::Head(SSE), bytes("data: not JSON\n\n"), Act::End],
        6 => vec![Act::Head("200 OK\r\ncontent-type: application/json"), bytes("{}"), Act::End],
        7 => refusal("429 Too Many Requests\r\nretry-after: 0", "still full"),
        _ => answer(asked, 3, 3),
    });
    let args = ["--concurrency", "1", "--prompt-tokens", "8", "--max-tokens", "3", "--requests", "10", "--warmup", "0"];
    let output = bench(&server, &[&args[..], &["--json"]].concat());
    let report = report(&output, 0);
    let row = &report["combinations"][0];
    assert_eq!((&row["succeeded"], &row["output_tokens"], &row["complete"]), (&json!(2), &json!(6), &json!(true)));
    let failed = row["failed"].as_object().expect("an object");
    let counts: Vec<_> = failed.iter().map(|(kind, f)| (kind.as_str(), f["count"].as_u64().unwrap_or(0))).collect();
    let expected = [("broken_off", 3), ("error_in_stream", 1), ("http_429", 2), ("http_500", 1), ("malformed", 1)];
    assert_eq!(counts, expected);
    assert_eq!(failed["http_429"]["first"], "HTTP 429: the queue is full");
    assert!(failed["error_in_stream"]["first"].as_str().is_some_and(|m| m.ends_with("a stage was lost")));
}

#[test]
fn people_get_a_table_with_failures_and_notes() {
    let server = Server::start(ONE, |asked| match asked.number {
        1 => refusal("429 Too Many Requests\r\nretry-after: 0", "the queue is full"),
        _ => answer(asked, 4, 12),
    });
    let args = ["--concurrency", "1", "--prompt-tokens", "16", "--max-tokens", "12", "--requests", "3", "--seed", "1"];
    let output = bench(&server, &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let row = shown.lines().skip_while(|l| !l.starts_with("STREAMS")).nth(1).expect("a row");
    assert_eq!(row.split_whitespace().take(3).collect::<Vec<_>>(), ["1", "16", "2/3"], "{shown}");
    for words in
        ["tiny at http://127.0.0.1:", "seed 1", "1 × http_429: HTTP 429: the queue is full", "3.0 tokens a chunk"]
    {
        assert!(shown.contains(words), "{words:?} is not in:\n{shown}");
    }
}

#[test]
fn comments_split_packets_and_other_servers_shapes_are_understood() {
    let server = Server::start(ONE, |_| {
        // A chat as llama.cpp streams it: a role first, thoughts beside the text, timings at the end, bytes cut anywhere.
        let chunk = |delta: Value| json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": null }] });
        let last = json!({
            "choices": [{ "index": 0, "delta": {}, "finish_reason": "stop" }],
            "usage": { "prompt_tokens": 50, "completion_tokens": 3, "prompt_tokens_details": { "cached_tokens": 10 } },
            "timings": { "prompt_n": 40, "prompt_ms": 100.0 },
        });
        let stream = format!(
            ": keep-alive\r\n\r\ndata: {}\r\n\r\nevent: x\r\ndata: {}\r\n\r\n: again\r\n\r\ndata:{}\r\n\r\ndata: {}\r\n\r\ndata: {last}",
            chunk(json!({ "role": "assistant", "content": null })),
            chunk(json!({ "reasoning_content": "hm" })),
            chunk(json!({ "content": "é" })),
            chunk(json!({ "content": "日本" })),
        );
        let mut acts = vec![Act::Head(SSE)];
        acts.extend(stream.as_bytes().chunks(7).map(|c| Act::Bytes(c.to_vec())));
        acts.push(Act::End);
        acts
    });
    let args = ["--endpoint", "chat", "--concurrency", "1", "--prompt-tokens", "8", "--requests", "1", "--json"];
    let report = report(&bench(&server, &args), 0);
    let row = &report["combinations"][0];
    assert_eq!((&row["succeeded"], &row["itl_ms"]["count"]), (&json!(1), &json!(2)));
    assert_eq!((&row["output_tokens"], &row["cached_tokens"]), (&json!(3), &json!(10)));
    assert_eq!(row["prefill_tokens_per_s"], json!(400.0));
    let asked = &server.asked()[0];
    assert_eq!((asked.path.as_str(), &asked.body["messages"][0]["role"]), ("/v1/chat/completions", &json!("user")));
}

#[test]
fn without_usage_chunks_are_counted_and_that_is_said() {
    let server = Server::start(ONE, |_| {
        vec![Act::Head(SSE), text("a"), text("b"), text("c"), bytes("data: [DONE]\n\n"), Act::End]
    });
    let args = ["--concurrency", "1", "--prompt-tokens", "8", "--max-tokens", "3", "--requests", "2", "--json"];
    let report = report(&bench(&server, &args), 0);
    let row = &report["combinations"][0];
    assert_eq!((&row["output_tokens"], &row["output_tokens_from"]), (&json!(6), &json!("chunks")));
    assert_eq!(row["prompt_tokens"], Value::Null);
    assert!(report["notes"][0].as_str().is_some_and(|n| n.contains("usage")), "{}", report["notes"]);
}

#[test]
fn when_all_requests_fail_the_first_error_ends_it() {
    let server = Server::start(ONE, |asked| match asked.number {
        0 => refusal("400 Bad Request", "the prompt is too long"),
        _ => refusal("500 Internal Server Error", "later"),
    });
    let args = ["--concurrency", "1,2", "--prompt-tokens", "8", "--warmup", "0", "--json"];
    let output = bench(&server, &args);
    let report = report(&output, 1);
    assert!(stderr(&output).contains("every request failed; the first: HTTP 400: the prompt is too long"));
    assert_eq!(report["combinations"].as_array().map(Vec::len), Some(2));
}

#[test]
fn an_answer_that_takes_too_long_is_a_failure() {
    let server = Server::start(ONE, |asked| match asked.number {
        0 => vec![Act::Head(SSE), text("a"), Act::Hold],
        _ => answer(asked, 2, 2),
    });
    let args = ["--concurrency", "1", "--prompt-tokens", "8", "--requests", "2", "--warmup", "0", "--timeout", "2"];
    let report = report(&bench(&server, &[&args[..], &["--json"]].concat()), 0);
    let row = &report["combinations"][0];
    assert_eq!((&row["failed"]["timed_out"]["count"], &row["succeeded"]), (&json!(1), &json!(1)));
}

#[cfg(unix)]
#[test]
fn ctrl_c_shows_what_was_measured_so_far() {
    let (held, is_held) = mpsc::channel();
    let held = Mutex::new(held);
    let server = Server::start(ONE, move |asked| match asked.number {
        0..2 => answer(asked, 2, 2),
        _ => {
            let held = held.lock().expect("no test thread panicked").clone();
            let tell = Act::Call(Box::new(move || held.send(()).expect("the test waits")));
            vec![Act::Head(SSE), text("a"), tell, Act::Hold]
        }
    });
    let url = server.url();
    let args = ["--url", &url, "--concurrency", "1", "--prompt-tokens", "8,9", "--warmup", "0", "--json"];
    let child = command(&args).spawn().expect("capstan starts");
    is_held.recv().expect("the third request");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs").success());
    let output = child.wait_with_output().expect("it ends");
    let report = report(&output, 130);
    let row = &report["combinations"][0];
    assert_eq!((&report["interrupted"], &row["succeeded"], &row["complete"]), (&json!(true), &json!(2), &json!(false)));
    assert_eq!(report["combinations"].as_array().map(Vec::len), Some(1), "the other was not begun");
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
}

#[test]
fn the_model_is_the_only_one_or_the_one_that_is_named() {
    let brief = ["--concurrency", "1", "--prompt-tokens", "8", "--requests", "1", "--max-tokens", "2", "--json"];
    let two = Server::start(&[("a", "x"), ("b", "x")], |asked| answer(asked, 2, 2));
    let refused = bench(&two, &brief);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("choose one with --model: a, b"), "{}", stderr(&refused));
    report(&bench(&two, &[&brief[..], &["--model", "b"]].concat()), 0);
    assert_eq!(two.asked()[0].body["model"], "b");
    report(&bench(&two, &[&brief[..], &["--model", "an-alias"]].concat()), 0);

    let none = Server::start(&[], |asked| answer(asked, 2, 2));
    assert!(stderr(&bench(&none, &brief)).contains("no model is served"));

    // Ours is asked to go on to the last token, others only on demand; and it knows what it serves.
    let ours = Server::start(&[("kimi", "capstan")], |asked| answer(asked, 2, 2));
    report(&bench(&ours, &brief), 0);
    assert_eq!(ours.asked()[0].body["ignore_eos"], true);
    let wrong = bench(&ours, &[&brief[..], &["--model", "kimmy"]].concat());
    assert!(
        stderr(&wrong).contains("\"kimmy\" is not served") && stderr(&wrong).contains("kimi"),
        "{}",
        stderr(&wrong)
    );
}

#[test]
fn keys_and_urls() {
    let server = Server::start(ONE, |asked| answer(asked, 2, 2));
    let url = server.url();
    let args = ["--url", &url, "--concurrency", "1", "--prompt-tokens", "8", "--requests", "1", "--max-tokens", "2"];
    let output = command(&args).env("OPENAI_API_KEY", "sk-secret").output().expect("capstan starts");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(server.asked()[0].key.as_deref(), Some("Bearer sk-secret"));
    let help = command(&["--help"]).env("OPENAI_API_KEY", "sk-secret").output().expect("capstan starts");
    assert!(!String::from_utf8_lossy(&help.stdout).contains("sk-secret"));

    assert!(stderr(&run(&["--url", "https://api.example/v1"])).contains("https is not supported"));
    assert!(
        stderr(&run(&["--url", &url, "--output", "/no/such/folder/x"])).contains("there is no folder /no/such/folder")
    );
    // A port that was ours a moment ago and is nobody's now.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
    let refused = run(&["--url", &format!("http://{free}/v1"), "--model", "x"]);
    assert!(stderr(&refused).contains("nothing answers there"), "{}", stderr(&refused));
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn a_running_stream_is_measured_while_a_long_prompt_comes_in() {
    // The stream and the long prompt take turns: 49 chunks, the question, six chunks, the answer, chunks for ever.
    let turns: [Turn; 3] = Default::default();
    let server = Server::start(ONE, move |asked| {
        let [question, chunks, end] = &turns;
        let mut acts = Vec::new();
        match asked.body["max_tokens"].as_u64() {
            Some(2) => {
                acts.extend([question.give(), chunks.take()]);
                acts.extend(answer(asked, 2, 2));
                acts.push(end.give());
            }
            Some(5) => acts = answer(asked, 5, 5),
            _ => {
                acts.push(Act::Head(SSE));
                acts.extend((0..49).map(|_| text("a")));
                acts.push(question.take());
                acts.extend((0..6).map(|_| text("b")));
                let Act::Bytes(more) = text("c") else { unreachable!("text is bytes") };
                acts.extend([chunks.give(), end.take(), Act::Flood(more)]);
            }
        }
        acts
    });
    let args = ["--concurrency", "1", "--prompt-tokens", "8", "--requests", "1", "--max-tokens", "5", "--json"];
    let report = report(&bench(&server, &[&args[..], &["--interference", "300"]].concat()), 0);
    let i = &report["interference"];
    assert_eq!((&i["rounds"], &i["ended_early"], &i["failed"]), (&json!(3), &json!(0), &json!({})));
    assert_eq!((&i["prompt_tokens"], &i["ttft_ms"]["count"]), (&json!(300.0), &json!(3)));
    assert_eq!(i["itl_unloaded_ms"]["count"], json!(144));
    assert!(i["itl_during_ms"]["count"].as_u64().is_some_and(|n| n >= 3), "{i}");
    assert!(i["ratio"]["p95"].as_f64().is_some_and(|r| r >= 0.0), "{i}");
}

/// One connection waits here for another.
#[derive(Clone)]
struct Turn(mpsc::SyncSender<()>, Arc<Mutex<mpsc::Receiver<()>>>);

impl Default for Turn {
    fn default() -> Self {
        let (give, take) = mpsc::sync_channel(1);
        Self(give, Arc::new(Mutex::new(take)))
    }
}

impl Turn {
    fn give(&self) -> Act {
        let give = self.0.clone();
        Act::Call(Box::new(move || give.send(()).expect("someone waits")))
    }

    fn take(&self) -> Act {
        let take = self.1.clone();
        Act::Call(Box::new(move || take.lock().expect("no test thread panicked").recv().expect("someone gives")))
    }
}
