//! The interpolative decomposition of u·v: r of its own columns or rows (pivots) and coefficients for the others, the same
//! matrix in r(m + n − r) numbers instead of r(m + n).
//!
//! Written for pivot columns; rows are the same with everything transposed. With b [r, d] the factor on the short side and
//! a [l, r] the other, Ŵ = a b. Find r columns J of b, and T [r, d − r] with b_rest = b_J T. Then Ŵ_rest = Ŵ_J T: Ŵ_J and T
//! are stored.
//!
//! 1. bᵀ = Q S, Q [d, r] orthonormal. T depends on the row space alone, so Qᵀ takes the place of b: its condition number
//!    is 1 whatever b's is, and it has full rank even where b has not. No matrix is too ill-conditioned for this.
//! 2. Qᵀ Π = Q₂ [R₁ R₂] with column pivoting (Businger and Golub, 1965): J is where Π begins, T = R₁⁻¹ R₂.
//!    Where r > d/2, the same on N [d, d − r], orthonormal and orthogonal to Q, which is smaller: Nᵀ Π = Q₂ [R₁ R₂] puts the
//!    columns that are *not* pivots first, and b N = 0 makes T = −(R₁⁻¹ R₂)ᵀ. |det N_rest| = |det Q_J|, so pivots are as good.
//! 3. While an entry of T exceeds [`COEFFICIENT_MAX`], its column and its pivot change places. Each exchange multiplies the
//!    volume |det Q_J| ≤ 1 by that entry, so it ends (Gu and Eisenstat, 1996; Goreinov et al., 2010).
//!
//! With |T| bounded, rounding both parts to the stored dtype stays harmless; [`Interpolative::round_trip_error`] measures it.

use crate::error::SvdError;
use crate::factors::Factors;
use crate::linalg::product;
use lowrank_compute::{Backend, Kernels, PivotedQr, solve_upper};
use lowrank_model::{MatrixShape, PivotOrder, PivotSide, Storage, Tensor, pivots::factor_shapes};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use std::fmt;

/// No coefficient is larger.
pub const COEFFICIENT_MAX: f64 = 1.5;
/// Exchanges per index of the short side that are tried at most: far more than any matrix has needed.
const EXCHANGES_PER_INDEX: usize = 8;
/// Rows that are multiplied at once. A constant, for the order of summation.
const BLOCK_ROWS: usize = 1024;

/// Ŵ as an interpolative decomposition, before rounding to the stored dtype. Row-major, in the shapes of
/// [`lowrank_model::pivots::factor_shapes`].
#[derive(Clone, PartialEq)]
pub struct Interpolative {
    /// [m, n] of W.
    pub shape: MatrixShape,
    /// Which columns or rows are pivots.
    pub order: PivotOrder,
    /// Ŵ's columns [m, r] or rows [r, n] at the pivots.
    pub basis: Vec<f32>,
    /// T: [r, n − r], or [m − r, r].
    pub coefficients: Vec<f32>,
    /// max |T|
    pub largest_coefficient: f64,
    /// Exchanges after the pivoted QR.
    pub exchanges: usize,
}

impl fmt::Debug for Interpolative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interpolative {} at rank {}", self.shape, self.order.rank())
    }
}

/// The factors with the pivots on the side of b.
struct Oriented<'a> {
    side: PivotSide,
    /// a [l, r]: u, or vᵀ.
    far: ArrayView2<'a, f32>,
    /// bᵀ [d, r]: vᵀ, or u.
    near: ArrayView2<'a, f32>,
}

impl<'a> Oriented<'a> {
    fn new(factors: &'a Factors) -> Self {
        let Factors { shape, rank, u, v } = factors;
        let u = ArrayView2::from_shape((shape.rows, *rank), u).expect("u has its shape");
        let v = ArrayView2::from_shape((*rank, shape.cols), v).expect("v has its shape").reversed_axes();
        let side = PivotSide::of(*shape);
        match side {
            PivotSide::Inputs => Self { side, far: u, near: v },
            PivotSide::Outputs => Self { side, far: v, near: u },
        }
    }

    /// b at some of its columns, [r, count], in f64.
    fn columns(&self, indices: impl Iterator<Item = usize>) -> Array2<f64> {
        let indices: Vec<usize> = indices.collect();
        self.near.select(Axis(0), &indices).mapv(f64::from).reversed_axes()
    }

