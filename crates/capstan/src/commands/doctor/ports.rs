//! The two ports that a daemon opens: whether they are free, held by our own daemon, or by whom.
use std::net::{SocketAddr, TcpListener, UdpSocket};

use super::finding::{Check, Finding, State};
use super::root::Root;
use crate::daemon_file::DaemonFile;

/// Most processes whose open files are looked through.
const PROCESSES_MAX: usize = 32_768;
/// How a line of `/proc/net/tcp` marks a socket that listens.
const LISTENS: &str = "0A";
/// What a bad port is mended with.
const CHOOSE: &str = "Choose another port there, or end the program that has it.";

/// What kind of port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The HTTP API's, over TCP.
    Api,
    /// The one that other nodes dial, over UDP.
    Node,
}

impl Kind {
    fn check(self) -> Check {
        match self {
            Self::Api => Check::ApiPort,
            Self::Node => Check::NodePort,
        }
    }

    fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Api => ("TCP", "--api-addr"),
            Self::Node => ("UDP", "--bind-addr"),
        }
    }

    fn try_open(self, addr: SocketAddr) -> std::io::Result<()> {
        match self {
            Self::Api => TcpListener::bind(addr).map(drop),
            Self::Node => UdpSocket::bind(addr).map(drop),
        }
    }

    /// The processes that have the port open, as far as this user may know.
    fn holders(self, root: &Root, port: u16) -> Vec<Holder> {
        let tables = match self {
            Self::Api => ["/proc/net/tcp", "/proc/net/tcp6"],
            Self::Node => ["/proc/net/udp", "/proc/net/udp6"],
        };
        let inodes: Vec<u64> = tables
            .iter()
            .filter_map(|table| root.text(table))
            .flat_map(|table| inodes(&table, port, self == Self::Api))
            .collect();
        if inodes.is_empty() { vec![] } else { processes(root, &inodes) }
    }
}

/// A process that has a port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
}

/// The sockets of a table such as `/proc/net/tcp` that have a local port.
fn inodes(table: &str, port: u16, listening: bool) -> Vec<u64> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let has_port = u16::from_str_radix(local.rsplit_once(':')?.1, 16) == Ok(port);
        (has_port && (!listening || *state == LISTENS)).then(|| inode.parse().ok())?
    };
    table.lines().skip(1).filter_map(line).collect()
}

fn processes(root: &Root, inodes: &[u64]) -> Vec<Holder> {
    let links: Vec<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let pids = root.names("/proc").into_iter().filter_map(|name| name.parse::<u32>().ok()).take(PROCESSES_MAX);
    let has_one = |pid: &u32| {
        let folder = format!("/proc/{pid}/fd");
        root.names(&folder).iter().any(|fd| {
            let link = std::fs::read_link(root.path(&format!("{folder}/{fd}")));
            link.is_ok_and(|link| links.iter().any(|l| link.as_os_str() == l.as_str()))
        })
    };
    let named = |pid| Holder { pid, name: root.text(&format!("/proc/{pid}/comm")).unwrap_or_default() };
    pids.filter(has_one).map(named).collect()
}

/// What was found out about a port.
#[derive(Debug)]
struct Port<'a> {
    kind: Kind,
    addr: SocketAddr,
    opened: std::io::Result<()>,
    holders: Vec<Holder>,
    daemon: Option<&'a DaemonFile>,
}

