//! One HTML file that shows what a compression did: the last stage for people, after `compress`, `verify` and `sweep`.
//!
//! Reads the metadata of a finished checkpoint (`lowrank_report.json`, `lowrank_spectra.json`) and what `verify` left
//! beside it; no weights. The page holds everything that it needs: script, style, charts and the data as JSON. It is a
//! pure function of those documents, and loads nothing.
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
//! | [`sweep`] | the points of a sweep, and which of them no other beats |
//! | [`cards`] | which graphics cards hold so many bytes of weights |
//! | [`page`] | the HTML, filled from the assets beside this crate's sources |
//! | [`place`] | where things lie beside a checkpoint |
//!
//! Figures are drawn by Apache ECharts (`assets/README.md`). The page of a checkpoint stands beside it and not in it, because
//! the manifest fixes every byte of the checkpoint before `verify` has run.

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
