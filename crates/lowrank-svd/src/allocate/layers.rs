//! One choice for all experts of a layer: the same width, and the same rank for the same projection, as fused kernels want.
//!
//! The experts of a layer become one expert whose errors are the sums of theirs. That is planned like any other model, of which
//! an n-th of the target must go where a layer has n experts.

use super::curve::weight;
use super::problem::{self, Allocator};
use super::request::{AllocateError, AllocationRequest, Candidate, ExpertCandidate, NarrowedErrors};
use lowrank_model::plan::{Allocation, Optimality, PlannedExpert, PlannedMatrix, RankGroups, Sensitivity};
use lowrank_model::{KeptChannels, MatrixId, NamedMatrix, Projection, RankPlan, Spectrum, Target};
use std::collections::BTreeMap;

/// A layer's experts, summed.
struct Layers<'a> {
    request: &'a AllocationRequest<'a>,
    /// Of each layer.
    experts_per_layer: u64,
    /// Each layer's spectrum by projection; its first expert stands for all.
    spectra: Vec<(Candidate<'a>, Spectrum)>,
    widths: Vec<Widths>,
}

/// Errors of the widths of a layer's experts, summed.
struct Widths {
    layer: usize,
    expert: usize,
    ranks: bool,
    order: Vec<usize>,
    errors: Vec<f64>,
    grid: Vec<NarrowedErrors>,
}

/// As [`super::plans`], with one choice for all experts of a layer.
pub(super) fn plans(
    request: &AllocationRequest<'_>,
    wishes: &[(u64, Allocation)],
) -> Result<Vec<Result<RankPlan, AllocateError>>, AllocateError> {
    let layers = Layers::new(request)?;
    layers.with_request(request.target.remove_at_least, |summed| {
        let shares: Vec<_> =
            wishes.iter().map(|&(asked, how)| (asked.div_ceil(layers.experts_per_layer), how)).collect();
        let found = Allocator::new(summed)?.plans(&shares).into_iter().zip(wishes);
        let spread = |(plan, &(asked, _)): (Result<RankPlan, AllocateError>, _)| {
            layers.spread(&plan.map_err(|error| layers.scaled(error, asked))?, asked)
        };
        Ok(found.map(spread).collect())
    })
}

/// As [`super::check`], likewise.
pub(super) fn check(request: &AllocationRequest<'_>, allocation: Allocation) -> Result<(), AllocateError> {
    let (layers, asked) = (Layers::new(request)?, request.target.remove_at_least);
    let checked = layers.with_request(asked, |summed| problem::check(summed, allocation));
    checked.map_err(|error| layers.scaled(error, asked))
}

