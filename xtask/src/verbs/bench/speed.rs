//! `cargo xtask bench speed` measures the cost of one matrix in this tool and in other libraries, how whole runs scale, their
//! memory, and which resource limits them. Writes its part of `docs/benchmarks.md`, and a plot.
//!
//! Every measurement is a separate process. `target/bench/speed.json` holds the results part by part, so that one part can
//! be measured again and the document be written from all of them.

use super::document;
use super::synth::{Dimensions, build, job_built, write};
use crate::shell::{self, command, output, root, target};
use crate::{python, verbs};
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Use small matrices, to check that the benchmark still runs; changes no document
    #[arg(long)]
    pub(crate) small: bool,
    /// Measure only these parts, and take the others from the last run
    #[arg(long, value_enum)]
    pub(crate) only: Vec<Part>,
    /// Runs of each measurement; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeats: u32,
}

/// Parts that can be measured separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// One matrix, stage by stage
    Matrix,
    /// numpy, scipy and torch on the same matrix
    Peers,
    /// The same matrix through OpenBLAS instead of faer
    Lapack,
    /// Whole runs: one and two workers, one and four layers
    Workers,
    /// Only reading and writing
    Io,
    /// Plans from cached spectra
    Plan,
    /// Ranks alone and the calibrated default, on two numbers of tokens
    Calibrated,
    /// Whether calibrated runs stay below their memory limit, at three limits
    Memory,
}

const PARTS: [Part; 8] = [
    Part::Matrix,
    Part::Peers,
    Part::Lapack,
    Part::Workers,
    Part::Io,
    Part::Plan,
    Part::Calibrated,
    Part::Memory,
];

/// The matrix that is measured.
const MATRIX: &str = "model.layers.0.block_sparse_moe.experts.0.w1";
/// Share of all parameters that whole runs remove.
const BUDGET_PERCENT: f64 = 20.0;

/// Numbers of tokens for the calibrated default. The difference of the two times is the cost of tokens, the rest that of
/// matrices. Not fewer: second moments of 512 tokens have so small a rank that another plan comes of them.
const CALIBRATION_TOKENS: [u32; 2] = [2048, 8192];
const SENSITIVITY_TOKENS: u32 = 512;

/// Tokens of the runs whose memory is measured, for the moments and for the sensitivities: few, for what tokens hold is
/// counted exactly, and what matrices hold is what counts.
const MEMORY_TOKENS: [u32; 2] = [512, 256];
/// Share of all parameters that these runs remove: one factored matrix costs more than a minute.
const MEMORY_BUDGET_PERCENT: f64 = 5.0;
/// Between the least limit and the next.
const MEMORY_STEP_BYTES: u64 = 1 << 30;

/// Repeats of measurements that take a few seconds, because other programs may use memory and disk.
const IO_REPEATS_MIN: u32 = 7;

