//! Which layers get a shared base.
//!
//! A layer is either as it would be alone, every expert with a width and ranks, or it pays for a base once and its matrices
//! get ranks of what distinguishes them from it. At a price π per unit of cost each layer takes the better of the two, which
//! is exact for the Lagrangian: Σ min(error + π · cost) − π · capacity bounds every plan from below. The price at which the
//! budget is just met decides for all layers but one or so; the sets of layers on both sides of it are planned as any other
//! model, and no base at all, too. The least error wins.

use super::choices::Curve;
use super::hull::slope;
use super::problem::{Allocator, Problem};
use super::request::{AllocateError, AllocationRequest, Candidate, ExpertCandidate};
use lowrank_model::plan::{Allocation, Optimality, PlanError};
use lowrank_model::{CostModel, MatrixId, RankPlan, Target};
use std::collections::{BTreeMap, BTreeSet};

/// Halvings of the interval of prices: more would not change an f64.
const HALVINGS: usize = 200;

/// As [`super::plans`], with bases where they pay.
pub(super) fn plans(
    request: &AllocationRequest<'_>,
    wishes: &[(u64, Allocation)],
) -> Result<Vec<Result<RankPlan, AllocateError>>, AllocateError> {
    Bases::new(request)?.plans(wishes)
}

struct Bases<'a> {
    request: AllocationRequest<'a>,
    /// No layer with a base.
    alone: Allocator<'a>,
    layers: Vec<Layer>,
    /// Cost of leaving everything as it is.
    dense: u64,
}

/// The two ways of a layer; one where it may have no base.
struct Layer {
    layer: usize,
    own: Frontier,
    based: Option<Frontier>,
}

/// The steps of all matrices and experts of a layer by falling slope, summed.
struct Frontier {
    /// Error saved per cost, falling.
    slopes: Vec<f64>,
    /// After so many steps.
    costs: Vec<u64>,
    errors: Vec<f64>,
}

impl Frontier {
    /// `cost`: what the layer pays at once.
    fn new(curves: &[&Curve], cost: u64) -> Self {
        let mut steps = Vec::new();
        let (mut cost, mut error) = (cost, 0.0);
        for curve in curves {
            let hull = curve.hull();
            cost += curve.cost(hull[0] as usize);
            error += curve.error(hull[0] as usize);
            steps.extend(hull.windows(2).map(|ends| {
                let (from, to) = (ends[0] as usize, ends[1] as usize);
                let (cost, error) = (curve.cost(to) - curve.cost(from), curve.error(from) - curve.error(to));
                (slope((0, error), (cost, 0.0)), cost, error)
            }));
        }
        steps.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let mut frontier = Self { slopes: Vec::new(), costs: vec![cost], errors: vec![error] };
        for (slope, step, saved) in steps {
            cost += step;
            error -= saved;
            frontier.slopes.push(slope);
            frontier.costs.push(cost);
            frontier.errors.push(error);
        }
        // What was subtracted leaves rounding behind.
        if let Some(last) = frontier.errors.last_mut() {
            *last = curves.iter().map(|curve| curve.error(curve.last())).sum();
        }
        frontier
    }

    /// (cost, error) where every step is taken that saves more than the price.
    fn at(&self, price: f64) -> (u64, f64) {
        let taken = self.slopes.partition_point(|&slope| slope > price);
        (self.costs[taken], self.errors[taken])
    }
}

/// What all layers choose at a price.
struct Chosen {
    with_base: BTreeSet<usize>,
    cost: u64,
    error: f64,
}

impl<'a> Bases<'a> {
    fn new(request: &AllocationRequest<'a>) -> Result<Self, AllocateError> {
        let alone = Allocator::new(request)?;
        let all: BTreeSet<usize> = request.shared_bases.iter().map(|base| base.layer).collect();
        let (matrices, experts) = with_bases(request, &all)?;
        let based = Problem::new(&AllocationRequest { matrices: &matrices, experts: &experts, ..*request })?;
        let own = by_layer(alone.problem().curves());
        let mut of_base = by_layer(based.curves());
        let mut layers = Vec::new();
        for (layer, curves) in own {
            let based = of_base.remove(&layer).filter(|_| all.contains(&layer));
            let based = based.map(|curves| Frontier::new(&curves, cost_of_base(request, layer)));
            layers.push(Layer { layer, own: Frontier::new(&curves, 0), based });
        }
        Ok(Self { request: *request, dense: alone.problem().dense(), alone, layers })
    }

