//! An answer as a picture of layers on machines.
use std::fmt::Write;

use capstan_proto::LayerRange;

use crate::answer::Answer;
use crate::human_bytes;

/// Width of the picture, of names at its left, and of the part of it that shows layers and memory.
const WIDTH: f64 = 1020.0;
const LEFT: f64 = 280.0;
const BAR: f64 = 560.0;
/// Heights of the strip of layers and of a machine's row.
const STRIP: f64 = 28.0;
const ROW: f64 = 44.0;
/// Where the rows begin.
const TOP: f64 = 112.0;
/// Colours of weights, KV cache, compute buffers.
const COLOURS: [&str; 3] = ["#2b6cb0", "#dd6b20", "#718096"];
/// Colours of neighbouring stages in the strip.
const STRIPES: [&str; 2] = ["#2c5282", "#4299e1"];
/// Narrowest part of the strip that has room for its number.
const NUMBER_WIDTH: f64 = 18.0;

/// A picture as SVG: a strip of all layers, divided into stages, and under it the memory of each machine with the layers
/// that it holds.
pub fn svg(answer: &Answer) -> String {
    let memory = &answer.forecast.memory;
    let height = TOP + 36.0 + memory.len() as f64 * ROW;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    out.push_str("<g font-size=\"16\">\n");
    text(&mut out, (16.0, 28.0), "#000", &answer.model);
    out.push_str("</g>\n");
    strip(&mut out, answer);
    let most = memory.iter().map(|m| m.usable_bytes).max().unwrap_or(1).max(1) as f64;
    for (i, m) in memory.iter().enumerate() {
        let y = TOP + i as f64 * ROW;
        let wide = |bytes: u64| bytes as f64 / most * BAR;
        text(&mut out, (16.0, y + 20.0), "#000", &format!("{}. {}", i + 1, m.machine));
        let mut x = LEFT;
        for (bytes, colour) in [m.weight_bytes, m.kv_bytes, m.compute_bytes].into_iter().zip(COLOURS) {
            rect(&mut out, (x, y), (wide(bytes), 30.0), &format!("fill=\"{colour}\""));
            x += wide(bytes);
        }
        rect(&mut out, (LEFT, y), (wide(m.usable_bytes), 30.0), "fill=\"none\" stroke=\"#1a202c\"");
        text(&mut out, (LEFT + 8.0, y + 20.0), "white", &m.layers);
        let needs = m.weight_bytes + m.kv_bytes + m.compute_bytes;
        let room = format!("{} of {}", human_bytes(needs), human_bytes(m.usable_bytes));
        text(&mut out, (LEFT + BAR + 8.0, y + 20.0), "#000", &room);
    }
    let speed = answer.forecast.decode.first().map(|d| format!("{:.1} tok/s", d.tokens_per_s)).unwrap_or_default();
    let legend =
        format!("{speed} for one sequence; bars are weights, KV cache and compute buffers within what may be used");
    text(&mut out, (16.0, height - 16.0), "#000", &legend);
    out.push_str("</svg>\n");
    out
}

/// All layers in a row, a stage as wide as it has layers.
fn strip(out: &mut String, answer: &Answer) {
    let counts: Vec<f64> = answer.stages.iter().map(|(_, layers)| count(layers)).collect();
    let all = counts.iter().sum::<f64>().max(1.0);
    text(out, (16.0, 68.0), "#000", &format!("{all:.0} layers"));
    let mut x = LEFT;
    for (i, layers) in counts.iter().enumerate() {
        let wide = layers / all * BAR;
        rect(out, (x, 50.0), (wide, STRIP), &format!("fill=\"{}\" stroke=\"white\"", STRIPES[i % STRIPES.len()]));
        if wide >= NUMBER_WIDTH {
            text(out, (x + 6.0, 68.0), "white", &(i + 1).to_string());
        }
        x += wide;
    }
}

fn count(layers: &str) -> f64 {
    layers.parse::<LayerRange>().map_or(0.0, |r| f64::from(r.count()))
}

fn rect(out: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), how: &str) {
    let _ = writeln!(out, "<rect x=\"{x:.1}\" y=\"{y:.0}\" width=\"{width:.1}\" height=\"{height:.0}\" {how}/>");
}

fn text(out: &mut String, (x, y): (f64, f64), fill: &str, text: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.0}\" fill=\"{fill}\">{}</text>", escaped(text));
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
    use crate::{Machine, Objective, Question, Subject, answer, machines, models, table};

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
            wishes: &[],
        };
        let answer = answer(&question).unwrap();
        let (table, svg) = (table::table(&answer), super::svg(&answer));
        assert_eq!(answer.stages.len(), 2);
        for m in &answer.forecast.memory {
            assert!(table.contains(&m.machine) && svg.contains(&m.layers), "{table}");
        }
        assert!(svg.contains("&lt;b&gt;&quot;tower&quot;&amp;") && !svg.contains("<b>"));
        assert_eq!(svg.matches("<rect").count(), 1 + 2 + 2 * 4);
        assert!(table.lines().all(|l| l.chars().count() <= table::WIDTH || l.contains("https://")), "{table}");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }
}
