//! The main job: plan, then factor every chosen matrix and copy everything else, then publish.

use crate::base::InputHashes;
use crate::lens::Calibrated;
use crate::propagate::Propagation;
use crate::scratch::Scratch;
use crate::spectra::Course;
use crate::stored::{Form, Remade};
use crate::workers::{self, Resources};
use crate::{CalibrationText, FactorSettings, Interrupt, Lens, PipelineError, PlanSettings, base, planning};
use lowrank_compute::{Algebra, Processor, Substituted};
use lowrank_model::names::{Role, TensorSpec};
use lowrank_model::params::{index_bytes, stored_params};
use lowrank_model::{Budget, Dtype, MatrixId, Progress, RankPlan, Spectrum};
use lowrank_reader::{Checkpoint, StoredMatrix};
use lowrank_writer::report::{BaseModel, CalibrationReport, InputFile, Outcome, Settings};
use lowrank_writer::{
    Card, ChatTemplate, CheckpointWriter, Content, Documents, JobKey, Leftover, OutputTensor, Published,
    Report, ShardLayout, StagingDir, check_out, check_space, held_bytes,
};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

/// What to compress, how, and where to.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The model as it was named by the user; only a public name gets into the output.
    pub model: &'a str,
    /// Where the result appears; must not exist.
    pub out: &'a Path,
    /// How ranks are chosen.
    pub plan: &'a PlanSettings,
    /// How factors are computed and written.
    pub factor: &'a FactorSettings,
    /// Threads and memory.
    pub resources: &'a Resources,
    /// What to do with an earlier run's unfinished work.
    pub leftover: Leftover,
    /// Asked before each unit of work.
    pub interrupt: &'a Interrupt,
    /// Name and revision of the base, where they are known better than `model` says.
    pub provenance: Option<&'a BaseModel>,
}

/// What was done.
#[derive(Debug)]
pub struct Compressed {
    /// The ranks.
    pub plan: RankPlan,
    /// What the factors were fitted to, if to anything.
    pub calibration: Option<CalibrationReport>,
    /// What lies at the output now.
    pub published: Published,
}

/// Compresses a checkpoint.
pub fn compress(
    checkpoint: &Checkpoint,
    request: Request<'_>,
    progress: &dyn Progress,
) -> Result<Compressed, PipelineError> {
    // Everything that can be refused is refused before an hour is spent.
    check_out(request.out)?;
    let parent =
        request.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let still_needed = bytes_at_most(checkpoint, request.plan)?.saturating_sub(held_bytes(request.out));
    check_space(parent, still_needed)?;
    planning::refuse_early(checkpoint, request.plan)?;
    let algebra = request.resources.algebra()?;
    let pool = workers::pool(checkpoint.config(), request.resources)?;
    let calibration = request.plan.calibration.as_ref();
    let text = calibration.map(|calibration| CalibrationText::read(checkpoint, calibration)).transpose()?;
    let job = job(checkpoint, text.as_ref(), &algebra, &request);
    let mut known = None;
    let staging = StagingDir::for_job(request.out, request.leftover, || {
        let base = base::identify(checkpoint, request.model, &pool, progress, request.interrupt)?;
        Ok::<_, PipelineError>(job_key(&job, &known.insert(base).files))
    })?;
    if let Some(partial) = staging.resumable() {
        progress.note(&format!(
            "going on from {}: {} tensors are finished, and checked as they are met",
            partial.display(),
            staging.units_finished()
        ));
    }
    thread::scope(|scope| {
        let inputs = match known {
            Some(base) => InputHashes::known(base.files, progress),
            None => {
                let naming = staging.naming();
                let name = move |files: &[_]| Ok(naming.job(&job_key(&job, files))?);
                let threads = pool.current_num_threads();
                InputHashes::begin(scope, checkpoint, threads, progress, request.interrupt, name)
            }
        };
        let scratch = Scratch::new(parent, still_needed);
        let (resources, interrupt) = (request.resources, request.interrupt);
        let lens = Lens::new(checkpoint, &inputs, text, algebra, resources, &pool, progress, interrupt);
        compress_in(staging, checkpoint, lens, &inputs, scratch.as_ref(), request, &pool, progress)
    })
}

