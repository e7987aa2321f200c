//! What factors miss, block by block: the product and every sum in f64, whatever the factors were made in.

use crate::Factors;
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Accumulate, Backend, Kernels, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, s};

/// ‖W − u·v‖².
pub fn residual_energy(backend: &dyn Backend, w: &Tensor, factors: &Factors) -> f64 {
    let mut energy = 0.0;
    for_each_residual(backend, w, Side::Cols, factors, |_, _, residual| energy += energy_of(residual));
    energy
}

/// The sum of all squares.
pub(crate) fn energy_of(matrix: &Array2<f64>) -> f64 {
    matrix.iter().map(|value| value * value).sum::<f64>()
}

/// Calls `visit(first, block, residual)` for the blocks of rows of A, in order, where A is W or Wᵀ by side and residual the
/// same rows of A − Â.
pub(crate) fn for_each_residual(
    backend: &dyn Backend,
    w: &Tensor,
    side: Side,
    factors: &Factors,
    mut visit: impl FnMut(usize, ArrayView2<'_, f64>, &mut Array2<f64>),
) {
    let kernels: &dyn Kernels<f64> = backend;
    let (u, v) = wide(factors);
    // Â = far · near
    let (far, near) = match side {
        Side::Cols => (u.view(), v.view()),
        Side::Rows => (v.t(), u.t()),
    };
    let mut residual = Array2::zeros((0, 0));
    for_each_block::<f64>(w, side, |first, block| {
        if residual.nrows() != block.nrows() {
            residual = Array2::zeros(block.dim());
        }
        let rows = far.slice(s![first..first + block.nrows(), ..]);
        kernels.gemm(rows, near, residual.view_mut(), Accumulate::Replace);
        residual.zip_mut_with(&block, |product, value| *product = value - *product);
        visit(first, block, &mut residual);
    });
}

/// u [m, r] and v [r, n].
pub(crate) fn wide(factors: &Factors) -> (Array2<f64>, Array2<f64>) {
    let Factors { shape, rank, u, v } = factors;
    let wide = |values: &[f32], rows, cols| {
        ArrayView2::from_shape((rows, cols), values).expect("factors have their shapes").mapv(f64::from)
    };
    (wide(u, shape.rows, *rank), wide(v, *rank, shape.cols))
}
