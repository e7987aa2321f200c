//! Random sketches: how large, and of which random signs.

use lowrank_compute::Real;
use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// The size of a sketch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sketch {
    /// k: columns of Ω, at most the short side.
    pub(crate) columns: usize,
    /// q
    pub(crate) power_iterations: usize,
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
