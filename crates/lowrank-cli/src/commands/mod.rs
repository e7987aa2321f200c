//! One command, one file: call the job, print what came of it.

pub(crate) mod compress;
pub(crate) mod densify;
pub(crate) mod inspect;
pub(crate) mod report;
pub(crate) mod reproduce;
pub(crate) mod sweep;
pub(crate) mod verify;

use crate::exit::{Failure, Result};
use lowrank_reader::Checkpoint;
use std::path::PathBuf;

/// Opens a checkpoint given as a directory or as org/name in the local cache.
fn open(model: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::open(&resolve(model)?)?)
}

/// The directory of a checkpoint given as such or as org/name in the local cache.
fn resolve(model: &str) -> Result<PathBuf> {
    Ok(Checkpoint::resolve(model)?)
}

/// The one document that `--json` puts on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value).map_err(Failure::bug)?);
    Ok(())
}
