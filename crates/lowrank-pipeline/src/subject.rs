//! What a plan has to know of a checkpoint, and what must go from it. A size may be meant for the time after a quantiser.

use lowrank_model::budget::{BudgetError, Unit};
use lowrank_model::display::grouped;
use lowrank_model::names::Role;
use lowrank_model::params::stored_params;
use lowrank_model::plan::Size;
use lowrank_model::recipe::Goal;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{Dtype, MatrixId, ModelConfig, Quantiser, Recipe, Storage, Target};
use lowrank_reader::Checkpoint;
use std::collections::BTreeMap;

/// What a plan has to know of a checkpoint: nothing of its weights.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Which matrices there are, and their shapes.
    pub config: ModelConfig,
    /// The whole checkpoint.
    pub before: Size,
    /// Of every expert matrix.
    pub dtypes: BTreeMap<MatrixId, Dtype>,
    /// Bytes of all other tensors once they are quantised.
    pub quantised_rest: BTreeMap<Quantiser, u64>,
}

impl Subject {
    /// As its headers say.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = checkpoint.config().clone();
        let dtypes = config.matrices().map(|id| (id, checkpoint.matrix_dtype(id))).collect();
        let rest = |quantiser| (quantiser, quantised_rest(checkpoint, quantiser));
        let quantised_rest = Quantiser::ALL.into_iter().map(rest).collect();
        Self { config, before: checkpoint.size(), dtypes, quantised_rest }
    }

    /// What must go; `None` where the ranks are given.
    pub fn target(&self, recipe: &Recipe) -> Option<Result<Target, BudgetError>> {
        match (&recipe.goal, recipe.plan.then) {
            (Goal::TargetSize(size), Some(then)) => Some(self.target_then(recipe, size.0, then)),
            (goal, _) => goal.target(self.before),
        }
    }

    /// What must go for the whole to have this size once it is quantised. At most so many bytes: what scales and indices take
    /// is counted for the rank that takes most.
    fn target_then(&self, recipe: &Recipe, size: u64, then: Quantiser) -> Result<Target, BudgetError> {
        let weights = |id| stored_params(self.config.matrix_shape(id), Storage::default(), None);
        let (mut experts, mut beyond) = (0, 0);
        for id in self.config.matrices() {
            experts += weights(id);
            // Experts may share a base, which is one more matrix for all of them.
            let of_bases = u64::from(id.expert == 0);
            beyond += (1 + of_bases) * then.beyond(self.config.matrix_shape(id), storage(recipe));
        }
        let rest = self.quantised_rest.get(&then).copied().unwrap_or_default();
        let left = then.weights_in(size.saturating_sub(rest + beyond));
        match experts.checked_sub(left) {
            None | Some(0) => {
                let whole = self
                    .config
                    .matrices()
                    .map(|id| then.bytes_of_factors(self.config.matrix_shape(id), Storage::default(), None));
                let have = rest + whole.sum::<u64>();
                Err(BudgetError::NothingToDo { have, target: size, unit: Unit::Bytes })
            }
            Some(remove_at_least) => Ok(Target { unit: Unit::Params, remove_at_least }),
        }
    }

    /// What a size after quantising means, in one line.
    pub(crate) fn after_then(&self, recipe: &Recipe) -> Option<String> {
        let (Goal::TargetSize(size), Some(then)) = (&recipe.goal, recipe.plan.then) else { return None };
        let Target { remove_at_least, .. } = self.target(recipe)?.ok()?;
        let (size, gone) = (grouped(size.0), grouped(remove_at_least));
        Some(format!("to be at most {size} bytes after {then}, {gone} expert parameters go"))
    }
}

/// Bytes of all tensors but the expert matrices, quantised.
fn quantised_rest(checkpoint: &Checkpoint, quantiser: Quantiser) -> u64 {
    let others = checkpoint.specs().iter().filter(|spec| !matches!(spec.role, Role::Expert(_)));
    let bytes = |spec: &TensorSpec| match spec.shape[..] {
        [rows, cols] if Quantiser::takes(spec.role) => quantiser.bytes(rows as u64, cols as u64),
        _ => spec.elements() * checkpoint.dtype(&spec.name).map_or(0, Dtype::size_bytes),
    };
    others.map(bytes).sum()
}

