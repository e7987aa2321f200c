//! The knapsack with a choice for every matrix and expert: its curves, the walk along their hulls, and the repair.

use super::choices::{Curve, Segment};
use super::curve::MatrixCurve;
use super::expert::{ExpertCurve, PlannedChoice};
use super::fill::{fill, shave};
use super::request::{AllocateError, AllocationRequest, Candidate, Choices};
use lowrank_model::plan::{
    Allocation, Optimality, PLAIN_WIDTH_MULTIPLE, PlannedExpert, PlannedMatrix, Sensitivity,
};
use lowrank_model::{CostModel, MatrixId, NamedMatrix, RankPlan, Target};
use std::collections::BTreeMap;

/// As [`super::check`], every matrix and expert with a choice of its own.
pub(super) fn check(request: &AllocationRequest<'_>, allocation: Allocation) -> Result<(), AllocateError> {
    Problem::new(request)?.capacity(request, allocation, request.target.remove_at_least).map(|_| ())
}

/// What plans of different targets share, every matrix and expert with a choice of its own: the curves of all matrices and the order of their steps. For 768 matrices of
/// 4096 singular values and ranks that are multiples of 1, 90 MB.
pub(super) struct Allocator<'a> {
    request: AllocationRequest<'a>,
    problem: Problem,
    /// Every step of every hull, by falling slope.
    segments: Vec<Segment>,
}

impl<'a> Allocator<'a> {
    /// Prepares for targets in the unit of the request's own.
    pub(super) fn new(request: &AllocationRequest<'a>) -> Result<Self, AllocateError> {
        let problem = Problem::new(request)?;
        Ok(Self { request: *request, segments: problem.segments(), problem })
    }

    pub(super) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The plan of each removal, in their order; all in one walk over the steps.
    pub(super) fn plans(&self, wishes: &[(u64, Allocation)]) -> Vec<Result<RankPlan, AllocateError>> {
        let mut order: Vec<usize> = (0..wishes.len()).collect();
        // The walk spends more and more: the smallest capacity first.
        order.sort_by_key(|&index| std::cmp::Reverse(wishes[index].0));
        let mut walk = Walk::new(self);
        let mut plans: Vec<(usize, Result<RankPlan, AllocateError>)> = order
            .into_iter()
            .map(|index| {
                let (remove_at_least, allocation) = wishes[index];
                let capacity = self.problem.capacity(&self.request, allocation, remove_at_least);
                let plan = capacity.and_then(|capacity| {
                    let relaxed = walk.up_to(capacity);
                    let target = Target { remove_at_least, ..self.request.target };
                    let request = AllocationRequest { target, ..self.request };
                    let bound = relaxed.lower_bound;
                    match allocation {
                        Allocation::Global => {
                            self.problem.plan(&request, &self.problem.repaired(&relaxed), bound)
                        }
                        Allocation::Uniform if !request.experts.is_empty() => {
                            let (narrowed, chosen) = self.problem.of_one_width(&request, capacity)?;
                            narrowed.plan(&request, &chosen, bound)
                        }
                        Allocation::Uniform => {
                            self.problem.plan(&request, &self.problem.uniform(capacity), bound)
                        }
                    }
                });
                (index, plan)
            })
            .collect();
        plans.sort_by_key(|(index, _)| *index);
        plans.into_iter().map(|(_, plan)| plan).collect()
    }

    pub(super) fn one(
        &self,
        remove_at_least: u64,
        allocation: Allocation,
    ) -> Result<RankPlan, AllocateError> {
        self.plans(&[(remove_at_least, allocation)]).remove(0)
    }
}

/// The choices of every matrix, in the order of their names.
pub(super) struct Problem {
    curves: Vec<Curve>,
    /// Cost of all of them left dense.
    dense: u64,
    /// Cost of the cheapest choices.
    least: u64,
}

/// The optimum when one matrix may lie between two choices.
struct Relaxed<'a> {
    /// The choice of each matrix where nothing is fractional yet.
    chosen: &'a [usize],
    /// Capacity that is left then.
    slack: u64,
    /// Steps taken, by falling slope.
    taken: &'a [Segment],
    /// The step that does not fit as a whole; absent if everything can stay dense.
    critical: Option<Segment>,
    lower_bound: f64,
}

