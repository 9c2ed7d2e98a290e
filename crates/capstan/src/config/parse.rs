//! One parser a setting, for flags, variables and the file alike.
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use capstan_proto::limits::{self, DECODE_SLOWDOWN_PERCENT_MAX, DECODE_SLOWDOWN_PERCENT_MIN};

use super::{API_PORT, Auto, DECODE_SLOWDOWN, Listen, LogFormat, SnapshotLimit, Switch};

/// A folder; a leading `~/` is the user's home.
pub fn path(text: &str) -> Result<PathBuf, String> {
    if let (Some(rest), Some(dirs)) = (text.strip_prefix("~/"), directories::BaseDirs::new()) {
        return Ok(dirs.home_dir().join(rest));
    }
    if text.is_empty() { Err("an empty path names no folder".into()) } else { Ok(PathBuf::from(text)) }
}

/// A node's name: short, and free of what separates names in other flags.
pub fn name(text: &str) -> Result<String, String> {
    let bad = |c: char| c.is_control() || c.is_whitespace() || c == ',' || c == '=';
    if text.is_empty() || text.len() > limits::NAME_BYTES_MAX {
        return Err(format!("a name has 1 to {} bytes", limits::NAME_BYTES_MAX));
    }
    if text.contains(bad) {
        return Err("a name has no spaces, commas or equals signs".into());
    }
    Ok(text.into())
}

/// An address with a port.
pub fn socket_addr(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not IP:PORT, for example 127.0.0.1:8420 or [::1]:8420"))
}

/// Where this machine's own commands and clients find the API: on loopback.
pub fn api_addr(text: &str) -> Result<SocketAddr, String> {
    let addr = socket_addr(text)?;
    if addr.ip().to_canonical().is_loopback() {
        return Ok(addr);
    }
    Err(format!(
        "{addr} is not on loopback; to let other machines use the API, say `--listen {addr}` (listen in the config \
         file), which demands API keys"
    ))
}

/// Where other machines find the API: an address, with or without a port, or `off`.
pub fn listen(text: &str) -> Result<Listen, String> {
    if text == "off" {
        return Ok(Listen(None));
    }
    let alone = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, API_PORT));
    alone
        .or_else(|_| text.parse())
        .map(|addr| Listen(Some(addr)))
        .map_err(|_| format!("{text:?} is neither an address such as 0.0.0.0 or 192.168.1.5:8420 nor `off`"))
}

/// `true` or `false`.
pub fn yes_no(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("{text:?} is neither true nor false"))
}

/// `auto` or a count of at least one.
pub fn auto_count(text: &str) -> Result<Auto<u32>, String> {
    match text.parse::<u32>() {
        _ if text == "auto" => Ok(Auto(None)),
        Ok(n) if n > 0 => Ok(Auto(Some(n))),
        _ => Err(format!("{text:?} is neither a whole number above 0 nor `auto`")),
    }
}

/// `auto` or a size in bytes with an optional suffix.
pub fn auto_size(text: &str) -> Result<Auto<u64>, String> {
    match text.parse::<bytesize::ByteSize>() {
        _ if text == "auto" => Ok(Auto(None)),
        Ok(size) if size.0 > 0 => Ok(Auto(Some(size.0))),
        _ => Err(format!("{text:?} is neither a size such as 96GiB, 800MB or 1073741824 nor `auto`")),
    }
}

/// `auto`, `off` or a size in bytes with an optional suffix.
pub fn snapshot_limit(text: &str) -> Result<SnapshotLimit, String> {
    match auto_size(text) {
        _ if text == "off" => Ok(SnapshotLimit::Off),
        Ok(Auto(size)) => Ok(size.map_or(SnapshotLimit::Auto, SnapshotLimit::Bytes)),
        Err(_) => Err(format!("{text:?} is neither a size such as 2GB or 800MiB, nor `auto`, nor `off`")),
    }
}

/// A whole number, which may be negative.
pub fn integer(text: &str) -> Result<i32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a whole number"))
}

/// `auto` or `off`.
pub fn auto_off(text: &str) -> Result<Switch, String> {
    switch(text, Switch::Auto)
}

/// `on` or `off`.
pub fn prefix_cache(text: &str) -> Result<Switch, String> {
    switch(text, Switch::On)
}

fn switch(text: &str, on: Switch) -> Result<Switch, String> {
    let words = [on, Switch::Off];
    words.into_iter().find(|s| s.word() == text).ok_or_else(|| format!("{text:?} is neither {on} nor off"))
}

/// How many times as long a decode step may take.
pub fn decode_slowdown(text: &str) -> Result<f32, String> {
    let bounds = [DECODE_SLOWDOWN_PERCENT_MIN, DECODE_SLOWDOWN_PERCENT_MAX].map(|percent| f32::from(percent) / 100.0);
    match text.parse::<f32>() {
        Ok(times) if (bounds[0]..=bounds[1]).contains(&times) => Ok(times),
        _ => Err(format!("{text:?} is not a number from {} to {}, such as {DECODE_SLOWDOWN}", bounds[0], bounds[1])),
    }
}

/// A level or a filter of `tracing`.
pub fn log_level(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.into()),
        Err(_) => Err(format!(
            "{text:?} is neither a level (off, error, warn, info, debug, trace) nor a filter such as warn,capstan_node=debug"
        )),
    }
}

/// `text` or `json`.
pub fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("{text:?} is neither text nor json")),
    }
}
