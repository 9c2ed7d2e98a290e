//! Links between machines: round-trip time and bandwidth, from names and from figures.
use serde::Serialize;

use crate::names;
use crate::timing::HOP_S;

/// Of a line's rate, what TCP or QUIC carries in frames of 1500 bytes: 1460 of 1538 with preamble and gap.
pub const ETHERNET_SHARE: f64 = 1460.0 / 1538.0;
/// Least and most bandwidth that is believed, in bits per second.
const BITS_PER_S: std::ops::RangeInclusive<f64> = 1e3..=1e13;
/// Longest round trip that is believed, in seconds.
const RTT_S_MAX: f64 = 60.0;
/// Longest text of a link.
const LINK_BYTES_MAX: usize = 200;

/// A connection between two machines, the same both ways.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Round-trip time in seconds.
    pub rtt_s: f64,
    /// Payload it carries, in bytes per second.
    pub bytes_per_s: f64,
    /// What sending and receiving a hidden state take at its ends besides, in seconds.
    pub ends_s: f64,
}

impl Link {
    /// How long so many bytes take from one end to the other.
    pub fn way_s(&self, bytes: f64) -> f64 {
        self.rtt_s / 2.0 + self.wire_s(bytes)
    }

    /// How long they keep the line.
    pub fn wire_s(&self, bytes: f64) -> f64 {
        bytes / self.bytes_per_s
    }
}

/// Round trips between two machines over a switch are assumptions: what idle desktop machines commonly show with
/// interrupt coalescing on. `capstan` measures them between nodes.
const NAMED: &[(&str, &[&str], f64, f64)] = &[
    // name, other names, Gbit/s of payload, round trip in ms
    ("1GbE", &["gigabit", "1000base-t"], ETHERNET_SHARE, 0.3),
    ("2.5GbE", &["2.5gbase-t"], 2.5 * ETHERNET_SHARE, 0.25),
    ("5GbE", &["5gbase-t"], 5.0 * ETHERNET_SHARE, 0.25),
    ("10GbE", &["10gbase-t"], 10.0 * ETHERNET_SHARE, 0.15),
    ("25GbE", &["sfp28"], 25.0 * ETHERNET_SHARE, 0.08),
    ("40GbE", &["qsfp+"], 40.0 * ETHERNET_SHARE, 0.08),
    ("50GbE", &[], 50.0 * ETHERNET_SHARE, 0.08),
    ("100GbE", &["qsfp28"], 100.0 * ETHERNET_SHARE, 0.06),
    // The Thunderbolt network driver reaches about half of the line on one connection: an assumption.
    ("USB4", &["thunderbolt", "thunderbolt 4", "thunderbolt 3", "usb4 net"], 10.0, 0.2),
    ("Thunderbolt 5", &["usb4 v2"], 20.0, 0.2),
    // One room, one stream each way at a time: assumptions.
    ("Wi-Fi 5", &["802.11ac"], 0.4, 4.0),
    ("Wi-Fi 6", &["wifi", "802.11ax", "wi-fi 6e"], 0.7, 3.0),
    ("Wi-Fi 7", &["802.11be"], 1.5, 3.0),
];

/// Why a link cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLink {
    /// Neither a name nor a figure.
    #[error("{0}; write a name such as 5GbE, or figures such as rtt=0.2ms,bw=4.5Gbit")]
    Unknown(#[from] names::Unknown),
    /// A figure that cannot be read.
    #[error("{what} cannot be {text:?}; write {example}")]
    Figure {
        /// Which.
        what: &'static str,
        /// What was written, shortened.
        text: String,
        /// How it is written.
        example: &'static str,
    },
    /// Something is missing.
    #[error("a link needs a round trip and a bandwidth; write for example rtt=0.2ms,bw=4.5Gbit or 5GbE,rtt=0.1ms")]
    Missing,
    /// Too long.
    #[error(
        "the description of a link has {0} bytes, more than the {LINK_BYTES_MAX} that are read; write rtt=0.2ms,bw=4.5Gbit"
    )]
    TooLong(usize),
}

/// A link from a name (`5GbE`), figures (`rtt=0.2ms,bw=4.5Gbit`) or both, the figures then counting.
pub fn parse(text: &str) -> Result<Link, BadLink> {
    if text.len() > LINK_BYTES_MAX {
        return Err(BadLink::TooLong(text.len()));
    }
    let (mut rtt, mut bits) = (None, None);
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match part.split_once('=').map(|(key, value)| (key.trim().to_ascii_lowercase(), value.trim())) {
            Some((key, value)) if matches!(key.as_str(), "rtt" | "latency" | "ping") => rtt = Some(rtt_of(value)?),
            Some((key, value)) if matches!(key.as_str(), "bw" | "bandwidth") => bits = Some(bits_of(value)?),
            _ => {
                let (gbit, ms) = named(part)?;
                rtt = rtt.or(Some(ms / 1e3));
                bits = bits.or(Some(gbit * 1e9));
            }
        }
    }
    match (rtt, bits) {
        (Some(rtt_s), Some(bits)) => Ok(Link { rtt_s, bytes_per_s: bits / 8.0, ends_s: HOP_S }),
        _ => Err(BadLink::Missing),
    }
}

