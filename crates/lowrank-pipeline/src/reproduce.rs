//! `reproduce`: makes an output again from its own metadata and compares every file; or, quickly, a few matrices.
//!
//! Everything that decided the bytes is in `lowrank_report.json`: the base's hashes, the budget or the ranks, the
//! settings. The second run grows beside the first, and is removed when it has been compared.

mod compare;

pub use compare::Difference;

use crate::base::InputHashes;
use crate::compress::{self, Request};
use crate::memory::Demand;
use crate::propagate::Propagation as Propagated;
use crate::settings::pattern_of;
use crate::stored::{Form, Piece, Remade, pieces_of};
use crate::workers::{self, Resources};
use crate::{CalibrationText, FactorSettings, Goal, Interrupt, Lens, PipelineError, PlanSettings, base};
use compare::{Gap, compare, tensor_gap};
use lowrank_calibrate::{CalibrationSettings, GateWeight, MomentSettings, Propagation, Reach, Target};
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{AlgebraChoice, Processor};
use lowrank_forward::{Cpu, Device, Engine};
use lowrank_model::plan::Allocation;
use lowrank_model::{Budget, MatrixId, Progress, StoredMatrix, Tensor, Unit, failure, format};
use lowrank_reader::Checkpoint;
use lowrank_svd::{Metric, PrecisionChoice};
use lowrank_text::{Passage, TextSource};
use lowrank_writer::report::{BaseModel, CalibrationReport, Settings};
use lowrank_writer::{Leftover, Manifest, Report};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What to make again.
#[derive(Debug, Clone, Copy)]
pub struct Reproduce<'a> {
    /// The output under test.
    pub out: &'a Path,
    /// Its base, as the user named it.
    pub model: &'a str,
    /// Only so many factored matrices, drawn with a seed; `None`: everything.
    pub sample: Option<Sample>,
    /// The texts that were calibrated on, where they are not in the binary.
    pub texts: &'a [TextSource],
    /// Threads, memory and places.
    pub resources: &'a Resources,
    /// Asked before each unit.
    pub interrupt: &'a Interrupt,
}

/// A few matrices.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// How many.
    pub count: usize,
    /// Which.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Reproduction {
    /// Files compared byte by byte.
    pub files: usize,
    /// Matrices made again.
    pub matrices: usize,
    /// Empty: reproduced.
    pub differences: Vec<Difference>,
}

/// Makes it again and compares.
pub fn reproduce(
    base: &Checkpoint,
    job: Reproduce<'_>,
    progress: &dyn Progress,
) -> Result<Reproduction, PipelineError> {
    let report_path = job.out.join(format::REPORT_FILE);
    let report: Report = read_json(&report_path)?;
    if report.version != env!("CARGO_PKG_VERSION") {
        progress.note(&format!("{} was written by version {}", report_path.display(), report.version));
    }
    let plan = plan_settings(&report, &report_path, job.texts)?;
    let dtype = workers::widest(base, plan.factor_dtype);
    let pool =
        workers::pool(&Demand::compress(base.config(), dtype, plan.calibration.as_ref()), job.resources)?;
    let given = base::identify(base, job.model, &pool, progress, job.interrupt)?;
    let mut differences = inputs(&report.base_model, &given);
    let found = Manifest::of(job.out)?;
    differences.extend(against_own_manifest(job.out, &found));

    let resources = &resources_of(&report, job.resources);
    let algebra = resources.algebra()?;
    if algebra.identity() != report.settings.algebra {
        progress.note(&format!(
            "matrices were decomposed by {}, and here by {}: expect differences of rounding",
            report.settings.algebra,
            algebra.identity()
        ));
    }
    // Read before hours of work, so that another text is named at once.
    let text =
        plan.calibration.as_ref().map(|calibration| CalibrationText::read(base, calibration)).transpose()?;
    if let (Some(text), Some(recorded)) = (&text, &report.calibration)
        && text.blake3() != recorded.tokens_blake3
    {
        return Err(PipelineError::OtherTexts { path: report_path, names: names_of(recorded) });
    }
    let (files, matrices) = match job.sample {
        Some(sample) => {
            let inputs = InputHashes::known(given.files, progress);
            let lens = Lens::new(base, &inputs, text, algebra, resources, &pool, progress, job.interrupt)?;
            let remade = sampled(base, &report, job, sample, &lens, &pool, progress, &mut differences)?;
            (found.files.len(), remade)
        }
        None => {
            let again = Again::new(job.out);
            let factor = factor_settings(&report.settings, &report_path)?;
            let request = Request {
                model: job.model,
                out: &again.0,
                plan: &plan,
                factor: &factor,
                resources,
                leftover: Leftover::Discard,
                interrupt: job.interrupt,
                provenance: Some(&report.base_model),
            };
            let made = compress::compress(base, request, progress)?;
            differences.extend(compare(job.out, &found, &again.0)?);
            (found.files.len() + 1, made.plan.ranks().len())
        }
    };
    Ok(Reproduction { files, matrices, differences })
}

