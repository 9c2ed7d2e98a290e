//! The `tojson` filter as templates written for Hugging Face expect it: Python's `json.dumps`, not HTML-safe.
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest nesting that is written; JSON that was parsed is never deeper.
const DEPTH_MAX: usize = 128;
/// Widest indentation in spaces.
const INDENT_MAX: usize = 32;
/// Output bytes that one unit of fuel pays for. Writing JSON is slower than copying, so it costs more than the 64 bytes
/// that the engine counts.
const BYTES_PER_FUEL: usize = 4;

/// How the text is laid out.
struct Style {
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort: bool,
}

/// `value|tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`; a number as the only argument is
/// the indentation.
pub(crate) fn tojson(state: &State, value: &Value, first: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let mut indent = kwargs.get::<Option<Value>>("indent")?;
    match first {
        Some(v) if v.kind() == ValueKind::Bool => ascii = v.is_true(),
        Some(v) => indent = Some(v),
        None => {}
    }
    let indent = indent.filter(|v| !v.is_none()).map(|v| indentation(&v)).transpose()?;
    let (item, key) = match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson takes two separators")),
    };
    let sort = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut writer = Writer { state, style: Style { ascii, indent, item, key, sort }, out: String::new(), paid: 0 };
    writer.value(value, 0)?;
    writer.pay()?;
    Ok(Value::from(writer.out))
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn indentation(value: &Value) -> Result<String, Error> {
    let indent = match (value.as_str(), value.as_usize()) {
        (Some(text), _) => text.to_owned(),
        (_, Some(n)) if n <= INDENT_MAX => " ".repeat(n),
        _ => return Err(invalid("tojson's indent is a string or a small number")),
    };
    if indent.len() > INDENT_MAX { Err(invalid("tojson's indent is too wide")) } else { Ok(indent) }
}

struct Writer<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    style: Style,
    out: String,
    /// Bytes of `out` that fuel was taken for.
    paid: usize,
}

impl Writer<'_, '_, '_> {
    fn pay(&mut self) -> Result<(), Error> {
        let units = (self.out.len() - self.paid) / BYTES_PER_FUEL;
        self.paid += units * BYTES_PER_FUEL;
        self.state.consume_fuel(units as u64)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(invalid("tojson got a value that is nested too deeply"));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.container('[', ']', value.try_iter()?.checked(), depth, |w, item| w.value(&item, depth + 1))?
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                if self.style.sort {
                    keys.sort();
                }
                self.container('{', '}', keys.into_iter().map(Ok), depth, |w, key| {
                    w.key(&key)?;
                    w.value(&value.get_item(&key)?, depth + 1)
                })?
            }
            _ => return Err(invalid("tojson got a value that JSON cannot carry")),
        }
        Ok(())
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = Result<Value, Error>>,
        depth: usize,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                self.out.push_str(&self.style.item);
            }
            empty = false;
            self.newline(depth + 1);
            write(self, item?)?;
        }
        if !empty {
            self.newline(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn newline(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::Number => self.string(&key.to_string()),
            ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
            ValueKind::None => self.string("null"),
            _ => return Err(invalid("tojson got a key that JSON cannot carry")),
        }
        self.out.push_str(&self.style.key);
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.style.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
