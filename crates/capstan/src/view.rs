//! Tables, sizes and sentences for people, and printing that survives a closed pipe.
use std::io::Write;

use anyhow::Result;
use unicode_width::UnicodeWidthStr;

/// What an error's line on standard error starts with.
pub const ERROR_PREFIX: &str = "error: ";

/// Prints text and a line break to standard output. A closed pipe is an error that `main` takes as a quiet end.
pub fn print_line(text: impl AsRef<str>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_ref().as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()?;
    Ok(())
}

/// Prints a value as indented JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print_line(serde_json::to_string_pretty(value)?)
}

/// Whether an error only says that nobody reads our output any more, as after `capstan status | head -1`.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

/// A size in binary units, such as `35.2 MiB`.
pub fn bytes(n: u64) -> String {
    bytesize::ByteSize(n).display().iec().to_string()
}

/// A round trip in milliseconds or microseconds.
pub fn micros(us: u64) -> String {
    if us >= 1000 { format!("{:.1} ms", us as f64 / 1000.0) } else { format!("{us} µs") }
}

/// A span of time in the largest whole unit.
pub fn seconds(s: u64) -> String {
    let plural = |n: u64, unit: &str| format!("{n} {unit}{}", if n == 1 { "" } else { "s" });
    match s {
        s if s >= 86_400 && s.is_multiple_of(86_400) => plural(s / 86_400, "day"),
        s if s >= 3600 && s.is_multiple_of(3600) => plural(s / 3600, "hour"),
        s if s >= 60 && s.is_multiple_of(60) => plural(s / 60, "minute"),
        s => plural(s, "second"),
    }
}

/// A time in seconds since 1970 as a day (UTC), such as `2026-11-23`.
pub fn date(unix_s: u64) -> String {
    let time = i64::try_from(unix_s).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    time.map_or("?".into(), |t| t.strftime("%Y-%m-%d").to_string())
}

/// Text from elsewhere, safe to print: control characters, with which a name could steer the terminal, are replaced.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

/// Like [`plain`], but line breaks and tabs stay: for text of more than one line.
pub fn plain_text(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{FFFD}' } else { c }).collect()
}

/// A table whose columns are as wide as their widest cell.
pub struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [usize],
}

impl Table {
    /// A table with this heading; the columns in `right` are aligned to the right.
    pub fn new(heading: &[&str], right: &'static [usize]) -> Self {
        Self { rows: vec![heading.iter().map(|s| s.to_string()).collect()], right }
    }

    /// Adds a row. Cells are made [`plain`].
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|c| plain(c)).collect());
    }

    /// The table's lines, each after `indent`.
    pub fn render(&self, indent: &str) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.width()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().enumerate().map(|(c, cell)| {
                let pad = " ".repeat(widths[c].saturating_sub(cell.width()));
                if self.right.contains(&c) { format!("{pad}{cell}") } else { format!("{cell}{pad}") }
            });
            format!("{indent}{}", cells.collect::<Vec<_>>().join("  ").trim_end())
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_vanish() {
        let mut t = Table::new(&["name", "size"], &[1]);
        t.row(vec!["日本".into(), "7".into()]);
        t.row(vec!["a\u{1b}[2J".into(), "1234".into()]);
        assert_eq!(t.render("  "), "  name   size\n  日本      7\n  a\u{FFFD}[2J  1234");
    }

    #[test]
    fn spans_of_time_read_well() {
        assert_eq!(
            (seconds(3600), seconds(7200), seconds(90)),
            ("1 hour".into(), "2 hours".into(), "90 seconds".into())
        );
        assert_eq!(
            (date(0), date(1_795_392_000), date(u64::MAX)),
            ("1970-01-01".into(), "2026-11-23".into(), "?".into())
        );
        assert_eq!((micros(85), micros(1500)), ("85 µs".into(), "1.5 ms".into()));
    }
}
