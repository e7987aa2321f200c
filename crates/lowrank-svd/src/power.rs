//! Norms by power iteration from the largest column: from below.

use crate::inputs::product;
use lowrank_compute::{Kernels, Real};
use ndarray::{Array2, ArrayView2};

/// Steps: enough for a hundredth where one eigenvalue leads, and for a factor of two where none does.
const POWER_ITERATIONS_OF_NORM: usize = 8;

/// ‖G‖ of a positive semidefinite matrix.
pub(crate) fn symmetric_norm<T: Real>(kernels: &dyn Kernels<T>, gram: &Array2<T>) -> f64 {
    power_iteration(&gram.diag().to_vec(), |column| product(kernels, gram.view(), column))
}

/// The norm of a positive semidefinite matrix that is known by its diagonal and its products with a column [n, 1].
fn power_iteration<T: Real>(diagonal: &[T], times: impl Fn(ArrayView2<'_, T>) -> Array2<T>) -> f64 {
    let length = |column: &Array2<T>| column.iter().map(|v| v.as_f64() * v.as_f64()).sum::<f64>().sqrt();
    let largest = (0..diagonal.len()).fold(0, |best, i| if diagonal[i] > diagonal[best] { i } else { best });
    let mut column = Array2::zeros((diagonal.len(), 1));
    column[[largest, 0]] = T::one();
    let mut norm = diagonal[largest].as_f64();
    for _ in 0..=POWER_ITERATIONS_OF_NORM {
        column = times(column.view());
        let size = length(&column);
        norm = size.max(norm);
        if !size.is_normal() {
            break;
        }
        column.mapv_inplace(|value| T::of_f64(value.as_f64() / size));
    }
    norm
}

/// ‖M‖², from M Mᵀ.
pub(crate) fn norm_squared<T: Real>(kernels: &dyn Kernels<T>, m: ArrayView2<'_, T>) -> f64 {
    let diagonal: Vec<T> = m.rows().into_iter().map(|row| row.dot(&row)).collect();
    power_iteration(&diagonal, |column| {
        let image = product(kernels, m.t(), column);
        product(kernels, m, image.view())
    })
}
