//! What is removed from a checkpoint: as it was asked for, and resolved against one checkpoint.

use crate::budget::{BudgetError, ByteSize, ParamCount, Removal, Target, Unit};
use crate::plan::Size;
use crate::{MatrixId, RankPlan};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is removed, or which ranks are given. The names of the variants are keys of a recipe; they exclude each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, strum::VariantNames)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Goal {
    /// Remove this much.
    Budget(Removal),
    /// Leave at most this many parameters.
    TargetParams(ParamCount),
    /// Leave at most this many bytes of weights.
    TargetSize(ByteSize),
    /// A budget that was resolved against a checkpoint.
    Remove(Target),
    /// Take the ranks from a map; matrices that it does not name stay dense.
    Ranks(BTreeMap<MatrixId, usize>),
    /// Execute a stored plan.
    Plan(Box<RankPlan>),
}

impl Goal {
    /// What must go from a checkpoint of this size; `None` where the ranks are given.
    pub fn target(&self, before: Size) -> Option<Result<Target, BudgetError>> {
        let remove = |unit, remove_at_least| Ok(Target { unit, remove_at_least });
        let leave = |unit, have: u64, target| match have.checked_sub(target) {
            None | Some(0) => Err(BudgetError::NothingToDo { have, target, unit }),
            Some(gone) => remove(unit, gone),
        };
        Some(match *self {
            Self::Budget(Removal::Params(params)) => remove(Unit::Params, params),
            Self::Budget(Removal::Share { numerator, denominator }) => {
                let product = u128::from(before.params) * u128::from(numerator);
                // At most all parameters, since the share is below one.
                remove(Unit::Params, product.div_ceil(u128::from(denominator)) as u64)
            }
            Self::TargetParams(ParamCount(params)) => leave(Unit::Params, before.params, params),
            Self::TargetSize(ByteSize(bytes)) => leave(Unit::Bytes, before.bytes, bytes),
            Self::Remove(target) => Ok(target),
            Self::Ranks(_) | Self::Plan(_) => return None,
        })
    }

    /// Whether the ranks are to be chosen for a budget.
    pub fn is_budget(&self) -> bool {
        !matches!(self, Self::Ranks(_) | Self::Plan(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Size = Size { params: 46_702_792_704, bytes: 93_405_585_408 };

    fn removed(goal: Goal, before: Size) -> u64 {
        goal.target(before).unwrap().unwrap().remove_at_least
    }

    #[test]
    fn shares_are_exact_and_round_up() {
        let of = |text: &str, params| removed(Goal::Budget(text.parse().unwrap()), Size { params, bytes: 0 });
        assert_eq!(of("20%", BEFORE.params), 9_340_558_541);
        assert_eq!(of("33.3%", 1000), 333);
        assert_eq!(of("33.3%", 1001), 334);
    }

    #[test]
    fn targets_are_turned_into_removals() {
        assert_eq!(removed(Goal::TargetParams("36.7B".parse().unwrap()), BEFORE), 10_002_792_704);
        let goal = Goal::TargetSize("74GB".parse().unwrap());
        let target = Target { unit: Unit::Bytes, remove_at_least: 19_405_585_408 };
        assert_eq!(goal.target(BEFORE), Some(Ok(target)));
        let small = Size { params: 1, bytes: 1 };
        assert!(matches!(goal.target(small), Some(Err(BudgetError::NothingToDo { .. }))));
    }
}
