//! What can go wrong inside a decomposition.

/// Why a backend gave no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// The iteration of the symmetric eigensolver did not settle; finite input does not do this.
    #[error("{backend}: the eigenproblem of size {size} did not converge")]
    NoConvergence {
        /// Which backend.
        backend: &'static str,
        /// Rows of the matrix.
        size: usize,
    },
    /// The library refused.
    #[error("{backend}: {message}")]
    Library {
        /// Which backend.
        backend: &'static str,
        /// What the library said.
        message: String,
    },
}
