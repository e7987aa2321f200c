//! One suite, every backend, in both precisions. References are plain loops in f64.

use crate::{Accumulate, Cholesky, Kernels, PivotedQr, Real, Side, Split, mirror_lower};
use lowrank_model::{Dtype, MatrixShape, Tensor};
use ndarray::{Array2, ArrayView2, ShapeBuilder, array, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Uniform in [-1, 1), exact in bf16.
pub(crate) fn random(rows: usize, cols: usize, seed: u64) -> Array2<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, cols), || f64::from((rng.next_u32() >> 25) as i32 - 64) / 64.0)
}

fn stored(matrix: &Array2<f64>) -> Tensor {
    let values: Vec<f32> = matrix.iter().map(|&value| value as f32).collect();
    Tensor::from_f32(vec![matrix.nrows(), matrix.ncols()], Dtype::Bf16, &values).unwrap()
}

pub(crate) fn product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
        (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum()
    })
}

fn to<T: Real>(matrix: &Array2<f64>) -> Array2<T> {
    matrix.mapv(T::of_f64)
}

#[track_caller]
pub(crate) fn assert_close<T: Real>(actual: &Array2<T>, expected: &Array2<f64>, summands: usize) {
    assert_eq!(actual.dim(), expected.dim());
    let scale = expected.iter().fold(1.0_f64, |largest, value| largest.max(value.abs()));
    let tolerance = 4.0 * T::EPSILON.as_f64() * (summands as f64).sqrt() * scale;
    for (index, value) in actual.indexed_iter() {
        assert!(
            (value.as_f64() - expected[index]).abs() <= tolerance,
            "{index:?}: {value} for {}",
            expected[index]
        );
    }
}

fn products_agree_with_plain_loops<T: Real>(kernels: &dyn Kernels<T>) {
    for (m, k, n) in [(1, 1, 1), (1, 7, 3), (5, 1, 4), (33, 65, 17), (130, 70, 96)] {
        let (a, b, c) = (random(m, k, 1), random(k, n, 2), random(m, n, 3));
        let expected = product(a.view(), b.view());
        let mut out = to::<T>(&c);
        kernels.gemm(to::<T>(&a).view(), to::<T>(&b).view(), out.view_mut(), Accumulate::Replace);
        assert_close(&out, &expected, k);
        // Transposed, reversed and strided operands, and a strided output.
        let (at, b2) = (to::<T>(&a).t().to_owned(), to::<T>(&b));
        let mut wide = Array2::<T>::zeros((m, 2 * n).f());
        wide.slice_mut(s![.., ..;2]).assign(&to::<T>(&c));
        kernels.gemm(
            at.t().slice(s![.., ..;-1]),
            b2.slice(s![..;-1, ..]),
            wide.slice_mut(s![.., ..;2]),
            Accumulate::Add,
        );
        assert_close(&wide.slice(s![.., ..;2]).to_owned(), &(&expected + &c), k);
        assert!(wide.slice(s![.., 1..;2]).iter().all(|value| value.is_zero()));
    }
}

fn gram_and_products_of_a_stored_matrix_agree_with_plain_loops<T: Real>(kernels: &dyn Kernels<T>) {
    for (rows, cols) in [(1, 1), (1, 9), (9, 1), (40, 24), (24, 40), (1100, 13), (13, 1100)] {
        let w = random(rows, cols, 4);
        let tensor = stored(&w);
        for side in [Side::Rows, Side::Cols] {
            let (long, width) = side.dims(MatrixShape { rows, cols });
            if width > 100 {
                continue;
            }
            let a = if side == Side::Cols { w.view() } else { w.t() };
            let mut gram = kernels.gram(&tensor, side);
            let expected = product(a.t(), a);
            mirror_lower(&mut gram);
            assert_close(&gram, &expected, long);
            let x = random(width, 3, 5);
            assert_close(&kernels.apply(&tensor, side, to::<T>(&x).view()), &product(a, x.view()), width);
            let narrow = kernels.project(&tensor, side, to::<T>(&x).view());
            assert_close(&narrow, &product(a, x.view()), width);
            let y = random(long, 3, 6);
            let back = kernels.apply_transposed(&tensor, side, to::<T>(&y).view());
            assert_close(&back, &product(a.t(), y.view()), long);
        }
    }
}

