//! Network cards: speed, duplex, largest packet, lost packets; and whether a firewall is on.
use std::net::SocketAddr;

use super::finding::{Check, Finding, State};
use super::root::Root;
use super::system::is_plain_word;
use crate::view;

/// Below this a link is a cable's or a switch's fault, in Mb/s.
const SPEED_MIN: i64 = 1000;
/// Below this a chunk of a large model's prompt waits for the link, in Mb/s.
const SPEED_ENOUGH: i64 = 2500;
/// What one chunk of 512 tokens of Kimi K2 (7168 numbers of 4 bytes each) takes on its way to the next node, in bits.
const CHUNK_BITS: f64 = 512.0 * 7168.0 * 4.0 * 8.0;
/// Smallest packet that IPv6, and so QUIC's 1200 bytes with all headers, can rely on, in bytes.
const MTU_MIN: u32 = 1280;
/// From here on a larger packet brings nothing: Capstan's QUIC sends at most 1452 bytes, and 48 of headers.
const MTU_ENOUGH: u32 = 1500;
/// One lost packet in so many is no matter.
const PACKETS_PER_ERROR: u64 = 100_000;

const CLASS_NET: &str = "https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-class-net";
const QUIC_SIZE: &str = "https://www.rfc-editor.org/rfc/rfc9000#section-14";

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Card {
    name: String,
    wireless: bool,
    /// Whether the other end of the cable is there.
    carrier: bool,
    /// In Mb/s; none where the driver does not say.
    speed: Option<i64>,
    duplex: String,
    mtu: Option<u32>,
    packets: u64,
    errors: u64,
}

impl Card {
    fn read(root: &Root) -> Vec<Self> {
        let card = |name: String| {
            let path = |file: &str| format!("/sys/class/net/{name}/{file}");
            // Loopback, bridges, tunnels and other made-up interfaces have no device.
            if !root.exists(&path("device")) {
                return None;
            }
            let counter = |file: &str| root.number::<u64>(&path(&format!("statistics/{file}"))).unwrap_or(0);
            let sum = |files: &[&str]| files.iter().map(|f| counter(f)).fold(0u64, u64::saturating_add);
            Some(Self {
                wireless: root.exists(&path("wireless")) || root.exists(&path("phy80211")),
                carrier: root.number::<u8>(&path("carrier")) == Some(1),
                speed: root.number(&path("speed")).filter(|s| *s > 0),
                duplex: root.text(&path("duplex")).unwrap_or_default(),
                mtu: root.number(&path("mtu")),
                packets: sum(&["rx_packets", "tx_packets"]),
                errors: sum(&["rx_errors", "tx_errors"]),
                name,
            })
        };
        root.names("/sys/class/net").into_iter().filter_map(card).collect()
    }

    fn command(&self, before: &str, after: &str) -> Option<String> {
        is_plain_word(&self.name).then(|| format!("{before}{}{after}", self.name))
    }

    fn link(&self) -> Finding {
        let check = Check::Link;
        let name = &self.name;
        if !self.carrier {
            return Finding::ok(check, format!("{name}: not connected"));
        }
        if self.wireless {
            return Finding::new(check, State::Warning, format!("{name}: wireless")).why(
                "Every token crosses the network, and a wireless link's delay varies and is shared; use a cable.",
            );
        }
        let half = self.duplex == "half";
        let Some(speed) = self.speed else {
            return Finding::unknown(check, format!("{name}: connected, the driver does not say how fast"))
                .source(CLASS_NET);
        };
        let found = format!("{name}: {speed} Mb/s{}", if half { ", half duplex" } else { "" });
        if half || speed < SPEED_MIN {
            return Finding::new(check, State::Problem, found)
                .why(
                    "The two ends have settled for little: look at the cable (Cat 5e or better, all eight wires) \
                    and the switch, then have them settle again.",
                )
                .mend(self.command("sudo ethtool -s ", " autoneg on"))
                .source(CLASS_NET);
        }
        if speed < SPEED_ENOUGH {
            let ms = CHUNK_BITS / (speed as f64 * 1e3);
            return Finding::new(check, State::Warning, found)
                .why(format!(
                    "512 tokens of a prompt for a model as wide as Kimi K2 take {ms:.0} ms to the next \
                    node, and 100 GB of weights {:.0} minutes. Single tokens do not mind. Where card and switch can \
                    do more, look at the cable.",
                    8e5 / speed as f64 / 60.0
                ))
                .source(CLASS_NET);
        }
        Finding::ok(check, found).source(CLASS_NET)
    }

    fn mtu(&self) -> Option<Finding> {
        let mtu = self.mtu.filter(|_| self.carrier)?;
        let found = format!("{}: {mtu} bytes", self.name);
        let (state, why) = match mtu {
            ..MTU_MIN => (State::Problem, "QUIC, over which nodes talk, needs packets of 1280 bytes."),
            MTU_MIN..MTU_ENOUGH => (
                State::Warning,
                "Smaller packets than Ethernet's 1500 bytes cost more work for each byte. Leave it where a tunnel or a \
                 cloud's network asks for it.",
            ),
            _ => return Some(Finding::ok(Check::Mtu, found).source(QUIC_SIZE)),
        };
        let mend = self.command("sudo ip link set dev ", " mtu 1500");
        Some(Finding::new(Check::Mtu, state, found).why(why).mend(mend).source(QUIC_SIZE))
    }