/// The work itself, which an error leaves where it can be gone on with, or removes.
fn compress_in(
    mut staging: StagingDir,
    checkpoint: &Checkpoint,
    lens: Result<Lens<'_>, PipelineError>,
    inputs: &InputHashes<'_>,
    scratch: Option<&Scratch>,
    request: Request<'_>,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
) -> Result<Compressed, PipelineError> {
    let course = Course { staging: Some(&staging), scratch, interrupt: request.interrupt };
    let planned = lens.and_then(|lens| {
        let plan = planning::plan_through(checkpoint, &lens, request.plan, pool, progress, course)?;
        Ok((lens, plan))
    });
    let (lens, planned) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            let partial = staging.resumable().map(Path::to_owned);
            if settle(&error, partial.as_deref(), progress) == Settled::Discard {
                staging.discard();
            }
            return Err(error);
        }
    };
    let plan = planned.plan;
    let work = Work {
        checkpoint,
        plan: &plan,
        ranks: plan.ranks(),
        optimum: plan.matrices.iter().map(|row| (row.name, row.relative_error)).collect(),
        spectra: &planned.spectra,
        scratch,
        lens: &lens,
        request,
    };
    let partial = staging.resumable().map(Path::to_owned);
    let mut writer = CheckpointWriter::grow(staging, work.layout()?)
        .map_err(PipelineError::from)
        .inspect_err(|error| {
            settle(error, partial.as_deref(), progress);
        })?;
    let documents = work
        .write_tensors(&writer, pool, progress)
        .and_then(|outcomes| work.documents(&outcomes, work.base_model(inputs.files()?)));
    let documents = match documents {
        Ok(documents) => documents,
        Err(error) => {
            let partial = writer.resumable().map(Path::to_owned);
            if settle(&error, partial.as_deref(), progress) == Settled::Discard {
                writer.discard();
            }
            return Err(error);
        }
    };
    say_substituted(lens.algebra(), progress);
    progress.start("publish", 1, "directory");
    let partial = writer.resumable().map(Path::to_owned);
    let published =
        pool.install(|| writer.finish(documents)).map_err(PipelineError::from).inspect_err(|error| {
            settle(error, partial.as_deref(), progress);
        })?;
    progress.finish();
    let calibration = lens.report(plan.sensitivities.as_deref());
    Ok(Compressed { plan, calibration, published })
}
/// How much the device left to the CPU.
pub(crate) fn say_substituted(algebra: &Algebra, progress: &dyn Progress) {
    let Substituted { times, first } = algebra.substituted();
    if let Some(first) = first {
        progress.note(&format!(
            "{times} decompositions were done by the CPU in place of the device, the first because: {first}"
        ));
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Settled {
    Keep,
    Discard,
}

/// After a failure: is the finished work worth keeping? If so, says where it is.
fn settle(error: &PipelineError, partial: Option<&Path>, progress: &dyn Progress) -> Settled {
    if !error.is_passing() {
        return Settled::Discard;
    }
    if let Some(partial) = partial {
        progress.note(&format!(
            "finished work is kept in {}; the same command goes on from there, --restart begins anew",
            partial.display()
        ));
    }
    Settled::Keep
}

/// Everything that decides the bytes of the tensors. The rest of the output is made anew at the end of every run.
fn job_key(job: &Value, files: &[InputFile]) -> JobKey {
    JobKey::of(&json!({ "job": job, "files": files }))
}

/// As far as it is known without a look at the weights.
fn job(
    checkpoint: &Checkpoint,
    text: Option<&CalibrationText>,
    algebra: &Algebra,
    request: &Request<'_>,
) -> Value {
    let Request { plan, factor, .. } = request;
    let goal = match &plan.goal {
        crate::Goal::Budget(budget) => json!({ "budget": format!("{budget:?}") }),
        crate::Goal::Ranks(ranks) => json!({ "ranks": ranks }),
        crate::Goal::Plan(plan) => json!({ "plan": plan }),
    };
    json!({
        "job": "compress",
        "version": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "config": checkpoint.config_json(),
        "goal": goal,
        "rank_multiple": plan.rank_multiple,
        "rank_min": plan.rank_min,
        "sensitivity": plan.sensitivity,
        "allocation": plan.allocation,
        "calibration": text.map(CalibrationText::key),
        "propagation": text.map(CalibrationText::propagation),
        "device": format!("{:?}", request.resources.device),
        "algebra": algebra.identity(),
        "keep_dense": plan.keep_dense.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "fix_rank": plan.fixed_ranks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "factor_dtype": plan.factor_dtype,
        "storage": plan.storage,
        "method": factor.method,
        "seed": factor.seed,
        "shard_bytes_max": factor.shard_bytes_max,
    })
}

/// An upper bound of the output's weights, known before any spectrum is: whatever stays of the expert matrices may be in
/// the wider of their dtype and the factors', and every matrix may be pivoted and have an index.
fn bytes_at_most(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<u64, PipelineError> {
    let before = checkpoint.size();
    let storage = match &settings.goal {
        crate::Goal::Plan(plan) => plan.cost.storage,
        _ => settings.storage.unwrap_or_default(),
    };
    let factor_bytes = settings.factor_dtype.map_or(0, Dtype::size_bytes);
    let (mut most, mut least_element) = (before.bytes, u64::MAX);
    for id in checkpoint.config().matrices() {
        let shape = checkpoint.config().matrix_shape(id.projection);
        let dense = checkpoint.matrix_dtype(id).size_bytes();
        let element = dense.max(factor_bytes);
        most +=
            stored_params(shape, storage, None) * (element - dense) + index_bytes(shape, storage, Some(1));
        least_element = least_element.min(element);
    }
    Ok(match &settings.goal {
        crate::Goal::Budget(Budget::TargetBytes(target)) => most.min(*target),
        crate::Goal::Budget(budget) => {
            let target = budget.resolve(before.params, before.bytes)?;
            most.saturating_sub(target.remove_at_least.saturating_mul(least_element))
        }
        // Not checked yet: it may say anything.
        crate::Goal::Plan(plan) => most.min(plan.after.bytes),
        crate::Goal::Ranks(_) => most,
    })
}

/// One compression under way.
struct Work<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a RankPlan,
    ranks: BTreeMap<MatrixId, usize>,
    /// Error of the best factors of the planned rank, where spectra are known.
    optimum: BTreeMap<MatrixId, Option<f64>>,
    spectra: &'a BTreeMap<MatrixId, Spectrum>,
    scratch: Option<&'a Scratch>,
    lens: &'a Lens<'a>,
    request: Request<'a>,
}

impl Work<'_> {
    fn factor_dtype(&self) -> Dtype {
        let first = self.plan.matrices[0].name;
        self.request.plan.factor_dtype.unwrap_or_else(|| self.checkpoint.matrix_dtype(first))
    }

    fn form(&self) -> Form {
        Form { storage: self.plan.cost.storage, dtype: self.factor_dtype() }
    }

    fn rank_of(&self, spec: &TensorSpec) -> Option<(MatrixId, usize)> {
        match spec.role {
            Role::Expert(id) => Some((id, *self.ranks.get(&id)?)),
            _ => None,
        }
    }

    fn stored_dtype(&self, spec: &TensorSpec) -> Dtype {
        match spec.role {
            Role::Expert(id) => self.checkpoint.matrix_dtype(id),
            _ => self.checkpoint.dtype(&spec.name).expect("validated when opened"),
        }
    }

    /// Every tensor of the output, in stored order.
    fn layout(&self) -> Result<ShardLayout, PipelineError> {
        let mut output = Vec::new();
        for spec in self.checkpoint.specs() {
            match self.rank_of(spec) {
                Some((id, r)) => {
                    let shape = self.checkpoint.config().matrix_shape(id.projection);
                    output.extend(self.form().output_tensors(id, shape, r));
                }
                None => output.push(OutputTensor {
                    name: spec.name.clone(),
                    dtype: self.stored_dtype(spec).into(),
                    shape: spec.shape.clone(),
                }),
            }
        }
        Ok(ShardLayout::new(output, self.request.factor.shard_bytes_max)?)
    }

    fn write_tensors(
        &self,
        writer: &CheckpointWriter,
        pool: &rayon::ThreadPool,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixId, Outcome>, PipelineError> {
        let fitted = self.lens.propagating();
        let specs: Vec<&TensorSpec> = self.checkpoint.specs().iter().collect();
        // Factors that are fitted to others come after, layer by layer.
        let (later, now): (Vec<&TensorSpec>, Vec<&TensorSpec>) =
            specs.into_iter().partition(|spec| fitted.is_some() && self.rank_of(spec).is_some());
        progress.start("factor and write", (now.len() + later.len()) as u64, "tensors");
        let outcomes: Result<Vec<Option<(MatrixId, Outcome)>>, PipelineError> = pool.install(|| {
            now.par_iter()
                .with_max_len(1)
                .map(|spec| {
                    self.request.interrupt.check()?;
                    let outcome = match self.rank_of(spec) {
                        None => self.copy(writer, spec).map(|()| None)?,
                        Some((id, rank)) => match writer.finished(&spec.name)? {
                            Some(note) => Some((id, outcome_of(note, id)?)),
                            None => Some((id, self.factor(writer, spec, id, rank)?)),
                        },
                    };
                    progress.advance(1);
                    Ok(outcome)
                })
                .collect()
        });
        let mut outcomes: BTreeMap<MatrixId, Outcome> = outcomes?.into_iter().flatten().collect();
        if let Some(calibrated) = fitted {
            outcomes.extend(self.fit_and_write(writer, calibrated, &later, pool, progress)?);
        }
        progress.finish();
        Ok(outcomes)
    }

    /// The factors that are fitted to what others make of the activations.
    fn fit_and_write(
        &self,
        writer: &CheckpointWriter,
        calibrated: &Calibrated,
        specs: &[&TensorSpec],
        pool: &rayon::ThreadPool,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixId, Outcome>, PipelineError> {
        let (mut finished, mut units) = (BTreeMap::new(), BTreeMap::new());
        for spec in specs {
            let Some((id, _)) = self.rank_of(spec) else { continue };
            match writer.finished(&spec.name)? {
                Some(note) => {
                    finished.insert(id, outcome_of(note, id)?);
                    progress.advance(1);
                }
                None => drop(units.insert(id, spec.name.as_str())),
            }
        }
        let outcomes = Mutex::new(finished);
        let shape_of = |id: MatrixId| self.checkpoint.config().matrix_shape(id.projection);
        let propagation = Propagation {
            checkpoint: self.checkpoint,
            algebra: self.lens.algebra(),
            ranks: &self.ranks,
            wanted: &|id| units.contains_key(&id),
            finished: &|id| match units.contains_key(&id) {
                true => Ok(None),
                false => self.form().written(writer, id, shape_of(id), self.ranks[&id]).map(Some),
            },
            make: &|id, matrix, metric, is_alone| {
                let spectrum = self.spectra.get(&id).filter(|_| is_alone);
                let (algebra, rank) = (self.lens.algebra(), self.ranks[&id]);
                self.form().remake(algebra, matrix, id, rank, metric, self.request.factor, spectrum, None)
            },
            take: &|id, remade, is_alone| {
                let optimum = self.optimum[&id].filter(|_| is_alone);
                let outcome = self.keep(writer, units[&id], remade, optimum)?;
                outcomes.lock().expect("nobody panics").insert(id, outcome);
                progress.advance(1);
                Ok(())
            },
            interrupt: self.request.interrupt,
        };
        pool.install(|| propagation.run(calibrated))?;
        Ok(outcomes.into_inner().expect("nobody panics"))
    }

    fn copy(&self, writer: &CheckpointWriter, spec: &TensorSpec) -> Result<(), PipelineError> {
        let mut copied = writer.begin(&spec.name, self.stored_dtype(spec).into(), &spec.shape)?;
        self.checkpoint.read_in_blocks(spec, &mut |block| Ok::<_, PipelineError>(copied.write(block)?))?;
        Ok(copied.finish()?)
    }

    fn factor(
        &self,
        writer: &CheckpointWriter,
        spec: &TensorSpec,
        id: MatrixId,
        rank: usize,
    ) -> Result<Outcome, PipelineError> {
        let StoredMatrix::Dense(matrix) = self.checkpoint.read_matrix(id)? else {
            return Err(PipelineError::AlreadyFactored(self.checkpoint.layout()));
        };
        self.checkpoint.check_finite(&format!("{id}.weight"), &matrix)?;
        let norm = self.lens.norm(id)?;
        let metric = norm.metric();
        let spectrum = self.spectra.get(&id);
        let algebra = self.lens.algebra();
        let kept = self.scratch.and_then(|scratch| scratch.take(id));
        let (form, settings) = (self.form(), self.request.factor);
        let remade = form.remake(algebra, matrix, id, rank, &metric, settings, spectrum, kept.as_ref())?;
        self.keep(writer, &spec.name, remade, self.optimum[&id])
    }

    /// Writes a factored matrix; `optimum` is the error of the best of its rank in the norm that it was fitted to.
    fn keep(
        &self,
        writer: &CheckpointWriter,
        unit: &str,
        remade: Remade,
        optimum: Option<f64>,
    ) -> Result<Outcome, PipelineError> {
        let Remade {
            pieces,
            route,
            processor,
            relative_error,
            calibrated_error,
            largest_coefficient,
            round_trip_error,
        } = remade;
        let outcome = Outcome {
            relative_error,
            calibrated_error,
            excess_over_optimum: excess(calibrated_error.unwrap_or(relative_error), optimum),
            route: match processor {
                Processor::Cpu => route.to_string(),
                Processor::Cuda => format!("{route}, {processor}"),
            },
            largest_coefficient,
            round_trip_error,
        };
        let contents: Vec<(&str, Content<'_>)> =
            pieces.iter().map(|(name, piece)| (name.as_str(), piece.content())).collect();
        let note = serde_json::to_string(&outcome).expect("plain numbers and text serialise");
        writer.write_unit(unit, &contents, note)?;
        Ok(outcome)
    }

    fn base_model(&self, files: &[InputFile]) -> BaseModel {
        let named = base::named(self.checkpoint, self.request.model, files.to_vec());
        match self.request.provenance {
            Some(BaseModel { id, revision, .. }) => {
                BaseModel { id: id.clone(), revision: revision.clone(), ..named }
            }
            None => named,
        }
    }

    fn documents(
        &self,
        outcomes: &BTreeMap<MatrixId, Outcome>,
        base_model: BaseModel,
    ) -> Result<Documents, PipelineError> {
        let checkpoint = self.checkpoint;
        let calibration = self.lens.report(self.plan.sensitivities.as_deref());
        let report = Report::new(self.plan, outcomes, base_model, self.settings(), calibration);
        let chat_template = ChatTemplate::find(|name| checkpoint.text(name));
        let own_card = checkpoint.text(lowrank_writer::documents::CARD_FILE).unwrap_or_default();
        let own_card = String::from_utf8_lossy(&own_card);
        let card = Card {
            base_model: report.base_model.id.as_deref(),
            license: lowrank_writer::card::license_of(&own_card),
            chat_template: chat_template.as_ref(),
        };
        let documents = Documents::factored(
            checkpoint.config_json(),
            &self.ranks,
            self.plan.cost.storage,
            self.factor_dtype(),
            &report,
            self.plan.spectra.as_ref(),
            &card,
        )?;
        Ok(documents.with_companions(checkpoint.dir(), &checkpoint.companions())?)
    }

    fn settings(&self) -> Settings {
        // The plan knows how it was made, so that a stored plan gives the same report as its budget did.
        let FactorSettings { method, seed, shard_bytes_max } = *self.request.factor;
        Settings {
            method: method.to_string(),
            precision: "auto".into(),
            seed,
            sensitivity: self.plan.optimality.map(|optimality| optimality.sensitivity).unwrap_or_default(),
            allocation: self.plan.allocation.as_str().into(),
            rank_multiple: self.plan.rank_multiple,
            rank_min: self.plan.rank_min,
            keep_dense: self.plan.keep_dense.clone(),
            fix_rank: self.plan.fix_rank.clone(),
            factor_dtype: self.factor_dtype(),
            shard_bytes_max,
            algebra: self.lens.algebra().identity(),
        }
    }
}

/// How far factors are from the best of their rank. Below f32's resolution both errors are rounding.
fn excess(relative_error: f64, optimum: Option<f64>) -> Option<f64> {
    let optimum = optimum.filter(|&optimum| optimum > f64::from(f32::EPSILON))?;
    Some((relative_error / optimum - 1.0).max(0.0))
}

/// What an earlier run found. Its journal's lines are hashed, so only another version could have written another form.
fn outcome_of(note: &str, id: MatrixId) -> Result<Outcome, PipelineError> {
    serde_json::from_str(note).map_err(|error| PipelineError::Unrepeatable {
        path: "journal".into(),
        what: format!("{id}: {error}; begin anew with --restart"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Goal;
    use lowrank_model::Storage;
    use lowrank_model::progress::Silent;
    use lowrank_svd::MethodChoice;

    #[test]
    fn the_room_asked_for_early_is_enough_and_hardly_more_than_is_taken() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let factor = FactorSettings { method: MethodChoice::Auto, seed: 0, shard_bytes_max: 1 << 30 };
        for (storage, dtype, goal) in [
            (Storage::Uv, None, Goal::Budget(Budget::RemoveParams(1_200_000))),
            (Storage::Pivoted, None, Goal::Budget(Budget::RemoveParams(1_200_000))),
            (Storage::Pivoted, Some(Dtype::F32), Goal::Budget(Budget::RemoveParams(1_200_000))),
            (Storage::Pivoted, None, Goal::Budget(Budget::TargetBytes(10_000_000))),
        ] {
            let plan = PlanSettings {
                goal,
                rank_multiple: None,
                rank_min: 1,
                sensitivity: None,
                allocation: Default::default(),
                calibration: None,
                keep_dense: Vec::new(),
                fixed_ranks: Vec::new(),
                storage: Some(storage),
                factor_dtype: dtype,
            };
            let asked = bytes_at_most(&checkpoint, &plan).unwrap();
            let out = folder.path().join("out");
            let request = Request {
                model: "tiny",
                out: &out,
                plan: &plan,
                factor: &factor,
                resources: &Resources { cache: workers::CachePlace::Nowhere, ..Resources::default() },
                leftover: Leftover::Resume,
                interrupt: &Interrupt::default(),
                provenance: None,
            };
            let taken = compress(&checkpoint, request, &Silent).unwrap().published.bytes;
            // Matrices that stay dense need no index and are not widened: 96 of them at most.
            let to_spare = asked.checked_sub(taken).expect("the early check asks for enough");
            let dense_in_f32 = if dtype.is_some() { 31 * 448 * 128 * 2 } else { 0 };
            assert!(
                to_spare <= 96 * 128 * 8 + dense_in_f32 + 4 * 576,
                "{storage} {dtype:?}: {asked} for {taken}"
            );
            std::fs::remove_dir_all(out).unwrap();
        }
    }
}
