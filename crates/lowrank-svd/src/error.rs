//! Why a matrix could not be decomposed. The caller knows the matrix's name and adds it.

use lowrank_compute::ComputeError;
use lowrank_model::spectrum::SpectrumError;
use lowrank_model::{ErrorKind, MatrixShape};

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
    /// A moment or a map of another matrix.
    #[error("a {what} [{rows}, {cols}] was given for a matrix {shape}, where it must be [{size}, {size}]")]
    MetricShape {
        /// Moment or map.
        what: &'static str,
        /// Of what was given.
        rows: usize,
        /// Of what was given.
        cols: usize,
        /// What it must have of either.
        size: usize,
        /// Of the matrix.
        shape: MatrixShape,
    },
    /// A moment or a map is NaN or infinite.
    #[error("entry [{row}, {col}] of the {what} is {value}: every entry must be finite")]
    MetricNotFinite {
        /// Moment or map.
        what: &'static str,
        /// Row of the first offender.
        row: usize,
        /// Column of the first offender.
        col: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// Not one weight per row.
    #[error("{values} row weights were given for a matrix {shape}: one per row is needed")]
    RowWeights {
        /// Given.
        values: usize,
        /// Of the matrix.
        shape: MatrixShape,
    },
    /// A row weight that is none.
    #[error("row weight {row} is {value}: it must be finite and not negative")]
    RowWeight {
        /// Which.
        row: usize,
        /// Its value.
        value: f64,
    },
    /// A share that is none.
    #[error("the shrinkage is {value}: it must lie in 0..=1")]
    Blend {
        /// Given.
        value: f64,
    },
    /// A ridge that is none.
    #[error("the ridge is {value}: it must be finite and not negative")]
    Ridge {
        /// Given.
        value: f64,
    },
    /// A second moment without a Cholesky factor.
    #[error("a second moment [{size}, {size}] of activations is not positive definite, even with its ridge")]
    Indefinite {
        /// Channels.
        size: usize,
    },
    /// Singular values beyond the largest f32.
    #[error("the singular values exceed f32: the largest weight is {largest_weight:e}")]
    Overflow {
        /// max |w|
        largest_weight: f64,
    },
    /// What was computed is no spectrum.
    #[error(transparent)]
    Spectrum(#[from] SpectrumError),
    /// The backend gave up.
    #[error(transparent)]
    Compute(#[from] ComputeError),
}

impl SvdError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFinite { .. }
            | Self::Overflow { .. }
            | Self::Negative { .. }
            | Self::Indefinite { .. }
            | Self::Spectrum(_) => ErrorKind::BadNumbers,
            Self::Rank { .. } | Self::Blend { .. } | Self::Ridge { .. } => ErrorKind::Usage,
            Self::NotAMatrix { .. }
            | Self::OtherSpectrum { .. }
            | Self::MetricShape { .. }
            | Self::MetricNotFinite { .. }
            | Self::RowWeights { .. }
            | Self::RowWeight { .. }
            | Self::Compute(_) => ErrorKind::Bug,
        }
    }
}
