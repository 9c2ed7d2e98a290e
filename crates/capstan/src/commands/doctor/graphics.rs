//! Graphics units: which they are, how much of main memory they may use, and whether this user may compute on them.
use super::finding::{Check, Finding, State};
use super::memory::Memory;
use super::processor::Processor;
use super::root::{Owner, Root};
use super::system::{Family, System, reboot};
use crate::view;

const GIB: u64 = 1 << 30;
/// Bytes of a page in `ttm.pages_limit`, on every machine that has it.
const PAGE_BYTES: u64 = 4096;
/// Memory is sold in multiples of this, in bytes; what firmware and kernel keep for themselves is less.
const MODULE_BYTES: u64 = 16 * GIB;
/// Memory that is left to the system, in bytes: the planner's catalogue leaves as much.
const SYSTEM_BYTES: u64 = 8 * GIB;
/// Share of the installed memory that is enough for the graphics unit, in hundredths; AMD's own tool asks back above 90 %
/// of what the system sees.
const SHARE_ENOUGH: u64 = 85;
/// Share below which most of what could be had is lost, in hundredths: the kernel's default is 50.
const SHARE_LITTLE: u64 = 75;
/// Largest carve-out that is no matter, in bytes: some firmwares take 4 GiB at their smallest setting.
const CARVE_OUT_BYTES_OK: u64 = 4 * GIB;
/// AMD's number on the PCI bus.
const AMD: u32 = 0x1002;
/// The graphics unit of Ryzen AI Max processors (gfx1151), which has one number in all of them.
const RYZEN_AI_MAX: u32 = 0x1586;

const AMD_GUIDE: &str = "https://rocm.docs.amd.com/en/latest/how-to/system-optimization/strixhalo.html";
const IOMMU_MEASURED: &str = "https://github.com/kyuz0/amd-strix-halo-toolboxes/issues/66";
const NO_FACTS: &str = "no facts about this hardware";

/// A graphics unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Card {
    /// As the system names it, such as `card0`.
    pub name: String,
    /// The maker's number on the PCI bus.
    pub vendor: u32,
    /// The unit's.
    pub device: u32,
    /// Memory of its own, or what the BIOS took of main memory for it, in bytes.
    pub own_bytes: Option<u64>,
    /// Main memory that it may use, in bytes (GTT).
    pub shared_bytes: Option<u64>,
    /// Version of the firmware that schedules its work (MES).
    pub scheduler_firmware: Option<u32>,
    /// How its clock is chosen: `auto`, or what somebody set by hand.
    pub level: Option<String>,
}

impl Card {
    /// Reads all that the system shows.
    pub fn read(root: &Root) -> Vec<Self> {
        let is_card = |name: &String| {
            name.strip_prefix("card").is_some_and(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit()))
        };
        let names = root.names("/sys/class/drm").into_iter().filter(is_card);
        let card = |name: String| {
            let path = |file: &str| format!("/sys/class/drm/{name}/device/{file}");
            Some(Self {
                vendor: root.hex(&path("vendor"))?,
                device: root.hex(&path("device"))?,
                own_bytes: root.number(&path("mem_info_vram_total")),
                shared_bytes: root.number(&path("mem_info_gtt_total")),
                scheduler_firmware: root.hex(&path("fw_version/mes_fw_version")),
                level: root.text(&path("power_dpm_force_performance_level")),
                name,
            })
        };
        names.filter_map(card).collect()
    }

    /// Whether it is the unit whose facts docs/hardware.md has.
    pub fn is_ryzen_ai_max(&self) -> bool {
        self.vendor == AMD && self.device == RYZEN_AI_MAX
    }

    fn finding(&self) -> Finding {
        let ids = format!("{} {:04x}:{:04x}", self.name, self.vendor, self.device);
        let level = format!("/sys/class/drm/{}/device/power_dpm_force_performance_level", self.name);
        if self.level.as_deref() == Some("low") {
            return Finding::new(Check::Graphics, State::Problem, format!("{ids}, held at its lowest clock"))
                .why("Its performance level was set to `low` by hand.")
                .mend([format!("echo auto | sudo tee {level}")])
                .source("https://docs.kernel.org/gpu/amdgpu/thermal.html");
        }
        if self.is_ryzen_ai_max() {
            return Finding::ok(Check::Graphics, format!("{ids}, Radeon of a Ryzen AI Max (gfx1151)"))
                .source(AMD_GUIDE);
        }
        let maker = match self.vendor {
            AMD => "AMD",
            0x10de => "NVIDIA",
            0x8086 => "Intel",
            _ => "unknown maker",
        };
        let own = self.own_bytes.map_or(String::new(), |b| format!(", {} of its own", view::bytes(b)));
        Finding::unknown(Check::Graphics, format!("{ids}, {maker}{own}"))
            .why("docs/hardware.md has no facts about this unit, so its memory and firmware are not judged.")
    }
}

