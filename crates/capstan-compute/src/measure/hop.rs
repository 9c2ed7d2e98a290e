//! How long a hidden state takes from one compute thread to another beside the wire: frames, encryption, wake-ups of two
//! threads and a runtime at each end. Two ends in this process throw a frame to and fro, built like two stages.
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use capstan_proto::codec;
use capstan_proto::data::{DATA_VERSION, DataHello};
use capstan_proto::{DeploymentId, Epoch, limits};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::link::{Incoming, IrohTransport, LinkError, Outgoing, Transport};

/// Bytes of a frame: a row of 1024 floats, of which the link's bandwidth is no part to speak of.
const FRAME_BYTES: usize = 4096;
/// Throws, of which the middle one counts, and before them those that find everything cold.
const THROWS: usize = 24;
const COLD: usize = 8;
/// Before each throw both ends rest as a stage does while others compute: cores that sleep take a moment to wake up.
const REST: Duration = Duration::from_millis(5);
/// All of it takes milliseconds; whoever waits longer has no loopback.
const TIMEOUT: Duration = Duration::from_secs(3);

/// An end: frames that came, frames to send.
struct End {
    came: mpsc::Receiver<Vec<u8>>,
    send: mpsc::Sender<Bytes>,
}

/// Half of a round trip.
pub(super) fn half_round_trip() -> Result<Duration, String> {
    // As many threads as a stage's runtime has.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| e.to_string())?;
    let ([mut here, mut there], transports) = runtime
        .block_on(async { timeout(TIMEOUT, ends()).await })
        .map_err(|_| "the loopback does not answer".to_owned())?
        .map_err(|e| e.to_string())?;
    let echo = std::thread::spawn(move || {
        while let Some(frame) = there.came.blocking_recv() {
            if there.send.blocking_send(prefixed(frame)).is_err() {
                return;
            }
        }
    });
    let mut throws = Vec::with_capacity(THROWS);
    for i in 0..COLD + THROWS {
        std::thread::sleep(REST);
        let began = Instant::now();
        let sent = here.send.blocking_send(prefixed(vec![0; FRAME_BYTES])).is_ok();
        let came = runtime.block_on(async { timeout(TIMEOUT, here.came.recv()).await.ok().flatten() });
        if !sent || came.is_none() {
            return Err("a frame over the loopback was lost".to_owned());
        }
        if i >= COLD {
            throws.push(began.elapsed());
        }
    }
    drop(here);
    runtime.block_on(async {
        for transport in &transports {
            timeout(TIMEOUT, transport.close()).await.ok();
        }
        drop(transports);
    });
    runtime.shutdown_timeout(TIMEOUT);
    echo.join().ok();
    throws.sort_unstable();
    Ok(throws[throws.len() / 2] / 2)
}

fn prefixed(body: Vec<u8>) -> Bytes {
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    debug_assert_eq!(frame.len(), codec::PREFIX);
    frame.extend(body);
    frame.into()
}

async fn ends() -> Result<([End; 2], [IrohTransport; 2]), LinkError> {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (a, b) = tokio::try_join!(IrohTransport::bind(loopback), IrohTransport::bind(loopback))?;
    let hello = |from_stage| DataHello {
        version: DATA_VERSION,
        deployment: DeploymentId(0),
        epoch: Epoch::default(),
        from_stage,
    };
    let (at_a, at_b) = (a.addr(), b.addr());
    let (from_a, from_b) = (hello(0), hello(1));
    let (a_in, b_in, a_out, b_out) = tokio::try_join!(
        a.accept(at_b.key, from_b.clone()),
        b.accept(at_a.key, from_a.clone()),
        a.dial(&at_b, &from_a),
        b.dial(&at_a, &from_b),
    )?;
    let end = |incoming: Incoming, outgoing: Outgoing| {
        let (came_tx, came) = mpsc::channel(limits::STAGE_QUEUE);
        let (send, mut queue) = mpsc::channel::<Bytes>(limits::STAGE_QUEUE);
        let (mut receiver, mut sender) = (incoming.frames, outgoing.frames);
        tokio::spawn(async move {
            while let Ok(body) = receiver.recv().await {
                if came_tx.send(body).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some(frame) = queue.recv().await {
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
        });
        End { came, send }
    };
    Ok(([end(a_in, a_out), end(b_in, b_out)], [a, b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back() {
        assert!(half_round_trip().unwrap() > Duration::ZERO);
    }
}
