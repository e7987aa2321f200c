//! The residual W − u·v, block by block. Where it is compared with an optimum, products are in f64, whatever the factors
//! were made in; every sum is in f64.

use crate::error::SvdError;
use crate::factors::{BalancedFactors, Factors};
use crate::linalg::energy_of;
use crate::precision::{ERROR_SHARE_BY_DIFFERENCE, Precision, of_measurements};
use crate::stats::{Problem, weight_stats};
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Accumulate, Backend, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, s};

/// ‖W − u·v‖².
pub fn residual_energy(backend: &dyn Backend, w: &Tensor, factors: &Factors) -> f64 {
    energy_of_residual::<f64>(backend, w, factors)
}

/// ‖W − u·v‖², from the energy that the factors keep where that is exact enough.
pub(crate) fn truncation_energy(problem: &Problem<'_>, balanced: &BalancedFactors) -> f64 {
    let energy = problem.stats.energy;
    let by_difference = energy - balanced.kept_energy;
    if by_difference >= ERROR_SHARE_BY_DIFFERENCE * energy {
        by_difference
    } else {
        residual_energy(problem.backend, problem.w, &balanced.factors)
    }
}

/// ‖W − u·v‖ / ‖W‖, 0 of a zero matrix. For reports: in f32 where that is cheaper, which loses what is below a millionth.
///
/// # Errors
/// W is no finite matrix.
pub fn relative_error(backend: &dyn Backend, w: &Tensor, factors: &Factors) -> Result<f64, SvdError> {
    let stats = weight_stats(w)?;
    let residual = match of_measurements(&stats) {
        _ if stats.energy == 0.0 => return Ok(0.0),
        Precision::F32 => energy_of_residual::<f32>(backend, w, factors),
        Precision::F64 => energy_of_residual::<f64>(backend, w, factors),
    };
    Ok((residual / stats.energy).sqrt())
}

fn energy_of_residual<T: Real>(kernels: &dyn Kernels<T>, w: &Tensor, factors: &Factors) -> f64 {
    let mut energy = 0.0;
    for_each_residual(kernels, w, Side::Cols, factors, |_, _, residual| energy += energy_of(residual));
    energy
}

/// Calls `each(first, block, residual)` for the blocks of rows of A, in order, where A is W or Wᵀ by side and residual the
/// same rows of A − Â.
pub(crate) fn for_each_residual<T: Real>(
    kernels: &dyn Kernels<T>,
    w: &Tensor,
    side: Side,
    factors: &Factors,
    mut each: impl FnMut(usize, ArrayView2<'_, T>, &mut Array2<T>),
) {
    let (u, v) = wide(factors);
    // Â = far · near
    let (far, near) = match side {
        Side::Cols => (u.view(), v.view()),
        Side::Rows => (v.t(), u.t()),
    };
    let mut residual = Array2::zeros((0, 0));
    for_each_block::<T>(w, side, |first, block| {
        if residual.nrows() != block.nrows() {
            residual = Array2::zeros(block.dim());
        }
        let rows = far.slice(s![first..first + block.nrows(), ..]);
        kernels.gemm(rows, near, residual.view_mut(), Accumulate::Replace);
        residual.zip_mut_with(&block, |product, value| *product = *value - *product);
        each(first, block, &mut residual);
    });
}

/// u [m, r] and v [r, n].
pub(crate) fn wide<T: Real>(factors: &Factors) -> (Array2<T>, Array2<T>) {
    let Factors { shape, rank, u, v } = factors;
    let wide = |values: &[f32], rows, cols| {
        ArrayView2::from_shape((rows, cols), values).expect("factors have their shapes").mapv(T::of_f32)
    };
    (wide(u, shape.rows, *rank), wide(v, *rank, shape.cols))
}
