//! Every setting that decides the bytes of an output, in one value.
//!
//! Flags and `--config` fill a [`Recipe`], a run's journal and a sweep's points are known by its serialised form, the report
//! embeds it, and `reproduce` reads it back. Serialised it is one flat object; its keys are those of flags and of TOML
//! files. A new setting is a field here, with its default, and a flag of the command line.
//!
//! What decides no byte (workers, memory, the place of the cache, verbosity, paths) is not part of it. What a run was made
//! from (the base model, the tokens of the calibration text) and what ran it are facts that stand beside it.

mod base;
mod calibration;
mod error;
mod factor;
mod goal;
mod output;
mod pattern;
mod plan;
mod propagation;

pub use crate::budget::{ByteSize, ParamCount, Removal};
// Whole groups, so that a setting of a new type is a change of its group's file and of the flags' alone.
pub use base::*;
pub use calibration::*;
pub use error::RecipeError;
pub use factor::*;
pub use goal::Goal;
pub use output::*;
pub use pattern::{FixedRank, Pattern};
pub use plan::*;
pub use propagation::*;

use crate::plan::{Allocation, RankGroups, Sensitivity, Structures};
use serde::de::{Deserializer, Error as _};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use strum::VariantNames;

/// Every setting that decides the bytes of an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
// serde cannot refuse unknown keys of flattened groups; the two impls below do.
#[serde(remote = "Self")]
pub struct Recipe {
    /// What is removed, or which ranks are given.
    #[serde(flatten)]
    pub goal: Goal,
    /// How ranks are chosen.
    #[serde(flatten)]
    pub plan: PlanSettings,
    /// What errors are measured on.
    #[serde(flatten)]
    pub calibration: CalibrationSettings,
    /// What factors are fitted to.
    #[serde(flatten)]
    pub propagation: PropagationSettings,
    /// How factors are computed and stored.
    #[serde(flatten)]
    pub factor: FactorSettings,
    /// How files are written. Decides no number of the model.
    #[serde(flatten)]
    pub output: OutputSettings,
    /// What of the base is taken, and as what.
    #[serde(flatten)]
    pub base: BaseSettings,
}

impl Recipe {
    /// The defaults, to this end.
    pub fn new(goal: Goal) -> Self {
        Self {
            goal,
            plan: PlanSettings::default(),
            calibration: CalibrationSettings::default(),
            propagation: PropagationSettings::default(),
            factor: FactorSettings::default(),
            output: OutputSettings::default(),
            base: BaseSettings::default(),
        }
    }

    /// Keys of the settings in which points of a sweep may differ, in their order: those that decide tensors, but for how the base
    /// is taken.
    pub fn keys() -> Vec<String> {
        let defaults = Self::new(Goal::Ranks(Default::default()));
        let goals = Goal::VARIANTS.iter().map(|&goal| goal.to_owned());
        let common = [keys_of(&defaults.output), keys_of(&defaults.base)].concat();
        let others = keys_of(&defaults).into_iter();
        goals
            .chain(others.filter(|key| !Goal::VARIANTS.contains(&key.as_str()) && !common.contains(key)))
            .collect()
    }

    /// Keys that say how to calibrate and mean nothing without a calibration text.
    pub fn calibration_keys() -> Vec<String> {
        let calibration = keys_of(&CalibrationSettings::default()).into_iter();
        calibration.chain(keys_of(&PropagationSettings::default())).collect()
    }

    /// The calibration, if there is a text.
    pub fn calibration(&self) -> Option<&CalibrationSettings> {
        Some(&self.calibration).filter(|calibration| !calibration.is_off())
    }

    /// How errors of different matrices compare: measured with a calibration text, relative without one, unless it is said.
    pub fn sensitivity(&self) -> Sensitivity {
        self.plan.sensitivity.unwrap_or(match self.calibration() {
            Some(_) => Sensitivity::Measured,
            None => Sensitivity::default(),
        })
    }

    /// What may be cut, unless it is said: ranks, widths and shared bases where the errors of all can be measured and compared,
    /// else ranks. Experts that must be equal share no base, since its cost and use differ from layer to layer. A plan that is
    /// given says it itself; given ranks are ranks.
    pub fn structures(&self) -> Structures {
        let comparable = self.calibration().is_some()
            && self.sensitivity() == Sensitivity::Measured
            && self.plan.allocation == Allocation::Global;
        match &self.goal {
            Goal::Plan(plan) => match (plan.experts.is_empty(), plan.shared_base_layers.is_empty()) {
                (true, true) => Structures::Rank,
                (false, true) => Structures::RankWidth,
                (true, false) => Structures::RankBase,
                (false, false) => Structures::RankWidthBase,
            },
            Goal::Ranks(_) => Structures::Rank,
            _ => self.plan.structures.unwrap_or(match (comparable, self.plan.rank_groups) {
                (true, RankGroups::Matrix) => Structures::RankWidthBase,
                (true, RankGroups::Layer) => Structures::RankWidth,
                (false, _) => Structures::Rank,
            }),
        }
    }

