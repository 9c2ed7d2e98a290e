//! Python's methods on strings, lists and maps, paid for before they allocate.
//!
//! The engine charges what a method returns only once it exists. A `replace` or a `join` can make a result that is much
//! larger than what it was made from, so these are measured first.
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Bytes that one unit of the engine's fuel pays for.
const BYTES_PER_FUEL: usize = 64;

/// Calls a method that Python has and the engine has not.
pub(crate) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, method, args);
    };
    let pay = |bytes: usize| state.consume_fuel((bytes / BYTES_PER_FUEL) as u64);
    // Every method below reads the whole string.
    pay(text.len())?;
    match (method, args) {
        ("removeprefix", [prefix]) if prefix.as_str().is_some() => {
            Ok(Value::from(prefix.as_str().and_then(|p| text.strip_prefix(p)).unwrap_or(text)))
        }
        ("removesuffix", [suffix]) if suffix.as_str().is_some() => {
            Ok(Value::from(suffix.as_str().and_then(|s| text.strip_suffix(s)).unwrap_or(text)))
        }
        ("replace", [old, new, ..]) => {
            if let (Some(old), Some(new)) = (old.as_str(), new.as_str()) {
                pay(text.matches(old).count().saturating_mul(new.len()))?;
            }
            unknown_method_callback(state, value, method, args)
        }
        ("format", _) => {
            pay(width_of_fields(text)?)?;
            unknown_method_callback(state, value, method, args)
        }
        ("join", [list]) if list.kind() != ValueKind::String => {
            // An iterable may be read only once, so what is measured is what is joined.
            let items: Vec<Value> = list.try_iter()?.checked().collect::<Result<_, _>>()?;
            for item in &items {
                pay(text.len() + item.as_str().map_or(0, str::len))?;
            }
            unknown_method_callback(state, value, method, &[Value::from(items)])
        }
        _ => unknown_method_callback(state, value, method, args),
    }
}

/// At most this many bytes do the widths and precisions of a format string add: the sum of all numbers in it. Fields
/// within fields, whose widths are arguments, are refused.
fn width_of_fields(format: &str) -> Result<usize, Error> {
    let (mut sum, mut number, mut depth) = (0_usize, 0_usize, 0_u32);
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        number = match c.to_digit(10) {
            Some(digit) => number.saturating_mul(10).saturating_add(digit as usize),
            None => 0,
        };
        if !chars.peek().is_some_and(char::is_ascii_digit) {
            sum = sum.saturating_add(number);
        }
        match c {
            '{' if depth == 0 && chars.peek() == Some(&'{') => {
                chars.next();
            }
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > 1 {
            return Err(Error::new(ErrorKind::InvalidOperation, "format does not take fields within fields"));
        }
    }
    Ok(sum)
}
