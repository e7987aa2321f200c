//! The folder of a job: its settings, what machines it was begun with, and marks for what is done.
//!
//! ```text
//! job.json      settings, stages, the program that began it
//! machine.json  the kind of the first machine that worked on it
//! cache/        what units leave for later ones
//! done/STAGE/N  marks; `status` counts them, and nothing else depends on them
//! logs/         what the tasks said
//! ```

use crate::exit::{Failure, Result, unwritten, usage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Longest document in the folder.
const DOCUMENT_BYTES_MAX: u64 = 1 << 26;

/// What a job is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    /// Flags of the job, by name.
    pub(super) settings: Map<String, Value>,
    /// Stages in their order, with the number of their units.
    pub(super) stages: Vec<(String, usize)>,
    /// Whether machines may be of different kinds.
    pub(super) other_cpu: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    /// Version of the program, and hash of its file.
    program: String,
    #[serde(flatten)]
    settings: Settings,
}

/// The folder of a job.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    settings: Settings,
}

impl Folder {
    /// Makes the folder of a new job, or finds that of the same job.
    pub(super) fn prepare(path: &Path, settings: Settings) -> Result<Self> {
        let failed = |error: std::io::Error| unwritten(path, "the job was not prepared", &error);
        fs::create_dir_all(path.join("logs")).map_err(failed)?;
        let file = path.join("job.json");
        let document = Document { program: program()?, settings };
        let mut text = serde_json::to_string_pretty(&document).map_err(Failure::bug)?;
        text.push('\n');
        match fs::read_to_string(&file) {
            Ok(known) if known == text => {}
            Ok(_) => {
                return Err(usage(format!(
                    "{}: belongs to another job, or to another version of this program; choose another --dir, or remove it",
                    path.display()
                )));
            }
            Err(_) => lowrank_files::write_whole(&file, text.as_bytes()).map_err(failed)?,
        }
        Ok(Self { path: path.to_owned(), settings: document.settings })
    }

    /// Opens the folder of a job that this program began.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = path.join("job.json");
        let broken = |what: String| usage(format!("{}: {what}", file.display()));
        let bytes = lowrank_files::read_at_most(&file, DOCUMENT_BYTES_MAX)
            .map_err(|error| broken(error.to_string()))?
            .ok_or_else(|| broken("is too long to be a job".into()))?;
        let Document { program: begun, settings } =
            serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
        let own = program()?;
        if own != begun {
            return Err(refused(format!(
                "{}: the job was begun with {begun}, this machine has {own}; give every machine the same program",
                path.display()
            )));
        }
        Ok(Self { path: path.to_owned(), settings })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }

    /// Refuses a machine of another kind than the first that worked on the job.
    pub(super) fn check_machine(&self, kind: &str) -> Result<()> {
        if self.settings.other_cpu {
            return Ok(());
        }
        let file = self.path.join("machine.json");
        let failed = |error: std::io::Error| unwritten(&file, "the kind of machine was not noted", &error);
        let first: String = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                usage(format!("{}: {error}; remove it if no machine works on the job", file.display()))
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let text = serde_json::to_vec(kind).map_err(Failure::bug)?;
                let beside = tempfile::NamedTempFile::new_in(&self.path).map_err(failed)?;
                fs::write(beside.path(), text).map_err(failed)?;
                match beside.persist_noclobber(&file) {
                    Ok(_) => return Ok(()),
                    // Another machine was first.
                    Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {
                        return self.check_machine(kind);
                    }
                    Err(error) => return Err(failed(error.error)),
                }
            }
            Err(error) => return Err(failed(error)),
        };
        if first != kind {
            return Err(refused(format!(
                "{}: the job was begun on {first}, this machine is {kind}, whose results differ by rounding; leave it out, or begin anew with --other-cpu",
                self.path.display()
            )));
        }
        Ok(())
    }

    fn marks(&self, stage: &str) -> PathBuf {
        self.path.join("done").join(stage)
    }

    /// Marks a unit as done.
    pub(super) fn mark(&self, stage: &str, unit: usize) -> Result<()> {
        let place = self.marks(stage);
        let failed = |error: std::io::Error| unwritten(&place, "a finished unit was not marked", &error);
        fs::create_dir_all(&place).map_err(failed)?;
        fs::write(place.join(unit.to_string()), "").map_err(failed)
    }

    /// How many units of a stage are done.
    pub(super) fn done(&self, stage: &str) -> usize {
        fs::read_dir(self.marks(stage)).map_or(0, |entries| entries.flatten().count())
    }
}

/// A machine or a program that is not the one that a job was begun with.
fn refused(what: String) -> Failure {
    Failure::new(lowrank_model::ErrorKind::Unsupported, what)
}

/// This program: its version, and the hash of its file.
fn program() -> Result<String> {
    let path = std::env::current_exe().map_err(Failure::bug)?;
    let bytes = fs::read(&path).map_err(|error| usage(format!("{}: {error}", path.display())))?;
    let hash = blake3::hash(&bytes).to_hex();
    Ok(format!("lowrank-compress {} ({})", env!("CARGO_PKG_VERSION"), &hash[..16]))
}