impl Port<'_> {
    fn judge(self) -> Finding {
        let (check, addr) = (self.kind.check(), self.addr);
        let (protocol, flag) = self.kind.words();
        let mine = self.daemon.filter(|d| match self.kind {
            Kind::Api => d.api.port() == addr.port() || addr.port() == 0,
            Kind::Node => self.holders.iter().any(|h| h.pid == d.pid),
        });
        if let Some(daemon) = mine {
            return Finding::ok(
                check,
                format!("{protocol} {addr}: held by this machine's daemon (process {})", daemon.pid),
            );
        }
        if addr.port() == 0 {
            return Finding::ok(check, format!("{protocol}: the system chooses one"));
        }
        let Err(error) = self.opened else {
            return Finding::ok(check, format!("{protocol} {addr}: free"));
        };
        let another = format!("capstan up {flag} {}", SocketAddr::new(addr.ip(), 0));
        let (found, why) = match error.kind() {
            std::io::ErrorKind::AddrInUse if self.holders.is_empty() && self.daemon.is_some() => {
                return Finding::unknown(check, format!("{protocol} {addr}: taken, likely by this machine's daemon"));
            }
            std::io::ErrorKind::AddrInUse => {
                let who: Vec<_> = self.holders.iter().map(|h| format!("{} (process {})", h.name, h.pid)).collect();
                let who = if who.is_empty() { "another user's program".into() } else { who.join(", ") };
                (format!("{protocol} {addr}: taken by {who}"), CHOOSE)
            }
            std::io::ErrorKind::AddrNotAvailable => (format!("{}: no address of this machine", addr.ip()), CHOOSE),
            std::io::ErrorKind::PermissionDenied => (format!("{protocol} {addr}: this user may not open it"), CHOOSE),
            _ => (format!("{protocol} {addr}: {error}"), CHOOSE),
        };
        Finding::new(check, State::Problem, found).why(why).mend([another])
    }
}

/// Tries a port, and says who has it when it is not free. It is open for a moment only and nothing is sent.
pub fn finding(root: &Root, kind: Kind, addr: SocketAddr, daemon: Option<&DaemonFile>) -> Finding {
    let opened = if addr.port() == 0 { Ok(()) } else { kind.try_open(addr) };
    let holders = if opened.is_err() { kind.holders(root, addr.port()) } else { vec![] };
    Port { kind, addr, opened, holders, daemon }.judge()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_its_holder() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = held.local_addr().unwrap();
        let finding = finding(&Root::new("/".into()), Kind::Api, addr, None);
        assert_eq!(finding.state, State::Problem);
        assert_eq!(finding.mend, ["capstan up --api-addr 127.0.0.1:0"]);
        #[cfg(target_os = "linux")]
        assert!(finding.found.contains(&format!("(process {})", std::process::id())), "{}", finding.found);
        drop(held);
    }

    #[test]
    fn our_own_daemon_may_hold_it() {
        let held = UdpSocket::bind("127.0.0.1:0").unwrap();
        let addr = held.local_addr().unwrap();
        let daemon = DaemonFile {
            pid: std::process::id(),
            api: addr,
            listen: None,
            token: String::new(),
            version: String::new(),
        };
        let root = Root::new("/".into());
        assert_eq!(finding(&root, Kind::Api, addr, Some(&daemon)).state, State::Ok);
        #[cfg(target_os = "linux")]
        assert_eq!(finding(&root, Kind::Node, addr, Some(&daemon)).state, State::Ok);
        assert_eq!(finding(&root, Kind::Node, addr, None).state, State::Problem);
        let nowhere = "203.0.113.1:9".parse().unwrap();
        assert!(finding(&root, Kind::Node, nowhere, None).found.contains("no address of this machine"));
    }

    #[test]
    fn hostile_tables_name_no_socket() {
        let good = "sl local\n 0: 0100007F:20E4 00000000:0000 0A 0:0 0:0 0 1000 0 4242 1";
        assert_eq!(inodes(good, 8420, true), [4242]);
        assert_eq!((inodes(good, 8421, true), inodes(&good.replace("0A", "01"), 8420, true)), (vec![], vec![]));
        for bad in ["", "\n:::::", "\n 0: FFFFFFFFF:99999 x 0A a b c d e -1", "\n0: :20E4 x 0A"] {
            assert!(inodes(bad, 8420, true).is_empty(), "{bad:?}");
        }
    }
}
