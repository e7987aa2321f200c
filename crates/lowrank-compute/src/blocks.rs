//! A stored matrix or its transpose, widened a block of rows at a time.

use crate::Real;
use lowrank_model::{MatrixShape, Tensor};
use ndarray::{ArrayView2, s};

/// Rows of A that are widened at once. A constant, because the order of summation must not depend on memory or workers:
/// 1024 rows of 4096 are 16 MiB in f32, enough for a product to run at full speed.
pub const BLOCK_ROWS: usize = 1024;

/// The side of W [m, n] whose space is worked in. With it, A [l, d] is W or Wᵀ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// A = Wᵀ, d = m: the outputs. AᵀA = W Wᵀ.
    Rows,
    /// A = W, d = n: the inputs. AᵀA = WᵀW.
    Cols,
}

impl Side {
    /// The shorter side, where the Gram matrix is smallest; the inputs when W is square.
    pub fn short(shape: MatrixShape) -> Self {
        if shape.rows < shape.cols { Self::Rows } else { Self::Cols }
    }

    /// (l, d): the shape of A.
    pub fn dims(self, shape: MatrixShape) -> (usize, usize) {
        match self {
            Self::Rows => (shape.cols, shape.rows),
            Self::Cols => (shape.rows, shape.cols),
        }
    }
}

/// [m, n] of a two-dimensional tensor.
///
/// # Panics
/// If the tensor is not a matrix: callers check foreign input.
pub fn matrix_shape(w: &Tensor) -> MatrixShape {
    let &[rows, cols] = w.shape() else { panic!("a matrix has two dimensions, not {:?}", w.shape()) };
    MatrixShape { rows, cols }
}

/// Calls `each(first, block)` for the blocks of rows of A, in order; block is [at most [`BLOCK_ROWS`], d].
pub fn for_each_block<T: Real>(w: &Tensor, side: Side, mut each: impl FnMut(usize, ArrayView2<'_, T>)) {
    let shape = matrix_shape(w);
    let (long, width) = side.dims(shape);
    let mut buffer = vec![T::zero(); BLOCK_ROWS.min(long) * width];
    for first in (0..long).step_by(BLOCK_ROWS) {
        let rows = BLOCK_ROWS.min(long - first);
        let block = &mut buffer[..rows * width];
        match side {
            Side::Cols => T::widen(w, first * shape.cols, block),
            // Columns first..first+rows of every row of W: [m, rows], the transpose of the block.
            Side::Rows => {
                for (row, run) in block.chunks_exact_mut(rows).enumerate() {
                    T::widen(w, row * shape.cols + first, run);
                }
            }
        }
        let block = match side {
            Side::Cols => ArrayView2::from_shape((rows, width), block),
            Side::Rows => ArrayView2::from_shape((width, rows), block).map(ArrayView2::reversed_axes),
        };
        each(first, block.expect("the buffer was cut to the block").slice_move(s![.., ..]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;
    use ndarray::Array2;

    #[test]
    fn blocks_of_either_side_put_together_are_the_matrix() {
        let (m, n) = (3, BLOCK_ROWS + 5);
        let values: Vec<f32> = (0..m * n).map(|i| i as f32).collect();
        let wide = Array2::from_shape_vec((m, n), values.clone()).unwrap();
        for (tensor, side, expected) in [
            (Tensor::from_f32(vec![m, n], Dtype::F32, &values), Side::Rows, wide.t()),
            (
                Tensor::from_f32(vec![n, m], Dtype::F32, &values),
                Side::Rows,
                wide.view().into_shape_with_order((n, m)).unwrap().reversed_axes(),
            ),
            (
                Tensor::from_f32(vec![n, m], Dtype::F32, &values),
                Side::Cols,
                wide.view().into_shape_with_order((n, m)).unwrap(),
            ),
        ] {
            let mut rebuilt = Array2::<f64>::zeros(expected.dim());
            for_each_block::<f64>(&tensor.unwrap(), side, |first, block| {
                rebuilt.slice_mut(s![first..first + block.nrows(), ..]).assign(&block);
            });
            assert_eq!(rebuilt, expected.mapv(f64::from));
        }
    }
}