fn eigenvectors_are_orthonormal_and_rebuild_the_matrix<T: Real>(kernels: &dyn Kernels<T>) {
    for size in [1, 2, 3, 31, 150] {
        let b = random(size + 3, size, 7);
        let gram = product(b.t(), b.view());
        // The upper triangle must not be read.
        let lower =
            Array2::from_shape_fn((size, size), |(i, j)| if i >= j { gram[[i, j]] } else { f64::NAN });
        let eigen = kernels.eigh(to::<T>(&lower), size).unwrap();
        assert!(eigen.values.is_sorted_by(|a, b| a >= b));
        let v = eigen.vectors.mapv(T::as_f64);
        assert_close(&product(v.t(), v.view()).mapv(T::of_f64), &Array2::eye(size), 16 * size);
        let scaled = Array2::from_shape_fn((size, size), |(i, j)| v[[i, j]] * eigen.values[j].as_f64());
        assert_close(&product(scaled.view(), v.t()).mapv(T::of_f64), &gram, 16 * size);

        let some = kernels.eigh(to::<T>(&lower), size.div_ceil(2)).unwrap();
        assert_eq!(some.vectors, eigen.vectors.slice(s![.., ..size.div_ceil(2)]));
        let values = Array2::from_shape_vec((1, size), kernels.eigvalsh(to::<T>(&lower)).unwrap()).unwrap();
        let expected = Array2::from_shape_fn((1, size), |(_, j)| eigen.values[j].as_f64());
        assert_close(&values, &expected, 16 * size);
    }
}

fn eigenvalues_known_in_closed_form_are_found<T: Real>(kernels: &dyn Kernels<T>) {
    // The second difference: 2 − 2 cos(kπ/(n+1)).
    let size = 60;
    let matrix = Array2::from_shape_fn((size, size), |(i, j)| match i.abs_diff(j) {
        0 => 2.0,
        1 => -1.0,
        _ => 0.0,
    });
    let values = kernels.eigvalsh(to::<T>(&matrix)).unwrap();
    for (value, k) in values.iter().zip((1..=size).rev()) {
        let expected = 2.0 - 2.0 * (std::f64::consts::PI * k as f64 / (size + 1) as f64).cos();
        assert!(
            (value.as_f64() - expected).abs() <= 64.0 * T::EPSILON.as_f64(),
            "{k}: {value} for {expected}"
        );
    }
    assert_eq!(
        kernels.eigvalsh(array![[T::zero(), T::zero()], [T::zero(), T::zero()]]).unwrap(),
        vec![T::zero(); 2]
    );
}

fn a_direct_svd_agrees_with_the_eigenvalues_of_the_gram_matrix<T: Real>(kernels: &dyn Kernels<T>) {
    for (rows, cols) in [(1, 1), (1, 5), (40, 24), (24, 40)] {
        let a = random(rows, cols, 9);
        let gram = if rows < cols { product(a.view(), a.t()) } else { product(a.t(), a.view()) };
        let expected = kernels.eigvalsh(to::<T>(&gram)).unwrap();
        let squares: Vec<T> =
            kernels.singular_values(to::<T>(&a)).unwrap().iter().map(|&value| value * value).collect();
        let row = |values: Vec<T>| Array2::from_shape_vec((1, rows.min(cols)), values).unwrap();
        assert_close(&row(squares), &row(expected).mapv(T::as_f64), 16 * (rows + cols));
    }
}

