//! What factors miss, block by block: the product in f64, whatever the factors were made in, where an optimum is held
//! against it, and every sum in f64.

use crate::precision::{Precision, of_measurements};
use crate::survey::survey;
use crate::{Factors, SvdError};
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Accumulate, Backend, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, s};

/// ‖W − u·v‖².
pub fn residual_energy(backend: &dyn Backend, w: &Tensor, factors: &Factors) -> f64 {
    let kernels: &dyn Kernels<f64> = backend;
    missed(kernels, w, factors)
}

/// ‖W − u·v‖ / ‖W‖, 0 of a zero matrix: to be told, so in f32 where that is cheaper, which loses what is below a millionth.
pub fn relative_error(backend: &dyn Backend, w: &Tensor, factors: &Factors) -> Result<f64, SvdError> {
    let survey = survey(w)?;
    let missed = match of_measurements(&survey) {
        _ if survey.energy == 0.0 => return Ok(0.0),
        Precision::F32 => missed::<f32>(backend, w, factors),
        Precision::F64 => missed::<f64>(backend, w, factors),
    };
    Ok((missed / survey.energy).sqrt())
}

fn missed<T: Real>(kernels: &dyn Kernels<T>, w: &Tensor, factors: &Factors) -> f64 {
    let mut energy = 0.0;
    for_each_residual(kernels, w, Side::Cols, factors, |_, _, residual| energy += energy_of(residual));
    energy
}

/// The sum of all squares.
pub(crate) fn energy_of<T: Real>(matrix: &Array2<T>) -> f64 {
    matrix.iter().map(|value| value.as_f64() * value.as_f64()).sum::<f64>()
}

/// Calls `visit(first, block, residual)` for the blocks of rows of A, in order, where A is W or Wᵀ by side and residual the
/// same rows of A − Â.
pub(crate) fn for_each_residual<T: Real>(
    kernels: &dyn Kernels<T>,
    w: &Tensor,
    side: Side,
    factors: &Factors,
    mut visit: impl FnMut(usize, ArrayView2<'_, T>, &mut Array2<T>),
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
        visit(first, block, &mut residual);
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
