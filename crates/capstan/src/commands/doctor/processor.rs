//! The processor: which it is, how much of it may be used, and how fast its clock may run.
use super::finding::{Check, Finding, State};
use super::root::Root;
use super::system::is_plain_word;

/// Of the highest clock, what a limit must leave not to be called one, in hundredths: drivers round.
const CLOCK_SHARE_MIN: u64 = 97;
/// Most groups above one's own that are asked for limits.
const GROUPS_MAX: usize = 32;

const CPUFREQ: &str = "https://docs.kernel.org/admin-guide/pm/cpufreq.html";
const AMD_PSTATE: &str = "https://docs.kernel.org/admin-guide/pm/amd-pstate.html";
const CGROUPS: &str = "https://docs.kernel.org/admin-guide/cgroup-v2.html";
const PLATFORM_PROFILE: &str = "https://docs.kernel.org/userspace-api/sysfs-platform_profile.html";
/// What the governor brings a Ryzen AI Max+ 395: 5 to 8 % of prefill, 2 to 3 % of decode.
const MEASURED_GOVERNOR: &str =
    "https://gitea.pragmazest.com/cardosofelipe/strix-halo-optimizations (docs/optimization.md)";

/// The processor as `/proc/cpuinfo` tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processor {
    /// Its product name; none when the system does not say.
    pub model: Option<String>,
    /// Cores, each counted once; 0 when the system does not say.
    pub cores: usize,
    /// Threads that the system sees.
    pub threads: usize,
    /// Whether the system runs in a virtual machine.
    pub virtual_machine: bool,
}

impl Processor {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        Self::parse(&root.text("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(cpuinfo: &str) -> Self {
        let (mut this, mut cores, mut package) = (Self::default(), vec![], "");
        for line in cpuinfo.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            match key.trim() {
                "processor" => this.threads += 1,
                "model name" if this.model.is_none() && !value.is_empty() => {
                    this.model = Some(value.chars().take(120).collect())
                }
                "physical id" => package = value,
                "core id" => cores.push((package, value)),
                "flags" if !this.virtual_machine => {
                    this.virtual_machine = value.split(' ').any(|flag| flag == "hypervisor");
                }
                _ => {}
            }
        }
        cores.sort_unstable();
        cores.dedup();
        this.cores = cores.len();
        this
    }

    /// Whether it is one of the family whose facts docs/hardware.md has.
    pub fn is_ryzen_ai_max(&self) -> bool {
        self.model.as_ref().is_some_and(|m| m.to_uppercase().contains("RYZEN AI MAX"))
    }

    fn finding(&self) -> Finding {
        let Some(model) = &self.model else {
            return Finding::unknown(Check::Processor, "the system does not name its processor");
        };
        let machine = if self.virtual_machine { ", in a virtual machine" } else { "" };
        let found = format!("{model}, cores: {}, threads: {}{machine}", self.cores, self.threads);
        if self.is_ryzen_ai_max() {
            return Finding::ok(Check::Processor, found);
        }
        Finding::unknown(Check::Processor, found)
            .why("docs/hardware.md has no facts about this processor, so only the general checks apply to it.")
    }
}

/// What the groups of this process allow it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Limits {
    /// Processor time in cores.
    cores: Option<f64>,
    /// Memory in bytes.
    memory_bytes: Option<u64>,
}

