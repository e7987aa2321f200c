//! Small dense helpers: products, sums, and norms by power iteration (which approach from below).

use lowrank_compute::{Accumulate, Kernels, Real};
use ndarray::{Array2, ArrayView2};

/// Steps: enough for a hundredth where one eigenvalue leads, and for a factor of two where none does.
const POWER_ITERATIONS_OF_NORM: usize = 8;

/// A B.
pub(crate) fn product<T: Real>(
    kernels: &dyn Kernels<T>,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
) -> Array2<T> {
    let mut out = Array2::zeros((a.nrows(), b.ncols()));
    kernels.gemm(a, b, out.view_mut(), Accumulate::Replace);
    out
}

/// The sum of all squares.
pub(crate) fn energy_of<T: Real>(matrix: &Array2<T>) -> f64 {
    matrix.iter().map(|value| value.as_f64() * value.as_f64()).sum::<f64>()
}

/// ‖G‖₂ of a positive semidefinite matrix.
pub(crate) fn norm_of_symmetric<T: Real>(kernels: &dyn Kernels<T>, gram: &Array2<T>) -> f64 {
    power_iteration(&gram.diag().to_vec(), |column| product(kernels, gram.view(), column))
}

/// ‖M‖₂², from M Mᵀ.
pub(crate) fn norm_squared<T: Real>(kernels: &dyn Kernels<T>, m: ArrayView2<'_, T>) -> f64 {
    let diagonal: Vec<T> = m.rows().into_iter().map(|row| row.dot(&row)).collect();
    power_iteration(&diagonal, |column| {
        let image = product(kernels, m.t(), column);
        product(kernels, m, image.view())
    })
}

/// The norm of a positive semidefinite matrix that is known by its diagonal and its products with a column [n, 1].
fn power_iteration<T: Real>(diagonal: &[T], times: impl Fn(ArrayView2<'_, T>) -> Array2<T>) -> f64 {
    let largest = (0..diagonal.len()).fold(0, |best, i| if diagonal[i] > diagonal[best] { i } else { best });
    let mut column = Array2::zeros((diagonal.len(), 1));
    column[[largest, 0]] = T::one();
    let mut norm = diagonal[largest].as_f64();
    for _ in 0..=POWER_ITERATIONS_OF_NORM {
        column = times(column.view());
        let size = energy_of(&column).sqrt();
        norm = size.max(norm);
        if !size.is_normal() {
            break;
        }
        column.mapv_inplace(|value| T::of_f64(value.as_f64() / size));
    }
    norm
}
