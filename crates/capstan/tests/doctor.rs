//! `capstan doctor` through the real binary: on machines that are trees of files, and on this one.
#![cfg(target_os = "linux")]
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const CHECKS: [&str; 29] = [
    "processor",
    "limits",
    "governor",
    "processor-clock",
    "power",
    "memory",
    "swap",
    "large-pages",
    "graphics",
    "graphics-memory",
    "carve-out",
    "iommu",
    "graphics-access",
    "kernel",
    "firmware",
    "backends",
    "link",
    "mtu",
    "link-errors",
    "mdns",
    "firewall",
    "disk",
    "disk-space",
    "disk-speed",
    "time-sync",
    "clock-source",
    "clock-skew",
    "api-port",
    "node-port",
];
/// What asks this machine and not the tree.
const LIVE: &str = "backends,mdns,disk-space,disk-speed,api-port,node-port";
const CARD: &str = "sys/class/drm/card0/device";
const POLICY: &str = "sys/devices/system/cpu/cpufreq/policy0";
const NET: &str = "sys/class/net/enp191s0";
const GIB: u64 = 1 << 30;

/// A machine's files.
struct Machine(TempDir);

impl Machine {
    fn empty() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// A Ryzen AI Max+ 395 with 128 GB on which nothing is left to do.
    fn well_set() -> Self {
        let this = Self::empty();
        for cpu in 0..32 {
            let core = cpu % 16;
            let text = format!(
                "processor\t: {cpu}\nmodel name\t: AMD RYZEN AI MAX+ 395 w/ Radeon 8060S\nphysical id\t: 0\ncore \
                 id\t\t: {core}\nflags\t\t: fpu avx512f\n\n"
            );
            this.append("proc/cpuinfo", &text);
        }
        this.file(
            "proc/meminfo",
            "MemTotal: 131756032 kB\nMemAvailable: 126000000 kB\nSwapTotal: 8388604 kB\nSwapFree: 8388604 kB\n",
        );
        this.file("proc/cmdline", "BOOT_IMAGE=/vmlinuz quiet amd_iommu=off ttm.pages_limit=31457280");
        this.file("proc/sys/kernel/osrelease", "6.18.9-200.fc43.x86_64\n");
        this.file(
            "proc/self/status",
            "Name:\tcapstan\nUid:\t1000\t1000\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\nGroups:\t1000\n",
        );
        this.file("proc/self/cgroup", "0::/user.slice\n");
        this.file("proc/self/mountinfo", "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n");
        this.file("sys/fs/cgroup/user.slice/cpu.max", "max 100000\n");
        this.file("sys/fs/cgroup/user.slice/memory.max", "max\n");
        this.file("sys/dev/block/259:2/queue/rotational", "0\n");
        this.file("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        this.file("sys/firmware/acpi/platform_profile", "performance\n");
        this.file("sys/firmware/acpi/platform_profile_choices", "low-power balanced performance\n");
        this.file("sys/devices/system/cpu/cpufreq/boost", "1\n");
        this.file("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n");
        for (name, text) in [
            ("scaling_driver", "amd-pstate-epp"),
            ("scaling_governor", "performance"),
            ("energy_performance_preference", "performance"),
            ("cpuinfo_max_freq", "5187500"),
            ("scaling_max_freq", "5187500"),
        ] {
            this.file(&format!("{POLICY}/{name}"), text);
        }
        this.graphics(GIB / 2, 120 * GIB);
        this.file(&format!("{CARD}/fw_version/mes_fw_version"), "0x00000080\n");
        this.file(&format!("{CARD}/power_dpm_force_performance_level"), "auto\n");
        this.file("sys/module/ttm/parameters/pages_limit", "31457280\n");
        this.folder("sys/class/iommu");
        this.file("dev/dri/renderD128", "").allow("dev/dri/renderD128", 0o666);
        this.file("dev/kfd", "").allow("dev/kfd", 0o666);
        this.folder("sys/class/net/lo");
        for (name, text) in [
            ("carrier", "1"),
            ("speed", "5000"),
            ("duplex", "full"),
            ("mtu", "1500"),
            ("statistics/rx_packets", "1000000"),
            ("statistics/tx_packets", "1000000"),
            ("statistics/rx_errors", "0"),
            ("statistics/tx_errors", "0"),
        ] {
            this.file(&format!("{NET}/{name}"), text);
        }
        this.folder(&format!("{NET}/device"));
        this.file("etc/os-release", "ID=fedora\nVERSION_ID=43\n");
        this.folder("run/systemd/timesync");
        this.file("run/systemd/timesync/synchronized", "");
        this
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn folder(&self, path: &str) {
        std::fs::create_dir_all(self.path(path)).expect("a folder");
    }

    fn file(&self, path: &str, text: impl AsRef<[u8]>) -> &Self {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, text).expect("a file");
        self
    }

    fn append(&self, path: &str, text: &str) {
        let before = std::fs::read_to_string(self.path(path)).unwrap_or_default();
        self.file(path, before + text);
    }

    fn allow(&self, path: &str, mode: u32) {
        std::fs::set_permissions(self.path(path), std::fs::Permissions::from_mode(mode)).expect("permissions");
    }

    fn graphics(&self, carve_out: u64, shared: u64) {
        self.file(&format!("{CARD}/vendor"), "0x1002\n").file(&format!("{CARD}/device"), "0x1586\n");
        self.file(&format!("{CARD}/mem_info_vram_total"), format!("{carve_out}\n"));
        self.file(&format!("{CARD}/mem_info_gtt_total"), format!("{shared}\n"));
    }

    fn files(&self) -> Vec<PathBuf> {
        files_below(self.0.path())
    }

    /// The report, and the exit status.
    fn examine(&self) -> (Report, i32) {
        let home = tempfile::tempdir().expect("a temporary folder");
        let root = self.0.path().to_str().expect("UTF-8");
        let output = doctor(home.path(), &["--json", "--root", root, "--skip", LIVE]);
        (Report::of(&output), output.status.code().expect("an exit status"))
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

fn doctor(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_capstan"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("CAPSTAN_") {
            command.env_remove(key);
        }
    }
    command.arg("doctor").args(args).stdin(Stdio::null());
    command.env("HOME", home).env("XDG_CONFIG_HOME", home.join("config")).env("XDG_DATA_HOME", home.join("data"));
    command.env("CAPSTAN_API_ADDR", "127.0.0.1:0").env("CAPSTAN_BIND_ADDR", "127.0.0.1:0");
    command.output().expect("capstan starts")
}

struct Report(Value);

impl Report {
    fn of(output: &Output) -> Self {
        Self(serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!(
                "no JSON ({e}): {}\n{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
        }))
    }

