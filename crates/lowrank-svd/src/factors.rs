//! From a subspace to u and v.
//!
//! Given orthonormal columns X [d, r] on one side of W and P = A X [l, r] (A is W or Wᵀ), Ŵ = P Xᵀ or its transpose.
//! Each component carries its size ‖pⱼ‖ (= σⱼ when X holds singular vectors), split by square roots over both factors so
//! that neither leaves the range of f16. Nothing is divided by a singular value, so rank-deficient and zero matrices need
//! no special care.

use lowrank_compute::{Real, Side};
use lowrank_model::MatrixShape;
use ndarray::Array2;
use std::fmt;

/// W ≈ u·v, before rounding to the stored dtype. Row-major.
#[derive(Clone, PartialEq)]
pub struct Factors {
    /// [m, n] of W.
    pub shape: MatrixShape,
    /// r
    pub rank: usize,
    /// [m, r]
    pub u: Vec<f32>,
    /// [r, n]
    pub v: Vec<f32>,
}

impl fmt::Debug for Factors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Factors of {} at rank {}", self.shape, self.rank)
    }
}

/// Factors whose components are split evenly, and the energy of W that they keep.
pub(crate) struct BalancedFactors {
    pub(crate) factors: Factors,
    /// ‖W‖² − ‖W − u·v‖², from the norms of the columns.
    pub(crate) kept_energy: f64,
    /// What column j of X was multiplied by, and column j of P divided by; 0 where P vanishes.
    pub(crate) scales: Vec<f64>,
}

/// u and v of P Xᵀ, P [l, r]. Signs are fixed by making the largest entry of each column of X positive.
pub(crate) fn balance<T: Real>(
    shape: MatrixShape,
    side: Side,
    x: &Array2<T>,
    mut p: Array2<f32>,
) -> BalancedFactors {
    let (width, rank) = x.dim();
    let energies = column_energies(&p);
    let mut kept_energy = 0.0;
    // [d, r] for u on the side of the outputs, [r, d] for v on that of the inputs.
    let mut near = vec![0.0_f32; width * rank];
    let mut scales = Vec::with_capacity(rank);
    let mut far_scales = Vec::with_capacity(rank);
    for (j, column) in x.columns().into_iter().enumerate() {
        let norm = column.iter().map(|value| value.as_f64() * value.as_f64()).sum::<f64>();
        // X is orthonormal only up to rounding, and ‖W − W X Xᵀ‖² = ‖W‖² − Σ ‖W xⱼ‖² (2 − ‖xⱼ‖²) up to its square.
        kept_energy += energies[j] * (2.0 - norm);
        let mut largest = T::zero();
        for &value in column {
            if value.abs() > largest.abs() {
                largest = value;
            }
        }
        let sign = if largest < T::zero() { -1.0 } else { 1.0 };
        let root = energies[j].sqrt().sqrt();
        for (i, value) in column.iter().enumerate() {
            let scaled = (sign * root * value.as_f64()) as f32;
            match side {
                Side::Rows => near[i * rank + j] = scaled,
                Side::Cols => near[j * width + i] = scaled,
            }
        }
        scales.push(sign * root);
        far_scales.push(if root == 0.0 { 0.0 } else { sign / root });
    }
    for mut row in p.rows_mut() {
        for (value, scale) in row.iter_mut().zip(&far_scales) {
            *value = (f64::from(*value) * scale) as f32;
        }
    }
    let (u, v) = match side {
        Side::Cols => (p.into_raw_vec_and_offset().0, near),
        Side::Rows => (near, transposed(&p)),
    };
    BalancedFactors { factors: Factors { shape, rank, u, v }, kept_energy, scales }
}

/// ‖pⱼ‖² of every column, summed in f64 row by row.
fn column_energies(p: &Array2<f32>) -> Vec<f64> {
    let mut sums = vec![0.0_f64; p.ncols()];
    for row in p.rows() {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    sums
}

/// Row-major transpose, tile by tile so that both sides stay in cache.
fn transposed(p: &Array2<f32>) -> Vec<f32> {
    const TILE: usize = 32;
    let (rows, cols) = p.dim();
    let source = p.as_slice().expect("a product is row-major");
    let mut out = vec![0.0; rows * cols];
    for row_tile in (0..rows).step_by(TILE) {
        for col_tile in (0..cols).step_by(TILE) {
            for i in row_tile..rows.min(row_tile + TILE) {
                for j in col_tile..cols.min(col_tile + TILE) {
                    out[j * rows + i] = source[i * cols + j];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn the_size_is_split_evenly_and_the_sign_is_fixed() {
        // W = 16 · a bᵀ with a = (0.6, 0.8, 0), b = (0, -1).
        let shape = MatrixShape { rows: 3, cols: 2 };
        let x = array![[0.0_f64], [-1.0]];
        let p = array![[9.6_f32], [12.8], [0.0]];
        let balanced = balance(shape, Side::Cols, &x, p);
        assert_eq!(balanced.factors.v, [0.0, 4.0]);
        for (value, expected) in balanced.factors.u.iter().zip([-2.4_f32, -3.2, 0.0]) {
            assert!((value - expected).abs() < 1e-6);
        }
        assert!((balanced.kept_energy - 256.0).abs() < 1e-4);
    }

    #[test]
    fn a_vanishing_component_becomes_zeros() {
        let shape = MatrixShape { rows: 2, cols: 3 };
        let balanced = balance(shape, Side::Rows, &array![[1.0_f32], [0.0]], Array2::zeros((3, 1)));
        assert_eq!((balanced.factors.u, balanced.factors.v), (vec![0.0; 2], vec![0.0; 3]));
    }

    #[test]
    fn tiles_cover_every_entry() {
        let p = Array2::from_shape_fn((70, 33), |(i, j)| (i * 100 + j) as f32);
        let expected: Vec<f32> = p.t().iter().copied().collect();
        assert_eq!(transposed(&p), expected);
    }
}