/// Steps taken in their order, as far as a capacity lasts; for rising capacities.
struct Walk<'a> {
    problem: &'a Problem,
    segments: &'a [Segment],
    chosen: Vec<usize>,
    cost: u64,
    taken: usize,
}

impl<'a> Walk<'a> {
    fn new(allocator: &'a Allocator<'_>) -> Self {
        let Allocator { problem, segments, .. } = allocator;
        Self { problem, segments, chosen: vec![0; problem.curves.len()], cost: problem.least, taken: 0 }
    }

    fn up_to(&mut self, capacity: u64) -> Relaxed<'_> {
        let Self { problem, segments, .. } = *self;
        let mut critical = None;
        while let Some(&segment) = segments.get(self.taken) {
            let curve = &problem.curves[segment.curve as usize];
            let (from, to) = curve.ends(segment.vertex);
            let step = curve.cost(to) - curve.cost(from);
            if step > capacity - self.cost {
                critical = Some((segment, to, step));
                break;
            }
            self.chosen[segment.curve as usize] = to;
            self.cost += step;
            self.taken += 1;
        }
        let slack = capacity - self.cost;
        let lower_bound = match critical {
            None => problem.objective(&self.chosen),
            Some((segment, to, step)) => {
                let mut with_it = self.chosen.clone();
                with_it[segment.curve as usize] = to;
                // What the missing part of the step would have saved: a sum of positive terms, so nothing cancels.
                problem.objective(&with_it) + segment.slope * (step - slack) as f64
            }
        };
        let (chosen, taken) = (self.chosen.as_slice(), &segments[..self.taken]);
        Relaxed { chosen, slack, taken, critical: critical.map(|(segment, ..)| segment), lower_bound }
    }
}

/// Widths that all experts can have, rising.
struct CommonWidths<'a> {
    experts: Vec<&'a ExpertCurve>,
    widths: Vec<usize>,
}

impl CommonWidths<'_> {
    /// Of all experts at one width.
    fn cost(&self, width: usize) -> u64 {
        self.experts.iter().map(|expert| expert.cost_of(width)).sum()
    }

    fn least_cost(&self) -> u64 {
        self.widths.first().map_or(0, |&width| self.cost(width))
    }
}

impl Problem {
    pub(super) fn new(request: &AllocationRequest<'_>) -> Result<Self, AllocateError> {
        let &AllocationRequest { target, rank_multiple, sensitivity, .. } = request;
        if rank_multiple == 0 {
            return Err(AllocateError::RankMultiple);
        }
        let cost = CostModel { unit: target.unit, ..request.cost };
        let mut matrices: Vec<Candidate<'_>> = request.matrices.to_vec();
        matrices.sort_unstable_by_key(|matrix| matrix.name);
        if let Some(pair) = matrices.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(AllocateError::Duplicate(pair[0].name));
        }
        let dense =
            matrices.iter().map(|matrix| cost.with(matrix.element_bytes).cost(matrix.shape, None)).sum();
        if !request.experts.is_empty() && sensitivity != Sensitivity::Measured {
            return Err(AllocateError::WidthsNotMeasured);
        }
        let experts: BTreeMap<_, _> =
            request.experts.iter().map(|expert| ((expert.layer, expert.expert), *expert)).collect();
        let floor = request.rank_floor();
        let mut curves = Vec::new();
        for matrices in
            matrices.chunk_by(|a, b| (a.name.layer, a.name.expert) == (b.name.layer, b.name.expert))
        {
            let free = |matrix: &Candidate<'_>| matrix.choices == Choices::Any;
            let expert = experts.get(&(matrices[0].name.layer, matrices[0].name.expert));
            match (<[Candidate<'_>; 3]>::try_from(matrices), expert) {
                (Ok(all), Some(&expert)) if all.iter().all(free) => {
                    let curve = ExpertCurve::new(all, expert, cost, rank_multiple, floor)?;
                    curves.push(Curve::Expert(Box::new(curve)));
                }
                _ => {
                    for &matrix in matrices {
                        let curve = MatrixCurve::new(matrix, cost, rank_multiple, floor, sensitivity)?;
                        curves.push(Curve::Matrix(curve));
                    }
                }
            }
        }
        // Every sum of errors below is at most this one.
        let mut total = 0.0;
        for curve in &curves {
            total += curve.largest_error();
            if !total.is_finite() {
                return Err(AllocateError::NotFinite { name: curve.name() });
            }
        }
        let least = curves.iter().map(|curve| curve.cost(0)).sum();
        Ok(Self { curves, dense, least })
    }

