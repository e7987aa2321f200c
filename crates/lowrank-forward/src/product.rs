//! Y = X Wᵀ, the only product there is: rows of X are tokens, rows of W are output features.
//!
//! The result is cut into tiles of fixed size, each computed by one task in one order, so its bits do not depend on
//! the number of threads, nor those of a token on the tokens beside it.

use lowrank_compute::{Accumulate, Faer, Kernels};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

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
fn tiled(mut y: ArrayViewMut2<'_, f32>, x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) {
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
    } else if y.nrows() < rows_least(y.ncols()) {
        // With zeros for the tokens that are missing.
        let rows = rows_least(y.ncols());
        let (mut wide_x, mut wide_y) = (Array2::zeros((rows, x.ncols())), Array2::zeros((rows, y.ncols())));
        wide_x.slice_mut(s![..x.nrows(), ..]).assign(&x);
        one_tile(wide_y.view_mut(), wide_x.view(), w.reversed_axes());
        y.assign(&wide_y.slice(s![..x.nrows(), ..]));
    } else {
        one_tile(y, x, w.reversed_axes());
    }
}

/// faer sums products with one row, and those with few elements, in other orders than all others (seen up to 32 of them), so that a
/// token's bits would depend on the tokens beside it. From so many rows on they do not.
fn rows_least(outputs: usize) -> usize {
    const ELEMENTS: usize = 33;
    ELEMENTS.div_ceil(outputs).max(2)
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

    /// So a text may be cut into parts that run apart.
    #[test]
    fn bits_of_a_token_do_not_depend_on_the_tokens_beside_it() {
        let narrow = [(128, 1), (128, 2), (128, 3), (128, 8), (8, 3), (33, 7), (4096, 12)];
        let wide = [(128, 448), (448, 128), (130, 1100), (1024, 70), (4096, 300), (7000, 64)];
        for (inputs, outputs) in narrow.into_iter().chain(wide) {
            let tokens = TILE_TOKENS + 40;
            let (x, w) = (random(tokens * inputs, 5), random(outputs * inputs, 6));
            let run = |x: &[f32]| {
                let mut y = vec![0.0; x.len() / inputs * outputs];
                tokens_times_weight(&mut y, x, &w, inputs, outputs);
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let all = run(&x);
            for count in (1..=20).chain([24, 31, 32, 33, 47, 48, 63, 64, 65, 100, 128, 200, 255, 256]) {
                for first in [0, 1, 37] {
                    let part = run(&x[first * inputs..(first + count) * inputs]);
                    let differ = part.iter().zip(&all[first * outputs..]).filter(|(a, b)| a != b).count();
                    assert_eq!(differ, 0, "{inputs} {outputs}: {count} tokens from {first}");
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
