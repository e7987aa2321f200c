//! A subspace by random sketching (Halko, Martinsson and Tropp, 2011): for ranks far below the short side.
//!
//! With Ω [d, k] of random signs, k = r + oversampling: q times, Y = qr(A X), X = qr(AᵀY), from X = Ω; then B = A X
//! [l, k], BᵀB = E Λ Eᵀ, and X E, B E are the wanted subspace and its image. 2q + 1 products with A in all.
//!
//! On a flat spectrum no number of passes finds the optimal subspace, so the excess error is always reported.

use crate::SvdError;
use crate::spectrum::sigma_from_eigenvalues;
use lowrank_compute::{Accumulate, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How hard to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sketch {
    /// k: columns of Ω, at most the short side.
    pub columns: usize,
    /// q
    pub power_iterations: usize,
}

/// A subspace X [d, r], its image A X [l, r] and the singular values along it.
pub(crate) struct Subspace<T> {
    pub(crate) x: Array2<T>,
    pub(crate) image: Array2<f32>,
    pub(crate) sigma: Vec<f64>,
}

pub(crate) fn subspace<T: Real>(
    kernels: &dyn Kernels<T>,
    w: &Tensor,
    side: Side,
    rank: usize,
    sketch: Sketch,
    rng: ChaCha8Rng,
) -> Result<Subspace<T>, SvdError> {
    let (_, width) = side.dims(lowrank_compute::blocks::matrix_shape(w));
    let mut x = kernels.thin_qr(random_signs(width, sketch.columns, rng))?;
    for _ in 0..sketch.power_iterations {
        let y = kernels.thin_qr(kernels.apply(w, side, x.view()))?;
        x = kernels.thin_qr(kernels.apply_transposed(w, side, y.view()))?;
    }
    let b = kernels.apply(w, side, x.view());
    let mut gram = Array2::zeros((sketch.columns, sketch.columns));
    kernels.gram_add(&mut gram, b.view());
    let eigen = kernels.eigh(gram, rank)?;
    let sigma = sigma_from_eigenvalues(&eigen.values, 0.0)?;
    let mut best = Array2::zeros((width, rank));
    kernels.gemm(x.view(), eigen.vectors.view(), best.view_mut(), Accumulate::Replace);
    drop(x);
    let mut image = Array2::zeros((b.nrows(), rank));
    let mut wide = Array2::zeros((0, 0));
    let block_rows = lowrank_compute::blocks::BLOCK_ROWS;
    for first in (0..b.nrows()).step_by(block_rows) {
        let rows = s![first..b.nrows().min(first + block_rows), ..];
        let block = b.slice(rows);
        if wide.nrows() != block.nrows() {
            wide = Array2::zeros((block.nrows(), rank));
        }
        kernels.gemm(block, eigen.vectors.view(), wide.view_mut(), Accumulate::Replace);
        image.slice_mut(rows).zip_mut_with(&wide, |narrow, value| *narrow = value.as_f32());
    }
    Ok(Subspace { x: best, image, sigma })
}

/// The generator of one matrix. Keyed by seed and matrix, never by thread or order.
pub(crate) fn generator(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

/// ±1, as good a test matrix as Gaussian numbers and free of transcendental functions, whose last bits differ between
/// platforms.
pub(crate) fn random_signs<T: Real>(rows: usize, cols: usize, mut rng: ChaCha8Rng) -> Array2<T> {
    let (mut bits, mut left) = (0_u64, 0);
    Array2::from_shape_simple_fn((rows, cols), || {
        if left == 0 {
            (bits, left) = (rng.next_u64(), 64);
        }
        let sign = if bits & 1 == 0 { T::one() } else { -T::one() };
        (bits, left) = (bits >> 1, left - 1);
        sign
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_has_its_own_signs_and_they_repeat() {
        let signs = |seed, stream| random_signs::<f32>(40, 7, generator(seed, stream));
        assert_eq!(signs(1, 2), signs(1, 2));
        assert_ne!(signs(1, 2), signs(1, 3));
        assert_ne!(signs(1, 2), signs(2, 2));
        assert!(signs(1, 2).iter().all(|sign| sign.abs() == 1.0));
        assert!(signs(1, 2).sum().abs() < 5.0 * 280.0_f32.sqrt());
    }
}
