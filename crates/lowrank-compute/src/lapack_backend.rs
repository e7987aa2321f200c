//! The second backend: LAPACK and BLAS through `ndarray-linalg`. Shares nothing with faer, so each can check the other.
//!
//! OpenBLAS may use threads of its own, and its bits depend on them and on the CPU: not for reproducible output.

use crate::{Accumulate, Backend, Cholesky, ComputeError, Eigen, Kernels, PivotedQr, Real, mirror_lower};
use ndarray::linalg::{general_mat_mul, general_mat_vec_mul};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use ndarray_linalg::{
    CholeskyInto, Diag, EigValshInplace, EighInplace, JobSvd, Lapack as LapackScalar, QR, SVDDCInplace,
    Scalar, SolveTriangular, UPLO, error::LinalgError,
};

/// The system's LAPACK.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lapack;

const NAME: &str = "lapack";

impl Backend for Lapack {
    fn name(&self) -> &'static str {
        NAME
    }
}

impl<T: Real + LapackScalar + Scalar<Real = T>> Kernels<T> for Lapack {
    fn gemm(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        mut c: ArrayViewMut2<'_, T>,
        accumulate: Accumulate,
    ) {
        let beta = match accumulate {
            Accumulate::Replace => T::zero(),
            Accumulate::Add => T::one(),
        };
        general_mat_mul(T::one(), &a, &b, beta, &mut c);
    }

    fn gram_add(&self, gram: &mut Array2<T>, block: ArrayView2<'_, T>) {
        // ndarray reaches no syrk: twice the work.
        self.gemm(block.t(), block, gram.view_mut(), Accumulate::Add);
    }

    fn eigh(&self, mut gram: Array2<T>, count: usize) -> Result<Eigen<T>, ComputeError> {
        mirror_lower(&mut gram);
        let (values, vectors) = gram.eigh_inplace(UPLO::Lower).map_err(refusal)?;
        let values = values.iter().rev().copied().collect();
        let vectors = vectors.slice(s![.., ..;-1]).slice(s![.., ..count]).to_owned();
        Ok(Eigen { values, vectors })
    }

    fn eigvalsh(&self, mut gram: Array2<T>) -> Result<Vec<T>, ComputeError> {
        mirror_lower(&mut gram);
        let values = gram.eigvalsh_inplace(UPLO::Lower).map_err(refusal)?;
        Ok(values.iter().rev().copied().collect())
    }

    fn singular_values(&self, mut a: Array2<T>) -> Result<Vec<T>, ComputeError> {
        let (_, values, _) = a.svddc_inplace(JobSvd::None).map_err(refusal)?;
        Ok(values.to_vec())
    }

    fn thin_qr(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError> {
        y.qr().map(|(q, _)| q).map_err(refusal)
    }

    fn cholesky(&self, matrix: ArrayView2<'_, T>) -> Option<Cholesky<T>> {
        let mut matrix = matrix.to_owned();
        mirror_lower(&mut matrix);
        let lower = matrix.cholesky_into(UPLO::Lower).ok()?;
        let inverse = lower.solve_triangular(UPLO::Lower, Diag::NonUnit, &Array2::eye(lower.nrows())).ok()?;
        Some(Cholesky { lower, inverse })
    }

    // ndarray reaches no geqp3: Householder reflections by hand over BLAS, the norms taken anew at every step.
    fn qr_pivoted(&self, mut a: Array2<T>) -> Result<PivotedQr<T>, ComputeError> {
        let (rows, cols) = a.dim();
        let size = rows.min(cols);
        let mut permutation: Vec<usize> = (0..cols).collect();
        for step in 0..size {
            let energies = a.slice(s![step.., step..]).map_axis(Axis(0), |column| column.dot(&column));
            let farthest =
                (0..energies.len()).fold(0, |best, j| if energies[j] > energies[best] { j } else { best });
            if farthest > 0 {
                permutation.swap(step, step + farthest);
                let (mut head, mut tail) = a.view_mut().split_at(Axis(1), step + farthest);
                head.column_mut(step)
                    .iter_mut()
                    .zip(tail.column_mut(0))
                    .for_each(|(x, y)| std::mem::swap(x, y));
            }
            // The reflection I − τ v vᵀ, v = x ± ‖x‖ e₁, takes x to ∓‖x‖ e₁.
            let mut v: Array1<T> = a.slice(s![step.., step]).to_owned();
            let norm = Scalar::sqrt(v.dot(&v));
            if norm.is_zero() {
                continue;
            }
            let shift = if v[0] < T::zero() { -norm } else { norm };
            v[0] += shift;
            let tau = (T::one() + T::one()) / v.dot(&v);
            let mut rest = a.slice_mut(s![step.., step..]);
            let mut images = Array1::zeros(cols - step);
            general_mat_vec_mul(tau, &rest.t(), &v, T::zero(), &mut images);
            for (mut row, &weight) in rest.rows_mut().into_iter().zip(&v) {
                row.scaled_add(-weight, &images);
            }
        }
        let r = Array2::from_shape_fn((size, cols), |(i, j)| if i <= j { a[[i, j]] } else { T::zero() });
        Ok(PivotedQr { r, permutation })
    }
}

fn refusal(error: LinalgError) -> ComputeError {
    ComputeError::Library { backend: NAME, message: error.to_string() }
}