    /// A factor [l, r] or T as it is stored, from the view of columns.
    fn view<'b>(&self, stored: &'b [f32], [rows, cols]: [usize; 2]) -> ArrayView2<'b, f32> {
        let stored = ArrayView2::from_shape((rows, cols), stored).expect("a factor has its shape");
        match self.side {
            PivotSide::Inputs => stored,
            PivotSide::Outputs => stored.reversed_axes(),
        }
    }

    fn view_mut<'b>(&self, stored: &'b mut [f32], [rows, cols]: [usize; 2]) -> ArrayViewMut2<'b, f32> {
        let stored = ArrayViewMut2::from_shape((rows, cols), stored).expect("a factor has its shape");
        match self.side {
            PivotSide::Inputs => stored,
            PivotSide::Outputs => stored.reversed_axes(),
        }
    }
}

/// Decomposes u·v. Changes nothing but rounding.
///
/// # Errors
/// The rank is 0 or leaves nothing to interpolate, or the decomposition fails.
pub fn interpolative(backend: &dyn Backend, factors: &Factors) -> Result<Interpolative, SvdError> {
    let (shape, rank) = (factors.shape, factors.rank);
    let rank_max = Storage::Pivoted.rank_max(shape);
    if rank == 0 || rank > rank_max {
        return Err(SvdError::Rank { rank, rank_max, shape });
    }
    let kernels: &dyn Kernels<f64> = backend;
    let oriented = Oriented::new(factors);
    let Interpolation { order, coefficients, exchanges } =
        interpolate(kernels, oriented.near.mapv(f64::from))?;
    let largest_coefficient = coefficients.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));

    let [basis_shape, coefficients_shape] = factor_shapes(shape, rank);
    let mut basis = vec![0.0_f32; basis_shape[0] * basis_shape[1]];
    let mut out = oriented.view_mut(&mut basis, basis_shape); // [l, r]
    let at_pivots = oriented.columns(order.pivots());
    for_each_product(kernels, oriented.far, at_pivots.view(), |first, block| {
        let mut rows = out.slice_mut(s![first..first + block.nrows(), ..]);
        rows.zip_mut_with(&block, |narrow, &value| *narrow = value as f32);
    });
    let mut stored = vec![0.0_f32; coefficients.len()];
    oriented
        .view_mut(&mut stored, coefficients_shape)
        .zip_mut_with(&coefficients, |narrow, &value| *narrow = value as f32);
    Ok(Interpolative { shape, order, basis, coefficients: stored, largest_coefficient, exchanges })
}

/// u·v of an interpolative decomposition, its zeros and ones written out.
pub fn expanded(shape: MatrixShape, order: &PivotOrder, basis: &[f32], coefficients: &[f32]) -> Factors {
    let rank = order.rank();
    let [_, table] = factor_shapes(shape, rank);
    let table = ArrayView2::from_shape((table[0], table[1]), coefficients).expect("T has its shape");
    let spread = |table: ArrayView2<'_, f32>| {
        let mut full = Array2::<f32>::zeros((rank, shape.short_side()));
        order.pivots().enumerate().for_each(|(row, pivot)| full[[row, pivot]] = 1.0);
        order
            .others()
            .zip(table.columns())
            .for_each(|(place, column)| full.column_mut(place).assign(&column));
        full
    };
    let (u, v) = match PivotSide::of(shape) {
        PivotSide::Inputs => (basis.to_vec(), spread(table).into_raw_vec_and_offset().0),
        PivotSide::Outputs => (spread(table.t()).t().iter().copied().collect(), basis.to_vec()),
    };
    Factors { shape, rank, u, v }
}

