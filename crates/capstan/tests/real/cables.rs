//! Machines of their own as far as the network goes: a network namespace for each daemon, with a cable to one switch. A
//! cable can be pulled, or damaged so that it carries one direction only. It takes root and Linux.
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The port of each daemon's API for others, in its own namespace.
const API_PORT: u16 = 8080;

/// A switch with a cable to each of some machines, all gone when this is dropped.
pub struct Cables {
    id: u32,
    machines: usize,
}

fn run(args: &[&str]) -> bool {
    let (program, args) = args.split_first().expect("a program");
    let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}

fn switch(id: u32) -> String {
    format!("cap{id}s")
}

fn must(args: &[&str]) {
    assert!(run(args), "{} failed", args.join(" "));
}

impl Cables {
    /// Lays them; none where the system does not let us.
    pub fn lay(machines: usize) -> Option<Self> {
        static LAID: AtomicU32 = AtomicU32::new(0);
        let id = (std::process::id() % 100_000) * 10 + LAID.fetch_add(1, Ordering::Relaxed) % 10;
        let switch = switch(id);
        if !run(&["ip", "link", "add", &switch, "type", "bridge"]) {
            return None;
        }
        let cables = Self { id, machines };
        must(&["ip", "link", "set", &switch, "up"]);
        must(&["ip", "addr", "add", &format!("{}/24", cables.ip(253)), "dev", &switch]);
        for i in 0..machines {
            let (space, plug) = (cables.space(i), cables.plug(i));
            if !run(&["ip", "netns", "add", &space]) {
                return None;
            }
            must(&["ip", "link", "add", &plug, "type", "veth", "peer", "name", "eth0", "netns", &space]);
            must(&["ip", "link", "set", &plug, "master", &switch, "up"]);
            must(&["ip", "-n", &space, "addr", "add", &format!("{}/24", cables.ip(i)), "dev", "eth0"]);
            must(&["ip", "-n", &space, "link", "set", "eth0", "up"]);
            must(&["ip", "-n", &space, "link", "set", "lo", "up"]);
        }
        Some(cables)
    }

    fn plug(&self, i: usize) -> String {
        format!("cap{}p{i}", self.id)
    }

    fn space(&self, i: usize) -> String {
        format!("capstan-test-{}-{i}", self.id)
    }

    fn ip(&self, i: usize) -> String {
        format!("10.231.{}.{}", self.id % 254 + 1, i + 1)
    }

    /// What goes before a command that is to run on a machine.
    pub fn on(&self, i: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.space(i)].map(str::to_owned).to_vec()
    }

    /// The machine's address for other daemons, and that of its API.
    pub fn addrs(&self, i: usize) -> (String, String) {
        (format!("{}:0", self.ip(i)), format!("{}:{API_PORT}", self.ip(i)))
    }

    /// Pulls a machine's cable.
    pub fn cut(&self, i: usize) {
        must(&["ip", "link", "set", &self.plug(i), "down"]);
    }

    /// From now on nothing that the machine sends to the others arrives: it goes to a card that nobody has.
    pub fn mute(&self, i: usize) {
        for other in (0..self.machines).filter(|other| *other != i) {
            let (space, ip) = (self.space(i), self.ip(other));
            let nobody = ["lladdr", "02:00:00:00:00:fe", "dev", "eth0", "nud", "permanent"];
            must(&[&["ip", "-n", &space, "neigh", "replace", &ip][..], &nobody].concat());
        }
    }

    /// From now on a machine's cable carries next to nothing in either direction: no packet more than one at a time.
    /// False where the system cannot do that.
    pub fn throttle(&self, i: usize) -> bool {
        let slow = ["root", "tbf", "rate", "100kbit", "burst", "1600", "latency", "2s"];
        let out = ["tc", "-n", &self.space(i), "qdisc", "add", "dev", "eth0"];
        run(&[&out[..], &slow].concat()) && run(&[&["tc", "qdisc", "add", "dev", &self.plug(i)][..], &slow].concat())
    }

    /// Makes a machine's cable whole again.
    pub fn mend(&self, i: usize) {
        run(&["tc", "-n", &self.space(i), "qdisc", "del", "dev", "eth0", "root"]);
        run(&["tc", "qdisc", "del", "dev", &self.plug(i), "root"]);
        must(&["ip", "link", "set", &self.plug(i), "up"]);
        for other in (0..self.machines).filter(|other| *other != i) {
            run(&["ip", "-n", &self.space(i), "neigh", "del", &self.ip(other), "dev", "eth0"]);
        }
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for i in 0..self.machines {
            run(&["ip", "netns", "del", &self.space(i)]);
        }
        run(&["ip", "link", "del", &switch(self.id)]);
    }
}
