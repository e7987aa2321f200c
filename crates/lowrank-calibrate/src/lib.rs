//! What the experts see, measured on a text, so that their factors are good where they are used.
//!
//! Stands between the forward pass, which it watches, and the factorisation, which it tells in which norm to count errors.
//!
//! ```text
//! text ─► windows ─► forward pass ─► moments per expert ─► norm of each matrix' error ─► spectra, factors
//!                                                                 │
//!                    forward pass, one (layer, projection) spoilt at a time ─► KL at the end ─► sensitivities
//! ```
//!
//! | Module | The one place for |
//! |---|---|
//! | [`moments`] | the sums over tokens |
//! | [`mod@collect`] | the pass that takes them, one expert in memory at a time |
//! | [`store`] | where they lie until they are used |
//! | [`states`] | hidden states that are kept, so that experts can be measured apart from each other |
//! | [`norm`] | from moments to a norm, and what happens to experts that saw little or nothing |
//! | [`pair`] | moments of what a compressed model sees, beside what the original saw |
//! | [`activations`] | the second moment of an expert's activations |
//! | [`widths`] | orders of channels and errors of widths |
//! | [`layer_base`] | the base that a layer's experts may share |
//! | [`shared_bases`] | errors of what distinguishes their matrices from it |
//! | [`regression`] | down of a narrowed expert by least squares |
//! | [`half_width`] | halves, at which sensitivities are measured |
//! | [`sensitivity`] | what an error of each (layer, projection), and of each layer's widths, does to the logits |
//!
//! The recipe, its sources and what was tried and left: `docs/research/calibration.md`.

pub mod activations;
pub mod collect;
mod error;
pub mod half_width;
pub mod layer_base;
pub mod moments;
pub mod norm;
pub mod pair;
pub mod regression;
pub mod sensitivity;
pub mod shared_bases;
pub mod states;
pub mod store;
#[cfg(test)]
mod test_support;
mod weights;
pub mod widths;

pub use collect::{collect, collect_experts};
pub use error::{CalibrateError, Spoilt};
pub use moments::{ExpertMoments, RowWeights};
pub use norm::{Norm, Norms};
pub use pair::Pair;
pub use regression::{Fitted, Regression};
pub use sensitivity::apart::Apart;
pub use sensitivity::{Sensitivities, measure};
pub use shared_bases::DifferenceSpectra;
pub use states::States;
pub use store::Store;
pub use widths::{ExpertWidths, WidthStore, WidthsByExpert};
