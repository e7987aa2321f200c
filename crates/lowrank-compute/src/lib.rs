//! Dense linear algebra for matrices that lie in memory as stored bytes.
//!
//! `lowrank-svd` and `lowrank-forward` depend on it. No other crate depends on faer or LAPACK; interfaces use
//! `ndarray`. A [`Backend`] does everything in f32 or f64, through [`Kernels`]:
//!
//! | Kernel | Computes | Shapes |
//! |---|---|---|
//! | [`Kernels::gram`] | G = AᵀA, widened block by block | A [l, d] → [d, d] |
//! | [`Kernels::eigh`], [`Kernels::eigvalsh`] | G = V Λ Vᵀ | [d, d] → Λ \[d\], V [d, k] |
//! | [`Kernels::reduce`] | what both of them need of G, once | [d, d] → [`Reduced`] |
//! | [`Kernels::cholesky`] | L Lᵀ = C, and L⁻¹ | [d, d] → 2 · [d, d] |
//! | [`Kernels::upper_subspace`] | the first columns of V up to a rotation, by [`projector`] | [d, d] → [d, k] |
//! | [`Kernels::apply`], [`Kernels::project`] | A X | [l, d] × [d, k] → [l, k] |
//! | [`Kernels::apply_transposed`] | AᵀY | [l, d] × [l, k] → [d, k] |
//! | [`Kernels::singular_values`] | Σ of A by a direct SVD, for reference | [m, n] → [min(m, n)] |
//! | [`Kernels::thin_qr`] | the Q of Y = QR | [l, k] → [l, k] |
//! | [`Kernels::complement`] | what is orthogonal to Y | [l, k] → [l, l − k] |
//! | [`Kernels::qr_pivoted`] | R and Π of A Π = QR | [l, k] → [min(l, k), k] |
//! | [`Kernels::gemm`] | C = A B, or C += A B | |
//!
//! [`TiledCholesky`] and the products beside it are the exception: their matrices are so large that all threads work on one, on
//! the CPU.
//!
//! A is a stored matrix W [m, n] or its transpose Wᵀ, by [`Side`]. It is never widened as a whole.
//!
//! The default backend, [`Faer`], computes each matrix on the calling thread: its bits do not depend on how many
//! matrices are computed at once. With the feature `lapack` there is a second, `Lapack`, that shares no code with it. With
//! the feature `cuda` (default) there is a third, [`cuda::Cuda`], that needs a device when it is asked for and nothing
//! before.

mod algebra;
pub mod blocks;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod faer_backend;
mod kernels;
#[cfg(feature = "lapack")]
mod lapack_backend;
pub mod projector;
mod real;
mod reduced;
#[cfg(test)]
mod suite;
mod tiled;
mod tridiagonal;

pub use algebra::{Algebra, NoDevice, Processor, Substituted};
pub use blocks::Side;
pub use error::ComputeError;
pub use faer_backend::{Faer, solve_upper};
pub use kernels::{Accumulate, Backend, Cholesky, Eigen, Kernels, PivotedQr, mirror_lower};
#[cfg(feature = "lapack")]
pub use lapack_backend::Lapack;
pub use lowrank_model::AlgebraChoice;
pub use projector::Split;
pub use real::Real;
pub use reduced::Reduced;
pub use tiled::{TiledCholesky, product_in_strips, product_with_symmetric};