fn named(name: &str) -> Result<(f64, f64), BadLink> {
    // "2.5GbE" and "25GbE" differ in punctuation only, which names ignore elsewhere.
    let plain = |s: &str| s.to_lowercase().replace([' ', '-', '_'], "");
    let is = |n: &str| plain(n) == plain(name) || plain(n).replace("gbe", "g") == plain(name);
    let found = NAMED.iter().find(|(n, others, ..)| is(n) || others.iter().any(|o| is(o)));
    let (.., gbit, ms) = found.ok_or_else(|| {
        let all: Vec<_> = NAMED.iter().map(|(n, ..)| *n).collect();
        names::unknown("link", name, &all)
    })?;
    Ok((*gbit, *ms))
}

/// A number and its unit.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..at].parse().ok()?;
    let unit = text[at..].trim().trim_end_matches("/s").trim_end_matches("ps");
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    Some(number * factor)
}

fn rtt_of(text: &str) -> Result<f64, BadLink> {
    let seconds = quantity(text, &[("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)]);
    let wrong = || BadLink::Figure {
        what: "a round trip",
        text: text.chars().take(40).collect(),
        example: "a time of up to a minute with its unit, such as 200us or 0.2ms",
    };
    seconds.filter(|s| (0.0..=RTT_S_MAX).contains(s)).ok_or_else(wrong)
}

fn bits_of(text: &str) -> Result<f64, BadLink> {
    // Case tells bits from bytes, as everywhere.
    let units =
        [("kbit", 1e3), ("Mbit", 1e6), ("Gbit", 1e9), ("kb", 1e3), ("Mb", 1e6), ("Gb", 1e9), ("MB", 8e6), ("GB", 8e9)];
    let bits = quantity(text, &units);
    let wrong = || BadLink::Figure {
        what: "a bandwidth",
        text: text.chars().take(40).collect(),
        example: "a rate with its unit, such as 4.5Gbit or 560MB",
    };
    bits.filter(|b| BITS_PER_S.contains(b)).ok_or_else(wrong)
}

/// The links of so many machines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Links {
    /// Between any two that are not named.
    pub usual: Link,
    /// Between two machines, by their places in the list.
    pub between: Vec<(usize, usize, Link)>,
}

impl Links {
    /// The same between any two.
    pub fn all(link: Link) -> Self {
        Self { usual: link, between: Vec::new() }
    }

    /// Between two machines, by their places in the list.
    pub fn between(&self, a: usize, b: usize) -> Link {
        let is = |&&(x, y, _): &&(usize, usize, Link)| (x, y) == (a, b) || (x, y) == (b, a);
        self.between.iter().rev().find(is).map_or(self.usual, |&(.., link)| link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_figures() {
        let five = parse("5GbE").unwrap();
        assert!((five.bytes_per_s / 1e6 - 593.3).abs() < 0.1 && five.rtt_s == 0.25e-3);
        assert_eq!(
            parse("rtt=0.2ms,bw=4.5Gbit").unwrap(),
            Link { rtt_s: 0.2e-3, bytes_per_s: 4.5e9 / 8.0, ends_s: HOP_S }
        );
        assert_eq!(
            parse("bw=500MB/s, rtt=80us").unwrap(),
            Link { rtt_s: 80.0 * 1e-6, bytes_per_s: 500e6, ends_s: HOP_S }
        );
        assert_eq!(parse("10gbe, rtt=1ms").unwrap().rtt_s, 1e-3);
        assert!(parse("2.5GbE").unwrap().bytes_per_s < parse("25g").unwrap().bytes_per_s / 9.0);
        assert_eq!(parse("WiFi").unwrap(), parse("Wi-Fi 6").unwrap());
        for (name, ..) in NAMED {
            assert!(parse(name).unwrap().bytes_per_s > 1e7, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_answered_with_what_to_do() {
        let said = |text: &str| parse(text).unwrap_err().to_string();
        assert!(said("15GbE").contains("5GbE"), "{}", said("15GbE"));
        assert!(said("rtt=0.2,bw=1Gbit").contains("0.2ms"));
        assert!(said("rtt=-1ms,bw=1Gbit").contains("a round trip"));
        assert!(said("rtt=1ms,bw=0Gbit").contains("a bandwidth"));
        assert!(said("rtt=1ms,bw=1e99Gbit").contains("a bandwidth"));
        assert!(said("rtt=1ms").contains("needs a round trip and a bandwidth"));
        assert!(said("").contains("needs"));
        assert!(said(&"a".repeat(300)).contains("300 bytes"));
    }

    #[test]
    fn a_link_between_two_beats_the_usual_one() {
        let (slow, fast) = (parse("1GbE").unwrap(), parse("10GbE").unwrap());
        let links = Links { usual: slow, between: vec![(0, 2, fast)] };
        assert_eq!((links.between(2, 0), links.between(0, 1)), (fast, slow));
    }
}
