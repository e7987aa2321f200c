//! A linear map, stored dense, as two factors, as pivots and coefficients, or as a base with one of the latter two.

use crate::product::tokens_times_weight;
use lowrank_model::{PivotSide, StoredMatrix, Tensor};
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
    /// W = basis [I T] Π, or Πᵀ [I; T] basis.
    Pivoted {
        /// Which of the two.
        side: PivotSide,
        /// [m, r] or [r, n]
        basis: Matrix,
        /// T: [r, n − r] or [m − r, r]
        coefficients: Matrix,
        /// Π, pivots first.
        order: Vec<usize>,
    },
    /// W = B + difference.
    OfBase {
        /// B [m, n]
        base: Matrix,
        /// Factored or pivoted.
        difference: Box<Linear>,
    },
}

impl Linear {
    /// m, output features.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows,
            Self::OfBase { base, .. } => base.rows,
            Self::Factored { u, .. } => u.rows,
            Self::Pivoted { side: PivotSide::Inputs, basis, .. } => basis.rows,
            Self::Pivoted { side: PivotSide::Outputs, order, .. } => order.len(),
        }
    }

    /// n, input features.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols,
            Self::OfBase { base, .. } => base.cols,
            Self::Factored { v, .. } => v.cols,
            Self::Pivoted { side: PivotSide::Inputs, order, .. } => order.len(),
            Self::Pivoted { side: PivotSide::Outputs, basis, .. } => basis.cols,
        }
    }

    /// Y [N, m] = X [N, n] Wᵀ; factored: (X vᵀ) uᵀ; pivoted: (X_J + X_rest Tᵀ) basisᵀ, or Y_J = X basisᵀ and
    /// Y_rest = Y_J Tᵀ.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Dense(w) => w.apply(x, y),
            Self::OfBase { base, difference } => {
                difference.apply(x, y);
                let mut of_base = vec![0.0; y.len()];
                base.apply(x, &mut of_base);
                y.iter_mut().zip(of_base).for_each(|(y, of_base)| *y += of_base);
            }
            Self::Factored { u, v } => {
                let mut inner = vec![0.0; x.len() / v.cols * v.rows]; // [N, r]
                v.apply(x, &mut inner);
                u.apply(&inner, y);
            }
            Self::Pivoted { side: PivotSide::Inputs, basis, coefficients, order } => {
                let (pivots, others) = order.split_at(basis.cols);
                let tokens = x.len() / order.len();
                let mut inner = vec![0.0; tokens * pivots.len()]; // [N, r]
                coefficients.apply(&gathered(x, order.len(), others), &mut inner);
                for (inner, x) in inner.chunks_exact_mut(pivots.len()).zip(x.chunks_exact(order.len())) {
                    inner.iter_mut().zip(pivots).for_each(|(inner, &pivot)| *inner += x[pivot]);
                }
                basis.apply(&inner, y);
            }
            Self::Pivoted { side: PivotSide::Outputs, basis, coefficients, order } => {
                let (pivots, others) = order.split_at(basis.rows);
                let tokens = x.len() / basis.cols;
                let mut at_pivots = vec![0.0; tokens * pivots.len()]; // [N, r]
                basis.apply(x, &mut at_pivots);
                let mut elsewhere = vec![0.0; tokens * others.len()]; // [N, m − r]
                coefficients.apply(&at_pivots, &mut elsewhere);
                for (token, y) in y.chunks_exact_mut(order.len()).enumerate() {
                    for (places, values) in [(pivots, &at_pivots), (others, &elsewhere)] {
                        let values = &values[token * places.len()..][..places.len()];
                        places.iter().zip(values).for_each(|(&place, &value)| y[place] = value);
                    }
                }
            }
        }
    }
}

/// Some features of every token, [N, places].
fn gathered(x: &[f32], features: usize, places: &[usize]) -> Vec<f32> {
    x.chunks_exact(features).flat_map(|x| places.iter().map(|&place| x[place])).collect()
}

impl From<&StoredMatrix> for Linear {
    fn from(stored: &StoredMatrix) -> Self {
        match stored {
            StoredMatrix::Dense(w) => Self::Dense(Matrix::widened(w)),
            StoredMatrix::OfBase { base, difference } => {
                Self::OfBase { base: Matrix::widened(base), difference: Box::new((&**difference).into()) }
            }
            StoredMatrix::Factored { u, v } => {
                Self::Factored { u: Matrix::widened(u), v: Matrix::widened(v) }
            }
            StoredMatrix::Pivoted { side, basis, coefficients, order } => Self::Pivoted {
                side: *side,
                basis: Matrix::widened(basis),
                coefficients: Matrix::widened(coefficients),
                order: order.all().collect(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::{Dtype, PivotOrder};

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
        assert_eq!(run(StoredMatrix::Dense(w.clone())), expected);
        let factored = StoredMatrix::Factored { u, v };
        assert_eq!(run(factored.clone()), expected);
        // With a base that is the same once more.
        let twice = StoredMatrix::OfBase { base: w.into(), difference: Box::new(factored) };
        assert_eq!(run(twice), expected.map(|value| 2.0 * value));
    }
    #[test]
    fn a_pivoted_matrix_acts_like_what_it_stands_for() {
        let tensor = |shape: [usize; 2], values: &[f32]| {
            Tensor::from_f32(shape.to_vec(), Dtype::Bf16, values).unwrap()
        };
        let order = |pivots: &[usize], len| PivotOrder::of_pivots(pivots, len);
        // W = [c₀ c₁ c₂] with c₁ = 2 c₀ − c₂, and its transpose.
        let wide = tensor([3, 4], &[1.0, 0.0, 2.0, 3.0, 2.0, 5.0, 0.0, 4.0, 0.0, -5.0, 4.0, 2.0]);
        let tall = tensor([4, 3], &[1.0, 2.0, 0.0, 0.0, 5.0, -5.0, 2.0, 0.0, 4.0, 3.0, 4.0, 2.0]);
        let pivoted_tall = StoredMatrix::Pivoted {
            side: PivotSide::Inputs,
            basis: tensor([4, 2], &[1.0, 0.0, 0.0, -5.0, 2.0, 4.0, 3.0, 2.0]),
            coefficients: tensor([2, 1], &[2.0, -1.0]),
            order: order(&[0, 2], 3),
        };
        let pivoted_wide = StoredMatrix::Pivoted {
            side: PivotSide::Outputs,
            basis: tensor([2, 4], &[1.0, 0.0, 2.0, 3.0, 0.0, -5.0, 4.0, 2.0]),
            coefficients: tensor([1, 2], &[2.0, -1.0]),
            order: order(&[0, 2], 3),
        };
        let x = [1.0, 2.0, 3.0, 4.0, 0.5, -0.5, 0.25, 2.0, -3.0, 1.0, 0.0, 8.0];
        for (dense, pivoted) in [(tall, pivoted_tall), (wide, pivoted_wide)] {
            let (dense, pivoted) = (Linear::from(&StoredMatrix::Dense(dense)), Linear::from(&pivoted));
            assert_eq!((dense.inputs(), dense.outputs()), (pivoted.inputs(), pivoted.outputs()));
            let run = |linear: &Linear| {
                let mut y = vec![f32::NAN; x.len() / linear.inputs() * linear.outputs()];
                linear.apply(&x, &mut y);
                y
            };
            assert_eq!(run(&dense), run(&pivoted));
        }
    }
}
