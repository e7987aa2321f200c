//! A root of a second moment, which whitens what it is the moment of: S Sᵀ = C, with its pseudo-inverse.
//!
//! Where C is well conditioned, as shrinkage makes it, the Cholesky factor: S = L and S⁺ = L⁻¹. Else C = Q Λ Qᵀ,
//! S = Q Λ^½ [n, k] and S⁺ = Λ^-½ Qᵀ, over the k eigenvalues above n·ε·λ₁: what lies below is rounding of a singular second
//! moment, and is left out instead of divided by.

use crate::error::SvdError;
use crate::linalg::{energy_of, norm_squared};
use lowrank_compute::{Cholesky, ComputeError, Kernels, Real};
use lowrank_model::MatrixShape;
use ndarray::{Array2, ArrayView2, s};

#[derive(Clone)]
pub(crate) struct Root<T> {
    factor: RootFactor<T>,
    /// ‖S‖² and ‖S⁺‖².
    norms_squared: (f64, f64),
}

#[derive(Clone)]
enum RootFactor<T> {
    Cholesky(Cholesky<T>),
    /// Q [n, k] and the roots of its eigenvalues.
    Eigen {
        vectors: Array2<T>,
        sizes: Vec<f64>,
    },
}

/// S of a shrunk second moment C̃ [n, n], for all matrices with these inputs.
pub struct MomentRoot(pub(crate) Root<f64>);

impl std::fmt::Debug for MomentRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MomentRoot {:?}", self.0.dim())
    }
}

impl MomentRoot {
    pub(crate) fn check(&self, size: usize, shape: MatrixShape) -> Result<(), SvdError> {
        let (rows, cols) = self.0.dim();
        match rows == size {
            true => Ok(()),
            false => Err(SvdError::MetricShape { what: "root", rows, cols, size, shape }),
        }
    }
}

impl<T: Real> Root<T> {
    /// Of a positive semidefinite matrix; its lower triangle is read. k is 0 for a zero matrix.
    pub(crate) fn of(kernels: &dyn Kernels<T>, matrix: Array2<T>) -> Result<Self, ComputeError> {
        let size = matrix.nrows();
        let rounding = size as f64 * T::EPSILON.as_f64();
        if let Some(cholesky) = kernels.cholesky(matrix.view()) {
            let Cholesky { lower, inverse } = &cholesky;
            // tr C · tr C⁻¹ is at least λ₁/λₙ.
            if energy_of(lower) * energy_of(inverse) * rounding < 1.0 {
                let norms_squared = (norm_squared(kernels, lower.view()), norm_squared(kernels, inverse.t()));
                return Ok(Self { factor: RootFactor::Cholesky(cholesky), norms_squared });
            }
        }
        let eigen = kernels.eigh(matrix, size)?;
        let threshold = rounding * eigen.values[0].as_f64();
        let values: Vec<f64> = eigen
            .values
            .iter()
            .map(|value| value.as_f64())
            .take_while(|&value| value > threshold.max(0.0))
            .collect();
        let vectors = if values.len() == size {
            eigen.vectors
        } else {
            eigen.vectors.slice(s![.., ..values.len()]).to_owned()
        };
        let norms_squared = match (values.first(), values.last()) {
            (Some(first), Some(last)) => (*first, last.recip()),
            _ => (0.0, 0.0),
        };
        let sizes = values.into_iter().map(f64::sqrt).collect();
        Ok(Self { factor: RootFactor::Eigen { vectors, sizes }, norms_squared })
    }

    /// n and k.
    fn dim(&self) -> (usize, usize) {
        match &self.factor {
            RootFactor::Cholesky(Cholesky { lower, .. }) => lower.dim(),
            RootFactor::Eigen { vectors, .. } => vectors.dim(),
        }
    }

    /// ‖S‖², of a Cholesky factor from below.
    pub(crate) fn norm_squared(&self) -> f64 {
        self.norms_squared.0
    }

    /// ‖S‖·‖S⁺‖, likewise; 1 for a zero matrix.
    pub(crate) fn condition(&self) -> f64 {
        let (of_root, of_inverse) = self.norms_squared;
        if of_root == 0.0 { 1.0 } else { (of_root * of_inverse).sqrt() }
    }

    /// S [n, k].
    pub(crate) fn root<U: Real>(&self) -> Array2<U> {
        match &self.factor {
            RootFactor::Cholesky(Cholesky { lower, .. }) => converted(lower.view()),
            RootFactor::Eigen { vectors, sizes } => scaled(vectors, sizes, |size| size),
        }
    }

    /// S⁺ᵀ [n, k].
    pub(crate) fn inverse_transposed<U: Real>(&self) -> Array2<U> {
        match &self.factor {
            RootFactor::Cholesky(Cholesky { inverse, .. }) => converted(inverse.t()),
            RootFactor::Eigen { vectors, sizes } => scaled(vectors, sizes, f64::recip),
        }
    }
}

fn converted<T: Real, U: Real>(matrix: ArrayView2<'_, T>) -> Array2<U> {
    matrix.mapv(|value| U::of_f64(value.as_f64()))
}

fn scaled<T: Real, U: Real>(vectors: &Array2<T>, sizes: &[f64], scale: impl Fn(f64) -> f64) -> Array2<U> {
    let mut out = converted(vectors.view());
    for (mut column, &size) in out.columns_mut().into_iter().zip(sizes) {
        let factor = scale(size);
        column.mapv_inplace(|value: U| U::of_f64(value.as_f64() * factor));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_compute::Faer;
    use ndarray::array;

    fn check(matrix: Array2<f64>, eigenvalues: &[f64], is_cholesky: bool) {
        let root = Root::of(&Faer as &dyn Kernels<f64>, matrix.clone()).unwrap();
        assert_eq!(matches!(root.factor, RootFactor::Cholesky(_)), is_cholesky);
        let (s, inverse): (Array2<f64>, Array2<f64>) = (root.root(), root.inverse_transposed());
        let close = |a: Array2<f64>, b: &Array2<f64>| (a - b).iter().all(|value| value.abs() < 1e-12);
        assert!(close(s.dot(&s.t()), &matrix));
        assert_eq!(root.dim(), (matrix.nrows(), eigenvalues.len()));
        assert!(close(inverse.t().dot(&s), &Array2::eye(eigenvalues.len())));
        let (first, last) = (eigenvalues[0], eigenvalues[eigenvalues.len() - 1]);
        assert!((root.norm_squared() / first - 1.0).abs() < 1e-2);
        assert!((root.condition() / (first / last).sqrt() - 1.0).abs() < 1e-2);
    }

    #[test]
    fn a_regular_moment_needs_no_eigenvectors_and_a_singular_one_keeps_its_rank() {
        check(array![[5.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]], &[6.0, 3.0, 1.0], true);
        check(array![[4.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0]], &[5.0, 3.0], false);
        // Regular, but only by what rounding could have made.
        check(array![[1.0, 0.0], [0.0, 1e-16]], &[1.0], false);
    }

    #[test]
    fn a_zero_matrix_has_no_root() {
        let root = Root::of(&Faer as &dyn Kernels<f64>, Array2::zeros((3, 3))).unwrap();
        assert_eq!((root.dim(), root.norm_squared(), root.condition()), ((3, 0), 0.0, 1.0));
    }
}
