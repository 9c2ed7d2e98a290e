//! Measures this machine and its links while nothing runs on it, so that layers are dealt out by what machines can do.
//!
//! The device profile is kept in the data folder and made anew only on other hardware or with another capstan. A link is
//! measured once by one of its two ends; both know the result, for it is told with the node's status.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use capstan_compute::measure::OTHERS;
use capstan_proto::NodeId;
use capstan_proto::control::{Done, MEASURE_BYTES, Request};
use capstan_proto::device::DeviceProfile;
use capstan_proto::limits;
use capstan_proto::manage::{DeviceStatus, LinkStatus};
use tokio::time::{Instant, sleep, timeout};

use crate::error::CallError;
use crate::files;
use crate::frames;
use crate::membership::now_s;
use crate::moving::usage;
use crate::node::Shared;

/// Between two looks whether there is something to measure and nobody else computes.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How long a machine may take: six times what a measurement plans for, as other programs may have the processor.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes that show whether a link is fast enough to send [`MEASURE_BYTES`].
const FEW_BYTES: u32 = 128 << 10;
/// Longer than this they take on a link that is not: below some 10 Mbit/s.
const FEW_TAKE: Duration = Duration::from_millis(100);
/// How long after a failure a link is tried again.
const AFTER_FAILURE: Duration = Duration::from_secs(120);
/// How long a link may take: below 0.1 Mbit/s there is nothing to serve over it.
const LINK_TIMEOUT: Duration = Duration::from_secs(20);
/// Measurements at most: each gets a few types of weights done, and some a backend may not have.
const TRIES_MAX: u32 = 6;
/// How long a measurement counts, in seconds, while nothing seems to have changed.
const LINK_AGE_S: u64 = 600;
/// Round trips of which the shortest counts.
const ROUND_TRIPS: usize = 5;
/// While a measurement runs: between two looks whether a stage wants to start.
const GIVE_WAY: Duration = Duration::from_millis(50);

fn kept(data_dir: &Path) -> PathBuf {
    data_dir.join("device.json")
}

/// What a profile is valid for.
fn hardware(devices: &[DeviceStatus], threads: Option<u32>, gpu_layers: i32, build: &str) -> String {
    let devices: Vec<_> = devices.iter().map(|d| format!("{} ({})", d.description.trim(), d.name)).collect();
    let threads = threads.map_or_else(|| "all cores".to_owned(), |n| format!("{n} threads"));
    let gpu = if gpu_layers == 0 { ", no GPU" } else { "" };
    let text = format!("{}; {threads}{gpu}; capstan {build}", devices.join(", "));
    text.chars().take(capstan_proto::device::HARDWARE_BYTES_MAX / 4).collect()
}

/// The profile of an earlier start, if there is one that can be believed.
pub(crate) fn known(data_dir: &Path) -> Option<DeviceProfile> {
    let profile: DeviceProfile = files::read_json(&kept(data_dir)).ok().flatten()?;
    profile.check().ok()?;
    Some(profile)
}

