//! How a machine whose user has opened a pairing is found: by multicast DNS, or by asking at an address.
//!
//! Both tell the same: its key, where it is dialled, its name, and the two digits of its code that are no secret. Both
//! are hints that anybody on the network could forge; the key exchange shows whether it is the right machine. And both
//! are there only while a pairing is open: a cluster that nobody joins says nothing.
use std::net::SocketAddr;
use std::time::Duration;

use capstan_proto::NodeId;
use capstan_proto::control::ADDRS_MAX;
use capstan_proto::limits::{MEMBERS_MAX, NAME_BYTES_MAX};
use futures::StreamExt;
use iroh::address_lookup::{AddressLookup, EndpointData};
use iroh::{Endpoint, EndpointId, TransportAddr};
use iroh_mdns_address_lookup::{DiscoveryEvent, MdnsAddressLookup};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};

use crate::endpoint::node_id;

/// What the service is called in multicast DNS: `_capstan-pair._udp.local`.
const SERVICE: &str = "capstan-pair";
/// What a line begins with: what it is, and the version of its layout.
const MARK: &str = "capstan-pair 1";
/// Longest line: a key, a name and two numbers.
const LINE_BYTES_MAX: usize = 512;
/// How long a machine may take to tell.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a listener may take to read its line.
const TELL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one waits for a second machine with the same digits after the first: answers come within a second.
const DOUBLE_WAIT: Duration = Duration::from_millis(1200);

/// A machine that waits to be joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Nearby {
    pub(crate) id: NodeId,
    pub(crate) plate: u8,
    pub(crate) name: String,
    pub(crate) addrs: Vec<SocketAddr>,
}

/// The digits and the name, as multicast DNS carries them.
fn note(plate: u8, name: &str) -> String {
    format!("{MARK} {plate} {name}")
}

/// The digits and the name of a [`note`]; none for what is none.
fn read_note(text: &str) -> Option<(u8, String)> {
    let (plate, name) = text.strip_prefix(MARK)?.strip_prefix(' ')?.split_once(' ')?;
    let fits = !name.is_empty() && name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control);
    Some((plate.parse().ok()?, name.to_owned())).filter(|_| fits)
}

/// Announces this machine until what is returned is dropped. None where multicast DNS cannot be used.
pub(crate) fn announce(endpoint: &Endpoint, addrs: &[SocketAddr], plate: u8, name: &str) -> Option<MdnsAddressLookup> {
    let told = || -> Result<MdnsAddressLookup, String> {
        let lookup = MdnsAddressLookup::builder().service_name(SERVICE).build(endpoint.id());
        let lookup = lookup.map_err(|e| e.to_string())?;
        let note = note(plate, name).parse().map_err(|_| "the node's name is too long for it".to_string())?;
        let addrs = addrs.iter().copied().map(TransportAddr::Ip).collect();
        lookup.publish(&EndpointData::new(addrs).with_user_data(note));
        Ok(lookup)
    };
    told().inspect_err(|error| tracing::warn!(error, "other machines cannot find this one by multicast DNS")).ok()
}

/// Listens to multicast DNS for so long, or until a machine with these digits was found (and shortly on, for a second
/// one). Gives all that announced themselves.
pub(crate) async fn listen(endpoint: &Endpoint, plate: Option<u8>, wait: Duration) -> Result<Vec<Nearby>, String> {
    let lookup = MdnsAddressLookup::builder().service_name(SERVICE).advertise(false).build(endpoint.id());
    let lookup = lookup.map_err(|e| format!("multicast DNS cannot be used here ({e})"))?;
    let mut events = lookup.subscribe().await;
    let mut deadline = Instant::now() + wait;
    let mut found: Vec<Nearby> = Vec::new();
    while let Ok(Some(event)) = timeout_at(deadline, events.next()).await {
        match event {
            DiscoveryEvent::Discovered { endpoint_info, .. } => {
                let id = node_id(endpoint_info.endpoint_id);
                let note = endpoint_info.data.user_data().and_then(|note| read_note(note.as_ref()));
                let Some((its_plate, name)) = note else { continue };
                let mut addrs: Vec<_> = endpoint_info.data.ip_addrs().copied().collect();
                addrs.truncate(ADDRS_MAX);
                found.retain(|known| known.id != id);
                // Anybody may announce anything; more than a cluster's worth is noise.
                if !addrs.is_empty() && found.len() < MEMBERS_MAX {
                    found.push(Nearby { id, plate: its_plate, name, addrs });
                }
                if plate == Some(its_plate) {
                    deadline = deadline.min(Instant::now() + DOUBLE_WAIT);
                }
            }
            DiscoveryEvent::Expired { endpoint_id } => found.retain(|known| known.id != node_id(endpoint_id)),
            _ => {}
        }
    }
    found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(found)
}

