//! What a scenario found: one number, what it is measured against, and whether that is enough.
use serde::Serialize;

/// What is asked of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
    /// Less.
    Below(f64),
}

impl Wanted {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(limit) => value >= limit,
            Self::AtMost(limit) => value <= limit,
            Self::Below(limit) => value < limit,
        }
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, ">= {limit:.2}"),
            Self::AtMost(limit) => write!(f, "<= {limit:.2}"),
            Self::Below(limit) => write!(f, "< {limit:.2}"),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The scenario it belongs to.
    pub scenario: &'static str,
    /// Stages of its pipeline.
    pub stages: u16,
    /// Which of the scenario's cases.
    pub case: String,
    /// What was measured.
    pub what: &'static str,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// The best possible.
    pub bound: Option<f64>,
    /// What is judged: the share of the bound that was reached, or a ratio of two runs.
    pub ratio: Option<f64>,
    /// Useful stage time over available stage time.
    pub busy: Option<f64>,
    /// What is asked of the ratio, or of the value where there is none.
    pub wanted: Option<Wanted>,
    /// Whether it is enough.
    pub ok: bool,
    /// Replays it.
    pub seed: u64,
    /// What happened, where that was asked for.
    #[serde(skip)]
    pub events: Vec<String>,
}

impl Figure {
    /// A number that nothing is asked of.
    pub fn new(scenario: &'static str, stages: usize, case: impl Into<String>, seed: u64) -> Self {
        Self {
            scenario,
            stages: stages as u16,
            case: case.into(),
            what: "",
            value: 0.0,
            unit: "",
            bound: None,
            ratio: None,
            busy: None,
            wanted: None,
            ok: true,
            seed,
            events: Vec::new(),
        }
    }

    /// Sets what was measured.
    pub fn value(mut self, what: &'static str, value: f64, unit: &'static str) -> Self {
        (self.what, self.value, self.unit) = (what, value, unit);
        self
    }

    /// Sets the best possible, and so the share that was reached; of times the shorter is the better.
    pub fn against(mut self, bound: f64, shorter_is_better: bool) -> Self {
        self.bound = Some(bound);
        let ratio = if shorter_is_better { bound / self.value } else { self.value / bound };
        self.ratio(ratio)
    }

    /// Sets what is judged.
    pub fn ratio(mut self, ratio: f64) -> Self {
        self.ratio = Some(ratio);
        self
    }

    /// Sets the useful share of the stages' time.
    pub fn busy(mut self, share: f64) -> Self {
        self.busy = Some(share);
        self
    }

    /// Judges.
    pub fn wanted(mut self, wanted: Wanted) -> Self {
        self.wanted = Some(wanted);
        self.ok = wanted.holds(self.ratio.unwrap_or(self.value));
        self
    }
}

/// The table, for people.
pub fn table(figures: &[Figure]) -> String {
    let head = ["scenario", "S", "case", "figure", "", "bound", "ratio", "busy", "wanted", ""].map(String::from);
    let number = |x: f64| match x.abs() {
        x if x >= 1000.0 => format!("{x:.0}"),
        x if x >= 100.0 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    };
    let share = |x: Option<f64>| x.map_or(String::new(), |x| format!("{x:.3}"));
    let line = |f: &Figure| {
        [
            f.scenario.to_string(),
            f.stages.to_string(),
            f.case.clone(),
            f.what.to_string(),
            format!("{} {}", number(f.value), f.unit),
            f.bound.map_or(String::new(), number),
            share(f.ratio),
            share(f.busy),
            f.wanted.map_or(String::new(), |w| w.to_string()),
            match (f.wanted, f.ok) {
                (None, _) => String::new(),
                (_, true) => "ok".into(),
                (_, false) => "MISSED".into(),
            },
        ]
    };
    let lines: Vec<[String; 10]> = std::iter::once(head).chain(figures.iter().map(line)).collect();
    let mut widths = [0; 10];
    for line in &lines {
        line.iter().zip(&mut widths).for_each(|(cell, width)| *width = cell.chars().count().max(*width));
    }
    let row = |line: &[String; 10]| {
        let cells = line.iter().zip(widths).enumerate().map(|(i, (cell, width))| match i {
            1 | 4..=7 => format!("{cell:>width$}"),
            _ => format!("{cell:<width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    lines.iter().map(|line| row(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_judged_by_its_ratio() {
        let figure = Figure::new("x", 2, "", 0).value("time", 110.0, "ms").against(100.0, true);
        assert!(figure.clone().wanted(Wanted::AtLeast(0.9)).ok);
        assert!(!figure.wanted(Wanted::AtLeast(0.95)).ok);
        assert!(!Figure::new("x", 2, "", 0).value("n", 2.0, "").wanted(Wanted::Below(2.0)).ok);
    }

    #[test]
    fn columns_line_up() {
        let figures = ["a", "a longer case"].map(|case| Figure::new("x", 2, case, 0).value("n", 1.0, "ms"));
        let table = table(&figures);
        let at: Vec<_> = table.lines().skip(1).map(|l| l.find("1.00 ms")).collect();
        assert!(at[0].is_some() && at[0] == at[1], "{table}");
    }
}
