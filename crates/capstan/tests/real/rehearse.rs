//! Rehearsals on real daemons: every architecture that a header can be made for, a real file, and nothing left behind.
use std::path::{Path, PathBuf};
use std::process::Stdio;

use capstan_gguf::synthetic;
use capstan_planner::header::{self, ARCHITECTURES};
use capstan_planner::quant::COMMON;
use capstan_planner::shape::{Attention, Experts, Shape, Sliding};
use capstan_testkit::models;
use serde_json::Value;

use crate::daemons::{Cluster, command, try_capstan, wait_for};

/// A small shape of an architecture, with every part that large ones of it have.
fn small(architecture: &'static str) -> Shape {
    let latent = Attention::Latent { heads: 4, q_rank: 256, kv_rank: 256, nope: 32, rope: 32, value: 32 };
    let grouped = Attention::Grouped { heads: 4, kv_heads: 2, head: 64, gated: false };
    let moe = !matches!(architecture, "llama" | "qwen2");
    let (leading_dense, shared_width) = if matches!(architecture, "deepseek2" | "glm4moe") { (1, 256) } else { (0, 0) };
    let experts = Experts { count: 8, used: 2, width: 256, shared_width, leading_dense };
    Shape {
        architecture,
        n_layers: 4,
        n_embd: 256,
        n_vocab: 512,
        context_train: 4096,
        tied: false,
        attention: if architecture == "deepseek2" { latent } else { grouped },
        sliding: (architecture == "gpt-oss").then_some(Sliding { tokens: 128, period: 2 }),
        recurrent: None,
        dense_width: 512,
        experts: moe.then_some(experts),
    }
}

/// A file of holes with the header of a shape.
fn outline(folder: &Path, shape: &Shape) -> PathBuf {
    let model = header::model(shape, shape.architecture, &COMMON[0]).unwrap();
    let (header, file_bytes) = model.excerpt_header(model.all_layers(), true).unwrap();
    let path = folder.join(format!("{}.gguf", shape.architecture));
    synthetic::outline(&header, file_bytes, &std::fs::File::create(&path).unwrap()).unwrap();
    path
}

async fn rehearse(cluster: &Cluster, model: &Path, more: &[&str]) -> Value {
    let model = model.to_str().unwrap();
    let out = cluster.nodes[0].cli(&[&["rehearse", model, "--nodes", "alpha,beta", "--json"], more].concat()).await;
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

/// No deployment, no process and no file is left of a rehearsal.
async fn assert_gone(cluster: &Cluster, pids: &[u64]) {
    for node in &cluster.nodes {
        wait_for("no node knows the rehearsal", || async { node.status().await.deployments.is_empty().then_some(()) })
            .await;
        let files: Vec<_> = std::fs::read_dir(node.data_dir.join("rehearsals")).unwrap().collect();
        assert!(files.is_empty(), "{files:?}");
        let kept = std::fs::read_dir(node.data_dir.join("shards")).map_or(0, Iterator::count);
        assert_eq!(kept, 0, "nothing was transferred");
    }
    wait_for("no compute process is left", || async {
        pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}/exe")).exists()).then_some(())
    })
    .await;
}

