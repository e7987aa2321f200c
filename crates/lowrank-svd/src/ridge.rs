//! Ridge regression from the activations in the compressed model to those in the original one.
//!
//! Once earlier matrices are compressed, a matrix W [m, n] gets inputs x̂ for x. The factors should then not repeat W but
//! give W x from x̂: the least of (1−b) Σ ‖W x − Ŵ x̂‖² + b t ‖W − Ŵ‖² is, up to a constant, the error of Ŵ against W M in
//! the norm of C_x̂x̂, where M = C̃_xx̂ C̃_x̂x̂⁺ is the ridge regression of x on x̂ and both second moments are shrunk towards
//! the same t I. For outputs y = W z and ŷ = W ẑ the same holds of T W, with tr(O_ŷŷ)/‖W‖² W Wᵀ in place of t I.
//! (Reduced-rank regression: Izenman, 1975; for compression: AA-SVD, arXiv 2604.02119.)

use crate::error::SvdError;
use crate::linalg::product;
use crate::moment::{UnitMoment, check_shrinkage, check_square};
use crate::root::{MomentRoot, Root};
use crate::stats::weight_stats;
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{Backend, Kernels, Side, mirror_lower};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2};

/// What a second moment is shrunk towards.
#[derive(Debug, Clone, Copy)]
pub enum ShrinkageTarget<'a> {
    /// The identity, for inputs: the map of [`crate::Metric::Inputs`].
    Identity,
    /// W Wᵀ, for the outputs of W: the map of [`crate::Metric::Outputs`].
    GramOf(&'a Tensor),
}

/// The map [d, d] for a norm of the same second moment and shrinkage, M or T.
///
/// `cross_moment` is Σ x x̂ᵀ [d, d], `second_moment` Σ x̂ x̂ᵀ [d, d], of which the lower triangle is read and which may be
/// singular: its inverse is taken over the eigenvalues above d·ε·λ₁. The identity where it vanishes. For inputs the root
/// of the shrunk second moment comes with it, which [`crate::Metric::Inputs`] needs for each matrix with these inputs.
///
/// # Errors
/// A matrix is not [d, d] or not finite, the shrinkage is outside 0..=1, or the decomposition fails.
pub fn ridge_map(
    backend: &dyn Backend,
    cross_moment: ArrayView2<'_, f64>,
    second_moment: ArrayView2<'_, f64>,
    shrinkage: f64,
    target: ShrinkageTarget<'_>,
) -> Result<(Array2<f64>, Option<MomentRoot>), SvdError> {
    check_shrinkage(shrinkage)?;
    let kernels: &dyn Kernels<f64> = backend;
    let (size, shape, energy) = match target {
        ShrinkageTarget::Identity => {
            let size = second_moment.nrows();
            (size, MatrixShape { rows: size, cols: size }, 1.0)
        }
        ShrinkageTarget::GramOf(w) => {
            let energy = weight_stats(w)?.energy;
            (w.shape()[0], matrix_shape(w), energy)
        }
    };
    check_square("cross moment", cross_moment, size, shape)?;
    let moment = UnitMoment::new(second_moment, size, shape)?;
    let Some(UnitMoment { matrix: moment, mean }) = moment.filter(|_| energy > 0.0) else {
        return Ok((Array2::eye(size), None));
    };
    // Of mean eigenvalue 1, as the second moment is.
    let mut prior = match target {
        ShrinkageTarget::Identity => Array2::eye(size),
        ShrinkageTarget::GramOf(w) => {
            let mut gram = kernels.gram(w, Side::Rows) * (size as f64 / energy);
            mirror_lower(&mut gram);
            gram
        }
    };
    prior *= shrinkage;
    let moment = moment * (1.0 - shrinkage) + &prior;
    let cross = &cross_moment * ((1.0 - shrinkage) / mean) + &prior;
    let root = Root::of(kernels, moment)?;
    let inverse: Array2<f64> = root.inverse_transposed();
    let half = product(kernels, cross.view(), inverse.view());
    let map = product(kernels, half.view(), inverse.t());
    Ok((map, matches!(target, ShrinkageTarget::Identity).then_some(MomentRoot(root))))
}

#[cfg(test)]
mod tests;
