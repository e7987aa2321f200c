//! ‖W − Ŵ‖ / ‖W‖ recomputed from stored bytes: Ŵ multiplied out in f64, block of rows by block of rows.
//!
//! Pivoted storage is turned into a product here, apart from the writer's and the forward pass's use of it: columns as
//! basis · C with C = [I T] Π [r, n], rows as R · basis with R = Πᵀ [I; T] [m, r].

use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_model::{Dtype, PivotOrder, PivotSide, Projection, StoredMatrix, Tensor};
use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;

/// Rows of W that one task holds in f64.
const BLOCK_ROWS: usize = 128;

/// ‖W − Ŵ‖_F / ‖W‖_F for two stored forms of one matrix [m, n]; 0 when both are zero.
/// The blocks' sums are added in order, so the result does not depend on the number of threads.
pub fn relative_error(original: &StoredMatrix, compressed: &StoredMatrix) -> f64 {
    let (original, compressed) = (Rows::new(original), Rows::new(compressed));
    let rows = original.rows();
    let blocks: Vec<(f64, f64)> = (0..rows.div_ceil(BLOCK_ROWS))
        .into_par_iter()
        .map(|block| {
            let first = block * BLOCK_ROWS;
            let count = BLOCK_ROWS.min(rows - first);
            let (w, approximation) = (original.block(first, count), compressed.block(first, count));
            let energy: f64 = w.iter().map(|w| w * w).sum();
            let lost: f64 = w.iter().zip(&approximation).map(|(w, a)| (w - a) * (w - a)).sum();
            (lost, energy)
        })
        .collect();
    let (lost, energy) = blocks.iter().fold((0.0, 0.0), |sum, block| (sum.0 + block.0, sum.1 + block.1));
    if lost == 0.0 { 0.0 } else { (lost / energy).sqrt() }
}

/// ‖W − Ŵ‖_F / ‖W‖_F where `compressed` stores what stays of a narrowed expert's matrix and Ŵ is zero elsewhere: rows of gate
/// and up, columns of down, for `channels`, which rise.
pub fn relative_error_of_narrowed(
    original: &StoredMatrix,
    compressed: &StoredMatrix,
    projection: Projection,
    channels: &[usize],
) -> f64 {
    let (original, compressed) = (Rows::new(original), Rows::new(compressed));
    let rows = original.rows();
    let (mut lost, mut energy) = (0.0, 0.0);
    for first in (0..rows).step_by(BLOCK_ROWS) {
        let mut w = original.block(first, BLOCK_ROWS.min(rows - first));
        energy += w.iter().map(|w| w * w).sum::<f64>();
        match projection {
            Projection::Gate | Projection::Up => {
                let stored = channels.partition_point(|&channel| channel < first);
                let end = channels.partition_point(|&channel| channel < first + w.nrows());
                if stored < end {
                    let approximation = compressed.block(stored, end - stored);
                    for (row, &channel) in approximation.rows().into_iter().zip(&channels[stored..end]) {
                        let mut w = w.row_mut(channel - first);
                        w -= &row;
                    }
                }
            }
            Projection::Down => {
                let approximation = compressed.block(first, w.nrows());
                for (column, &channel) in approximation.columns().into_iter().zip(channels) {
                    let mut w = w.column_mut(channel);
                    w -= &column;
                }
            }
        }
        lost += w.iter().map(|w| w * w).sum::<f64>();
    }
    if lost == 0.0 { 0.0 } else { (lost / energy).sqrt() }
}