    fn at(&self, price: f64) -> Chosen {
        let mut chosen = Chosen { with_base: BTreeSet::new(), cost: 0, error: 0.0 };
        for Layer { layer, own, based } in &self.layers {
            let weighed = |(cost, error): (u64, f64)| error + price * cost as f64;
            let (mut best, alone) = (own.at(price), own.at(price));
            if let Some(based) = based.as_ref().map(|based| based.at(price))
                && weighed(based) < weighed(alone)
            {
                best = based;
                chosen.with_base.insert(*layer);
            }
            chosen.cost += best.0;
            chosen.error += best.1;
        }
        chosen
    }

    /// The price at which the budget is met, from both sides; `None` where everything can stay as it is.
    fn around(&self, capacity: u64) -> Option<[(f64, Chosen); 2]> {
        // Of the prices with a cost within the capacity the lowest, and of the others the highest.
        let (mut low, mut high) = (0.0_f64, f64::MAX);
        if self.at(low).cost <= capacity {
            return None;
        }
        for _ in 0..HALVINGS {
            let middle = low.max(f64::MIN_POSITIVE).sqrt() * high.sqrt();
            if middle <= low || middle >= high {
                break;
            }
            if self.at(middle).cost <= capacity { high = middle } else { low = middle }
        }
        Some([(high, self.at(high)), (low, self.at(low))])
    }

    fn plans(
        &self,
        wishes: &[(u64, Allocation)],
    ) -> Result<Vec<Result<RankPlan, AllocateError>>, AllocateError> {
        let mut best = self.alone.plans(wishes);
        let mut bounds = vec![None; wishes.len()];
        // Wishes with the same layers share their curves.
        let mut sets: BTreeMap<BTreeSet<usize>, Vec<usize>> = BTreeMap::new();
        for (index, &(asked, allocation)) in wishes.iter().enumerate() {
            let capacity = self.dense.checked_sub(asked).filter(|_| allocation == Allocation::Global);
            let Some((sides, capacity)) =
                capacity.and_then(|capacity| Some((self.around(capacity)?, capacity)))
            else {
                continue;
            };
            let bound = |(price, chosen): &(f64, Chosen)| {
                chosen.error + price * (chosen.cost as f64 - capacity as f64)
            };
            let finite = sides.iter().map(bound).filter(|bound| bound.is_finite());
            bounds[index] = Some(finite.fold(0.0, f64::max));
            for (_, chosen) in sides {
                let same = sets.entry(chosen.with_base).or_default();
                if same.last() != Some(&index) {
                    same.push(index);
                }
            }
        }
        let objective = |plan: &RankPlan| plan.optimality.map_or(0.0, |proof| proof.objective);
        for (set, same) in sets.into_iter().filter(|(set, _)| !set.is_empty()) {
            let asked: Vec<u64> = same.iter().map(|&index| wishes[index].0).collect();
            for (index, plan) in same.into_iter().zip(self.with(&set, &asked)?) {
                match (&best[index], plan) {
                    (Ok(before), Ok(plan)) if objective(&plan) < objective(before) => best[index] = Ok(plan),
                    // What is left for the other layers may be less than they need at least.
                    (_, Ok(_) | Err(AllocateError::Infeasible { .. })) => {}
                    (_, Err(error)) => return Err(error),
                }
            }
        }
        for (plan, bound) in best.iter_mut().zip(bounds) {
            if let (Ok(plan), Some(bound)) = (plan, bound) {
                plan.optimality = plan.optimality.map(|proof| bounded(proof, bound));
            }
        }
        Ok(best)
    }

