//! Nothing that breaks loses a request: streams that run while stages and daemons are killed go on where they stopped,
//! and say what they would have said.
//!
//! The model is served with one sequence a micro-batch, so that an undisturbed answer has the same bits every time and
//! whatever differs was done by the failure. `make chaos` runs the same with more requests and writes a report, and some
//! of it once more with micro-batches of all sequences, as most people serve: there an answer is taken up in large chunks,
//! which is quicker; what is said there is not compared, for it differs with whatever else is asked.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use capstan_proto::manage::{DeploymentStatus, Health};
use capstan_testkit::models;
use futures::StreamExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::cables::Cables;
use crate::daemons::{Cluster, Place, chat, wait_for};

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
/// How long a link is cut.
const CUT_FOR: Duration = Duration::from_secs(10);
/// Streams at once.
const STREAMS: usize = 8;
const TOKENS: u32 = 96;
/// Two best logits this near may change places when a prompt is computed in other pieces.
const NEAR: f64 = 0.05;
const PROMPTS: [&str; 6] = [
    "What is the capital of France, and what is it known for?",
    "Count from one to fifty in words.",
    "Explain to a child why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List ten animals and what they eat.",
    "How does a steam engine work?",
];

/// A token as the client got it: its text and how far the second best was behind.
#[derive(Clone, Debug)]
struct Told {
    text: String,
    margin: f64,
}

/// One answer, and what the client noticed.
#[derive(Clone, Debug, Default)]
struct Answer {
    tokens: Vec<Told>,
    text: String,
    /// How many tokens there were at each pause.
    pauses: Vec<usize>,
    /// The longest time without a token after the first.
    longest: Duration,
    finished: bool,
    error: Option<String>,
}

/// What a scenario came to.
#[derive(Default)]
struct Report {
    requests: usize,
    failed: Vec<String>,
    identical: usize,
    near_tie: usize,
    different: Vec<String>,
    pauses: Vec<Duration>,
    disturbances: usize,
    /// Sequences share micro-batches.
    batched: bool,
}

fn question(prompt: usize, n: usize) -> Value {
    let mut body = chat("smol", PROMPTS[prompt], TOKENS);
    // A request of its own each time: nothing may come out of a cache of answers.
    body["user"] = json!(format!("{n}"));
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    body
}

/// Asks and reads to the end.
async fn ask(http: &reqwest::Client, api: &str, body: &Value, count: &AtomicU64) -> Result<Answer, reqwest::Error> {
    let reply = http.post(format!("http://{api}/v1/chat/completions")).json(body).send().await?.error_for_status()?;
    let (mut bytes, mut rest, mut answer) = (reply.bytes_stream(), Vec::new(), Answer::default());
    let mut last: Option<Instant> = None;
    while let Some(piece) = bytes.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                answer.error = Some(format!("the connection broke: {error}"));
                return Ok(answer);
            }
        };
        rest.extend_from_slice(&piece);
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if line.starts_with(": waiting") {
                answer.pauses.push(answer.tokens.len());
            }
            let Some(data) = line.trim_end().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                answer.finished = true;
                continue;
            }
            let event: Value = serde_json::from_str(data).expect("JSON");
            if let Some(message) = event["error"]["message"].as_str() {
                answer.error = Some(message.to_owned());
            }
            let choice = &event["choices"][0];
            answer.text += choice["delta"]["content"].as_str().unwrap_or_default();
            let Some(token) = choice["logprobs"]["content"].get(0) else { continue };
            let top = |i: usize| token["top_logprobs"][i]["logprob"].as_f64().unwrap_or(f64::MIN);
            answer.tokens.push(Told { text: token["token"].to_string(), margin: top(0) - top(1) });
            count.fetch_add(1, Ordering::Relaxed);
            let now = Instant::now();
            if let Some(before) = last.replace(now) {
                answer.longest = answer.longest.max(now - before);
            }
        }
    }
    Ok(answer)
}

