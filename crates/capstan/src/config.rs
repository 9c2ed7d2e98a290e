//! Every setting's value and where it came from: defaults, then the config file, then `CAPSTAN_*`, then flags.
//!
//! All four sources meet in one parser a setting, so a value means the same wherever it is written. The resolution is
//! pure: file text and environment come in as arguments.
use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::cli::{Global, ModelFlags, NodeFlags};
pub use values::{Auto, Listen, SnapshotLimit, Switch};

pub mod parse;
mod values;

/// Port of the HTTP API unless told otherwise.
pub(crate) const API_PORT: u16 = 8420;
/// UDP port that other nodes dial unless told otherwise.
pub(crate) const BIND_PORT: u16 = 8421;
/// How many times as long a decode step may take while prompts come in, unless told otherwise.
const DECODE_SLOWDOWN: f32 = 1.75;
/// Largest config file that is read, in bytes: a thousand times what a full one has.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// How alike a wrong key must be to a right one to be called its misspelling (1 is equal).
const SIMILARITY_MIN: f64 = 0.7;

/// The settings, by the name they have in the config file. Flag and variable follow from it.
pub const KEYS: [&str; 20] = [
    "data_dir",
    "name",
    "api_addr",
    "listen",
    "no_auth",
    "bind_addr",
    "no_mdns",
    "threads",
    "memory_limit",
    "disk_limit",
    "snapshot_limit",
    "gpu_layers",
    "measure",
    "ctx",
    "slots",
    "speculation",
    "prefix_cache",
    "decode_slowdown",
    "log_level",
    "log_format",
];

/// Why the settings could not be resolved. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The config file could not be read.
    #[error("the config file {} cannot be read ({reason}); mend it, or name another with --config", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The config file is not TOML.
    #[error("the config file {} is not valid TOML: {reason}", .path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A key that means nothing.
    #[error("the config file {} has the unknown key {key:?}; {hint}", .path.display())]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The nearest valid key, or all of them.
        hint: String,
    },
    /// A value that its setting cannot take.
    #[error("{source_name} has a bad value for {key}: {reason}")]
    BadValue {
        /// Which setting.
        key: &'static str,
        /// Where the value was written.
        source_name: Source,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// No home folder is known, so there is no default.
    #[error("no home folder is known (is HOME set?), so there is no default for data_dir; name one with --data-dir")]
    NoHome,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Built in, or measured on this machine.
    Default,
    /// The config file.
    File(PathBuf),
    /// An environment variable.
    Env(String),
    /// A flag of this command.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Env(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub source: Source,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// What the command line may say about settings.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// Flags that every command takes.
    pub global: Global,
    /// Settings of a daemon.
    pub node: NodeFlags,
    /// Settings of a load.
    pub model: ModelFlags,
}

/// Every setting, resolved.
#[derive(Clone, Debug)]
pub struct Config {
    /// The config file that was read; none when there is none.
    pub file: Option<PathBuf>,
    /// Folder of this node's key, shards and logs; absolute.
    pub data_dir: Setting<PathBuf>,
    /// Name of this node.
    pub name: Setting<String>,
    /// Address of the HTTP API for this machine.
    pub api_addr: Setting<SocketAddr>,
    /// Address of the HTTP API for other machines.
    pub listen: Setting<Listen>,
    /// Whether other machines use models without API keys.
    pub no_auth: Setting<bool>,
    /// UDP address that other nodes dial.
    pub bind_addr: Setting<SocketAddr>,
    /// Whether multicast DNS is left alone, also while a pairing is open.
    pub no_mdns: Setting<bool>,
    /// Compute threads.
    pub threads: Setting<Auto<u32>>,
    /// Bytes that stages may take.
    pub memory_limit: Setting<Auto<u64>>,
    /// Bytes that models and shards may take on the disk.
    pub disk_limit: Setting<Auto<u64>>,
    /// Bytes that KV snapshots of a stage may take.
    pub snapshot_limit: Setting<SnapshotLimit>,
    /// Layers of a stage on a GPU; negative is all.
    pub gpu_layers: Setting<i32>,
    /// Whether the daemon measures its machine and links.
    pub measure: Setting<Switch>,
    /// Tokens a slot holds.
    pub ctx: Setting<Auto<u32>>,
    /// Requests answered at once.
    pub slots: Setting<Auto<u32>>,
    /// Whether idle stages check guessed tokens.
    pub speculation: Setting<Switch>,
    /// Whether a prompt takes what an earlier one left in the caches.
    pub prefix_cache: Setting<Switch>,
    /// How many times as long a decode step may take while prompts come in.
    pub decode_slowdown: Setting<f32>,
    /// Least level that is logged, or a filter.
    pub log_level: Setting<String>,
    /// How logs are written.
    pub log_format: Setting<LogFormat>,
}

