//! A model from a hub that fails, into daemons that are killed; then it answers.
use crate::daemons::{Daemon, chat, try_capstan, wait_for};
use capstan_testkit::hub::{COMMIT, Hub};
use capstan_testkit::models;
use serde_json::Value;

const FILE: &str = "SmolLM2-Q4_1.gguf";

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_outlives_killed_daemons_and_a_killed_source_and_the_model_answers() {
    let content = std::fs::read(models::smollm2()).unwrap();
    let mut hub = Hub::start(vec![(FILE, content.clone())]);
    let folder = tempfile::tempdir().unwrap();
    let endpoint = hub.endpoint();
    let env = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", folder.path().to_str().unwrap()), ("HF_TOKEN", "")];
    let dir = |name: &str| folder.path().join(name);
    let alpha = Daemon::start_with("alpha", &dir("alpha"), &env).await;
    let mut beta = Daemon::start_with("beta", &dir("beta"), &env).await;
    let ticket: Value = serde_json::from_str(&alpha.cli(&["ticket", "--json"]).await).unwrap();
    beta.cli(&["join", ticket["ticket"].as_str().unwrap()]).await;

    // A third of it is sent; then one daemon and the source are killed.
    hub.hold_after(content.len() as i64 / 3);
    let (alpha_dir, layers) = (alpha.data_dir.clone(), "alpha=0..15,beta=15..30");
    let pull = tokio::spawn(async move {
        try_capstan(&alpha_dir, &["pull", "hf:o/r", "--name", "smol", "--layers", layers, "--json"]).await
    });
    wait_for("a third was sent", || async { (hub.sent_bytes() >= content.len() as u64 / 3).then_some(()) }).await;
    beta.kill().await;
    hub.kill();
    assert!(!files(&beta, "shards").iter().any(|(_, bytes)| *bytes > 20 << 20), "nothing half-written is visible");
    hub.hold_after(-1);
    hub.restart();
    drop(beta);
    let beta = Daemon::start_with("beta", &dir("beta"), &env).await;
    let (ok, stdout, stderr) = pull.await.unwrap();
    assert!(ok, "{stdout}\n{stderr}");
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["name"]), (&"done".into(), &"smol".into()));
    // What was under way at the kills was sent twice, and nothing else.
    assert!(hub.sent_bytes() < content.len() as u64 * 3 / 2, "{} bytes were sent", hub.sent_bytes());

    let models: Value = serde_json::from_str(&beta.cli(&["models", "--json"]).await).unwrap();
    assert_eq!((&models[0]["name"], &models[0]["revision"]), (&"smol".into(), &COMMIT.into()));
    let out = dir("out.gguf");
    beta.cli(&["model", "export", "smol", out.to_str().unwrap()]).await;
    assert!(std::fs::read(&out).unwrap() == content, "byte by byte");

    // It is served from where it lies, by the other node too, with the source gone.
    hub.kill();
    beta.cli(&["load", "smol", "--nodes", "beta,alpha", "--ctx", "512"]).await;
    let (status, answer) =
        alpha.post("/v1/chat/completions", &chat("smol", "What is the capital of France?", 16)).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.to_string().contains("Paris"), "{answer}");
    let (ok, _, stderr) = try_capstan(&alpha.data_dir, &["model", "remove", "smol"]).await;
    assert!(!ok && stderr.contains("unload"), "{stderr}");
    beta.cli(&["unload", "smol"]).await;
    alpha.cli(&["model", "remove", "smol"]).await;
    wait_for("it is deleted everywhere", || async {
        let large = |d: &Daemon| files(d, "shards").into_iter().any(|(_, bytes)| bytes > 20 << 20);
        (!large(&alpha) && !large(&beta)).then_some(())
    })
    .await;
}

fn files(daemon: &Daemon, folder: &str) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(daemon.data_dir.join(folder)).into_iter().flatten().flatten();
    entries.map(|e| (e.file_name().to_string_lossy().into_owned(), e.metadata().map_or(0, |m| m.len()))).collect()
}
