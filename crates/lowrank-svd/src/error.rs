//! Why a matrix could not be decomposed. The caller knows the matrix's name and adds it.

use lowrank_compute::ComputeError;
use lowrank_model::MatrixShape;

/// Why there is no spectrum or no factors.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SvdError {
    /// Not two dimensions, or an empty one.
    #[error("shape {shape:?} is not a matrix")]
    NotAMatrix {
        /// What was found.
        shape: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error("weight [{row}, {col}] is {value}: every weight must be finite")]
    NotFinite {
        /// Row of the first offender.
        row: usize,
        /// Column of the first offender.
        col: usize,
        /// NaN or an infinity.
        value: f32,
    },
    /// No such approximation.
    #[error("rank {rank} is outside 1..={rank_max} for a matrix {shape}")]
    Rank {
        /// Asked for.
        rank: usize,
        /// The short side.
        rank_max: usize,
        /// Of the matrix.
        shape: MatrixShape,
    },
    /// A spectrum of another matrix.
    #[error("a spectrum of {values} values was given for a matrix {shape}")]
    OtherSpectrum {
        /// Values given.
        values: usize,
        /// Of the matrix.
        shape: MatrixShape,
    },
    /// A Gram matrix has an eigenvalue too far below zero to be rounding.
    #[error("eigenvalue {value:e} of a Gram matrix is below -{tolerance:e}: the decomposition is wrong")]
    Negative {
        /// The eigenvalue.
        value: f64,
        /// How far below zero rounding can reach.
        tolerance: f64,
    },
    /// Singular values beyond the largest f32.
    #[error("the singular values exceed f32: the largest weight is {largest_weight:e}")]
    Overflow {
        /// max |w|
        largest_weight: f64,
    },
    /// The backend gave up.
    #[error(transparent)]
    Compute(#[from] ComputeError),
}