impl Limits {
    /// The tightest limits of this process's group and those above it; none when groups cannot be read.
    fn read(root: &Root) -> Option<Self> {
        let membership = root.text("/proc/self/cgroup")?;
        if !root.exists("/sys/fs/cgroup") {
            return None;
        }
        let mut limits = Self::default();
        for line in membership.lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
            // Inside a container the path may lead out of what is mounted here.
            let path = if path.split('/').any(|part| part == "..") { "/" } else { path };
            for group in std::path::Path::new(path).ancestors().take(GROUPS_MAX) {
                let group = group.to_string_lossy();
                let group = group.trim_end_matches('/');
                for controller in controllers.split(',') {
                    limits.tighten(root, controller, group);
                }
            }
        }
        Some(limits)
    }

    fn tighten(&mut self, root: &Root, controller: &str, group: &str) {
        let (cores, memory) = match controller {
            "" => {
                let cores = root.text(&format!("/sys/fs/cgroup{group}/cpu.max")).and_then(|t| quota(&t));
                (cores, root.number(&format!("/sys/fs/cgroup{group}/memory.max")))
            }
            "cpu" => {
                let number = |name| root.number::<i64>(&format!("/sys/fs/cgroup/cpu{group}/cpu.cfs_{name}_us"));
                let cores = number("quota").zip(number("period")).and_then(|(q, p)| quota(&format!("{q} {p}")));
                (cores, None)
            }
            "memory" => (None, root.number(&format!("/sys/fs/cgroup/memory{group}/memory.limit_in_bytes"))),
            _ => (None, None),
        };
        if let Some(cores) = cores {
            self.cores = Some(self.cores.map_or(cores, |c| c.min(cores)));
        }
        // Without a limit, the first version of groups tells the largest number of pages there is.
        if let Some(bytes) = memory.filter(|b| *b < 1 << 60) {
            self.memory_bytes = Some(self.memory_bytes.map_or(bytes, |b| b.min(bytes)));
        }
    }

    fn finding(limits: Option<Self>, threads: usize, memory_bytes: Option<u64>) -> Finding {
        let Some(limits) = limits else {
            return Finding::unknown(Check::Limits, "the limits of this process cannot be read here").source(CGROUPS);
        };
        let mut found = vec![];
        if let Some(cores) = limits.cores.filter(|c| *c < threads as f64) {
            found.push(format!("{cores:.1} of {threads} threads"));
        }
        if let Some(bytes) = limits.memory_bytes.filter(|b| memory_bytes.is_some_and(|m| *b < m)) {
            found.push(format!("{} of memory", crate::view::bytes(bytes)));
        }
        if found.is_empty() {
            return Finding::ok(Check::Limits, "no limit on processor time or memory").source(CGROUPS);
        }
        Finding::new(Check::Limits, State::Warning, format!("limited to {}", found.join(" and ")))
            .why(
                "A container or service sets this limit; raise it where it is started (--cpus and --memory of a \
                container, CPUQuota and MemoryMax of a systemd service).",
            )
            .source(CGROUPS)
    }
}

/// Processor time in cores, out of a quota and its period in microseconds.
fn quota(text: &str) -> Option<f64> {
    let (quota, period) = text.split_once(' ')?;
    let (quota, period) = (quota.trim().parse::<i64>().ok()?, period.trim().parse::<i64>().ok()?);
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

/// How the clocks of all cores are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Clocks {
    driver: String,
    governors: Vec<String>,
    preferences: Vec<String>,
    /// Highest clock of any core in kHz, and what is allowed of it there.
    highest: Option<(u64, u64)>,
    /// Whether a policy allows less than its cores can.
    capped: bool,
    /// Whether cores may run above their base clock; none when the system does not say.
    boost: Option<bool>,
}

const POLICIES: &str = "/sys/devices/system/cpu/cpufreq";
const NO_TURBO: &str = "/sys/devices/system/cpu/intel_pstate/no_turbo";

impl Clocks {
    fn read(root: &Root) -> Self {
        let mut this = Self::default();
        for policy in root.names(POLICIES).into_iter().filter(|n| n.starts_with("policy")) {
            let text = |name: &str| root.text(&format!("{POLICIES}/{policy}/{name}"));
            let number = |name: &str| root.number::<u64>(&format!("{POLICIES}/{policy}/{name}"));
            if this.driver.is_empty() {
                this.driver = text("scaling_driver").unwrap_or_default();
            }
            this.governors.extend(text("scaling_governor"));
            this.preferences.extend(text("energy_performance_preference"));
            if let (Some(able), Some(allowed)) = (number("cpuinfo_max_freq"), number("scaling_max_freq")) {
                this.capped |= allowed < able / 100 * CLOCK_SHARE_MIN;
                this.highest = this.highest.max(Some((able, allowed)));
            }
        }
        for list in [&mut this.governors, &mut this.preferences] {
            list.sort();
            list.dedup();
        }
        let boost = root.number::<u8>(&format!("{POLICIES}/boost")).map(|b| b != 0);
        this.boost = boost.or_else(|| root.number::<u8>(NO_TURBO).map(|n| n == 0));
        this
    }