/// A setting as `capstan config` shows it.
pub struct ShownSetting {
    /// Its key in the config file.
    pub key: &'static str,
    /// For people.
    pub text: String,
    /// For programs.
    pub json: serde_json::Value,
    /// Where it came from.
    pub source: Source,
}

impl Config {
    /// Settings of this process: reads the environment and the config file.
    pub fn load(flags: Flags) -> Result<Self, ConfigError> {
        let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
        let named = flags.global.config.clone().or_else(|| env("CAPSTAN_CONFIG").map(PathBuf::from));
        let file = match (named, default_config_file()) {
            (Some(path), _) => Some(read_config_file(&absolute(&path))?),
            (None, Some(path)) if path.exists() => Some(read_config_file(&path)?),
            _ => None,
        };
        Self::resolve(flags, file.as_ref().map(|(path, text)| (path.as_path(), text.as_str())), &env)
    }

    /// Settings from a config file's path and text, an environment and flags.
    pub fn resolve(
        flags: Flags,
        file: Option<(&Path, &str)>,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let file = file.map(|(path, text)| Ok((path, parse_file(path, text)?))).transpose()?;
        let from = Sources { file: file.as_ref().map(|(path, table)| (*path, table)), env };
        let Flags { global, node, model } = flags;
        let mut data_dir = from.pick("data_dir", global.data_dir, parse::path, default_data_dir)?;
        data_dir.value = match (&data_dir.source, file.as_ref().and_then(|(path, _)| path.parent())) {
            // In a file, a relative path is relative to that file: the working directory would be a surprise.
            (Source::File(_), Some(folder)) => absolute(&folder.join(&data_dir.value)),
            _ => absolute(&data_dir.value),
        };
        let unspecified = Ipv4Addr::UNSPECIFIED;
        Ok(Self {
            data_dir,
            name: from.pick("name", node.name, parse::name, || Ok(default_name()))?,
            api_addr: from
                .pick("api_addr", node.api_addr, parse::api_addr, || Ok((Ipv4Addr::LOCALHOST, API_PORT).into()))?,
            listen: from.pick("listen", node.listen, parse::listen, || Ok(Listen(None)))?,
            no_auth: from.pick("no_auth", node.no_auth, parse::yes_no, || Ok(false))?,
            bind_addr: from
                .pick("bind_addr", node.bind_addr, parse::socket_addr, || Ok((unspecified, BIND_PORT).into()))?,
            no_mdns: from.pick("no_mdns", node.no_mdns, parse::yes_no, || Ok(false))?,
            threads: from.pick("threads", node.threads, parse::auto_count, || Ok(Auto(None)))?,
            memory_limit: from.pick("memory_limit", node.memory_limit, parse::auto_size, || Ok(Auto(None)))?,
            disk_limit: from.pick("disk_limit", node.disk_limit, parse::auto_size, || Ok(Auto(None)))?,
            snapshot_limit: from
                .pick("snapshot_limit", node.snapshot_limit, parse::snapshot_limit, || Ok(SnapshotLimit::Auto))?,
            gpu_layers: from.pick("gpu_layers", node.gpu_layers, parse::integer, || Ok(-1))?,
            measure: from.pick("measure", node.measure, parse::auto_off, || Ok(Switch::Auto))?,
            ctx: from.pick("ctx", model.ctx, parse::auto_count, || Ok(Auto(None)))?,
            slots: from.pick("slots", model.slots, parse::auto_count, || Ok(Auto(None)))?,
            speculation: from.pick("speculation", model.speculation, parse::auto_off, || Ok(Switch::Auto))?,
            prefix_cache: from.pick("prefix_cache", model.prefix_cache, parse::prefix_cache, || Ok(Switch::On))?,
            decode_slowdown: from
                .pick("decode_slowdown", model.decode_slowdown, parse::decode_slowdown, || Ok(DECODE_SLOWDOWN))?,
            log_level: from.pick("log_level", global.log_level, parse::log_level, || Ok("info".into()))?,
            log_format: from.pick("log_format", global.log_format, parse::log_format, || Ok(LogFormat::Text))?,
            file: file.map(|(path, _)| path.to_path_buf()),
        })
    }

