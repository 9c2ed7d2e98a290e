//! Kernel and graphics firmware: versions that are known to be too old or bad for this hardware.
use super::finding::{Check, Finding, State};
use super::graphics::Card;
use super::root::Root;
use super::system::{Family, System, reboot};

/// First kernel of kernel.org with the two corrections that computing on a Ryzen AI Max needs.
const KERNEL_MIN: (u32, u32, u32) = (6, 18, 4);
/// First kernel under which ROCm sees more than 15.5 GB of a carve-out there.
const KERNEL_SEES_MEMORY: (u32, u32, u32) = (6, 16, 9);
/// First builds of Ubuntu's kernels with these corrections: flavour, version, number of the build.
const UBUNTU_MIN: [(&str, (u32, u32, u32), u32); 2] = [("generic", (6, 17, 0), 19), ("oem", (6, 14, 0), 1018)];
/// Release of linux-firmware that breaks computing there.
const FIRMWARE_BAD: u32 = 20251125;
/// Release with which it is reported to work.
const FIRMWARE_GOOD: u32 = 20260110;
/// The bad version of the firmware that schedules work.
const SCHEDULER_BAD: u32 = 0x83;

const AMD_GUIDE: &str = "https://rocm.docs.amd.com/en/latest/how-to/system-optimization/strixhalo.html";
const SEES_15_GB: &str = "https://github.com/ROCm/legacy-rocm-build/issues/5444";
const MES_83: &str = "https://github.com/ROCm/legacy-rocm-build/issues/5724";
const TOOLBOXES: &str = "https://github.com/kyuz0/amd-strix-halo-toolboxes";
const NO_FACTS: &str = "no facts about this hardware";

/// A kernel's release, such as `6.17.0-19-generic`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Release {
    version: (u32, u32, u32),
    /// Number of the distribution's build, where it has one.
    build: Option<u32>,
    /// The last word, such as `generic`.
    flavour: String,
}

impl Release {
    fn parse(text: &str) -> Option<Self> {
        let (version, rest) = text.split_once('-').unwrap_or((text, ""));
        // The third number may carry more, as in `6.12.48+deb13`, or be missing, as in `6.18`.
        let number = |part: &str| part.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok();
        let mut parts = version.splitn(3, '.');
        let (major, minor) = (number(parts.next()?)?, number(parts.next()?)?);
        let patch = parts.next().map_or(Some(0), number)?;
        let mut words = rest.split('-');
        let build = words.next().and_then(|w| w.parse().ok());
        Some(Self { version: (major, minor, patch), build, flavour: words.next_back().unwrap_or_default().to_owned() })
    }

    /// Whether it has what a Ryzen AI Max needs; none when that is not known.
    fn suffices(&self, system: &System) -> Option<bool> {
        if self.version >= KERNEL_MIN {
            return Some(true);
        }
        if system.id != "ubuntu" {
            return Some(false);
        }
        let known =
            UBUNTU_MIN.iter().find(|(flavour, version, _)| *flavour == self.flavour && *version == self.version);
        match (known, self.build) {
            (Some((_, _, min)), Some(build)) => Some(build >= *min),
            // Of Ubuntu's other kernels between these versions nobody has written.
            _ if self.version > (6, 14, 0) => None,
            _ => Some(false),
        }
    }
}