/// Gives blocks of rows in f64, whatever the storage.
enum Rows<'a> {
    Dense(&'a Tensor),
    Factored { u: &'a Tensor, v: Array2<f64> },      // v [r, n]
    Expanded { r: Array2<f64>, basis: Array2<f64> }, // [m, r], [r, n]
    OfBase { base: &'a Tensor, difference: Box<Rows<'a>> },
}

impl<'a> Rows<'a> {
    fn new(stored: &'a StoredMatrix) -> Self {
        match stored {
            StoredMatrix::Dense(w) => Self::Dense(w),
            StoredMatrix::OfBase { base, difference } => {
                Self::OfBase { base, difference: Box::new(Rows::new(difference)) }
            }
            StoredMatrix::Factored { u, v } => Self::Factored { u, v: widened(v, 0, v.shape()[0]) },
            StoredMatrix::Pivoted { side, basis, coefficients, order } => {
                let table = widened(coefficients, 0, coefficients.shape()[0]);
                match side {
                    PivotSide::Inputs => Self::Factored { u: basis, v: expanded(table.view(), order) },
                    PivotSide::Outputs => Self::Expanded {
                        r: expanded(table.t(), order).reversed_axes(),
                        basis: widened(basis, 0, basis.shape()[0]),
                    },
                }
            }
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Dense(tensor) | Self::Factored { u: tensor, .. } | Self::OfBase { base: tensor, .. } => {
                tensor.shape()[0]
            }
            Self::Expanded { r, .. } => r.nrows(),
        }
    }

    /// Rows `first..first + count`, [count, n].
    fn block(&self, first: usize, count: usize) -> Array2<f64> {
        match self {
            Self::Dense(w) => widened(w, first, count),
            Self::OfBase { base, difference } => difference.block(first, count) + widened(base, first, count),
            Self::Expanded { r, basis } => {
                let rows = r.slice(s![first..first + count, ..]);
                let mut product = Array2::zeros((count, basis.ncols()));
                Faer.gemm(rows, basis.view(), product.view_mut(), Accumulate::Replace);
                product
            }
            Self::Factored { u, v } => {
                let u = widened(u, first, count); // [count, r]
                let mut product = Array2::zeros((count, v.ncols()));
                let (u, v): (ArrayView2<'_, f64>, _) = (u.view(), v.view());
                Faer.gemm(u, v, product.view_mut(), Accumulate::Replace);
                product
            }
        }
    }
}

/// [I T] Π [r, d] from T [r, d − r].
fn expanded(table: ArrayView2<'_, f64>, order: &PivotOrder) -> Array2<f64> {
    let mut full = Array2::zeros((order.rank(), order.all().len()));
    order.pivots().enumerate().for_each(|(k, pivot)| full[[k, pivot]] = 1.0);
    for (column, place) in table.columns().into_iter().zip(order.others()) {
        full.column_mut(place).assign(&column);
    }
    full
}

/// max |T| of a pivoted matrix; `None` for other storage. NaN if one is.
pub fn largest_coefficient(stored: &StoredMatrix) -> Option<f64> {
    let StoredMatrix::Pivoted { coefficients, .. } = stored else { return None };
    let larger = |largest: f64, value: &f32| {
        let value = f64::from(value.abs());
        if value.is_nan() { value } else { largest.max(value) }
    };
    Some(coefficients.to_f32().iter().fold(0.0, larger))
}

/// How much of ‖Ŵ‖² the rounding of a pivoted matrix to numbers of unit roundoff u may have changed, beside its first
/// order in the error: stored numbers are off by at most u of themselves, evenly spread and independently, so
/// u²/3 · (‖B‖² + 2 Σₖ ‖bₖ‖²‖tₖ‖²), pivots and the rest. A half in place of the third leaves room for chance, as for u·v.
/// `None` for other storage.
pub fn rounding_energy(stored: &StoredMatrix, unit_roundoff: f64) -> Option<f64> {
    let (pivots, rest, _) = pivoted_energies(stored)?;
    Some(unit_roundoff * unit_roundoff * (pivots + 2.0 * rest) / 2.0)
}

/// The most that rounding can have changed of a pivoted matrix, ‖ΔŴ‖, whatever the chance: every stored number off by u of
/// itself, all in the worst direction. `None` for other storage.
pub fn rounding_at_most(stored: &StoredMatrix, unit_roundoff: f64) -> Option<f64> {
    let (pivots, rest, rank) = pivoted_energies(stored)?;
    let u = unit_roundoff / (1.0 - unit_roundoff);
    // (Σₖ xₖ)² ≤ r Σₖ xₖ² for the r products that an element is the sum of.
    Some((u * u * pivots + (2.0 * u + u * u).powi(2) * rank as f64 * rest).sqrt())
}

/// The smallest normal number of a dtype.
pub fn smallest_normal(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 | Dtype::Bf16 => f64::from(f32::MIN_POSITIVE),
        Dtype::F16 => 0.5_f64.powi(14),
    }
}

/// ‖B‖², Σₖ ‖bₖ‖²‖tₖ‖² and the rank of a pivoted matrix, as far as rounding goes.
fn pivoted_energies(stored: &StoredMatrix) -> Option<(f64, f64, usize)> {
    let StoredMatrix::Pivoted { side, basis, coefficients, .. } = stored else { return None };
    let least = smallest_normal(basis.dtype());
    let (basis, table) =
        (widened(basis, 0, basis.shape()[0]), widened(coefficients, 0, coefficients.shape()[0]));
    // Columns of the basis meet rows of T, or the other way round.
    let (basis, table) = match side {
        PivotSide::Inputs => (basis.t(), table.view()),
        PivotSide::Outputs => (basis.view(), table.t()),
    };
    // Below the normal range numbers are as far apart as at its end, so they are off as that is.
    let counted = |value: &f64| if *value == 0.0 { 0.0 } else { value.abs().max(least) };
    let energies = |of: ArrayView2<'_, f64>| -> Vec<f64> {
        of.rows().into_iter().map(|row| row.iter().map(|value| counted(value).powi(2)).sum()).collect()
    };
    let (basis, table) = (energies(basis), energies(table));
    let rest = basis.iter().zip(&table).map(|(b, t)| b * t).sum();
    Some((basis.iter().sum(), rest, basis.len()))
}