    /// Every setting in the order of [`KEYS`].
    pub fn shown(&self) -> Vec<ShownSetting> {
        fn show<T: fmt::Display, J: Serialize>(key: &'static str, s: &Setting<T>, json: J) -> ShownSetting {
            ShownSetting {
                key,
                text: s.value.to_string(),
                json: serde_json::to_value(json).unwrap_or_default(),
                source: s.source.clone(),
            }
        }
        let data_dir = Setting { value: self.data_dir.value.display(), source: self.data_dir.source.clone() };
        vec![
            show("data_dir", &data_dir, self.data_dir.value.to_string_lossy()),
            show("name", &self.name, &self.name.value),
            show("api_addr", &self.api_addr, self.api_addr.value),
            show("listen", &self.listen, self.listen.value.0),
            show("no_auth", &self.no_auth, self.no_auth.value),
            show("bind_addr", &self.bind_addr, self.bind_addr.value),
            show("no_mdns", &self.no_mdns, self.no_mdns.value),
            show("threads", &self.threads, self.threads.value.0),
            show("memory_limit", &self.memory_limit, self.memory_limit.value.0),
            show("disk_limit", &self.disk_limit, self.disk_limit.value.0),
            show("snapshot_limit", &self.snapshot_limit, self.snapshot_limit.value.bytes()),
            show("gpu_layers", &self.gpu_layers, self.gpu_layers.value),
            show("measure", &self.measure, self.measure.value.word()),
            show("ctx", &self.ctx, self.ctx.value.0),
            show("slots", &self.slots, self.slots.value.0),
            show("speculation", &self.speculation, self.speculation.value.word()),
            show("prefix_cache", &self.prefix_cache, self.prefix_cache.value.word()),
            show("decode_slowdown", &self.decode_slowdown, self.decode_slowdown.value),
            show("log_level", &self.log_level, &self.log_level.value),
            show("log_format", &self.log_format, self.log_format.value),
        ]
    }

    /// Where the default config file is, whether it exists or not; none when no home folder is known.
    pub fn default_file() -> Option<PathBuf> {
        default_config_file()
    }
}

/// The three written sources, most important last.
struct Sources<'a> {
    file: Option<(&'a Path, &'a toml::Table)>,
    env: &'a dyn Fn(&str) -> Option<OsString>,
}