fn thin_q_is_orthonormal_and_spans_the_columns<T: Real>(kernels: &dyn Kernels<T>) {
    for (rows, cols) in [(1, 1), (7, 7), (90, 1), (200, 60)] {
        let y = random(rows, cols, 8);
        let q = kernels.thin_qr(to::<T>(&y)).unwrap().mapv(T::as_f64);
        assert_close(&product(q.t(), q.view()).mapv(T::of_f64), &Array2::eye(cols), 16 * rows);
        let rebuilt = product(q.view(), product(q.t(), y.view()).view());
        assert_close(&rebuilt.mapv(T::of_f64), &y, 16 * rows);
    }
}

fn pivoted_qr_rebuilds_the_matrix_and_its_diagonal_falls<T: Real>(kernels: &dyn Kernels<T>) {
    for (rows, cols, rank) in
        [(1, 1, 1), (1, 6, 1), (6, 1, 1), (7, 7, 7), (90, 30, 30), (30, 90, 30), (40, 60, 9), (60, 40, 9)]
    {
        let a = product(random(rows, rank, 10).view(), random(rank, cols, 11).view());
        let PivotedQr { r, permutation } = kernels.qr_pivoted(to::<T>(&a)).unwrap();
        let mut sorted = permutation.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..cols).collect::<Vec<_>>());
        let r = r.mapv(T::as_f64);
        assert_eq!(r.dim(), (rows.min(cols), cols));
        assert!(r.indexed_iter().all(|((i, j), &value)| i <= j || value == 0.0));
        let permuted = a.select(ndarray::Axis(1), &permutation);
        assert_close(
            &product(r.t(), r.view()).mapv(T::of_f64),
            &product(permuted.t(), permuted.view()),
            16 * rows,
        );
        let scale = r[[0, 0]].abs();
        let tolerance = 64.0 * T::EPSILON.as_f64() * scale;
        for j in 1..rows.min(cols) {
            assert!(r[[j, j]].abs() <= r[[j - 1, j - 1]].abs() + tolerance, "{j}");
        }
        // Where the rank ends, nothing is left.
        if rank < rows.min(cols) {
            assert!(r[[rank - 1, rank - 1]].abs() > 1e-2 * scale / (rows * cols) as f64);
            assert!(r.slice(s![rank.., ..]).iter().all(|value| value.abs() <= tolerance * 16.0));
        }
    }
    let PivotedQr { r, .. } = kernels.qr_pivoted(Array2::zeros((3, 4))).unwrap();
    assert!(r.iter().all(|value| value.is_zero()));
}

fn the_upper_subspace_is_that_of_the_first_eigenvectors<T: Real>(kernels: &dyn Kernels<T>) {
    for (size, k) in [(2, 1), (31, 30), (60, 7), (150, 90)] {
        let b = random(size + 3, size, 7);
        let gram = product(b.t(), b.view());
        // The upper triangle must not be read.
        let lower =
            Array2::from_shape_fn((size, size), |(i, j)| if i >= j { gram[[i, j]] } else { f64::NAN });
        let reference: &dyn Kernels<f64> = &crate::Faer;
        let eigen = reference.eigh(lower.clone(), k).unwrap();
        let split = Split::after(k, &eigen.values).unwrap();
        let omega = random(size, k, 12);
        let found = kernels.upper_subspace(to::<T>(&lower), &split, to::<T>(&omega)).unwrap().unwrap();
        let q = found.mapv(T::as_f64);
        assert_close(&product(q.t(), q.view()).mapv(T::of_f64), &Array2::eye(k), 16 * size);
        // What lies outside of the span: rounding over the gap, where eigenvectors are no better.
        let inside = product(eigen.vectors.view(), product(eigen.vectors.t(), q.view()).view());
        let outside = (&q - &inside).iter().fold(0.0_f64, |worst, value| worst.max(value.abs()));
        let rounding = 8.0 * T::EPSILON.as_f64() * size as f64 * split.radius / split.gap;
        assert!(outside <= rounding, "{size}, {k}: {outside:e} for {rounding:e}");

        // A threshold between other eigenvalues than it says, and a gap that rounding closes.
        let wrong = Split { above: k, ..Split::after(1.max(k - 1), &eigen.values).unwrap() };
        if k > 1 {
            let found = kernels.upper_subspace(to::<T>(&lower), &wrong, to::<T>(&omega)).unwrap();
            assert_eq!(found, None);
        }
        let closed = Split { gap: T::EPSILON.as_f64() * split.radius, ..split };
        assert_eq!(kernels.upper_subspace(to::<T>(&lower), &closed, to::<T>(&omega)).unwrap(), None);
    }
}

