//! How ranks are chosen.

use super::Goal;
use super::error::{RecipeError, validate_least};
use super::pattern::{FixedRank, Pattern};
use crate::Quantiser;
use crate::plan::{Allocation, RankGroups, Sensitivity, Structures};
use serde::{Deserialize, Serialize};

/// How ranks are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PlanSettings {
    /// Ranks and widths are multiples of this; `None`: [`crate::params::usual_multiple`].
    pub rank_multiple: Option<usize>,
    /// No factored matrix gets a smaller rank.
    pub min_rank: usize,
    /// Matrices whose module name matches any of these stay dense.
    pub keep_dense: Vec<Pattern>,
    /// Matrices whose module name matches have this rank; of several that match the last counts.
    pub fix_rank: Vec<FixedRank>,
    /// How errors of different matrices compare; `None`: measured with a calibration text, relative without one.
    pub sensitivity: Option<Sensitivity>,
    /// How the budget is spread.
    pub allocation: Allocation,
    /// What may be cut: ranks of matrices, widths of experts, or both; `None`: see [`Recipe::structures`](super::Recipe::structures).
    pub structures: Option<Structures>,
    /// What shares one choice of width and ranks.
    pub rank_groups: RankGroups,
    /// What the output will be quantised by: the size to leave is the one after that.
    pub then: Option<Quantiser>,
}

impl Default for PlanSettings {
    fn default() -> Self {
        Self {
            rank_multiple: None,
            min_rank: 1,
            keep_dense: Vec::new(),
            fix_rank: Vec::new(),
            sensitivity: None,
            allocation: Allocation::Global,
            structures: None,
            rank_groups: RankGroups::default(),
            then: None,
        }
    }
}

impl PlanSettings {
    pub(super) fn validate(&self, goal: &Goal) -> Result<(), RecipeError> {
        if let Some(then) = self.then
            && !matches!(goal, Goal::TargetSize(_))
        {
            let expected = "a target-size beside it";
            return Err(RecipeError { key: "then", value: then.to_string(), expected });
        }
        validate_least("rank-multiple", self.rank_multiple.unwrap_or(1), 1, "at least 1")?;
        validate_least("min-rank", self.min_rank, 1, "at least 1")
    }
}
