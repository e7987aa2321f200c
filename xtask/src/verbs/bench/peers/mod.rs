//! `cargo xtask bench peers` runs published programs beside this project's own on the bundled models, with the same texts and
//! one evaluator (transformers), and writes `docs/research/peers.md`. On demand only: whoever runs it fetches the programs.
//!
//! No code of theirs is in this repository: the drivers in `tests/bench/peers` call their functions in clones that
//! `--sources` names. Each result is a file under `target/peers`, which later calls reuse.

mod page;
mod programs;
mod results;

use crate::python::{Transformers, python, python_with_package};
use crate::shell::{command, lowrank_compress, output, root};
use anyhow::{Context, Result, bail};
use programs::{Kind, PROGRAMS, Program, Published};
use results::{BUDGETS, CALIBRATION_TOKENS, MODELS, TEXTS, TOKENS, folder, result_file, stored};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with one clone per program; those that are missing are skipped, and how to get them is printed
    #[arg(long, value_name = "DIR")]
    sources: Option<PathBuf>,
    /// Run only programs whose key contains this, such as heapr or ours; may be repeated [default: all]
    #[arg(long = "peer", value_name = "TEXT")]
    peers: Vec<String>,
    /// Run only bundled models whose name contains this; may be repeated [default: all]
    #[arg(long = "model", value_name = "TEXT")]
    models: Vec<String>,
    /// Shares of the expert parameters to remove, in percent; the page shows 22.2 and 50
    #[arg(long, value_name = "PERCENT,...", value_delimiter = ',', default_values_t = BUDGETS)]
    budgets: Vec<f64>,
    /// Measure anew what was measured before
    #[arg(long)]
    again: bool,
    /// Use this build of lowrank-compress instead of building it
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Threads of every program
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// File to write [default: docs/research/peers.md]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(bad) = args.budgets.iter().find(|budget| !(0.0 < **budget && **budget < 100.0)) {
        bail!("--budgets: {bad} is no share in percent");
    }
    let chosen = |wanted: &[String], name: &str| {
        wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))
    };
    let programs: Vec<&Program> =
        PROGRAMS.iter().filter(|program| chosen(&args.peers, program.key)).collect();
    let models = MODELS.iter().map(|(model, _)| *model).filter(|model| chosen(&args.models, model));
    let work: Vec<(&str, f64, &Program)> = models
        .flat_map(|model| args.budgets.iter().map(move |&budget| (model, budget)))
        .flat_map(|(model, budget)| programs.iter().map(move |&program| (model, budget, program)))
        .collect();
    if work.is_empty() {
        bail!("--peer or --model matches nothing");
    }
    let bench = Bench::new(args, &programs)?;
    let mut failed = Vec::new();
    for (model, budget, program) in work {
        let file = result_file(model, program.key, budget);
        if !args.again && stored(&file)?.is_some_and(|result| result.get("failed").is_none()) {
            continue;
        }
        let started = Instant::now();
        let Some(found) = bench.measure(model, budget, program)? else { continue };
        let mut result = found.unwrap_or_else(|error| json!({ "failed": error }));
        if let Some(reason) = result["failed"].as_str() {
            failed.push(format!("{model}, {}, −{budget} %: {reason}", program.name));
        }
        result["date"] = output(command("date").args(["-u", "+%F"]))?.trim().into();
        result["seconds"] = started.elapsed().as_secs().into();
        std::fs::write(&file, serde_json::to_string_pretty(&result)? + "\n")?;
        eprintln!("{model}, {}, −{budget} %: {} s", program.name, result["seconds"]);
        // After every result: a run that is ended keeps those before.
        page::write(args.out.as_deref())?;
    }
    println!("{}", page::write(args.out.as_deref())?.display());
    for failure in &failed {
        println!("failed: {failure}");
    }
    if !failed.is_empty() {
        bail!(
            "{} programs stopped with an error; their messages are in {}",
            failed.len(),
            folder().display()
        );
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a Args,
    /// This project's program, and which one it is.
    ours: Option<(PathBuf, String)>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, programs: &[&Program]) -> Result<Self> {
        for (model, _) in MODELS {
            std::fs::create_dir_all(folder().join(model))?;
        }
        for program in programs {
            if let Kind::Published(published) = &program.kind {
                let sources = args.sources.as_deref().unwrap_or(Path::new("SOURCES"));
                if !args.sources.as_ref().is_some_and(|place| place.join(published.folder()).is_dir()) {
                    println!("{} is not there: {}", program.name, published.clone_command(sources));
                }
            }
        }
        // Another build may measure otherwise.
        let cache = folder().join("cache");
        let is_ours = |program: &&&Program| matches!(program.kind, Kind::Ours(_));
        if programs.iter().any(|program| is_ours(&program)) && cache.exists() {
            std::fs::remove_dir_all(cache)?;
        }
        let ours = match (programs.iter().find(is_ours), &args.program) {
            (None, _) => None,
            (Some(_), Some(program)) => Some((
                program.canonicalize().with_context(|| program.display().to_string())?,
                version(Some(program))?,
            )),
            (Some(_), None) => Some((lowrank_compress()?, version(None)?)),
        };
        Ok(Self { args, ours })
    }

    /// What the driver prints, or its error; nothing if the program is not there.
    fn measure(&self, model: &str, budget: f64, program: &Program) -> Result<Option<Result<Value, String>>> {
        let scratch = tempfile::tempdir_in(folder())?;
        match &program.kind {
            Kind::Ours(flags) => {
                let (tool, version) = self.ours.as_ref().context("our program was not built")?;
                let out = scratch.path().join("out");
                self.compress(tool, model, budget, flags, &out)?;
                let driver = python_with_package(Transformers::V4)?;
                let found =
                    self.drive(driver, "run_ours.py", &out, model, budget, program.key, scratch.path())?;
                Ok(Some(found.map(|mut result| {
                    result["version"] = version.as_str().into();
                    result
                })))
            }
            Kind::Published(published) => {
                let sources = self.args.sources.as_ref().map(|sources| sources.join(published.folder()));
                let Some(source) = sources.filter(|source| source.is_dir()) else { return Ok(None) };
                let source = source.canonicalize()?;
                let driver = python(Transformers::V4)?;
                let found = self.drive(
                    driver,
                    published.driver,
                    &source,
                    model,
                    budget,
                    program.key,
                    scratch.path(),
                )?;
                let version = commit(&source, published)?;
                Ok(Some(found.map(|mut result| {
                    result["version"] = version.into();
                    result
                })))
            }
        }
    }

    /// Writes a checkpoint with this project's program.
    fn compress(&self, tool: &Path, model: &str, budget: f64, flags: &str, out: &Path) -> Result<()> {
        let place = root().join("tests/fixtures").join(model);
        let original: Value =
            serde_json::from_str(&output(command(tool).arg("inspect").arg(&place).arg("--json"))?)?;
        let kinds = original["kinds"].as_array().into_iter().flatten();
        let experts = kinds.filter(|kind| kind["kind"] == "experts").find_map(|kind| kind["params"].as_u64());
        let wanted = experts.context("`inspect` counts no experts")? as f64 * budget / 100.0;
        let mut job = command(tool);
        job.env("RAYON_NUM_THREADS", self.args.threads.to_string());
        job.args(["--json", "--quiet", "--device", "cpu", "--workers", "1"]);
        job.args(["--budget", &format!("{}", wanted.ceil())]);
        job.arg("--model").arg(&place).arg("--calibrate").arg(calibration_text(model));
        job.args(["--calibration-tokens", &CALIBRATION_TOKENS.to_string()]);
        job.arg("--cache").arg(folder().join("cache")).args(flags.split_whitespace()).arg("--out").arg(out);
        output(&mut job)?;
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "each is one argument of the driver")]
    fn drive(
        &self,
        mut driver: Command,
        script: &str,
        source: &Path,
        model: &str,
        budget: f64,
        key: &str,
        scratch: &Path,
    ) -> Result<Result<Value, String>> {
        let threads = self.args.threads.to_string();
        driver.env("OMP_NUM_THREADS", &threads).env("MKL_NUM_THREADS", &threads).env("TQDM_DISABLE", "1");
        driver.arg(root().join("tests/bench/peers").join(script)).arg("--source").arg(source);
        driver.arg("--model").arg(root().join("tests/fixtures").join(model));
        driver.arg("--calibrate").arg(calibration_text(model));
        driver.args(["--calibration-tokens", &CALIBRATION_TOKENS.to_string()]);
        driver.args(["--budget", &format!("{}", budget / 100.0)]);
        for text in TEXTS {
            driver.arg("--text").arg(root().join("tests/fixtures/text").join(format!("{text}.txt")));
        }
        driver.args(["--evaluation-tokens", &TOKENS.to_string()]);
        driver.arg("--original").arg(folder().join(model).join("original.json"));
        driver.arg("--scratch").arg(scratch);
        let log = folder().join(model).join(format!("{key}-{budget}.log"));
        driver.stderr(Stdio::from(std::fs::File::create(&log)?));
        let done = driver.stdout(Stdio::piped()).spawn()?.wait_with_output()?;
        if done.status.success() {
            return Ok(Ok(serde_json::from_slice(&done.stdout)?));
        }
        let messages = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
        Ok(Err(messages.lines().next_back().unwrap_or("no message").to_owned()))
    }
}

