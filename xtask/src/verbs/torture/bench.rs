//! Starts runs of the tool, waits for them, and compares their results with those of an undisturbed run.

use super::dice::Dice;
use crate::shell;
use crate::verbs::demo::bundled_model;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A run that takes longer counts as a hang. On a busy machine a second of work may take a minute.
const PATIENCE: Duration = Duration::from_secs(1800);

/// File contents by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

pub(crate) fn files(dir: &Path) -> Result<Files> {
    let read = |entry: std::io::Result<fs::DirEntry>| -> Result<_> {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
    };
    fs::read_dir(dir).with_context(|| dir.display().to_string())?.map(read).collect()
}

/// How a run ended.
pub(super) struct End {
    /// Exit code, or minus the signal.
    pub(super) code: i32,
    pub(super) stderr: String,
}

impl End {
    pub(super) fn is_refusal(&self, codes: &[i32]) -> Result<()> {
        let errors = self.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        ensure!(codes.contains(&self.code), "exit code {}, expected {codes:?}: {}", self.code, self.stderr);
        ensure!(errors == 1, "{errors} error lines: {}", self.stderr);
        Ok(())
    }
}

/// State of a run's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cache {
    /// All measurements are cached, so the run begins with the factors.
    Warm,
    /// Only what an interrupted run left; empty after [`Bench::forget`].
    Cold,
}

impl Cache {
    /// The default job on few tokens, because the test is about writing.
    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Warm => &["--calibration-tokens", "2048"],
            Self::Cold => &["--calibration-tokens", "2048", "--sensitivity-tokens", "1024"],
        }
    }
}

/// A complete undisturbed run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Course {
    /// Number of its writes, flushes and renames.
    pub(super) places: u64,
    pub(super) takes: Duration,
}

pub(super) struct Bench {
    tool: PathBuf,
    pub(super) work: PathBuf,
    pub(super) dice: Dice,
    warm_reference: Files,
    cold_reference: Files,
    pub(super) warm: Course,
    pub(super) cold: Course,
    /// Number of places up to the end of measuring, which only a run with a cold cache does.
    pub(super) measuring_places: u64,
}

/// One run of the tool.
pub(super) struct Run<'a> {
    pub(super) model: &'a Path,
    pub(super) out: &'a Path,
    pub(super) failpoint: String,
    pub(super) workers: u64,
    pub(super) cache: Cache,
}

impl<'a> Run<'a> {
    /// An undisturbed run with two workers.
    pub(super) fn new(model: &'a Path, out: &'a Path, cache: Cache) -> Self {
        Self { model, out, failpoint: String::new(), workers: 2, cache }
    }

    pub(super) fn failing(mut self, failpoint: String) -> Self {
        self.failpoint = failpoint;
        self
    }

    pub(super) fn on(mut self, workers: u64) -> Self {
        self.workers = workers;
        self
    }
}

impl Bench {
    /// Builds the tool with fail points and runs it undisturbed, first with an empty cache, then with a full one.
    pub(super) fn new(seed: u64) -> Result<Self> {
        let built = shell::program("lowrank-compress", &["lowrank-cli/failpoints"])?;
        let folder = shell::target().join("torture");
        let work = folder.join("work");
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir_all(&work)?;
        let tool = folder.join("lowrank-compress");
        fs::copy(built, &tool)?;
        let none = Course { places: 0, takes: Duration::ZERO };
        let mut bench = Self {
            tool,
            work,
            dice: Dice(seed),
            warm_reference: Files::new(),
            cold_reference: Files::new(),
            warm: none,
            cold: none,
            measuring_places: 0,
        };
        let (first, second, reference) = bench.undisturbed_twice(Cache::Cold)?;
        const OPENING: u64 = 8;
        bench.measuring_places = first.places - second.places + OPENING;
        (bench.cold, bench.cold_reference) = (first, reference);
        let (_, second, reference) = bench.undisturbed_twice(Cache::Warm)?;
        (bench.warm, bench.warm_reference) = (second, reference);
        Ok(bench)
    }

    /// Runs with an empty and with a full cache; both must give the same bytes.
    fn undisturbed_twice(&self, cache: Cache) -> Result<(Course, Course, Files)> {
        let out = self.work.join("undisturbed");
        let first = self.undisturbed(&out, cache)?;
        let reference = files(&out)?;
        fs::remove_dir_all(&out)?;
        let second = self.undisturbed(&out, cache)?;
        ensure!(files(&out)? == reference, "a cache changes the output");
        ensure!(second.places < first.places, "nothing was found in the cache");
        fs::remove_dir_all(&out)?;
        Ok((first, second, reference))
    }

