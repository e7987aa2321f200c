//! The choices of one expert that may be narrowed: its width, and the ranks of what stays of its three matrices.
//!
//! At a given width the three matrices are independent, so its best choices are those along the three hulls by falling
//! slope. All widths' choices together have one lower hull: its vertices are the expert's choices.

use super::curve::MatrixCurve;
use super::hull::{lower_hull, slope};
use super::request::{AllocateError, Candidate, Choices, ExpertCandidate};
use lowrank_model::plan::Sensitivity;
use lowrank_model::widths::expert_shape;
use lowrank_model::{CostModel, KeptChannels, MatrixShape, Projection};

/// What an expert may become, by rising cost and falling error.
#[derive(Clone)]
pub(super) struct ExpertCurve {
    /// By projection, at the expert's full width.
    matrices: [MatrixCurve; 3],
    /// Channels by falling importance.
    order: Vec<usize>,
    /// Squared error of the outputs at each width 0..=F, and s of such an error.
    width_errors: Vec<f64>,
    measured: f64,
    ranks: bool,
    choices: Vec<ExpertChoice>,
    hull: Vec<u32>,
}

/// One choice.
#[derive(Debug, Clone, Copy)]
struct ExpertChoice {
    cost: u64,
    error: f64,
    width: usize,
    ranks: [Option<usize>; 3],
    /// ‖W − Ŵ‖ / ‖W‖ of what stays of each matrix.
    relative_errors: [f64; 3],
}

/// What a plan says of an expert.
pub(super) struct PlannedChoice {
    /// Absent: all.
    pub(super) channels: Option<KeptChannels>,
    /// See [`lowrank_model::plan::PlannedExpert::relative_error`].
    pub(super) width_error: f64,
    /// Rank and relative error by projection.
    pub(super) matrices: [(Option<usize>, f64); 3],
}

impl ExpertCurve {
    /// `matrices` are those of one expert in the order of [`Projection::ALL`]. None is kept dense or has a given rank.
    pub(super) fn new(
        matrices: [Candidate<'_>; 3],
        expert: ExpertCandidate<'_>,
        cost: CostModel,
        rank_multiple: usize,
        rank_floor: usize,
    ) -> Result<Self, AllocateError> {
        let ExpertCandidate { order, errors, measured, grid, ranks, .. } = expert;
        let name = matrices[0].name;
        let (full, hidden_size) = (matrices[0].shape.rows, matrices[0].shape.cols);
        let is_error = |pair: &[f64]| pair[0].is_finite() && pair[0] >= pair[1] && pair[1] >= 0.0;
        if order.len() != full || errors.len() != full + 1 || !errors.windows(2).all(is_error) {
            return Err(AllocateError::Widths { name });
        }
        if !(measured.is_finite() && measured >= 0.0) {
            return Err(AllocateError::Measured { name, value: measured.to_string() });
        }
        if !(measured * errors[0]).is_finite() {
            return Err(AllocateError::NotFinite { name });
        }
        let curve = |matrix: Candidate<'_>| {
            MatrixCurve::new(matrix, cost, rank_multiple, rank_floor, Sensitivity::Measured)
        };
        let whole = [curve(matrices[0])?, curve(matrices[1])?, curve(matrices[2])?];
        let mut points = Vec::new();
        chain(&whole, full, 0.0, ranks, &mut points);
        for narrowed in grid {
            if !(1..full).contains(&narrowed.width) {
                return Err(AllocateError::Widths { name });
            }
            if narrowed.width % rank_multiple != 0 {
                continue;
            }
            let curve = |at: usize| {
                let shape = expert_shape(Projection::ALL[at], narrowed.width, hidden_size);
                narrowed_curve(&matrices[at], shape, &narrowed.tails[at], cost, rank_multiple, rank_floor)
            };
            let curves = [curve(0)?, curve(1)?, curve(2)?];
            chain(&curves, narrowed.width, measured * errors[narrowed.width], ranks, &mut points);
        }
        // Every width with all of what stays: no spectrum is needed for these.
        for width in (1..full).filter(|width| width % rank_multiple == 0) {
            points.push(ExpertChoice {
                cost: whole.iter().map(|matrix| matrix.cost_narrowed(width)).sum(),
                error: measured * errors[width],
                width,
                ranks: [None; 3],
                relative_errors: [0.0; 3],
            });
        }
        let choices = falling(points);
        let hull = lower_hull(choices.len(), |from, to| {
            slope((choices[from].cost, choices[from].error), (choices[to].cost, choices[to].error))
        });
        let choices: Vec<ExpertChoice> = hull.iter().map(|&vertex| choices[vertex as usize]).collect();
        Ok(Self {
            matrices: whole,
            order: order.to_vec(),
            width_errors: errors.to_vec(),
            measured,
            ranks,
            hull: (0..choices.len() as u32).collect(),
            choices,
        })
    }