/// What decides how much of main memory a Ryzen AI Max's graphics unit gets.
#[derive(Clone, Copy, Debug)]
struct Sharing {
    /// What the system manages, in bytes.
    system_bytes: u64,
    /// What the BIOS took, in bytes.
    carve_out_bytes: u64,
    /// What else the unit may use, in bytes.
    shared_bytes: u64,
}

impl Sharing {
    /// The memory that was bought, in bytes.
    fn installed(self) -> u64 {
        self.system_bytes.saturating_add(self.carve_out_bytes).div_ceil(MODULE_BYTES).saturating_mul(MODULE_BYTES)
    }

    /// The memory that the unit should be allowed, in bytes.
    fn wanted(self) -> u64 {
        self.installed().saturating_sub(SYSTEM_BYTES)
    }

    /// What programs get: the driver takes the larger of both and never their sum.
    fn usable(self) -> u64 {
        self.shared_bytes.max(self.carve_out_bytes)
    }

    fn carves_too_much(self) -> bool {
        self.carve_out_bytes > CARVE_OUT_BYTES_OK
    }

    fn memory(self, ttm: &Ttm, system: &System) -> Finding {
        let (installed, wanted) = (self.installed(), self.wanted());
        let found = format!("{} of {} usable", view::bytes(self.usable()), view::bytes(installed));
        let share = self.usable() / (installed / 100).max(1);
        let state = match share {
            SHARE_ENOUGH.. => return Finding::ok(Check::GraphicsMemory, found).source(AMD_GUIDE),
            SHARE_LITTLE..SHARE_ENOUGH => State::Warning,
            _ => State::Problem,
        };
        let pages = wanted / PAGE_BYTES;
        let mut why = format!(
            "The kernel lets graphics use half the memory unless told otherwise; {} leave {} for the system. The kernel \
             parameters {module}.pages_limit={pages} {module}.page_pool_size={pages} do the same.",
            view::bytes(wanted),
            view::bytes(installed - wanted),
            module = ttm.module
        );
        if self.carves_too_much() {
            why.push_str(" Reduce the carve-out first: until then the system does not have that much.");
        }
        if system.parameter("amdgpu.gttsize").is_some() {
            why.push_str(
                " Drop amdgpu.gttsize from the kernel's parameters: it is deprecated, and the limit alone suffices.",
            );
        }
        let finding = Finding::new(Check::GraphicsMemory, state, found).why(why).source(AMD_GUIDE);
        finding.mend(ttm.set(wanted / GIB, system))
    }

    fn carve_out(self) -> Finding {
        let found = format!("the BIOS keeps {} for graphics", view::bytes(self.carve_out_bytes));
        if !self.carves_too_much() {
            return Finding::ok(Check::CarveOut, found).source(AMD_GUIDE);
        }
        let state = if self.carve_out_bytes > self.installed() / 8 { State::Problem } else { State::Warning };
        Finding::new(Check::CarveOut, state, found)
            .why(
                "This memory is lost to the system and to Capstan, and brings no speed. Set it to the least (512 \
                MB), often named \"UMA frame buffer size\" or \"iGPU memory\".",
            )
            .mend(["sudo systemctl reboot --firmware-setup"])
            .source(AMD_GUIDE)
    }
}

/// The kernel module that limits what graphics may use.
struct Ttm {
    /// `ttm`, or `amdttm` where AMD's own driver replaces the kernel's.
    module: &'static str,
    pages_limit: Option<u64>,
    has_tool: bool,
}

impl Ttm {
    fn read(root: &Root) -> Self {
        let limit = |module: &str| root.number(&format!("/sys/module/{module}/parameters/pages_limit"));
        let own = limit("amdttm");
        let module = if own.is_some() { "amdttm" } else { "ttm" };
        Self { module, pages_limit: own.or_else(|| limit("ttm")), has_tool: root.exists("/usr/bin/amd-ttm") }
    }

