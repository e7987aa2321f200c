//! What one item of the knapsack may become: a matrix, or an expert as a whole.

use super::curve::MatrixCurve;
use super::expert::ExpertCurve;
use super::hull::slope;
use lowrank_model::MatrixId;

/// Choices by rising cost; errors do not rise.
pub(super) enum Curve {
    /// One matrix on its own.
    Matrix(MatrixCurve),
    /// An expert's width and the ranks of its three matrices.
    Expert(Box<ExpertCurve>),
}

/// A step along the hull of a curve.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// Error saved per cost.
    pub(super) slope: f64,
    pub(super) curve: u32,
    /// From this vertex of the hull to the next.
    pub(super) vertex: u32,
}

impl Curve {
    /// Its first matrix.
    pub(super) fn name(&self) -> MatrixId {
        match self {
            Self::Matrix(curve) => curve.name,
            Self::Expert(curve) => curve.matrices()[0].name,
        }
    }

    /// The dearest choice: leave all as it is, if that is one.
    pub(super) fn last(&self) -> usize {
        match self {
            Self::Matrix(curve) => curve.last(),
            Self::Expert(curve) => curve.last(),
        }
    }

    pub(super) fn cost(&self, choice: usize) -> u64 {
        match self {
            Self::Matrix(curve) => curve.cost(choice),
            Self::Expert(curve) => curve.cost(choice),
        }
    }

    /// Σ s · err
    pub(super) fn error(&self, choice: usize) -> f64 {
        match self {
            Self::Matrix(curve) => curve.error(choice),
            Self::Expert(curve) => curve.error(choice),
        }
    }

    /// Choices on the lower convex hull of (cost, error), by rising cost.
    pub(super) fn hull(&self) -> &[u32] {
        match self {
            Self::Matrix(curve) => curve.hull(),
            Self::Expert(curve) => curve.hull(),
        }
    }

    /// Error saved per cost between two choices.
    pub(super) fn slope(&self, from: usize, to: usize) -> f64 {
        slope((self.cost(from), self.error(from)), (self.cost(to), self.error(to)))
    }

    /// The choices at both ends of a hull segment.
    pub(super) fn ends(&self, vertex: u32) -> (usize, usize) {
        let (vertex, hull) = (vertex as usize, self.hull());
        (hull[vertex] as usize, hull[vertex + 1] as usize)
    }

    /// The first vertex of the hull beyond a choice.
    pub(super) fn next_vertex(&self, choice: usize) -> Option<usize> {
        let beyond = self.hull().partition_point(|&vertex| vertex as usize <= choice);
        self.hull().get(beyond).map(|&vertex| vertex as usize)
    }

    /// An upper bound of its errors.
    pub(super) fn largest_error(&self) -> f64 {
        match self {
            Self::Matrix(curve) => curve.largest_error(),
            Self::Expert(curve) => curve.largest_error(),
        }
    }
}