/// ‖W‖²
pub fn energy(stored: &StoredMatrix) -> f64 {
    let rows = Rows::new(stored);
    (0..rows.rows())
        .step_by(BLOCK_ROWS)
        .map(|first| {
            let block = rows.block(first, BLOCK_ROWS.min(rows.rows() - first));
            block.iter().map(|w| w * w).sum::<f64>()
        })
        .sum()
}

fn widened(tensor: &Tensor, first: usize, count: usize) -> Array2<f64> {
    let cols = tensor.shape()[1];
    let mut narrow = vec![0.0_f32; count * cols];
    tensor.widen(first * cols, &mut narrow);
    let wide = narrow.into_iter().map(f64::from).collect();
    Array2::from_shape_vec((count, cols), wide).expect("count × cols elements")
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn the_error_equals_the_plain_sums() {
        let (m, n, r) = (300, 7, 3);
        let wave =
            |len: usize, step: f32| -> Vec<f32> { (0..len).map(|i| (i as f32 * step).sin()).collect() };
        let tensor =
            |rows, cols, values: &[f32]| Tensor::from_f32(vec![rows, cols], Dtype::F32, values).unwrap();
        let (w, u, v) = (wave(m * n, 0.3), wave(m * r, 0.7), wave(r * n, 1.1));
        let (mut lost, mut energy) = (0.0, 0.0);
        for i in 0..m {
            for j in 0..n {
                let product: f64 = (0..r).map(|k| f64::from(u[i * r + k]) * f64::from(v[k * n + j])).sum();
                lost += (f64::from(w[i * n + j]) - product).powi(2);
                energy += f64::from(w[i * n + j]).powi(2);
            }
        }
        let dense = StoredMatrix::Dense(tensor(m, n, &w));
        let factored = StoredMatrix::Factored { u: tensor(m, r, &u), v: tensor(r, n, &v) };
        let got = relative_error(&dense, &factored);
        assert!((got - (lost / energy).sqrt()).abs() < 1e-12, "{got}");
        assert_eq!(relative_error(&dense, &dense), 0.0);
    }

    #[test]
    fn the_error_of_pivoted_storage_equals_the_plain_sums() {
        let tensor =
            |rows, cols, values: &[f32]| Tensor::from_f32(vec![rows, cols], Dtype::F32, values).unwrap();
        // Columns 1 and 2 are pivots of a [3, 3]; column 0 is 2 c₁ − c₂.
        let basis = [1.0, 2.0, 0.0, -1.0, 3.0, 1.0];
        let approximation = [0.0, 1.0, 2.0, 1.0, 0.0, -1.0, 5.0, 3.0, 1.0];
        let mut w = approximation;
        w[4] = 0.5;
        let energy: f64 = w.iter().map(|&w| f64::from(w).powi(2)).sum();
        let transposed = |values: &[f32]| -> Vec<f32> { (0..9).map(|e| values[e % 3 * 3 + e / 3]).collect() };
        let stored = |side, basis, coefficients| StoredMatrix::Pivoted {
            side,
            basis,
            coefficients,
            order: PivotOrder::of_pivots(&[1, 2], 3),
        };
        let columns = stored(PivotSide::Inputs, tensor(3, 2, &basis), tensor(2, 1, &[2.0, -1.0]));
        let turned = [1.0, 0.0, 3.0, 2.0, -1.0, 1.0];
        let rows = stored(PivotSide::Outputs, tensor(2, 3, &turned), tensor(1, 2, &[2.0, -1.0]));
        for (pivoted, w) in [(columns, w.to_vec()), (rows, transposed(&w))] {
            let got = relative_error(&StoredMatrix::Dense(tensor(3, 3, &w)), &pivoted);
            assert!((got - (0.25 / energy).sqrt()).abs() < 1e-12, "{got}");
            // ‖B‖² + 2 Σ ‖bₖ‖²‖tₖ‖², with ‖b₁‖² = 10, ‖b₂‖² = 6.
            let rounding = rounding_energy(&pivoted, 0.5).unwrap();
            assert!((rounding - 0.125 * (16.0 + 2.0 * (10.0 * 4.0 + 6.0))).abs() < 1e-12, "{rounding}");
        }
    }

    #[test]
    fn a_nan_is_not_an_error_of_zero() {
        let tensor =
            |value| StoredMatrix::Dense(Tensor::from_f32(vec![1, 2], Dtype::F32, &[1.0, value]).unwrap());
        assert!(relative_error(&tensor(1.0), &tensor(f32::NAN)).is_nan());
    }
}
