//! Down (w2) of a narrowed expert, fitted by least squares to the activations that its own gate and up give.

use crate::CalibrateError;
use crate::activations::ActivationMoment;
use crate::moments::add_cross;
use crate::pair::BATCH_TOKENS;
use crate::widths::RIDGE;
use lowrank_compute::{Real, product_in_strips, product_with_symmetric};
use lowrank_model::Tensor;
use lowrank_svd::{Precision, SvdError, fit_columns};
use ndarray::{Array2, ArrayView2};

/// Σ weight · z zᵀ [k, k] of the narrowed expert's activations, and Σ weight · y zᵀ [H, k] with the outputs y that are wanted.
#[derive(Debug)]
pub struct Regression {
    moment: ActivationMoment,
    cross: Array2<f64>,
}

/// What was fitted.
#[derive(Debug)]
pub struct Fitted {
    /// W [H, k], less the base if there is one.
    pub down: Array2<f64>,
    /// The second moment of its outputs, W (Σ weight · z zᵀ) Wᵀ [H, H], both triangles; likewise.
    pub outputs: Array2<f64>,
}

impl Regression {
    /// Sums over no tokens.
    pub fn new(hidden_size: usize, width: usize) -> Self {
        Self { moment: ActivationMoment::new(width), cross: Array2::zeros((hidden_size, width)) }
    }

    /// Adds rows y [n, H] and z [n, k] of the same tokens.
    pub fn add(&mut self, wanted: &[f32], activations: &[f32], weights: &[f64]) {
        let (h, k) = self.cross.dim();
        self.moment.add(activations, weights);
        let batches = wanted.chunks(BATCH_TOKENS * h).zip(activations.chunks(BATCH_TOKENS * k));
        for ((wanted, activations), weights) in batches.zip(weights.chunks(BATCH_TOKENS)) {
            add_cross(&mut self.cross, wanted, activations, weights);
        }
    }

    /// Fits; `columns` [H, k] are those of the original's down for the channels that stay, `base` [H, k] what is stored beside
    /// the result.
    pub fn fit(&mut self, columns: ArrayView2<'_, f64>, base: Option<&Tensor>) -> Result<Fitted, SvdError> {
        match Precision::of_columns(columns, RIDGE) {
            Precision::F32 => self.fit_in::<f32>(columns, base),
            Precision::F64 => self.fit_in::<f64>(columns, base),
        }
    }

    fn fit_in<T: Real>(
        &mut self,
        columns: ArrayView2<'_, f64>,
        base: Option<&Tensor>,
    ) -> Result<Fitted, SvdError> {
        let moment = self.moment.symmetric();
        let mut down = fit_columns::<T>(self.cross.view(), moment, columns, RIDGE)?;
        if let Some(base) = base {
            let mut values = vec![0.0_f32; down.ncols()];
            for (row, mut down) in down.rows_mut().into_iter().enumerate() {
                base.widen(row * values.len(), &mut values);
                down.iter_mut().zip(&values).for_each(|(down, &base)| *down -= T::of_f32(base));
            }
        }
        let all: Vec<usize> = (0..down.ncols()).collect();
        let image = product_with_symmetric(down.view(), moment, &all, 1.0);
        let outputs = product_in_strips(image.view(), down.t()).mapv(Real::as_f64);
        Ok(Fitted { down: down.mapv(Real::as_f64), outputs })
    }

    /// Whether every sum is finite.
    pub fn check(&self, layer: usize, expert: usize) -> Result<(), CalibrateError> {
        let finite = self.moment.is_finite() && self.cross.iter().all(|value| value.is_finite());
        if finite { Ok(()) } else { Err(CalibrateError::NotFinite { layer, expert }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn a_map_that_exists_is_found_and_its_outputs_have_their_moment() {
        let (tokens, h, k) = (60, 3, 4);
        let z: Vec<f32> = (0..tokens * k).map(|i| ((i * i) as f32 * 0.71).sin()).collect();
        let map = Array2::from_shape_fn((h, k), |(i, j)| (i as f64 - 1.0) * (j as f64 + 0.5));
        let activations = Array2::from_shape_vec((tokens, k), z.clone()).unwrap().mapv(f64::from);
        let y = activations.dot(&map.t());
        let wanted: Vec<f32> = y.iter().map(|&value| value as f32).collect();
        let mut regression = Regression::new(h, k);
        regression.add(&wanted, &z, &vec![0.5; tokens]);
        // The ridge pulls towards the map itself, so it moves nothing.
        let Fitted { down, outputs } = regression.fit(map.view(), None).unwrap();
        assert!((&down - &map).iter().all(|gap| gap.abs() < 1e-5), "{down}");
        let expected = y.t().dot(&y) * 0.5;
        assert!((&outputs - &expected).iter().all(|gap| gap.abs() < 1e-3), "{outputs} {expected}");
        let base = Array2::from_elem((h, k), 0.25);
        let stored = Tensor::from_f32(vec![h, k], Dtype::Bf16, &vec![0.25; h * k]).unwrap();
        let beside = regression.fit(map.view(), Some(&stored)).unwrap();
        let y = activations.dot(&(&map - &base).t());
        let expected = y.t().dot(&y) * 0.5;
        assert!((&beside.down + &base - &down).iter().all(|gap| gap.abs() < 1e-12));
        assert!((&beside.outputs - &expected).iter().all(|gap| gap.abs() < 1e-3), "{expected}");
    }
}