    /// What is measured for a plan that is yet to be made: one that is given, or given ranks, need no widths.
    pub fn measured_structures(&self) -> Structures {
        if self.goal.is_budget() { self.structures() } else { Structures::Rank }
    }

    /// What becomes of fp8 tensors outside the experts, unless it is said: no quantiser takes fp8.
    pub fn fp8(&self) -> Fp8 {
        self.base.fp8.unwrap_or(if self.plan.then.is_some() { Fp8::Widen } else { Fp8::Keep })
    }

    /// Whether shared experts are compressed. A plan or ranks that are given say it themselves.
    pub fn compresses_shared_experts(&self) -> bool {
        match &self.goal {
            Goal::Plan(plan) => plan.compresses_shared_experts(),
            Goal::Ranks(ranks) => ranks.keys().any(|id| id.is_shared()),
            _ => self.base.shared_experts == Some(SharedExpertsChoice::Compress),
        }
    }

    /// Checks what the types of the settings leave open.
    pub fn validate(&self) -> Result<(), RecipeError> {
        self.plan.validate(&self.goal)?;
        let cuts_ranks_of_each = self.structures().has_ranks() && self.plan.rank_groups == RankGroups::Matrix;
        if self.compresses_shared_experts() && !cuts_ranks_of_each {
            let expected = "keep with structures width, and with rank-groups layer";
            return Err(RecipeError { key: "shared-experts", value: "compress".to_owned(), expected });
        }
        self.calibration.validate()?;
        self.propagation.validate()
    }
}

/// Keys of a serialised value.
fn keys_of(value: &impl Serialize) -> Vec<String> {
    match serde_json::to_value(value) {
        Ok(Value::Object(map)) => map.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    }
}

impl Serialize for Recipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Recipe {
    /// Keys that are absent have their defaults; an unknown key is an error. See also [`Recipe::validate`].
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = Map::deserialize(deserializer)?;
        let known = keys_of(&Self::new(Goal::Ranks(Default::default())));
        let is_known = |key: &str| Goal::VARIANTS.contains(&key) || known.iter().any(|known| known == key);
        if let Some(key) = map.keys().find(|key| !is_known(key)) {
            return Err(D::Error::custom(format!("unknown setting `{}`", crate::display::clip(key))));
        }
        Self::deserialize(Value::Object(map)).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Recipe, String> {
        let recipe: Recipe = serde_json::from_value(value).map_err(|error| error.to_string())?;
        recipe.validate().map_err(|error| error.to_string())?;
        Ok(recipe)
    }

    #[test]
    fn a_recipe_is_flat_and_reads_back() {
        let mut recipe = Recipe::new(Goal::Budget("21.412%".parse().unwrap()));
        recipe.plan.fix_rank.push("\\.w2$=40".parse().unwrap());
        recipe.calibration.calibrate = vec![TextChoice::File("a.txt".into())];
        let value = serde_json::to_value(&recipe).unwrap();
        assert_eq!(value["budget"], "21.412%");
        assert_eq!(value["fix-rank"], json!(["\\.w2$=40"]));
        assert_eq!((&value["gate-weight"], &value["shrinkage"]), (&"squared".into(), &json!(0.1)));
        assert!(value.as_object().unwrap().values().all(|value| !value.is_object()), "{value}");
        assert_eq!(read(value).unwrap(), recipe);
    }

    #[test]
    fn what_is_absent_has_its_default() {
        let recipe = Recipe::new(Goal::TargetSize(ByteSize(74_000_000_000)));
        assert_eq!(read(json!({ "target-size": "74GB" })).unwrap(), recipe);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (value, part) in [
            (json!({ "budget": "10%", "budgte": 1 }), "unknown setting `budgte`"),
            (json!({ "budget": "ten" }), "`ten`"),
            (json!({ "budget": "10%", "shrinkage": 1.5 }), "shrinkage is 1.5"),
            (json!({ "budget": "10%", "min-rank": 0 }), "min-rank is 0"),
            (json!({ "budget": "10%", "gate-weight": "cubed" }), "`cubed`"),
            (json!({ "budget": "10%", "keep-dense": ["("] }), "("),
            (
                json!({ "budget": "10%", "fix-rank": ["w\u{7f}1=3"] }),
                "`w\\u{7f}1=3`: has a control character",
            ),
            (
                json!({ "budget": "10%", "shared-experts": "compress", "structures": "width" }),
                "expected keep",
            ),
            (
                json!({ "budget": "10%", "shared-experts": "compress", "rank-groups": "layer" }),
                "expected keep",
            ),
        ] {
            let error = read(value.clone()).unwrap_err();
            assert!(error.contains(part), "{value}: {error}");
        }
    }

    #[test]
    fn points_of_a_sweep_differ_in_all_but_files() {
        let keys = Recipe::keys();
        for key in ["budget", "target-size", "storage", "calibrate", "gate-weight", "propagate", "seed"] {
            assert!(keys.iter().any(|known| known == key), "{key}");
        }
        for key in ["max-shard-size", "fp8", "shared-experts"] {
            assert!(!keys.iter().any(|known| known == key), "{key}");
        }
    }
}
