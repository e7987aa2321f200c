//! What stays of an expert's matrices when some of its channels go.

use lowrank_compute::Algebra;
use lowrank_compute::blocks::matrix_shape;
use lowrank_model::{MatrixShape, Projection, RankPlan, Tensor};
use lowrank_reader::{Checkpoint, ReadError};
use lowrank_svd::residual::relative_error;
use lowrank_svd::{Factors, SvdError};
use ndarray::Array2;
use std::collections::BTreeMap;

/// Channels that stay, rising, by layer and expert; the other experts keep all.
pub(crate) type Kept = BTreeMap<(usize, usize), Vec<usize>>;

/// Those of a plan.
pub(crate) fn kept(plan: &RankPlan) -> Kept {
    plan.experts.iter().map(|row| ((row.layer, row.expert), row.channels.iter().collect())).collect()
}

/// Those of a compressed checkpoint.
pub(crate) fn kept_of(checkpoint: &Checkpoint) -> Result<Kept, ReadError> {
    let channels = checkpoint.kept_channels()?;
    Ok(channels.into_iter().map(|(expert, channels)| (expert, channels.iter().collect())).collect())
}

/// The rows of gate and up, or the columns of down, for some channels: the stored elements as they are.
pub(crate) fn narrowed(matrix: &Tensor, projection: Projection, channels: &[usize]) -> Tensor {
    let MatrixShape { rows, cols } = matrix_shape(matrix);
    let size = matrix.dtype().size_bytes() as usize;
    let bytes = matrix.bytes();
    let (shape, kept) = match projection {
        Projection::Gate | Projection::Up => {
            let row = |&channel: &usize| &bytes[channel * cols * size..][..cols * size];
            (vec![channels.len(), cols], channels.iter().flat_map(row).copied().collect())
        }
        Projection::Down => {
            let mut kept = Vec::with_capacity(rows * channels.len() * size);
            for row in bytes.chunks_exact(cols * size) {
                channels.iter().for_each(|&channel| kept.extend_from_slice(&row[channel * size..][..size]));
            }
            (vec![rows, channels.len()], kept)
        }
    };
    Tensor::new(shape, matrix.dtype(), kept).expect("as many bytes as the shape says")
}

/// [m, n] in f64.
pub(crate) fn wide(matrix: &Tensor) -> Array2<f64> {
    let MatrixShape { rows, cols } = matrix_shape(matrix);
    let values = matrix.to_f32();
    Array2::from_shape_fn((rows, cols), |(i, j)| f64::from(values[i * cols + j]))
}

/// ‖W − Ŵ‖ / ‖W‖ over all of a matrix, where Ŵ is zero outside of the channels that stay; `stored` is what is stored of it.
pub(crate) fn error_of_narrowed(
    algebra: &Algebra,
    matrix: &Tensor,
    projection: Projection,
    channels: &[usize],
    stored: &Stored<'_>,
) -> Result<f64, SvdError> {
    let own = narrowed(matrix, projection, channels);
    let (all, kept) = (energy(matrix), energy(&own));
    if all == 0.0 {
        return Ok(0.0);
    }
    let missed = match stored {
        Stored::Dense(values) => {
            let pairs = own.to_f32().into_iter().zip(values.to_f32());
            pairs.map(|(w, is)| (f64::from(w) - f64::from(is)).powi(2)).sum()
        }
        Stored::Factors(factors) => {
            let shape = matrix_shape(&own);
            let (error, _) = algebra.run(shape, |backend| relative_error(backend, &own, factors));
            error?.powi(2) * kept
        }
    };
    Ok(((missed + (all - kept).max(0.0)) / all).sqrt())
}

/// What is stored of a narrowed matrix.
pub(crate) enum Stored<'a> {
    /// All that stays.
    Dense(&'a Tensor),
    /// As factors.
    Factors(Factors),
}

fn energy(matrix: &Tensor) -> f64 {
    matrix.to_f32().into_iter().map(|value| f64::from(value).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn rows_and_columns_of_channels_keep_their_bits() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let gate = Tensor::from_f32(vec![4, 3], Dtype::Bf16, &values).unwrap();
        let kept = narrowed(&gate, Projection::Gate, &[1, 3]);
        assert_eq!((kept.shape(), kept.to_f32()), (&[2, 3][..], vec![3.0, 4.0, 5.0, 9.0, 10.0, 11.0]));
        let down = Tensor::from_f32(vec![3, 4], Dtype::Bf16, &values).unwrap();
        let kept = narrowed(&down, Projection::Down, &[0, 2]);
        assert_eq!((kept.shape(), kept.to_f32()), (&[3, 2][..], vec![0.0, 2.0, 4.0, 6.0, 8.0, 10.0]));
    }

    #[test]
    fn what_is_dropped_counts_as_an_error() {
        let w = Tensor::from_f32(vec![3, 2], Dtype::F32, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let stored = Tensor::from_f32(vec![2, 2], Dtype::F32, &[1.0, 2.0, 5.0, 7.0]).unwrap();
        let stored = Stored::Dense(&stored);
        let error = error_of_narrowed(&Algebra::cpu(), &w, Projection::Up, &[0, 2], &stored).unwrap();
        assert!((error - ((25.0 + 1.0) / 91.0_f64).sqrt()).abs() < 1e-12, "{error}");
    }
}
