//! Matrices so large that all threads work on one: Cholesky factors and products, tile by tile.
//!
//! Of a symmetric matrix only the lower triangle is stored. Tiles have a fixed size and each is computed on one thread, so that
//! the number of threads changes no bit.

use crate::faer_backend::{factor_lower, solve_lower, solve_lower_transposed, subtract_product};
use crate::{Accumulate, Faer, Kernels, Real};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use std::ops::Range;

/// Rows and columns of a tile; those at the end are smaller.
const TILE: usize = 256;

/// L [d, d] of C = L Lᵀ.
#[derive(Debug, Clone, PartialEq)]
pub struct TiledCholesky<T> {
    size: usize,
    /// Rows and columns of a tile.
    tile: usize,
    /// Row i of tiles has the tiles (i, 0) to (i, i). What is above the diagonal is zero.
    rows: Vec<Vec<Array2<T>>>,
}

impl<T: Real> TiledCholesky<T> {
    /// Of the matrix with these elements, which are asked for at and below the diagonal only. `None` if rounding finds it
    /// indefinite.
    pub fn new(size: usize, element: impl Fn(usize, usize) -> T + Sync) -> Option<Self> {
        Self::in_tiles(TILE, size, element)
    }

    fn in_tiles(tile: usize, size: usize, element: impl Fn(usize, usize) -> T + Sync) -> Option<Self> {
        let len = |at: usize| tile.min(size - at * tile);
        let read = |i: usize, j: usize| {
            Array2::from_shape_fn((len(i), len(j)), |(row, col)| {
                let (row, col) = (i * tile + row, j * tile + col);
                if col <= row { element(row, col) } else { T::zero() }
            })
        };
        let count = size.div_ceil(tile);
        let rows = (0..count).into_par_iter().map(|i| (0..=i).map(|j| read(i, j)).collect()).collect();
        let mut made = Self { size, tile, rows };
        (0..count).all(|step| made.step(step)).then_some(made)
    }

    /// Makes column `k` of tiles from those before it.
    fn step(&mut self, k: usize) -> bool {
        let (above, below) = self.rows.split_at_mut(k + 1);
        let own = &mut above[k];
        let (done, diagonal) = own.split_at_mut(k);
        for tile in done.iter() {
            subtract_product(tile.view(), tile.t(), diagonal[0].view_mut());
        }
        if !factor_lower(&mut diagonal[0]) {
            return false;
        }
        let own = &above[k];
        below.par_iter_mut().for_each(|row| {
            let (done, rest) = row.split_at_mut(k);
            for (left, right) in done.iter().zip(own) {
                subtract_product(left.view(), right.t(), rest[0].view_mut());
            }
            // X Lᵀ = A is L Xᵀ = Aᵀ.
            solve_lower(own[k].view(), rest[0].view_mut().reversed_axes());
        });
        true
    }

    /// The diagonal of C⁻¹ = L⁻ᵀ L⁻¹: squared norms of the columns of L⁻¹.
    pub fn inverse_diagonal(&self) -> Vec<T> {
        let of_column = |j: usize| {
            let width = self.rows[j][j].ncols();
            let mut column: Vec<Array2<T>> = Vec::with_capacity(self.rows.len() - j);
            for i in j..self.rows.len() {
                let mut tile =
                    if i == j { Array2::eye(width) } else { Array2::zeros((self.rows[i][i].nrows(), width)) };
                for (left, right) in self.rows[i][j..i].iter().zip(&column) {
                    subtract_product(left.view(), right.view(), tile.view_mut());
                }
                solve_lower(self.rows[i][i].view(), tile.view_mut());
                column.push(tile);
            }
            let norm = |at: usize| {
                column.iter().fold(T::zero(), |sum, tile| sum + tile.column(at).dot(&tile.column(at)))
            };
            (0..width).map(norm).collect::<Vec<T>>()
        };
        (0..self.rows.len()).into_par_iter().flat_map_iter(of_column).collect()
    }

