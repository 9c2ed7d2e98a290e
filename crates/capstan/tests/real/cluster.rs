//! Three real daemons, one model, one answer; and what happens when things go wrong.
use crate::daemons::{Cluster, Daemon, chat, try_capstan, wait_for};
use capstan_testkit::models;
use futures::StreamExt;
use serde_json::{Value, json};

/// The text of a streamed answer.
fn text_of(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no answer in {answer}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_answer_as_one() {
    let cluster = Cluster::start(&["alpha", "beta", "gamma"]).await;
    let deployment = cluster.load(&models::smollm2(), "smol", &["--ctx", "1024", "--slots", "8"]).await;
    assert_eq!(deployment.stages.len(), 3);
    let pids: std::collections::BTreeSet<_> = deployment.stages.iter().filter_map(|s| s.pid).collect();
    assert_eq!(pids.len(), 3, "three compute processes");
    assert_eq!(deployment.stages.iter().map(|s| s.layers.count()).sum::<u32>(), 30);

    // Every node answers, streaming and not, and all say the same.
    let question = chat("smol", "What is the capital of France?", 24);
    let mut answers = Vec::new();
    for node in &cluster.nodes {
        let (status, answer) = node.post("/v1/chat/completions", &question).await;
        assert_eq!(status, 200, "{answer}");
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        answers.push(content(&answer).to_owned());
        let mut streamed = question.clone();
        streamed["stream"] = json!(true);
        answers.push(text_of(&node.stream(&streamed).await));
    }
    assert!(answers[0].contains("Paris"), "{}", answers[0]);
    assert!(answers.iter().all(|a| *a == answers[0]), "{answers:?}");

    // A middle stage's node holds its shard and nothing else of the model.
    let middle = &deployment.stages[1];
    let node = cluster.nodes.iter().find(|n| n.name == middle.node_name).unwrap();
    let ggufs: Vec<_> = files(&node.data_dir).into_iter().filter(|(p, _)| p.ends_with(".gguf")).collect();
    assert_eq!(ggufs.len(), 1, "{ggufs:?}");
    let shard = capstan_gguf::Model::open(ggufs[0].0.as_ref()).unwrap();
    assert_eq!(shard.n_layers(), middle.layers.count());
    assert_eq!(shard.metadata().get_str("tokenizer.ggml.model"), Some("none"));
    assert!(shard.metadata().get("tokenizer.ggml.tokens").is_none());
    assert!(shard.tensor("output_norm.weight").is_none() || shard.tensor("token_embd.weight").unwrap().dims[1] == 32);
    let stored: u64 = files(&node.data_dir).iter().map(|(_, bytes)| bytes).sum();
    assert!(stored < shard.bytes() + (2 << 20), "{stored} bytes stored for a shard of {}", shard.bytes());

    // Slots are free afterwards, also after a client that went away in the middle.
    let mut endless = chat("smol", "Count from one to a thousand.", 900);
    endless["stream"] = json!(true);
    endless["ignore_eos"] = json!(true);
    let url = format!("http://{}/v1/chat/completions", cluster.nodes[1].api);
    let mut stream = cluster.nodes[1].http.post(url).json(&endless).send().await.unwrap().bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    wait_for("the slot of a client that left is free", || async {
        let driver = cluster.nodes[0].deployment("smol").await?.stages.pop()?;
        (driver.stats.slots_used == 0).then_some(())
    })
    .await;

    // Unloading ends the compute processes everywhere.
    cluster.nodes[0].cli(&["unload", "smol"]).await;
    for node in &cluster.nodes {
        wait_for("no node knows the model any more", || async {
            node.status().await.deployments.is_empty().then_some(())
        })
        .await;
    }
    wait_for("no compute process is left", || async { pids.iter().all(|pid| !alive(*pid)).then_some(()) }).await;
}

/// All files under a folder with their sizes.
fn files(folder: &std::path::Path) -> Vec<(String, u64)> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            out.extend(files(&entry.path()));
        } else {
            out.push((entry.path().to_string_lossy().into_owned(), entry.metadata().unwrap().len()));
        }
    }
    out
}