    /// No choice has a larger one, nor has a width with all of what stays.
    pub(super) fn largest_error(&self) -> f64 {
        let whole: f64 = self.matrices.iter().map(MatrixCurve::largest_error).sum();
        self.error(0).max(self.measured * self.width_errors[0]).max(whole)
    }

    /// Whether its matrices may be factored.
    pub(super) fn has_ranks(&self) -> bool {
        self.ranks
    }

    /// F.
    pub(super) fn channels(&self) -> usize {
        self.order.len()
    }

    /// Of all that stays at a width.
    pub(super) fn cost_of(&self, width: usize) -> u64 {
        self.matrices.iter().map(|matrix| matrix.cost_narrowed(width)).sum()
    }

    /// The same expert with no other choice than all that stays at a width.
    pub(super) fn at_width(&self, width: usize) -> Self {
        let choice = ExpertChoice {
            cost: self.cost_of(width),
            error: self.measured * self.width_errors[width],
            width,
            ranks: [None; 3],
            relative_errors: [0.0; 3],
        };
        Self { choices: vec![choice], hull: vec![0], ..self.clone() }
    }

    pub(super) fn matrices(&self) -> &[MatrixCurve; 3] {
        &self.matrices
    }

    pub(super) fn last(&self) -> usize {
        self.choices.len() - 1
    }

    pub(super) fn cost(&self, choice: usize) -> u64 {
        self.choices[choice].cost
    }

    pub(super) fn error(&self, choice: usize) -> f64 {
        self.choices[choice].error
    }

    pub(super) fn hull(&self) -> &[u32] {
        &self.hull
    }

    pub(super) fn planned(&self, choice: usize) -> PlannedChoice {
        let ExpertChoice { width, ranks, relative_errors, .. } = self.choices[choice];
        let full = self.order.len();
        let row = |at: usize| (ranks[at], relative_errors[at]);
        PlannedChoice {
            channels: (width < full).then(|| KeptChannels::new(&self.order[..width], full)),
            width_error: match self.width_errors[0] {
                energy if energy > 0.0 => (self.width_errors[width] / energy).sqrt(),
                _ => 0.0,
            },
            matrices: [row(0), row(1), row(2)],
        }
    }
}

/// The curve of what stays of a matrix.
fn narrowed_curve(
    matrix: &Candidate<'_>,
    shape: MatrixShape,
    tails: &[f64],
    cost: CostModel,
    rank_multiple: usize,
    rank_floor: usize,
) -> Result<MatrixCurve, AllocateError> {
    let least = shape.short_side() + 1;
    let falls = tails.windows(2).all(|pair| pair[0].is_finite() && pair[0] >= pair[1] && pair[1] >= 0.0);
    if tails.len() < least || !falls {
        return Err(AllocateError::Widths { name: matrix.name });
    }
    let narrowed = Candidate { shape, choices: Choices::Any, ..*matrix };
    let weight = matrix.measured;
    MatrixCurve::of_tails(narrowed, tails[..least].to_vec(), weight, cost, rank_multiple, rank_floor)
}

/// Adds the choices of one width: from the cheapest of all three matrices along their hulls by falling slope. `ranks`: whether
/// a matrix may be factored; otherwise only the whole of what stays is a choice.
fn chain(
    curves: &[MatrixCurve; 3],
    width: usize,
    width_error: f64,
    ranks: bool,
    points: &mut Vec<ExpertChoice>,
) {
    // Vertices of the hulls.
    let mut at = [0, 1, 2].map(|m: usize| if ranks { 0 } else { curves[m].hull().len() - 1 });
    loop {
        let choice = |m: usize| curves[m].hull()[at[m]] as usize;
        points.push(ExpertChoice {
            cost: (0..3).map(|m| curves[m].cost(choice(m))).sum(),
            error: width_error + (0..3).map(|m| curves[m].error(choice(m))).sum::<f64>(),
            width,
            ranks: [0, 1, 2].map(|m| curves[m].rank(choice(m))),
            relative_errors: [0, 1, 2].map(|m| curves[m].relative_error(choice(m))),
        });
        let steepest = (0..3)
            .filter(|&m| at[m] + 1 < curves[m].hull().len())
            .map(|m| (curves[m].slope(choice(m), curves[m].hull()[at[m] + 1] as usize), m))
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, m)) = steepest else { return };
        at[m] += 1;
    }
}

/// By rising cost, without those that cost as much as a better one or more.
fn falling(mut points: Vec<ExpertChoice>) -> Vec<ExpertChoice> {
    points.sort_by(|a, b| a.cost.cmp(&b.cost).then(a.error.total_cmp(&b.error)).then(b.width.cmp(&a.width)));
    let mut least = f64::INFINITY;
    // The dearest, all of the expert, has no error: it stays unless something cheaper has none either.
    points.retain(|point| {
        let better = point.error < least;
        least = least.min(point.error);
        better
    });
    points
}