    /// Whether the driver leaves the clock to the processor, which then follows the energy preference.
    fn is_autonomous(&self) -> bool {
        self.driver == "amd-pstate-epp" || self.driver == "intel_pstate"
    }

    fn governor(&self, tuned: bool) -> Finding {
        if self.governors.is_empty() {
            return Finding::unknown(Check::Governor, "the system does not say what chooses the clock").source(CPUFREQ);
        }
        let mut found = format!("{} ({})", self.governors.join(", "), self.driver);
        if !self.preferences.is_empty() {
            found.push_str(&format!(", energy preference {}", self.preferences.join(", ")));
        }
        let is = |word: &str| self.governors.iter().any(|g| g == word);
        let prefers = |words: &[&str]| self.preferences.iter().any(|p| words.contains(&p.as_str()));
        let (state, why) = if self.governors == ["performance"] {
            (State::Ok, "")
        } else if self.is_autonomous() {
            if prefers(&["power", "balance_power"]) {
                (State::Problem, "The processor is told to save energy rather than to be fast.")
            } else if self.preferences == ["performance"] {
                (State::Ok, "")
            } else {
                (
                    State::Warning,
                    "The processor weighs speed against energy. On a Ryzen AI Max+ 395 `performance` brought 5 to 8 \
                     % of prefill and 2 to 3 % of decode.",
                )
            }
        } else if is("powersave") {
            (State::Problem, "With this driver `powersave` holds the clock at its lowest.")
        } else {
            (
                State::Warning,
                "The clock follows the load and rises late. On a Ryzen AI Max+ 395 `performance` brought 5 to 8 % of \
                 prefill and 2 to 3 % of decode.",
            )
        };
        let finding = Finding::new(Check::Governor, state, found).why(why);
        if state == State::Ok {
            return finding.source(CPUFREQ);
        }
        let mut mend = vec![format!("echo performance | sudo tee {POLICIES}/policy*/scaling_governor")];
        if tuned {
            mend.push("sudo tuned-adm profile accelerator-performance".into());
        }
        let source = if state == State::Warning {
            MEASURED_GOVERNOR
        } else if self.is_autonomous() {
            AMD_PSTATE
        } else {
            CPUFREQ
        };
        finding.mend(mend).source(source)
    }

    fn clock(&self) -> Finding {
        let ghz = |khz: u64| format!("{:.2} GHz", khz as f64 / 1e6);
        let Some((able, allowed)) = self.highest else {
            return Finding::unknown(Check::ProcessorClock, "the system does not say how high the clock may go")
                .source(CPUFREQ);
        };
        if self.boost == Some(false) {
            let (file, value) = if self.driver.starts_with("intel") {
                (NO_TURBO.to_owned(), 0)
            } else {
                (format!("{POLICIES}/boost"), 1)
            };
            return Finding::new(Check::ProcessorClock, State::Problem, "cores may not run above their base clock")
                .why("Boost is switched off, here or in the BIOS.")
                .mend([format!("echo {value} | sudo tee {file}")])
                .source(CPUFREQ);
        }
        if self.capped {
            let found = format!("held at {} of {}", ghz(allowed), ghz(able));
            return Finding::new(Check::ProcessorClock, State::Problem, found)
                .why("A limit keeps cores below the clock that they can reach.")
                .mend([format!(
                    "for p in {POLICIES}/policy*; do sudo cp $p/cpuinfo_max_freq $p/scaling_max_freq; done"
                )])
                .source(CPUFREQ);
        }
        Finding::ok(Check::ProcessorClock, format!("up to {}", ghz(able))).source(CPUFREQ)
    }
}

