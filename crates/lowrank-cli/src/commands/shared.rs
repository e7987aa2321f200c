//! What several commands do: open a model, print a document.

use crate::exit::{Failure, Result, unwritten, usage};
use lowrank_model::recipe::Fp8;
use lowrank_model::{RankPlan, Recipe};
use lowrank_reader::Checkpoint;
use std::path::{Path, PathBuf};

/// Opens a checkpoint given as a directory or as org/name in the local cache.
pub(super) fn open(model: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::open(&resolve(model)?)?)
}

/// Opens the base of a job: its fp8 tensors as the output has them, its shared experts compressed if they shall be.
pub(super) fn open_base(model: &str, recipe: &Recipe) -> Result<Checkpoint> {
    let compressed = recipe.compresses_shared_experts();
    let checkpoint = open(model)?.with_shared_experts(compressed);
    if compressed && !checkpoint.config().compresses_shared_experts {
        let family = checkpoint.config().family.title();
        return Err(usage(format!(
            "--shared-experts compress: {family} has no shared experts; leave it out"
        )));
    }
    Ok(match recipe.fp8() {
        Fp8::Keep => checkpoint,
        Fp8::Widen => checkpoint.widened(),
    })
}

/// The directory of a checkpoint given as such or as org/name in the local cache.
pub(super) fn resolve(model: &str) -> Result<PathBuf> {
    Ok(Checkpoint::resolve(model)?)
}

/// The one document that `--json` puts on stdout.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value).map_err(Failure::bug)?);
    Ok(())
}

/// Whole or absent.
pub(super) fn write_plan(path: &Path, plan: &RankPlan) -> Result<()> {
    let mut text = serde_json::to_string_pretty(plan).map_err(Failure::bug)?;
    text.push('\n');
    lowrank_files::write_whole(path, text.as_bytes())
        .map_err(|error| unwritten(path, "the plan was not written", &error))
}