/// The second output, removed when it is of no more use.
struct Again(PathBuf);

impl Again {
    fn new(out: &Path) -> Self {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let again = Self(out.with_file_name(format!(".{name}.lowrank-reproduced")));
        again.remove();
        again
    }

    fn remove(&self) {
        // Absent is as good as removed; what stays for another reason is met, and named, when it is written to.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        self.remove();
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, PipelineError> {
    let bytes = fs::read(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            PipelineError::NotAnOutput { path: path.to_owned() }
        }
        _ => PipelineError::Io { path: path.to_owned(), source },
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|error| PipelineError::Record { path: path.to_owned(), what: error.to_string() })
}

/// What the first run calibrated on and decomposed with decides bits.
fn resources_of(report: &Report, given: &Resources) -> Resources {
    let device = match &report.calibration {
        Some(calibration) if calibration.engine != Cpu.describe() => Device::Cuda,
        _ => Device::Cpu,
    };
    let algebra = if report.settings.algebra == Processor::Cpu.to_string() {
        AlgebraChoice::Cpu
    } else {
        AlgebraChoice::Cuda
    };
    Resources { device, algebra, ..given.clone() }
}

fn source_of(text: &serde_json::Value) -> &str {
    text["source"].as_str().unwrap_or_default()
}

/// The texts that a run was calibrated on.
fn names_of(recorded: &CalibrationReport) -> String {
    recorded.texts.iter().map(source_of).collect::<Vec<_>>().join(", ")
}

fn calibration_settings(
    recorded: &CalibrationReport,
    path: &Path,
    texts: &[TextSource],
) -> Result<CalibrationSettings, PipelineError> {
    let unrepeatable = |what: String| PipelineError::Record { path: path.to_owned(), what };
    let bundled =
        |text: &serde_json::Value| text["bundled"] == true && source_of(text) == Passage::Calibration.name();
    let texts = if recorded.texts.iter().all(bundled) {
        vec![TextSource::Bundled(Passage::Calibration); recorded.texts.len()]
    } else if texts.len() == recorded.texts.len() {
        texts.to_vec()
    } else {
        return Err(PipelineError::OtherTexts { path: path.to_owned(), names: names_of(recorded) });
    };
    let unknown = |what: &str, value: &str| {
        unrepeatable(format!("calibration.{what} is `{value}`, which this version does not know"))
    };
    let gate_weight = GateWeight::parse(&recorded.gate_weight)
        .ok_or_else(|| unknown("gate_weight", &recorded.gate_weight))?;
    let reach = Reach::parse(&recorded.propagate).ok_or_else(|| unknown("propagate", &recorded.propagate))?;
    let target = Target::parse(&recorded.target).ok_or_else(|| unknown("target", &recorded.target))?;
    Ok(CalibrationSettings {
        texts,
        tokens: recorded.tokens,
        window: recorded.window,
        sensitivity_tokens: recorded.sensitivity_tokens,
        moments: MomentSettings { gate_weight, target },
        blend: recorded.blend,
        propagation: Propagation { reach, own_share: recorded.propagate_own_share },
    })
}

fn plan_settings(report: &Report, path: &Path, texts: &[TextSource]) -> Result<PlanSettings, PipelineError> {
    let Settings {
        sensitivity, allocation, rank_multiple, rank_min, keep_dense, fix_rank, factor_dtype, ..
    } = &report.settings;
    let goal = match report.budget {
        None => {
            let ranks = report.matrices.iter().filter_map(|row| Some((row.name, row.rank?)));
            Goal::Ranks(ranks.collect())
        }
        Some(budget) => Goal::Budget(match budget.unit {
            Unit::Params => Budget::RemoveParams(budget.asked),
            Unit::Bytes => Budget::TargetBytes(report.before.bytes.saturating_sub(budget.asked)),
        }),
    };
    let unrepeatable = |what: String| PipelineError::Record { path: path.to_owned(), what };
    let keep_dense: Result<Vec<_>, _> = keep_dense.iter().map(|text| pattern_of(text)).collect();
    let keep_dense = keep_dense.map_err(|error| unrepeatable(format!("settings.keep_dense: {error}")))?;
    let fixed_ranks: Result<Vec<_>, _> = fix_rank.iter().map(|text| text.parse()).collect();
    let fixed_ranks = fixed_ranks.map_err(|error| unrepeatable(format!("settings.fix_rank: {error}")))?;
    Ok(PlanSettings {
        goal,
        rank_multiple: Some((*rank_multiple).max(1)),
        rank_min: (*rank_min).max(1),
        sensitivity: Some(*sensitivity),
        allocation: Allocation::parse(allocation).ok_or_else(|| {
            unrepeatable(format!("settings.allocation is `{allocation}`, which this version does not know"))
        })?,
        calibration: report
            .calibration
            .as_ref()
            .map(|recorded| calibration_settings(recorded, path, texts))
            .transpose()?,
        keep_dense,
        fixed_ranks,
        factor_dtype: Some(*factor_dtype),
        storage: Some(report.storage),
    })
}

fn factor_settings(settings: &Settings, path: &Path) -> Result<FactorSettings, PipelineError> {
    let method =
        serde_json::from_value(settings.method.clone().into()).map_err(|_| PipelineError::Record {
            path: path.to_owned(),
            what: format!("settings.method is `{}`, which this version does not know", settings.method),
        })?;
    Ok(FactorSettings { method, seed: settings.seed, shard_bytes_max: settings.shard_bytes_max })
}

/// The base that was given against the base that the report names.
fn inputs(recorded: &BaseModel, given: &BaseModel) -> Vec<Difference> {
    let by_name = |base: &BaseModel| -> BTreeMap<String, (u64, String)> {
        base.files.iter().map(|file| (file.name.clone(), (file.bytes, file.sha256.clone()))).collect()
    };
    let (recorded, given) = (by_name(recorded), by_name(given));
    let names = recorded.keys().chain(given.keys()).collect::<std::collections::BTreeSet<_>>();
    let differs = |file: &String, what: String| Difference::of_file(&format!("base {file}"), what);
    names
        .into_iter()
        .filter_map(|name| match (recorded.get(name), given.get(name)) {
            (Some(recorded), Some(given)) if recorded == given => None,
            (Some((was, _)), Some((is, _))) => Some(differs(
                name,
                format!("is not the file that was compressed ({was} bytes then, {is} now)"),
            )),
            (Some(_), None) => Some(differs(name, "was compressed and is not there".into())),
            _ => Some(differs(name, "is there and was not compressed".into())),
        })
        .collect()
}

/// Files that changed since they were published. An output without a manifest is an older version's.
fn against_own_manifest(out: &Path, found: &Manifest) -> Vec<Difference> {
    let file = format::MANIFEST_FILE;
    let manifest: Manifest = match read_json(&out.join(file)) {
        Ok(manifest) => manifest,
        Err(error) => return vec![Difference::of_file(file, failure::chain(&error))],
    };
    let differs = |name: &str, what: &str| Difference::of_file(name, what.into());
    let mut differences = Vec::new();
    for listed in &manifest.files {
        match found.files.iter().find(|file| file.name == listed.name) {
            None => differences.push(differs(&listed.name, "is in the manifest and not there")),
            Some(file) if file != listed => {
                differences.push(differs(&listed.name, "changed since it was published, says the manifest"));
            }
            Some(_) => {}
        }
    }
    for file in &found.files {
        if !manifest.files.iter().any(|listed| listed.name == file.name) {
            differences.push(differs(&file.name, "is there and not in the manifest"));
        }
    }
    differences
}

fn piece_difference(was: &Piece, is: &Piece) -> Option<Gap> {
    match (was, is) {
        (Piece::Weights(was), Piece::Weights(is)) => tensor_gap(was, is),
        _ => (was != is).then(|| Gap { what: "other pivots".to_owned(), is_rounding: false }),
    }
}

/// Makes a few matrices again; returns how many.
fn sampled(
    base: &Checkpoint,
    report: &Report,
    job: Reproduce<'_>,
    sample: Sample,
    lens: &Lens<'_>,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    differences: &mut Vec<Difference>,
) -> Result<usize, PipelineError> {
    let out = Checkpoint::open(job.out)?;
    let factor = factor_settings(&report.settings, &job.out.join(format::REPORT_FILE))?;
    let form = Form { storage: report.storage, dtype: report.settings.factor_dtype };
    let ids = draw(out.ranks().keys().copied(), sample);
    let compared = |id: MatrixId, again: Remade| -> Result<Vec<Difference>, PipelineError> {
        let was = pieces_of(id, out.read_matrix(id)?);
        let pairs = was.into_iter().zip(again.pieces);
        let file = job.out.display().to_string();
        let differing = pairs.filter_map(|((tensor, was), (_, is))| {
            Some(piece_difference(&was, &is)?.of_tensor(&file, &tensor))
        });
        Ok(differing.collect())
    };
    let make = |id: MatrixId, matrix: Tensor, metric: &Metric<'_>, alone: bool| {
        // A spectrum decides precision, so it is taken where the first run had it.
        let spectrum = (alone && report.budget.is_some())
            .then(|| {
                let spectrum = lens.algebra().run(matrix_shape(&matrix), |backend| {
                    lowrank_svd::spectrum_in(backend, &matrix, metric, PrecisionChoice::Auto)
                });
                spectrum.0
            })
            .transpose()
            .map_err(|source| PipelineError::Svd { name: id, source })?;
        form.remake(lens.algebra(), matrix, id, out.ranks()[&id], metric, &factor, spectrum.as_ref(), None)
    };
    progress.start("make again", ids.len() as u64, "matrices");
    if let Some(calibrated) = lens.propagating() {
        let found = Mutex::new(Vec::new());
        let propagated = Propagated {
            checkpoint: base,
            algebra: lens.algebra(),
            ranks: out.ranks(),
            wanted: &|id| ids.contains(&id),
            // What is to be checked serves nothing.
            finished: &|_| Ok(None),
            make: &make,
            take: &|id, again, _| {
                let differing = compared(id, again)?;
                progress.advance(1);
                found.lock().expect("nobody panics").extend(differing.into_iter().map(|one| (id, one)));
                Ok(())
            },
            interrupt: job.interrupt,
        };
        pool.install(|| propagated.run(calibrated))?;
        progress.finish();
        let mut found = found.into_inner().expect("nobody panics");
        found.sort_by_key(|(id, _)| *id);
        differences.extend(found.into_iter().map(|(_, difference)| difference));
        return Ok(ids.len());
    }
    let found: Result<Vec<Vec<Difference>>, PipelineError> = pool.install(|| {
        ids.par_iter()
            .with_max_len(1)
            .map(|&id| {
                job.interrupt.check()?;
                let StoredMatrix::Dense(matrix) = base.read_matrix(id)? else {
                    return Err(PipelineError::AlreadyFactored(base.layout()));
                };
                let again = make(id, matrix, &lens.norm(id)?.metric(), true)?;
                progress.advance(1);
                compared(id, again)
            })
            .collect()
    });
    progress.finish();
    differences.extend(found?.into_iter().flatten());
    Ok(ids.len())
}

/// The matrices whose hashes with the seed are smallest.
fn draw(ids: impl Iterator<Item = MatrixId>, sample: Sample) -> Vec<MatrixId> {
    let mut keyed: Vec<_> =
        ids.map(|id| (*blake3::hash(format!("{} {id}", sample.seed).as_bytes()).as_bytes(), id)).collect();
    keyed.sort();
    keyed.into_iter().take(sample.count).map(|(_, id)| id).collect()
}
