//! The two precisions that are computed in.

use faer::traits::RealField;
use lowrank_model::Tensor;
use ndarray::NdFloat;

/// f32 or f64.
pub trait Real: NdFloat + RealField {
    /// Distance from 1 to the next number.
    const EPSILON: Self;

    /// Exact in both precisions.
    fn of_f32(value: f32) -> Self;
    /// To nearest in f32.
    fn of_f64(value: f64) -> Self;
    /// To nearest for f64.
    fn as_f32(self) -> f32;
    /// Exact.
    fn as_f64(self) -> f64;
    /// Widens `out.len()` stored elements from `first` on. Exact.
    fn widen(tensor: &Tensor, first: usize, out: &mut [Self]);
}

impl Real for f32 {
    const EPSILON: Self = Self::EPSILON;

    fn of_f32(value: f32) -> Self {
        value
    }
    fn of_f64(value: f64) -> Self {
        value as Self
    }
    fn as_f32(self) -> f32 {
        self
    }
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
    fn widen(tensor: &Tensor, first: usize, out: &mut [Self]) {
        tensor.widen(first, out);
    }
}

impl Real for f64 {
    const EPSILON: Self = Self::EPSILON;

    fn of_f32(value: f32) -> Self {
        Self::from(value)
    }
    fn of_f64(value: f64) -> Self {
        value
    }
    fn as_f32(self) -> f32 {
        self as f32
    }
    fn as_f64(self) -> f64 {
        self
    }
    fn widen(tensor: &Tensor, first: usize, out: &mut [Self]) {
        let mut narrow = [0.0_f32; 1024];
        let mut at = first;
        for run in out.chunks_mut(narrow.len()) {
            let narrow = &mut narrow[..run.len()];
            tensor.widen(at, narrow);
            for (wide, &value) in run.iter_mut().zip(narrow.iter()) {
                *wide = Self::from(value);
            }
            at += run.len();
        }
    }
}
