//! Y = X Wᵀ, the only product there is: rows of X are tokens, rows of W are output features.
//!
//! The result is cut into tiles of fixed size, each computed by one task in one order, so its bits do not depend on
//! the number of threads.

use lowrank_compute::{Accumulate, Faer, Kernels};
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

/// Tokens of a tile. Large enough that packing W costs little beside the multiplications.
pub const TILE_TOKENS: usize = 256;
/// Output features of a tile.
const TILE_FEATURES: usize = 1024;

/// Y [N, out] = X [N, in] · W [out, in]ᵀ, all row-major.
pub fn tokens_times_weight(y: &mut [f32], x: &[f32], w: &[f32], inputs: usize, outputs: usize) {
    let tokens = x.len() / inputs;
    let mut y = ArrayViewMut2::from_shape((tokens, outputs), y).expect("y is [N, out]");
    tiled(y.view_mut(), rows(x, inputs), rows(w, inputs));
}

/// A row-major slice as a matrix.
pub(crate) fn rows(values: &[f32], cols: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((values.len() / cols, cols), values).expect("whole rows")
}

/// Halves the result at tile borders until one tile is left; the halves may run side by side.
fn tiled(y: ArrayViewMut2<'_, f32>, x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) {
    if y.nrows() > TILE_TOKENS {
        let middle = y.nrows().div_ceil(TILE_TOKENS) / 2 * TILE_TOKENS;
        let (above, below) = y.split_at(Axis(0), middle);
        let (x_above, x_below) = x.split_at(Axis(0), middle);
        rayon::join(|| tiled(above, x_above, w), || tiled(below, x_below, w));
    } else if y.ncols() > TILE_FEATURES {
        let middle = y.ncols().div_ceil(TILE_FEATURES) / 2 * TILE_FEATURES;
        let (left, right) = y.split_at(Axis(1), middle);
        let (w_left, w_right) = w.split_at(Axis(0), middle);
        rayon::join(|| tiled(left, x, w_left), || tiled(right, x, w_right));
    } else {
        one_tile(y, x, w.reversed_axes());
    }
}

/// C = A B on the calling thread.
pub(crate) fn one_tile(c: ArrayViewMut2<'_, f32>, a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) {
    Faer.gemm(a, b, c, Accumulate::Replace);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn products_equal_plain_sums_on_and_beside_tile_borders() {
        for (tokens, inputs, outputs) in
            [(1, 1, 1), (3, 70, 5), (256, 33, 1024), (257, 40, 1025), (600, 9, 2100)]
        {
            let (x, w) = (random(tokens * inputs, 1), random(outputs * inputs, 2));
            let mut y = vec![f32::NAN; tokens * outputs];
            tokens_times_weight(&mut y, &x, &w, inputs, outputs);
            let tolerance = f64::from(f32::EPSILON) * (inputs as f64).sqrt() * 4.0;
            for t in 0..tokens {
                for o in 0..outputs {
                    let expected: f64 = (0..inputs)
                        .map(|i| f64::from(x[t * inputs + i]) * f64::from(w[o * inputs + i]))
                        .sum();
                    let got = f64::from(y[t * outputs + o]);
                    assert!(
                        (got - expected).abs() <= tolerance * (1.0 + expected.abs()),
                        "{t} {o}: {got} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (tokens, inputs, outputs) = (700, 130, 2300);
        let (x, w) = (random(tokens * inputs, 3), random(outputs * inputs, 4));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![0.0; tokens * outputs];
            pool.install(|| tokens_times_weight(&mut y, &x, &w, inputs, outputs));
            y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(3));
    }
}