    fn findings(&self) -> &[Value] {
        self.0["findings"].as_array().expect("findings")
    }

    fn one(&self, check: &str) -> &Value {
        self.findings().iter().find(|f| f["check"] == check).unwrap_or_else(|| panic!("{check} is missing"))
    }

    fn state(&self, check: &str) -> &str {
        self.one(check)["state"].as_str().expect("a state")
    }

    fn mend(&self, check: &str) -> Vec<&str> {
        let commands = self.one(check)["mend"].as_array().expect("commands");
        commands.iter().map(|c| c.as_str().expect("a command")).collect()
    }

    /// The checks with a state, apart from those that were left out.
    fn with(&self, state: &str) -> BTreeSet<&str> {
        let live: Vec<&str> = LIVE.split(',').collect();
        let names = self.findings().iter().filter(|f| f["state"] == state).filter_map(|f| f["check"].as_str());
        names.filter(|name| !live.contains(name)).collect()
    }

    fn assert_complete(&self) {
        let listed: BTreeSet<&str> = self.findings().iter().filter_map(|f| f["check"].as_str()).collect();
        assert_eq!(listed, BTreeSet::from(CHECKS));
        for finding in self.findings() {
            assert!(finding["found"].as_str().is_some_and(|f| !f.is_empty()), "{finding}");
            if finding["state"] == "problem" {
                assert!(finding["why"].as_str().is_some_and(|w| !w.is_empty()), "{finding}");
            }
        }
    }
}

#[test]
fn a_well_set_ryzen_ai_max_has_nothing_to_mend() {
    let (report, status) = Machine::well_set().examine();
    report.assert_complete();
    assert_eq!((report.with("problem"), report.with("warning")), (BTreeSet::new(), BTreeSet::new()));
    // Nobody runs a daemon there, so no other node is known.
    assert_eq!(report.with("unknown"), BTreeSet::from(["clock-skew"]));
    assert_eq!(status, 0);
    assert!(report.one("processor")["found"].as_str().expect("text").ends_with("cores: 16, threads: 32"));
    assert_eq!(report.one("graphics-memory")["found"], "120.0 GiB of 128.0 GiB usable");
}

