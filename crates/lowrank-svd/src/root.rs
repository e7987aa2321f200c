//! A root of a moment: S Sᵀ = C with its pseudo-inverse.
//!
//! C = Q Λ Qᵀ, S = Q Λ^½ [n, k] and S⁺ = Λ^-½ Qᵀ, over the k eigenvalues above n·ε·λ₁: what lies below is rounding of a
//! moment that is singular, and is left out instead of divided by.

use crate::SvdError;
use lowrank_compute::{ComputeError, Kernels, Real};
use lowrank_model::MatrixShape;
use ndarray::{Array2, s};

/// Q [n, k] and the roots of its eigenvalues.
#[derive(Clone)]
pub(crate) struct Root<T> {
    vectors: Array2<T>,
    sizes: Vec<f64>,
}

/// S of a blended moment C̃ [n, n], for all the matrices that see it.
pub struct MomentRoot(pub(crate) Root<f64>);

impl std::fmt::Debug for MomentRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MomentRoot {:?}", self.0.vectors.dim())
    }
}

impl MomentRoot {
    pub(crate) fn check(&self, size: usize, shape: MatrixShape) -> Result<(), SvdError> {
        let (rows, cols) = self.0.vectors.dim();
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
        let eigen = kernels.eigh(matrix, size)?;
        let threshold = size as f64 * T::EPSILON.as_f64() * eigen.values[0].as_f64();
        let sizes: Vec<f64> = eigen
            .values
            .iter()
            .map(|value| value.as_f64())
            .take_while(|&value| value > threshold.max(0.0))
            .map(f64::sqrt)
            .collect();
        let vectors = if sizes.len() == size {
            eigen.vectors
        } else {
            eigen.vectors.slice(s![.., ..sizes.len()]).to_owned()
        };
        Ok(Self { vectors, sizes })
    }

    /// ‖S‖².
    pub(crate) fn norm_squared(&self) -> f64 {
        self.sizes.first().map_or(0.0, |size| size * size)
    }

    /// ‖S‖·‖S⁺‖.
    pub(crate) fn condition(&self) -> f64 {
        match (self.sizes.first(), self.sizes.last()) {
            (Some(first), Some(last)) => first / last,
            _ => 1.0,
        }
    }

    /// S [n, k].
    pub(crate) fn root<U: Real>(&self) -> Array2<U> {
        self.scaled(|size| size)
    }

    /// S⁺ᵀ [n, k].
    pub(crate) fn inverse_transposed<U: Real>(&self) -> Array2<U> {
        self.scaled(f64::recip)
    }

    fn scaled<U: Real>(&self, scale: impl Fn(f64) -> f64) -> Array2<U> {
        let mut out = self.vectors.mapv(|value| U::of_f64(value.as_f64()));
        for (mut column, &size) in out.columns_mut().into_iter().zip(&self.sizes) {
            let factor = scale(size);
            column.mapv_inplace(|value| U::of_f64(value.as_f64() * factor));
        }
        out
    }
}