/// What every program calibrates on.
fn calibration_text(model: &str) -> PathBuf {
    match model {
        // It differs from both evaluation texts, because the comparison must also hold for such a text.
        "second-mixtral" => root().join("tests/fixtures/text/shakespeare.txt"),
        _ => root().join("crates/lowrank-text/assets/calibration.txt"),
    }
}

/// The last commit that changed this project's program, or the hash of one that was given.
fn version(given: Option<&Path>) -> Result<String> {
    let sources = ["--", "crates", "Cargo.lock", "Cargo.toml"];
    let commit = output(command("git").args(["log", "-1", "--format=%h"]).args(sources))?;
    let changed = output(command("git").args(["status", "--porcelain"]).args(sources))?;
    Ok(match given {
        Some(_) => format!("a given build, beside commit {}", commit.trim()),
        None if changed.is_empty() => format!("commit {}", commit.trim()),
        None => format!("commit {} with changes that are not committed", commit.trim()),
    })
}

/// Which commit a clone is at, and whether it is the one that the driver was written for.
fn commit(source: &Path, published: &Published) -> Result<String> {
    let head = output(command("git").arg("-C").arg(source).args(["rev-parse", "HEAD"]))?;
    let changed =
        output(command("git").arg("-C").arg(source).args(["status", "--porcelain", "--untracked-files=no"]))?;
    let changed = if changed.is_empty() { "" } else { " with changes" };
    if head.trim() != published.commit {
        eprintln!("{}: its driver was written for {}", source.display(), published.commit);
    }
    Ok(format!("commit {}{changed}", head.trim().get(..12).unwrap_or_default()))
}
