//! One HTML page that shows the result of a compression or a sweep.
//!
//! The crate reads the metadata of a finished checkpoint (`lowrank_report.json`, `lowrank_spectra.json`) and the result of
//! `verify` beside it, but no weights. The page contains everything that it needs: script, style, charts, and the data as
//! JSON. It is a pure function of those documents, and loads nothing.
//!
//! ```text
//! DIR/lowrank_report.json ─┐
//! DIR/lowrank_spectra.json ├─► Page ── html ──► NAME.report.html, beside DIR
//! NAME.verification.json  ─┘
//! SWEEP/sweep.json ────────┬─► Page ── html ──► SWEEP/report.html
//! SWEEP/results.jsonl ─────┘
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`checkpoint`] | the documents of one checkpoint, and what is derived from them for the page |
//! | [`sweep`] | the points of a sweep, and their Pareto fronts |
//! | [`cards`] | which GPUs have enough memory for the weights |
//! | [`page`] | the HTML, filled from the assets beside this crate's sources |
//! | [`place`] | paths of the files beside a checkpoint |
//!
//! Apache ECharts draws the figures (`assets/README.md`). The page is beside the checkpoint and not inside it, because
//! the manifest fixes every byte of the checkpoint before `verify` runs.

pub mod cards;
pub mod checkpoint;
mod error;
pub mod page;
pub mod place;
pub mod sweep;

pub use checkpoint::CheckpointPage;
pub use error::ReportError;
pub use page::Page;
pub use sweep::SweepPage;
