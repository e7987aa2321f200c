//! What a norm must say of itself, so that one engine finds spectrum and factors in any of them.
//!
//! A norm turns W [m, n] into a symmetric matrix A whose eigenvalues beyond the rank sum to the least error, and the first
//! eigenvectors of A into Ŵ = (W Y) Xᵀ or, from the side of the outputs, X (Yᵀ W).

use crate::error::SvdError;
use crate::factors::BalancedFactors;
use crate::randomized::Sketch;
use crate::stats::Problem;
use lowrank_compute::{Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;

/// A, of which the lower triangle counts.
pub(crate) struct NormMatrix<T> {
    pub(crate) a: Array2<T>,
    /// What the rounding errors of A are relative to, where that is more than its own norm; else 0.
    pub(crate) bound: f64,
}

/// Â = (A Y) Xᵀ, where A is W or Wᵀ and X [d, r] has orthonormal columns. Y is X where absent.
pub(crate) struct Basis<T> {
    pub(crate) x: Array2<T>,
    pub(crate) y: Option<Array2<T>>,
}

/// What a random sketch found.
pub(crate) struct Sketched<T> {
    pub(crate) basis: Basis<T>,
    /// A Y [l, r], where it is a by-product.
    pub(crate) image: Option<Array2<f32>>,
    /// Of the matrix of the norm, along the sketch; falling.
    pub(crate) eigenvalues: Vec<T>,
}

/// Squared errors of factors.
pub(crate) struct SquaredErrors {
    /// ‖W − u·v‖²
    pub(crate) weights: f64,
    /// In the norm, over its scale; absent where that is the norm of the weights.
    pub(crate) norm: Option<f64>,
}

/// A norm, checked against its matrix and brought to a scale of about 1.
pub(crate) trait ErrorNorm: InPrecision<f32> + InPrecision<f64> {
    /// The side of the norm's moment: the eigenproblem has the size of this side.
    fn side(&self) -> Side;

    /// What was divided out of a squared error.
    fn scale(&self) -> f64;

    /// √(λ₁/λ) of A as far as it is known before A is: decides whether f32 is worth a try. A norm that spreads the
    /// eigenvalues says infinity, since a decomposition that is thrown away costs as much as one that is kept.
    fn expected_condition(&self) -> Option<f64>;

    /// tr A, where it is known exactly.
    fn trace(&self) -> Option<f64> {
        None
    }

    /// Whether the factors of W will be made in the norm of its spectrum, so that a decomposition can serve both.
    fn keeps_decomposition(&self) -> bool {
        false
    }

    /// Whether [`ErrorNorm::errors`] reads Y.
    fn errors_read_y(&self) -> bool {
        false
    }

    /// The errors of factors that came from Y [d, r].
    fn errors(
        &self,
        problem: &Problem<'_>,
        factors: &BalancedFactors,
        y: Option<ArrayView2<'_, f64>>,
    ) -> SquaredErrors;
}

/// The part of a norm that is computed in f32 or f64.
pub(crate) trait InPrecision<T: Real> {
    /// A.
    fn matrix(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> NormMatrix<T>;

    /// W in the norm's own coordinates, times eigenvectors V [k, k] of A, whose squares are the errors of rows and
    /// ranks: [m, k]. `None` in norms that have no such image.
    fn image(
        &self,
        _kernels: &dyn Kernels<T>,
        _w: &Tensor,
        _vectors: ArrayView2<'_, T>,
    ) -> Option<Array2<T>> {
        None
    }

    /// X and Y of eigenvectors of A.
    fn basis(&self, kernels: &dyn Kernels<T>, vectors: Array2<T>) -> Result<Basis<T>, SvdError>;

    /// The same without A, along a random subspace.
    fn sketch(
        &self,
        kernels: &dyn Kernels<T>,
        w: &Tensor,
        rank: usize,
        sketch: Sketch,
        rng: ChaCha8Rng,
    ) -> Result<Sketched<T>, SvdError>;
}