fn alive(pid: u32) -> bool {
    // A process that ended but was not waited for yet is in state Z.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_get_a_sentence_and_the_right_status() {
    let cluster = Cluster::start(&["alpha"]).await;
    let node = &cluster.nodes[0];
    let path = models::smollm2();
    cluster.load(&path, "smol", &["--ctx", "256", "--slots", "1"]).await;
    let url = format!("http://{}/v1/chat/completions", node.api);

    let reply =
        node.http.post(&url).header("content-type", "application/json").body("{\"model\":").send().await.unwrap();
    assert_eq!(reply.status(), 400);
    let error: Value = reply.json().await.unwrap();
    assert!(error["error"]["message"].is_string() && error["error"]["type"].is_string(), "{error}");

    let (status, error) = node.post("/v1/chat/completions", &chat("nobody", "hi", 4)).await;
    assert_eq!((status, error["error"]["code"].as_str()), (404, Some("model_not_found")), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("smol"), "{error}");

    let (status, error) = node.post("/v1/chat/completions", &chat("smol", &"word ".repeat(400), 4)).await;
    assert_eq!((status, error["error"]["code"].as_str()), (400, Some("context_length_exceeded")), "{error}");

    let mut wrong = chat("smol", "hi", 4);
    wrong["temperature"] = json!(-1);
    assert_eq!(node.post("/v1/chat/completions", &wrong).await.0, 400);

    // One slot and a bounded queue: what is too many is told so at once, and the rest is answered.
    let bodies: Vec<Value> = (0..capstan_proto::limits::QUEUE_MAX + 24).map(|_| chat("smol", "hi", 2)).collect();
    let replies = futures::future::join_all(bodies.iter().map(|b| node.post("/v1/chat/completions", b))).await;
    let count = |status| replies.iter().filter(|(s, _)| *s == status).count();
    assert!(count(429) > 0 && count(200) > capstan_proto::limits::QUEUE_MAX, "{} and {}", count(429), count(200));
    assert_eq!(count(200) + count(429), replies.len());

    // Files that are no model, and placements that cannot be.
    let bad = cluster.folder.path().join("bad.gguf");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&bad, &bytes[..bytes.len() / 2]).unwrap();
    for (args, word) in [
        (vec!["load", bad.to_str().unwrap()], "bad.gguf"),
        (vec!["load", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (vec!["load", path.to_str().unwrap(), "--name", "x", "--layers", "alpha=0..10"], "30"),
        (vec!["load", path.to_str().unwrap(), "--name", "x", "--nodes", "delta"], "delta"),
        (vec!["load", path.to_str().unwrap(), "--name", "smol"], "smol"),
        (vec!["load", path.to_str().unwrap(), "--name", "x", "--ctx", "1"], "ctx"),
        (vec!["unload", "nobody"], "nobody"),
        (vec!["join", "capstan1nonsense"], "ticket"),
    ] {
        let (ok, out, err) = try_capstan(&node.data_dir, &args).await;
        assert!(!ok && err.contains(word), "{args:?}: {out}\n{err}");
    }
    // A file that only llama.cpp finds wrong: the load ends with its sentence, and nothing is left.
    let lying = cluster.folder.path().join("lying.gguf");
    std::fs::write(&lying, with_more_layers(&bytes)).unwrap();
    for layers in ["alpha=0..31", "alpha=0..15,alpha=15..31"] {
        let args = ["load", lying.to_str().unwrap(), "--name", "liar", "--layers", layers];
        let (ok, out, err) = try_capstan(&node.data_dir, &args).await;
        assert!(!ok && err.contains("blk."), "{layers}: {out}\n{err}");
    }
    assert!(node.deployment("liar").await.is_none());
    // After all that the daemon still answers.
    assert_eq!(node.post("/v1/chat/completions", &chat("smol", "hi", 2)).await.0, 200);
}

/// The model with a layer more in its metadata than it has tensors for.
fn with_more_layers(gguf: &[u8]) -> Vec<u8> {
    let key = b"llama.block_count";
    let at = gguf.windows(key.len()).position(|w| w == key).expect("the key is there") + key.len() + 4;
    let mut out = gguf.to_vec();
    assert_eq!(out[at], 30);
    out[at] = 31;
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn tickets_let_in_once_and_members_can_leave() {
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    let (alpha, beta) = (&cluster.nodes[0], &cluster.nodes[1]);
    let stranger = Daemon::start("gamma", &cluster.folder.path().join("gamma")).await;
    let ticket: Value = serde_json::from_str(&alpha.cli(&["ticket", "--json"]).await).unwrap();
    let ticket = ticket["ticket"].as_str().unwrap();
    stranger.cli(&["join", ticket]).await;
    let late = Daemon::start("delta", &cluster.folder.path().join("delta")).await;
    let (ok, _, err) = try_capstan(&late.data_dir, &["join", ticket]).await;
    assert!(!ok && err.contains("used"), "{err}");
    assert_eq!(late.status().await.nodes.len(), 1, "a refused node stays alone");

    stranger.cli(&["leave"]).await;
    for node in [alpha, beta] {
        wait_for("the node that left is forgotten", || async { (node.status().await.nodes.len() == 2).then_some(()) })
            .await;
    }
    assert_eq!(stranger.status().await.nodes.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_comes_back_to_its_cluster() {
    let mut cluster = Cluster::start(&["alpha", "beta"]).await;
    let folder = cluster.folder.path().join("beta");
    cluster.nodes[1].kill().await;
    wait_for("alpha misses beta", || async {
        cluster.nodes[0].status().await.nodes.iter().any(|n| !n.online).then_some(())
    })
    .await;
    cluster.nodes[1] = Daemon::start("beta", &folder).await;
    for node in &cluster.nodes {
        wait_for("both see each other again", || async {
            let nodes = node.status().await.nodes;
            (nodes.len() == 2 && nodes.iter().all(|n| n.online)).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_and_removed_while_an_answer_goes_on() {
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    // One sequence a micro-batch: the same bits wherever the layers are.
    cluster.load(&models::smollm2(), "smol", &["--ctx", "1024", "--decode-batch", "1"]).await;
    let [alpha, beta] = &cluster.nodes[..] else { unreachable!() };
    let mut question = chat("smol", "Write a short story about a lighthouse keeper.", 300);
    question["ignore_eos"] = json!(true);
    let (_, undisturbed) = alpha.post("/v1/chat/completions", &question).await;
    let (refused, _, stderr) = try_capstan(&alpha.data_dir, &["node", "drain", "delta"]).await;
    assert!(!refused && stderr.contains("capstan nodes"), "{stderr}");

    let (answer, ()) = tokio::join!(alpha.post("/v1/chat/completions", &question), async {
        wait_for("it is being answered", || async {
            let stages = alpha.deployment("smol").await?.stages;
            stages.iter().any(|s| s.stats.slots_used > 0).then_some(())
        })
        .await;
        alpha.cli(&["node", "drain", "beta"]).await;
    });
    assert_eq!(answer.0, 200, "{}", answer.1);
    assert_eq!(answer.1["choices"][0]["message"], undisturbed["choices"][0]["message"]);
    let drained = alpha.deployment("smol").await.unwrap();
    assert!(drained.stages.iter().all(|s| s.node_name == "alpha"), "{drained:?}");
    assert!(drained.detail.contains("drained"), "{drained:?}");

    let nodes: Value = serde_json::from_str(&alpha.cli(&["nodes", "--json"]).await).unwrap();
    assert_eq!(nodes.as_array().unwrap().iter().filter(|n| n["votes"] == true).count(), 1, "{nodes}");
    let agreement = alpha.status().await.agreement;
    assert!(agreement.contains("votes alone"), "{agreement}");
    alpha.cli(&["node", "remove", "beta"]).await;
    assert_eq!(alpha.status().await.nodes.len(), 1);
    wait_for("the removed node is alone", || async { (beta.status().await.nodes.len() == 1).then_some(()) }).await;
    let ticket: Value = serde_json::from_str(&alpha.cli(&["ticket", "--json"]).await).unwrap();
    let (ok, _, stderr) = try_capstan(&beta.data_dir, &["join", ticket["ticket"].as_str().unwrap()]).await;
    assert!(!ok && stderr.contains("removed"), "{stderr}");
    let (status, _) = alpha.post("/v1/chat/completions", &question).await;
    assert_eq!(status, 200, "it serves on");
}
