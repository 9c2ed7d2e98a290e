//! What a check found: its state, the reason, and the commands that mend it; for people and for programs.
use clap::ValueEnum;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::view;

/// Longest text of a finding, in characters: what a hostile file says must not fill the screen.
const FOUND_CHARS_MAX: usize = 400;
/// Columns of a reason: with its indent it fits a window of 100. Commands are never broken, for they are copied.
const WHY_COLUMNS: usize = 79;

/// Every check, in the order of the report. Each makes at least one finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Which processor this is.
    Processor,
    /// What a container or service may use of it.
    Limits,
    /// What chooses the processor's clock.
    Governor,
    /// How high the clock may go.
    ProcessorClock,
    /// The firmware's power profile, and mains or battery.
    Power,
    /// Main memory.
    Memory,
    /// Memory that was moved to the disk.
    Swap,
    /// Whether programs may have large pages.
    LargePages,
    /// Which graphics units are here.
    Graphics,
    /// What the BIOS takes of main memory for graphics.
    CarveOut,
    /// What a unit that shares main memory may use of it.
    GraphicsMemory,
    /// Whether memory accesses of devices are translated.
    Iommu,
    /// Whether this user may compute on the graphics units.
    GraphicsAccess,
    /// The kernel's version.
    Kernel,
    /// The version of the graphics unit's firmware.
    Firmware,
    /// What this build of capstan can compute on.
    Backends,
    /// Speed and duplex of network cards.
    Link,
    /// Largest packet of network cards.
    Mtu,
    /// Packets that network cards lost.
    LinkErrors,
    /// What the data folder lies on.
    Disk,
    /// How much room it has.
    DiskSpace,
    /// How fast it is.
    DiskSpeed,
    /// Whether the clock is set by a time server.
    TimeSync,
    /// What the kernel reads the time from.
    ClockSource,
    /// How far the clocks of the cluster's nodes are apart.
    ClockSkew,
    /// Whether multicast DNS gets through.
    Mdns,
    /// Whether a firewall is on.
    Firewall,
    /// The port of the HTTP API.
    ApiPort,
    /// The UDP port that other nodes dial.
    NodePort,
}

impl Check {
    /// The heading under which people find it.
    pub fn area(self) -> &'static str {
        match self {
            Self::Processor | Self::Limits | Self::Governor | Self::ProcessorClock | Self::Power => "Processor",
            Self::Memory | Self::Swap | Self::LargePages => "Memory",
            Self::Graphics | Self::CarveOut | Self::GraphicsMemory | Self::Iommu | Self::GraphicsAccess => "Graphics",
            Self::Kernel | Self::Firmware | Self::Backends => "Software",
            Self::Link | Self::Mtu | Self::LinkErrors | Self::Mdns | Self::Firewall => "Network",
            Self::Disk | Self::DiskSpace | Self::DiskSpeed => "Disk",
            Self::TimeSync | Self::ClockSource | Self::ClockSkew => "Clock",
            Self::ApiPort | Self::NodePort => "Ports",
        }
    }

    /// Its name on the command line and in the report.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// It costs some speed, or may do so.
    Warning,
    /// It holds the machine back.
    Problem,
    /// Not known, or not known for this hardware.
    Unknown,
}