    /// The commands that allow graphics so many GiB.
    fn set(&self, gib: u64, system: &System) -> Vec<String> {
        let mut commands = vec![];
        let tool = if self.has_tool {
            "amd-ttm"
        } else if system.family == Family::Arch {
            commands.extend(system.install("amd-debug-tools"));
            "amd-ttm"
        } else {
            commands.extend(system.install("pipx"));
            commands.push("pipx install amd-debug-tools".into());
            "~/.local/bin/amd-ttm"
        };
        commands.push(format!("{tool} --set {gib}"));
        if self.module == "amdttm" {
            // The tool writes the limit of the kernel's own module only.
            commands.push(
                "sed 's/^options ttm /options amdttm /' /etc/modprobe.d/ttm.conf | sudo tee \
                /etc/modprobe.d/amdttm.conf"
                    .into(),
            );
        }
        commands.push(reboot());
        commands
    }
}

/// Whether memory accesses of devices are translated, which costs a Ryzen AI Max some speed.
fn iommu(root: &Root, system: &System) -> Finding {
    if system.parameter("amd_iommu") == Some("pt") {
        return Finding::new(Check::Iommu, State::Warning, "amd_iommu=pt is no valid parameter")
            .why(
                "The kernel ignores it and translates. `iommu=pt` is the one that was meant, and it brings no speed \
                either.",
            )
            .mend(system.set_parameters("amd_iommu=off"))
            .source(IOMMU_MEASURED);
    }
    let off = system.parameter("amd_iommu") == Some("off") || system.parameter("iommu") == Some("off");
    if off || (root.exists("/sys/class/iommu") && root.names("/sys/class/iommu").is_empty()) {
        return Finding::ok(Check::Iommu, "off").source(IOMMU_MEASURED);
    }
    if !root.exists("/sys/class/iommu") {
        return Finding::unknown(Check::Iommu, "the system does not say").source(IOMMU_MEASURED);
    }
    let passes = system.parameter("iommu") == Some("pt");
    Finding::new(Check::Iommu, State::Warning, if passes { "on, passing through" } else { "on, translating" })
        .why(
            "`amd_iommu=off` measured 5 % more prefill and 2 % more decode; `iommu=pt` brought nothing. Off, the \
            NPU cannot be used, and devices such as Thunderbolt's reach all memory.",
        )
        .mend(system.set_parameters("amd_iommu=off"))
        .source(IOMMU_MEASURED)
}

/// This process's user and groups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    id: u32,
    groups: Vec<u32>,
}

impl User {
    fn read(root: &Root) -> Option<Self> {
        let status = root.text("/proc/self/status")?;
        let numbers = |name: &str| -> Option<Vec<u32>> {
            let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
            Some(line.split_whitespace().filter_map(|n| n.parse().ok()).collect())
        };
        // Real, effective, saved and file system's, in this order.
        let mut groups = numbers("Groups").unwrap_or_default();
        groups.extend(numbers("Gid")?.get(1));
        Some(Self { id: *numbers("Uid")?.get(1)?, groups })
    }

    fn may_use(&self, file: Owner) -> bool {
        let allows = |shift: u32| file.mode >> shift & 6 == 6;
        match self.id {
            0 => true,
            id if id == file.uid => allows(6),
            _ if self.groups.contains(&file.gid) => allows(3),
            _ => allows(0),
        }
    }
}

/// Whether this user may open what computing on graphics needs.
fn access(root: &Root) -> Finding {
    let check = Check::GraphicsAccess;
    let mut nodes: Vec<String> = root
        .names("/dev/dri")
        .into_iter()
        .filter(|n| n.starts_with("renderD"))
        .map(|n| format!("/dev/dri/{n}"))
        .collect();
    nodes.extend(root.exists("/dev/kfd").then(|| "/dev/kfd".to_owned()));
    let Some(user) = User::read(root) else {
        return Finding::unknown(check, "the system does not say who this is");
    };
    if nodes.is_empty() {
        return Finding::unknown(check, "no graphics unit to compute on is seen");
    }
    let closed: Vec<_> = nodes.iter().filter(|n| root.owner(n).is_some_and(|o| !user.may_use(o))).collect();
    if closed.is_empty() {
        return Finding::ok(check, format!("{} may be used", nodes.join(", ")));
    }
    let names: Vec<_> = closed.iter().map(|n| n.as_str()).collect();
    Finding::new(check, State::Problem, format!("this user may not use {}", names.join(", ")))
        .why("Without them nothing can be computed on the graphics unit. Log out and in after the command.")
        .mend(["sudo usermod -aG render,video \"$USER\""])
        .source("https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/prerequisites.html")
}

