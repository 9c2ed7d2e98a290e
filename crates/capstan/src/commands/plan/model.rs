//! What MODEL means, and where its numbers come from: a file's header, one that is elsewhere, or the catalogue.
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use capstan_gguf::Model;
use capstan_planner::Subject;
use capstan_planner::models::{self, KnownModel};
use capstan_planner::quant::Quantisation;
use capstan_store::remote::{ModelName, Remote};
use indicatif::ProgressBar;

/// How often the spinner turns while headers are fetched.
const TICK: Duration = Duration::from_millis(120);

/// A model that can be planned for.
pub enum Known {
    /// Its headers were read.
    Read {
        /// The model, without its weights where it is elsewhere.
        model: Box<Model>,
        /// Its name where the headers have none.
        name: String,
        /// Where it is.
        place: String,
    },
    /// It is in the catalogue.
    Catalogue(&'static KnownModel, &'static Quantisation),
}

impl Known {
    /// What the planner is asked about.
    pub fn subject(&self) -> Subject<'_> {
        match self {
            Self::Read { model, name, place } => {
                let mut subject = Subject::read(model);
                subject.name = model.name().filter(|n| !n.trim().is_empty()).unwrap_or(name).to_owned();
                subject.sources = vec![format!("the header of {place}")];
                subject
            }
            Self::Catalogue(model, quantisation) => Subject::known(model, quantisation),
        }
    }
}

/// Finds a model: a file if there is one of that name, else one elsewhere, else one of the catalogue.
pub async fn find(text: &str) -> Result<Known> {
    let path = Path::new(text);
    if path.is_file() {
        return open(path.to_owned()).await;
    }
    match text.parse::<ModelName>()? {
        ModelName::File(path) if text.starts_with("file:") => open(path).await,
        ModelName::File(path) => match models::find(text) {
            Ok((model, quantisation)) => Ok(Known::Catalogue(model, quantisation)),
            Err(_) if path.is_dir() => bail!("{text} is a folder; name the GGUF file in it"),
            Err(_) if text.ends_with(".gguf") => {
                bail!("there is no file {text}; name a GGUF file, of a split model the first")
            }
            Err(unknown) => {
                Err(anyhow!("{unknown}; nor is there a file of that name (`capstan plan --list` shows all)"))
            }
        },
        elsewhere => fetch(&elsewhere).await,
    }
}

async fn open(path: PathBuf) -> Result<Known> {
    let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let place = path.display().to_string();
    // A header may lie on a slow disk, and be large.
    let model = tokio::task::spawn_blocking(move || Model::open(&path)).await.context("reading the model failed")??;
    Ok(Known::Read { model: Box::new(model), name, place })
}

/// Reads the headers of a model that is elsewhere, with a spinner where somebody looks on.
async fn fetch(name: &ModelName) -> Result<Known> {
    let spinner = std::io::stderr().is_terminal().then(|| {
        let spinner = ProgressBar::new_spinner().with_message(format!("reading the headers of {name}"));
        spinner.enable_steady_tick(TICK);
        spinner
    });
    let model = tokio::select! {
        model = async { Remote::from_env()?.model(name).await } => model,
        _ = tokio::signal::ctrl_c() => bail!("interrupted while reading the headers of {name}"),
    };
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    Ok(Known::Read { model: Box::new(model?), name: name.to_string(), place: name.to_string() })
}
