//! Links between stages over real sockets: who is let in, and what is refused.
use std::net::{IpAddr, Ipv4Addr};

use bytes::Bytes;
use capstan_compute::link::{Incoming, IrohTransport, Outgoing, Transport};
use capstan_proto::data::{BatchFrame, DATA_ALPN, DATA_VERSION, DataHello, DropNotice, KvOp, MicroBatch, Payload, Row};
use capstan_proto::{DeploymentId, Epoch, codec};
use iroh::endpoint::presets;
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, TransportAddr};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn hello(epoch: u64) -> DataHello {
    DataHello { version: DATA_VERSION, deployment: DeploymentId(1), epoch: Epoch(epoch), from_stage: 0 }
}

fn batch(step: u64) -> MicroBatch {
    MicroBatch {
        epoch: Epoch(1),
        step,
        ops: vec![KvOp::Clear { slot: 0 }],
        rows: vec![Row { slot: 0, pos: 0, output: true }, Row { slot: 0, pos: 1, output: false }],
        payload: Payload::Hidden((0..2048).map(|i| (i as f32 + step as f32).sin()).collect()),
    }
}

/// A link from one fresh endpoint to another. The endpoints live as long as it is used.
async fn link() -> (Outgoing, Incoming, [IrohTransport; 2]) {
    let (a, b) = (IrohTransport::bind(LOOPBACK).await.unwrap(), IrohTransport::bind(LOOPBACK).await.unwrap());
    let (own, peer) = (hello(1), b.addr());
    let (incoming, outgoing) = tokio::join!(b.accept(a.addr().key, hello(1)), a.dial(&peer, &own));
    (outgoing.unwrap(), incoming.unwrap(), [a, b])
}

fn frame(step: u64) -> Bytes {
    batch(step).encode(&[step as u32]).unwrap().into()
}

#[tokio::test]
async fn frames_arrive_in_order_and_whole() {
    let (mut outgoing, mut incoming, _endpoints) = link().await;
    let send = async {
        for step in 0..50 {
            outgoing.frames.send(frame(step)).await.unwrap();
        }
    };
    let receive = async {
        for step in 0..50 {
            let body = incoming.frames.recv().await.unwrap();
            let want = BatchFrame { batch: batch(step), stage_us: vec![step as u32] };
            assert_eq!(BatchFrame::decode(&body).unwrap(), want);
        }
    };
    tokio::join!(send, receive);
    drop(outgoing);
    assert!(incoming.frames.recv().await.is_err(), "a link that is gone is an error");
    assert!(incoming.notices.recv().await.is_err(), "in both lanes");
}

#[tokio::test]
async fn a_notice_overtakes_frames_that_nobody_takes() {
    let (mut outgoing, mut incoming, _endpoints) = link().await;
    // More than all windows hold: the lane of the frames is full.
    let stuck = tokio::spawn(async move {
        for step in 0.. {
            if outgoing.frames.send(vec![0; 4 << 20].into()).await.is_err() {
                return step;
            }
        }
        0
    });
    let notices: Vec<DropNotice> = (0..20).map(|i| DropNotice { epoch: Epoch(1), steps: vec![i, i + 1] }).collect();
    for notice in &notices {
        outgoing.notices.send(notice.encode().unwrap().into()).await.unwrap();
    }
    for notice in &notices {
        assert_eq!(&DropNotice::decode(&incoming.notices.recv().await.unwrap()).unwrap(), notice);
    }
    assert!(!stuck.is_finished());
    drop(incoming);
    assert!(stuck.await.unwrap() > 0);
}

#[tokio::test]
async fn a_frame_larger_than_the_limit_is_refused_before_it_is_read() {
    let (mut outgoing, mut incoming, _endpoints) = link().await;
    let huge = Bytes::copy_from_slice(&u32::MAX.to_le_bytes());
    outgoing.frames.send(huge.clone()).await.unwrap();
    let error = incoming.frames.recv().await.unwrap_err().to_string();
    assert!(error.contains("exceeds the limit"), "{error}");
    outgoing.notices.send(huge).await.unwrap();
    let error = incoming.notices.recv().await.unwrap_err().to_string();
    assert!(error.contains("exceeds the limit"), "{error}");
}

/// Dials like a stage but with this hello, and gives whether it was accepted.
async fn knock(peer: &capstan_proto::child::PeerAddr, endpoint: &Endpoint, hello: &DataHello) -> bool {
    let id = EndpointId::from_bytes(&peer.key).unwrap();
    let addr = EndpointAddr::from_parts(id, peer.addrs.iter().map(|a| TransportAddr::Ip(*a)));
    let attempt = async {
        let connection = endpoint.connect(addr, DATA_ALPN).await.ok()?;
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        send.write_all(&codec::encode(hello, 256).unwrap()).await.ok()?;
        let mut answer = [0];
        recv.read_exact(&mut answer).await.ok()
    };
    attempt.await.is_some()
}

#[tokio::test]
async fn strangers_other_epochs_and_other_versions_are_refused() {
    let stage = std::sync::Arc::new(IrohTransport::bind(LOOPBACK).await.unwrap());
    let peer = stage.addr();
    let endpoint = || async {
        let builder = Endpoint::builder(presets::Minimal).relay_mode(RelayMode::Disabled).clear_ip_transports();
        builder.bind_addr((LOOPBACK, 0)).unwrap().bind().await.unwrap()
    };
    let (friend, stranger) = (endpoint().await, endpoint().await);
    let key = *friend.id().as_bytes();
    let waiting = tokio::spawn({
        let stage = stage.clone();
        async move { stage.accept(key, hello(2)).await.is_ok() }
    });
    assert!(!knock(&peer, &stranger, &hello(2)).await, "another key");
    assert!(!knock(&peer, &friend, &hello(1)).await, "another epoch");
    assert!(!knock(&peer, &friend, &DataHello { version: DATA_VERSION + 1, ..hello(2) }).await, "another version");
    assert!(!knock(&peer, &friend, &DataHello { from_stage: 3, ..hello(2) }).await, "another stage");
    // All that did not disturb who is waited for; the accepting task may have started after the first knocks.
    while !knock(&peer, &friend, &hello(2)).await {}
    assert!(waiting.await.unwrap());
    assert!(!knock(&peer, &friend, &hello(2)).await, "a second time");
}
