//! How much room the output takes at most, asked of the disk before anything is computed.

use crate::PipelineError;
use crate::subject::Subject;
use lowrank_model::params::{index_bytes, stored_params};
use lowrank_model::recipe::Goal;
use lowrank_model::{Dtype, Recipe, Target, Unit};
use lowrank_reader::Checkpoint;

/// An upper bound of the output's weights, known before any spectrum is: whatever stays of the expert matrices may be in
/// the wider of their dtype and the factors', and every matrix may be pivoted and have an index.
pub(super) fn bytes_at_most(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<u64, PipelineError> {
    let before = checkpoint.size();
    let storage = match &recipe.goal {
        Goal::Plan(plan) => plan.cost.storage,
        _ => recipe.factor.storage.unwrap_or_default(),
    };
    let factor_bytes = recipe.factor.dtype.map_or(0, Dtype::size_bytes);
    let (mut most, mut least_element) = (before.bytes, u64::MAX);
    for id in checkpoint.config().matrices() {
        let shape = checkpoint.config().matrix_shape(id);
        let dense = checkpoint.matrix_dtype(id).size_bytes();
        let element = dense.max(factor_bytes);
        most +=
            stored_params(shape, storage, None) * (element - dense) + index_bytes(shape, storage, Some(1));
        least_element = least_element.min(element);
    }
    Ok(match (&recipe.goal, Subject::of(checkpoint).target(recipe)) {
        (_, Some(target)) => {
            let Target { unit, remove_at_least } = target?;
            match unit {
                Unit::Params => most.saturating_sub(remove_at_least.saturating_mul(least_element)),
                Unit::Bytes => most.min(before.bytes.saturating_sub(remove_at_least)),
            }
        }
        // Not checked yet: it may say anything.
        (Goal::Plan(plan), None) => most.min(plan.after.bytes),
        (_, None) => most,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Interrupt;
    use crate::compress::{Request, compress};
    use crate::workers::{self, Resources};
    use lowrank_model::Storage;
    use lowrank_model::progress::Silent;
    use lowrank_model::recipe::{ByteSize, CalibrationSettings, OutputSettings, Removal};
    use lowrank_writer::Leftover;
    use std::path::Path;

    #[test]
    fn the_room_asked_for_early_is_enough_and_hardly_more_than_is_taken() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let removal = || Goal::Budget(Removal::Params(1_200_000));
        for (storage, dtype, goal) in [
            (Storage::Uv, None, removal()),
            (Storage::Pivoted, None, removal()),
            (Storage::Pivoted, Some(Dtype::F32), removal()),
            (Storage::Pivoted, None, Goal::TargetSize(ByteSize(10_000_000))),
        ] {
            let mut recipe = Recipe::new(goal);
            recipe.calibration = CalibrationSettings::off();
            (recipe.factor.storage, recipe.factor.dtype) = (Some(storage), dtype);
            recipe.output = OutputSettings { max_shard_size: ByteSize(1 << 30) };
            let asked = bytes_at_most(&checkpoint, &recipe).unwrap();
            let out = folder.path().join("out");
            let request = Request {
                model: "tiny",
                out: &out,
                recipe: &recipe,
                resources: &Resources { cache: workers::CachePlace::Nowhere, ..Resources::default() },
                leftover: Leftover::Resume,
                interrupt: &Interrupt::default(),
                provenance: None,
            };
            let taken = compress(&checkpoint, request, &Silent).unwrap().published.bytes;
            // Matrices that stay dense need no index and are not widened: 96 of them at most.
            let to_spare = asked.checked_sub(taken).expect("the early check asks for enough");
            let dense_in_f32 = if dtype.is_some() { 31 * 448 * 128 * 2 } else { 0 };
            assert!(
                to_spare <= 96 * 128 * 8 + dense_in_f32 + 4 * 576,
                "{storage} {dtype:?}: {asked} for {taken}"
            );
            std::fs::remove_dir_all(out).unwrap();
        }
    }
}
