//! The jobs a user asks for, put together from the crates that do the work.
//!
//! ```text
//! text ────► lens ──────────┐ (how errors are counted; without a text: by the weights alone)
//!             ▼             ▼
//! reader ──► spectra ──► plan ──► factors ──► writer ──► one rename
//!            (pass 1)   (value)   (pass 2)
//! ```
//!
//! The checkpoint is read twice: once for the singular values of every expert matrix, which cost 12.6 MB for
//! Mixtral-8x7B and answer every budget, and once to factor each matrix at its planned rank. One matrix per worker is
//! in memory; nothing grows with the checkpoint. No terminal code here: callers pass a [`lowrank_model::Progress`].

pub mod base;
pub mod compress;
pub mod densify;
pub mod error;
pub mod inspect;
pub mod interrupt;
pub mod lens;
pub mod memory;
pub mod planning;
mod propagate;
pub mod reproduce;
pub mod round;
pub mod scratch;
pub mod settings;
pub mod spectra;
mod stored;
pub mod sweep;
pub mod workers;

pub use error::PipelineError;
pub use interrupt::Interrupt;
pub use lens::{CalibrationText, Lens};
pub use lowrank_compute::AlgebraChoice;
pub use settings::{FactorSettings, FixedRank, Goal, PlanSettings};
