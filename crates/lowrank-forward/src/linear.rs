//! A linear map, stored dense or as two factors.

use crate::product::tokens_times_weight;
use lowrank_model::Tensor;
use lowrank_reader::StoredMatrix;
use rayon::prelude::*;

/// A weight widened to f32, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// [rows, cols]
    pub values: Vec<f32>,
}

/// Elements that one task widens.
const WIDEN_ELEMENTS: usize = 1 << 18;

impl Matrix {
    /// Widens a stored [m, n] tensor.
    ///
    /// # Panics
    /// If the tensor has not two dimensions.
    pub fn widened(tensor: &Tensor) -> Self {
        let &[rows, cols] = tensor.shape() else {
            panic!("{:?} is not the shape of a matrix", tensor.shape())
        };
        let mut values = vec![0.0; rows * cols];
        values.par_chunks_mut(WIDEN_ELEMENTS).enumerate().for_each(|(chunk, out)| {
            tensor.widen(chunk * WIDEN_ELEMENTS, out);
        });
        Self { rows, cols, values }
    }

    fn apply(&self, x: &[f32], y: &mut [f32]) {
        tokens_times_weight(y, x, &self.values, self.cols, self.rows);
    }
}

/// y = W x, for many x at once.
#[derive(Debug, Clone, PartialEq)]
pub enum Linear {
    /// W [m, n].
    Dense(Matrix),
    /// W = u v.
    Factored {
        /// [m, r]
        u: Matrix,
        /// [r, n]
        v: Matrix,
    },
}

impl Linear {
    /// m, output features.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows,
            Self::Factored { u, .. } => u.rows,
        }
    }

    /// n, input features.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols,
            Self::Factored { v, .. } => v.cols,
        }
    }

    /// Y [N, m] = X [N, n] Wᵀ; factored: (X vᵀ) uᵀ.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Dense(w) => w.apply(x, y),
            Self::Factored { u, v } => {
                let mut inner = vec![0.0; x.len() / v.cols * v.rows]; // [N, r]
                v.apply(x, &mut inner);
                u.apply(&inner, y);
            }
        }
    }
}

impl From<&StoredMatrix> for Linear {
    fn from(stored: &StoredMatrix) -> Self {
        match stored {
            StoredMatrix::Dense(w) => Self::Dense(Matrix::widened(w)),
            StoredMatrix::Factored { u, v } => {
                Self::Factored { u: Matrix::widened(u), v: Matrix::widened(v) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::Dtype;

    #[test]
    fn a_factored_matrix_acts_like_its_product() {
        // u [3, 2], v [2, 4], and their product by hand.
        let matrix = |shape: [usize; 2], values: &[f32]| {
            Tensor::from_f32(shape.to_vec(), Dtype::Bf16, values).unwrap()
        };
        let u = matrix([3, 2], &[1.0, 2.0, 0.0, 1.0, -1.0, 3.0]);
        let v = matrix([2, 4], &[1.0, 0.0, 2.0, -1.0, 0.0, 1.0, 1.0, 4.0]);
        let w = matrix([3, 4], &[1.0, 2.0, 4.0, 7.0, 0.0, 1.0, 1.0, 4.0, -1.0, 3.0, 1.0, 13.0]);
        let x = [1.0, 2.0, 3.0, 4.0, 0.5, -0.5, 0.25, 2.0]; // [2, 4]
        let run = |stored: StoredMatrix| {
            let linear = Linear::from(&stored);
            let mut y = vec![0.0; 2 * linear.outputs()];
            linear.apply(&x, &mut y);
            y
        };
        let expected = [45.0, 21.0, 60.0, 14.5, 7.75, 24.25];
        assert_eq!(run(StoredMatrix::Dense(w)), expected);
        assert_eq!(run(StoredMatrix::Factored { u, v }), expected);
    }
}
