//! Which rank each matrix gets: the least total error that fits the budget.
//!
//! min Σₖ sₖ·errₖ²(rₖ) subject to Σₖ costₖ(rₖ) ≤ B, where every matrix k may also stay dense (error 0, cost mn).
//! A multiple-choice knapsack. Its relaxation, in which a matrix may lie between two choices, is solved exactly:
//! take the lower convex hull of each (cost, error) curve and walk the segments of all hulls by falling slope until the
//! budget is spent (Sinha and Zoltners, 1979). The relaxed optimum bounds every plan from below; only its last step is
//! fractional, and is repaired. The plan carries both numbers, so that it proves how far from the optimum it can be.
//!
//! Pure: no threads, no clock, no dependence on the order of the input.

mod bases;
mod choices;
mod curve;
mod expert;
mod fill;
mod hull;
mod layers;
mod problem;
mod request;

use lowrank_model::plan::{Allocation, PlanError, PlannedMatrix, RankGroups, Size};
use lowrank_model::{CostModel, ElementBytes, MatrixId, ModelConfig, RankPlan, params::rank_max_saving};
use problem::Allocator;
use std::collections::BTreeMap;

pub use request::{
    AllocateError, AllocationRequest, BaseCandidate, Candidate, Choices, ExpertCandidate, NarrowedErrors,
};

/// The ranks of least total error that remove at least the target, and less than one step more: afterwards no matrix can
/// be given the next rank, or be left dense, without missing the target. (Given ranks alone may remove more.)
pub fn allocate(request: &AllocationRequest<'_>) -> Result<RankPlan, AllocateError> {
    Allocator::new(request)?.one(request.target.remove_at_least, Allocation::Global)
}

/// Whether there is a plan at all, which the shapes decide: spectra may be any.
pub fn check(request: &AllocationRequest<'_>, allocation: Allocation) -> Result<(), AllocateError> {
    match request.rank_groups {
        RankGroups::Matrix => problem::check(request, allocation),
        RankGroups::Layer => layers::check(request, allocation),
    }
}

/// The baseline: one rank for every matrix that is not kept dense (or its largest saving rank, where that is less), the
/// largest that meets the target. Its gap is against the same bound as [`allocate`]'s.
pub fn uniform_plan(request: &AllocationRequest<'_>) -> Result<RankPlan, AllocateError> {
    Allocator::new(request)?.one(request.target.remove_at_least, Allocation::Uniform)
}

/// The plan of each removal, in their order, with what shares one choice as the request says.
pub fn plans(
    request: &AllocationRequest<'_>,
    wishes: &[(u64, Allocation)],
) -> Result<Vec<Result<RankPlan, AllocateError>>, AllocateError> {
    match request.rank_groups {
        RankGroups::Matrix if !request.shared_bases.is_empty() => bases::plans(request, wishes),
        RankGroups::Matrix => Ok(Allocator::new(request)?.plans(wishes)),
        RankGroups::Layer => layers::plans(request, wishes),
    }
}

/// A plan of given ranks; matrices that are not named stay dense. `element_bytes`: of matrices whose elements are not of the
/// sizes in `cost`.
pub fn plan_from_ranks(
    config: &ModelConfig,
    ranks: &BTreeMap<MatrixId, usize>,
    cost: CostModel,
    element_bytes: &BTreeMap<MatrixId, ElementBytes>,
    before: Size,
) -> Result<RankPlan, AllocateError> {
    let mut left: BTreeMap<MatrixId, usize> = ranks.clone();
    let mut rows = Vec::new();
    for name in config.matrices() {
        let shape = config.matrix_shape(name);
        let rank = left.remove(&name);
        if let Some(rank) = rank {
            let rank_max = rank_max_saving(shape, cost.storage);
            if rank == 0 || rank > rank_max {
                return Err(PlanError::Rank { name, shape, rank, rank_max }.into());
            }
        }
        let relative_error = rank.is_none().then_some(0.0);
        let element_bytes = element_bytes.get(&name).copied();
        rows.push(PlannedMatrix { matrix: config.named(name), shape, rank, relative_error, element_bytes });
    }
    if let Some((name, _)) = left.first_key_value() {
        return Err(PlanError::UnknownMatrix(name.to_string()).into());
    }
    Ok(RankPlan::new(None, cost, 1, before, None, rows)?)
}

#[cfg(test)]
mod tests;
