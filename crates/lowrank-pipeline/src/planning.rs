//! From a wish to a [`RankPlan`]: spectra and allocation for a budget, a check for ranks that were given.

use crate::compress::say_substituted;
use crate::spectra::{Course, spectra};
use crate::workers::{self, Resources};
use crate::{CalibrationText, Goal, Interrupt, Lens, PipelineError, PlanSettings, base};
use lowrank_calibrate::Sensitivities;
use lowrank_model::plan::{Allocation, LayerSensitivity, Sensitivity};
use lowrank_model::{
    Budget, CostModel, MatrixId, Progress, Projection, RankPlan, Spectrum, SpectrumCurves, Unit,
};
use lowrank_reader::Checkpoint;
use lowrank_svd::allocate::{AllocationRequest, Candidate, allocate, check, plan_from_ranks, uniform_plan};
use lowrank_writer::report::BaseModel;
use std::collections::{BTreeMap, BTreeSet};

/// Short sides from here on belong to models whose matrices are multiplied on tensor cores.
const TRUE_SIZE: usize = 1024;
/// What tensor cores like.
const RANK_MULTIPLE_TRUE_SIZE: usize = 8;

/// A plan, and what it was made from.
#[derive(Debug)]
pub struct Planned {
    /// The table.
    pub plan: RankPlan,
    /// Singular values by matrix, in the norm of the lens; empty when the ranks were given.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
}