    pub(super) fn curves(&self) -> &[Curve] {
        &self.curves
    }

    /// Cost of leaving everything as it is.
    pub(super) fn dense(&self) -> u64 {
        self.dense
    }

    /// The cost that may be kept.
    fn capacity(
        &self,
        request: &AllocationRequest<'_>,
        allocation: Allocation,
        asked: u64,
    ) -> Result<u64, AllocateError> {
        let least = match allocation {
            Allocation::Uniform if !request.experts.is_empty() => self.common_widths(request)?.least_cost(),
            _ => self.least,
        };
        let count = |wanted: fn(Choices) -> bool| {
            request.matrices.iter().filter(|matrix| wanted(matrix.choices)).count()
        };
        match self.dense.checked_sub(asked) {
            Some(capacity) if capacity >= least => Ok(capacity),
            _ => Err(AllocateError::Infeasible {
                asked,
                most: self.dense.saturating_sub(least),
                unit: request.target.unit,
                rank_floor: request.rank_floor(),
                kept_dense: count(|choices| choices == Choices::Dense),
                fixed: count(|choices| matches!(choices, Choices::Rank(_))),
                matrices: request.matrices.len(),
            }),
        }
    }

    fn cost(&self, chosen: &[usize]) -> u64 {
        self.curves.iter().zip(chosen).map(|(curve, &choice)| curve.cost(choice)).sum()
    }

    fn objective(&self, chosen: &[usize]) -> f64 {
        self.curves.iter().zip(chosen).map(|(curve, &choice)| curve.error(choice)).sum()
    }

