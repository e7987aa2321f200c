//! Second moments of a compressed model's activations x̂, and their cross moments with the original's x:
//! [`lowrank_svd::ridge_map`] takes both, so that factors give the original's outputs from x̂.

use crate::CalibrateError;
use crate::moments::{add_cross, add_moment};
use lowrank_compute::Backend;
use lowrank_svd::{MomentRoot, ShrinkageTarget, SvdError, ridge_map};
use ndarray::Array2;

/// Tokens that are widened to f64 together. A caller that adds in several calls adds a multiple of it, for the same bits.
pub const BATCH_TOKENS: usize = 2048;

/// Σ weight · x̂ x̂ᵀ and Σ weight · x x̂ᵀ over tokens, [H, H], x of the original and x̂ of the compressed model.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// Of x̂, lower triangle.
    pub moment: Array2<f64>,
    /// Of x and x̂.
    pub cross: Array2<f64>,
}

impl Pair {
    /// Sums over no tokens.
    pub fn new(hidden_size: usize) -> Self {
        let zeros = || Array2::zeros((hidden_size, hidden_size));
        Self { moment: zeros(), cross: zeros() }
    }

    /// Adds rows x and x̂ [n, H] of the same tokens.
    pub fn add(&mut self, original: &[f32], changed: &[f32], weights: &[f64]) {
        let hidden_size = self.moment.nrows();
        let run = BATCH_TOKENS * hidden_size;
        let batches = original.chunks(run).zip(changed.chunks(run)).zip(weights.chunks(BATCH_TOKENS));
        for ((original, changed), weights) in batches {
            add_moment(&mut self.moment, changed, weights, hidden_size);
            add_cross(&mut self.cross, original, changed, weights);
        }
    }

    /// The map from x̂ to the target, (1 − `target_interpolation`) x + `target_interpolation` x̂; for inputs with the root of
    /// the second moment of x̂.
    pub fn map(
        &self,
        backend: &dyn Backend,
        shrinkage: f64,
        target_interpolation: f64,
        target: ShrinkageTarget<'_>,
    ) -> Result<(Array2<f64>, Option<MomentRoot>), SvdError> {
        let wanted = Array2::from_shape_fn(self.cross.dim(), |(i, j)| {
            let own = self.moment[if j <= i { [i, j] } else { [j, i] }];
            (1.0 - target_interpolation) * self.cross[[i, j]] + target_interpolation * own
        });
        ridge_map(backend, wanted.view(), self.moment.view(), shrinkage, target)
    }

    /// Whether every sum is finite.
    pub fn check(&self, layer: usize, expert: usize) -> Result<(), CalibrateError> {
        let finite = self.moment.iter().chain(&self.cross).all(|value| value.is_finite());
        if finite { Ok(()) } else { Err(CalibrateError::NotFinite { layer, expert }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_compute::Faer;

    fn pair(original: &[f32], changed: &[f32], weights: &[f64]) -> Pair {
        let mut pair = Pair::new(3);
        pair.add(original, changed, weights);
        pair
    }

    fn rows(seed: f32) -> Vec<f32> {
        (0..15).map(|i| (seed * (i as f32 + 1.0).powi(2)).sin()).collect()
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        let (x, changed, weights) = (rows(1.0), rows(2.5), [1.0, 0.5, 0.0, 2.0, 3.0]);
        let pair = pair(&x, &changed, &weights);
        for i in 0..3 {
            for j in 0..3 {
                let sum = |a: &[f32], b: &[f32]| -> f64 {
                    (0..5).map(|t| weights[t] * f64::from(a[3 * t + i]) * f64::from(b[3 * t + j])).sum()
                };
                assert!((pair.cross[[i, j]] - sum(&x, &changed)).abs() < 1e-12);
                if j <= i {
                    assert!((pair.moment[[i, j]] - sum(&changed, &changed)).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn a_model_that_wants_only_its_own_needs_no_map() {
        let pair = pair(&rows(1.0), &rows(2.5), &[1.0; 5]);
        let away = |target_interpolation: f64| {
            let (map, _) = pair.map(&Faer, 0.0, target_interpolation, ShrinkageTarget::Identity).unwrap();
            (map - Array2::<f64>::eye(3)).iter().fold(0.0_f64, |most, value| most.max(value.abs()))
        };
        assert!(away(1.0) < 1e-9 && away(0.0) > 0.1, "{} {}", away(1.0), away(0.0));
        assert!((away(0.5) / away(0.0) - 0.5).abs() < 1e-9);
    }
}
