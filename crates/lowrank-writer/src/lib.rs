//! Writes a checkpoint that `from_pretrained` opens, and publishes it only when it is complete.
//!
//! It takes tensors (factors `u [m, r]`, `v [r, n]`, and untouched ones as bytes) and writes a directory. It does not depend
//! on how the tensors were made, and never reads a checkpoint: the reader is another crate, so that a mistake here is not
//! repeated, and thereby hidden, when the output is read.
//!
//! ```text
//! Vec<OutputTensor> ─ ShardLayout::new ─► ShardLayout        a value: every byte offset, before any byte is written
//!                                             │
//!                    CheckpointWriter::create ▼              .NAME.lowrank-partial beside NAME, shards at full length
//!   tensors, any order, any thread ── write ──►              pwrite at the planned offset
//!                       Documents ── finish ──►              headers read back and counted, fsync, ONE rename to NAME
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`layout`] | the place of every tensor: shards, headers, index |
//! | [`staging`] | the hidden sibling directory, its lock, free space, the rename |
//! | [`journal`] | the finished work of a run, so that another run can resume it |
//! | [`manifest`] | `lowrank_manifest.json` |
//! | [`checkpoint`] | [`CheckpointWriter`] |
//! | [`recount`] | the written headers, read back from disk |
//! | [`documents`] | everything beside the shards: config, code, report, card, companions |
//! | [`config`] | `config.json` of factored and of dense output |
//! | [`report`] | `lowrank_report.json` |
//! | [`figures`] | the SVG files that the card embeds |
//! | [`card`] | `README.md`, the model card |
//! | [`template`] | keys of text assets filled in |
//!
//! The format in prose: `docs/format.md`.

pub mod card;
pub mod checkpoint;
pub mod code;
pub mod config;
pub mod documents;
pub mod error;
pub mod figures;
pub mod journal;
pub mod layout;
pub mod manifest;
pub mod recount;
pub mod report;
pub mod staging;
pub mod template;

pub use card::Card;
pub use checkpoint::{CheckpointWriter, Content, Published};
pub use config::{ConfigOf, StatedDtype};
pub use documents::Documents;
pub use error::WriteError;
pub use journal::JobKey;
pub use layout::{OutputTensor, ShardLayout};
pub use lowrank_model::chat::ChatTemplate;
pub use manifest::Manifest;
pub use report::CompressionReport;
pub use staging::{Leftover, StagingDir, check_out, check_space, held_bytes};
