//! Main memory: how much, whether some was moved to the disk, and whether it comes in large pages.
use super::finding::{Check, Finding, State};
use super::root::Root;
use crate::view;

/// Swapped memory that is no matter, in bytes: systems move what nobody has touched for days.
const SWAPPED_BYTES_OK: u64 = 64 << 20;
/// Share of memory below which little is left for stages, in hundredths.
const AVAILABLE_SHARE_MIN: u64 = 20;

const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const LARGE_PAGES: &str = "https://docs.kernel.org/admin-guide/mm/transhuge.html";
const MEMINFO: &str = "https://docs.kernel.org/filesystems/proc.html";

/// What `/proc/meminfo` tells, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All that the system manages: without what the BIOS took for graphics.
    pub total: Option<u64>,
    /// What programs can have without swapping.
    pub available: Option<u64>,
    swap_total: Option<u64>,
    swap_free: Option<u64>,
}

impl Memory {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        Self::parse(&root.text("/proc/meminfo").unwrap_or_default())
    }

    fn parse(meminfo: &str) -> Self {
        let bytes = |name: &str| {
            let value = meminfo.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
            value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
        };
        Self {
            total: bytes("MemTotal"),
            available: bytes("MemAvailable"),
            swap_total: bytes("SwapTotal"),
            swap_free: bytes("SwapFree"),
        }
    }

    fn memory(&self) -> Finding {
        let (Some(total), Some(available)) = (self.total, self.available) else {
            return Finding::unknown(Check::Memory, "the system does not say how much memory there is").source(MEMINFO);
        };
        let found = format!("{}, {} available", view::bytes(total), view::bytes(available));
        if available / AVAILABLE_SHARE_MIN < total / 100 {
            return Finding::new(Check::Memory, State::Warning, found)
                .why(
                    "Little is left for stages. That is as it should be while a large model is loaded; else see \
                    what takes it.",
                )
                .mend(["ps -eo rss,comm --sort=-rss | head"])
                .source(MEMINFO);
        }
        Finding::ok(Check::Memory, found).source(MEMINFO)
    }

    fn swap(&self) -> Finding {
        let (Some(total), Some(free)) = (self.swap_total, self.swap_free) else {
            return Finding::unknown(Check::Swap, "the system does not say what it has swapped").source(MEMINFO);
        };
        let used = total.saturating_sub(free);
        if used <= SWAPPED_BYTES_OK {
            let found = if total == 0 { "there is none".into() } else { format!("{} used", view::bytes(used)) };
            return Finding::ok(Check::Swap, found).source(MEMINFO);
        }
        // Emptying it needs room for what comes back.
        let fits = self.available.is_some_and(|available| available / 2 > used);
        Finding::new(Check::Swap, State::Warning, format!("{} of memory are on the disk", view::bytes(used)))
            .why("A stage whose weights or cache were moved to the disk waits for it.")
            .mend(fits.then_some("sudo swapoff -a && sudo swapon -a"))
            .source(MEMINFO)
    }
}

/// Whether large pages may be had; Capstan asks for them where it keeps caches.
fn large_pages(setting: Option<String>) -> Finding {
    let chosen = setting.as_deref().and_then(|s| s.split_once('[')?.1.split_once(']')).map(|(chosen, _)| chosen);
    match chosen {
        Some(chosen @ ("always" | "madvise")) => Finding::ok(Check::LargePages, chosen).source(LARGE_PAGES),
        Some("never") => Finding::new(Check::LargePages, State::Warning, "never")
            .why("Caches of gigabytes come in pages of 4 KiB, which takes longer to prepare and to look up.")
            .mend([format!("echo madvise | sudo tee {TRANSPARENT}")])
            .source(LARGE_PAGES),
        _ => Finding::unknown(Check::LargePages, "the system does not say whether there are large pages")
            .source(LARGE_PAGES),
    }
}

/// All findings about memory.
pub fn findings(root: &Root, memory: &Memory) -> Vec<Finding> {
    vec![memory.memory(), memory.swap(), large_pages(root.text(TRANSPARENT))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_and_nonsense_is_not_known() {
        let m = Memory::parse("MemTotal:  131072 kB\nMemAvailable: 65536 kB\nSwapTotal: 4194304 kB\nSwapFree: 0 kB");
        assert_eq!((m.total, m.available), (Some(128 << 20), Some(64 << 20)));
        assert_eq!((m.memory().state, m.swap().state), (State::Ok, State::Warning));
        assert!(m.swap().mend.is_empty(), "4 GiB do not fit into 64 MiB");
        for bad in [
            "",
            "MemTotal: -1 kB",
            "MemTotal: 99999999999999999999 kB",
            "MemTotal: 18446744073709551615 kB",
            "MemTotal",
        ] {
            assert_eq!(Memory::parse(bad).total, None, "{bad}");
            assert_eq!(Memory::parse(bad).memory().state, State::Unknown);
        }
    }

    #[test]
    fn large_pages_are_wanted() {
        let state = |s: &str| large_pages(Some(s.into())).state;
        assert_eq!(state("always [madvise] never"), State::Ok);
        assert_eq!(state("always madvise [never]"), State::Warning);
        assert_eq!((state("]["), large_pages(None).state), (State::Unknown, State::Unknown));
    }
}