    fn errors(&self) -> Option<Finding> {
        if !self.carrier {
            return None;
        }
        let found = format!("{}: {} of {} packets were damaged or lost", self.name, self.errors, self.packets);
        if self.errors > self.packets / PACKETS_PER_ERROR + 1 {
            return Some(
                Finding::new(Check::LinkErrors, State::Warning, found)
                    .why(
                        "A bad cable, plug or port is the usual reason; each loss makes a token wait. Counted since \
                        the machine was started.",
                    )
                    .mend(self.command("ip -s link show dev ", ""))
                    .source(CLASS_NET),
            );
        }
        Some(Finding::ok(Check::LinkErrors, found).source(CLASS_NET))
    }
}

fn links(cards: &[Card]) -> Vec<Finding> {
    let none = |found: &str| [Check::Link, Check::Mtu, Check::LinkErrors].map(|c| Finding::unknown(c, found)).to_vec();
    if cards.is_empty() {
        return none("no network card is seen");
    }
    let mut findings: Vec<Finding> = cards.iter().map(Card::link).collect();
    if cards.iter().any(|c| c.carrier) {
        let mtu = cards.iter().filter_map(Card::mtu).collect::<Vec<_>>();
        findings.extend(if mtu.is_empty() {
            vec![Finding::unknown(Check::Mtu, "the system does not say")]
        } else {
            mtu
        });
        findings.extend(cards.iter().filter_map(Card::errors));
    } else {
        findings = vec![
            Finding::new(Check::Link, State::Problem, "no network card is connected")
                .why("Other nodes cannot be reached. Plug in a cable.")
                .source(CLASS_NET),
        ];
        findings.extend(none("no network card is connected").into_iter().skip(1));
    }
    findings
}

/// Whether a firewall that we know is switched on. What it lets in, only root may read.
fn firewall(root: &Root, port: SocketAddr) -> Finding {
    let check = Check::Firewall;
    let port = port.port();
    // Ports below are the system's; those above are asked for together.
    let lowest = if (1..1024).contains(&port) { port } else { 1024 };
    let why = format!(
        "Other nodes dial UDP port {port}, and stages dial each other on UDP ports above 1024 that they choose. \
         Whether it lets them in can only be read by root; the command does."
    );
    let ufw = root.text("/etc/ufw/ufw.conf").unwrap_or_default();
    if ufw.lines().any(|l| l.trim().eq_ignore_ascii_case("ENABLED=yes")) {
        return Finding::unknown(check, "ufw is on")
            .why(why)
            .mend([format!("sudo ufw allow {lowest}:65535/udp")])
            .source("https://manpages.ubuntu.com/manpages/noble/en/man8/ufw.8.html");
    }
    if root.exists("/etc/systemd/system/multi-user.target.wants/firewalld.service") {
        return Finding::unknown(check, "firewalld is on")
            .why(why)
            .mend([
                format!("sudo firewall-cmd --permanent --add-port={lowest}-65535/udp"),
                "sudo firewall-cmd --reload".into(),
            ])
            .source("https://firewalld.org/documentation/man-pages/firewall-cmd.html");
    }
    if root.exists("/etc") {
        return Finding::ok(check, "neither ufw nor firewalld is on");
    }
    Finding::unknown(check, "the system does not say whether one is on")
}

/// All findings that need no packet.
pub fn findings(root: &Root, node_addr: SocketAddr) -> Vec<Finding> {
    let mut findings = links(&Card::read(root));
    findings.push(firewall(root, node_addr));
    findings
}

/// A rate in bytes per second, for people.
pub fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", view::bytes(bytes_per_s.max(0.0) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(speed: i64) -> Card {
        let name = "enp1s0".to_owned();
        Card { name, carrier: true, speed: Some(speed), duplex: "full".into(), mtu: Some(1500), ..Card::default() }
    }

    #[test]
    fn slow_links_are_told_apart_from_bad_ones() {
        let state = |c: &Card| c.link().state;
        assert_eq!(
            (state(&card(5000)), state(&card(1000)), state(&card(100))),
            (State::Ok, State::Warning, State::Problem)
        );
        assert!(
            card(1000).link().why.contains("117 ms") && card(1000).link().why.contains("13 minutes"),
            "{}",
            card(1000).link().why
        );
        assert_eq!(state(&Card { duplex: "half".into(), ..card(5000) }), State::Problem);
        assert_eq!(state(&Card { wireless: true, ..card(5000) }), State::Warning);
        assert_eq!(state(&Card { speed: None, ..card(0) }), State::Unknown);
        let strange = Card { name: "e;reboot".into(), ..card(100) };
        assert!(!card(100).link().mend.is_empty() && strange.link().mend.is_empty());
    }

    #[test]
    fn packets_must_be_large_enough_and_arrive() {
        let mtu = |mtu| Card { mtu: Some(mtu), ..card(5000) }.mtu().map(|f| f.state);
        assert_eq!((mtu(9000), mtu(1400), mtu(1200)), (Some(State::Ok), Some(State::Warning), Some(State::Problem)));
        let errors = |errors, packets| Card { errors, packets, ..card(5000) }.errors().map(|f| f.state);
        assert_eq!((errors(1, 10), errors(3, 10)), (Some(State::Ok), Some(State::Warning)));
        assert_eq!(errors(u64::MAX, u64::MAX), Some(State::Warning));
    }

    #[test]
    fn a_machine_without_any_cable_has_a_problem_and_one_without_cards_is_not_known() {
        let cards = [Card { carrier: false, ..card(5000) }, Card { carrier: false, ..card(1000) }];
        assert_eq!(links(&cards)[0].state, State::Problem);
        assert!(links(&[]).iter().all(|f| f.state == State::Unknown));
        let one_of_two = links(&[card(5000), Card { carrier: false, ..card(1000) }]);
        assert!(one_of_two.iter().all(|f| f.state == State::Ok), "{one_of_two:?}");
    }
}
