//! Links between stages over real sockets: who is let in, and what is refused.
use std::net::{IpAddr, Ipv4Addr};

use capstan_compute::link::{IrohTransport, Transport};
use capstan_proto::data::{DATA_ALPN, DATA_VERSION, DataHello, KvOp, MicroBatch, Payload, Row};
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

#[tokio::test]
async fn frames_arrive_in_order_and_whole() {
    let (a, b) = (IrohTransport::bind(LOOPBACK).await.unwrap(), IrohTransport::bind(LOOPBACK).await.unwrap());
    let own = hello(1);
    let peer = b.addr();
    let (receiver, sender) = tokio::join!(b.accept(a.addr().key, hello(1)), a.dial(&peer, &own));
    let (mut receiver, mut sender) = (receiver.unwrap(), sender.unwrap());
    let send = async {
        for step in 0..50 {
            sender.send(&batch(step).encode().unwrap()).await.unwrap();
        }
    };
    let receive = async {
        for step in 0..50 {
            let body = receiver.recv().await.unwrap();
            assert_eq!(MicroBatch::decode(&body).unwrap(), batch(step));
        }
    };
    tokio::join!(send, receive);
    drop(sender);
    assert!(receiver.recv().await.is_err(), "a link that is gone is an error");
}

#[tokio::test]
async fn a_frame_larger_than_the_limit_is_refused_before_it_is_read() {
    let (a, b) = (IrohTransport::bind(LOOPBACK).await.unwrap(), IrohTransport::bind(LOOPBACK).await.unwrap());
    let (own, peer) = (hello(1), b.addr());
    let (receiver, sender) = tokio::join!(b.accept(a.addr().key, hello(1)), a.dial(&peer, &own));
    let mut sender = sender.unwrap();
    sender.send(&u32::MAX.to_le_bytes()).await.unwrap();
    let error = receiver.unwrap().recv().await.unwrap_err().to_string();
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
