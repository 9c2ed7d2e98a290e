//! A daemon measures its machine, and what is planned, loaded and rehearsed there goes by that. How fast this machine is does
//! not matter here.
use capstan_proto::device::{DeviceProfile, Point};
use capstan_testkit::models;
use serde_json::Value;

use crate::daemons::{Daemon, wait_for};

fn believable(profile: &DeviceProfile) {
    profile.check().unwrap();
    // The most rows take longer than one, whatever else runs on the machine.
    let grows = |points: &[Point]| points.first().unwrap().fs < points.last().unwrap().fs;
    for curve in &profile.types {
        assert!(grows(&curve.per_weight) && grows(&curve.per_cached_weight), "{curve:?}");
        let pairs = curve.per_weight.iter().zip(&curve.per_cached_weight);
        assert!(pairs.clone().all(|(all, cached)| all.rows == cached.rows && all.fs >= cached.fs), "{curve:?}");
    }
    let shares = profile.working_sets.iter().map(|s| s.uncached_permille).collect::<Vec<_>>();
    assert!(shares.is_sorted() && shares.first() == Some(&0) && shares.last() == Some(&1000), "{shares:?}");
    assert!(profile.hop_ns > 0 && profile.disk_bytes_per_s > 0, "{profile:?}");
    assert!(!cfg!(target_os = "linux") || profile.process_bytes > 1 << 20, "{profile:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_measured_is_planned_with() {
    let folder = tempfile::tempdir().unwrap();
    let alpha = Daemon::start_with("alpha", &folder.path().join("alpha"), &[("CAPSTAN_MEASURE", "auto")]).await;
    let profile = wait_for("the machine is measured", || async { alpha.status().await.nodes[0].profile.clone() }).await;
    believable(&profile);

    let model = models::smollm2();
    let model = model.to_str().unwrap();
    let plan: Value = serde_json::from_str(&alpha.cli(&["plan", model, "--json"]).await).unwrap();
    assert!(plan["notes"].to_string().contains("cluster that runs here"), "{}", plan["notes"]);
    assert_eq!((&plan["machines"][0]["name"], plan["machines"].as_array().unwrap().len()), (&"alpha".into(), 1));
    let named: Value =
        serde_json::from_str(&alpha.cli(&["plan", model, "--machines", "M4 Max", "--json"]).await).unwrap();
    assert!(named["machines"][0]["name"].as_str().unwrap().starts_with("M4 Max"), "{}", named["machines"]);

    let load = ["load", model, "--name", "m", "--ctx", "512", "--slots", "2", "--objective", "throughput", "--json"];
    let events = alpha.cli(&load).await;
    let planned = events.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).find(|e| e["event"] == "planned");
    let planned = planned.expect("what was planned");
    let (forecast, stage) = (&planned["forecast"], &planned["stages"][0]);
    assert!(forecast["decode"][0]["tokens_per_s"].as_f64().unwrap() > 0.0, "{planned}");
    assert!(forecast["load_s"].as_f64().unwrap() > 0.0, "{planned}");
    let (seen, reserved) = (forecast["resident_bytes"][0].as_u64().unwrap(), stage["memory_bytes"].as_u64().unwrap());
    assert!(!cfg!(target_os = "linux") || seen > reserved / 2, "{planned}");
    alpha.cli(&["unload", "m"]).await;

    let asked = ["--scale", "4", "--prompt-tokens", "128", "--tokens", "4", "--concurrency", "1", "--json"];
    let report = alpha.cli(&[&["rehearse", model][..], &asked].concat()).await;
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["forecast"]["first_token"][0]["prompt_tokens"], 128, "{report}");
    assert!(report["notes"].to_string().contains("Forecasts are what"), "{report}");
}
