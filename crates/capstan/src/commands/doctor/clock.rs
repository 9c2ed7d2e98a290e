//! The clock: whether a time server sets it, what the kernel reads it from, and how far other nodes' clocks are.
use super::finding::{Check, Finding, State};
use super::root::Root;
use crate::client::Client;

const SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
const TIMESYNCD: &str = "https://man7.org/linux/man-pages/man8/systemd-timesyncd.8.html";
const TIMEDATECTL: &str = "https://man7.org/linux/man-pages/man1/timedatectl.1.html";
const CLOCK_SOURCES: &str = "https://docs.redhat.com/en/documentation/red_hat_enterprise_linux_for_real_time/7/html/reference_guide/chap-timestamping";

/// What is known about time servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Synced {
    /// One has set the clock.
    Done,
    /// The kernel says that none has.
    Not,
    /// The system does not say.
    Unknown,
}

async fn sync(root: &Root) -> Synced {
    // timesyncd touches this file each time; timedatectl knows of any other program too.
    if root.exists("/run/systemd/timesync/synchronized") {
        return Synced::Done;
    }
    match root.ask("timedatectl", &["show", "-p", "NTPSynchronized", "--value"]).await.as_deref() {
        Some("yes") => Synced::Done,
        Some("no") => Synced::Not,
        _ => Synced::Unknown,
    }
}

fn judge_sync(sync: Synced) -> Finding {
    let check = Check::TimeSync;
    match sync {
        Synced::Done => Finding::ok(check, "a time server sets the clock").source(TIMESYNCD),
        Synced::Not => Finding::new(check, State::Warning, "no time server sets the clock")
            .why(
                "Tickets expire by the clock, and of two entries about a node the later one counts: nodes whose \
                clocks differ by minutes refuse each other's tickets.",
            )
            .mend(["sudo timedatectl set-ntp true"])
            .source(TIMEDATECTL),
        Synced::Unknown => {
            Finding::unknown(check, "the system does not say whether a time server sets the clock").source(TIMEDATECTL)
        }
    }
}

fn clock_source(source: Option<String>) -> Finding {
    let check = Check::ClockSource;
    match source.as_deref() {
        None => Finding::unknown(check, "the system does not say what it reads the time from").source(CLOCK_SOURCES),
        Some(slow @ ("hpet" | "acpi_pm" | "jiffies" | "refined-jiffies" | "pit")) => {
            Finding::new(check, State::Warning, slow)
                .why(
                    "Reading the time from it takes microseconds instead of nanoseconds, and each token reads it \
                    many times. The kernel falls back to it when it distrusts the processor's counter; its log says \
                    why.",
                )
                .mend(["sudo dmesg | grep -i -E 'clocksource|tsc'"])
                .source(CLOCK_SOURCES)
        }
        Some(source) => Finding::ok(check, source).source(CLOCK_SOURCES),
    }
}

/// How far the clocks of the cluster are apart: the daemon does not tell, so it is known only of a node that is alone.
async fn skew(client: Option<&Client>) -> Finding {
    let check = Check::ClockSkew;
    let Some(client) = client else {
        return Finding::unknown(check, "no daemon is running, so no other node is known");
    };
    match client.status().await {
        Ok(status) if status.nodes.len() < 2 => Finding::ok(check, "this node is alone in its cluster"),
        Ok(status) => Finding::unknown(
            check,
            format!("{} other nodes; they do not tell each other the time", status.nodes.len() - 1),
        )
        .why("Run `capstan doctor` on each: where a time server sets every clock, they are milliseconds apart."),
        Err(e) => Finding::unknown(check, format!("the daemon did not say which nodes there are ({e})")),
    }
}

/// All findings about the clock.
pub async fn findings(root: &Root, client: Option<&Client>) -> Vec<Finding> {
    vec![judge_sync(sync(root).await), clock_source(root.text(SOURCE)), skew(client).await]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_sources_are_told() {
        let state = |s: &str| clock_source(Some(s.into())).state;
        assert_eq!((state("tsc"), state("kvm-clock"), state("hpet")), (State::Ok, State::Ok, State::Warning));
        assert_eq!(clock_source(None).state, State::Unknown);
        assert_eq!(judge_sync(Synced::Not).mend, ["sudo timedatectl set-ntp true"]);
    }
}