impl<'a> Layers<'a> {
    fn new(request: &'a AllocationRequest<'a>) -> Result<Self, AllocateError> {
        let mut groups: BTreeMap<(usize, usize), Vec<&Candidate<'_>>> = BTreeMap::new();
        for matrix in request.matrices {
            groups.entry((matrix.name.layer, matrix.name.projection.index())).or_default().push(matrix);
        }
        let experts_per_layer = groups.values().next().map_or(1, Vec::len);
        let mut spectra = Vec::new();
        for mut group in groups.into_values() {
            group.sort_unstable_by_key(|matrix| matrix.name);
            let first = *group[0];
            let like_first = |one: &&Candidate<'_>| {
                (one.shape, one.choices, one.element_bytes)
                    == (first.shape, first.choices, first.element_bytes)
            };
            if group.len() != experts_per_layer || !group.iter().all(like_first) {
                return Err(AllocateError::UnlikeExperts { layer: first.name.layer });
            }
            spectra.push((first, summed_spectrum(&group, request.sensitivity)?));
        }
        let mut by_layer: BTreeMap<usize, Vec<&ExpertCandidate<'_>>> = BTreeMap::new();
        for expert in request.experts {
            by_layer.entry(expert.layer).or_default().push(expert);
        }
        let by_name: BTreeMap<MatrixId, f64> =
            request.matrices.iter().map(|matrix| (matrix.name, matrix.measured)).collect();
        let measured = |expert: &ExpertCandidate<'_>, projection: Projection| {
            let id = MatrixId { layer: expert.layer, expert: expert.expert, projection };
            by_name.get(&id).copied().unwrap_or(1.0)
        };
        let widths = by_layer
            .into_values()
            .map(|group| summed_widths(&group, experts_per_layer, &measured))
            .collect::<Result<_, _>>()?;
        Ok(Self { request, experts_per_layer: experts_per_layer as u64, spectra, widths })
    }

    fn with_request<R>(
        &self,
        asked: u64,
        act: impl FnOnce(&AllocationRequest<'_>) -> Result<R, AllocateError>,
    ) -> Result<R, AllocateError> {
        let matrices: Vec<Candidate<'_>> = self
            .spectra
            .iter()
            .map(|(first, spectrum)| Candidate { spectrum, measured: 1.0, ..*first })
            .collect();
        let experts: Vec<ExpertCandidate<'_>> = self
            .widths
            .iter()
            .map(|own| ExpertCandidate {
                layer: own.layer,
                expert: own.expert,
                order: &own.order,
                errors: &own.errors,
                measured: 1.0,
                grid: &own.grid,
                ranks: own.ranks,
            })
            .collect();
        let target =
            Target { remove_at_least: asked.div_ceil(self.experts_per_layer), ..self.request.target };
        act(&AllocationRequest {
            matrices: &matrices,
            experts: &experts,
            target,
            sensitivity: Sensitivity::Measured,
            rank_groups: RankGroups::Matrix,
            ..*self.request
        })
    }

    /// What one expert of each layer cannot do, said of all of them.
    fn scaled(&self, error: AllocateError, asked: u64) -> AllocateError {
        match error {
            AllocateError::Infeasible { most, unit, rank_floor, kept_dense, fixed, matrices, .. } => {
                let all = |count: usize| count * self.experts_per_layer as usize;
                AllocateError::Infeasible {
                    asked,
                    most: most * self.experts_per_layer,
                    unit,
                    rank_floor,
                    kept_dense: all(kept_dense),
                    fixed: all(fixed),
                    matrices: all(matrices),
                }
            }
            error => error,
        }
    }

    /// The plan of one expert of each layer, given to all of them.
    fn spread(&self, plan: &RankPlan, asked: u64) -> Result<RankPlan, AllocateError> {
        let request = self.request;
        let of_layer = |id: MatrixId| {
            let first = |row: &&PlannedMatrix| {
                (row.matrix.id.layer, row.matrix.id.projection) == (id.layer, id.projection)
            };
            plan.matrices.iter().find(first).expect("a row for each layer and projection")
        };
        let width_of: BTreeMap<usize, usize> =
            plan.experts.iter().map(|row| (row.layer, row.channels.width())).collect();
        let mut matrices: Vec<&Candidate<'_>> = request.matrices.iter().collect();
        matrices.sort_unstable_by_key(|matrix| matrix.name);
        let experts: BTreeMap<(usize, usize), &ExpertCandidate<'_>> =
            request.experts.iter().map(|own| ((own.layer, own.expert), own)).collect();
        let own = |id: MatrixId| experts.get(&(id.layer, id.expert)).copied();
        let rows = matrices.into_iter().map(|matrix| {
            let id = matrix.name;
            let row = of_layer(id);
            let error = row.rank.map_or(0.0, |rank| match width_of.get(&id.layer) {
                None => matrix.spectrum.relative_error(rank),
                Some(&width) => narrowed_error(own(id), width, id.projection, rank),
            });
            PlannedMatrix {
                matrix: NamedMatrix { name: request.family.spelling().module(id), id },
                relative_error: Some(error),
                ..row.clone()
            }
        });
        let narrowed = request.experts.iter().filter_map(|own| {
            let &width = width_of.get(&own.layer)?;
            let energy = own.errors[0];
            let relative_error = if energy > 0.0 { (own.errors[width] / energy).sqrt() } else { 0.0 };
            Some(PlannedExpert {
                layer: own.layer,
                expert: own.expert,
                channels: KeptChannels::new(&own.order[..width], own.order.len()),
                relative_error: Some(relative_error),
            })
        });
        let mut experts: Vec<PlannedExpert> = narrowed.collect();
        experts.sort_unstable_by_key(|row| (row.layer, row.expert));
        let target = Some(Target { remove_at_least: asked, ..request.target });
        let optimality =
            plan.optimality.map(|proof| Optimality { sensitivity: request.sensitivity, ..proof });
        Ok(RankPlan::new(target, plan.cost, plan.rank_multiple, request.before, optimality, rows.collect())?
            .narrowed(experts)?)
    }
}