impl Report {
    fn take(&mut self, answer: Answer, wanted: &Answer) {
        self.requests += 1;
        if !answer.finished || answer.error.is_some() {
            self.failed.push(format!("after {} tokens: {:?}", answer.tokens.len(), answer.error));
            return;
        }
        if !answer.pauses.is_empty() {
            self.pauses.push(answer.longest);
        }
        let first = answer.tokens.iter().zip(&wanted.tokens).position(|(a, b)| a.text != b.text);
        match first {
            None if answer.text == wanted.text && answer.tokens.len() == wanted.tokens.len() => self.identical += 1,
            // In micro-batches with others rounding differs, without any failure: that says nothing.
            _ if self.batched => {}
            Some(at) if answer.pauses.iter().any(|p| *p <= at) && wanted.tokens[at].margin < NEAR => self.near_tie += 1,
            _ => self.different.push(format!(
                "at token {first:?} (margin {:?}), pauses at {:?}: {:?} instead of {:?}",
                first.map(|at| wanted.tokens[at].margin),
                answer.pauses,
                answer.text,
                wanted.text
            )),
        }
    }

    fn add(&mut self, more: Self) {
        self.requests += more.requests;
        self.failed.extend(more.failed);
        self.identical += more.identical;
        self.near_tie += more.near_tie;
        self.different.extend(more.different);
        self.pauses.extend(more.pauses);
        self.disturbances += more.disturbances;
    }

    fn json(&mut self, name: &str) -> Value {
        self.pauses.sort();
        let s = |d: Option<&Duration>| d.map(Duration::as_secs_f64);
        json!({
            "scenario": name,
            "requests": self.requests,
            "failed": self.failed.len(),
            "identical": self.identical,
            "near_tie": (!self.batched).then_some(self.near_tie),
            "different": (!self.batched).then_some(self.different.len()),
            "disturbances": self.disturbances,
            "interrupted": self.pauses.len(),
            "pause_s": {"median": s(self.pauses.get(self.pauses.len() / 2)), "worst": s(self.pauses.last())},
        })
    }
}

/// What is done to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Nothing at all, to compare with.
    Nothing,
    /// SIGKILL to the process of a stage that is not the driver's.
    StageChild,
    /// SIGKILL to the driver's process.
    DriverChild,
    /// SIGSTOP to a stage's process.
    FrozenChild,
    /// SIGKILL to the daemon of a middle stage, whose children end with it; it comes back later.
    MiddleDaemon,
    /// The same to the daemon that has the driver.
    DriverDaemon,
    /// The same to the daemon that coordinates; another one goes on with the model.
    CoordinatorDaemon,
    /// The cable of a middle stage's machine is pulled for ten seconds.
    CutLink,
    /// For ten seconds nothing that the machine sends arrives.
    OneWayLink,
    /// Every daemon is stopped in order and started again, one after the other.
    RollingRestart,
}

/// A cluster under load.
struct Chaos {
    cluster: Cluster,
    /// What joins the daemons' machines, where they have some of their own.
    cables: Option<Cables>,
    wanted: Arc<Vec<Answer>>,
    tokens: Arc<AtomicU64>,
    rng: StdRng,
    http: reqwest::Client,
    batched: bool,
}

fn signal(pid: u32, name: &str) {
    let done = std::process::Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(done.success(), "kill {name} {pid}");
}

impl Chaos {
    async fn start(seed: u64) -> Self {
        Self::on(seed, Cluster::start(&NAMES).await, None).await
    }

    /// On machines of their own; none where the system has no such thing.
    async fn apart(seed: u64) -> Option<Self> {
        let cables = Cables::lay(NAMES.len())?;
        let place = |i| Place { run: cables.on(i), addrs: Some(cables.addrs(i)) };
        let places: Vec<_> = (0..NAMES.len()).map(place).collect();
        let cluster = Cluster::start_at(&NAMES, &places).await;
        Some(Self::on(seed, cluster, Some(cables)).await)
    }

    async fn on(seed: u64, cluster: Cluster, cables: Option<Cables>) -> Self {
        let mut chaos = Self {
            cluster,
            cables,
            wanted: Arc::default(),
            tokens: Arc::default(),
            rng: StdRng::seed_from_u64(seed),
            http: reqwest::Client::new(),
            batched: false,
        };
        // With a copy on each node, as `--replicas` keeps them, any node may be lost, its coordinator too.
        let file = format!("file:{}", models::smollm2().display());
        let cluster = &chaos.cluster;
        cluster.nodes[0].cli(&["pull", &file, "--name", "smol", "--replicas", "3"]).await;
        wait_for("every node has a copy", || async {
            let models = cluster.nodes[0].cli(&["models", "--json"]).await;
            let models: Value = serde_json::from_str(&models).expect("JSON");
            (models[0]["copies"].as_u64() >= Some(3)).then_some(())
        })
        .await;
        chaos.load(&["--decode-batch", "1"]).await;
        chaos
    }

