//! An answer as tables and sentences for a terminal: without colours, aligned, at most a hundred columns wide.
use std::fmt::Write;

use crate::answer::{Answer, Choice, Target};
use crate::forecast::{self, Decode, FirstToken};
use crate::human_bytes;

/// Widest line.
pub const WIDTH: usize = 100;
/// Widest name of a machine; longer ones lose their middle.
const NAME_WIDTH: usize = 34;
/// The same for what another choice is.
const CHOICE_WIDTH: usize = 42;
/// How far a section's lines are indented.
const INDENT: &str = "  ";

/// All of an answer, for people.
pub fn table(answer: &Answer) -> String {
    let mut out = String::new();
    let stages = answer.stages.len();
    wrap(&mut out, "", &format!("{} fits on {}.", answer.model, machines(stages)));
    let slots = if answer.slots == 1 { "1 slot".to_owned() } else { format!("{} slots", answer.slots) };
    let asked = format!(
        "Planned for {slots} of {} tokens, objective {}, micro-batches of at most {} rows. At most {} tokens a slot or {} \
         slots would fit.",
        answer.ctx,
        answer.objective.name(),
        answer.ubatch,
        answer.ctx_max,
        answer.slots_max
    );
    wrap(&mut out, "", &asked);
    memory(&mut out, answer);
    work(&mut out, answer);
    first_token(&mut out, answer);
    decode(&mut out, answer);
    rest(&mut out, answer);
    sentences(&mut out, "Why", &answer.explanation);
    sentences(&mut out, "Not chosen", &answer.rejected);
    choices(&mut out, answer);
    sentences(&mut out, "Assumed", &forecast::assumptions());
    sentences(&mut out, "Sources of the model's numbers", &answer.sources);
    out
}

/// How many machines reach a wanted speed, for people.
pub fn targets(targets: &[Target], tokens_per_s: f64) -> String {
    let mut out = String::new();
    for t in targets {
        let of = if t.sequences == 1 { String::new() } else { format!(" of {} sequences together", t.sequences) };
        let most = match t.most {
            Some((n, speed)) => format!("the most is {speed:.1}, with {n}"),
            None => "no number of them holds the model".to_owned(),
        };
        let line = match t.enough {
            Some((n, speed)) => {
                format!("{tokens_per_s} tokens per second{of} take {n} of {}, which would reach {speed:.1}.", t.machine)
            }
            None => format!("No number of {} reaches {tokens_per_s} tokens per second{of}: {most}.", t.machine),
        };
        wrap(&mut out, "", &line);
    }
    out
}

fn machines(n: usize) -> String {
    if n == 1 { "1 machine".to_owned() } else { format!("{n} machines") }
}

fn memory(out: &mut String, answer: &Answer) {
    let mut rows = Rows::new(&["machine", "layers", "weights", "KV cache", "compute", "needs", "may use"], 1);
    for m in &answer.forecast.memory {
        let needs = m.weight_bytes + m.kv_bytes + m.compute_bytes;
        let sizes = [m.weight_bytes, m.kv_bytes, m.compute_bytes, needs, m.usable_bytes].map(human_bytes);
        rows.add([short(&m.machine, NAME_WIDTH), m.layers.clone()].into_iter().chain(sizes));
    }
    rows.print(out, "Placement, in pipeline order");
}

fn work(out: &mut String, answer: &Answer) {
    let Some(first) = answer.work.first() else { return };
    let mut rows = Rows::new(&["machine", "reads weights", "reads KV", "computes", "sends", "on the way"], 1);
    for w in &answer.work {
        rows.add([
            short(&w.machine, NAME_WIDTH),
            human_bytes(w.weight_bytes),
            human_bytes(w.kv_bytes),
            format!("{:.1} ms", w.compute_s * 1e3),
            small_bytes(w.sent_bytes),
            format!("{:.2} ms", w.hop_s * 1e3),
        ]);
    }
    let title = match first.rows {
        1 => "What each does for a token".to_owned(),
        n => format!("What each does for a token of {n} sequences each"),
    };
    rows.print(out, &title);
}

/// A size that may be less than a mebibyte.
fn small_bytes(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{:.1} KiB", bytes as f64 / 1024.0) } else { human_bytes(bytes) }
}

fn first_token(out: &mut String, answer: &Answer) {
    if answer.forecast.first_token.is_empty() {
        return;
    }
    let mut rows = Rows::new(&["prompt", "Capstan", "tok/s", "chunks of", "llama.cpp RPC", "tok/s"], 0);
    let beyond = |t: &FirstToken| t.prompt_tokens >= answer.ctx;
    for (ours, theirs) in answer.forecast.first_token.iter().zip(&answer.plain_rpc.first_token) {
        rows.add([
            format!("{}{}", ours.prompt_tokens, star(beyond(ours))),
            time(ours.seconds),
            format!("{:.0}", ours.tokens_per_s),
            format!("{} rows", ours.chunk_rows),
            time(theirs.seconds),
            format!("{:.0}", theirs.tokens_per_s),
        ]);
    }
    rows.print(out, "Time to the first token, by tokens of the prompt");
    footnote(out, answer, answer.forecast.first_token.iter().any(beyond));
}

