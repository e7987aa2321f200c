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

    /// (‖Σ W‖² − Σ ‖W‖²) / ((E − 1) Σ ‖W‖²): of matrices of one norm the mean cosine between two. 1 where all are equal, 0 of
    /// zero matrices and of a single one.
    pub fn mean_cosine(&self) -> f64 {
        if self.count < 2 || self.energy == 0.0 {
            return 0.0;
        }
        let of_sum: f64 = self.sum.iter().map(|sum| sum * sum).sum();
        (of_sum - self.energy) / ((self.count - 1) as f64 * self.energy)
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
    fn equal_matrices_are_alike_and_opposite_ones_are_not() {
        let (a, b) = ([1.0, 2.0, -3.0, 4.0], [-1.0, -2.0, 3.0, -4.0]);
        assert_eq!((of(&[&a, &a]).mean(), of(&[&a, &a]).mean_cosine()), (a.to_vec(), 1.0));
        assert_eq!((of(&[&a, &b]).mean(), of(&[&a, &b]).mean_cosine()), (vec![0.0; 4], -1.0));
        assert_eq!((of(&[&[0.0; 4], &[0.0; 4]]).mean_cosine(), of(&[&a]).mean_cosine()), (0.0, 0.0));
    }

    #[test]
    fn the_cosine_is_that_of_the_plain_sums() {
        let matrices: [&[f32]; 3] = [&[5.0, 0.0, 3.0, 4.0], &[4.0, 3.0, -3.0, -4.0], &[0.0, 5.0, 5.0, 0.0]];
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let pairs = [(0, 1), (0, 2), (1, 2)].map(|(i, j)| dot(matrices[i], matrices[j]) / 50.0);
        let expected = pairs.iter().sum::<f64>() / 3.0;
        let mean = of(&matrices);
        assert!((mean.mean_cosine() - expected).abs() < 1e-12, "{} {expected}", mean.mean_cosine());
        let base = Tensor::from_f32(vec![2, 2], Dtype::F32, &mean.mean()).unwrap();
        let differing: Vec<f32> = difference(&tensor(matrices[0]), &base).to_f32();
        assert!(
            differing.iter().zip([2.0, -8.0 / 3.0, 4.0 / 3.0, 4.0]).all(|(is, was)| (is - was).abs() < 1e-6)
        );
    }

    #[test]
    fn a_nan_is_refused() {
        let mut mean = MatrixMean::new(MatrixShape { rows: 2, cols: 2 });
        assert!(mean.add(&tensor(&[0.0, f32::NAN, 0.0, 0.0])).is_err());
    }
}
