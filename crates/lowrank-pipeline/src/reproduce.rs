//! `reproduce`: makes an output again from its own metadata and compares every file; or, quickly, a few matrices.
//!
//! Everything that decided the bytes is in `lowrank_report.json`: the base's hashes, the budget or the ranks, the
//! settings. The second run grows beside the first, and is removed when it has been compared.

mod compare;

pub use compare::Difference;

use crate::base::InputHashes;
use crate::compress::{self, Request};
use crate::memory::Demand;
use crate::narrow;
use crate::planning::Subject;
use crate::propagate::Propagation as Propagated;
use crate::shared_base::SharedBases;
use crate::stored::{FactorFormat, FactoredMatrix, Piece, pieces_of, svd_options};
use crate::workers::{self, Resources};
use crate::{CalibrationContext, CalibrationText, Interrupt, JobContext, PipelineError, base};
use compare::{Gap, compare, tensor_gap};
use lowrank_compute::Processor;
use lowrank_compute::blocks::matrix_shape;
use lowrank_forward::{Cpu, Engine};
use lowrank_model::names::Role;
use lowrank_model::plan::Structures;
use lowrank_model::recipe::TextChoice;
use lowrank_model::{
    AlgebraChoice, Device, MatrixId, ModelConfig, Progress, Projection, Recipe, StoredMatrix, Tensor,
    failure, format,
};
use lowrank_reader::Checkpoint;
use lowrank_svd::{Metric, SvdOptions};
use lowrank_writer::report::{BaseModel, REPORT_VERSION};
use lowrank_writer::{CompressionReport, Leftover, Manifest};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
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
    pub texts: &'a [TextChoice],
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
    let report: CompressionReport = read_json(&report_path)?;
    if report.version != env!("CARGO_PKG_VERSION") {
        progress.note(&format!("{} was written by version {}", report_path.display(), report.version));
    }
    let recipe = &recipe_of(&report, &report_path, job.texts)?;
    let dtype = workers::widest(base, recipe.factor.dtype);
    let pool = workers::pool(&Demand::compress(base.config(), dtype, recipe), job.resources)?;
    let given = base::identify(base, job.model, &pool, progress, job.interrupt)?;
    let mut differences = inputs(&report.base_model, &given);
    let found = Manifest::of(job.out)?;
    differences.extend(against_own_manifest(job.out, &found));

    let resources = &resources_of(&report, job.resources);
    let algebra = resources.algebra()?;
    if algebra.identity() != report.algebra {
        progress.note(&format!(
            "matrices were decomposed by {}, and here by {}: expect differences of rounding",
            report.algebra,
            algebra.identity()
        ));
    }
    // Read before hours of work, so that another text is named at once.
    let text = CalibrationText::read(base, recipe)?;
    if let (Some(text), Some(recorded)) = (&text, &report.calibration)
        && text.blake3() != recorded.tokens_blake3
    {
        let names = names_of(&report);
        return Err(PipelineError::OtherTexts { path: report_path, names });
    }
    let (files, matrices) = match job.sample {
        Some(sample) => {
            let inputs = InputHashes::known(given.files, progress);
            let context = JobContext { resources, pool: &pool, progress, interrupt: job.interrupt };
            // Ranks and channels are those of the output: nothing is planned.
            let calibration =
                CalibrationContext::new(base, &inputs, text, Structures::Rank, algebra, context)?;
            let (factored, differing) =
                Sampled { base, recipe, job, calibration: &calibration }.run(sample, context)?;
            differences.extend(differing);
            (found.files.len(), factored)
        }
        None => {
            let again = Again::new(job.out);
            let request = Request {
                model: job.model,
                out: &again.0,
                recipe,
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
fn resources_of(report: &CompressionReport, given: &Resources) -> Resources {
    let device = match &report.calibration {
        Some(calibration) if calibration.engine != Cpu.describe() => Device::Cuda,
        _ => Device::Cpu,
    };
    let algebra =
        if report.algebra == Processor::Cpu.to_string() { AlgebraChoice::Cpu } else { AlgebraChoice::Cuda };
    Resources { device, algebra, ..given.clone() }
}

/// The texts that a run was calibrated on.
fn names_of(report: &CompressionReport) -> String {
    let texts = report.calibration.iter().flat_map(|calibration| &calibration.texts);
    texts.map(|text| text["source"].as_str().unwrap_or_default()).collect::<Vec<_>>().join(", ")
}

/// The recipe of a report, with the texts that were calibrated on where the machine has them.
fn recipe_of(report: &CompressionReport, path: &Path, texts: &[TextChoice]) -> Result<Recipe, PipelineError> {
    let unrepeatable = |what: String| PipelineError::Record { path: path.to_owned(), what };
    let Some(mut recipe) = report.recipe.clone().filter(|_| report.report_version == REPORT_VERSION) else {
        return Err(unrepeatable(format!(
            "`report_version` is {}, by lowrank-compress {}; this version reproduces {REPORT_VERSION} alone, so use that one",
            report.report_version, report.version
        )));
    };
    let named = &mut recipe.calibration.calibrate;
    if named.iter().any(|text| matches!(text, TextChoice::File(_))) {
        if texts.len() != named.len() {
            return Err(PipelineError::OtherTexts { path: path.to_owned(), names: names_of(report) });
        }
        *named = texts.to_vec();
    }
    Ok(recipe)
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

/// A few matrices that are made again.
struct Sampled<'a> {
    base: &'a Checkpoint,
    recipe: &'a Recipe,
    job: Reproduce<'a>,
    calibration: &'a CalibrationContext<'a>,
}

impl Sampled<'_> {
    /// How many there were, and how they differ.
    fn run(
        &self,
        sample: Sample,
        context: JobContext<'_>,
    ) -> Result<(usize, Vec<Difference>), PipelineError> {
        let &Self { base, recipe, job, calibration } = self;
        let JobContext { pool, progress, .. } = context;
        let out = Checkpoint::open(job.out)?;
        let Recipe { factor, goal, .. } = Subject::of(base).resolve(recipe);
        let format = |id| FactorFormat {
            config: out.config(),
            storage: factor.storage.unwrap_or_default(),
            dtype: factor.dtype.unwrap_or_else(|| base.matrix_dtype(id)),
            dense_dtype: base.matrix_dtype(id),
        };
        let kept = narrow::kept_of(&out)?;
        let is_made =
            |id: &MatrixId| out.ranks().contains_key(id) || kept.contains_key(&(id.layer, id.expert));
        let ids = draw(out.config(), out.config().matrices().filter(is_made), sample);
        let compared = |id: MatrixId, again: FactoredMatrix| -> Result<Vec<Difference>, PipelineError> {
            let was = pieces_of(out.config(), id, out.read_matrix(id)?);
            let pairs = was.into_iter().zip(again.pieces);
            let file = job.out.display().to_string();
            let differing = pairs.filter_map(|((tensor, was), (_, is))| {
                Some(piece_difference(&was, &is)?.of_tensor(&file, &tensor))
            });
            Ok(differing.collect())
        };
        let make = |id: MatrixId, matrix: Tensor, metric: &Metric<'_>, alone: bool| {
            // A spectrum decides precision, so it is taken where the first run had it.
            let spectrum = (alone && goal.is_budget())
                .then(|| {
                    let spectrum = calibration.algebra().run(matrix_shape(&matrix), |backend| {
                        let options = SvdOptions { metric: *metric, ..SvdOptions::default() };
                        lowrank_svd::spectrum(backend, &matrix, &options)
                    });
                    spectrum.0.map(|(spectrum, _)| spectrum)
                })
                .transpose()
                .map_err(|source| PipelineError::Svd { name: id, source })?;
            let Some(&rank) = out.ranks().get(&id) else { return format(id).dense(&matrix, id) };
            let options = svd_options(&factor, metric, spectrum.as_ref(), None);
            format(id).factor(calibration.algebra(), matrix, id, rank, options)
        };
        progress.start("make again", ids.len() as u64, "matrices");
        let fitted = match kept.is_empty() && out.config().shared_bases.is_empty() {
            true => calibration.propagating(),
            false => calibration.calibrated(),
        };
        let bases = SharedBases { checkpoint: base, config: out.config(), dtype: factor.dtype };
        let other_bases = other_bases(&out, bases, &ids)?;
        if let Some(calibrated) = fitted {
            let found = Mutex::new(Vec::new());
            let propagated = Propagated {
                checkpoint: base,
                algebra: calibration.algebra(),
                ranks: out.ranks(),
                kept: &kept,
                bases: &|layer| bases.of_layer(layer, &|projection| bases.tensor(layer, projection)),
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
            let found = found.into_iter().map(|(_, difference)| difference);
            return Ok((ids.len(), other_bases.into_iter().chain(found).collect()));
        }
        let found: Result<Vec<Vec<Difference>>, PipelineError> = pool.install(|| {
            ids.par_iter()
                .with_max_len(1)
                .map(|&id| {
                    job.interrupt.check()?;
                    let StoredMatrix::Dense(matrix) = base.read_matrix(id)? else {
                        return Err(PipelineError::AlreadyFactored(base.layout()));
                    };
                    let again = make(id, matrix, &calibration.norm(id)?.metric(), true)?;
                    progress.advance(1);
                    compared(id, again)
                })
                .collect()
        });
        progress.finish();
        Ok((ids.len(), found?.into_iter().flatten().collect()))
    }
}

/// How the bases that some matrices are made with differ from those of an output.
fn other_bases(
    out: &Checkpoint,
    bases: SharedBases<'_>,
    ids: &[MatrixId],
) -> Result<Vec<Difference>, PipelineError> {
    let with_base = ids.iter().filter(|&&id| out.config().has_base(id));
    let places: BTreeSet<(usize, Projection)> = with_base.map(|id| (id.layer, id.projection)).collect();
    let mut found = Vec::new();
    for (layer, projection) in places {
        let spec = out.config().tensor(Role::SharedBase { layer, projection });
        let gap = tensor_gap(&out.read_tensor(&spec)?, &bases.tensor(layer, projection)?);
        found.extend(gap.map(|gap| gap.of_tensor(&out.dir().display().to_string(), &spec.name)));
    }
    Ok(found)
}

/// The matrices whose hashes with the seed are smallest.
fn draw(config: &ModelConfig, ids: impl Iterator<Item = MatrixId>, sample: Sample) -> Vec<MatrixId> {
    let hash = |id| blake3::hash(format!("{} {}", sample.seed, config.module_name(id)).as_bytes());
    let mut keyed: Vec<_> = ids.map(|id| (*hash(id).as_bytes(), id)).collect();
    keyed.sort();
    keyed.into_iter().take(sample.count).map(|(_, id)| id).collect()
}
