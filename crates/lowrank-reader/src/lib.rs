//! Opens a checkpoint, proves from its headers that it is whole, and hands out its tensors one at a time.
//!
//! The first stage of every command. Nothing here computes: a tensor leaves as the bytes that lie in the file, in
//! canonical order and under its canonical name (`lowrank_model::names`), whatever the layout on disk. Memory does not
//! grow with the checkpoint: headers are kept, weights are read on demand with `pread` and belong to the caller.
//!
//! | Module | The one place for |
//! |---|---|
//! | [`checkpoint`] | [`Checkpoint`]: validation and reads |
//! | [`header`] | the safetensors header, stricter than the format's own parser |
//! | [`index`] | `model.safetensors.index.json` |
//! | [`error`] | every way in which a checkpoint lies |
//! | [`family`] | what `config.json` or `params.json` says: family, dimensions, layout, ranks |
//! | `shards` | which files hold the weights: from the index, never from a glob |
//! | `json` | JSON as loaders read it: byte order marks, `NaN` |
//! | `others` | what is recognised and not read: other formats, heads, adapters, wrappers |
//! | `folder` | which files may be read, and where links may lead |
//! | `cache` | `org/name` in the local Hugging Face cache |
//! | [`companions`] | which other files an output needs, and which are left out |
//! | `rows` | rotary row order |
//!
//! Invariant: after [`Checkpoint::open`] returns, every tensor the model needs exists with the right shape and an
//! accepted dtype, and lies wholly inside its file.

mod cache;
pub mod checkpoint;
pub mod companions;
pub mod error;
pub mod family;
mod folder;
mod fp8;
pub mod header;
pub mod index;
mod json;
mod others;
mod rows;
mod shards;

pub use checkpoint::{Checkpoint, Fp8Scales, IgnoredTensor, ShardInfo};
pub use companions::LeftOut;
pub use error::ReadError;
pub use folder::read_at_most;
