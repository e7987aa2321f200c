//! A symmetric matrix between its decomposition's two halves.

use ndarray::Array2;

/// What a backend keeps of a symmetric matrix G [d, d] to get its eigenvalues and its eigenvectors from, at different
/// times, for the price of one decomposition: see [`crate::Kernels::reduce`].
#[derive(Debug, Clone, PartialEq)]
pub enum Reduced<T> {
    /// G itself: nothing is gained.
    Whole(Array2<T>),
    /// Numbers that only the backend that made them can read.
    Packed {
        /// d
        size: usize,
        /// For [`crate::Faer`] about d²/2 of them: G = Q T Qᵀ with T tridiagonal.
        numbers: Vec<T>,
    },
}
