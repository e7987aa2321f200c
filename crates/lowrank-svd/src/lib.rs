//! Spectrum, plan, factors: the mathematics of the compression.
//!
//! Stands between the reader and the writer. Works on one expert matrix W [m, n] at a time, as stored bytes:
//!
//! 1. [`spectrum()`]: the singular values of W, so the exact error of every rank.
//! 2. [`allocate()`]: which rank each matrix gets, from all spectra and the budget, with a bound on what any plan could
//!    reach.
//! 3. [`factor()`]: u [m, r] and v [r, n] with u·v the best approximation of that rank (Eckart and Young, 1936).
//!
//! | Module | The one place for |
//! |---|---|
//! | [`precision`] | when f32 suffices |
//! | [`mod@spectrum`] | singular values from a Gram matrix |
//! | [`mod@factor`] | the route to the factors, and what they miss |
//! | [`factors`] | splitting a subspace into u and v |
//! | [`mod@metric`] | which norm an error is counted in: weights, or activations that were seen |
//! | [`calibrated`] | spectrum and factors in a metric |
//! | [`fitted`] | what to approximate when the inputs are those of a compressed model |
//! | `root` | a square root of a moment and its inverse |
//! | `power` | norms, roughly |
//! | [`mod@pivot`] | u·v as pivots and coefficients, fewer numbers for the same matrix |
//! | [`reduction`] | what a spectrum leaves behind for factors |
//! | `projector` | the subspace of a rank without its eigenvectors |
//! | [`randomized`] | the sketch for small ranks |
//! | [`mod@allocate`] | ranks under a budget |
//!
//! No threads: callers run one matrix per thread, and the bits do not depend on how many.

pub mod allocate;
pub mod calibrated;
mod error;
pub mod factor;
pub mod factors;
pub mod fitted;
mod inputs;
pub mod metric;
mod outputs;
pub mod pivot;
mod power;
pub mod precision;
mod projector;
pub mod randomized;
pub mod reduction;
pub mod residual;
mod root;
pub mod spectrum;
mod survey;

pub use allocate::{AllocateError, AllocationRequest, Candidate, allocate, plan_from_ranks, uniform_plan};
pub use calibrated::{decompose_in, factor_in, factor_reduced_in, reduce_in, spectrum_in};
pub use error::SvdError;
pub use factor::{FactorOptions, Factored, Route, factor};
pub use factors::Factors;
pub use fitted::{Unseen, fitted_map};
pub use lowrank_model::recipe::MethodChoice;
pub use metric::Metric;
pub use pivot::{Pivoted, pivot, unpivoted};
pub use precision::{Precision, PrecisionChoice};
pub use reduction::Reduction;
pub use root::MomentRoot;
pub use spectrum::spectrum;