/// Makes the plan. Reads every expert matrix once if the goal is a budget and their spectra are not known yet.
pub fn plan(
    checkpoint: &Checkpoint,
    model: &str,
    settings: &PlanSettings,
    resources: &Resources,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Planned, PipelineError> {
    refuse_early(checkpoint, settings)?;
    let algebra = resources.algebra()?;
    let pool = workers::pool(checkpoint.config(), resources)?;
    let course = Course { staging: None, interrupt };
    let calibration = settings.calibration.as_ref().filter(|_| matches!(settings.goal, Goal::Budget(_)));
    let text = calibration.map(|calibration| CalibrationText::read(checkpoint, calibration)).transpose()?;
    let base = match settings.goal {
        Goal::Budget(_) => {
            let cache = resources.cache()?;
            base::identify_remembered(checkpoint, model, &pool, progress, interrupt, &cache)?
        }
        // Given ranks are checked without a look at the weights.
        _ => BaseModel::default(),
    };
    let lens = Lens::new(checkpoint, &base, text, algebra, resources, &pool, progress, interrupt)?;
    let planned = plan_through(checkpoint, &lens, settings, &pool, progress, course)?;
    say_substituted(lens.algebra(), progress);
    Ok(planned)
}

/// Refuses what needs no look at the weights: a budget that cannot be met, a pattern that matches nothing, a plan or ranks
/// for another model.
pub fn refuse_early(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<(), PipelineError> {
    if !checkpoint.ranks().is_empty() {
        return Err(PipelineError::AlreadyFactored(checkpoint.layout()));
    }
    if settings.calibration.is_none() && settings.sensitivity == Some(Sensitivity::Measured) {
        return Err(PipelineError::NothingToMeasureOn);
    }
    match &settings.goal {
        Goal::Plan(_) | Goal::Ranks(_) => given(checkpoint, settings).map(|_| ()),
        Goal::Budget(budget) => {
            let config = checkpoint.config();
            let zeros = |id: MatrixId| vec![0.0; config.matrix_shape(id.projection).short_side()];
            let spectrum = |id| Spectrum::new(zeros(id)).expect("zeros do not rise");
            let errors = Errors {
                spectra: config.matrices().map(|id| (id, spectrum(id))).collect(),
                sensitivity: Sensitivity::default(),
                layers: None,
            };
            with_request(checkpoint, settings, *budget, &errors, |request| Ok(check(request)?))
        }
    }
}

/// As [`plan`], with a lens at hand.
pub fn plan_through(
    checkpoint: &Checkpoint,
    lens: &Lens,
    settings: &PlanSettings,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    course: Course<'_>,
) -> Result<Planned, PipelineError> {
    match &settings.goal {
        Goal::Plan(_) | Goal::Ranks(_) => {
            Ok(Planned { plan: given(checkpoint, settings)?, spectra: BTreeMap::new() })
        }
        Goal::Budget(budget) => {
            let errors = errors(checkpoint, lens, settings.sensitivity, pool, progress, course)?;
            let plan = plan_from(checkpoint, settings, *budget, &errors)?;
            Ok(Planned { plan, spectra: errors.spectra })
        }
    }
}

/// What a plan is made from: the errors of every rank of every matrix, and how they compare.
#[derive(Debug, Clone)]
pub struct Errors {
    /// In the norm of the lens.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// How they compare.
    pub sensitivity: Sensitivity,
    /// By layer, where that was measured.
    pub layers: Option<Vec<LayerSensitivity>>,
}

/// Looks up or measures what plans are made from; any budget's plan then takes milliseconds.
pub fn errors(
    checkpoint: &Checkpoint,
    lens: &Lens,
    sensitivity: Option<Sensitivity>,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    course: Course<'_>,
) -> Result<Errors, PipelineError> {
    let sensitivity = sensitivity.unwrap_or(lens.usual_sensitivity());
    if sensitivity != Sensitivity::Measured {
        let spectra = spectra(checkpoint, lens, pool, progress, course)?;
        return Ok(Errors { spectra, sensitivity, layers: None });
    }
    let measured = lens.sensitivities(checkpoint, pool, progress, course.interrupt)?;
    let Sensitivities { spectra, layers } = measured.ok_or(PipelineError::NothingToMeasureOn)?;
    Ok(Errors { spectra, sensitivity, layers: Some(layers) })
}

/// The plan of a budget; the settings' own goal is of no account.
pub fn plan_from(
    checkpoint: &Checkpoint,
    settings: &PlanSettings,
    budget: Budget,
    errors: &Errors,
) -> Result<RankPlan, PipelineError> {
    let plan = with_request(checkpoint, settings, budget, errors, |request| {
        Ok(match settings.allocation {
            Allocation::Global => allocate(request)?,
            Allocation::Uniform => uniform_plan(request)?,
        })
    })?;
    let patterns = settings.keep_dense.iter().map(ToString::to_string).collect();
    let mut plan = plan.constrained(settings.rank_min, patterns);
    plan.spectra = SpectrumCurves::of(errors.spectra.iter().map(|(name, spectrum)| (*name, spectrum)));
    Ok(plan.chosen_by(settings.allocation, errors.layers.clone()))
}

/// A plan or ranks that were given, held against the checkpoint.
fn given(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<RankPlan, PipelineError> {
    let (config, before) = (checkpoint.config(), checkpoint.size());
    match &settings.goal {
        Goal::Plan(plan) => {
            if let Some(asked) = settings.storage.filter(|&asked| asked != plan.cost.storage) {
                return Err(PipelineError::PlanStorage { asked, planned: plan.cost.storage });
            }
            plan.validate(config, before)?;
            let cost = cost_model(checkpoint, settings, plan.cost.unit);
            for (what, planned, actual) in [
                ("matrix", plan.cost.dense_element_bytes, cost.dense_element_bytes),
                ("factor", plan.cost.factor_element_bytes, cost.factor_element_bytes),
            ] {
                if planned != actual {
                    return Err(PipelineError::PlanDtype { what, planned, actual });
                }
            }
            Ok((**plan).clone())
        }
        Goal::Ranks(ranks) => {
            let cost = cost_model(checkpoint, settings, Unit::Params);
            Ok(plan_from_ranks(config, ranks, cost, before)?)
        }
        Goal::Budget(_) => unreachable!("a budget gives no ranks"),
    }
}

/// Puts together what an allocation needs.
fn with_request<R>(
    checkpoint: &Checkpoint,
    settings: &PlanSettings,
    budget: Budget,
    errors: &Errors,
    act: impl FnOnce(&AllocationRequest<'_>) -> Result<R, PipelineError>,
) -> Result<R, PipelineError> {
    let (config, before) = (checkpoint.config(), checkpoint.size());
    let target = budget.resolve(before.params, before.bytes)?;
    let dense = kept_dense(checkpoint, settings)?;
    let measured =
        |id: MatrixId| errors.layers.as_ref().map_or(1.0, |layers| layers[id.layer].of(id.projection));
    let candidate = |(&name, spectrum)| Candidate {
        name,
        shape: config.matrix_shape(name.projection),
        spectrum,
        measured: measured(name),
        keep_dense: dense.contains(&name),
    };
    let candidates: Vec<Candidate<'_>> = errors.spectra.iter().map(candidate).collect();
    act(&AllocationRequest {
        matrices: &candidates,
        target,
        cost: cost_model(checkpoint, settings, target.unit),
        rank_multiple: settings.rank_multiple.unwrap_or_else(|| default_rank_multiple(checkpoint)),
        rank_min: settings.rank_min,
        sensitivity: errors.sensitivity,
        before,
    })
}

fn default_rank_multiple(checkpoint: &Checkpoint) -> usize {
    let short = checkpoint.config().matrix_shape(Projection::W1).short_side();
    if short >= TRUE_SIZE { RANK_MULTIPLE_TRUE_SIZE } else { 1 }
}

/// Bytes per element before and after. Expert matrices of one checkpoint share a dtype.
fn cost_model(checkpoint: &Checkpoint, settings: &PlanSettings, unit: Unit) -> CostModel {
    let first = MatrixId { layer: 0, expert: 0, projection: Projection::W1 };
    let dense = checkpoint.matrix_dtype(first);
    CostModel {
        storage: settings.storage.unwrap_or_default(),
        unit,
        dense_element_bytes: dense.size_bytes(),
        factor_element_bytes: settings.factor_dtype.unwrap_or(dense).size_bytes(),
    }
}

/// Matrices that a pattern keeps; a pattern that keeps none is a typing error.
fn kept_dense(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<BTreeSet<MatrixId>, PipelineError> {
    let mut kept = BTreeSet::new();
    for pattern in &settings.keep_dense {
        let ids = checkpoint.config().matrices();
        let matches: Vec<MatrixId> = ids.filter(|id| pattern.is_match(&id.module_name())).collect();
        if matches.is_empty() {
            return Err(PipelineError::PatternMatchesNothing(pattern.to_string()));
        }
        kept.extend(matches);
    }
    Ok(kept)
}
