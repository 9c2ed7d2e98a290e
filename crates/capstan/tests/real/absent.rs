//! What can be done and seen while a node is away or hard to reach.
use capstan_testkit::models;

use crate::cables::Cables;
use crate::daemons::{Cluster, Place, wait_for};

/// An eighth of what the slow cable takes, and less.
const SHORT_US: u64 = 3000;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_node_looked_after_can_be_unloaded_and_stays_so() {
    let mut cluster = Cluster::start(&["alpha", "beta", "gamma"]).await;
    // A plain file: nobody else can go on with it.
    let deployment = cluster.load(&models::smollm2(), "smol", &["--ctx", "256", "--slots", "1"]).await;
    cluster.nodes[0].kill().await;
    let beta = &cluster.nodes[1];
    wait_for("the others miss it and can agree", || async {
        let status = beta.status().await;
        let missing = status.nodes.iter().any(|n| n.id == deployment.coordinator && !n.online);
        (missing && !status.agreement.contains("nothing can be changed")).then_some(())
    })
    .await;
    beta.cli(&["unload", "smol"]).await;
    assert!(beta.deployment("smol").await.is_none());
    cluster.nodes[0] = cluster.nodes[0].again().await;
    let [alpha, beta, _] = &cluster.nodes[..] else { unreachable!() };
    for node in [alpha, beta] {
        wait_for("all are there and nothing is served", || async {
            let status = node.status().await;
            (status.nodes.iter().all(|n| n.online) && status.deployments.is_empty()).then_some(())
        })
        .await;
    }
    // It is gone for good, and its name is free.
    let again = cluster.load(&models::smollm2(), "smol", &["--ctx", "256", "--slots", "1"]).await;
    assert_ne!(again.id, deployment.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_becomes_slow_is_named_until_it_is_well() {
    let Some(cables) = Cables::lay(2) else {
        eprintln!("this system makes no network namespaces for us (that takes Linux and root): nothing was tried");
        return;
    };
    let places: Vec<_> = (0..2).map(|i| Place { run: cables.on(i), addrs: Some(cables.addrs(i)) }).collect();
    let cluster = Cluster::start_at(&["alpha", "beta"], &places).await;
    let alpha = &cluster.nodes[0];
    let warnings = async || alpha.status().await.warnings;
    assert!(warnings().await.is_empty());
    // Other tests keep the processor busy: what is slow is so beside a round trip that was not.
    wait_for("a round trip is short", async || {
        let short = |us: u64| us < SHORT_US;
        alpha.status().await.nodes.iter().any(|n| n.rtt_us.is_some_and(short)).then_some(())
    })
    .await;
    if !cables.throttle(1) {
        eprintln!("this system slows no link down for us: nothing was tried");
        return;
    }
    // The slow cable lets one packet through at once; it takes others to make each wait.
    let beta = &cluster.nodes[1];
    let (http, url, token) = (beta.http.clone(), format!("http://{}/capstan/v1/status", beta.api), beta.token.clone());
    let traffic = tokio::spawn(async move {
        loop {
            http.get(&url).bearer_auth(&token).send().await.ok();
        }
    });
    let named = wait_for("it is noticed", async || warnings().await.pop()).await;
    assert!(named.contains("from alpha to beta is slow"), "{named}");
    assert!(alpha.cli(&["nodes"]).await.contains("from alpha to beta is slow"), "people see it");
    traffic.abort();
    cables.mend(1);
    wait_for("it is well", async || warnings().await.is_empty().then_some(())).await;
}
