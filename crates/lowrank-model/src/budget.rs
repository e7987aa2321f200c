//! What the user asked to remove, in exact integer arithmetic.

use crate::ErrorKind;
use crate::display::clip;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Stored parameters.
    Params,
    /// Bytes of stored weights.
    Bytes,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Params => "parameters",
            Self::Bytes => "bytes",
        })
    }
}

/// Why a budget could not be read or met.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BudgetError {
    /// Not a number in any known spelling.
    #[error("`{text}` is not {expected}")]
    Syntax {
        /// What was given.
        text: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A target that the checkpoint already meets.
    #[error("the checkpoint has {have} {unit}, which is already at or below the target of {target}")]
    NothingToDo {
        /// Size of the checkpoint.
        have: u64,
        /// What was asked for.
        target: u64,
        /// What is counted.
        unit: Unit,
    },
    /// Zero.
    #[error("the budget is zero: there is nothing to remove")]
    Zero,
}

impl BudgetError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Syntax { .. } | Self::Zero => ErrorKind::Usage,
            Self::NothingToDo { .. } => ErrorKind::BudgetImpossible,
        }
    }
}

/// What was asked for, before it meets a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// Remove this many parameters.
    RemoveParams(u64),
    /// Remove numerator / denominator of all parameters of the checkpoint.
    RemoveShare {
        /// Upper number of the share.
        numerator: u64,
        /// Lower number of the share.
        denominator: u64,
    },
    /// Leave at most this many parameters.
    TargetParams(u64),
    /// Leave at most this many bytes of weights.
    TargetBytes(u64),
}

/// A budget against one checkpoint: remove at least this much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// What is counted.
    pub unit: Unit,
    /// How much must go.
    pub remove_at_least: u64,
}

impl Budget {
    /// `--budget`: `10B`, `10e9`, `10_000_000_000` parameters, or `20%` of all the checkpoint's parameters.
    pub fn parse_removal(text: &str) -> Result<Self, BudgetError> {
        let expected = "a number of parameters (10B, 10e9, 10_000_000_000) or a share below 100% (20%)";
        let syntax = || BudgetError::Syntax { text: clip(text), expected };
        let budget = match text.trim().strip_suffix('%') {
            Some(percent) => {
                let Decimal { digits, scale } = Decimal::parse(percent).ok_or_else(syntax)?;
                let denominator =
                    10_u64.checked_pow(scale).and_then(|d| d.checked_mul(100)).ok_or_else(syntax)?;
                if digits >= denominator {
                    return Err(syntax());
                }
                Self::RemoveShare { numerator: digits, denominator }
            }
            None => Self::RemoveParams(parse_params(text).ok_or_else(syntax)?),
        };
        match budget {
            Self::RemoveParams(0) | Self::RemoveShare { numerator: 0, .. } => Err(BudgetError::Zero),
            budget => Ok(budget),
        }
    }

    /// `--target-params`: `36.7B`.
    pub fn parse_target_params(text: &str) -> Result<Self, BudgetError> {
        let expected = "a number of parameters (36.7B, 36.7e9, 36_700_000_000)";
        parse_params(text).map(Self::TargetParams).ok_or(BudgetError::Syntax { text: clip(text), expected })
    }

    /// `--target-size`: `74GB`, `68.9GiB`, or bytes.
    pub fn parse_target_size(text: &str) -> Result<Self, BudgetError> {
        parse_bytes(text).map(Self::TargetBytes)
    }

    /// Turns the wish into a removal from a checkpoint of this size.
    pub fn resolve(self, params: u64, bytes: u64) -> Result<Target, BudgetError> {
        let (unit, remove_at_least) = match self {
            Self::RemoveParams(remove) => (Unit::Params, remove),
            Self::RemoveShare { numerator, denominator } => {
                let product = u128::from(params) * u128::from(numerator);
                // At most `params`, since the share is below one.
                (Unit::Params, product.div_ceil(u128::from(denominator)) as u64)
            }
            Self::TargetParams(target) => (Unit::Params, left_over(params, target, Unit::Params)?),
            Self::TargetBytes(target) => (Unit::Bytes, left_over(bytes, target, Unit::Bytes)?),
        };
        Ok(Target { unit, remove_at_least })
    }
}

