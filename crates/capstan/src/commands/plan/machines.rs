//! Which machines are planned with, what connects them, and what is settled about some of them.
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use capstan_planner::{Links, Machine, Question, Wish, fewest_of, links, machine_file, machines, names, nodes};
use capstan_proto::LayerRange;
use capstan_proto::manage::NodeStatus;

use super::PlanArgs;
use crate::client::{Client, ClientError};

/// The machine that is planned with when none is named.
const USUAL_MACHINE: &str = "Ryzen AI Max+ 395 128GB";
/// What connects machines when nothing is said: what every switch has.
const USUAL_LINK: &str = "1GbE";

/// A machine that must hold layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    machine: String,
    layers: Option<LayerRange>,
}

/// `MACHINE` or `MACHINE=A..B`.
pub fn pin(text: &str) -> Result<Pin, String> {
    let (machine, layers) = match text.rsplit_once('=') {
        Some((machine, layers)) => {
            (machine, Some(layers.trim().parse().map_err(|e: capstan_proto::layers::BadRange| e.to_string())?))
        }
        None => (text, None),
    };
    match machine.trim() {
        "" => Err(format!("{text:?} names no machine; write MACHINE, MACHINE=0..10 or #2=0..10")),
        machine => Ok(Pin { machine: machine.to_owned(), layers }),
    }
}

/// What is planned with.
pub struct Fleet {
    pub machines: Vec<Machine>,
    pub links: Links,
    pub wishes: Vec<(usize, Wish)>,
    /// Where machines come from that nobody named.
    origin: Origin,
    /// No link was named.
    link_assumed: bool,
}

/// Where machines come from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// They were named.
    Named,
    /// As many of the usual kind as it takes; why the cluster's nodes were not taken, where there is one.
    Usual(Option<String>),
    /// The nodes of the cluster that runs here; those that were left out, and why.
    Cluster(Vec<String>),
}