/// What the firmware was told about speed and heat.
fn profile(profile: Option<String>, choices: &str) -> Finding {
    let Some(profile) = profile else {
        return Finding::unknown(Check::Power, "the firmware offers no power profile").source(PLATFORM_PROFILE);
    };
    let found = format!("power profile {profile}");
    let state = match profile.as_str() {
        "performance" | "max-power" => return Finding::ok(Check::Power, found).source(PLATFORM_PROFILE),
        "balanced" | "balanced-performance" | "custom" => State::Warning,
        "low-power" | "quiet" | "cool" => State::Problem,
        _ => return Finding::unknown(Check::Power, found).source(PLATFORM_PROFILE),
    };
    let offered = choices.split_whitespace().any(|c| c == "performance");
    Finding::new(Check::Power, state, found)
        .why("The firmware limits what processor and graphics may draw; `performance` allows the most.")
        .mend(offered.then_some("echo performance | sudo tee /sys/firmware/acpi/platform_profile"))
        .source(PLATFORM_PROFILE)
}

/// Whether the machine runs on its battery; none where there is no mains supply that could be out.
fn battery(root: &Root) -> Option<Finding> {
    let supplies = root.names("/sys/class/power_supply");
    let of = |name: &String, file: &str| root.text(&format!("/sys/class/power_supply/{name}/{file}"));
    let mains: Vec<_> =
        supplies.iter().filter(|s| is_plain_word(s) && of(s, "type").as_deref() == Some("Mains")).collect();
    let off = !mains.is_empty() && mains.iter().all(|s| of(s, "online").as_deref() == Some("0"));
    off.then(|| {
        Finding::new(Check::Power, State::Problem, "on battery")
            .why("Most machines draw less and run slower on battery; plug it in.")
            .source("https://docs.kernel.org/power/power_supply_class.html")
    })
}

/// All findings about the processor.
pub fn findings(root: &Root, processor: &Processor, memory_bytes: Option<u64>) -> Vec<Finding> {
    let clocks = Clocks::read(root);
    let tuned = ["/usr/sbin/tuned-adm", "/usr/bin/tuned-adm"].iter().any(|p| root.exists(p));
    let choices = root.text("/sys/firmware/acpi/platform_profile_choices").unwrap_or_default();
    let mut findings = vec![
        processor.finding(),
        Limits::finding(Limits::read(root), processor.threads, memory_bytes),
        clocks.governor(tuned),
        clocks.clock(),
        profile(root.text("/sys/firmware/acpi/platform_profile"), &choices),
    ];
    findings.extend(battery(root));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_counted_once_and_threads_all() {
        let one = |n, core| {
            format!(
                "processor : {n}\nmodel name : AMD RYZEN AI MAX+ 395\nphysical id : 0\ncore id : {core}\nflags : fpu \
                 hypervisor\n\n"
            )
        };
        let p = Processor::parse(&[one(0, 0), one(1, 1), one(2, 0), one(3, 1)].concat());
        assert_eq!((p.cores, p.threads, p.virtual_machine, p.is_ryzen_ai_max()), (2, 4, true, true));
        assert_eq!(Processor::parse("::\n:x\nprocessor\n\u{0}: :"), Processor::default());
    }

    #[test]
    fn powersave_is_right_with_one_driver_and_wrong_with_another() {
        let clocks = |driver: &str, governor: &str, preference: Option<&str>| Clocks {
            driver: driver.into(),
            governors: vec![governor.into()],
            preferences: preference.map(Into::into).into_iter().collect(),
            ..Clocks::default()
        };
        let state = |c: Clocks| c.governor(false).state;
        assert_eq!(state(clocks("amd-pstate-epp", "powersave", Some("performance"))), State::Ok);
        assert_eq!(state(clocks("amd-pstate-epp", "powersave", Some("balance_performance"))), State::Warning);
        assert_eq!(state(clocks("amd-pstate-epp", "powersave", Some("power"))), State::Problem);
        assert_eq!(state(clocks("intel_pstate", "powersave", None)), State::Warning);
        assert_eq!(state(clocks("acpi-cpufreq", "powersave", None)), State::Problem);
        assert_eq!(state(clocks("acpi-cpufreq", "schedutil", None)), State::Warning);
        assert_eq!(state(clocks("acpi-cpufreq", "performance", None)), State::Ok);
        assert_eq!(state(Clocks::default()), State::Unknown);
    }

    #[test]
    fn quotas_are_cores_and_nonsense_is_none() {
        assert_eq!((quota("150000 100000"), quota("max 100000")), (Some(1.5), None));
        assert_eq!((quota("-1 100000"), quota("1 0"), quota(""), quota("9 -9")), (None, None, None, None));
    }
}
