//! Whole runs of the tool's library in this process: compressing, planning, and only reading and writing.

use anyhow::{Context, Result};
use lowrank_bench::meter::{Meter, Took, peak_resident_bytes, timed};
use lowrank_model::plan::Structures;
use lowrank_model::progress::Silent;
use lowrank_model::recipe::{
    ByteSize, CalibrationSettings, FactorSettings, Goal, MethodChoice, OutputSettings, Removal,
};
use lowrank_model::{Progress, Recipe, Storage};
use lowrank_pipeline::compress::{Request, compress};
use lowrank_pipeline::memory::{Demand, Holding};
use lowrank_pipeline::workers::{self, CachePlace, Resources};
use lowrank_pipeline::{Interrupt, planning};
use lowrank_reader::Checkpoint;
use lowrank_writer::Leftover;
use rustix::fs::Advice;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A run of `compress`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Compress {
    model: PathBuf,
    /// Must not exist; removed afterwards.
    out: PathBuf,
    /// Parameters to remove, in percent of all. 0 copies every tensor, which is only reading and writing.
    budget_percent: f64,
    workers: usize,
    /// As `--memory`; absent: as much as there is.
    #[serde(default)]
    memory_bytes: Option<u64>,
    cache: Option<PathBuf>,
    /// The default job on the bundled passage; absent: u·v without calibration.
    #[serde(default)]
    calibration: Option<Calibration>,
}

/// Numbers of tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Calibration {
    tokens: usize,
    sensitivity_tokens: usize,
    /// What plans may cut; absent: the default.
    #[serde(default)]
    structures: Option<Structures>,
}

impl Calibration {
    /// The default on the bundled passage, but for the tokens.
    fn settings(&self) -> CalibrationSettings {
        CalibrationSettings {
            calibration_tokens: self.tokens,
            sensitivity_tokens: Some(self.sensitivity_tokens),
            ..CalibrationSettings::default()
        }
    }
}

/// What a calibrated compression needs by its own count, with one worker and more.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Demanded {
    model: PathBuf,
    calibration: Calibration,
    /// Up to so many.
    workers: usize,
}

impl Demanded {
    pub(crate) fn run(&self) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut recipe = recipe(1.0, &checkpoint);
        recipe.calibration = self.calibration.settings();
        let demand = demand(&checkpoint, &recipe);
        let of = |workers: usize| {
            let peak = demand.peak(workers);
            let held = |holdings: &[Holding]| -> Vec<Value> {
                holdings.iter().map(|one| json!({ "what": one.what, "bytes": one.bytes })).collect()
            };
            json!({
                "workers": workers, "bytes": peak.bytes(workers), "stage": peak.name, "shared": held(&peak.shared),
                "per_worker": held(&peak.per_worker),
            })
        };
        Ok(Value::Array((1..=self.workers).map(of).collect()))
    }
}

fn demand(checkpoint: &Checkpoint, recipe: &Recipe) -> Demand {
    Demand::compress(checkpoint.config(), workers::widest(checkpoint, None), recipe)
}

/// A run of `plan`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    model: PathBuf,
    budget_percent: f64,
    cache: PathBuf,
}

/// Copies the files of a checkpoint sequentially and flushes them, as `dd` does.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stream {
    model: PathBuf,
    /// Removed afterwards.
    out: PathBuf,
}

/// Allocates memory and frees it, so that the next process gets it quickly: a virtual machine may have returned free memory
/// to its host, and getting it back costs more than a copy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Warm {
    bytes: usize,
}

impl Warm {
    pub(crate) fn run(&self) -> Result<Value> {
        let taken = std::hint::black_box(vec![1_u8; self.bytes]);
        Ok(json!({ "bytes": taken.len() }))
    }
}

fn recipe(budget_percent: f64, checkpoint: &Checkpoint) -> Recipe {
    let goal = if budget_percent > 0.0 {
        let remove = checkpoint.size().params as f64 * budget_percent / 100.0;
        Goal::Budget(Removal::Params(remove as u64))
    } else {
        Goal::Ranks(std::collections::BTreeMap::new())
    };
    let mut recipe = Recipe::new(goal);
    recipe.calibration = CalibrationSettings::off();
    recipe.factor = FactorSettings {
        storage: Some(Storage::Uv),
        method: MethodChoice::Exact,
        ..FactorSettings::default()
    };
    recipe.output = OutputSettings { max_shard_size: ByteSize(2_000_000_000) };
    recipe
}

/// Times of a run's stages. Time between two stages counts for the earlier one.
#[derive(Default)]
struct Stages(Mutex<Vec<(String, Meter)>>);