    fn segments(&self) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::with_capacity(self.curves.iter().map(|c| c.hull().len()).sum());
        for (index, curve) in self.curves.iter().enumerate() {
            segments.extend(curve.hull().windows(2).enumerate().map(|(vertex, ends)| Segment {
                slope: curve.slope(ends[0] as usize, ends[1] as usize),
                curve: index as u32,
                vertex: vertex as u32,
            }));
        }
        // Ties go by name. Slopes of one curve do not rise, so its own steps stay in order.
        segments.sort_unstable_by(|a, b| {
            b.slope.total_cmp(&a.slope).then((a.curve, a.vertex).cmp(&(b.curve, b.vertex)))
        });
        segments
    }

    /// One choice for each matrix: the relaxed optimum without its fractional step.
    fn repaired(&self, relaxed: &Relaxed<'_>) -> Vec<usize> {
        // Stop before the step that is fractional in the relaxation, and fill what is left with smaller steps.
        let mut below = relaxed.chosen.to_vec();
        fill(&self.curves, &mut below, relaxed.slack);
        // Or take that step, and take back the least useful ones before it.
        let mut best = below;
        if let Some(critical) = relaxed.critical {
            let mut beyond = relaxed.chosen.to_vec();
            let slack = shave(&self.curves, &mut beyond, relaxed.slack, relaxed.taken, critical);
            if let Some(slack) = slack {
                fill(&self.curves, &mut beyond, slack);
                if self.objective(&beyond) < self.objective(&best) {
                    best = beyond;
                }
            }
        }
        best
    }

    /// The largest common rank that the capacity allows.
    fn uniform(&self, capacity: u64) -> Vec<usize> {
        let ranks = |curve: &Curve| match curve {
            Curve::Matrix(curve) => curve.ranks(),
            Curve::Expert(_) => 0,
        };
        let at = |step: usize| -> Vec<usize> {
            self.curves.iter().map(|curve| step.min(ranks(curve).saturating_sub(1))).collect()
        };
        // Costs rise with the step, and step 0 fits.
        let (mut fits, mut beyond) = (0, self.curves.iter().map(ranks).max().unwrap_or(1).max(1));
        while beyond - fits > 1 {
            let middle = fits + (beyond - fits) / 2;
            if self.cost(&at(middle)) <= capacity { fits = middle } else { beyond = middle }
        }
        at(fits)
    }

    /// The widths that all experts can have, and a runtime of plain models takes.
    fn common_widths(&self, request: &AllocationRequest<'_>) -> Result<CommonWidths<'_>, AllocateError> {
        let mut experts = Vec::new();
        for curve in &self.curves {
            match curve {
                Curve::Expert(expert) if !expert.has_ranks() => experts.push(&**expert),
                _ => return Err(AllocateError::UniformWidthsAndRanks),
            }
        }
        let channels = experts.iter().map(|expert| expert.channels()).min().unwrap_or(0);
        let is_even = |width: usize| {
            width.is_multiple_of(PLAIN_WIDTH_MULTIPLE) && width.is_multiple_of(request.rank_multiple)
        };
        let widths = (1..=channels).filter(|&width| width == channels || is_even(width)).collect();
        Ok(CommonWidths { experts, widths })
    }

    /// The same width for every expert, the largest that the capacity allows, and all of what stays of their matrices.
    fn of_one_width(
        &self,
        request: &AllocationRequest<'_>,
        capacity: u64,
    ) -> Result<(Self, Vec<usize>), AllocateError> {
        let common = self.common_widths(request)?;
        // Costs rise with the width, and the first fits.
        let fitting = common.widths.partition_point(|&width| common.cost(width) <= capacity);
        let width = common.widths[..fitting].last().copied().unwrap_or(0);
        let curves: Vec<Curve> =
            common.experts.iter().map(|expert| Curve::Expert(Box::new(expert.at_width(width)))).collect();
        let chosen = vec![0; curves.len()];
        Ok((Self { least: common.cost(width), dense: self.dense, curves }, chosen))
    }

    fn plan(
        &self,
        request: &AllocationRequest<'_>,
        chosen: &[usize],
        lower_bound: f64,
    ) -> Result<RankPlan, AllocateError> {
        let objective = self.objective(chosen);
        // Rounding may put the bound of an exact optimum just above it.
        let lower_bound = lower_bound.min(objective);
        let gap = if objective > lower_bound { (objective - lower_bound) / lower_bound } else { 0.0 };
        let duality_gap = gap.is_finite().then_some(gap);
        let row = |curve: &MatrixCurve, (rank, relative_error)| PlannedMatrix {
            matrix: NamedMatrix { name: request.family.spelling().module(curve.name), id: curve.name },
            shape: curve.shape,
            rank,
            relative_error: Some(relative_error),
            element_bytes: curve.element_bytes,
        };
        let (mut rows, mut experts) = (Vec::new(), Vec::new());
        for (curve, &choice) in self.curves.iter().zip(chosen) {
            match curve {
                Curve::Matrix(curve) => {
                    rows.push(row(curve, (curve.rank(choice), curve.relative_error(choice))));
                }
                Curve::Expert(curve) => {
                    let PlannedChoice { channels, width_error, matrices } = curve.planned(choice);
                    rows.extend(
                        curve.matrices().iter().zip(matrices).map(|(curve, chosen)| row(curve, chosen)),
                    );
                    let MatrixId { layer, expert, .. } = curve.matrices()[0].name;
                    let relative_error = Some(width_error);
                    experts.extend(channels.map(|channels| PlannedExpert {
                        layer,
                        expert,
                        channels,
                        relative_error,
                    }));
                }
            }
        }
        Ok(RankPlan::new(
            Some(request.target),
            CostModel { unit: request.target.unit, ..request.cost },
            request.rank_multiple,
            request.before,
            Some(Optimality { sensitivity: request.sensitivity, objective, lower_bound, duality_gap }),
            rows,
        )?
        .narrowed(experts)?)
    }
}
