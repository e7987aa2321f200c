//! Y = X Wᵀ, the only product there is: rows of X are tokens, rows of W are output features.
//!
//! The result is cut into tiles of fixed size, each computed by one task in one order, so its bits do not depend on
//! the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Tokens of a tile. Large enough that packing W costs little beside the multiplications.
pub const TILE_TOKENS: usize = 256;
/// Output features of a tile.
const TILE_FEATURES: usize = 1024;

/// Y [N, out] = X [N, in] · W [out, in]ᵀ, all row-major.
pub fn tokens_times_weight(y: &mut [f32], x: &[f32], w: &[f32], inputs: usize, outputs: usize) {
    let tokens = x.len() / inputs;
    let y = MatMut::from_row_major_slice_mut(y, tokens, outputs);
    let x = MatRef::from_row_major_slice(x, tokens, inputs);
    let w = MatRef::from_row_major_slice(w, outputs, inputs);
    tiled(y, x, w);
}

/// Halves the result at tile borders until one tile is left; the halves may run side by side.
fn tiled(y: MatMut<'_, f32>, x: MatRef<'_, f32>, w: MatRef<'_, f32>) {
    if y.nrows() > TILE_TOKENS {
        let middle = y.nrows().div_ceil(TILE_TOKENS) / 2 * TILE_TOKENS;
        let (above, below) = y.split_at_row_mut(middle);
        let (x_above, x_below) = x.split_at_row(middle);
        rayon::join(|| tiled(above, x_above, w), || tiled(below, x_below, w));
    } else if y.ncols() > TILE_FEATURES {
        let middle = y.ncols().div_ceil(TILE_FEATURES) / 2 * TILE_FEATURES;
        let (left, right) = y.split_at_col_mut(middle);
        let (w_left, w_right) = w.split_at_row(middle);
        rayon::join(|| tiled(left, x, w_left), || tiled(right, x, w_right));
    } else {
        one_tile(y, x, w.transpose());
    }
}

/// C = A B on the calling thread.
pub(crate) fn one_tile(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    matmul(c, Accum::Replace, a, b, 1.0, Par::Seq);
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