impl Stages {
    fn took(self) -> Result<Vec<Value>> {
        let begun = self.0.into_inner().expect("nobody panics");
        let since: Vec<Took> = begun.iter().map(|(_, meter)| meter.took()).collect::<Result<_>>()?;
        let after = |at: usize| since.get(at + 1).map_or((0.0, 0.0), |took| (took.cpu_s, took.wall_s));
        let stage = |(at, (name, _)): (usize, &(String, Meter))| {
            let (cpu_s, wall_s) = after(at);
            json!({ "stage": name, "took": { "cpu_s": since[at].cpu_s - cpu_s, "wall_s": since[at].wall_s - wall_s } })
        };
        Ok(begun.iter().enumerate().map(stage).collect())
    }
}

impl Progress for Stages {
    fn start(&self, stage: &str, _total: u64, _unit: &'static str) {
        // Without a clock there is nothing to record.
        let Ok(meter) = Meter::start() else { return };
        self.0.lock().expect("nobody panics").push((stage.to_owned(), meter));
    }

    fn advance(&self, _units: u64) {}

    fn finish(&self) {}

    fn note(&self, _text: &str) {}
}

impl Compress {
    pub(crate) fn run(&self) -> Result<Value> {
        evict(&self.model)?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut recipe = recipe(self.budget_percent, &checkpoint);
        if let Some(calibration) = &self.calibration {
            recipe.calibration = calibration.settings();
            recipe.plan.structures = calibration.structures;
            recipe.factor.storage = None;
        }
        let cache = self.cache.clone().map_or(CachePlace::Nowhere, CachePlace::At);
        let resources = Resources {
            workers: self.workers,
            memory_bytes: self.memory_bytes,
            cache,
            ..Resources::default()
        };
        let request = Request {
            model: "generated",
            out: &self.out,
            recipe: &recipe,
            resources: &resources,
            leftover: Leftover::Discard,
            interrupt: &Interrupt::default(),
            provenance: None,
        };
        // With the memory that was given, as many as the job takes.
        let demand = demand(&checkpoint, &recipe);
        let workers = self.memory_bytes.map_or(self.workers, |bytes| demand.workers(self.workers, bytes));
        let computed = demand.peak(workers).bytes(workers);
        let stages = Stages::default();
        let (done, took) = timed(|| Ok(compress(&checkpoint, request, &stages)?))?;
        let stages = stages.took()?;
        let peak = peak_resident_bytes()?;
        let manifest = self.out.join(lowrank_model::format::MANIFEST_FILE);
        let manifest = std::fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
        std::fs::remove_dir_all(&self.out)?;
        Ok(json!({
            "took": took, "peak_resident_bytes": peak, "workers": workers, "computed_bytes": computed, "written_bytes": done.published.bytes,
            "read_bytes": checkpoint.size().bytes, "factored": done.plan.ranks().len(), "stages": stages,
            // The manifest has a hash of every file of the output.
            "manifest": manifest,
        }))
    }
}

impl Plan {
    pub(crate) fn run(&self) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let recipe = recipe(self.budget_percent, &checkpoint);
        let resources = Resources { cache: CachePlace::At(self.cache.clone()), ..Resources::default() };
        let (_, took) = timed(|| {
            Ok(planning::plan(&checkpoint, "generated", &recipe, &resources, &Silent, &Interrupt::default())?)
        })?;
        Ok(json!({ "took": took }))
    }
}

impl Stream {
    pub(crate) fn run(&self) -> Result<Value> {
        const BLOCK_BYTES: usize = 4 << 20;
        evict(&self.model)?;
        let shards = shards(&self.model)?;
        let (bytes, took) = timed(|| {
            let mut block = vec![0; BLOCK_BYTES];
            let mut to = File::create(&self.out).with_context(|| self.out.display().to_string())?;
            let mut bytes = 0;
            for shard in &shards {
                let mut from = File::open(shard)?;
                loop {
                    let read = from.read(&mut block)?;
                    if read == 0 {
                        break;
                    }
                    to.write_all(&block[..read])?;
                    bytes += read;
                }
            }
            to.sync_all()?;
            Ok(bytes)
        })?;
        std::fs::remove_file(&self.out)?;
        Ok(json!({ "took": took, "bytes": bytes }))
    }
}

fn shards(model: &Path) -> Result<Vec<PathBuf>> {
    let checkpoint = Checkpoint::open(model)?;
    Ok(checkpoint.shards().iter().map(|shard| model.join(&shard.name)).collect())
}

/// Asks the system to drop the weights from the page cache, so that reading uses the disk.
fn evict(model: &Path) -> Result<()> {
    for shard in shards(model)? {
        let file = File::open(&shard)?;
        // Pages that are not on disk yet cannot be dropped.
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}
