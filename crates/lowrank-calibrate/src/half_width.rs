//! What a layer's experts at half their width change, on the tokens that sensitivities are measured with.
//!
//! An expert's w2 is fitted to its first channels by the second moment of its activations, which is gone once its tokens have
//! passed. So the change of its outputs, g (W h_S − W₂ h), is computed then and kept: [n, H] per expert.

use crate::CalibrateError;
use crate::widths::WidthStore;
use lowrank_cache::{Arrays, Numbers};
use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_forward::ExpertBatch;
use lowrank_svd::Channels;
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

/// Tokens that are multiplied at once.
const TOKENS: usize = 256;

/// The width at which sensitivities are measured.
pub(crate) fn half_width(intermediate_size: usize) -> usize {
    intermediate_size / 2
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
    fn change(&self, channels: &Channels) -> Change {
        let inner = channels.order().len();
        let width = half_width(inner);
        let fitted = channels.fitted(width).mapv(|value| value as f32); // [H, k]
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

/// Of one expert.
#[derive(Debug, Clone, PartialEq)]
struct Change {
    /// Places among the tokens that sensitivities are measured with.
    places: Vec<usize>,
    /// [n, H].
    rows: Vec<f32>,
}

impl WidthStore<'_> {
    fn change_name(layer: usize, expert: usize) -> String {
        format!("half-width-{layer:03}-{expert:03}")
    }

    /// Keeps what an expert at half its width changes.
    pub(crate) fn put_half_width(
        &self,
        (layer, expert): (usize, usize),
        sampled: &Sampled,
        channels: &Channels,
    ) -> Result<(), CalibrateError> {
        let Change { places, rows } = sampled.change(channels);
        let places = places.into_iter().map(|place| place as f64).collect();
        let mut arrays = Arrays::default();
        arrays.arrays.insert("places".into(), Numbers::F64(places));
        arrays.arrays.insert("rows".into(), Numbers::F32(rows));
        Ok(self.entry.put(&Self::change_name(layer, expert), &arrays)?)
    }

    /// Adds what an expert at half its width changes to the outputs [N, H] of its MoE block on those tokens.
    pub(crate) fn add_half_width(
        &self,
        (layer, expert): (usize, usize),
        hidden_size: usize,
        outputs: &mut [f32],
    ) -> Result<(), CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let mut arrays = self.entry.get(&Self::change_name(layer, expert))?.ok_or_else(absent)?;
        let places = arrays.take_f64("places").ok_or_else(absent)?;
        let rows = arrays.take_f32("rows").ok_or_else(absent)?;
        for (place, row) in places.into_iter().zip(rows.chunks_exact(hidden_size)) {
            let output = outputs.get_mut(place as usize * hidden_size..).ok_or_else(absent)?;
            output.iter_mut().zip(row).for_each(|(output, change)| *output += change);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::{Dtype, Tensor};

    /// Values in [−1, 1) without pattern.
    fn some(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
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
        let channels = Channels::new(&tensor, moment.view(), 0.0).unwrap();
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