/// Measures this machine as soon as nothing else runs on it.
pub(crate) async fn device_loop(shared: Arc<Shared>) {
    let mut tries = 0;
    loop {
        let devices = shared.machine.devices();
        // Which devices there are is known a moment after the start.
        if !devices.is_empty() {
            let c = &shared.config;
            let wanted = hardware(&devices, c.threads, c.gpu_layers, shared.build);
            let known = shared.machine.profile().filter(|p| p.hardware == wanted);
            if known.as_ref().is_some_and(|p| is_complete(p) || tries == TRIES_MAX) {
                return;
            }
            if !shared.machine.is_busy() {
                tries += 1;
                match device(&shared, wanted, known).await {
                    Ok(()) => {}
                    // Something else may have run; later there may be quiet.
                    Err(reason) if tries < TRIES_MAX => tracing::info!(reason, "this machine will be measured again"),
                    Err(reason) => {
                        tracing::warn!(
                            reason,
                            "this machine could not be measured; layers are dealt out as if all were alike"
                        );
                        return;
                    }
                }
            }
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Whether every type was measured that is worth it.
fn is_complete(profile: &DeviceProfile) -> bool {
    OTHERS.iter().all(|t| profile.types.iter().any(|known| known.ggml_type == *t))
}

/// Measures this machine, types that are not known first; nothing changes when a stage comes in between.
async fn device(shared: &Shared, hardware: String, known: Option<DeviceProfile>) -> Result<(), String> {
    let folder = shared.config.data_dir.join("measuring");
    // What a daemon left that was killed meanwhile goes, too.
    std::fs::remove_dir_all(&folder).ok();
    std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let c = &shared.config;
    let child = capstan_compute::host::profile(&c.compute_command, &folder, c.threads, c.gpu_layers, known.as_ref());
    let give_way = async {
        while !shared.machine.is_busy() {
            sleep(GIVE_WAY).await;
        }
    };
    let measured = tokio::select! {
        measured = timeout(DEVICE_TIMEOUT, child) => Some(measured),
        () = give_way => None,
    };
    std::fs::remove_dir_all(&folder).ok();
    let profile = match measured {
        None => return Ok(()),
        Some(Err(_)) => return Err(format!("it took more than {} s", DEVICE_TIMEOUT.as_secs())),
        Some(Ok(Err(error))) => return Err(error.to_string()),
        Some(Ok(Ok(profile))) => DeviceProfile { hardware, ..profile },
    };
    profile.check().map_err(|e| e.to_string())?;
    if let Err(error) = files::write_json(&kept(&shared.config.data_dir), &profile) {
        tracing::warn!(%error, "what was measured could not be saved; it will be measured again at the next start");
    }
    tracing::info!(ms = profile.took_ms, types = profile.types.len(), "this machine was measured");
    shared.machine.set_profile(profile);
    Ok(())
}

/// Measures the link to each member that this end has to measure: once, when its round trips have changed, and now and
/// then; each time while no model is asked anything.
pub(crate) async fn link_loop(shared: Arc<Shared>) {
    // Those that could not be measured must not keep others waiting.
    let mut failed: HashMap<NodeId, Instant> = HashMap::new();
    loop {
        failed.retain(|_, at| at.elapsed() < AFTER_FAILURE);
        let quiet = !shared.all_deployments().iter().any(|d| usage(d).1);
        let mine = shared.membership.others().into_iter().filter(|_| quiet).find(|m| {
            m.id > shared.id
                && shared.membership.online(m.id)
                && !failed.contains_key(&m.id)
                && !shared.view.has_link(m.id, now_s().saturating_sub(LINK_AGE_S))
        });
        if let Some(member) = mine {
            match timeout(LINK_TIMEOUT, link(&shared, member.id)).await {
                Ok(Ok(found)) => {
                    let mbit = |bytes: u64| bytes / 125_000;
                    let (up, down) = (mbit(found.up_bytes_per_s), mbit(found.down_bytes_per_s));
                    tracing::info!(node = member.name, rtt_us = found.rtt_us, up, down, "a link was measured (Mbit/s)");
                    if let Some(before) = shared.view.put_link(found).filter(|before| is_slower(before, &found)) {
                        let (was_up, was_down) = (mbit(before.up_bytes_per_s), mbit(before.down_bytes_per_s));
                        tracing::warn!(
                            node = member.name,
                            up,
                            down,
                            was_up,
                            was_down,
                            "a link is slower than it was (Mbit/s)"
                        );
                    }
                }
                Ok(Err(error)) => {
                    tracing::debug!(node = member.name, %error, "a link could not be measured");
                    failed.insert(member.id, Instant::now());
                }
                Err(_) => {
                    tracing::debug!(node = member.name, "measuring a link took too long");
                    failed.insert(member.id, Instant::now());
                }
            }
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Whether a link has become so much slower that it is no accident of measuring.
fn is_slower(before: &LinkStatus, now: &LinkStatus) -> bool {
    let halved = |before: u64, now: u64| now < before / 2;
    halved(before.up_bytes_per_s, now.up_bytes_per_s) || halved(before.down_bytes_per_s, now.down_bytes_per_s)
}

async fn link(shared: &Shared, to: NodeId) -> Result<LinkStatus, CallError> {
    let mut rtt = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        let _: Done = shared.client.call(to, &Request::Wire { up_bytes: 0, down_bytes: 0 }, LINK_TIMEOUT).await?;
        rtt = rtt.min(began.elapsed());
    }
    let rtt_us = rtt.as_micros().min(u128::from(u64::MAX)) as u64;
    let up_bytes_per_s = rate(shared, to, rtt, true).await?;
    let down_bytes_per_s = rate(shared, to, rtt, false).await?;
    Ok(LinkStatus { to, rtt_us, up_bytes_per_s, down_bytes_per_s, measured_unix_s: now_s() })
}

/// Bytes per second one way. A few say whether the link is fast enough for many.
async fn rate(shared: &Shared, to: NodeId, rtt: Duration, up: bool) -> Result<u64, CallError> {
    let mut rate = 0;
    for bytes in [FEW_BYTES, MEASURE_BYTES] {
        let (up_bytes, down_bytes) = if up { (bytes, 0) } else { (0, bytes) };
        let took = wire(shared, to, up_bytes, down_bytes).await?;
        // One round trip is no transfer.
        let seconds = took.saturating_sub(rtt).max(Duration::from_micros(1)).as_secs_f64();
        rate = (f64::from(bytes) / seconds) as u64;
        if took > FEW_TAKE {
            break;
        }
    }
    Ok(rate)
}

/// Sends so many bytes and then receives so many; how long that took.
async fn wire(shared: &Shared, to: NodeId, up_bytes: u32, down_bytes: u32) -> Result<Duration, CallError> {
    let lost = |reason: String| CallError::Lost { node: shared.membership.name_of(to), reason };
    let began = Instant::now();
    let (mut send, mut recv) = shared.client.open(to, &Request::Wire { up_bytes, down_bytes }).await?;
    frames::write_zeros(&mut send, up_bytes).await.map_err(|e| lost(e.to_string()))?;
    send.finish().ok();
    let _: Done = frames::expect(&mut recv, limits::MESSAGE_BYTES_MAX).await.map_err(|e| lost(e.to_string()))?;
    frames::skip(&mut recv, down_bytes).await.map_err(|e| lost(e.to_string()))?;
    Ok(began.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_hardware_asks_for_another_measurement() {
        let device = |description: &str| DeviceStatus {
            name: "CPU".into(),
            description: description.into(),
            kind: "cpu".into(),
            memory_total_bytes: 1,
            memory_free_bytes: 1,
        };
        let one = hardware(&[device("A")], None, -1, "1");
        assert_eq!(one, hardware(&[device("A ")], None, -1, "1"), "memory and blanks do not matter");
        for other in [
            hardware(&[device("B")], None, -1, "1"),
            hardware(&[device("A")], Some(1), -1, "1"),
            hardware(&[device("A")], None, 0, "1"),
            hardware(&[device("A")], None, -1, "2"),
        ] {
            assert_ne!(one, other);
        }
        assert!(
            hardware(&[device(&"ä".repeat(5000))], None, 0, "1").len() <= capstan_proto::device::HARDWARE_BYTES_MAX
        );
    }

    #[test]
    fn what_cannot_be_believed_is_measured_again() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(known(folder.path()), None);
        for text in ["{", "{}", "[]"] {
            std::fs::write(kept(folder.path()), text).unwrap();
            assert_eq!(known(folder.path()), None, "{text}");
        }
    }
}