fn pids(report: &Value) -> Vec<u64> {
    report["stages"].as_array().unwrap().iter().map(|s| s["pid"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_architecture_with_a_made_up_header_runs_in_two_stages() {
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    for architecture in ARCHITECTURES {
        let shape = small(architecture);
        let path = outline(cluster.folder.path(), &shape);
        let asked = ["--prompt-tokens", "8,40", "--tokens", "4", "--concurrency", "1,2"];
        let report = rehearse(&cluster, &path, &asked).await;
        assert_eq!(report["architecture"], *architecture);
        assert_eq!((&report["layers"], &report["layers_rehearsed"]), (&4.into(), &4.into()));
        let stages = report["stages"].as_array().unwrap();
        assert_eq!(stages.len(), 2, "{report}");
        for stage in stages {
            let number = |key: &str| stage[key].as_u64().unwrap();
            assert!(number("shard_bytes") > 0 && number("kv_bytes") > 0 && number("compute_bytes") > 0, "{stage}");
            assert!(number("memory_bytes") >= number("kv_bytes") + number("compute_bytes"), "{stage}");
            assert!(!cfg!(target_os = "linux") || number("peak_rss_bytes") > number("kv_bytes"), "{stage}");
        }
        let lengths: Vec<_> = report["first_token"].as_array().unwrap().iter().map(|f| &f["prompt_tokens"]).collect();
        assert_eq!(lengths, [8, 40]);
        for decode in report["decode"].as_array().unwrap() {
            assert_eq!(decode["tokens"].as_u64(), Some(4 * decode["concurrency"].as_u64().unwrap()), "{decode}");
            assert!(decode["tokens_per_s"].as_f64().unwrap() > 0.0);
        }
        assert!(report["extrapolated"].is_null());
        assert_gone(&cluster, &pids(&report)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_file_is_rehearsed_in_part_and_a_rehearsal_can_be_broken_off() {
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    let report =
        rehearse(&cluster, &models::smollm2(), &["--scale", "10", "--tokens", "8", "--concurrency", "1"]).await;
    assert_eq!((&report["layers"], &report["layers_rehearsed"]), (&30.into(), &10.into()));
    let (measured, all) = (&report["decode"][0]["tokens_per_s"], &report["extrapolated"]["tokens_per_s"][0]);
    assert!(all.as_f64().unwrap() < measured.as_f64().unwrap(), "{report}");
    assert!(report["notes"].to_string().contains("extrapolated"));
    assert_gone(&cluster, &pids(&report)).await;

    // Ctrl-C in the middle of an endless answer.
    let mut broken_off = command(&cluster.nodes[0].data_dir)
        .args(["rehearse", models::smollm2().to_str().unwrap(), "--nodes", "alpha,beta", "--ctx", "8192"])
        .args(["--prompt-tokens", "1", "--tokens", "8000", "--concurrency", "1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pids = wait_for("it computes", || async {
        let deployments = cluster.nodes[0].status().await.deployments;
        let stages = &deployments.first()?.stages;
        let busy = stages.last()?.stats.slots_used == 1;
        busy.then(|| stages.iter().filter_map(|s| s.pid).map(u64::from).collect::<Vec<_>>())
    })
    .await;
    let pid = broken_off.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(broken_off.wait().await.unwrap().code(), Some(130));
    assert_gone(&cluster, &pids).await;

    // What cannot be is said before anything is loaded.
    let (ok, _, error) = try_capstan(&cluster.nodes[0].data_dir, &["rehearse", "Kimi K9"]).await;
    assert!(!ok && error.contains("did you mean"), "{error}");
    let (ok, _, error) = try_capstan(&cluster.nodes[0].data_dir, &["rehearse", "Llama 3.1 405B"]).await;
    assert!(!ok && error.contains("--scale") && error.contains("not enough memory"), "{error}");
    assert_gone(&cluster, &[]).await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_rehearsal_takes_memory_only_for_what_is_read() {
    let cluster = Cluster::start(&["alpha", "beta"]).await;
    // 64 experts of which a token uses 2: a gigabyte, of which a thirtieth is read.
    let shape = Shape {
        n_embd: 1024,
        experts: Some(Experts { count: 64, used: 2, width: 4096, shared_width: 0, leading_dense: 0 }),
        ..small("qwen3moe")
    };
    let path = outline(cluster.folder.path(), &shape);
    let asked = ["--sparse", "--prompt-tokens", "8", "--tokens", "4", "--concurrency", "1"];
    let args = [&["rehearse", path.to_str().unwrap(), "--nodes", "alpha,beta", "--json"][..], &asked].concat();
    let (ok, out, error) = try_capstan(&cluster.nodes[0].data_dir, &args).await;
    if !ok {
        // Without the right to lock memory it says what to do.
        assert!(error.contains("ulimit -l"), "{error}");
        return;
    }
    let report: Value = serde_json::from_str(&out).unwrap();
    for stage in report["stages"].as_array().unwrap() {
        let (shard, peak) = (stage["shard_bytes"].as_u64().unwrap(), stage["peak_rss_bytes"].as_u64().unwrap());
        assert!(shard > 700 << 20 && peak < shard / 2, "{stage}");
    }
    assert!(report["notes"].to_string().contains("says nothing about speed"));
    assert_gone(&cluster, &pids(&report)).await;
}
