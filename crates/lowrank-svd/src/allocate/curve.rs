//! The choices of one matrix: cost and weighted error of every permitted rank, and of leaving it dense.

use super::hull::{lower_hull, slope};
use super::request::{AllocateError, Candidate, Choices};
use lowrank_model::plan::{PlanError, Sensitivity};
use lowrank_model::widths::expert_shape;
use lowrank_model::{CostModel, ElementBytes, MatrixId, MatrixShape, Projection, params::rank_max_saving};

/// Choices by rising cost: permitted ranks that are cheaper than the dense matrix, then dense; or a given rank alone.
/// Errors do not rise.
#[derive(Clone)]
pub(super) struct MatrixCurve {
    pub(super) name: MatrixId,
    pub(super) shape: MatrixShape,
    /// Where they are not those of the request.
    pub(super) element_bytes: Option<ElementBytes>,
    cost: CostModel,
    /// s
    weight: f64,
    /// Squared error of every rank.
    tails: Vec<f64>,
    rank_first: usize,
    rank_multiple: usize,
    ranks: usize,
    /// The dearest choice.
    last: usize,
    /// Choices on the lower convex hull of (cost, error), by rising cost.
    hull: Vec<u32>,
}

/// From this short side on, a matrix is not left with factors of a single column beside those of a rank: quantisers refuse them.
const SLIVER_FROM: usize = 16;

/// The largest rank that is chosen, as far as it saves anything.
fn rank_last(shape: MatrixShape) -> usize {
    let short = shape.short_side();
    if short < SLIVER_FROM { short } else { short - 2 }
}

impl MatrixCurve {
    pub(super) fn new(
        matrix: Candidate<'_>,
        cost: CostModel,
        rank_multiple: usize,
        rank_floor: usize,
        sensitivity: Sensitivity,
    ) -> Result<Self, AllocateError> {
        let Candidate { name, shape, spectrum, measured, .. } = matrix;
        if spectrum.sigma().len() != shape.short_side() {
            return Err(AllocateError::Spectrum { name, shape, values: spectrum.sigma().len() });
        }
        let tails = spectrum.tail_energies();
        if sensitivity == Sensitivity::Measured && !(measured.is_finite() && measured >= 0.0) {
            return Err(AllocateError::Measured { name, value: measured.to_string() });
        }
        let weight = weight(sensitivity, tails[0], measured);
        Self::of_tails(matrix, tails, weight, cost, rank_multiple, rank_floor)
    }

    /// From the squared error of every rank and its weight s; the candidate's spectrum is not read.
    pub(super) fn of_tails(
        matrix: Candidate<'_>,
        tails: Vec<f64>,
        weight: f64,
        cost: CostModel,
        rank_multiple: usize,
        rank_floor: usize,
    ) -> Result<Self, AllocateError> {
        let Candidate { name, shape, choices, element_bytes, .. } = matrix;
        let cost = cost.with(element_bytes);
        let rank_max = rank_max_saving(shape, cost.storage);
        let dense = cost.cost(shape, None);
        let rank_first = match choices {
            Choices::Rank(rank) if rank == 0 || rank > rank_max => {
                return Err(PlanError::Rank { name, shape, rank, rank_max }.into());
            }
            Choices::Rank(rank) => rank,
            Choices::Any | Choices::Dense => rank_floor,
        };
        // Costs rise with the rank, so the permitted ranks are the first ones.
        let permitted = (rank_first..=rank_max.min(rank_last(shape))).step_by(rank_multiple);
        let ranks = match choices {
            Choices::Dense => 0,
            Choices::Rank(_) => 1,
            Choices::Any => permitted.take_while(|&rank| cost.cost(shape, Some(rank)) < dense).count(),
        };
        let last = if matches!(choices, Choices::Rank(_)) { 0 } else { ranks };
        let mut curve = Self {
            name,
            shape,
            element_bytes,
            cost,
            weight,
            tails,
            rank_first,
            rank_multiple,
            ranks,
            last,
            hull: Vec::new(),
        };
        curve.hull = lower_hull(curve.last() + 1, |from, to| curve.slope(from, to));
        Ok(curve)
    }

    /// Number of permitted ranks.
    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    /// The dearest choice: leave it dense, if that is one.
    pub(super) fn last(&self) -> usize {
        self.last
    }

    pub(super) fn rank(&self, choice: usize) -> Option<usize> {
        (choice < self.ranks).then(|| self.rank_first + choice * self.rank_multiple)
    }

    pub(super) fn cost(&self, choice: usize) -> u64 {
        self.cost.cost(self.shape, self.rank(choice))
    }

    /// Of all that stays of it at a width of its expert.
    pub(super) fn cost_narrowed(&self, width: usize) -> u64 {
        let projection = self.name.projection;
        let hidden_size = if projection == Projection::Down { self.shape.rows } else { self.shape.cols };
        self.cost.cost(expert_shape(projection, width, hidden_size), None)
    }

    /// s · ‖W − Ŵ‖²
    pub(super) fn error(&self, choice: usize) -> f64 {
        self.rank(choice).map_or(0.0, |rank| self.weight * self.tails[rank])
    }

    /// s · ‖W‖²
    pub(super) fn largest_error(&self) -> f64 {
        self.weight * self.tails[0]
    }

    /// ‖W − Ŵ‖ / ‖W‖
    pub(super) fn relative_error(&self, choice: usize) -> f64 {
        match self.rank(choice) {
            Some(rank) if self.tails[0] > 0.0 => (self.tails[rank] / self.tails[0]).sqrt(),
            _ => 0.0,
        }
    }

    /// Error saved per cost between two choices.
    pub(super) fn slope(&self, from: usize, to: usize) -> f64 {
        slope((self.cost(from), self.error(from)), (self.cost(to), self.error(to)))
    }

    pub(super) fn hull(&self) -> &[u32] {
        &self.hull
    }
}

/// The one place where errors of different matrices are made comparable.
pub(super) fn weight(sensitivity: Sensitivity, energy: f64, measured: f64) -> f64 {
    match sensitivity {
        Sensitivity::Absolute => 1.0,
        Sensitivity::Relative if energy > 0.0 => 1.0 / energy,
        Sensitivity::Relative => 0.0,
        Sensitivity::Measured => measured,
    }
}