/// How factors are stored.
pub(crate) fn storage(recipe: &Recipe) -> Storage {
    let planned = match &recipe.goal {
        Goal::Plan(plan) => Some(plan.cost.storage),
        _ => None,
    };
    recipe.factor.storage.or(planned).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planning::{Errors, plan_from};
    use lowrank_calibrate::{DifferenceSpectra, WidthsByExpert};
    use lowrank_model::Spectrum;
    use lowrank_model::plan::Sensitivity;
    use lowrank_model::recipe::{ByteSize, CalibrationSettings};
    use std::path::Path;

    fn checkpoint() -> Checkpoint {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
        Checkpoint::open(&model).unwrap()
    }

    /// Errors that fall alike in all matrices.
    fn errors(subject: &Subject) -> Errors {
        let sigma = |short: usize| (0..short).map(|i| 1.0 / (1.0 + i as f64)).collect();
        let spectrum = |id| Spectrum::new(sigma(subject.config.matrix_shape(id).short_side())).unwrap();
        Errors {
            spectra: subject.config.matrices().map(|id| (id, spectrum(id))).collect(),
            sensitivity: Sensitivity::default(),
            layers: None,
            widths: WidthsByExpert::new(),
            differences: DifferenceSpectra::new(),
        }
    }

    #[test]
    fn the_quantised_output_has_at_most_the_size_and_nearly_all_of_it() {
        let subject = Subject::of(&checkpoint());
        for then in Quantiser::ALL {
            for storage in [Storage::Uv, Storage::Pivoted] {
                for percent in [70, 85] {
                    let whole = quantised(&subject, then, storage, |_| None);
                    let size = whole * percent / 100;
                    let mut recipe = Recipe::new(Goal::TargetSize(ByteSize(size)));
                    recipe.calibration = CalibrationSettings::off();
                    recipe.plan.then = Some(then);
                    recipe.factor.storage = Some(storage);
                    recipe.validate().unwrap();
                    let plan = plan_from(&subject, &recipe, &errors(&subject)).unwrap();
                    let ranks = plan.ranks();
                    let found = quantised(&subject, then, storage, |id| ranks.get(&id).copied());
                    assert!(found <= size, "{then} {storage:?}: {found} of {size}");
                    // Of small matrices, scales and indices are a good part, and are counted for the worst rank.
                    assert!(found > size * 9 / 10, "{then} {storage:?}: {found} of {size}");
                    assert_eq!(subject.resolve(&recipe).plan.then, None);
                }
            }
        }
    }

    /// Bytes of the quantised model with these ranks.
    fn quantised(
        subject: &Subject,
        then: Quantiser,
        storage: Storage,
        rank: impl Fn(lowrank_model::MatrixId) -> Option<usize>,
    ) -> u64 {
        let of = |id| then.bytes_of_factors(subject.config.matrix_shape(id), storage, rank(id));
        subject.quantised_rest[&then] + subject.config.matrices().map(of).sum::<u64>()
    }

    #[test]
    fn a_size_that_quantising_alone_reaches_is_refused() {
        let subject = Subject::of(&checkpoint());
        let mut recipe = Recipe::new(Goal::TargetSize(ByteSize(subject.before.bytes / 2)));
        recipe.plan.then = Some(Quantiser::Nf4);
        let found = subject.target(&recipe).unwrap().unwrap_err();
        assert!(matches!(found, BudgetError::NothingToDo { unit: Unit::Bytes, .. }), "{found}");
    }

    #[test]
    fn a_quantiser_without_a_size_is_refused() {
        let mut recipe = Recipe::new(Goal::Budget("10%".parse().unwrap()));
        recipe.plan.then = Some(Quantiser::Int8);
        let error = recipe.validate().unwrap_err().to_string();
        assert_eq!(error, "then is int8, expected a target-size beside it");
    }
}
