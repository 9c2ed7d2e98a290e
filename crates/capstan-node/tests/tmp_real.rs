//! Temporary.
use std::sync::Arc;
use std::time::{Duration, Instant};

use capstan_node::{Node, NodeConfig, Service};
use capstan_proto::generate::*;
use capstan_proto::manage::*;

async fn node(name: &str) -> (Arc<Node>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Node::start(config(dir.path(), name)).await.unwrap(), dir)
}

fn config(dir: &std::path::Path, name: &str) -> NodeConfig {
    let child = std::env::var("CHILD").unwrap();
    let mut command: Vec<std::ffi::OsString> = vec![child.into()];
    if let Ok(arg) = std::env::var("CHILD_ARG") {
        command.push(arg.into());
    }
    let mut config = NodeConfig::new(dir.to_owned(), command);
    config.name = Some(name.into());
    config.bind_addr = ([127, 0, 0, 1], 0).into();
    config.gpu_layers = 0;
    config.threads = Some(1);
    config
}

async fn ask(node: &Node, max: u32, kill: Option<(u32, usize)>) -> (Vec<i32>, String) {
    let start = Instant::now();
    let mut r = GenerateRequest::new("smol", Prompt::Text("The capital of France is".into()));
    r.max_tokens = Some(max);
    r.sampling.temperature = 0.0;
    r.ignore_eos = true;
    let mut rx = match node.generate(r).await {
        Ok(rx) => rx,
        Err(e) => return (vec![], format!("refused {:?}: {e}", e.kind)),
    };
    let mut tokens = vec![];
    let mut text = String::new();
    while let Some(e) = rx.recv().await {
        match e {
            GenerateEvent::Token { token, text: t, .. } => {
                tokens.push(token);
                text.push_str(&t);
                if let Some((pid, at)) = kill
                    && tokens.len() == at
                {
                    std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
                }
            }
            GenerateEvent::Finished { reason, text: t, usage } => {
                text.push_str(&t);
                eprintln!("finished {reason:?} {usage:?} after {:?}", start.elapsed());
            }
            GenerateEvent::Failed(e) => {
                eprintln!("failed after {:?}", start.elapsed());
                return (tokens, format!("FAILED {:?}: {e}", e.kind));
            }
            GenerateEvent::Started { .. } => {}
        }
    }
    (tokens, text)
}

async fn load(node: &Node, nodes: &[&str]) {
    let start = Instant::now();
    let path = std::env::var("MODEL").unwrap();
    let r = LoadRequest {
        path,
        name: Some("smol".into()),
        nodes: nodes.iter().map(|s| s.to_string()).collect(),
        layers: vec![],
        ctx: Some(512),
        slots: Some(2),
        decode_batch: None,
    };
    let mut rx = node.load(r).await.unwrap();
    let mut last = None;
    while let Some(e) = rx.recv().await {
        match &e {
            LoadEvent::Planned { explanation, .. } => eprintln!("{explanation:#?}"),
            LoadEvent::Loaded { stage } => eprintln!("loaded {stage} {:?}", start.elapsed()),
            _ => {}
        }
        last = Some(e);
    }
    eprintln!("{last:?} {:?}", start.elapsed());
    assert!(matches!(last, Some(LoadEvent::Ready { .. })));
}

async fn ready(node: &Node) -> DeploymentStatus {
    let start = Instant::now();
    loop {
        let s = node.status().await;
        if let Some(d) = s.deployments.first()
            && d.health == Health::Ready
        {
            eprintln!("ready after {:?}: {}", start.elapsed(), d.detail);
            return d.clone();
        }
        if start.elapsed() > Duration::from_secs(60) {
            panic!("{s:#?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real() {
    let (a, a_dir) = node("a").await;
    let (b, b_dir) = node("b").await;
    let (c, _c_dir) = node("c").await;
    for n in [&b, &c] {
        n.join(a.ticket(100, false).await.unwrap().ticket).await.unwrap();
    }
    load(&a, &[]).await;
    let whole = ask(&a, 16, None).await;
    eprintln!("whole {whole:?}");
    a.unload("smol".into()).await.unwrap();
    load(&a, &["c", "b", "a"]).await;
    eprintln!("{:?}", ask(&a, 16, None).await);
    a.unload("smol".into()).await.unwrap();
    load(&a, &["a", "b", "c"]).await;
    for n in [&a, &b, &c] {
        let got = ask(n, 16, None).await;
        assert_eq!(got, whole);
    }
    for stage in [1, 2, 0] {
        let d = ready(&b).await;
        let pid = d.stages[stage].pid.unwrap();
        eprintln!("killing stage {stage}");
        eprintln!("{:?}", ask(&b, 200, Some((pid, 10))).await);
        eprintln!("at once: {:?}", ask(&b, 4, None).await);
        ready(&a).await;
        ready(&b).await;
        assert_eq!(ask(&b, 16, None).await, whole);
    }
    for e in std::fs::read_dir(b_dir.path().join("shards")).unwrap() {
        let e = e.unwrap();
        eprintln!("{:?} {}", e.file_name(), e.metadata().unwrap().len());
    }
    // The coordinator is restarted.
    a.stop().await;
    drop(a);
    eprintln!("away: {:?}", ask(&b, 4, None).await);
    let a = Node::start(config(a_dir.path(), "a")).await.unwrap();
    ready(&a).await;
    assert_eq!(ask(&a, 16, None).await, whole);
    // A node goes and comes back.
    let b_addr = b.addrs();
    b.stop().await;
    drop(b);
    while a.status().await.deployments[0].health == Health::Ready {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("{}", a.status().await.deployments[0].detail);
    eprintln!("{:?}", ask(&c, 4, None).await);
    let b = Node::start(config(b_dir.path(), "b")).await.unwrap();
    assert_eq!(b.addrs(), b_addr);
    ready(&a).await;
    ready(&c).await;
    assert_eq!(ask(&c, 16, None).await, whole);
    let s = a.status().await;
    let pids: Vec<_> = s.deployments[0].stages.iter().map(|s| s.pid.unwrap()).collect();
    eprintln!("{s:#?}");
    b.unload("smol".into()).await.unwrap();
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
    }
    assert!(c.status().await.deployments.is_empty() && b.status().await.deployments.is_empty());
    load(&a, &["a", "b", "c"]).await;
}