    /// A C⁻¹ in place: [n, d].
    ///
    /// # Panics
    /// If A has another number of columns.
    pub fn solve_rows(&self, a: ArrayViewMut2<'_, T>) {
        assert_eq!(a.ncols(), self.size);
        self.for_each_strip(a, |tiles| {
            // Z Lᵀ = A, from the first column on.
            for j in 0..tiles.len() {
                let (done, rest) = tiles.split_at_mut(j);
                for (left, right) in done.iter().zip(&self.rows[j]) {
                    subtract_product(left.view(), right.t(), rest[0].view_mut());
                }
                solve_lower(self.rows[j][j].view(), rest[0].view_mut().reversed_axes());
            }
            self.divide(tiles);
        });
    }

    /// A L[:k, :k]⁻¹ in place, by the first k rows and columns of L: [n, k].
    ///
    /// # Panics
    /// If A has more columns than L.
    pub fn divide_by_leading(&self, a: ArrayViewMut2<'_, T>) {
        assert!(a.ncols() <= self.size);
        self.for_each_strip(a, |tiles| self.divide(tiles));
    }

    /// Changes some rows of A at a time, cut into tiles by columns.
    fn for_each_strip(&self, mut a: ArrayViewMut2<'_, T>, change: impl Fn(&mut [Array2<T>]) + Sync) {
        let strips: Vec<ArrayViewMut2<'_, T>> = a.axis_chunks_iter_mut(Axis(0), self.tile).collect();
        strips.into_par_iter().for_each(|mut rows| {
            let mut tiles: Vec<Array2<T>> =
                rows.axis_chunks_iter(Axis(1), self.tile).map(|tile| tile.to_owned()).collect();
            change(&mut tiles);
            for (mut place, tile) in rows.axis_chunks_iter_mut(Axis(1), self.tile).zip(&tiles) {
                place.assign(tile);
            }
        });
    }

    /// Y of Y L = Z, whose columns are those of the first tiles, in place.
    fn divide(&self, z: &mut [Array2<T>]) {
        // Lᵀ Yᵀ = Zᵀ, from the last one back. The last tile may be cut short.
        for j in (0..z.len()).rev() {
            let (head, done) = z.split_at_mut(j + 1);
            let own = &mut head[j];
            for (left, row) in done.iter().zip(&self.rows[j + 1..]) {
                subtract_product(left.view(), row[j].slice(s![..left.ncols(), ..]), own.view_mut());
            }
            let diagonal = self.rows[j][j].slice(s![..own.ncols(), ..own.ncols()]);
            solve_lower_transposed(diagonal, own.view_mut().reversed_axes());
        }
    }

    /// A L: [n, d] × [d, d].
    ///
    /// # Panics
    /// If A has another number of columns.
    pub fn product(&self, a: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(a.ncols(), self.size);
        let mut out = Array2::zeros(a.dim());
        let strips: Vec<ArrayViewMut2<'_, T>> = out.axis_chunks_iter_mut(Axis(1), self.tile).collect();
        strips.into_par_iter().enumerate().for_each(|(j, mut place)| {
            let mut sum = Array2::zeros(place.dim());
            for (i, row) in self.rows.iter().enumerate().skip(j) {
                let left = a.slice(s![.., i * self.tile..i * self.tile + row[j].nrows()]);
                Faer.gemm(left, row[j].view(), sum.view_mut(), Accumulate::Add);
            }
            place.assign(&sum);
        });
        out
    }
}

/// A B in strips of columns: [n, d] × [d, k].
///
/// # Panics
/// If the sizes do not fit.
pub fn product_in_strips<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    in_strips((a.nrows(), b.ncols()), |columns| (a.view(), b.slice(s![.., columns]).to_owned()))
}

/// A C[:, S] / scale [n, k] in strips of columns, of A [n, d] and a symmetric C [d, d], both triangles.
///
/// # Panics
/// If the sizes do not fit.
pub fn product_with_symmetric<T: Real>(
    a: ArrayView2<'_, T>,
    c: ArrayView2<'_, f64>,
    columns: &[usize],
    scale: f64,
) -> Array2<T> {
    in_strips((a.nrows(), columns.len()), |strip| {
        let columns = &columns[strip];
        // Its rows are its columns, and lie together.
        let of = |(i, j): (usize, usize)| T::of_f64(c[[columns[i], j]] / scale);
        let rows = Array2::from_shape_fn((columns.len(), c.ncols()), of);
        (a.view(), rows.reversed_axes())
    })
}