    /// Loads the model and asks everything once, undisturbed.
    async fn load(&mut self, more: &[&str]) {
        let flags = [&["--ctx", "1024", "--slots", "8"], more].concat();
        self.cluster.load(std::path::Path::new("smol"), "smol", &flags).await;
        let mut wanted = Vec::new();
        for prompt in 0..PROMPTS.len() {
            let (api, question) = (&self.cluster.nodes[0].api, question(prompt, 0));
            let answer = ask(&self.http, api, &question, &self.tokens).await.expect("an answer");
            assert!(answer.finished && answer.tokens.len() == TOKENS as usize, "{answer:?}");
            wanted.push(answer);
        }
        self.wanted = Arc::new(wanted);
    }

    /// The same model in micro-batches of all sequences.
    async fn batch(&mut self) {
        let before = self.settled(3).await;
        self.cluster.nodes[0].cli(&["unload", "smol"]).await;
        wait_for("it is unloaded everywhere", || async {
            let mut left = 0;
            for node in &self.cluster.nodes {
                left += node.status().await.deployments.iter().filter(|d| d.id == before.id).count();
            }
            (left == 0).then_some(())
        })
        .await;
        self.batched = true;
        self.load(&[]).await;
    }

    /// Until so many more tokens came, all streams together.
    async fn let_run(&mut self) {
        let until = self.tokens.load(Ordering::Relaxed) + self.rng.random_range(40..300);
        let tokens = self.tokens.clone();
        wait_for("streams go on", || async { (tokens.load(Ordering::Relaxed) >= until).then_some(()) }).await;
    }

    async fn settled(&self, stages: usize) -> DeploymentStatus {
        wait_for("the model is ready on all its stages", || async {
            let d = self.cluster.nodes[0].deployment("smol").await?;
            let good =
                d.health == Health::Ready && d.stages.len() == stages && d.stages.iter().all(|s| s.pid.is_some());
            good.then_some(d)
        })
        .await
    }

    async fn restart(&mut self, i: usize) {
        self.cluster.nodes[i] = self.cluster.nodes[i].again().await;
    }

    /// Makes trouble so many times, each time once and from the placement that it began with: so a pause is that of one
    /// failure.
    async fn run(&mut self, trouble: Trouble, rounds: usize) -> Report {
        let mut all = Report { batched: self.batched, ..Report::default() };
        for _ in 0..rounds {
            all.add(self.once(trouble).await);
        }
        all
    }

    /// Makes trouble while [`STREAMS`] clients ask, until that is over and a few requests more were answered.
    async fn once(&mut self, trouble: Trouble) -> Report {
        let requests = STREAMS + 2;
        let daemons = !matches!(
            trouble,
            Trouble::Nothing
                | Trouble::StageChild
                | Trouble::DriverChild
                | Trouble::FrozenChild
                | Trouble::RollingRestart
        );
        let deployment = self.settled(3).await;
        let victim = match trouble {
            Trouble::MiddleDaemon | Trouble::CutLink | Trouble::OneWayLink => self.index_of(&deployment, 1),
            Trouble::DriverDaemon => self.index_of(&deployment, 2),
            Trouble::CoordinatorDaemon => {
                let nodes = self.cluster.nodes[0].status().await.nodes;
                let name = nodes.iter().find(|n| n.id == deployment.coordinator).map(|n| n.name.clone());
                self.cluster.nodes.iter().position(|n| Some(&n.name) == name.as_ref()).expect("a node of ours")
            }
            _ => 0,
        };
        // Clients talk to nodes that live; as behind any balancer, one that is gone is not asked.
        let apis: Vec<String> = self.cluster.nodes.iter().map(|n| n.api.clone()).collect();
        let asked: Vec<String> = (0..3).filter(|i| !daemons || *i != victim).map(|i| apis[i].clone()).collect();
        let asked = Arc::new(std::sync::Mutex::new(asked));
        let (next, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..STREAMS {
            let (wanted, tokens, http) = (self.wanted.clone(), self.tokens.clone(), self.http.clone());
            let (asked, next, over, batched) = (asked.clone(), next.clone(), over.clone(), self.batched);
            clients.spawn(async move {
                let mut report = Report { batched, ..Report::default() };
                // The trouble ends before the load does.
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= requests && over.load(Ordering::Relaxed) > 0 {
                        return report;
                    }
                    let prompt = n % PROMPTS.len();
                    let mut tries = n;
                    let answer = loop {
                        let api = {
                            let asked = asked.lock().unwrap();
                            asked[tries % asked.len()].clone()
                        };
                        match ask(&http, &api, &question(prompt, n), &tokens).await {
                            Ok(answer) => break answer,
                            // A node that is stopped refuses; another is asked. Nothing was answered yet.
                            Err(e) if trouble == Trouble::RollingRestart && tries < n + 2000 => {
                                let refused = e.is_connect() || e.is_request() || e.status().is_some_and(|s| s == 503);
                                assert!(refused, "{e}");
                                tries += 1;
                                tokio::task::yield_now().await;
                            }
                            Err(error) => break Answer { error: Some(error.to_string()), ..Answer::default() },
                        }
                    };
                    report.take(answer, &wanted[prompt]);
                }
            });
        }
        self.let_run().await;
        self.disturb(trouble, victim, &asked).await;
        self.let_run().await;
        over.store(1, Ordering::Relaxed);
        let mut all = Report { disturbances: 1, ..Report::default() };
        while let Some(report) = clients.join_next().await {
            all.add(report.expect("a client does not panic"));
        }
        if daemons {
            // Nobody asks any more, so the model goes back to all three.
            self.settled(3).await;
        }
        all
    }

