//! From a wish to a [`RankPlan`]: spectra and allocation for a budget, a check for ranks that were given.

use crate::spectra::{Course, spectra_on_course};
use crate::workers::{self, Resources};
use crate::{Goal, Interrupt, PipelineError, PlanSettings};
use lowrank_model::{CostModel, MatrixId, Progress, Projection, RankPlan, Spectrum, Unit};
use lowrank_reader::Checkpoint;
use lowrank_svd::allocate::{AllocationRequest, Candidate, allocate, plan_from_ranks};
use std::collections::{BTreeMap, BTreeSet};

/// Short sides from here on belong to models whose matrices are multiplied on tensor cores.
const TRUE_SIZE: usize = 1024;
/// What tensor cores like.
const RANK_MULTIPLE_TRUE_SIZE: usize = 8;

/// A plan, and the spectra it was made from, if it was.
#[derive(Debug)]
pub struct Planned {
    /// The table.
    pub plan: RankPlan,
    /// Singular values by matrix; empty when the ranks were given.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
}

/// Makes the plan. Reads every expert matrix once if the goal is a budget, and none otherwise.
pub fn plan(
    checkpoint: &Checkpoint,
    settings: &PlanSettings,
    resources: Resources,
    progress: &dyn Progress,
) -> Result<Planned, PipelineError> {
    let course = Course { staging: None, interrupt: &Interrupt::default() };
    plan_on_course(checkpoint, settings, resources, progress, course)
}

/// As [`plan`], taking spectra that are finished from a staging directory and leaving there what gets finished.
pub fn plan_on_course(
    checkpoint: &Checkpoint,
    settings: &PlanSettings,
    resources: Resources,
    progress: &dyn Progress,
    course: Course<'_>,
) -> Result<Planned, PipelineError> {
    if !checkpoint.ranks().is_empty() {
        return Err(PipelineError::AlreadyFactored(checkpoint.layout()));
    }
    let config = checkpoint.config();
    let before = checkpoint.size();
    let rank_multiple = settings.rank_multiple.unwrap_or_else(|| default_rank_multiple(checkpoint));
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
            Ok(Planned { plan: (**plan).clone(), spectra: BTreeMap::new() })
        }
        Goal::Ranks(ranks) => {
            let cost = cost_model(checkpoint, settings, Unit::Params);
            let plan = plan_from_ranks(config, ranks, cost, before)?;
            Ok(Planned { plan, spectra: BTreeMap::new() })
        }
        Goal::Budget(budget) => {
            let target = budget.resolve(before.params, before.bytes)?;
            let dense = kept_dense(checkpoint, settings)?;
            let pool = workers::pool(config, resources)?;
            let spectra = spectra_on_course(checkpoint, &pool, progress, course)?;
            let candidates: Vec<Candidate<'_>> = spectra
                .iter()
                .map(|(name, spectrum)| Candidate {
                    name: *name,
                    shape: config.matrix_shape(name.projection),
                    spectrum,
                    keep_dense: dense.contains(name),
                })
                .collect();
            let plan = allocate(&AllocationRequest {
                matrices: &candidates,
                target,
                cost: cost_model(checkpoint, settings, target.unit),
                rank_multiple,
                rank_min: settings.rank_min,
                sensitivity: settings.sensitivity,
                before,
            })?
            .constrained(settings.rank_min, settings.keep_dense.iter().map(ToString::to_string).collect());
            Ok(Planned { plan, spectra: spectra.into_iter().collect() })
        }
    }
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