#[test]
fn a_badly_set_one_is_told_every_command() {
    let m = Machine::well_set();
    m.file("etc/os-release", "ID=ubuntu\nID_LIKE=debian\nVERSION_ID=\"24.04\"\n").file("etc/default/grub", "");
    m.file("proc/sys/kernel/osrelease", "6.14.0-27-generic\n");
    m.file("proc/cmdline", "quiet splash amdgpu.gttsize=64000").file("sys/class/iommu/ivhd0/x", "");
    m.file(&format!("{POLICY}/scaling_governor"), "powersave");
    m.file(&format!("{POLICY}/energy_performance_preference"), "balance_power");
    m.file("sys/devices/system/cpu/cpufreq/boost", "0\n").file("sys/firmware/acpi/platform_profile", "quiet\n");
    m.file(&format!("{CARD}/fw_version/mes_fw_version"), "0x00000083\n");
    m.graphics(GIB / 2, 67_458_000_000);
    m.file("sys/module/ttm/parameters/pages_limit", "16469033\n");
    m.file("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n");
    m.file(
        "proc/meminfo",
        "MemTotal: 131756032 kB\nMemAvailable: 90000000 kB\nSwapTotal: 8388604 kB\nSwapFree: 4000000 kB\n",
    );
    m.file(&format!("{NET}/speed"), "100").file(&format!("{NET}/duplex"), "half").file(&format!("{NET}/mtu"), "1200");
    m.file(&format!("{NET}/statistics/rx_errors"), "5000");
    m.file("sys/dev/block/259:2/queue/rotational", "1\n").file("sys/fs/cgroup/user.slice/cpu.max", "400000 100000\n");
    m.file("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n");
    m.file("etc/ufw/ufw.conf", "# comment\nENABLED=yes\n");
    // Owned by somebody else than the user of the tree's status, and for nobody else.
    let stranger = std::fs::metadata(m.path("dev/kfd")).expect("a file").uid() + 1;
    m.file("proc/self/status", format!("Uid:\t{stranger}\t{stranger}\nGid:\t{0}\t{0}\nGroups:\t{0}\n", u32::MAX - 1));
    m.allow("dev/kfd", 0o660);

    let (report, status) = m.examine();
    report.assert_complete();
    let problems = [
        "governor",
        "graphics-access",
        "graphics-memory",
        "firmware",
        "kernel",
        "link",
        "mtu",
        "power",
        "processor-clock",
    ];
    assert_eq!(report.with("problem"), problems.into());
    let warnings = ["clock-source", "disk", "iommu", "large-pages", "limits", "link-errors", "swap"];
    assert_eq!(report.with("warning"), warnings.into());
    assert_eq!(status, 1);

    assert_eq!(
        report.mend("graphics-memory"),
        ["sudo apt install pipx", "pipx install amd-debug-tools", "~/.local/bin/amd-ttm --set 120", "sudo reboot"]
    );
    let why = report.one("graphics-memory")["why"].as_str().expect("text");
    assert!(why.contains("ttm.pages_limit=31457280 ttm.page_pool_size=31457280"), "{why}");
    assert!(why.contains("Drop amdgpu.gttsize"), "{why}");
    assert_eq!(
        report.mend("iommu"),
        [
            r#"sudo sed -i 's/^GRUB_CMDLINE_LINUX_DEFAULT="/&amd_iommu=off /' /etc/default/grub"#,
            "sudo update-grub",
            "sudo reboot"
        ]
    );
    assert_eq!(report.mend("kernel")[0], "sudo apt install --install-recommends linux-generic-hwe-24.04");
    assert_eq!(report.mend("graphics-access"), ["sudo usermod -aG render,video \"$USER\""]);
    assert_eq!(report.mend("link"), ["sudo ethtool -s enp191s0 autoneg on"]);
    assert_eq!(report.mend("mtu"), ["sudo ip link set dev enp191s0 mtu 1500"]);
    assert_eq!(report.mend("firewall"), ["sudo ufw allow 1024:65535/udp"]);
    assert!(report.one("firmware")["source"].as_str().is_some_and(|s| s.ends_with("issues/5724")));
    assert!(report.one("limits")["found"].as_str().is_some_and(|f| f.contains("4.0 of 32 threads")));
}

#[test]
fn memory_that_the_bios_took_is_found_again() {
    let m = Machine::well_set();
    m.graphics(96 * GIB, 15 * GIB);
    m.file("proc/meminfo", "MemTotal: 32400000 kB\nMemAvailable: 30000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n");
    m.file("usr/bin/amd-ttm", "");
    let (report, status) = m.examine();
    assert_eq!((report.state("carve-out"), report.state("graphics-memory"), status), ("problem", "warning", 1));
    assert_eq!(report.mend("carve-out"), ["sudo systemctl reboot --firmware-setup"]);
    assert_eq!(report.one("graphics-memory")["found"], "96.0 GiB of 128.0 GiB usable");
    assert!(report.one("graphics-memory")["why"].as_str().is_some_and(|w| w.contains("Reduce the carve-out first")));
    assert_eq!(report.mend("graphics-memory"), ["amd-ttm --set 120", "sudo reboot"]);
    // AMD's own driver has a module of another name, which the tool does not know.
    m.file("sys/module/amdttm/parameters/pages_limit", "1000\n");
    let (report, _) = m.examine();
    assert_eq!(
        report.mend("graphics-memory"),
        [
            "amd-ttm --set 120",
            "sed 's/^options ttm /options amdttm /' /etc/modprobe.d/ttm.conf | sudo tee /etc/modprobe.d/amdttm.conf",
            "sudo reboot"
        ]
    );
    let why = report.one("graphics-memory")["why"].as_str().expect("text");
    assert!(why.contains("amdttm.pages_limit=31457280"), "{why}");
}