    fn index_of(&self, deployment: &DeploymentStatus, stage: usize) -> usize {
        let name = &deployment.stages[stage].node_name;
        self.cluster.nodes.iter().position(|n| n.name == *name).expect("a node of ours")
    }

    async fn disturb(&mut self, trouble: Trouble, victim: usize, asked: &std::sync::Mutex<Vec<String>>) {
        match trouble {
            Trouble::Nothing => {}
            Trouble::StageChild | Trouble::DriverChild | Trouble::FrozenChild => {
                let before = self.settled(3).await;
                let stage = match trouble {
                    Trouble::DriverChild => 2,
                    _ => self.rng.random_range(0..2),
                };
                let name = if trouble == Trouble::FrozenChild { "-STOP" } else { "-KILL" };
                signal(before.stages[stage].pid.expect("it runs"), name);
                let after = self.cluster.nodes[0].wait_ready("smol", before.epoch.0).await;
                // No prompt here is long enough to be taken from the cache in whole chunks.
                let snapshots = cfg!(target_os = "linux") && !self.batched;
                wait_for("answers go on from their snapshots", || async {
                    let now = self.cluster.nodes[0].deployment("smol").await?;
                    let cached = now.stages.last().is_some_and(|driver| driver.stats.cached_tokens > 0);
                    (!snapshots || now.epoch >= after.epoch && cached).then_some(())
                })
                .await;
            }
            Trouble::MiddleDaemon | Trouble::DriverDaemon | Trouble::CoordinatorDaemon => {
                let eye = (victim + 1) % self.cluster.nodes.len();
                let before = self.cluster.nodes[eye].wait_ready("smol", 0).await;
                self.cluster.nodes[victim].kill().await;
                // The others take its layers over, and it comes back while they serve.
                let after = self.cluster.nodes[eye].wait_ready("smol", before.epoch.0).await;
                if trouble == Trouble::CoordinatorDaemon {
                    assert_ne!(after.coordinator, before.coordinator, "{after:?}");
                }
                self.restart(victim).await;
            }
            Trouble::CutLink | Trouble::OneWayLink => {
                let eye = (victim + 1) % self.cluster.nodes.len();
                let before = self.cluster.nodes[eye].wait_ready("smol", 0).await;
                let cables = self.cables.as_ref().expect("machines of their own");
                if trouble == Trouble::CutLink {
                    cables.cut(victim)
                } else {
                    cables.mute(victim)
                }
                tokio::time::sleep(CUT_FOR).await;
                cables.mend(victim);
                self.cluster.nodes[eye].wait_ready("smol", before.epoch.0).await;
                let back = &self.cluster.nodes[victim];
                wait_for("the node that was cut off is back", || async {
                    back.status().await.nodes.iter().all(|n| n.online).then_some(())
                })
                .await;
            }
            Trouble::RollingRestart => {
                for i in [1, 2, 0] {
                    self.settled(3).await;
                    let api = self.cluster.nodes[i].api.clone();
                    asked.lock().unwrap().retain(|a| *a != api);
                    self.cluster.nodes[i].cli(&["stop"]).await;
                    self.restart(i).await;
                    asked.lock().unwrap().push(self.cluster.nodes[i].api.clone());
                    let node = &self.cluster.nodes[i];
                    wait_for("a restarted node sees the model", || node.deployment("smol")).await;
                }
                self.settled(3).await;
            }
        }
    }
}

