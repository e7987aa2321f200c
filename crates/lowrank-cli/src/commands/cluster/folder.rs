//! The folder of a job: its settings, what machines it was begun with, and marks for what is done.
//!
//! ```text
//! job.json      settings, stages, the program that began it
//! machine.json  the kind of the first machine that worked on it
//! cache/        what units leave for later ones
//! done/STAGE/N  marks, with what the unit took; `status` counts them, and the script leaves out stages that have all
//! rows/ID.json  points of a sweep that are compressed and verified
//! logs/         what the tasks said
//! ```

use crate::commands::sweep::SweepArgs;
use crate::exit::{Failure, Result, unwritten, usage};
use lowrank_pipeline::compress::units::{TASKS_PER_NODE, UnitStage, tasks};
use lowrank_pipeline::machine;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::cell::Cell;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Longest document in the folder.
const DOCUMENT_BYTES_MAX: u64 = 1 << 26;

/// What a job does.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Subject {
    /// Flags of `compress`, by name.
    Compress(Map<String, Value>),
    /// A sweep.
    Sweep(Box<SweepJob>),
}

/// What a sweep is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SweepJob {
    /// Flags of `sweep`.
    pub(super) flags: SweepArgs,
    /// Hash of its config file.
    pub(super) config_blake3: String,
    /// The folder from which relative paths of the config go.
    pub(super) work_dir: PathBuf,
}

/// A stage of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Stage {
    pub(super) name: String,
    pub(super) units: usize,
    tasks_per_node: usize,
}

impl Stage {
    /// Of units that the pipeline knows.
    pub(super) fn of(stage: UnitStage, name: String, units: usize) -> Self {
        Self { name, units, tasks_per_node: stage.tasks_per_node() }
    }

    /// Another one.
    pub(super) fn other(name: &str, units: usize) -> Self {
        Self { name: name.to_owned(), units, tasks_per_node: TASKS_PER_NODE }
    }

    /// Tasks that its units are shared out to.
    pub(super) fn tasks(&self, nodes: u32) -> usize {
        tasks(self.units, nodes as usize, self.tasks_per_node)
    }
}

/// What a job is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    #[serde(flatten)]
    pub(super) subject: Subject,
    /// Stages in their order.
    pub(super) stages: Vec<Stage>,
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

/// What a unit took: since the one before it, or since the task began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Took {
    pub(super) cpu_seconds: f64,
    pub(super) wall_seconds: f64,
}

/// How far a stage is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Progress {
    /// Finished units.
    pub(super) done: usize,
    /// What they took together.
    pub(super) took: Took,
}

/// The folder of a job.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    settings: Settings,
    /// When the last unit of this task was done, and the CPU seconds of the process by then.
    last: Cell<(Instant, f64)>,
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
        Ok(Self::new(path, document.settings))
    }

    fn new(path: &Path, settings: Settings) -> Self {
        Self { path: path.to_owned(), settings, last: Cell::new((Instant::now(), 0.0)) }
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
        Ok(Self::new(path, settings))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// How many units a stage has.
    pub(super) fn units(&self, stage: &str) -> Result<usize> {
        let found = self.settings.stages.iter().find(|own| own.name == stage);
        found.map(|found| found.units).ok_or_else(|| usage(format!("{stage}: not a stage of this job")))
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
        let (now, cpu_seconds) = (Instant::now(), machine::cpu_seconds().unwrap_or(0.0));
        let (last, cpu_seconds_last) = self.last.replace((now, cpu_seconds));
        let wall_seconds = (now - last).as_secs_f64();
        let took = Took { cpu_seconds: cpu_seconds - cpu_seconds_last, wall_seconds };
        let text = serde_json::to_vec(&took).map_err(Failure::bug)?;
        fs::create_dir_all(&place).map_err(failed)?;
        lowrank_files::write_whole(&place.join(unit.to_string()), &text).map_err(failed)
    }

    /// How far a stage is. A mark that cannot be read says nothing of time, but of its unit.
    pub(super) fn progress(&self, stage: &str) -> Progress {
        let marks = fs::read_dir(self.marks(stage)).into_iter().flatten().flatten();
        let is_mark = |name: &OsStr| name.to_str().is_some_and(|name| name.parse::<usize>().is_ok());
        let read = |path: PathBuf| serde_json::from_slice::<Took>(&fs::read(path).ok()?).ok();
        let mut progress = Progress::default();
        for mark in marks.filter(|entry| is_mark(&entry.file_name())) {
            let took = read(mark.path()).unwrap_or_default();
            progress.done += 1;
            progress.took.cpu_seconds += took.cpu_seconds;
            progress.took.wall_seconds += took.wall_seconds;
        }
        progress
    }
}

/// A machine or a program that is not the one that a job was begun with.
pub(super) fn refused(what: String) -> Failure {
    Failure::new(lowrank_model::ErrorKind::Unsupported, what)
}

/// This program: its version, and the hash of its file.
fn program() -> Result<String> {
    let path = std::env::current_exe().map_err(Failure::bug)?;
    let bytes = fs::read(&path).map_err(|error| usage(format!("{}: {error}", path.display())))?;
    let hash = blake3::hash(&bytes).to_hex();
    Ok(format!("lowrank-compress {} ({})", env!("CARGO_PKG_VERSION"), &hash[..16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(dir: &Path, other_cpu: bool) -> Folder {
        let stages = vec![Stage::other("publish", 1)];
        let settings = Settings { subject: Subject::Compress(Map::new()), stages, other_cpu };
        Folder::prepare(dir, settings).unwrap()
    }

    #[test]
    fn a_gpu_beside_a_cpu_is_refused_by_name_unless_kinds_may_mix() {
        let [on_cpu, on_gpu] =
            ["X (avx2; caches 1M), models on CPU", "X (avx2; caches 1M), models on NVIDIA H100"];
        let dir = tempfile::tempdir().unwrap();
        let strict = folder(dir.path(), false);
        for _ in 0..2 {
            strict.check_machine(on_cpu).unwrap();
        }
        let refused = strict.check_machine(on_gpu).unwrap_err();
        assert_eq!(refused.kind(), lowrank_model::ErrorKind::Unsupported);
        let line = refused.to_string();
        assert!(line.contains(on_cpu) && line.contains(on_gpu) && line.contains("--other-cpu"), "{line}");
        let dir = tempfile::tempdir().unwrap();
        let lenient = folder(dir.path(), true);
        for kind in [on_cpu, on_gpu] {
            lenient.check_machine(kind).unwrap();
        }
    }

    #[test]
    fn a_job_is_read_back_and_counts_what_is_marked() {
        let dir = tempfile::tempdir().unwrap();
        let made = folder(dir.path(), false);
        assert_eq!(made.progress("publish").done, 0);
        made.mark("publish", 0).unwrap();
        // What a kill leaves beside the marks is none.
        fs::write(made.marks("publish").join(".0.tmp"), "").unwrap();
        let read = Folder::open(dir.path()).unwrap();
        assert_eq!((read.units("publish").unwrap(), read.progress("publish").done), (1, 1));
        assert!(read.units("plan").unwrap_err().to_string().contains("plan: not a stage of this job"));
    }
}
