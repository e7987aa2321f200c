//! The norm without data: ‖W − Ŵ‖², every weight counts the same.
//!
//! A = WᵀW or W Wᵀ, whichever is smaller, and Ŵ = W X Xᵀ or X Xᵀ W: the truncated SVD (Eckart and Young, 1936). A quarter
//! of the work of a thin SVD at 14336×4096, equally good where [`crate::precision`] lets it run in f32.
//!
//! The sketch (Halko, Martinsson and Tropp, 2011): with Ω [d, k] of random signs, k = r + oversampling, q times
//! Y = qr(A X), X = qr(AᵀY), from X = Ω, where A is W or Wᵀ; then B = A X [l, k], BᵀB = E Λ Eᵀ, and X E, B E are the
//! subspace and its image. 2q + 1 products with A in all. On a flat spectrum no number of passes finds the optimal
//! subspace, so the excess error is always reported.

use crate::error::SvdError;
use crate::error_norm::{Basis, ErrorNorm, InPrecision, NormMatrix, Sketched, SquaredErrors};
use crate::factors::BalancedFactors;
use crate::linalg::product;
use crate::randomized::{Sketch, random_signs};
use crate::residual::truncation_energy;
use crate::stats::{Problem, WeightStats};
use lowrank_compute::blocks::BLOCK_ROWS;
use lowrank_compute::{Accumulate, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, s};
use rand_chacha::ChaCha8Rng;

/// ‖W − Ŵ‖², by the Gram matrix of the short side.
pub(crate) struct Weights {
    side: Side,
    energy: f64,
}

impl Weights {
    pub(crate) fn new(stats: &WeightStats) -> Self {
        Self { side: Side::short(stats.shape), energy: stats.energy }
    }
}

impl ErrorNorm for Weights {
    fn side(&self) -> Side {
        self.side
    }

    fn scale(&self) -> f64 {
        1.0
    }

    fn expected_condition(&self) -> Option<f64> {
        None
    }

    fn trace(&self) -> Option<f64> {
        Some(self.energy)
    }

    fn keeps_decomposition(&self) -> bool {
        true
    }

    fn errors(
        &self,
        problem: &Problem<'_>,
        factors: &BalancedFactors,
        _: Option<ArrayView2<'_, f64>>,
    ) -> SquaredErrors {
        SquaredErrors { weights: truncation_energy(problem, factors), norm: None }
    }
}

impl<T: Real> InPrecision<T> for Weights {
    fn matrix(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> NormMatrix<T> {
        NormMatrix { a: kernels.gram(w, self.side), bound: 0.0 }
    }

    fn basis(&self, _: &dyn Kernels<T>, x: Array2<T>) -> Result<Basis<T>, SvdError> {
        Ok(Basis { x, y: None })
    }

    fn sketch(
        &self,
        kernels: &dyn Kernels<T>,
        w: &Tensor,
        rank: usize,
        sketch: Sketch,
        rng: ChaCha8Rng,
    ) -> Result<Sketched<T>, SvdError> {
        let (_, width) = self.side.dims(lowrank_compute::blocks::matrix_shape(w));
        let mut x = kernels.thin_qr(random_signs(width, sketch.columns, rng))?;
        for _ in 0..sketch.power_iterations {
            let y = kernels.thin_qr(kernels.apply(w, self.side, x.view()))?;
            x = kernels.thin_qr(kernels.apply_transposed(w, self.side, y.view()))?;
        }
        let b = kernels.apply(w, self.side, x.view());
        let mut gram = Array2::zeros((sketch.columns, sketch.columns));
        kernels.gram_add(&mut gram, b.view());
        let eigen = kernels.eigh(gram, rank)?;
        let x = product(kernels, x.view(), eigen.vectors.view());
        // In blocks, so that B E is never held in both precisions.
        let mut image = Array2::zeros((b.nrows(), rank));
        let mut wide = Array2::zeros((0, 0));
        for first in (0..b.nrows()).step_by(BLOCK_ROWS) {
            let rows = s![first..b.nrows().min(first + BLOCK_ROWS), ..];
            let block = b.slice(rows);
            if wide.nrows() != block.nrows() {
                wide = Array2::zeros((block.nrows(), rank));
            }
            kernels.gemm(block, eigen.vectors.view(), wide.view_mut(), Accumulate::Replace);
            image.slice_mut(rows).zip_mut_with(&wide, |narrow, value| *narrow = value.as_f32());
        }
        Ok(Sketched { basis: Basis { x, y: None }, image: Some(image), eigenvalues: eigen.values })
    }
}