    fn undisturbed(&self, out: &Path, cache: Cache) -> Result<Course> {
        let start = Instant::now();
        let model = bundled_model();
        let run = Run::new(&model, out, cache).failing("count:0".into());
        let end = self.wait(self.start(run)?)?;
        ensure!(end.code == 0, "the undisturbed run failed: {}", end.stderr);
        let counted = end.stderr.lines().find_map(|line| line.strip_prefix("fail points: "));
        let places = counted.context("the tool was built without fail points")?.parse()?;
        Ok(Course { places, takes: start.elapsed() })
    }

    pub(super) fn course(&self, cache: Cache) -> Course {
        match cache {
            Cache::Warm => self.warm,
            Cache::Cold => self.cold,
        }
    }

    fn cache_dir(&self, cache: Cache) -> PathBuf {
        self.work.join(match cache {
            Cache::Warm => "warm",
            Cache::Cold => "cold",
        })
    }

    fn stderr_of(&self, out: &Path) -> PathBuf {
        self.work.join(out.file_name().unwrap_or_default()).with_extension("stderr")
    }

    fn command(&self, run: &Run<'_>) -> Result<Command> {
        let mut command = Command::new(&self.tool);
        command.args(["--budget", "21.412%", "--workers", &run.workers.to_string()]);
        command.args(run.cache.words());
        command.arg("--cache").arg(self.cache_dir(run.cache));
        command.arg("--model").arg(run.model).arg("--out").arg(run.out);
        command.env("LOWRANK_FAILPOINT", &run.failpoint);
        command.stdout(Stdio::null()).stderr(File::create(self.stderr_of(run.out))?);
        Ok(command)
    }

    pub(super) fn start(&self, run: Run<'_>) -> Result<Started> {
        Ok(Started { child: self.command(&run)?.spawn()?, stderr: self.stderr_of(run.out) })
    }

    /// Runs as another user; `None` if that user cannot access the tool.
    pub(super) fn start_as(&self, user: u32, run: Run<'_>) -> Result<Option<Started>> {
        let child = self.command(&run)?.uid(user).spawn();
        Ok(child.ok().map(|child| Started { child, stderr: self.stderr_of(run.out) }))
    }

    pub(super) fn wait(&self, mut run: Started) -> Result<End> {
        let start = Instant::now();
        let status = loop {
            match run.child.try_wait()? {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    run.child.kill()?;
                    bail!("a run hangs");
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        Ok(End { code, stderr: fs::read_to_string(run.stderr)? })
    }

    /// Checks that the output equals the reference and that nothing is left beside it.
    pub(super) fn is_reference(&self, out: &Path, cache: Cache) -> Result<()> {
        let made = files(out)?;
        let reference = match cache {
            Cache::Warm => &self.warm_reference,
            Cache::Cold => &self.cold_reference,
        };
        let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
        ensure!(names(&made) == names(reference), "other files: {:?}", names(&made));
        for (name, bytes) in reference {
            ensure!(&made[name] == bytes, "{name} differs from an undisturbed run");
        }
        Ok(())
    }

    /// Runs to the end, and resumes any unfinished work.
    pub(super) fn goes_on(&self, run: Run<'_>) -> Result<()> {
        let (out, cache) = (run.out, run.cache);
        let end = self.wait(self.start(run)?)?;
        ensure!(end.code == 0, "cannot go on: {}", end.stderr);
        self.is_reference(out, cache)?;
        ensure!(!partial(out).exists(), "the hidden folder stays after publication");
        Ok(())
    }

    /// Removes an output, its unfinished work, and the content of the cold cache.
    pub(super) fn forget(&self, out: &Path) -> Result<()> {
        for path in [out.to_owned(), partial(out), self.cache_dir(Cache::Cold)] {
            if path.exists() {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

/// A run in progress.
pub(super) struct Started {
    child: Child,
    stderr: PathBuf,
}

impl Started {
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no such process")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits until the run has stopped itself; false if it ended before.
    pub(super) fn has_stopped(&mut self) -> Result<bool> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.child.try_wait()?.is_some() {
                return Ok(false);
            }
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
            if stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')) {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.child.kill()?;
        bail!("a run neither stops nor ends")
    }
}

pub(super) fn partial(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.lowrank-partial"))
}