/// ‖W − Ŵ‖ / ‖W‖ of what stays of a matrix.
fn narrowed_error(
    expert: Option<&ExpertCandidate<'_>>,
    width: usize,
    projection: Projection,
    rank: usize,
) -> f64 {
    let grid = expert.and_then(|expert| expert.grid.iter().find(|narrowed| narrowed.width == width));
    let tails = grid.map_or(&[][..], |narrowed| &narrowed.tails[projection.index()]);
    match (tails.first(), tails.get(rank)) {
        (Some(&energy), Some(&tail)) if energy > 0.0 => (tail / energy).sqrt(),
        _ => 0.0,
    }
}

/// A spectrum whose error at every rank is the weighted sum of the errors of all.
fn summed_spectrum(group: &[&Candidate<'_>], sensitivity: Sensitivity) -> Result<Spectrum, AllocateError> {
    let first = group[0];
    let mut squares = vec![0.0; first.shape.short_side()];
    for matrix in group {
        let sigma = matrix.spectrum.sigma();
        let (name, shape) = (matrix.name, matrix.shape);
        if sigma.len() != squares.len() {
            return Err(AllocateError::Spectrum { name, shape, values: sigma.len() });
        }
        let measured = matrix.measured;
        if sensitivity == Sensitivity::Measured && !(measured.is_finite() && measured >= 0.0) {
            return Err(AllocateError::Measured { name, value: measured.to_string() });
        }
        let share = weight(sensitivity, matrix.spectrum.energy(), measured);
        squares.iter_mut().zip(sigma).for_each(|(sum, sigma)| *sum += share * sigma * sigma);
    }
    Spectrum::new(squares.into_iter().map(f64::sqrt).collect())
        .map_err(|_| AllocateError::NotFinite { name: first.name })
}

fn summed_widths(
    group: &[&ExpertCandidate<'_>],
    experts_per_layer: usize,
    measured: &impl Fn(&ExpertCandidate<'_>, Projection) -> f64,
) -> Result<Widths, AllocateError> {
    let first = group.iter().min_by_key(|own| own.expert).expect("a group has a member");
    let unlike = AllocateError::UnlikeExperts { layer: first.layer };
    let widths = |own: &ExpertCandidate<'_>| own.grid.iter().map(|one| one.width).collect::<Vec<_>>();
    let like_first = |own: &&&ExpertCandidate<'_>| {
        (own.order.len(), own.errors.len(), widths(own))
            == (first.order.len(), first.errors.len(), widths(first))
    };
    if group.len() != experts_per_layer || !group.iter().all(|own| like_first(&own)) {
        return Err(unlike);
    }
    let mut errors = vec![0.0; first.errors.len()];
    let mut grid = first.grid.to_vec();
    grid.iter_mut().flat_map(|narrowed| &mut narrowed.tails).for_each(|tails| tails.fill(0.0));
    for own in group {
        errors.iter_mut().zip(own.errors).for_each(|(sum, error)| *sum += own.measured * error);
        for (sums, narrowed) in grid.iter_mut().zip(own.grid) {
            for projection in Projection::ALL {
                let weight = measured(own, projection);
                let (sums, tails) =
                    (&mut sums.tails[projection.index()], &narrowed.tails[projection.index()]);
                sums.iter_mut().zip(tails).for_each(|(sum, tail)| *sum += weight * tail);
            }
        }
    }
    let order = (0..first.order.len()).collect();
    Ok(Widths { layer: first.layer, expert: first.expert, ranks: first.ranks, order, errors, grid })
}