/// The checkpoints and settings of the benchmark.
struct Bench {
    small: bool,
    repeats: u32,
    folder: PathBuf,
    /// Checkpoint with few layers.
    one: PathBuf,
    /// Checkpoint with four times as many layers.
    four: PathBuf,
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    build(&[])?;
    let folder = target().join(if args.small { "bench/speed-small" } else { "bench/speed" });
    std::fs::create_dir_all(&folder)?;
    let bench = Bench {
        small: args.small,
        repeats: args.repeats,
        one: folder.join("one"),
        four: folder.join("four"),
        folder,
    };
    for (path, layers) in [(&bench.one, 1), (&bench.four, 4)] {
        if !path.exists() {
            write(bench.dimensions(layers), 0, path)?;
        }
    }
    let results_path = bench.folder.with_extension("json");
    let mut results: Map<String, Value> = match std::fs::read(&results_path) {
        Ok(bytes) if !args.only.is_empty() => serde_json::from_slice(&bytes)?,
        _ => Map::new(),
    };
    let parts = if args.only.is_empty() { &PARTS[..] } else { &args.only };
    for part in parts {
        let begun = Instant::now();
        let measured = match part {
            Part::Matrix => bench.matrix()?,
            Part::Peers => bench.peers()?,
            // A mere check does not build everything a second time.
            Part::Lapack if args.small => continue,
            Part::Lapack => bench.lapack()?,
            Part::Workers => bench.workers()?,
            Part::Io => bench.io()?,
            Part::Plan => bench.plan()?,
            Part::Calibrated => bench.calibrated()?,
            Part::Memory => bench.memory()?,
        };
        let name = format!("{part:?}").to_lowercase();
        eprintln!("{name}: {:.0} s", begun.elapsed().as_secs_f64());
        results.insert(name, measured);
        results.insert("conditions".into(), conditions()?);
        std::fs::write(&results_path, serde_json::to_vec_pretty(&results)?)?;
    }
    let results = Value::Object(results);
    if args.small {
        println!("{}", document::text(&results));
    } else {
        document::write(&results)?;
        println!(
            "docs/benchmarks.md and docs/benchmarks/speed.svg are written from {}",
            results_path.display()
        );
    }
    eprintln!("all: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

impl Bench {
    /// Two experts per layer give six matrices of full size, and leave time for three runs.
    fn dimensions(&self, layers: usize) -> Dimensions {
        let full = Dimensions { experts: 2, vocab_size: 1024, ..Dimensions::mixtral(layers) };
        if self.small { Dimensions { hidden_size: 256, intermediate_size: 896, ..full } } else { full }
    }

    /// The ranks of u·v and of pivoted storage with the same share of parameters.
    fn ranks(&self) -> (usize, usize) {
        if self.small { (155, 190) } else { (2479, 2952) }
    }

    fn repeated(&self, mut work: impl FnMut(u32) -> Result<Value>) -> Result<Value> {
        Ok(Value::Array((0..self.repeats).map(&mut work).collect::<Result<_>>()?))
    }

    fn one_matrix(&self, backend: &str, precision: &str, pivoted: bool) -> Result<Value> {
        let (uv, pivots) = self.ranks();
        self.repeated(|run| {
            let job = json!({
                "job": "matrix", "model": self.one, "matrix": MATRIX, "precision": precision, "backend": backend,
                "rank": if pivoted { pivots } else { uv }, "pivoted": pivoted, "out": self.folder.join("factors"),
                "compare": run == 0 && !pivoted && backend == "faer",
            });
            job_built(&job)
        })
    }

    fn matrix(&self) -> Result<Value> {
        let (rank, rank_pivoted) = self.ranks();
        let size = if self.small { 512 } else { 4096 };
        Ok(json!({
            "rank": rank,
            "rank_pivoted": rank_pivoted,
            "gemm": job_built(&json!({ "job": "gemm", "size": size }))?,
            "uv_f32": self.one_matrix("faer", "f32", false)?,
            "uv_f64": self.one_matrix("faer", "f64", false)?,
            "pivoted_f32": self.one_matrix("faer", "f32", true)?,
        }))
    }

    fn lapack(&self) -> Result<Value> {
        verbs::lapack::ensure_openblas()?;
        build(LAPACK)?;
        let measured = self.one_matrix("lapack", "f32", false);
        // Restore the build without the feature.
        build(&[])?;
        Ok(json!({ "uv_f32": measured? }))
    }

    fn peers(&self) -> Result<Value> {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let index = std::fs::read(self.one.join("model.safetensors.index.json"))?;
        let index: Value = serde_json::from_slice(&index)?;
        let tensor = format!("{MATRIX}.weight");
        let shard = index["weight_map"][&tensor].as_str().context("the matrix has no shard")?;
        let mut measured = Map::new();
        // A single thread does not wait for others, so its CPU seconds are a library's best.
        for (library, dtype, threads) in [
            ("scipy", "f32", 1),
            ("scipy", "f64", 1),
            ("scipy", "f32", all),
            ("scipy", "f64", all),
            ("numpy", "f32", all),
            ("torch", "f32", all),
        ] {
            let runs = self.repeated(|_| {
                let mut peer = python::with_peers()?;
                let script = root().join("tests/bench/peers.py");
                peer.arg(script).arg(self.one.join(shard));
                peer.args([&tensor, library, dtype, &threads.to_string()]);
                Ok(serde_json::from_str(&output(&mut peer)?)?)
            })?;
            measured.insert(format!("{library}_{dtype}_{threads}"), runs);
        }
        Ok(Value::Object(measured))
    }

    /// Where a run writes to; removes what a killed one left.
    fn fresh_out(&self) -> Result<PathBuf> {
        let out = self.folder.join("out");
        if out.exists() {
            std::fs::remove_dir_all(&out)?;
        }
        Ok(out)
    }

    fn compress(
        &self,
        model: &Path,
        workers: usize,
        budget_percent: f64,
        calibration: &Value,
    ) -> Result<Value> {
        job_built(&json!({
            "job": "compress", "model": model, "out": self.fresh_out()?, "budget_percent": budget_percent, "workers": workers,
            "calibration": calibration,
        }))
    }

    /// One run for each number of tokens: a run takes minutes, and only CPU seconds matter.
    fn calibrated(&self) -> Result<Value> {
        let run = |structures: Option<&str>, tokens: u32| {
            let calibration = json!({ "tokens": tokens, "sensitivity_tokens": SENSITIVITY_TOKENS, "structures": structures });
            let mut run = self.compress(&self.one, 1, BUDGET_PERCENT, &calibration)?;
            run["manifest"] = Value::Null;
            Ok::<_, anyhow::Error>(run)
        };
        let mut runs = Vec::new();
        for structures in [Some("rank"), None] {
            let [few, more] = CALIBRATION_TOKENS.map(|tokens| run(structures, tokens));
            runs.push(json!({ "structures": structures, "few": [few?], "more": [more?] }));
        }
        Ok(json!({ "tokens": CALIBRATION_TOKENS, "sensitivity_tokens": SENSITIVITY_TOKENS, "runs": runs }))
    }

    /// The least limit that works, some more, and what two workers need. Fails where a run takes more than its limit.
    fn memory(&self) -> Result<Value> {
        let [tokens, sensitivity_tokens] = MEMORY_TOKENS;
        let calibration = json!({ "tokens": tokens, "sensitivity_tokens": sensitivity_tokens });
        let demand = job_built(
            &json!({ "job": "demand", "model": self.one, "calibration": calibration, "workers": 2 }),
        )?;
        let needed = |at: usize| demand[at]["bytes"].as_u64().context("no bytes");
        let (one, two) = (needed(0)?, needed(1)?);
        let mut runs = Vec::new();
        for limit_bytes in [one, one + MEMORY_STEP_BYTES, two] {
            let job = json!({
                "job": "compress", "model": self.one, "out": self.fresh_out()?, "workers": 2, "calibration": calibration,
                "budget_percent": MEMORY_BUDGET_PERCENT, "memory_bytes": limit_bytes,
            });
            let mut run = job_built(&job)?;
            run["manifest"] = Value::Null;
            run["limit_bytes"] = limit_bytes.into();
            let peak = run["peak_resident_bytes"].as_u64().context("no peak")?;
            eprintln!(
                "limit {limit_bytes} bytes: {} workers, {} bytes counted, {peak} measured",
                run["workers"], run["computed_bytes"]
            );
            ensure!(
                peak <= limit_bytes,
                "a run took {peak} bytes of memory, and its limit was {limit_bytes}"
            );
            runs.push(run);
        }
        Ok(json!({ "tokens": MEMORY_TOKENS, "demand": demand, "runs": runs }))
    }

    /// Runs on four layers, whose factored matrices can be split evenly between two workers.
    fn workers(&self) -> Result<Value> {
        let [one, two] = [1, 2].map(|workers| {
            self.repeated(|_| {
                let mut run = self.compress(&self.four, workers, BUDGET_PERCENT, &Value::Null)?;
                // Only compared for equality, so a hash is enough instead of a hundred lines.
                run["manifest"] = blake(&run["manifest"]);
                Ok(run)
            })
        });
        let mut layer = self.compress(&self.one, 2, BUDGET_PERCENT, &Value::Null)?;
        layer["manifest"] = blake(&layer["manifest"]);
        Ok(json!({ "budget_percent": BUDGET_PERCENT, "one": one?, "two": two?, "one_layer": [layer] }))
    }

    /// Copying and streaming alternate, so that other load on the machine affects both.
    fn io(&self) -> Result<Value> {
        let out = self.folder.join("streamed");
        let (mut copied, mut streamed) = (Vec::new(), Vec::new());
        for _ in 0..self.repeats.max(IO_REPEATS_MIN) {
            self.warm()?;
            let mut run = self.compress(&self.four, 2, 0.0, &Value::Null)?;
            run["manifest"] = Value::Null;
            copied.push(run);
            self.warm()?;
            streamed.push(job_built(&json!({ "job": "stream", "model": self.four, "out": out }))?);
        }
        Ok(json!({ "copied": copied, "streamed": streamed }))
    }

    /// Allocates and frees as much memory as the run reads and writes.
    fn warm(&self) -> Result<()> {
        let bytes: u64 = if self.small { 64 << 20 } else { 9 << 30 };
        job_built(&json!({ "job": "warm", "bytes": bytes })).map(|_| ())
    }

    /// The first plan of a model computes its spectra. The matrices are small, because only their number matters afterwards.
    fn plan(&self) -> Result<Value> {
        let model = self.folder.join("many");
        if !model.exists() {
            let many = Dimensions {
                layers: 32,
                hidden_size: 128,
                intermediate_size: 448,
                experts: 8,
                vocab_size: 1024,
            };
            write(many, 0, &model)?;
        }
        let cache = self.folder.join("cache");
        if cache.exists() {
            std::fs::remove_dir_all(&cache)?;
        }
        let plan = |budget_percent: f64| {
            let job =
                json!({ "job": "plan", "model": model, "budget_percent": budget_percent, "cache": cache });
            job_built(&job)
        };
        // The tool hashes files again that were just written, because a change in the same instant would not be visible.
        std::thread::sleep(std::time::Duration::from_secs(3));
        let first = plan(10.0)?;
        let further = self.repeated(|run| plan(12.0 + f64::from(run)))?;
        Ok(json!({ "matrices": 768, "short_side": 128, "first": [first], "further": further }))
    }
}

const LAPACK: &[&str] = &["lowrank-bench/lapack"];

/// A hash that replaces a long text in a comparison.
fn blake(text: &Value) -> Value {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    text.as_str().unwrap_or_default().hash(&mut hasher);
    format!("{:016x}", hasher.finish()).into()
}

/// Machine, date and load.
fn conditions() -> Result<Value> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    Ok(json!({
        "cpu": model.trim_start_matches([' ', '\t', ':']),
        "avx512": flags.contains("avx512f"),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "memory_gib": kib.unwrap_or_default() as f64 / f64::from(1 << 20),
        "load": load.split(' ').next(),
        "date": shell::output(command("date").args(["-u", "+%F"]))?.trim(),
        "rustc": shell::output(command("rustc").arg("--version"))?.trim(),
    }))
}
