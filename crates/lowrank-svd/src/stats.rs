//! One pass over the stored weights before any algebra: is this a matrix, is it finite, how large is it.

use crate::error::SvdError;
use lowrank_compute::Backend;
use lowrank_model::{MatrixShape, Tensor};

/// One weight matrix and what computes on it: what every step needs.
pub(crate) struct Problem<'a> {
    pub(crate) backend: &'a dyn Backend,
    /// W [m, n]
    pub(crate) w: &'a Tensor,
    pub(crate) stats: WeightStats,
}

/// What the pass found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightStats {
    pub(crate) shape: MatrixShape,
    /// ‖W‖²_F, every square exact in f64.
    pub(crate) energy: f64,
    /// max |w|
    pub(crate) largest_weight: f64,
}

/// Refuses what is no matrix and what is not finite.
pub(crate) fn weight_stats(w: &Tensor) -> Result<WeightStats, SvdError> {
    let &[rows, cols] = w.shape() else { return Err(SvdError::NotAMatrix { shape: w.shape().to_vec() }) };
    if rows == 0 || cols == 0 {
        return Err(SvdError::NotAMatrix { shape: w.shape().to_vec() });
    }
    let mut row_values = vec![0.0_f32; cols];
    let (mut energy, mut largest_weight) = (0.0_f64, 0.0_f32);
    for row in 0..rows {
        w.widen(row * cols, &mut row_values);
        // Eight sums, so that the additions overlap; summed per row, so that rounding does not grow with m·n.
        let mut sums = [0.0_f64; 8];
        for run in row_values.chunks(sums.len()) {
            for (sum, &value) in sums.iter_mut().zip(run) {
                *sum += f64::from(value) * f64::from(value);
                largest_weight = largest_weight.max(value.abs());
            }
        }
        let row_energy: f64 = sums.iter().sum();
        if !row_energy.is_finite() {
            let (col, &value) = row_values
                .iter()
                .enumerate()
                .find(|(_, value)| !value.is_finite())
                .expect("squares of finite f32 values do not overflow f64");
            return Err(SvdError::NotFinite { row, col, value });
        }
        energy += row_energy;
    }
    Ok(WeightStats { shape: MatrixShape { rows, cols }, energy, largest_weight: f64::from(largest_weight) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn the_first_weight_that_is_not_finite_is_named() {
        let mut values = vec![0.5_f32; 6 * 11];
        let clean = weight_stats(&Tensor::from_f32(vec![6, 11], Dtype::Bf16, &values).unwrap()).unwrap();
        assert_eq!((clean.energy, clean.largest_weight), (16.5, 0.5));
        values[3 * 11 + 9] = f32::NEG_INFINITY;
        values[4 * 11] = f32::NAN;
        let error = weight_stats(&Tensor::from_f32(vec![6, 11], Dtype::Bf16, &values).unwrap()).unwrap_err();
        assert_eq!(error, SvdError::NotFinite { row: 3, col: 9, value: f32::NEG_INFINITY });
    }

    #[test]
    fn what_is_no_matrix_is_refused() {
        for shape in [vec![4], vec![2, 2, 1], vec![0, 4]] {
            let count = shape.iter().product();
            let tensor = Tensor::from_f32(shape.clone(), Dtype::F32, &vec![0.0; count]).unwrap();
            assert_eq!(weight_stats(&tensor).unwrap_err(), SvdError::NotAMatrix { shape });
        }
    }
}
