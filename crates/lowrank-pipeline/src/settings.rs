//! What a job is told, already validated: domain values, no strings to parse.

use lowrank_calibrate::CalibrationSettings;
use lowrank_model::plan::{Allocation, Sensitivity};
use lowrank_model::{Budget, Dtype, MatrixId, RankPlan, Storage};
use lowrank_svd::MethodChoice;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Where the ranks come from.
#[derive(Debug, Clone)]
pub enum Goal {
    /// Allocate them so that this much goes.
    Budget(Budget),
    /// Take them from a map; matrices it does not name stay dense.
    Ranks(BTreeMap<MatrixId, usize>),
    /// Execute a stored plan.
    Plan(Box<RankPlan>),
}

/// How ranks are chosen.
#[derive(Debug, Clone)]
pub struct PlanSettings {
    /// Where the ranks come from.
    pub goal: Goal,
    /// Ranks are multiples of this; `None`: 8 for true-size matrices, 1 for small ones.
    pub rank_multiple: Option<usize>,
    /// No factored matrix gets a smaller rank.
    pub rank_min: usize,
    /// How errors of different matrices compare; `None`: as measured on the calibration text, without one relative.
    pub sensitivity: Option<Sensitivity>,
    /// How the budget is spread.
    pub allocation: Allocation,
    /// On what to calibrate; `None`: errors are counted by the weights alone.
    pub calibration: Option<CalibrationSettings>,
    /// Matrices whose module name matches any of these stay dense.
    pub keep_dense: Vec<regex::Regex>,
    /// Matrices whose module name matches have this rank; of several that match the last counts.
    pub fixed_ranks: Vec<FixedRank>,
    /// How factors are stored; `None`: as u·v, or as a given plan says.
    pub storage: Option<Storage>,
    /// Dtype of the factors; `None`: that of the matrix.
    pub factor_dtype: Option<Dtype>,
}

/// A rank that is given to some matrices, while the others share the budget.
#[derive(Debug, Clone)]
pub struct FixedRank {
    /// Of module names.
    pub pattern: regex::Regex,
    /// Need not be a multiple of anything.
    pub rank: usize,
}

impl FromStr for FixedRank {
    /// What is wrong with it.
    type Err = String;

    /// `PATTERN=RANK`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, rank) = text.rsplit_once('=').ok_or("expected PATTERN=RANK")?;
        let rank = rank.trim().parse().map_err(|_| format!("`{rank}` is no rank; expected PATTERN=RANK"))?;
        Ok(Self { pattern: pattern_of(pattern)?, rank })
    }
}

impl fmt::Display for FixedRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.rank)
    }
}

/// A regular expression, or the line that says why it is none.
pub fn pattern_of(text: &str) -> Result<regex::Regex, String> {
    regex::Regex::new(text).map_err(|error| {
        let reason = error.to_string();
        reason.lines().last().unwrap_or_default().trim().to_owned()
    })
}

/// How factors are computed and written.
#[derive(Debug, Clone)]
pub struct FactorSettings {
    /// Exact, randomized, or chosen per matrix.
    pub method: MethodChoice,
    /// Seed of the randomized route.
    pub seed: u64,
    /// Longest shard.
    pub shard_bytes_max: u64,
}