/// The nodes of the cluster whose daemon runs here; none where none runs.
pub async fn cluster(data_dir: &Path) -> Result<Option<Vec<NodeStatus>>, ClientError> {
    match Client::find(data_dir) {
        Ok(client) => client.status().await.map(|status| Some(status.nodes)),
        Err(ClientError::NotRunning | ClientError::Stale { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

impl Fleet {
    /// What the arguments say; where they name no machines, the nodes of the running cluster.
    pub async fn of(args: &PlanArgs, data_dir: &Path) -> Result<Self> {
        let (machines, known_links, origin) = match &args.machine_file {
            Some(path) => {
                let fleet = read(path)?;
                (fleet.machines, fleet.links, Origin::Named)
            }
            None if args.machines.is_empty() => running(cluster(data_dir).await)?,
            None => (machines::parse(&args.machines.join(","))?, None, Origin::Named),
        };
        let named = args.link.as_deref().map(links::parse).transpose()?;
        let link_assumed = named.is_none() && known_links.is_none();
        let links = match (named, known_links) {
            // Who names a link asks what it would bring, whatever was measured.
            (Some(usual), Some(_)) if matches!(origin, Origin::Cluster(_)) => Links::all(usual),
            (None, Some(links)) => links,
            // A link that is named stands for all that the file does not tell apart.
            (Some(usual), links) => Links { usual, between: links.map(|l| l.between).unwrap_or_default() },
            (None, None) => Links::all(links::parse(USUAL_LINK)?),
        };
        if matches!(origin, Origin::Usual(_)) && !(args.pin.is_empty() && args.exclude.is_empty()) {
            bail!("--pin and --exclude are about machines; name these with --machines or --machine-file");
        }
        let wishes = wishes(&machines, args)?;
        Ok(Self { machines, links, wishes, origin, link_assumed })
    }

    /// When no machines were named: as many of the usual kind as the model takes, or one where no number would do.
    pub fn as_many_as_it_takes(&self, question: &Question) -> Option<Vec<Machine>> {
        let machine = self.machines.first().filter(|_| matches!(self.origin, Origin::Usual(_)))?;
        Some(vec![machine.clone(); fewest_of(question).unwrap_or(1)])
    }

    /// What was assumed because it was not said.
    pub fn notes(&self, usual: Option<&[Machine]>) -> Vec<String> {
        let mut notes = Vec::new();
        if let Origin::Cluster(left_out) = &self.origin {
            notes.push(
                "This is for the nodes of the cluster that runs here, by what was measured of them and their links, with the \
                 memory that is free now; --machines plans with others."
                    .to_owned(),
            );
            notes.extend(left_out.iter().cloned());
        }
        if let Origin::Usual(Some(why)) = &self.origin {
            notes.push(why.clone());
        }
        if let Some(usual) = usual {
            notes.push(format!(
                "No machines were named, so this is for {} of {USUAL_MACHINE}, as many as it takes where any number will do; \
                 name yours with --machines or --machine-file.",
                usual.len()
            ));
        }
        if self.link_assumed && usual.map_or(self.machines.len(), <[_]>::len) > 1 {
            notes.push(format!("No link was named, so {USUAL_LINK} is assumed; name yours with --link."));
        }
        notes
    }
}

/// The cluster's nodes that were measured and what connects them, or a machine of the usual kind.
fn running(cluster: Result<Option<Vec<NodeStatus>>, ClientError>) -> Result<(Vec<Machine>, Option<Links>, Origin)> {
    let usual = |why| Ok((vec![machines::find(USUAL_MACHINE)?], None, Origin::Usual(why)));
    let nodes = match cluster {
        Ok(Some(nodes)) => nodes,
        Ok(None) => return usual(None),
        Err(error) => return usual(Some(format!("The cluster that runs here was not asked: {error}."))),
    };
    let (measured, others): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|n| n.online && n.profile.is_some());
    let machines: Vec<Machine> = measured.iter().filter_map(nodes::machine).collect();
    if machines.is_empty() {
        let why = "No node of the cluster that runs here has been measured yet, so they are not planned with; nodes measure \
                   themselves while nothing runs on them.";
        return usual(Some(why.to_owned()));
    }
    let why = |n: &NodeStatus| {
        let why = if n.online { "was not measured yet" } else { "does not answer" };
        format!("{} {why} and is left out.", n.name)
    };
    Ok((machines, nodes::links(&measured), Origin::Cluster(others.iter().map(why).collect())))
}

/// Reads a file of machines, which is no larger than such a file can be.
fn read(path: &Path) -> Result<machine_file::Fleet> {
    let unreadable = || format!("the file of machines {} cannot be read", path.display());
    let file = std::fs::File::open(path).with_context(unreadable)?;
    let mut text = String::new();
    // One byte more than is accepted, so that a longer one is refused and not cut.
    file.take(machine_file::FILE_BYTES_MAX as u64 + 1).read_to_string(&mut text).with_context(unreadable)?;
    machine_file::parse(&text).with_context(|| path.display().to_string())
}

fn wishes(machines: &[Machine], args: &PlanArgs) -> Result<Vec<(usize, Wish)>> {
    let mut wishes: Vec<(usize, Wish)> = Vec::new();
    for name in &args.exclude {
        // A name stands for all machines that have it.
        wishes.extend(places(machines, name)?.into_iter().map(|place| (place, Wish::Unused)));
    }
    for pin in &args.pin {
        let places = places(machines, &pin.machine)?;
        // Of machines with the same name it does not matter which: the first that is not spoken for.
        let free = places.iter().find(|&&place| wishes.iter().all(|w| w.0 != place));
        let Some(&place) = free else {
            bail!("{} is pinned or excluded more often than there are such machines", pin.machine);
        };
        wishes.push((place, pin.layers.map_or(Wish::Used, Wish::Holds)));
    }
    Ok(wishes)
}

/// The places of the machines that a name means.
fn places(machines: &[Machine], name: &str) -> Result<Vec<usize>> {
    if let Some(number) = name.trim().strip_prefix('#') {
        return match number.parse::<usize>() {
            Ok(n) if (1..=machines.len()).contains(&n) => Ok(vec![n - 1]),
            _ => bail!("{name:?} is no machine: {} were named, so write #1 to #{0}", machines.len()),
        };
    }
    let named =
        |name: &str| -> Vec<usize> { (0..machines.len()).filter(|&i| names::same(&machines[i].name, name)).collect() };
    // As it stands there, or as the catalogue would read it: without the memory, or by another name.
    let mut found = named(name);
    if let (true, Ok(known)) = (found.is_empty(), machines::find(name)) {
        found = named(&known.name);
    }
    if !found.is_empty() {
        return Ok(found);
    }
    let mut names: Vec<&str> = machines.iter().map(|m| m.name.as_str()).collect();
    names.dedup();
    bail!(
        "{name:?} is none of the machines: {}; write a name as it stands there, or #2 for the second",
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_a_machine_and_maybe_layers() {
        let layers = LayerRange::new(0, 10).ok();
        assert_eq!(pin("M4 Max=0..10"), Ok(Pin { machine: "M4 Max".into(), layers }));
        assert_eq!(pin(" #2 "), Ok(Pin { machine: "#2".into(), layers: None }));
        for bad in ["", "=0..1", "a=", "a=3..3", "a=0-3"] {
            assert!(pin(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn measured_nodes_are_planned_with() {
        let node = |name: &str, online, profile| NodeStatus {
            id: capstan_proto::NodeId([0; 32]),
            name: name.into(),
            version: String::new(),
            addrs: vec![],
            online,
            is_self: false,
            rtt_us: None,
            memory_total_bytes: 8,
            memory_free_bytes: 4,
            devices: vec![],
            profile,
            links: vec![],
            votes: false,
        };
        let profile = || Some(capstan_proto::device::DeviceProfile::default());
        let all = vec![node("a", true, profile()), node("b", false, profile()), node("c", true, None)];
        let (machines, links, origin) = running(Ok(Some(all))).unwrap();
        assert_eq!(machines.iter().map(|m| (m.name.as_str(), m.usable_bytes)).collect::<Vec<_>>(), [("a", 4)]);
        assert_eq!(links, None);
        let Origin::Cluster(left_out) = origin else { panic!("{origin:?}") };
        assert!(
            left_out[0].contains("b does not answer") && left_out[1].contains("c was not measured"),
            "{left_out:?}"
        );

        let none = |origin: Origin| matches!(origin, Origin::Usual(Some(why)) if why.contains("measure"));
        assert!(none(running(Ok(Some(vec![node("c", true, None)]))).unwrap().2));
        assert_eq!(running(Ok(None)).unwrap().2, Origin::Usual(None));
        let broken = ClientError::Malformed("x".into());
        assert!(matches!(running(Err(broken)).unwrap().2, Origin::Usual(Some(why)) if why.contains("not asked")));
    }

    #[test]
    fn names_mean_places() {
        let machines = machines::parse("2x\"M4 Max 64GB\", RTX 4090").unwrap();
        assert_eq!(places(&machines, "m4-max 64gb").unwrap(), [0, 1]);
        assert_eq!(places(&machines, "RTX 4090").unwrap(), [2]);
        assert_eq!(places(&machines, "geforce rtx 4090").unwrap(), [2]);
        assert_eq!(places(&machines, "#3").unwrap(), [2]);
        for bad in ["#0", "#4", "#x", "M4", ""] {
            assert!(places(&machines, bad).is_err(), "{bad}");
        }
    }
}
