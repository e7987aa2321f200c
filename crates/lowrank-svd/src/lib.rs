//! Spectrum, plan, factors: the mathematics of the compression.
//!
//! Stands between the reader and the writer. Works on one expert matrix W [m, n] at a time, as stored bytes:
//!
//! 1. [`spectrum()`]: the singular values of W in a norm, so the exact error of every rank.
//! 2. [`allocate()`]: which rank each matrix gets, from all spectra and the budget, with a bound on what any plan could
//!    reach.
//! 3. [`factor()`]: u [m, r] and v [r, n] with u·v the best approximation of that rank (Eckart and Young, 1936).
//!
//! | Module | The one place for |
//! |---|---|
//! | [`engine`] | spectrum and factors, in any norm, by any route |
//! | [`options`] | how to find them, and when by a sketch |
//! | [`precision`] | when f32 suffices |
//! | [`mod@metric`] | which norm an error is measured in: of the weights, or of activations |
//! | `error_norm` | what a norm says of itself: its eigenproblem, its basis, its errors |
//! | `weights`, `inputs`, `outputs` | the three norms |
//! | `moment`, `root` | second moments, and their roots |
//! | [`ridge`] | what to approximate when the inputs are those of a compressed model |
//! | [`mod@channels`] | which channels of an expert to keep, and w2 fitted to them |
//! | [`mod@narrowed`] | errors of every rank of what stays at a width |
//! | [`mod@mean`] | the base that a layer's experts share, and what distinguishes a matrix from it |
//! | [`factors`] | balancing u and v |
//! | [`residual`] | errors of factors |
//! | [`mod@interpolative`] | u·v as an interpolative decomposition: fewer numbers for the same matrix |
//! | [`reduction`] | what a spectrum leaves for factors |
//! | `randomized` | random signs of sketches |
//! | `stats`, `linalg` | the pass over the weights, and dense helpers |
//! | [`mod@allocate`] | ranks under a budget |
//!
//! No threads: callers run one matrix per thread, and the bits do not depend on how many.

pub mod allocate;
pub mod channels;
pub mod engine;
mod error;
mod error_norm;
pub mod factors;
mod inputs;
pub mod interpolative;
mod linalg;
pub mod mean;
pub mod metric;
mod moment;
pub mod narrowed;
pub mod options;
mod outputs;
pub mod precision;
mod randomized;
pub mod reduction;
pub mod residual;
pub mod ridge;
mod root;
mod stats;
#[cfg(test)]
mod test_support;
mod weights;

pub use allocate::{
    AllocateError, AllocationRequest, Candidate, NarrowedErrors, allocate, plan_from_ranks, uniform_plan,
};
pub use channels::{Channels, fit_columns};
pub use engine::whole::{decompose, decompose_narrowed};
pub use engine::{Factored, Route, factor, spectrum};
pub use error::SvdError;
pub use factors::Factors;
pub use interpolative::{Interpolative, expanded, interpolative};
pub use lowrank_model::recipe::MethodChoice;
pub use mean::{MatrixMean, difference};
pub use metric::Metric;
pub use narrowed::narrowed_outputs;
pub use options::SvdOptions;
pub use precision::{Precision, PrecisionChoice};
pub use reduction::Reduction;
pub use ridge::{ShrinkageTarget, ridge_map};
pub use root::MomentRoot;
