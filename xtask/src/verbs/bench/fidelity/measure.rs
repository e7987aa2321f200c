//! Runs the tool for every method and budget, and collects the results of `verify`.

use super::methods::{BUNDLED, DEFAULT, How, METHODS, Method, When};
use crate::shell::{command, lowrank_compress, output, program, target};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Settings that are the same for every model.
pub(crate) struct Bench {
    tool: PathBuf,
    prune: PathBuf,
    folder: PathBuf,
    pub(crate) budgets: Vec<f64>,
    pub(crate) texts: Vec<PathBuf>,
    pub(crate) tokens: usize,
    pub(crate) calibration_tokens: usize,
    wanted: Wanted,
    started: Instant,
}

/// Which rows are measured.
pub(crate) struct Wanted {
    /// A few.
    pub(crate) small: bool,
    /// Those of each step from plain SVD to ranks alone, too.
    pub(crate) ablation: bool,
    /// If there are any: those whose names contain one of these.
    pub(crate) rows: Vec<String>,
}

/// A model and its calibration text; if absent, the bundled passage.
pub(crate) struct Subject {
    pub(crate) model: PathBuf,
    pub(crate) calibrate: Option<PathBuf>,
}

/// All figures of a model.
pub(crate) struct Measured {
    pub(crate) model: String,
    pub(crate) calibrated_on: String,
    pub(crate) expert_params: u64,
    pub(crate) params: u64,
    /// Perplexity of the original, by text.
    pub(crate) perplexities: Vec<f64>,
    /// By text: how much the text differs from the calibration text, as `verify` measures it.
    pub(crate) routing_distances: Vec<Option<f64>>,
    pub(crate) rows: Vec<Row>,
}

/// One method.
pub(crate) struct Row {
    pub(crate) method: Method,
    /// Results by budget.
    pub(crate) cells: Vec<Cell>,
}

/// One method at one budget.
pub(crate) struct Cell {
    /// Parameters, counted from the headers of both checkpoints.
    pub(crate) removed_params: u64,
    /// Results by text.
    pub(crate) scores: Vec<Score>,
}

/// Results on one text. Standard errors are over windows of tokens.
#[derive(Clone, Copy)]
pub(crate) struct Score {
    /// perplexity / original's − 1
    pub(crate) increase: (f64, f64),
    /// nats per token
    pub(crate) kl: (f64, f64),
    /// Share of positions with the same top-1 token.
    pub(crate) top1: (f64, f64),
    pub(crate) perplexity_original: f64,
    /// Absent without calibration.
    pub(crate) routing_distance: Option<f64>,
}

impl Bench {
    pub(crate) fn new(
        budgets: Vec<f64>,
        texts: Vec<PathBuf>,
        tokens: usize,
        calibration_tokens: usize,
        wanted: Wanted,
    ) -> Result<Self> {
        let tool = lowrank_compress()?;
        let prune = program("prune_experts", &[])?;
        let folder = target().join("fidelity");
        // Use a copy of this build, so that a rebuild during the benchmark changes nothing, and remove results of other builds.
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        let keep = |program: PathBuf| -> Result<PathBuf> {
            let kept = folder.join(program.file_name().context("a program has a name")?);
            std::fs::copy(program, &kept)?;
            Ok(kept)
        };
        let tool = keep(tool)?;
        let prune = keep(prune)?;
        let started = Instant::now();
        Ok(Self { tool, prune, folder, budgets, texts, tokens, calibration_tokens, wanted, started })
    }

