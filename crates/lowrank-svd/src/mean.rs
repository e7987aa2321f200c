//! The mean of several matrices of one shape: the base that a layer's experts share, each then factored as W − B.
//!
//! B = Σ W / E minimises Σ ‖W − B‖². The minimiser in the calibrated norms, (Σ W C)(Σ C)⁻¹, was no better in use
//! (`docs/research/widths.md`), and it takes every expert's second moment at once.

use crate::SvdError;
use crate::stats::weight_stats;
use lowrank_model::{Dtype, MatrixShape, Tensor};

/// Sums of the matrices so far.
#[derive(Debug, Clone)]
pub struct MatrixMean {
    shape: MatrixShape,
    sum: Vec<f64>,
    count: usize,
    /// Σ ‖W‖²
    energy: f64,
}

impl MatrixMean {
    /// Of no matrices.
    pub fn new(shape: MatrixShape) -> Self {
        Self { shape, sum: vec![0.0; shape.rows * shape.cols], count: 0, energy: 0.0 }
    }

    /// Adds W [m, n].
    ///
    /// # Errors
    /// It is not finite.
    ///
    /// # Panics
    /// If it has another shape.
    pub fn add(&mut self, w: &Tensor) -> Result<(), SvdError> {
        let stats = weight_stats(w)?;
        assert_eq!(stats.shape, self.shape, "matrices of one shape");
        let mut row = vec![0.0_f32; self.shape.cols];
        for (index, sums) in self.sum.chunks_exact_mut(self.shape.cols).enumerate() {
            w.widen(index * row.len(), &mut row);
            sums.iter_mut().zip(&row).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        self.count += 1;
        self.energy += stats.energy;
        Ok(())
    }

    /// B [m, n], in f32.
    pub fn mean(&self) -> Vec<f32> {
        self.sum.iter().map(|sum| (sum / self.count.max(1) as f64) as f32).collect()
    }

    /// Σ ‖W − B‖² / Σ ‖W‖², from 0 where all are equal to 1 where they have nothing in common; 1 of zero matrices.
    pub fn share_of_differences(&self) -> f64 {
        let count = self.count.max(1) as f64;
        let of_mean: f64 = self.sum.iter().map(|sum| sum * sum).sum::<f64>() / count;
        if self.energy > 0.0 { (1.0 - of_mean / self.energy).clamp(0.0, 1.0) } else { 1.0 }
    }
}

/// W − B [m, n] in f32.
///
/// # Panics
/// If the shapes differ.
pub fn difference(w: &Tensor, base: &Tensor) -> Tensor {
    assert_eq!(w.shape(), base.shape(), "a matrix and the base of its layer");
    let values: Vec<f32> = w.to_f32().into_iter().zip(base.to_f32()).map(|(w, b)| w - b).collect();
    Tensor::from_f32(w.shape().to_vec(), Dtype::F32, &values).expect("as many values as the shape says")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_f32(vec![2, 2], Dtype::Bf16, values).unwrap()
    }

    fn of(matrices: &[&[f32]]) -> MatrixMean {
        let mut mean = MatrixMean::new(MatrixShape { rows: 2, cols: 2 });
        matrices.iter().for_each(|values| mean.add(&tensor(values)).unwrap());
        mean
    }

    #[test]
    fn equal_matrices_differ_in_nothing_and_opposite_ones_in_all() {
        let (a, b) = ([1.0, 2.0, -3.0, 4.0], [-1.0, -2.0, 3.0, -4.0]);
        assert_eq!((of(&[&a, &a]).mean(), of(&[&a, &a]).share_of_differences()), (a.to_vec(), 0.0));
        assert_eq!((of(&[&a, &b]).mean(), of(&[&a, &b]).share_of_differences()), (vec![0.0; 4], 1.0));
        assert_eq!(of(&[&[0.0; 4]]).share_of_differences(), 1.0);
    }

    #[test]
    fn the_share_is_that_of_the_plain_sums() {
        let matrices: [&[f32]; 3] = [&[1.0, 2.0, 3.0, 4.0], &[2.0, 2.0, 1.0, -4.0], &[0.5, 1.0, 3.0, 8.0]];
        let mean = of(&matrices);
        let base = Tensor::from_f32(vec![2, 2], Dtype::F32, &mean.mean()).unwrap();
        let energy = |values: &[f32]| values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
        let lost: f64 = matrices.iter().map(|w| energy(&difference(&tensor(w), &base).to_f32())).sum();
        let all: f64 = matrices.iter().map(|w| energy(w)).sum();
        assert!((mean.share_of_differences() - lost / all).abs() < 1e-6);
    }

    #[test]
    fn a_nan_is_refused() {
        let mut mean = MatrixMean::new(MatrixShape { rows: 2, cols: 2 });
        assert!(mean.add(&tensor(&[0.0, f32::NAN, 0.0, 0.0])).is_err());
    }
}
