//! By which door a connection came in: this machine's own, or the network's.
//!
//! `api_addr` is on loopback and this machine's door: whoever can reach it can run programs here. `--listen` opens the
//! network's door, and whoever comes in by it shows a key. Where both are one socket (`--listen 0.0.0.0:8420` beside
//! `127.0.0.1:8420`), the address that a connection came to tells: nothing from outside comes to a loopback address.
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// Most connections at once by the network's door: as many streams as a cluster answers, with room for those that wait.
const CONNECTIONS_MAX: usize = 1024;
/// Most of them from one address: one client, or one proxy, must not take all places.
const CONNECTIONS_OF_ONE_MAX: usize = 256;

/// Which addresses a listener opens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This machine.
    Local,
    /// The network: every connection counts as from outside, also one from this machine.
    Network,
    /// Both by one socket.
    Shared,
}

/// Where a connection came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    /// The other end.
    pub peer: SocketAddr,
    /// Whether it came by this machine's own door.
    pub local: bool,
}

impl Door {
    /// Whose failed attempts count together: an address, or an IPv6 network, of which one machine has many addresses.
    pub fn party(&self) -> IpAddr {
        match self.peer.ip().to_canonical() {
            IpAddr::V6(ip) => {
                let s = ip.segments();
                Ipv6Addr::new(s[0], s[1], s[2], s[3], 0, 0, 0, 0).into()
            }
            v4 => v4,
        }
    }
}

/// Connections by the network's door, by who made them.
#[derive(Debug, Default)]
struct Visitors(Mutex<HashMap<IpAddr, usize>>);

impl Visitors {
    fn enter(self: &Arc<Self>, party: IpAddr) -> Option<Visit> {
        let mut visitors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = visitors.values().sum();
        let of_one = visitors.get(&party).copied().unwrap_or_default();
        if all >= CONNECTIONS_MAX || of_one >= CONNECTIONS_OF_ONE_MAX {
            return None;
        }
        visitors.insert(party, of_one + 1);
        Some(Visit { visitors: self.clone(), party })
    }
}

/// One place, given back when this is dropped.
#[derive(Debug)]
struct Visit {
    visitors: Arc<Visitors>,
    party: IpAddr,
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut visitors = self.visitors.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_one) = visitors.get_mut(&self.party) {
            *of_one -= 1;
            if *of_one == 0 {
                visitors.remove(&self.party);
            }
        }
    }
}

/// A listening socket that knows which door it is.
#[derive(Debug)]
pub struct DoorListener {
    listener: TcpListener,
    reach: Reach,
    visitors: Arc<Visitors>,
}

impl DoorListener {
    /// A door at a socket that listens already.
    pub fn new(listener: TcpListener, reach: Reach) -> Self {
        Self { listener, reach, visitors: Arc::default() }
    }

    fn door(&self, connection: &TcpStream, peer: SocketAddr) -> Door {
        // An address that cannot be told counts as from outside.
        let to_loopback = || connection.local_addr().is_ok_and(|a| a.ip().to_canonical().is_loopback());
        let local = match self.reach {
            Reach::Local => true,
            Reach::Network => false,
            Reach::Shared => to_loopback(),
        };
        Door { peer, local }
    }
}

/// A connection, and its place.
#[derive(Debug)]
pub struct DoorStream {
    stream: TcpStream,
    _visit: Option<Visit>,
}

impl Listener for DoorListener {
    type Io = DoorStream;
    type Addr = Door;

    async fn accept(&mut self) -> (DoorStream, Door) {
        loop {
            let (stream, peer) = Listener::accept(&mut self.listener).await;
            let door = self.door(&stream, peer);
            if door.local {
                return (DoorStream { stream, _visit: None }, door);
            }
            match self.visitors.enter(door.party()) {
                visit @ Some(_) => return (DoorStream { stream, _visit: visit }, door),
                // Dropped: there is no place for a reason either.
                None => tracing::debug!(peer = %door.party(), "too many connections; one was closed"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Door> {
        Ok(Door { peer: self.listener.local_addr()?, local: self.reach == Reach::Local })
    }
}

impl Connected<IncomingStream<'_, DoorListener>> for Door {
    fn connect_info(stream: IncomingStream<'_, DoorListener>) -> Self {
        *stream.remote_addr()
    }
}

impl AsyncRead for DoorStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for DoorStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_that_was_dialled_tells_the_doors_of_one_socket_apart() {
        for (reach, want) in [(Reach::Local, true), (Reach::Network, false), (Reach::Shared, true)] {
            let mut door = DoorListener::new(TcpListener::bind("127.0.0.1:0").await.unwrap(), reach);
            let addr = Listener::local_addr(&door).unwrap().peer;
            let (dialled, (_io, came)) = tokio::join!(TcpStream::connect(addr), door.accept());
            assert_eq!((came.local, came.peer), (want, dialled.unwrap().local_addr().unwrap()));
        }
    }

    #[test]
    fn places_are_bounded_for_one_and_for_all_and_given_back() {
        let visitors = Arc::new(Visitors::default());
        let party = |n: u8| IpAddr::from([10, 0, 0, n]);
        let mut held: Vec<_> = (0..CONNECTIONS_OF_ONE_MAX).map(|_| visitors.enter(party(1)).unwrap()).collect();
        assert!(visitors.enter(party(1)).is_none());
        for n in 2..=4 {
            held.extend((0..CONNECTIONS_OF_ONE_MAX).map(|_| visitors.enter(party(n)).unwrap()));
        }
        assert!(visitors.enter(party(9)).is_none(), "all places are taken");
        held.pop();
        assert!(visitors.enter(party(9)).is_some());
        drop(held);
        assert!(visitors.0.lock().unwrap().is_empty());
    }

    #[test]
    fn one_machines_ipv6_addresses_count_together() {
        let party = |ip: &str| Door { peer: SocketAddr::new(ip.parse().unwrap(), 1), local: false }.party();
        assert_eq!(party("2001:db8:1:2:3:4:5:6"), party("2001:db8:1:2:ffff::1"));
        assert_ne!(party("2001:db8:1:2::1"), party("2001:db8:1:3::1"));
        assert_eq!(party("::ffff:10.0.0.1"), party("10.0.0.1"));
    }
}