impl State {
    fn mark(self) -> char {
        match self {
            Self::Ok => '✓',
            Self::Warning => '!',
            Self::Problem => '✗',
            Self::Unknown => '?',
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub check: Check,
    /// How it stands.
    pub state: State,
    /// What was found.
    pub found: String,
    /// Why that matters; empty where nothing needs to be said.
    pub why: String,
    /// The commands that mend it, in order. Nothing runs them but the user.
    pub mend: Vec<String>,
    /// Where the judgement is from; empty where it is plain.
    pub source: String,
}

impl Finding {
    /// A finding without reason, commands and source yet.
    pub fn new(check: Check, state: State, found: impl Into<String>) -> Self {
        let found = found.into().chars().take(FOUND_CHARS_MAX).collect();
        Self { check, state, found, why: String::new(), mend: vec![], source: String::new() }
    }

    /// A thing as it should be.
    pub fn ok(check: Check, found: impl Into<String>) -> Self {
        Self::new(check, State::Ok, found)
    }

    /// A thing that is not known.
    pub fn unknown(check: Check, found: impl Into<String>) -> Self {
        Self::new(check, State::Unknown, found)
    }

    /// Adds why it matters.
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    /// Adds the commands that mend it.
    pub fn mend<S: Into<String>>(mut self, commands: impl IntoIterator<Item = S>) -> Self {
        self.mend = commands.into_iter().map(Into::into).collect();
        self
    }

    /// Adds where the judgement is from.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = source.into();
        self
    }
}

/// How many findings have a state.
pub fn count(findings: &[Finding], state: State) -> usize {
    findings.iter().filter(|f| f.state == state).count()
}

/// The report for people: areas, a mark for each finding, and the commands under what needs mending.
pub fn render(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.check.name().len()).max().unwrap_or(0);
    let mut areas: Vec<&str> = vec![];
    for finding in findings {
        if !areas.contains(&finding.check.area()) {
            areas.push(finding.check.area());
        }
    }
    let mut parts: Vec<String> = areas
        .into_iter()
        .map(|area| {
            let lines = findings.iter().filter(|f| f.check.area() == area).map(|f| lines(f, width));
            format!("{area}\n{}", lines.collect::<Vec<_>>().join("\n"))
        })
        .collect();
    parts.push(summary(findings));
    parts.join("\n\n")
}

fn lines(finding: &Finding, width: usize) -> String {
    let name = finding.check.name();
    let mut text = format!("  {} {name:width$}  {}", finding.state.mark(), view::plain(&finding.found));
    if finding.state == State::Ok {
        return text;
    }
    let indent = " ".repeat(width + 6);
    for line in wrap(&view::plain(&finding.why), WHY_COLUMNS) {
        text.push_str(&format!("\n{indent}{line}"));
    }
    for command in &finding.mend {
        text.push_str(&format!("\n{indent}$ {}", view::plain(command)));
    }
    text
}

/// A text in lines of at most so many columns; a longer word has a line of its own.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.width() + 1 + word.width() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn summary(findings: &[Finding]) -> String {
    let things =
        |n: usize, one: &str, more: &str| if n == 1 { format!("1 thing {one}") } else { format!("{n} things {more}") };
    let mut sentence = match count(findings, State::Problem) {
        0 => "Nothing that is known here holds this machine back".to_owned(),
        n => things(n, "holds this machine back", "hold this machine back"),
    };
    if let n @ 1.. = count(findings, State::Warning) {
        sentence.push_str(&format!("; {}", things(n, "could be better", "could be better")));
    }
    if let n @ 1.. = count(findings, State::Unknown) {
        sentence.push_str(&format!("; {}", things(n, "is not known", "are not known")));
    }
    format!("{sentence}. docs/hardware.md has the facts and their sources.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_the_commands_of_what_needs_mending_and_a_sum() {
        let findings = [
            Finding::ok(Check::Processor, "a processor").why("not shown"),
            Finding::new(Check::Governor, State::Problem, "powersave\u{1b}[2J").why("slow").mend(["sudo x"]),
            Finding::unknown(Check::Memory, "not readable"),
        ];
        let text = render(&findings);
        assert!(text.contains("✓ processor  a processor\n"), "{text}");
        assert!(text.contains("✗ governor   powersave\u{FFFD}[2J\n") && text.contains("$ sudo x"), "{text}");
        assert!(text.contains("1 thing holds this machine back; 1 thing is not known."), "{text}");
        assert!(!text.contains("not shown"));
    }

    #[test]
    fn reasons_are_wrapped_between_words() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!((wrap("", 7), wrap("longer-than-that x", 7)), (vec![], vec!["longer-than-that".into(), "x".into()]));
    }

    #[test]
    fn every_check_has_a_name_of_its_own() {
        let mut names: Vec<String> = Check::value_variants().iter().map(|c| c.name()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Check::value_variants().len());
        assert_eq!(serde_json::to_value(Check::GraphicsMemory).unwrap(), Check::GraphicsMemory.name());
    }
}