/// Tells everybody who connects who this machine is, and nothing else; it reads nothing. Runs until it is dropped.
pub(crate) async fn tell(listener: TcpListener, endpoint: Endpoint, plate: u8, name: String) {
    let port = endpoint.bound_sockets().first().map_or(0, SocketAddr::port);
    let line = format!("{} {port} {} {name}\n", note(plate, "at"), hex::encode(endpoint.id().as_bytes()));
    loop {
        let Ok((mut asker, _)) = listener.accept().await else {
            // Out of file handles: the next one may find some.
            tokio::time::sleep(TELL_TIMEOUT).await;
            continue;
        };
        // A line fits into the socket's buffer, so nobody holds this up.
        timeout(TELL_TIMEOUT, asker.write_all(line.as_bytes())).await.ok();
    }
}

/// Asks a machine at an address who it is.
pub(crate) async fn ask(at: SocketAddr) -> Result<Nearby, String> {
    let ask = async {
        let stream = TcpStream::connect(at).await.map_err(|e| e.to_string())?;
        let mut line = Vec::new();
        stream.take(LINE_BYTES_MAX as u64).read_to_end(&mut line).await.map_err(|e| e.to_string())?;
        read_line(&line, at).ok_or_else(|| "what answers there is no capstan that waits to be joined".to_string())
    };
    timeout(ASK_TIMEOUT, ask).await.unwrap_or_else(|_| Err(format!("no answer within {} s", ASK_TIMEOUT.as_secs())))
}

fn read_line(line: &[u8], at: SocketAddr) -> Option<Nearby> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (plate, rest) = read_note(line)?;
    let mut words = rest.strip_prefix("at ")?.splitn(3, ' ');
    let (port, key, name) = (words.next()?.parse().ok()?, words.next()?, words.next()?);
    let id: NodeId = key.parse().ok()?;
    // A key that is no point of the curve cannot be dialled.
    EndpointId::from_bytes(&id.0).ok()?;
    Some(Nearby { id, plate, name: name.to_owned(), addrs: vec![SocketAddr::new(at.ip(), port)] })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn endpoint() -> Endpoint {
        let builder = Endpoint::builder(iroh::endpoint::presets::Minimal).relay_mode(iroh::RelayMode::Disabled);
        builder.clear_ip_transports().bind_addr("127.0.0.1:0").unwrap().bind().await.unwrap()
    }

    #[tokio::test]
    async fn who_asks_at_an_address_is_told() {
        let endpoint = endpoint().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let telling = tokio::spawn(tell(listener, endpoint.clone(), 42, "alpha".into()));
        for _ in 0..2 {
            let found = ask(at).await.unwrap();
            assert_eq!((found.id, found.plate, found.name.as_str()), (node_id(endpoint.id()), 42, "alpha"));
            assert_eq!(found.addrs, endpoint.bound_sockets());
        }
        telling.abort();
        assert!(telling.await.unwrap_err().is_cancelled());
        assert!(ask(at).await.is_err(), "nobody listens when no pairing is open");
    }

    #[tokio::test]
    async fn what_is_no_answer_is_refused_and_bounded() {
        let key = hex::encode(iroh::SecretKey::from_bytes(&[1; 32]).public().as_bytes());
        let at: SocketAddr = ([127, 0, 0, 1], 9).into();
        let good = format!("capstan-pair 1 42 at 8421 {key} alpha\n");
        assert_eq!(read_line(good.as_bytes(), at).unwrap().addrs, [SocketAddr::new(at.ip(), 8421)]);
        for bad in [
            String::new(),
            "HTTP/1.1 400 Bad Request\r\n\r\n".into(),
            good.trim_end().into(),
            good.replace("pair 1", "pair 2"),
            good.replace("42", "999"),
            good.replace("8421", "84210"),
            good.replace(&key, &"zz".repeat(32)),
            good.replace("alpha", "\u{1b}[2J"),
            good.replace(" alpha", ""),
        ] {
            assert_eq!(read_line(bad.as_bytes(), at), None, "{bad:?}");
        }
        // One that never ends its line.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let endless = tokio::spawn(async move {
            let (mut asker, _) = listener.accept().await.unwrap();
            while asker.write_all(&[b'x'; 4096]).await.is_ok() {}
        });
        assert!(ask(at).await.unwrap_err().contains("no capstan"));
        endless.await.unwrap();
    }

    #[tokio::test]
    #[ignore = "sends multicast to the local network: by hand, where it has one"]
    async fn multicast_finds_who_announces_and_only_while_it_does() {
        let (one, other) = (endpoint().await, endpoint().await);
        let announcing = announce(&one, &one.bound_sockets(), 42, "alpha").unwrap();
        let found = listen(&other, Some(42), Duration::from_secs(8)).await.unwrap();
        let want = Nearby { id: node_id(one.id()), plate: 42, name: "alpha".into(), addrs: one.bound_sockets() };
        assert_eq!(found, [want]);
        drop(announcing);
        assert_eq!(listen(&other, Some(42), Duration::from_secs(4)).await.unwrap(), []);
    }

    #[test]
    fn notes_come_back() {
        assert_eq!(read_note(&note(42, "alpha")), Some((42, "alpha".into())));
        for bad in
            ["", "x", "capstan-pair 1 42", "capstan-pair 1 42 ", "capstan-pair 1 x a", "capstan-pair 1 42 a\u{7}"]
        {
            assert_eq!(read_note(bad), None, "{bad:?}");
        }
    }
}