impl Sources<'_> {
    fn pick<T>(
        &self,
        key: &'static str,
        flag: Option<T>,
        parse: fn(&str) -> Result<T, String>,
        default: impl FnOnce() -> Result<T, ConfigError>,
    ) -> Result<Setting<T>, ConfigError> {
        debug_assert!(KEYS.contains(&key));
        if let Some(value) = flag {
            return Ok(Setting { value, source: Source::Flag(format!("--{}", key.replace('_', "-"))) });
        }
        let (text, source) = if let Some((name, value)) = self.env_value(key) {
            (value.into_string().map_err(|_| "it is not valid UTF-8".into()), Source::Env(name))
        } else if let Some((path, value)) = self.file.and_then(|(path, table)| Some((path, table.get(key)?))) {
            (scalar_text(value), Source::File(path.to_path_buf()))
        } else {
            return Ok(Setting { value: default()?, source: Source::Default });
        };
        match text.and_then(|text| parse(&text)) {
            Ok(value) => Ok(Setting { value, source }),
            Err(reason) => Err(ConfigError::BadValue { key, source_name: source, reason }),
        }
    }

    fn env_value(&self, key: &str) -> Option<(String, OsString)> {
        let name = format!("CAPSTAN_{}", key.to_uppercase());
        let value = (self.env)(&name)?;
        Some((name, value))
    }
}

fn parse_file(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| ConfigError::Syntax { path: path.into(), reason: e.to_string().trim().into() })?;
    if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
        let nearest = KEYS
            .iter()
            .map(|known| (strsim::jaro_winkler(known, &key.to_lowercase().replace('-', "_")), known))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        let hint = match nearest {
            Some((likeness, known)) if likeness >= SIMILARITY_MIN => format!("did you mean {known:?}?"),
            _ => format!("known keys are {}", KEYS.join(", ")),
        };
        return Err(ConfigError::UnknownKey { path: path.into(), key: key.clone(), hint });
    }
    Ok(table)
}

fn scalar_text(value: &toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(n) => Ok(n.to_string()),
        toml::Value::Float(x) => Ok(x.to_string()),
        toml::Value::Boolean(yes) => Ok(yes.to_string()),
        other => Err(format!("it is a {}; write a string, a number, true or false", other.type_str())),
    }
}

fn read_config_file(path: &Path) -> Result<(PathBuf, String), ConfigError> {
    let unreadable = |reason: String| ConfigError::Unreadable { path: path.into(), reason };
    let meta = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?;
    if meta.len() > CONFIG_BYTES_MAX {
        return Err(unreadable(format!("it has {} bytes; at most {CONFIG_BYTES_MAX} are read", meta.len())));
    }
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?;
    Ok((path.into(), text))
}

fn project_dirs() -> Option<directories::ProjectDirs> {
    directories::ProjectDirs::from("", "", "capstan")
}

fn default_config_file() -> Option<PathBuf> {
    Some(project_dirs()?.config_dir().join("config.toml"))
}

fn default_data_dir() -> Result<PathBuf, ConfigError> {
    Ok(project_dirs().ok_or(ConfigError::NoHome)?.data_dir().to_path_buf())
}