/// All findings about graphics units.
pub fn findings(root: &Root, cards: &[Card], processor: &Processor, memory: &Memory, system: &System) -> Vec<Finding> {
    let mut findings: Vec<Finding> = cards.iter().map(Card::finding).collect();
    let unit = cards.iter().find(|c| c.is_ryzen_ai_max());
    if cards.is_empty() {
        findings.push(if processor.is_ryzen_ai_max() && root.exists("/sys/class") {
            Finding::new(Check::Graphics, State::Problem, "the graphics unit of this processor is not there")
                .why("The kernel's driver amdgpu has not taken it, or a container hides it.")
                .mend(["sudo modprobe amdgpu", "sudo dmesg | grep -i amdgpu"])
                .source(AMD_GUIDE)
        } else if root.exists("/sys/class") {
            Finding::ok(Check::Graphics, "none is seen; the processor computes")
        } else {
            Finding::unknown(Check::Graphics, "the system does not show its devices")
        });
    }
    match unit {
        None => findings
            .extend([Check::GraphicsMemory, Check::CarveOut, Check::Iommu].map(|c| Finding::unknown(c, NO_FACTS))),
        Some(unit) => {
            let ttm = Ttm::read(root);
            let limit = ttm.pages_limit.and_then(|p| p.checked_mul(PAGE_BYTES));
            let sharing =
                memory.total.zip(unit.own_bytes).zip(unit.shared_bytes.or(limit)).map(|((system, own), shared)| {
                    Sharing { system_bytes: system, carve_out_bytes: own, shared_bytes: shared }
                });
            let not_said =
                |check| Finding::unknown(check, "the driver does not say how memory is shared").source(AMD_GUIDE);
            findings.push(sharing.map_or_else(|| not_said(Check::GraphicsMemory), |s| s.memory(&ttm, system)));
            findings.push(sharing.map_or_else(|| not_said(Check::CarveOut), Sharing::carve_out));
            findings.push(iommu(root, system));
        }
    }
    findings.push(access(root));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sharing(system_gib: f64, carve_out_gib: f64, shared_gib: f64) -> Sharing {
        let bytes = |gib: f64| (gib * GIB as f64) as u64;
        Sharing {
            system_bytes: bytes(system_gib),
            carve_out_bytes: bytes(carve_out_gib),
            shared_bytes: bytes(shared_gib),
        }
    }

    #[test]
    fn what_was_bought_is_found_again_whatever_the_bios_takes() {
        let installed = |s: Sharing| s.installed() / GIB;
        assert_eq!(installed(sharing(125.65, 0.5, 62.8)), 128);
        assert_eq!(installed(sharing(30.9, 96.0, 15.4)), 128);
        assert_eq!(installed(sharing(62.06, 0.5, 31.0)), 64);
        assert_eq!(sharing(125.65, 0.5, 62.8).wanted() / PAGE_BYTES, 31_457_280);
    }

    #[test]
    fn the_larger_of_carve_out_and_limit_is_what_counts() {
        let ttm = Ttm { module: "ttm", pages_limit: None, has_tool: false };
        let system = System::read(&Root::new("/nonexistent".into()));
        let state = |s: Sharing| s.memory(&ttm, &system).state;
        assert_eq!(state(sharing(125.65, 0.5, 120.0)), State::Ok);
        assert_eq!(state(sharing(125.65, 0.5, 96.0)), State::Warning);
        assert_eq!(state(sharing(125.65, 0.5, 62.8)), State::Problem);
        assert_eq!(state(sharing(30.9, 96.0, 15.4)), State::Warning);
        assert_eq!(sharing(30.9, 96.0, 15.4).carve_out().state, State::Problem);
        assert_eq!(sharing(119.0, 8.0, 110.0).carve_out().state, State::Warning);
        assert_eq!(sharing(122.0, 4.0, 110.0).carve_out().state, State::Ok);
        let nothing = Sharing { system_bytes: 0, carve_out_bytes: 0, shared_bytes: 0 };
        let all = Sharing { system_bytes: u64::MAX, carve_out_bytes: u64::MAX, shared_bytes: u64::MAX };
        assert_eq!((state(nothing), state(all)), (State::Problem, State::Ok));
    }

    #[test]
    fn a_file_is_for_its_owner_its_group_or_all() {
        let user = User { id: 1000, groups: vec![44, 1000] };
        let file = |mode: u32, uid, gid| Owner { mode: 0o020_000 | mode, uid, gid };
        assert!(
            user.may_use(file(0o660, 0, 44)) && user.may_use(file(0o666, 0, 0)) && user.may_use(file(0o600, 1000, 0))
        );
        assert!(
            !user.may_use(file(0o660, 0, 105))
                && !user.may_use(file(0o640, 0, 44))
                && !user.may_use(file(0o066, 1000, 44))
        );
        assert!(User { id: 0, groups: vec![] }.may_use(file(0, 1, 1)));
    }
}