fn check(report: &Report, trouble: Trouble) {
    assert!(report.failed.is_empty(), "{trouble:?} lost {} requests: {:?}", report.failed.len(), report.failed);
    assert!(report.different.is_empty(), "{trouble:?} changed answers: {:?}", report.different);
    assert!(!report.pauses.is_empty(), "{trouble:?} interrupted nobody");
}

/// What is broken, one after the other.
const ALL: [Trouble; 7] = [
    Trouble::StageChild,
    Trouble::DriverChild,
    Trouble::FrozenChild,
    Trouble::MiddleDaemon,
    Trouble::DriverDaemon,
    Trouble::CoordinatorDaemon,
    Trouble::RollingRestart,
];

/// What is done once more with micro-batches of all sequences.
const BATCHED: [Trouble; 5] =
    [Trouble::Nothing, Trouble::StageChild, Trouble::DriverChild, Trouble::MiddleDaemon, Trouble::CoordinatorDaemon];

const LINKS: [Trouble; 2] = [Trouble::CutLink, Trouble::OneWayLink];

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_whatever_breaks() {
    let mut chaos = Chaos::start(1).await;
    for trouble in ALL {
        let mut report = chaos.run(trouble, 1).await;
        println!("{}", report.json(&format!("{trouble:?}")));
        check(&report, trouble);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_when_a_link_is_cut() {
    let Some(mut chaos) = Chaos::apart(1).await else {
        eprintln!("this system makes no network namespaces for us (that takes Linux and root): nothing was tried");
        return;
    };
    for trouble in LINKS {
        let mut report = chaos.run(trouble, 1).await;
        println!("{}", report.json(&format!("{trouble:?}")));
        check(&report, trouble);
    }
}

/// `make chaos` and `make soak`: more of the same, with a report.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; `make chaos` runs it"]
async fn chaos_at_length() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let rounds = number("CHAOS_ROUNDS").unwrap_or(3) as usize;
    let minutes = number("CHAOS_MINUTES");
    let seed = number("CHAOS_SEED").unwrap_or(1);
    let out = std::env::var("CHAOS_REPORT").expect("CHAOS_REPORT says where the report goes");
    println!("seed {seed}");
    let began = Instant::now();
    let apart = Chaos::apart(seed).await;
    let (mut chaos, mut troubles) = match apart {
        Some(chaos) => (chaos, [&ALL[..], &LINKS].concat()),
        None => {
            println!("no network namespaces here (they take Linux and root): links are not cut");
            (Chaos::start(seed).await, ALL.to_vec())
        }
    };
    let only = std::env::var("CHAOS_ONLY").ok();
    let wanted = |t: &Trouble| only.as_ref().is_none_or(|only| format!("{t:?}") == *only);
    troubles.retain(wanted);
    assert!(!troubles.is_empty() || BATCHED.iter().any(wanted), "CHAOS_ONLY is the name of nothing that is done");
    let (mut reports, mut worst) = (Vec::new(), None);
    let over = |began: Instant| minutes.is_none_or(|m| began.elapsed() >= Duration::from_secs(60 * m));
    loop {
        for &trouble in &troubles {
            let mut report = chaos.run(trouble, rounds).await;
            let batched = if chaos.batched { ", shared micro-batches" } else { "" };
            let json = report.json(&format!("{trouble:?}{batched}"));
            println!("{json}");
            reports.push(json);
            let text = serde_json::to_string_pretty(&json!({"seed": seed, "scenarios": reports})).expect("JSON");
            std::fs::write(&out, text).expect("the report can be written");
            if !report.failed.is_empty() || !report.different.is_empty() {
                worst.get_or_insert(format!("{trouble:?}: {:?} {:?}", report.failed, report.different));
            }
        }
        if !over(began) {
            continue;
        }
        troubles = BATCHED.into_iter().filter(wanted).collect();
        if chaos.batched || minutes.is_some() || troubles.is_empty() {
            break;
        }
        chaos.batch().await;
    }
    assert_eq!(worst, None);
}