    /// The flags that chose what is measured, as they are typed.
    pub(crate) fn flags(&self) -> String {
        let Wanted { small, ablation, rows } = &self.wanted;
        let rows = rows.iter().map(|row| format!(" --row \"{row}\""));
        let flags = [(*small, " --small"), (*ablation, " --ablation")];
        let flags = flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag.to_owned());
        flags.chain(rows).collect()
    }

    /// Whether a row is measured. That of the default always is.
    pub(crate) fn has(&self, method: &Method) -> bool {
        let Wanted { small, ablation, rows } = &self.wanted;
        if !rows.is_empty() {
            return method.name == DEFAULT || rows.iter().any(|part| method.name.contains(part.as_str()));
        }
        match method.when {
            When::Always => true,
            When::Whole | When::SharedExperts => !small,
            When::Ablation => *ablation,
        }
    }

    /// The folder of all files of the benchmark.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Seconds since the tool was built.
    pub(crate) fn seconds(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// All rows of a model.
    pub(crate) fn measure(&self, subject: &Subject) -> Result<Measured> {
        let inspected = json(command(&self.tool).arg("inspect").arg(&subject.model).arg("--json"))?;
        let params_of = |wanted: &str| {
            let kinds = inspected["kinds"].as_array().into_iter().flatten();
            kinds.filter(|kind| kind["kind"] == wanted).find_map(|kind| kind["params"].as_u64())
        };
        let expert_params = params_of("experts").context("`inspect` counts no experts")?;
        let has_shared = params_of("shared experts").is_some();
        let can = |method: &Method| has_shared || method.when != When::SharedExperts;
        let methods: Vec<Method> =
            METHODS.into_iter().filter(|method| self.has(method) && can(method)).collect();
        // These run one after another, so that each measurement is made once; the others find it in the cache.
        for method in &methods {
            if method.how != How::Pruned {
                let mut plan = self.job(subject, method, expert_params, self.budgets[0]);
                plan.arg("--dry-run").arg("--plan-out").arg(self.folder.join("plan.json"));
                json(&mut plan)?;
            }
        }
        let work: Vec<(usize, usize)> = (0..methods.len())
            .flat_map(|row| (0..self.budgets.len()).map(move |budget| (row, budget)))
            .collect();
        let cells = self.in_parallel(&work, |&(row, budget)| {
            let method = &methods[row];
            self.cell(subject, method, expert_params, self.budgets[budget])
                .with_context(|| format!("{} at {} %", method.name, self.budgets[budget]))
        })?;
        let mut cells = cells.into_iter();
        let rows: Vec<Row> = methods
            .iter()
            .map(|&method| Row { method, cells: cells.by_ref().take(self.budgets.len()).collect() })
            .collect();
        let scores =
            &rows.iter().find(|row| row.method.name == DEFAULT).context("no default")?.cells[0].scores;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Measured {
            model: name(&subject.model),
            calibrated_on: subject.calibrate.as_deref().map_or(BUNDLED.into(), name),
            expert_params,
            params: inspected["params"].as_u64().context("`inspect` counts nothing")?,
            routing_distances: scores.iter().map(|score| score.routing_distance).collect(),
            perplexities: scores.iter().map(|score| score.perplexity_original).collect(),
            rows,
        })
    }

    /// Runs as many processes at once as there are cores, with one thread each: small matrices do not occupy more threads.
    fn in_parallel<T: Sync, R: Send>(
        &self,
        work: &[T],
        act: impl Fn(&T) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..cores {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = work.get(at) else { return };
                        let result = act(item);
                        let failed = result.is_err();
                        done.lock().expect("nobody panics").push((at, result));
                        eprintln!("{:>5} s  {} of {}", self.seconds(), at + 1, work.len());
                        if failed {
                            next.store(work.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut done = done.into_inner().expect("nobody panics");
        done.sort_by_key(|(at, _)| *at);
        done.into_iter().map(|(_, result)| result).collect()
    }

    /// The command line of `compress` up to `--out`.
    fn job(&self, subject: &Subject, method: &Method, expert_params: u64, budget: f64) -> Command {
        let mut job = command(&self.tool);
        let wanted = (expert_params as f64 * budget / 100.0).ceil();
        job.args(["--json", "--quiet", "--device", "cpu", "--budget", &format!("{wanted}"), "--model"]);
        job.arg(&subject.model).arg("--cache").arg(self.folder.join("cache"));
        let flags = match method.how {
            How::DataFree(flags) => {
                job.args(["--calibrate", "none"]);
                flags
            }
            How::Calibrated(flags) => {
                if let Some(text) = &subject.calibrate {
                    job.arg("--calibrate").arg(text);
                }
                job.args(["--calibration-tokens", &self.calibration_tokens.to_string()]);
                flags
            }
            How::Pruned => unreachable!("the tool prunes nothing"),
        };
        job.args(flags.split_whitespace());
        job
    }

    fn cell(&self, subject: &Subject, method: &Method, expert_params: u64, budget: f64) -> Result<Cell> {
        let place = tempfile::tempdir_in(&self.folder)?;
        let out = place.path().join("out");
        if method.how == How::Pruned {
            return self.pruned(subject, budget, &out);
        }
        let mut job = self.job(subject, method, expert_params, budget);
        json(job.args(["--workers", "1", "--out"]).arg(&out))?;
        let mut removed_params = 0;
        let mut scores = Vec::new();
        for text in &self.texts {
            let mut verify = command(&self.tool);
            verify.env("RAYON_NUM_THREADS", "1");
            verify.args(["verify", "--json", "--quiet", "--device", "cpu", "--original"]);
            verify.arg(&subject.model).arg("--compressed").arg(&out).arg("--text").arg(text);
            let verdict = json(verify.args(["--max-tokens", &self.tokens.to_string()]))?;
            let params = |side: &str| verdict["files"][side]["params"].as_u64().context("no count");
            removed_params = params("original")? - params("compressed")?;
            let routing_distance = verdict["outcome"]["routing_distance"].as_f64();
            scores.push(Score { routing_distance, ..score(&verdict["outcome"]["logits"])? });
        }
        Ok(Cell { removed_params, scores })
    }

    fn pruned(&self, subject: &Subject, budget: f64, out: &Path) -> Result<Cell> {
        let mut prune = command(&self.prune);
        prune.env("RAYON_NUM_THREADS", "1").arg(&subject.model).arg(out).arg((budget / 100.0).to_string());
        prune.arg(subject.calibrate.as_deref().unwrap_or(Path::new("bundled")));
        prune.args([&self.calibration_tokens.to_string(), &self.tokens.to_string()]).args(&self.texts);
        let found = json(&mut prune)?;
        let removed_params = found["removed_params"].as_u64().context("no count")?;
        let texts = found["logits"].as_array().context("no logits")?;
        Ok(Cell { removed_params, scores: texts.iter().map(score).collect::<Result<_>>()? })
    }
}

fn score(logits: &Value) -> Result<Score> {
    let number = |key: &str| logits[key].as_f64().with_context(|| format!("no `{key}`"));
    let with_error = |key: &str, error: &str| Ok::<_, anyhow::Error>((number(key)?, number(error)?));
    let ratio = with_error("perplexity_ratio", "perplexity_ratio_error")?;
    Ok(Score {
        increase: (ratio.0 - 1.0, ratio.1),
        kl: with_error("mean_kl", "mean_kl_error")?,
        top1: with_error("top1_agreement", "top1_error")?,
        perplexity_original: number("perplexity_original")?,
        routing_distance: None,
    })
}

/// The stdout of a command.
fn json(command: &mut Command) -> Result<Value> {
    Ok(serde_json::from_str(&output(command)?)?)
}