fn kernel(text: Option<String>, system: &System, is_known: bool) -> Finding {
    let check = Check::Kernel;
    let Some(text) = text else {
        return Finding::unknown(check, "the system does not name its kernel");
    };
    if !is_known {
        return Finding::unknown(check, format!("{text}; no facts about this hardware"));
    }
    let sufficing = Release::parse(&text).and_then(|r| Some((r.suffices(system)?, r)));
    let Some((suffices, release)) = sufficing else {
        return Finding::unknown(check, format!("{text}; nothing is known about this version"))
            .why("Needed is 6.18.4, or of Ubuntu 24.04 6.17.0-19 (HWE) or 6.14.0-1018 (OEM).")
            .source(AMD_GUIDE);
    };
    if suffices {
        return Finding::ok(check, text).source(AMD_GUIDE);
    }
    let (why, source) = if release.version < KERNEL_SEES_MEMORY {
        (
            "Before 6.16.9 ROCm sees 15.5 GB of a larger carve-out, and before 6.18.4 it may fail to start or misbehave \
             on this graphics unit. Vulkan does not use that part of the kernel.",
            SEES_15_GB,
        )
    } else {
        (
            "Before 6.18.4 ROCm may fail to start or misbehave on this graphics unit. Vulkan does not use that part \
             of the kernel.",
            AMD_GUIDE,
        )
    };
    Finding::new(check, State::Problem, text).why(why).mend(newer_kernel(system)).source(source)
}

fn newer_kernel(system: &System) -> Vec<String> {
    let install = match (system.family, system.id.as_str()) {
        (_, "ubuntu") if system.version == "24.04" => "sudo apt install --install-recommends linux-generic-hwe-24.04",
        (_, "debian") => {
            "sudo apt install -t \"$(. /etc/os-release; echo $VERSION_CODENAME)-backports\" linux-image-amd64"
        }
        (Family::Debian, _) => "sudo apt update && sudo apt full-upgrade",
        (Family::Fedora, _) => "sudo dnf upgrade kernel",
        (Family::Arch, _) => "sudo pacman -Syu",
        (Family::Other, _) => return vec![],
    };
    vec![install.into(), reboot()]
}

/// The date in a package's version, as a number such as 20251125.
fn release_date(version: &str) -> Option<u32> {
    // Debian may put an epoch before it, others the package's name.
    let digits = version.split(|c: char| !c.is_ascii_digit()).find(|part| part.len() == 8)?;
    digits.parse().ok().filter(|date| (20000000..21000000).contains(date))
}

/// The installed release of the graphics firmware, from the package list of whatever distribution this is.
async fn installed_firmware(root: &Root) -> Option<u32> {
    for package in ["firmware-amd-graphics", "linux-firmware"] {
        let version = root.paragraph_field("/var/lib/dpkg/status", &format!("Package: {package}"), "Version:");
        if let Some(date) = version.and_then(|v| release_date(&v)) {
            return Some(date);
        }
    }
    let pacman = root.names("/var/lib/pacman/local");
    // Other packages' names begin alike: what follows must be the date.
    let dated =
        |name: &str, prefix: &str| release_date(name.strip_prefix(prefix).filter(|rest| rest.starts_with("20"))?);
    let arch = |prefix: &str| pacman.iter().find_map(|name| dated(name, prefix));
    if let Some(date) = arch("linux-firmware-amdgpu-").or_else(|| arch("linux-firmware-")) {
        return Some(date);
    }
    release_date(&root.ask("rpm", &["-q", "--qf", "%{VERSION}\n", "amd-gpu-firmware"]).await?)
}

fn firmware(scheduler: Option<u32>, release: Option<u32>, system: &System) -> Finding {
    let check = Check::Firmware;
    let parts = [release.map(|r| format!("linux-firmware {r}")), scheduler.map(|s| format!("MES {s:#x}"))];
    let found = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if found.is_empty() {
        return Finding::unknown(check, "neither driver nor package list tells its version").source(MES_83);
    }
    let bad_scheduler = scheduler == Some(SCHEDULER_BAD);
    if !bad_scheduler && release != Some(FIRMWARE_BAD) {
        return Finding::ok(check, found).source(TOOLBOXES);
    }
    let upgrade: &[&str] = match (system.family, system.id.as_str()) {
        (_, "debian") => &["sudo apt update && sudo apt install firmware-amd-graphics", "sudo update-initramfs -u"],
        (Family::Debian, _) => &["sudo apt update && sudo apt install linux-firmware", "sudo update-initramfs -u"],
        (Family::Fedora, _) => &["sudo dnf upgrade amd-gpu-firmware linux-firmware", "sudo dracut --force"],
        (Family::Arch, _) => &["sudo pacman -Syu linux-firmware"],
        (Family::Other, _) => &[],
    };
    let restart = (!upgrade.is_empty()).then(reboot);
    Finding::new(check, State::Problem, found)
        .why(format!(
            "Release {FIRMWARE_BAD} brought MES 0x83, with which this graphics unit hangs or faults under ROCm. \
             {FIRMWARE_GOOD} is reported to be good; where a distribution has none later, 20251111 is."
        ))
        .mend(upgrade.iter().map(|c| (*c).to_owned()).chain(restart))
        .source(if bad_scheduler { MES_83 } else { "https://github.com/kyuz0/amd-strix-halo-toolboxes/issues/37" })
}

