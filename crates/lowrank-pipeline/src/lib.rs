//! The jobs a user asks for, put together from the crates that do the work.
//!
//! ```text
//! text ────► calibration ──────────┐ (how errors are counted; without a text: by the weights alone)
//!             ▼             ▼
//! reader ──► spectra ──► plan ──► factors ──► writer ──► one rename
//!            (pass 1)   (value)   (pass 2)
//! ```
//!
//! The checkpoint is read twice: once for the singular values of every expert matrix, which cost 12.6 MB for
//! an 8x7B model and answer every budget, and once to factor each matrix at its planned rank. One matrix per worker is
//! in memory; nothing grows with the checkpoint. No terminal code here: callers pass a [`lowrank_model::Progress`].

pub mod base;
pub mod calibration;
pub mod compress;
pub mod context;
pub mod densify;
pub mod error;
pub mod inspect;
pub mod interrupt;
pub mod machine;
pub mod memory;
mod narrow;
pub mod planning;
mod propagate;
pub mod reproduce;
pub mod round;
pub mod scratch;
mod shared_base;
mod shared_hashes;
pub mod spectra;
mod stored;
mod subject;
pub mod sweep;
pub mod workers;

pub use calibration::{CalibrationContext, CalibrationText};
pub use context::JobContext;
pub use error::PipelineError;
pub use interrupt::Interrupt;
pub(crate) use lowrank_model::recipe::FactorSettings;
