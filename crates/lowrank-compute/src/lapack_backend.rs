//! The second backend: LAPACK and BLAS through `ndarray-linalg`. Shares nothing with faer, so each can check the other.
//!
//! OpenBLAS may use threads of its own, and its bits depend on them and on the CPU: not for reproducible output.

use crate::{Accumulate, Backend, ComputeError, Eigen, Kernels, Real};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use ndarray_linalg::{
    EigValshInplace, EighInplace, JobSvd, Lapack as LapackScalar, QR, SVDDCInplace, Scalar, UPLO,
    error::LinalgError,
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
        mirror(&mut gram);
        let (values, vectors) = gram.eigh_inplace(UPLO::Lower).map_err(refusal)?;
        let values = values.iter().rev().copied().collect();
        let vectors = vectors.slice(s![.., ..;-1]).slice(s![.., ..count]).to_owned();
        Ok(Eigen { values, vectors })
    }

    fn eigvalsh(&self, mut gram: Array2<T>) -> Result<Vec<T>, ComputeError> {
        mirror(&mut gram);
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
}

/// Copies the lower triangle over the upper: which of the two `UPLO` means depends on the layout in ndarray-linalg 0.18.
fn mirror<T: Real>(matrix: &mut Array2<T>) {
    for i in 0..matrix.nrows() {
        for j in i + 1..matrix.ncols() {
            matrix[[i, j]] = matrix[[j, i]];
        }
    }
}

fn refusal(error: LinalgError) -> ComputeError {
    ComputeError::Library { backend: NAME, message: error.to_string() }
}
