//! Whether multicast DNS gets through: a question to the group that every node on the local network listens to, and who
//! answers. One packet, one second.
//!
//! Our own question must come back, for the system hands it to every listener of this machine too. Answers of other
//! machines show that the network between them passes it on.
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::finding::{Check, Finding, State};

/// The group and port of multicast DNS (RFC 6762, section 3).
const GROUP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 251), 5353);
/// How long answers are waited for: responders wait up to 120 ms, so that not all speak at once (section 6).
const WAIT: Duration = Duration::from_secs(1);
/// Largest packet that is read, in bytes (section 17).
const PACKET_BYTES_MAX: usize = 9000;
/// Most packets that are looked at, and so most machines that are counted: a busy network must not hold us up.
const PACKETS_MAX: usize = 1000;
/// Where the rules of multicast DNS are.
const RFC: &str = "https://www.rfc-editor.org/rfc/rfc6762";

/// What came within the wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Heard {
    /// Our own question.
    own: bool,
    /// Machines that answered anything.
    others: usize,
}

/// A question for every kind of service there is, and one that nobody answers, by which we know the packet again.
fn question(mark: u64) -> Vec<u8> {
    // Number 0, a query, two questions and nothing else.
    let mut packet = vec![0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0];
    let marked = format!("capstan-doctor-{mark:016x}");
    for name in [&["_services", "_dns-sd", "_udp", "local"][..], &[&marked, "_capstan", "_udp", "local"]] {
        for label in name {
            // No label here has more than 31 bytes.
            packet.push(label.len() as u8);
            packet.extend_from_slice(label.as_bytes());
        }
        // The end of the name, type PTR, class IN.
        packet.extend_from_slice(&[0, 0, 12, 0, 1]);
    }
    packet
}

/// Whether a packet is an answer: the first bit of its flags.
fn is_answer(packet: &[u8]) -> bool {
    packet.len() >= 12 && packet[2] & 0x80 != 0
}

fn ask() -> io::Result<Heard> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    // A responder of the system, such as Avahi, has the port too.
    socket.set_reuse_address(true)?;
    #[cfg(unix)]
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, GROUP.port()).into())?;
    let socket: UdpSocket = socket.into();
    socket.join_multicast_v4(GROUP.ip(), &Ipv4Addr::UNSPECIFIED)?;
    socket.set_multicast_loop_v4(true)?;
    let packet = question(rand::random());
    socket.send_to(&packet, GROUP)?;
    listen(&socket, &packet, WAIT)
}

fn listen(socket: &UdpSocket, packet: &[u8], wait: Duration) -> io::Result<Heard> {
    let (mut own, mut answered) = (None::<IpAddr>, BTreeSet::new());
    let deadline = Instant::now() + wait;
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    for _ in 0..PACKETS_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) if buffer[..len] == *packet => own = Some(from.ip()),
            Ok((len, from)) if is_answer(&buffer[..len]) => {
                answered.insert(from.ip());
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => break,
            Err(e) => return Err(e),
        }
    }
    if let Some(own) = own {
        answered.remove(&own);
    }
    Ok(Heard { own: own.is_some(), others: answered.len() })
}

fn judge(heard: Result<Heard, String>) -> Finding {
    let check = Check::Mdns;
    let later =
        "Nodes do not look for each other yet, they join by ticket; programs that do would not find this machine.";
    let mend = ["sudo ufw allow 5353/udp", "sudo firewall-cmd --permanent --add-service=mdns"];
    match heard {
        Ok(Heard { own: true, others: 0 }) => {
            Finding::ok(check, "the question came back; no other machine answered within a second").source(RFC)
        }
        Ok(Heard { own: true, others }) => {
            Finding::ok(check, format!("the question came back, and {others} other machines answered")).source(RFC)
        }
        Ok(Heard { own: false, .. }) => {
            Finding::new(check, State::Warning, "this machine's own question did not come back")
                .why(format!("A firewall drops multicast. {later} Of the commands, the one of your firewall mends it."))
                .mend(mend)
                .source(RFC)
        }
        Err(reason) => Finding::new(check, State::Warning, format!("the question could not be asked ({reason})"))
            .why(format!(
                "No network that carries multicast is connected, or a program keeps port 5353 to itself. {later}"
            ))
            .source(RFC),
    }
}

/// Asks, and says what came of it.
pub async fn finding() -> Finding {
    let heard = tokio::task::spawn_blocking(ask).await;
    judge(match heard {
        Ok(Ok(heard)) => Ok(heard),
        Ok(Err(e)) => Err(e.to_string()),
        Err(e) => Err(e.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_is_a_question_and_knows_itself_again() {
        let packet = question(0xabc);
        assert!(!is_answer(&packet) && packet != question(0xabd));
        assert!(packet.windows(9).any(|w| w == b"_services") && packet.windows(8).any(|w| w == b"_capstan"));
        let mut answer = packet.clone();
        answer[2] = 0x84;
        assert!(is_answer(&answer) && !is_answer(&[]) && !is_answer(&answer[..11]));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn own_question_and_others_answers_are_told_apart() {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let other = UdpSocket::bind("127.0.0.2:0").unwrap();
        let to = socket.local_addr().unwrap();
        let packet = question(7);
        let mut answer = question(8);
        answer[2] = 0x84;
        for bytes in [&answer[..], b"", b"noise", &answer[..]] {
            other.send_to(bytes, to).unwrap();
        }
        socket.send_to(&packet, to).unwrap();
        // Everything is in the socket's queue already, so any wait will do.
        let heard = listen(&socket, &packet, Duration::from_millis(100)).unwrap();
        assert_eq!(heard, Heard { own: true, others: 1 });
    }

    #[test]
    fn a_lost_question_is_a_warning() {
        let state = |own, others| judge(Ok(Heard { own, others })).state;
        assert_eq!((state(true, 3), state(true, 0), state(false, 3)), (State::Ok, State::Ok, State::Warning));
        assert_eq!(judge(Err("no route".into())).state, State::Warning);
    }
}
