//! Names that people type: found in any spelling, and answered with the nearest ones when they are unknown.

/// How many similar names an error lists.
const NEAREST_MAX: usize = 3;

/// A name that is in no catalogue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no {kind} {name:?} in the catalogue; {}", hint(.nearest))]
pub struct Unknown {
    /// What it should name.
    pub kind: &'static str,
    /// What was asked for, shortened.
    pub name: String,
    /// What is most like it, the most alike first.
    pub nearest: Vec<String>,
}

fn hint(nearest: &[String]) -> String {
    format!("did you mean {}?", nearest.join(", "))
}

/// The error for an unknown name.
pub(crate) fn unknown(kind: &'static str, name: &str, all: &[&str]) -> Unknown {
    let name: String = name.trim().chars().take(80).collect();
    let asked = plain(&name);
    let likeness = |known: &str| {
        let known = plain(known);
        // What is a part of the other is more alike than any spelling.
        let part = !asked.is_empty() && (known.contains(&asked) || asked.contains(&known));
        strsim::jaro_winkler(&known, &asked) + if part { 1.0 } else { 0.0 }
    };
    let mut ranked: Vec<_> = all.iter().map(|known| (likeness(known), *known)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut nearest: Vec<String> = Vec::new();
    for (_, known) in ranked {
        if nearest.len() < NEAREST_MAX && !nearest.iter().any(|n| same(n, known)) {
            nearest.push(known.to_owned());
        }
    }
    Unknown { kind, name, nearest }
}

/// Whether two names are the same but for case, blanks and punctuation. A plus sign counts: an M5+ is no M5.
pub fn same(a: &str, b: &str) -> bool {
    plain(a) == plain(b)
}

fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric() || *c == '+').flat_map(char::to_lowercase).collect()
}