impl Interpolative {
    /// ‖Ŵ_stored − u·v‖ / ‖u·v‖ of basis and coefficients as they were rounded for storage, products and sums in f64;
    /// 0 for a zero matrix.
    pub fn round_trip_error(
        &self,
        backend: &dyn Backend,
        factors: &Factors,
        basis: &Tensor,
        coefficients: &Tensor,
    ) -> f64 {
        let kernels: &dyn Kernels<f64> = backend;
        let oriented = Oriented::new(factors);
        let [basis_shape, coefficients_shape] = factor_shapes(self.shape, self.order.rank());
        let square = |value: f64| value * value;
        // At the pivots both are at hand.
        let rounded = basis.to_f32();
        let mut lost: f64 = self.basis.iter().zip(&rounded).map(|(a, b)| square(f64::from(a - b))).sum();
        let mut energy: f64 = self.basis.iter().map(|&a| square(f64::from(a))).sum();
        // Elsewhere both are multiplied out.
        let rounded = oriented.view(&rounded, basis_shape); // [l, r]
        let table = coefficients.to_f32();
        let table = oriented.view(&table, coefficients_shape).mapv(f64::from); // [r, d − r]
        let elsewhere = oriented.columns(self.order.others());
        for_each_product(kernels, oriented.far, elsewhere.view(), |first, exact| {
            let rows = rounded.slice(s![first..first + exact.nrows(), ..]).mapv(f64::from);
            for (&exact, &stored) in exact.iter().zip(&product(kernels, rows.view(), table.view())) {
                lost += square(exact - stored);
                energy += square(exact);
            }
        });
        if energy == 0.0 { 0.0 } else { (lost / energy).sqrt() }
    }
}

