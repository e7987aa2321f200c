//! The second moment of an expert's activations.

use crate::moments::scaled;
use crate::pair::BATCH_TOKENS;
use lowrank_compute::{Accumulate, Faer, Kernels, mirror_lower};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Columns of the second moment that one task sums.
const STRIP: usize = 256;

/// Σ g² h hᵀ of one expert. Products in f32 within a block of tokens, sums in f64: the ridge bounds the condition number of
/// what is made of it by F/[`RIDGE`](crate::widths::RIDGE).
#[derive(Debug)]
pub struct ActivationMoment {
    /// [F, F]; the lower triangle is summed.
    sum: Array2<f64>,
}

impl ActivationMoment {
    /// Of no tokens.
    pub fn new(intermediate_size: usize) -> Self {
        Self { sum: Array2::zeros((intermediate_size, intermediate_size)) }
    }

    /// Adds activations [n, F] of tokens that count so much.
    pub fn add(&mut self, activations: &[f32], weights: &[f64]) {
        let size = self.sum.nrows();
        let batches = activations.chunks(BATCH_TOKENS * size).zip(weights.chunks(BATCH_TOKENS));
        for (rows, weights) in batches {
            add_gram(&mut self.sum, &scaled(rows, weights, size));
        }
    }

    /// [F, F].
    pub fn symmetric(&mut self) -> ArrayView2<'_, f64> {
        mirror_lower(&mut self.sum);
        self.sum.view()
    }

    /// Whether every sum is finite.
    pub fn is_finite(&self) -> bool {
        self.sum.iter().all(|value| value.is_finite())
    }
}

/// sum += columns columnsᵀ for columns [F, n], lower triangle, strip by strip.
fn add_gram(sum: &mut Array2<f64>, columns: &Array2<f32>) {
    let strips: Vec<ArrayViewMut2<'_, f64>> = sum.axis_chunks_iter_mut(Axis(1), STRIP).collect();
    strips.into_par_iter().enumerate().for_each(|(strip, mut out)| {
        let first = strip * STRIP;
        let mut product = Array2::<f32>::zeros((out.nrows() - first, out.ncols()));
        let (left, right) =
            (columns.slice(s![first.., ..]), columns.slice(s![first..first + out.ncols(), ..]));
        Faer.gemm(left, right.reversed_axes(), product.view_mut(), Accumulate::Replace);
        let mut below = out.slice_mut(s![first.., ..]);
        below.zip_mut_with(&product, |sum, &value| *sum += f64::from(value));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_moment_is_the_weighted_sum_over_tokens_however_they_are_cut() {
        let (size, tokens) = (300, BATCH_TOKENS + 3);
        let activations: Vec<f32> = (0..size * tokens).map(|i| (i as f32 * 0.37).sin()).collect();
        let weights: Vec<f64> = (0..tokens).map(|t| 0.1 + (t % 7) as f64 / 8.0).collect();
        let mut moment = ActivationMoment::new(size);
        moment.add(&activations, &weights);
        let sum = moment.symmetric();
        for (i, j) in [(0, 0), (299, 2), (256, 255), (2, 299), (299, 299)] {
            let expected: f64 = (0..tokens)
                .map(|t| {
                    weights[t] * f64::from(activations[t * size + i]) * f64::from(activations[t * size + j])
                })
                .sum();
            assert!((sum[[i, j]] - expected).abs() < 1e-3, "{i} {j}: {} {expected}", sum[[i, j]]);
        }
    }
}