/// All findings about kernel and firmware.
pub async fn findings(root: &Root, cards: &[Card], system: &System, is_known: bool) -> Vec<Finding> {
    let kernel = kernel(root.text("/proc/sys/kernel/osrelease"), system, is_known);
    let firmware = if is_known {
        let scheduler = cards.iter().find(|c| c.is_ryzen_ai_max()).and_then(|c| c.scheduler_firmware);
        firmware(scheduler, installed_firmware(root).await, system)
    } else {
        Finding::unknown(Check::Firmware, NO_FACTS)
    };
    vec![kernel, firmware]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(id: &str) -> System {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/os-release"), format!("ID={id}\nVERSION_ID=24.04")).unwrap();
        System::read(&Root::new(dir.path().into()))
    }

    #[test]
    fn kernels_are_judged_by_what_their_distribution_put_in() {
        let (ubuntu, fedora) = (system("ubuntu"), system("fedora"));
        let state = |text: &str, s: &System| kernel(Some(text.into()), s, true).state;
        assert_eq!(state("6.18.4-200.fc43.x86_64", &fedora), State::Ok);
        assert_eq!(state("7.0.4-100.fc43.x86_64", &fedora), State::Ok);
        assert_eq!(state("6.18.3-200.fc43.x86_64", &fedora), State::Problem);
        assert_eq!(state("6.17.0-19-generic", &ubuntu), State::Ok);
        assert_eq!(state("6.17.0-14-generic", &ubuntu), State::Problem);
        assert_eq!(state("6.14.0-1018-oem", &ubuntu), State::Ok);
        assert_eq!(state("6.14.0-1017-oem", &ubuntu), State::Problem);
        assert_eq!(state("6.17.0-1005-oem", &ubuntu), State::Unknown);
        assert_eq!(state("6.17.0-19-generic", &fedora), State::Problem);
        assert_eq!(state("6.8.0-60-generic", &ubuntu), State::Problem);
        assert_eq!(state("6.19-rc1", &fedora), State::Ok);
        for bad in ["", "x", "6", "6.x.1", "-1.2.3", "99999999999.1.1", "\u{0}"] {
            assert_eq!(state(bad, &fedora), State::Unknown, "{bad:?}");
        }
        assert_eq!(kernel(Some("5.10.0".into()), &fedora, false).state, State::Unknown);
    }

    #[test]
    fn the_bad_firmware_is_known_by_either_number() {
        let fedora = system("fedora");
        let state = |scheduler, release| firmware(scheduler, release, &fedora).state;
        assert_eq!(state(Some(0x83), None), State::Problem);
        assert_eq!(state(Some(0x80), Some(20251125)), State::Problem);
        assert_eq!(state(Some(0x80), Some(20260110)), State::Ok);
        assert_eq!(state(None, None), State::Unknown);
        assert_eq!(release_date("1:20251125-1~bpo13+1"), Some(20251125));
        assert_eq!(release_date("20240318.git3b128b60-0ubuntu2.19"), Some(20240318));
        assert_eq!(release_date("linux-firmware-amdgpu-20260110-1"), Some(20260110));
        assert_eq!((release_date("1.2.3"), release_date("99999999"), release_date("")), (None, None, None));
    }
}
