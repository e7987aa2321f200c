//! The map from the activations that a compressed model sees to those that the original one saw.
//!
//! Once earlier matrices are compressed, a matrix W [m, n] meets inputs x̂ for x. The factors should then not repeat W but
//! give W x from x̂: the least of (1−b) Σ ‖W x − Ŵ x̂‖² + b t ‖W − Ŵ‖² is, up to a constant, the error of Ŵ against W M in
//! the metric of C_x̂x̂, where M = C̃_xx̂ C̃_x̂x̂⁺ is the ridge regression of x on x̂ and both moments are blended with the same
//! b t I. For outputs y = W z and ŷ = W ẑ the same holds of T W, with b tr(O_ŷŷ)/‖W‖² W Wᵀ in place of b t I.

use crate::SvdError;
use crate::inputs::product;
use crate::metric::{check_blend, checked, mirror, unit_moment};
use crate::root::{MomentRoot, Root};
use crate::survey::survey;
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{Backend, Kernels, Side};
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2};

/// What a blend puts in place of activations that were not seen.
#[derive(Debug, Clone, Copy)]
pub enum Unseen<'a> {
    /// Inputs in every direction alike: the map of [`crate::Metric::Inputs`].
    Inputs,
    /// Outputs W Wᵀ: the map of [`crate::Metric::Outputs`].
    OutputsOf(&'a Tensor),
}

/// The map [d, d] for a metric of the same `moment` and `blend`.
///
/// `cross` is Σ x x̂ᵀ [d, d], `moment` Σ x̂ x̂ᵀ [d, d], of which the lower triangle is read and which may be singular: its
/// inverse is taken over the eigenvalues above d·ε·λ₁. The identity where it vanishes. For inputs the root of the blended
/// moment comes with it, which [`crate::Metric::Inputs`] needs for each matrix that sees them.
pub fn fitted_map(
    backend: &dyn Backend,
    cross: ArrayView2<'_, f64>,
    moment: ArrayView2<'_, f64>,
    blend: f64,
    unseen: Unseen<'_>,
) -> Result<(Array2<f64>, Option<MomentRoot>), SvdError> {
    check_blend(blend)?;
    let kernels: &dyn Kernels<f64> = backend;
    let (size, shape, energy) = match unseen {
        Unseen::Inputs => {
            let size = moment.nrows();
            (size, MatrixShape { rows: size, cols: size }, 1.0)
        }
        Unseen::OutputsOf(w) => {
            let energy = survey(w)?.energy;
            (w.shape()[0], matrix_shape(w), energy)
        }
    };
    checked("cross moment", cross, size, shape)?;
    let (unit, mean) = unit_moment(moment, size, shape)?;
    let Some(mut moment) = unit.filter(|_| energy > 0.0) else { return Ok((Array2::eye(size), None)) };
    // Of mean eigenvalue 1, as the moment is.
    let mut prior = match unseen {
        Unseen::Inputs => Array2::eye(size),
        Unseen::OutputsOf(w) => {
            let mut gram = kernels.gram(w, Side::Rows) * (size as f64 / energy);
            mirror(&mut gram);
            gram
        }
    };
    prior *= blend;
    moment = moment * (1.0 - blend) + &prior;
    let cross = &cross * ((1.0 - blend) / mean) + &prior;
    let root = Root::of(kernels, moment)?;
    let inverse: Array2<f64> = root.inverse_transposed();
    let half = product(kernels, cross.view(), inverse.view());
    let map = product(kernels, half.view(), inverse.t());
    Ok((map, matches!(unseen, Unseen::Inputs).then_some(MomentRoot(root))))
}

#[cfg(test)]
mod tests;