/// A product [n, k] whose strips of columns are computed in parallel, each from its two factors.
fn in_strips<'a, T: Real>(
    dim: (usize, usize),
    factors: impl Fn(Range<usize>) -> (ArrayView2<'a, T>, Array2<T>) + Sync,
) -> Array2<T> {
    let mut out = Array2::zeros(dim);
    let strips: Vec<ArrayViewMut2<'_, T>> = out.axis_chunks_iter_mut(Axis(1), TILE).collect();
    strips.into_par_iter().enumerate().for_each(|(strip, mut place)| {
        let (left, right) = factors(strip * TILE..strip * TILE + place.ncols());
        let mut product = Array2::zeros(place.dim());
        Faer.gemm(left, right.view(), product.view_mut(), Accumulate::Replace);
        place.assign(&product);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::{TiledCholesky, product_in_strips, product_with_symmetric};
    use crate::suite::{assert_close, product, random};
    use ndarray::Array2;

    /// Of sizes with and without a last tile that is smaller.
    const SIZES: [usize; 5] = [1, 7, 8, 9, 29];
    const TILE: usize = 8;

    fn matrix(size: usize) -> Array2<f64> {
        let b = random(size + 3, size, 7);
        product(b.t(), b.view()) + 4.0 * Array2::<f64>::eye(size)
    }

    fn factor_of(matrix: &Array2<f64>) -> Option<TiledCholesky<f64>> {
        TiledCholesky::in_tiles(TILE, matrix.nrows(), |i, j| {
            assert!(j <= i, "the upper triangle is not read");
            matrix[[i, j]]
        })
    }

    #[test]
    fn the_factor_rebuilds_the_matrix_and_its_inverse() {
        for size in SIZES {
            let matrix = matrix(size);
            let factor = factor_of(&matrix).unwrap();
            let lower = factor.product(Array2::eye(size).view());
            assert!(lower.indexed_iter().all(|((i, j), &value)| j <= i || value == 0.0));
            assert_close(&product(lower.view(), lower.t()), &matrix, 16 * size);
            let mut inverse = Array2::eye(size);
            factor.solve_rows(inverse.view_mut());
            assert_close(&product(inverse.view(), matrix.view()), &Array2::eye(size), 16 * size);
            for (found, expected) in factor.inverse_diagonal().into_iter().zip(inverse.diag()) {
                assert!((found - expected).abs() < 1e-12 * expected.abs(), "{size}: {found} {expected}");
            }
            let a = random(5, size, 3);
            assert_close(&factor.product(a.view()), &product(a.view(), lower.view()), 16 * size);
            let mut solved = product(a.view(), matrix.view());
            factor.solve_rows(solved.view_mut());
            assert_close(&solved, &a, 64 * size);
            for k in [1, size / 2, size] {
                let leading = lower.slice(ndarray::s![..k, ..k]);
                let a = random(5, k, 9);
                let mut divided = product(a.view(), leading);
                factor.divide_by_leading(divided.view_mut());
                assert_close(&divided, &a, 64 * size);
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        for at in [0, 3, TILE, TILE + 4] {
            let mut matrix = matrix(TILE + 5);
            matrix[[at, at]] = -1.0;
            assert!(factor_of(&matrix).is_none(), "{at}");
        }
    }

    #[test]
    fn products_in_strips_are_those_of_plain_loops() {
        let (a, b) = (random(6, 5, 1), random(5, 2 * super::TILE + 3, 2));
        assert_close(&product_in_strips(a.view(), b.view()), &product(a.view(), b.view()), 8);
        let c = matrix(5);
        let found = product_with_symmetric(a.view(), c.view(), &[4, 0, 2], 1.0);
        assert_close(&found, &product(a.view(), c.select(ndarray::Axis(1), &[4, 0, 2]).view()), 8);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let matrix = matrix(3 * TILE - 5);
        let a = random(TILE + 3, 3 * TILE - 5, 5);
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let factor = factor_of(&matrix).unwrap();
                let mut solved = a.clone();
                factor.solve_rows(solved.view_mut());
                (factor.inverse_diagonal(), factor.product(a.view()), solved)
            })
        };
        assert!(of(1) == of(3));
    }
}
