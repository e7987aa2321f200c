//! The main job: plan, then factor every chosen matrix and copy everything else, then publish.

pub mod costs;
mod documents;
mod kept_factors;
mod request;
mod space;
mod tensors;
pub mod units;

use crate::base::InputHashes;
use crate::inspect::tell_left_out;
use crate::memory::Demand;
use crate::planning::{Subject, identity};
use crate::scratch::Scratch;
use crate::spectra::RunState;
use crate::workers::{self, Resources};
use crate::{CalibrationContext, CalibrationText, JobContext, PipelineError, base, planning};
use lowrank_compute::Algebra;
use lowrank_model::{Progress, RankPlan, Recipe};
use lowrank_reader::Checkpoint;
use lowrank_writer::report::{CalibrationReport, InputFile};
use lowrank_writer::{CheckpointWriter, JobKey, Published, StagingDir, check_out, check_space, held_bytes};
pub use request::Request;
use serde_json::{Value, json};
use space::bytes_at_most;
use std::path::Path;
use std::thread;
use tensors::Work;

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
    base::check_place(checkpoint, request.out)?;
    let parent =
        request.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let still_needed = bytes_at_most(checkpoint, request.recipe)?.saturating_sub(held_bytes(request.out));
    check_space(parent, still_needed)?;
    planning::refuse_early(checkpoint, request.recipe, progress)?;
    tell_left_out(checkpoint, progress);
    let algebra = request.resources.algebra()?;
    let dtype = workers::widest(checkpoint, request.recipe.factor.dtype);
    let demand = Demand::compress(checkpoint.config(), dtype, request.recipe);
    let pool = workers::pool(&demand, request.resources)?;
    let text = CalibrationText::read(checkpoint, request.recipe)?;
    let resolved = Subject::of(checkpoint).resolve(request.recipe);
    let job = described(checkpoint, &resolved, text.as_ref(), request.resources, &algebra);
    let job_key = |files: &[InputFile]| JobKey::of(&json!({ "job": job, "files": files }));
    let request = Request { recipe: &resolved, ..request };
    let mut known = None;
    let staging = StagingDir::for_job(request.out, request.leftover, || {
        let base = base::identify(checkpoint, request.model, &pool, progress, request.interrupt)?;
        Ok::<_, PipelineError>(job_key(&known.insert(base).files))
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
                let name = move |files: &[_]| Ok(naming.job(&job_key(files))?);
                let threads = pool.current_num_threads();
                InputHashes::begin(scope, checkpoint, threads, progress, request.interrupt, name)
            }
        };
        let scratch = Scratch::new(parent, still_needed);
        let Request { resources, interrupt, .. } = request;
        let context = JobContext { resources, pool: &pool, progress, interrupt };
        let structures = request.recipe.measured_structures();
        let calibration = CalibrationContext::new(checkpoint, &inputs, text, structures, algebra, context);
        compress_in(staging, checkpoint, calibration, &inputs, scratch.as_ref(), (request, &job), context)
    })
}

/// Everything that decides the bytes of the tensors, beside the shards. The rest of the output is made anew at the end of every run.
fn described(
    checkpoint: &Checkpoint,
    resolved: &Recipe,
    text: Option<&CalibrationText>,
    resources: &Resources,
    algebra: &Algebra,
) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "config": checkpoint.config_json(),
        "recipe": identity(resolved, text),
        "device": resources.device,
        "algebra": algebra.identity(),
    })
}

/// The work itself, which an error leaves where it can be gone on with, or removes.
fn compress_in(
    mut staging: StagingDir,
    checkpoint: &Checkpoint,
    calibration: Result<CalibrationContext<'_>, PipelineError>,
    inputs: &InputHashes<'_>,
    scratch: Option<&Scratch>,
    (request, job): (Request<'_>, &Value),
    context: JobContext<'_>,
) -> Result<Compressed, PipelineError> {
    let JobContext { pool, progress, .. } = context;
    let state = RunState { staging: Some(&staging), scratch, interrupt: request.interrupt };
    let planned = calibration.and_then(|calibration| {
        let plan = planning::plan_through(checkpoint, &calibration, request.recipe, context, state)?;
        Ok((calibration, plan))
    });
    let (calibration, planned) = match planned {
        Ok(planned) => planned,
        Err(error) => {
            let partial = staging.resumable().map(Path::to_owned);
            if settle(&error, partial.as_deref(), progress) == Settled::Discard {
                staging.discard();
            }
            return Err(error);
        }
    };
    let work = Work::new(checkpoint, &planned, scratch, &calibration, (request, job));
    let plan = &planned.plan;
    let partial = staging.resumable().map(Path::to_owned);
    let layout = match work.layout() {
        Ok(layout) => layout,
        Err(error) => {
            if settle(&error, partial.as_deref(), progress) == Settled::Discard {
                staging.discard();
            }
            return Err(error);
        }
    };
    let mut writer =
        CheckpointWriter::grow(staging, layout).map_err(PipelineError::from).inspect_err(|error| {
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
    calibration.note_substituted(progress);
    progress.start("publish", 1, "directory");
    let partial = writer.resumable().map(Path::to_owned);
    let published =
        pool.install(|| writer.finish(documents)).map_err(PipelineError::from).inspect_err(|error| {
            settle(error, partial.as_deref(), progress);
        })?;
    progress.finish();
    let calibration = calibration.report(plan.sensitivities.as_deref());
    Ok(Compressed { plan: planned.plan, calibration, published })
}

#[derive(Debug, PartialEq, Eq)]
enum Settled {
    Keep,
    Discard,
}

/// After a failure: is the finished work worth keeping? If so, says where it is.
fn settle(error: &PipelineError, partial: Option<&Path>, progress: &dyn Progress) -> Settled {
    if !error.kind().is_passing() {
        return Settled::Discard;
    }
    if let Some(partial) = partial {
        progress.note(&format!(
            "finished work is kept in {}; run the same command again to resume",
            partial.display()
        ));
    }
    Settled::Keep
}