    /// The plans in which these layers have a base.
    fn with(
        &self,
        layers: &BTreeSet<usize>,
        asked: &[u64],
    ) -> Result<Vec<Result<RankPlan, AllocateError>>, AllocateError> {
        let request = &self.request;
        let (matrices, experts) = with_bases(request, layers)?;
        let paid: u64 = layers.iter().map(|&layer| cost_of_base(request, layer)).sum();
        let based = AllocationRequest { matrices: &matrices, experts: &experts, ..*request };
        let wishes: Vec<_> = asked.iter().map(|asked| (asked + paid, Allocation::Global)).collect();
        let plans = Allocator::new(&based)?.plans(&wishes).into_iter().zip(asked);
        let energies = |matrices: &[Candidate<'_>]| -> BTreeMap<_, f64> {
            matrices.iter().map(|one| (one.name, one.spectrum.energy())).collect()
        };
        let (own, differing) = (energies(request.matrices), energies(&matrices));
        let finished = |(plan, &asked): (Result<RankPlan, AllocateError>, &u64)| {
            let mut plan = plan?;
            plan.target = Some(Target { remove_at_least: asked, ..request.target });
            // Of W, as for every other matrix; so far it is that of the difference.
            for row in plan.matrices.iter_mut().filter(|row| has_base(layers, row.matrix.id)) {
                let (own, differing) = (own[&row.matrix.id], differing[&row.matrix.id]);
                let share = if own > 0.0 { (differing / own).sqrt() } else { 0.0 };
                row.relative_error = row.relative_error.map(|error| (error * share).min(1.0));
            }
            Ok(plan.with_shared_bases(layers.iter().copied().collect())?)
        };
        Ok(plans.map(finished).collect())
    }
}

/// With a lower bound that holds for all sets of layers.
fn bounded(proof: Optimality, bound: f64) -> Optimality {
    let lower_bound = bound.min(proof.objective);
    let gap = if proof.objective > lower_bound { (proof.objective - lower_bound) / lower_bound } else { 0.0 };
    Optimality { lower_bound, duality_gap: gap.is_finite().then_some(gap), ..proof }
}

/// Candidates where the matrices of these layers are what distinguishes them from their base.
type WithBases<'a> = (Vec<Candidate<'a>>, Vec<ExpertCandidate<'a>>);

fn with_bases<'a>(
    request: &AllocationRequest<'a>,
    layers: &BTreeSet<usize>,
) -> Result<WithBases<'a>, AllocateError> {
    let spectra: BTreeMap<usize, _> =
        request.shared_bases.iter().map(|base| (base.layer, base.differences)).collect();
    let mut matrices = request.matrices.to_vec();
    for matrix in matrices.iter_mut().filter(|matrix| has_base(layers, matrix.name)) {
        let found = spectra.get(&matrix.name.layer).and_then(|spectra| spectra.get(&matrix.name));
        let layer = matrix.name.layer;
        matrix.spectrum = found.ok_or(AllocateError::Plan(PlanError::SharedBase { layer }))?;
    }
    let experts = request.experts.iter().filter(|expert| !layers.contains(&expert.layer)).copied().collect();
    Ok((matrices, experts))
}

/// Whether a matrix is one of those that share the base of its layer.
fn has_base(layers: &BTreeSet<usize>, id: MatrixId) -> bool {
    layers.contains(&id.layer) && !id.is_shared()
}

fn by_layer(curves: &[Curve]) -> BTreeMap<usize, Vec<&Curve>> {
    let mut layers: BTreeMap<usize, Vec<&Curve>> = BTreeMap::new();
    curves.iter().for_each(|curve| layers.entry(curve.name().layer).or_default().push(curve));
    layers
}

/// Of the three matrices of a layer's base.
fn cost_of_base(request: &AllocationRequest<'_>, layer: usize) -> u64 {
    let cost = CostModel { unit: request.target.unit, ..request.cost };
    let first =
        request.matrices.iter().filter(|matrix| matrix.name.layer == layer && matrix.name.expert == 0);
    first.map(|matrix| cost.with(matrix.element_bytes).of_shared_base(matrix.shape)).sum()
}