fn decode(out: &mut String, answer: &Answer) {
    if answer.forecast.decode.is_empty() {
        return;
    }
    let mut rows = Rows::new(&["sequences", "at depth", "Capstan", "each", "groups", "llama.cpp RPC", "each"], 0);
    let beyond = |d: &Decode| d.depth_tokens >= u64::from(answer.ctx);
    for (ours, theirs) in answer.forecast.decode.iter().zip(&answer.plain_rpc.decode) {
        rows.add([
            ours.sequences.to_string(),
            format!("{}{}", ours.depth_tokens, star(beyond(ours))),
            format!("{:.1}", ours.tokens_per_s),
            format!("{:.1}", ours.tokens_per_s / f64::from(ours.sequences)),
            ours.groups.to_string(),
            format!("{:.1}", theirs.tokens_per_s),
            format!("{:.1}", theirs.tokens_per_s / f64::from(theirs.sequences)),
        ]);
    }
    rows.print(out, "Decode, tokens per second");
    footnote(out, answer, answer.forecast.decode.iter().any(beyond));
}

fn star(beyond: bool) -> &'static str {
    if beyond { "*" } else { " " }
}

fn footnote(out: &mut String, answer: &Answer, needed: bool) {
    if needed {
        wrap(
            out,
            INDENT,
            &format!("* beyond the {} tokens that were planned for; a larger context makes room", answer.ctx),
        );
    }
}

fn rest(out: &mut String, answer: &Answer) {
    let (ours, theirs) = (&answer.forecast, &answer.plain_rpc);
    let mut rows = Rows::new(&["", "Capstan", "llama.cpp RPC"], 1);
    rows.add(["loads the first time".to_owned(), time(ours.first_load_s), time(theirs.first_load_s)]);
    rows.add(["loads again".to_owned(), time(ours.load_s), time(theirs.load_s)]);
    let wire = [ours, theirs].map(|f| small_bytes(f.wire_bytes_per_token));
    rows.add(["on the wire for a token".to_owned()].into_iter().chain(wire));
    rows.print(out, "Loading and traffic");
}

fn choices(out: &mut String, answer: &Answer) {
    if answer.choices.is_empty() {
        return;
    }
    let mut rows = Rows::new(&["otherwise", "machines", "one sequence", "all slots", "prompt"], 1);
    for Choice { what, speeds, .. } in &answer.choices {
        let figures = match speeds {
            Some(s) => [
                s.machines.to_string(),
                format!("{:.1} tok/s", s.alone_tokens_per_s),
                format!("{:.1} tok/s", s.all_tokens_per_s),
                format!("{:.0} tok/s", s.prompt_tokens_per_s),
            ],
            None => ["does not fit", "-", "-", "-"].map(str::to_owned),
        };
        rows.add([short(what, CHOICE_WIDTH)].into_iter().chain(figures));
    }
    rows.print(out, "What another choice would cost or bring");
}

fn sentences(out: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}");
    for line in lines {
        wrap(out, INDENT, line);
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s < 0.0995 => format!("{:.0} ms", s * 1e3),
        s if s < 99.95 => format!("{s:.1} s"),
        s => format!("{:.0} min {:02.0} s", (s.round() / 60.0).floor(), s.round() % 60.0),
    }
}

/// Text that is not too wide: its beginning and its end.
fn short(text: &str, most: usize) -> String {
    let chars: Vec<char> = text.chars().filter(|c| !c.is_control()).collect();
    if chars.len() <= most {
        return chars.into_iter().collect();
    }
    let (head, tail) = (most * 2 / 3, most - most * 2 / 3 - 1);
    chars[..head].iter().chain(&['…']).chain(&chars[chars.len() - tail..]).collect()
}

/// A paragraph, broken between words; a word that is too wide stays whole.
pub fn wrap(out: &mut String, indent: &str, text: &str) {
    let mut line = indent.to_owned();
    let mut width = 0;
    for word in text.split_whitespace() {
        let wide = word.chars().count();
        if width > 0 && indent.chars().count() + width + 1 + wide > WIDTH {
            let _ = writeln!(out, "{line}");
            line = format!("{indent}{INDENT}");
            width = INDENT.len();
        } else if width > 0 {
            line.push(' ');
            width += 1;
        }
        line.push_str(word);
        width += wide;
    }
    let _ = writeln!(out, "{line}");
}

/// Rows of cells, of which the first columns are aligned to the left and the others to the right.
struct Rows {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Rows {
    fn new(heading: &[&str], left: usize) -> Self {
        Self { rows: vec![heading.iter().map(|h| (*h).to_owned()).collect()], left }
    }

    fn add(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn print(&self, out: &mut String, title: &str) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let _ = writeln!(out, "\n{title}");
        for row in &self.rows {
            let cell = |(c, text): (usize, &String)| match c < self.left {
                true => format!("{text:<width$}", width = widths[c]),
                false => format!("{text:>width$}", width = widths[c]),
            };
            let cells: Vec<_> = row.iter().enumerate().map(cell).collect();
            let _ = writeln!(out, "{INDENT}{}", cells.join("  ").trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_broken_between_words() {
        let mut out = String::new();
        wrap(&mut out, "  ", &"word ".repeat(60));
        assert!(out.lines().count() > 2 && out.lines().all(|l| l.chars().count() <= WIDTH), "{out}");
        assert_eq!(out.matches("word").count(), 60);
        let (mut long, url) = (String::new(), "x".repeat(150));
        wrap(&mut long, "", &format!("see {url} there"));
        assert!(long.contains(&url));
    }

    #[test]
    fn times_and_names_read_well() {
        assert_eq!((time(0.0123), time(12.34), time(239.6)), ("12 ms".into(), "12.3 s".into(), "4 min 00 s".into()));
        let name = short(&format!("{} (no. 12)", "n".repeat(100)), NAME_WIDTH);
        assert!(name.chars().count() == NAME_WIDTH && name.ends_with("(no. 12)"), "{name}");
    }
}
