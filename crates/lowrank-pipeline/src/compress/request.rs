//! What a compression is asked for.

use crate::Interrupt;
use crate::workers::Resources;
use lowrank_model::Recipe;
use lowrank_writer::Leftover;
use lowrank_writer::report::BaseModel;
use std::path::Path;

/// What to compress, how, and where to.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The model as it was named by the user; only a public name gets into the output.
    pub model: &'a str,
    /// Where the result appears; must not exist.
    pub out: &'a Path,
    /// Every setting that decides the bytes.
    pub recipe: &'a Recipe,
    /// Threads and memory.
    pub resources: &'a Resources,
    /// What to do with an earlier run's unfinished work.
    pub leftover: Leftover,
    /// Asked before each unit of work.
    pub interrupt: &'a Interrupt,
    /// Name and revision of the base, where they are known better than `model` says.
    pub provenance: Option<&'a BaseModel>,
}
