//! Halves, at which sensitivities are measured: the width and the ranks; and what experts at half their width change.
//!
//! An expert's w2 is fitted to its first channels by the second moment of its activations, which is gone once its tokens have
//! passed. So the change of its outputs, g (W h_S − W₂ h), is computed then and kept: [n, H] per expert.

use lowrank_compute::{Accumulate, Faer, Kernels, Real};
use lowrank_forward::ExpertBatch;
use lowrank_model::params::stored_params;
use lowrank_model::{MatrixShape, Storage};
use lowrank_svd::Channels;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// Tokens that are multiplied at once.
const TOKENS: usize = 256;

/// The width at which sensitivities are measured.
pub(crate) fn half_width(intermediate_size: usize) -> usize {
    intermediate_size / 2
}

/// The largest rank at which a pivoted matrix has at most half its parameters.
pub fn rank_reference(shape: MatrixShape) -> usize {
    let half = stored_params(shape, Storage::Pivoted, None) / 2;
    let (mut fits, mut beyond) = (1, shape.short_side().max(2));
    while beyond - fits > 1 {
        let middle = fits + (beyond - fits) / 2;
        if stored_params(shape, Storage::Pivoted, Some(middle)) <= half {
            fits = middle
        } else {
            beyond = middle
        }
    }
    fits
}

/// Routed tokens of one expert among those that sensitivities are measured with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sampled {
    /// Places among those tokens.
    places: Vec<usize>,
    /// The router's weight of each.
    weights: Vec<f32>,
    /// [n, F].
    activations: Vec<f32>,
    /// [n, H].
    outputs: Vec<f32>,
}

impl Sampled {
    /// Adds the tokens of a batch that are in `sample`, which rises.
    pub(crate) fn add(&mut self, batch: &ExpertBatch<'_>, sample: &[usize]) {
        let tokens = batch.tokens.len().max(1);
        let (inner, hidden_size) = (batch.activations.len() / tokens, batch.y.len() / tokens);
        for (row, token) in batch.tokens.iter().enumerate() {
            let Ok(place) = sample.binary_search(token) else { continue };
            self.places.push(place);
            self.weights.push(batch.weights[row]);
            self.activations.extend_from_slice(&batch.activations[row * inner..][..inner]);
            self.outputs.extend_from_slice(&batch.y[row * hidden_size..][..hidden_size]);
        }
    }

    /// What changes if the expert keeps its first channels alone.
    pub(crate) fn change<T: Real>(&self, channels: &Channels<T>) -> Change {
        let inner = channels.order().len();
        let width = half_width(inner);
        let fitted = channels.fitted(width).mapv(Real::as_f32); // [H, k]
        let hidden_size = fitted.nrows();
        let kept = &channels.order()[..width];
        let mut rows = self.outputs.clone(); // [n, H]
        rows.par_chunks_mut(TOKENS * hidden_size)
            .zip(self.activations.par_chunks(TOKENS * inner))
            .zip(self.weights.par_chunks(TOKENS))
            .for_each(|((rows, activations), weights)| {
                let activations =
                    ArrayView2::from_shape((weights.len(), inner), activations).expect("[n, F]");
                let narrowed = activations.select(ndarray::Axis(1), kept);
                let mut outputs = Array2::zeros((weights.len(), hidden_size));
                Faer.gemm(narrowed.view(), fitted.t(), outputs.view_mut(), Accumulate::Replace);
                for ((row, output), weight) in
                    rows.chunks_exact_mut(hidden_size).zip(outputs.outer_iter()).zip(weights)
                {
                    row.iter_mut().zip(output).for_each(|(y, narrowed)| *y = weight * (narrowed - *y));
                }
            });
        Change { places: self.places.clone(), rows }
    }
}

/// Of one expert's weighted outputs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    /// Places among the tokens that sensitivities are measured with.
    pub(crate) places: Vec<usize>,
    /// [n, H].
    pub(crate) rows: Vec<f32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::some;
    use lowrank_model::{Dtype, Tensor};

    #[test]
    fn the_reference_rank_is_the_last_that_halves() {
        for (rows, cols) in [(448, 128), (128, 448), (14336, 4096), (5, 3), (1, 1)] {
            let shape = MatrixShape { rows, cols };
            let r = rank_reference(shape);
            let size = |r| stored_params(shape, Storage::Pivoted, Some(r));
            assert!(r == 1 || 2 * size(r) <= (rows * cols) as u64, "{shape}");
            assert!(r + 1 >= shape.short_side() || 2 * size(r + 1) > (rows * cols) as u64, "{shape}");
        }
    }

    #[test]
    fn the_change_is_that_of_an_expert_with_fitted_columns() {
        let (h, f, n) = (3, 8, 40);
        let w2 = some(h * f, 1);
        let activations = some(n * f, 2);
        let weights: Vec<f32> = (0..n).map(|t| 0.1 + (t % 5) as f32 / 8.0).collect();
        let of = |t: usize, i: usize| f64::from(activations[t * f + i]);
        let moment = Array2::from_shape_fn((f, f), |(i, j)| {
            (0..n).map(|t| f64::from(weights[t]).powi(2) * of(t, i) * of(t, j)).sum()
        });
        let w2_of = |o: usize, i: usize| f64::from(w2[o * f + i]);
        let outputs: Vec<f32> = (0..n * h)
            .map(|at| (0..f).map(|i| w2_of(at % h, i) * of(at / h, i)).sum::<f64>() as f32)
            .collect();
        let tensor = Tensor::from_f32(vec![h, f], Dtype::F32, &w2).unwrap();
        let channels = Channels::<f64>::new(&tensor, moment.view(), 0.0).unwrap();
        let tokens: Vec<usize> = (0..n).map(|t| 3 * t + 1).collect();
        let batch = ExpertBatch {
            layer: 0,
            expert: 0,
            tokens: &tokens,
            weights: &weights,
            x: &[],
            gate: &[],
            up: &[],
            activations: &activations,
            y: &outputs,
        };
        // Every second token of the expert, beside tokens that it does not see.
        let sample: Vec<usize> = (0..3 * n).filter(|token| token % 6 == 1 || token % 5 == 0).collect();
        let mut sampled = Sampled::default();
        sampled.add(&batch, &sample);
        let change = sampled.change(&channels);
        let seen: Vec<usize> = tokens.iter().copied().filter(|token| sample.contains(token)).collect();
        assert_eq!(change.places.iter().map(|&place| sample[place]).collect::<Vec<_>>(), seen);
        assert!(seen.len() >= n / 2 && seen.len() < n);
        // The sum of squares over all tokens is the error of the width.
        sampled = Sampled::default();
        sampled.add(&batch, &tokens);
        let energy: f64 = sampled.change(&channels).rows.iter().map(|&value| f64::from(value).powi(2)).sum();
        let expected = channels.errors()[half_width(f)];
        assert!(expected > 0.0 && (energy - expected).abs() < 1e-4 * expected, "{energy} {expected}");
    }
}
