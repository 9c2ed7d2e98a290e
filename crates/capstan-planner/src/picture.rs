//! An answer as a table for a terminal and as a picture of layers on machines.
use std::fmt::Write;

use crate::answer::Answer;
use crate::forecast::Forecast;
use crate::human_bytes;

/// Width of the picture and of the part of it that shows layers.
const WIDTH: f64 = 960.0;
const BAR: f64 = 560.0;
/// Height of a machine's row.
const ROW: f64 = 44.0;
/// Colours of weights, KV cache, compute buffers.
const COLOURS: [&str; 3] = ["#2b6cb0", "#dd6b20", "#718096"];

/// A table for people.
pub fn table(answer: &Answer) -> String {
    let mut out = format!("{}\n\n", answer.model);
    let name = answer.forecast.memory.iter().map(|m| m.machine.chars().count()).max().unwrap_or(0).max(7);
    let _ = writeln!(
        out,
        "{:<name$}  {:>9}  {:>10}  {:>10}  {:>10}  {:>10}",
        "machine", "layers", "weights", "KV cache", "needs", "may use"
    );
    for m in &answer.forecast.memory {
        let needs = m.weight_bytes + m.kv_bytes + m.compute_bytes;
        let [weights, kv, needs, usable] = [m.weight_bytes, m.kv_bytes, needs, m.usable_bytes].map(human_bytes);
        let _ =
            writeln!(out, "{:<name$}  {:>9}  {weights:>10}  {kv:>10}  {needs:>10}  {usable:>10}", m.machine, m.layers);
    }
    for (title, forecast) in
        [("Capstan", &answer.forecast), ("llama.cpp RPC, same machines and layers", &answer.plain_rpc)]
    {
        let _ = writeln!(out, "\n{title}");
        speeds(&mut out, forecast);
    }
    let _ = writeln!(out);
    for line in &answer.explanation {
        let _ = writeln!(out, "{line}");
    }
    out
}

fn speeds(out: &mut String, f: &Forecast) {
    for t in &f.first_token {
        let _ = writeln!(
            out,
            "  prompt of {:>6}: {:>7.1} s to the first token ({:.0} tok/s)",
            t.prompt_tokens, t.seconds, t.tokens_per_s
        );
    }
    for d in &f.decode {
        let each = d.tokens_per_s / f64::from(d.sequences);
        let _ = writeln!(
            out,
            "  {:>2} at depth {:>6}: {:>7.1} tok/s ({each:.1} each)",
            d.sequences, d.depth_tokens, d.tokens_per_s
        );
    }
    let _ = writeln!(
        out,
        "  loads in {:.0} s the first time, then in {:.0} s; {} bytes on the wire a token",
        f.first_load_s, f.load_s, f.wire_bytes_per_token
    );
}

/// A picture of the memory of each machine and the layers in it, as SVG.
pub fn svg(answer: &Answer) -> String {
    let rows = answer.forecast.memory.len() as f64;
    let height = 96.0 + rows * ROW;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"28\" font-size=\"16\">{}</text>\n",
        escaped(&answer.model)
    );
    let most = answer.forecast.memory.iter().map(|m| m.usable_bytes).max().unwrap_or(1).max(1) as f64;
    for (i, m) in answer.forecast.memory.iter().enumerate() {
        let (y, left) = (48.0 + i as f64 * ROW, 240.0);
        let wide = |bytes: u64| bytes as f64 / most * BAR;
        let _ = writeln!(out, "<text x=\"16\" y=\"{:.0}\">{}</text>", y + 20.0, escaped(&m.machine));
        let mut x = left;
        for (bytes, colour) in [m.weight_bytes, m.kv_bytes, m.compute_bytes].into_iter().zip(COLOURS) {
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"30\" fill=\"{colour}\"/>",
                wide(bytes)
            );
            x += wide(bytes);
        }
        let _ = writeln!(
            out,
            "<rect x=\"{left:.1}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"30\" fill=\"none\" stroke=\"#1a202c\"/>",
            wide(m.usable_bytes)
        );
        let _ = writeln!(out, "<text x=\"{:.1}\" y=\"{:.0}\" fill=\"white\">{}</text>", left + 8.0, y + 20.0, m.layers);
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.0}\">{}</text>",
            left + BAR + 12.0,
            y + 20.0,
            human_bytes(m.usable_bytes)
        );
    }
    let speed = answer.forecast.decode.first().map(|d| format!("{:.1} tok/s", d.tokens_per_s)).unwrap_or_default();
    let _ = writeln!(
        out,
        "<text x=\"16\" y=\"{:.0}\">{speed} for one sequence; bars are weights, KV cache, compute buffers within what may be used</text>\n</svg>",
        height - 16.0
    );
    out
}

/// Text within XML. Names come from files that people write.
fn escaped(text: &str) -> String {
    let one = |c: char| match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        c if c.is_control() => String::new(),
        c => c.to_string(),
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use crate::links::{self, Links};
    use crate::{Machine, Objective, Question, Subject, answer, machines, models};

    #[test]
    fn every_machine_is_in_the_table_and_in_the_picture() {
        let (model, quantisation) = models::find("gpt-oss-120b").unwrap();
        let subject = Subject::known(model, quantisation);
        let mut machines = machines::parse("2x\"Ryzen AI Max+ 395 64GB\"").unwrap();
        machines[1] = Machine { name: "<b>\"tower\"&".into(), ..machines[1].clone() };
        let links = Links::all(links::parse("5GbE").unwrap());
        let question = Question {
            subject: &subject,
            machines: &machines,
            links: &links,
            ctx: 8192,
            slots: 4,
            ubatch: 512,
            headroom_bytes: 0,
            objective: Objective::Throughput,
        };
        let answer = answer(&question).unwrap();
        let (table, svg) = (super::table(&answer), super::svg(&answer));
        assert_eq!(answer.stages.len(), 2);
        for m in &answer.forecast.memory {
            assert!(table.contains(&m.machine) && svg.contains(&m.layers), "{table}");
        }
        assert!(svg.contains("&lt;b&gt;&quot;tower&quot;&amp;") && !svg.contains("<b>"));
        assert_eq!(svg.matches("<rect").count(), 1 + 2 * 4);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }
}
