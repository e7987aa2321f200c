//! The main job: plan, then factor every chosen matrix and copy everything else, then publish.

mod documents;
mod job_key;
mod space;
mod tensors;

use crate::base::InputHashes;
use crate::memory::Demand;
use crate::scratch::Scratch;
use crate::spectra::Course;
use crate::workers::{self, Resources};
use crate::{CalibrationText, FactorSettings, Interrupt, Lens, PipelineError, PlanSettings, base, planning};
use job_key::{job, job_key};
use lowrank_compute::{Algebra, Substituted};
use lowrank_model::{Progress, RankPlan};
use lowrank_reader::Checkpoint;
use lowrank_writer::report::{BaseModel, CalibrationReport};
use lowrank_writer::{CheckpointWriter, Leftover, Published, StagingDir, check_out, check_space, held_bytes};
use space::bytes_at_most;
use std::path::Path;
use std::thread;
use tensors::Work;

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
    let calibration = request.plan.calibration.as_ref();
    let dtype = workers::widest(checkpoint, request.plan.factor_dtype);
    let demand = Demand::compress(checkpoint.config(), dtype, calibration);
    let pool = workers::pool(&demand, request.resources)?;
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