/// Calls `each(first, block)` for the blocks of rows of a·b.
fn for_each_product(
    kernels: &dyn Kernels<f64>,
    a: ArrayView2<'_, f32>, // [l, r]
    b: ArrayView2<'_, f64>, // [r, count]
    mut each: impl FnMut(usize, ArrayView2<'_, f64>),
) {
    for first in (0..a.nrows()).step_by(BLOCK_ROWS) {
        let rows = a.slice(s![first..a.nrows().min(first + BLOCK_ROWS), ..]).mapv(f64::from);
        each(first, product(kernels, rows.view(), b).view());
    }
}

/// b_rest = b_J T.
struct Interpolation {
    order: PivotOrder,
    /// T [r, d − r], rows and columns in the order of `order`.
    coefficients: Array2<f64>,
    exchanges: usize,
}

/// Finds pivots and coefficients for b, given bᵀ [d, r].
fn interpolate(kernels: &dyn Kernels<f64>, near: Array2<f64>) -> Result<Interpolation, SvdError> {
    let (len, rank) = near.dim();
    // The shorter of the two spaces is found.
    let by_complement = 2 * rank > len;
    let space = if by_complement { kernels.complement(near)? } else { kernels.thin_qr(near)? };
    let found = space.ncols();
    let PivotedQr { r, permutation } = kernels.qr_pivoted(space.reversed_axes())?;
    let (mut pivots, mut others) = (permutation[..found].to_vec(), permutation[found..].to_vec());
    let mut t = r.slice(s![.., found..]).as_standard_layout().into_owned();
    solve_upper(r.slice(s![.., ..found]), &mut t);
    drop(r);
    if by_complement {
        std::mem::swap(&mut pivots, &mut others);
        t = t.t().mapv(|value| -value).as_standard_layout().into_owned();
    }

    let mut exchanges = 0;
    while exchanges < EXCHANGES_PER_INDEX * len {
        let (i, j) = largest(&t);
        if t[[i, j]].abs() <= COEFFICIENT_MAX {
            break;
        }
        exchange(&mut t, i, j);
        std::mem::swap(&mut pivots[i], &mut others[j]);
        exchanges += 1;
    }

    let order = PivotOrder::of_pivots(&pivots, len);
    let rising = |indices: &[usize]| {
        let mut places: Vec<usize> = (0..indices.len()).collect();
        places.sort_unstable_by_key(|&place| indices[place]);
        places
    };
    let coefficients = t.select(Axis(0), &rising(&pivots)).select(Axis(1), &rising(&others));
    Ok(Interpolation { order, coefficients, exchanges })
}

/// Place of the largest entry in size; the first of equals.
fn largest(t: &Array2<f64>) -> (usize, usize) {
    let mut found = ((0, 0), 0.0);
    for (i, row) in t.rows().into_iter().enumerate() {
        // Without branches inside, so that a row is scanned at memory speed.
        let size = row.iter().fold(0.0_f64, |size, value| size.max(value.abs()));
        if size > found.1 {
            let j = row.iter().position(|value| value.abs() == size).unwrap_or(0);
            found = ((i, j), size);
        }
    }
    found.0
}

/// T after pivot i and column j have changed places.
fn exchange(t: &mut Array2<f64>, i: usize, j: usize) {
    let (entry, column) = (t[[i, j]], t.column(j).to_owned());
    let mut row = t.row(i).mapv(|value| value / entry);
    row[j] = entry.recip();
    t.column_mut(j).fill(0.0);
    for (k, mut target) in t.rows_mut().into_iter().enumerate() {
        if k == i {
            target.assign(&row);
        } else {
            target.scaled_add(-column[k], &row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::randomized::generator;
    use lowrank_compute::Faer;
    use lowrank_model::Dtype;
    use rand_chacha::rand_core::RngCore;
    use rayon::prelude::*;

    /// Factors with uniform entries; component k is `decay`^k as large.
    fn factors(rows: usize, cols: usize, rank: usize, decay: f64, seed: u64) -> Factors {
        let mut rng = generator(seed, 1);
        let mut uniform = || f64::from(rng.next_u32()) / 2.0_f64.powi(31) - 1.0;
        let u = (0..rows * rank).map(|e| (uniform() * decay.powi((e % rank) as i32)) as f32).collect();
        let v = (0..rank * cols).map(|e| (uniform() * decay.powi((e / cols) as i32)) as f32).collect();
        Factors { shape: MatrixShape { rows, cols }, rank, u, v }
    }

    /// u·v by plain sums.
    fn full(factors: &Factors) -> Array2<f64> {
        let Factors { shape, rank, u, v } = factors;
        Array2::from_shape_fn((shape.rows, shape.cols), |(i, j)| {
            (0..*rank).map(|k| f64::from(u[i * rank + k]) * f64::from(v[k * shape.cols + j])).sum()
        })
    }

    /// The stored form multiplied out by plain sums, from its definition.
    fn multiplied_out(p: &Interpolative, basis: &[f32], coefficients: &[f32]) -> Array2<f64> {
        let MatrixShape { rows, cols } = p.shape;
        let (pivots, others): (Vec<_>, Vec<_>) = (p.order.pivots().collect(), p.order.others().collect());
        let (r, rest) = (pivots.len(), others.len());
        let place = |of: &[usize], index| of.iter().position(|&other| other == index);
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            if rows < cols {
                let row = |k: usize| f64::from(basis[k * cols + j]);
                match place(&pivots, i) {
                    Some(k) => row(k),
                    None => {
                        let i = place(&others, i).unwrap();
                        (0..r).map(|k| f64::from(coefficients[i * r + k]) * row(k)).sum()
                    }
                }
            } else {
                let column = |k: usize| f64::from(basis[i * r + k]);
                match place(&pivots, j) {
                    Some(k) => column(k),
                    None => {
                        let j = place(&others, j).unwrap();
                        (0..r).map(|k| column(k) * f64::from(coefficients[k * rest + j])).sum()
                    }
                }
            }
        })
    }

    fn distance(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
        let square = |x: &Array2<f64>| x.iter().map(|value| value * value).sum::<f64>();
        let energy = square(b);
        if energy == 0.0 { square(a).sqrt() } else { (square(&(a - b)) / energy).sqrt() }
    }

    const SHAPES: [(usize, usize); 7] =
        [(60, 24), (24, 60), (30, 30), (2, 9), (9, 2), (1100, 40), (40, 1100)];

    #[test]
    fn the_interpolation_is_exact_in_f64() {
        for (rows, cols) in SHAPES {
            let short = rows.min(cols);
            for rank in [1, short.div_ceil(2).min(short - 1), short - 1] {
                for decay in [1.0, 0.7] {
                    let factors = factors(rows, cols, rank, decay, 11);
                    let oriented = Oriented::new(&factors);
                    let found = interpolate(&Faer, oriented.near.mapv(f64::from)).unwrap();
                    let at_pivots = oriented.columns(found.order.pivots());
                    let others = oriented.columns(found.order.others());
                    let error = distance(&at_pivots.dot(&found.coefficients), &others);
                    assert!(error < 1e-11, "{rows}x{cols} rank {rank} decay {decay}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn pivoting_changes_nothing_but_the_rounding_of_f32() {
        for (rows, cols) in SHAPES {
            let short = rows.min(cols);
            for rank in [1, short.div_ceil(2).min(short - 1), short - 1] {
                let factors = factors(rows, cols, rank, 0.9, 12);
                let found = interpolative(&Faer, &factors).unwrap();
                let rebuilt = multiplied_out(&found, &found.basis, &found.coefficients);
                let error = distance(&rebuilt, &full(&factors));
                assert!(error < 1e-6, "{rows}x{cols} rank {rank}: {error:e}");
                assert!(found.largest_coefficient <= COEFFICIENT_MAX);
            }
        }
    }

    #[test]
    fn factors_of_less_than_their_rank_are_stored_as_well_as_others() {
        for (rows, cols) in [(50, 20), (20, 50)] {
            for true_rank in [0, 1, 5] {
                // Components beyond the true rank vanish, or repeat the first.
                for repeat in [false, true] {
                    let mut factors = factors(rows, cols, 12, 1.0, 13);
                    for k in true_rank..12 {
                        for j in 0..cols {
                            let first = if repeat { factors.v[j] } else { 0.0 };
                            factors.v[k * cols + j] = first;
                        }
                        for i in 0..rows {
                            let first = if repeat { factors.u[i * 12] } else { 0.0 };
                            factors.u[i * 12 + k] = first;
                        }
                    }
                    let found = interpolative(&Faer, &factors).unwrap();
                    let rebuilt = multiplied_out(&found, &found.basis, &found.coefficients);
                    let error = distance(&rebuilt, &full(&factors));
                    assert!(error < 1e-6, "{rows}x{cols} true rank {true_rank}: {error:e}");
                    assert!(found.largest_coefficient <= COEFFICIENT_MAX);
                }
            }
        }
    }

    #[test]
    fn large_coefficients_are_exchanged_away() {
        // Kahan's matrix, on which column pivoting alone leaves coefficients that grow like 2^r; the last column is what
        // they make.
        let (size, cosine) = (24, 0.6_f64);
        let sine = (1.0 - cosine * cosine).sqrt();
        let kahan = Array2::from_shape_fn((size, size), |(i, j)| {
            // Slightly rising columns keep the pivoting from reordering them.
            let entry = if i == j {
                1.0
            } else if j > i {
                -cosine
            } else {
                0.0
            };
            sine.powi(i as i32) * entry * (1.0 + 1e-7 * (size - j) as f64)
        });
        let rank = size - 1;
        let PivotedQr { r, .. } = {
            let kernels: &dyn Kernels<f64> = &Faer;
            kernels.qr_pivoted(kahan.slice(s![..rank, ..]).to_owned()).unwrap()
        };
        let mut alone = r.slice(s![.., rank..]).to_owned();
        solve_upper(r.slice(s![.., ..rank]), &mut alone);
        let found = interpolate(&Faer, kahan.slice(s![..rank, ..]).t().to_owned()).unwrap();
        let (i, j) = largest(&alone);
        assert!(alone[[i, j]].abs() > COEFFICIENT_MAX, "{}", alone[[i, j]]);
        assert!(found.coefficients.iter().all(|value| value.abs() <= COEFFICIENT_MAX));
    }

    #[test]
    fn the_round_trip_error_is_that_of_the_stored_numbers() {
        for (rows, cols) in [(60, 24), (24, 60)] {
            let factors = factors(rows, cols, 13, 0.9, 14);
            let found = interpolative(&Faer, &factors).unwrap();
            let [b, t] = factor_shapes(factors.shape, 13);
            for (dtype, least, most) in
                [(Dtype::F32, 0.0, 1e-6), (Dtype::F16, 1e-5, 1e-3), (Dtype::Bf16, 1e-4, 1e-2)]
            {
                let basis = Tensor::from_f32(b.to_vec(), dtype, &found.basis).unwrap();
                let coefficients = Tensor::from_f32(t.to_vec(), dtype, &found.coefficients).unwrap();
                let stored = multiplied_out(&found, &basis.to_f32(), &coefficients.to_f32());
                let expected = distance(&stored, &full(&factors));
                let measured = found.round_trip_error(&Faer, &factors, &basis, &coefficients);
                assert!((least..most).contains(&measured), "{dtype}: {measured:e}");
                assert!((measured - expected).abs() <= 1e-7 + 1e-4 * expected, "{measured:e} {expected:e}");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_workers() {
        let all: Vec<Factors> = (0..6).map(|seed| factors(150, 70, 40, 0.97, seed)).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| all.par_iter().map(|f| interpolative(&Faer, f).unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn ranks_that_leave_nothing_to_interpolate_are_refused() {
        let shape = MatrixShape { rows: 9, cols: 6 };
        let error = interpolative(&Faer, &factors(9, 6, 6, 1.0, 1)).unwrap_err();
        assert_eq!(error, SvdError::Rank { rank: 6, rank_max: 5, shape });
    }
}