#[test]
fn hardware_without_facts_is_said_to_be_unknown() {
    let m = Machine::well_set();
    m.file("proc/cpuinfo", "processor : 0\nmodel name : Zhaoxin KaiXian KX-7000\nphysical id : 0\ncore id : 0\n");
    m.file(&format!("{CARD}/vendor"), "0x1d17\n").file(&format!("{CARD}/device"), "0x3d00\n");
    let (report, status) = m.examine();
    report.assert_complete();
    let unknown =
        ["carve-out", "clock-skew", "firmware", "graphics", "graphics-memory", "iommu", "kernel", "processor"];
    assert_eq!(report.with("unknown"), unknown.into());
    assert_eq!((report.with("problem"), status), (BTreeSet::new(), 0));
    assert!(report.one("processor")["found"].as_str().is_some_and(|f| f.contains("Zhaoxin")));
}

#[test]
fn where_the_system_says_nothing_all_is_unknown() {
    let (report, status) = Machine::empty().examine();
    report.assert_complete();
    assert_eq!((report.with("problem"), report.with("warning"), report.with("ok")), Default::default());
    assert_eq!(status, 0);
}

#[test]
fn hostile_files_change_nothing_but_the_findings() {
    let nines = vec![b'9'; 300_000];
    let garbage: Vec<u8> = (0..=255u8).cycle().take(4096).collect();
    for contents in
        [&nines[..], &garbage, b"-1\n", b"", b"[[::]]=\"", b"0x\n0xFFFFFFFFFFFFFFFF 18446744073709551615 kB"]
    {
        let m = Machine::well_set();
        for file in m.files() {
            std::fs::write(file, contents).expect("a file");
        }
        // The numbers of the graphics unit stay, so that its checks are made.
        m.file(&format!("{CARD}/vendor"), "0x1002").file(&format!("{CARD}/device"), "0x1586");
        let (report, status) = m.examine();
        report.assert_complete();
        assert!([0, 1].contains(&status));
    }
    // A folder where a file should be.
    let m = Machine::well_set();
    for file in m.files() {
        std::fs::remove_file(&file).expect("a file");
        std::fs::create_dir(&file).expect("a folder");
    }
    m.examine().0.assert_complete();
}

#[test]
fn this_machine_is_examined_and_no_file_is_left() {
    let home = tempfile::tempdir().expect("a temporary folder");
    // Multicast would leave this machine.
    let output = doctor(home.path(), &["--json", "--skip", "mdns"]);
    let report = Report::of(&output);
    report.assert_complete();
    assert_eq!(report.state("mdns"), "unknown");
    assert_eq!(report.state("api-port"), "ok");
    assert!(report.one("backends")["found"].as_str().is_some_and(|f| f.contains("CPU")), "{}", report.one("backends"));
    let speed = report.one("disk-speed")["found"].as_str().expect("text");
    assert!(speed.contains("/s") || speed.contains("too little room"), "{speed}");
    let problems = report.0["problems"].as_u64().expect("a number");
    assert_eq!(output.status.code(), Some(i32::from(problems > 0)));
    assert_eq!(std::fs::read_dir(home.path()).expect("a folder").count(), 0);
}

#[test]
fn people_get_areas_marks_commands_and_a_sum() {
    let m = Machine::well_set();
    m.file(&format!("{POLICY}/energy_performance_preference"), "power")
        .file(&format!("{POLICY}/scaling_governor"), "powersave");
    let home = tempfile::tempdir().expect("a temporary folder");
    let output = doctor(home.path(), &["--root", m.0.path().to_str().expect("UTF-8"), "--skip", LIVE]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.starts_with("Processor\n  ✓ processor "), "{text}");
    assert!(text.contains("\n  ✗ governor ") && text.contains("$ echo performance | sudo tee"), "{text}");
    assert!(text.lines().last().is_some_and(|l| l.starts_with("1 thing holds this machine back")), "{text}");
    assert_eq!(output.status.code(), Some(1));
    let help = doctor(home.path(), &["--help"]).stdout;
    assert!(String::from_utf8_lossy(&help).contains("Exit status"));
}