/// The host's name, made fit to be a node's.
fn default_name() -> String {
    let host = crate::os::host_name().unwrap_or_default();
    let fit: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(63).collect();
    if fit.is_empty() { "node".into() } else { fit }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(flags: Flags, file: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let env = |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| OsString::from(v));
        Config::resolve(flags, Some((Path::new("/etc/capstan/config.toml"), file)), &env)
    }

    #[test]
    fn each_source_beats_the_one_before() {
        let mut flags = Flags::default();
        let file = "name = 'from-file'\nthreads = 3\nctx = 'auto'\ndata_dir = 'state'";
        let c = resolve(flags.clone(), file, &[]).unwrap();
        assert_eq!((c.name.value.as_str(), c.threads.value), ("from-file", Auto(Some(3))));
        assert_eq!(c.data_dir.value, Path::new("/etc/capstan/state"), "relative to the file");
        assert_eq!(c.gpu_layers.source, Source::Default);

        let env = [("CAPSTAN_NAME", "from-env"), ("CAPSTAN_THREADS", "auto")];
        let c = resolve(flags.clone(), file, &env).unwrap();
        assert_eq!((c.name.value.as_str(), c.threads.value), ("from-env", Auto(None)));
        assert_eq!(c.name.source, Source::Env("CAPSTAN_NAME".into()));

        flags.node.name = Some("from-flag".into());
        let c = resolve(flags, file, &env).unwrap();
        assert_eq!((c.name.value.as_str(), c.name.source), ("from-flag", Source::Flag("--name".into())));
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_nearest() {
        let message = |file| resolve(Flags::default(), file, &[]).unwrap_err().to_string();
        assert!(message("memory-limits = '1GiB'").contains("did you mean \"memory_limit\"?"));
        assert!(message("xyzzy = 1").contains("known keys are data_dir, name"));
        assert!(message("name = ").contains("not valid TOML"));
        assert!(message("[name]\na = 1").contains("it is a table"));
    }

    #[test]
    fn values_are_checked_and_bad_ones_name_their_source() {
        let env = [("CAPSTAN_MEMORY_LIMIT", "lots")];
        let message = resolve(Flags::default(), "", &env).unwrap_err().to_string();
        assert!(message.starts_with("variable CAPSTAN_MEMORY_LIMIT has a bad value for memory_limit"), "{message}");
        let settings = "speculation = 'off'\ndecode_slowdown = 2.5";
        let c = resolve(Flags::default(), settings, &[("CAPSTAN_PREFIX_CACHE", "off")]).unwrap();
        assert_eq!((c.speculation.value, c.prefix_cache.value), (Switch::Off, Switch::Off));
        assert_eq!(c.decode_slowdown.value, 2.5);
        for (key, bad) in [("speculation", "'on'"), ("prefix_cache", "'auto'"), ("decode_slowdown", "0.5")] {
            let message = resolve(Flags::default(), &format!("{key} = {bad}"), &[]).unwrap_err().to_string();
            assert!(message.contains(&format!("bad value for {key}")), "{message}");
        }
        for (key, bad) in [("threads", "0"), ("api_addr", "'8420'"), ("name", "'a,b'"), ("log_format", "'xml'")] {
            let message = resolve(Flags::default(), &format!("{key} = {bad}"), &[]).unwrap_err().to_string();
            assert!(message.contains(&format!("bad value for {key}")), "{message}");
        }
    }

    #[test]
    fn the_api_is_on_loopback_unless_it_is_said_to_listen() {
        let c = resolve(Flags::default(), "", &[]).unwrap();
        assert!(c.api_addr.value.ip().is_loopback() && c.listen.value.0.is_none() && !c.no_auth.value);
        let c =
            resolve(Flags::default(), "listen = '0.0.0.0'\nno_auth = true", &[("CAPSTAN_NO_MDNS", "true")]).unwrap();
        assert_eq!(
            (c.listen.value.to_string().as_str(), c.no_auth.value, c.no_mdns.value),
            ("0.0.0.0:8420", true, true)
        );
        assert_eq!(parse::listen("[::]:9"), Ok(Listen(Some("[::]:9".parse().unwrap()))));
        assert_eq!(parse::listen("off"), Ok(Listen(None)));
        for (key, bad, words) in [
            ("api_addr", "'0.0.0.0:8420'", "--listen 0.0.0.0:8420"),
            ("listen", "'8420'", "neither an address"),
            ("no_auth", "'yes'", "neither true nor false"),
        ] {
            let message = resolve(Flags::default(), &format!("{key} = {bad}"), &[]).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn sizes_take_suffixes() {
        assert_eq!(parse::auto_size("96GiB"), Ok(Auto(Some(96 << 30))));
        assert_eq!(parse::auto_size("1.5 GB"), Ok(Auto(Some(1_500_000_000))));
        assert_eq!(parse::auto_size("1024"), Ok(Auto(Some(1024))));
        assert!(parse::auto_size("-1").is_err() && parse::auto_size("").is_err());
    }

    #[test]
    fn everything_is_shown() {
        let shown = resolve(Flags::default(), "", &[("CAPSTAN_DATA_DIR", "/data")]).unwrap().shown();
        assert_eq!(shown.iter().map(|s| s.key).collect::<Vec<_>>(), KEYS);
        assert_eq!(
            (shown[0].text.as_str(), shown[0].source.to_string()),
            ("/data", "variable CAPSTAN_DATA_DIR".into())
        );
    }
}