/// Bytes: `4GiB`, `5GB`, `512MiB`, `1000`.
pub fn parse_bytes(text: &str) -> Result<u64, BudgetError> {
    let syntax =
        || BudgetError::Syntax { text: clip(text), expected: "a size in bytes (74GB, 68.9GiB, 512MiB)" };
    let trimmed = text.trim();
    let split =
        trimmed.find(|c: char| c.is_ascii_alphabetic() && c != 'e' && c != 'E').unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(split);
    let factor: u64 = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(syntax()),
    };
    let Decimal { digits, scale } = Decimal::parse(number.trim()).ok_or_else(syntax)?;
    let product = u128::from(digits) * u128::from(factor);
    // A fraction of a byte is rounded down: the target stays at or below what was asked.
    u64::try_from(product / 10_u128.pow(scale)).map_err(|_| syntax())
}

fn left_over(have: u64, target: u64, unit: Unit) -> Result<u64, BudgetError> {
    match have.checked_sub(target) {
        None | Some(0) => Err(BudgetError::NothingToDo { have, target, unit }),
        Some(remove) => Ok(remove),
    }
}

fn parse_params(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, power) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 3),
        (at, 'm' | 'M') => (&text[..at], 6),
        (at, 'b' | 'B' | 'g' | 'G') => (&text[..at], 9),
        (at, 't' | 'T') => (&text[..at], 12),
        _ => (text, 0),
    };
    let Decimal { digits, scale } = Decimal::parse(number)?;
    let product = u128::from(digits) * 10_u128.pow(power);
    let divisor = 10_u128.pow(scale);
    // A count is an integer: half a parameter is a typing error.
    if !product.is_multiple_of(divisor) {
        return None;
    }
    u64::try_from(product / divisor).ok()
}

/// digits · 10^−scale, exact.
struct Decimal {
    digits: u64,
    scale: u32,
}

impl Decimal {
    fn parse(text: &str) -> Option<Self> {
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<u32>().ok().filter(|&e| e <= 18)?),
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let fraction = fraction.trim_end_matches('0');
        let mut digits: u64 = 0;
        let mut any = false;
        for character in whole.chars().filter(|&c| c != '_').chain(fraction.chars()) {
            digits = digits.checked_mul(10)?.checked_add(u64::from(character.to_digit(10)?))?;
            any = true;
        }
        let scale = u32::try_from(fraction.len()).ok().filter(|&scale| scale <= 18)?;
        if !any && !mantissa.starts_with('0') {
            return None;
        }
        if exponent >= scale {
            let digits = digits.checked_mul(10_u64.checked_pow(exponent - scale)?)?;
            Some(Self { digits, scale: 0 })
        } else {
            Some(Self { digits, scale: scale - exponent })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_billion_in_every_spelling() {
        for text in ["10B", "10e9", "10_000_000_000", "10000000000", "1.0e10", "10b", "10000M", " 10G "] {
            assert_eq!(Budget::parse_removal(text), Ok(Budget::RemoveParams(10_000_000_000)), "{text}");
        }
    }

    #[test]
    fn shares_are_exact_and_round_up() {
        let budget = Budget::parse_removal("20%").unwrap();
        assert_eq!(budget.resolve(46_702_792_704, 0).unwrap().remove_at_least, 9_340_558_541);
        let third = Budget::parse_removal("33.3%").unwrap();
        assert_eq!(third.resolve(1000, 0).unwrap().remove_at_least, 333);
        assert_eq!(third.resolve(1001, 0).unwrap().remove_at_least, 334);
    }

    #[test]
    fn targets_are_turned_into_removals() {
        let budget = Budget::parse_target_params("36.7B").unwrap();
        assert_eq!(budget.resolve(46_702_792_704, 0).unwrap().remove_at_least, 10_002_792_704);
        let budget = Budget::parse_target_size("74GB").unwrap();
        let target = budget.resolve(46_702_792_704, 93_405_585_408).unwrap();
        assert_eq!(target, Target { unit: Unit::Bytes, remove_at_least: 19_405_585_408 });
        assert!(matches!(budget.resolve(1, 1), Err(BudgetError::NothingToDo { .. })));
    }

    #[test]
    fn sizes_know_decimal_and_binary_units() {
        assert_eq!(parse_bytes("74GB"), Ok(74_000_000_000));
        assert_eq!(parse_bytes("4GiB"), Ok(4 << 30));
        assert_eq!(parse_bytes("1.5 KiB"), Ok(1536));
        assert_eq!(parse_bytes("2e3"), Ok(2000));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "B", "ten", "-1", "1.5", "1e99", "100%", "%", "1..2", "0x10", "٣"] {
            assert!(matches!(Budget::parse_removal(text), Err(BudgetError::Syntax { .. })), "{text}");
        }
        assert_eq!(Budget::parse_removal("0"), Err(BudgetError::Zero));
        for text in ["GB", "1XB", "1e40GB", ""] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