fn cholesky_rebuilds_the_matrix<T: Real>(kernels: &dyn Kernels<T>) {
    for size in [1, 2, 31, 150] {
        let b = random(size + 3, size, 7);
        let gram = product(b.t(), b.view()) + 4.0 * Array2::<f64>::eye(size);
        // The upper triangle must not be read.
        let below = |matrix: &Array2<f64>, above| {
            Array2::from_shape_fn((size, size), |(i, j)| if i >= j { matrix[[i, j]] } else { above })
        };
        let given = to::<T>(&below(&gram, f64::NAN));
        let Cholesky { lower, inverse } = kernels.cholesky(given.view()).unwrap();
        let (lower, inverse) = (lower.mapv(T::as_f64), inverse.mapv(T::as_f64));
        assert_eq!((&lower, &inverse), (&below(&lower, 0.0), &below(&inverse, 0.0)));
        assert_close(&to::<T>(&product(lower.view(), lower.t())), &gram, 16 * size);
        assert_close(&to::<T>(&product(inverse.view(), lower.view())), &Array2::eye(size), 16 * size);
    }
    for indefinite in [array![[0.0]], array![[1.0, 2.0], [2.0, 1.0]], array![[-1.0, 0.0], [0.0, 1.0]]] {
        assert_eq!(kernels.cholesky(to::<T>(&indefinite).view()), None);
    }
}

/// Not of a device, which has no such kernel.
#[test]
fn cholesky_rebuilds_the_matrix_on_the_cpu() {
    cholesky_rebuilds_the_matrix::<f32>(&crate::Faer);
    cholesky_rebuilds_the_matrix::<f64>(&crate::Faer);
    #[cfg(feature = "lapack")]
    cholesky_rebuilds_the_matrix::<f32>(&crate::Lapack);
    #[cfg(feature = "lapack")]
    cholesky_rebuilds_the_matrix::<f64>(&crate::Lapack);
}

macro_rules! suite {
    ($run:meta, $backend:expr; $($case:ident),* $(,)?) => {
        $(
            #[test]
            #[$run]
            fn $case() {
                let backend = $backend;
                super::$case::<f32>(&backend);
                super::$case::<f64>(&backend);
                check(&backend);
            }
        )*
    };
}

macro_rules! suites {
    ($($(#[$gate:meta])? $module:ident, $run:meta: $backend:expr, $check:item)*) => {
        $(
            $(#[$gate])?
            mod $module {
                $check
                suite!($run, $backend;
                    products_agree_with_plain_loops,
                    gram_and_products_of_a_stored_matrix_agree_with_plain_loops,
                    eigenvectors_are_orthonormal_and_rebuild_the_matrix,
                    eigenvalues_known_in_closed_form_are_found,
                    a_direct_svd_agrees_with_the_eigenvalues_of_the_gram_matrix,
                    thin_q_is_orthonormal_and_spans_the_columns,
                    pivoted_qr_rebuilds_the_matrix_and_its_diagonal_falls,
                    the_upper_subspace_is_that_of_the_first_eigenvectors,
                );
            }
        )*
    };
}

suites! {
    on_faer, cfg(test): crate::Faer, fn check(_: &crate::Faer) {}
    #[cfg(feature = "lapack")]
    on_lapack, cfg(test): crate::Lapack, fn check(_: &crate::Lapack) {}
    #[cfg(feature = "cuda")]
    on_cuda, ignore = "needs a CUDA device: --include-ignored": crate::cuda::Cuda::new().unwrap(),
    fn check(cuda: &crate::cuda::Cuda) {
        // The CPU must not have done the device's work.
        assert_eq!(cuda.fallbacks(), crate::cuda::Fallbacks::default());
    }
}
