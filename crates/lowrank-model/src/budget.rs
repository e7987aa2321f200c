//! What the user asked to remove, in exact integer arithmetic.

use crate::ErrorKind;
use crate::display::clip;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

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

/// A budget against one checkpoint: remove at least this much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// What is counted.
    pub unit: Unit,
    /// How much must go.
    pub remove_at_least: u64,
}

/// How much goes: `10B`, `10e9`, `10_000_000_000` parameters, or `20%` of all parameters of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Spelled", into = "String")]
pub enum Removal {
    /// Remove this many parameters.
    Params(u64),
    /// Remove numerator / denominator of all parameters. The denominator is 100 times a power of ten.
    Share {
        /// Upper number of the share.
        numerator: u64,
        /// Lower number of the share.
        denominator: u64,
    },
}

/// A count of parameters: `36.7B`, or a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Spelled")]
pub struct ParamCount(pub u64);

/// A size in bytes: `74GB`, `68.9GiB`, or a number; more than nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Spelled")]
pub struct ByteSize(pub u64);

/// A number, or a text that means one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Spelled {
    Number(u64),
    Text(String),
}

impl fmt::Display for Spelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// Text to value, from flags and from documents alike.
macro_rules! spelled {
    ($($name:ident: $parse:expr),*) => {$(
        impl FromStr for $name {
            type Err = BudgetError;

            fn from_str(text: &str) -> Result<Self, BudgetError> {
                $parse(text)
            }
        }

        impl TryFrom<Spelled> for $name {
            type Error = BudgetError;

            fn try_from(spelled: Spelled) -> Result<Self, BudgetError> {
                spelled.to_string().parse()
            }
        }
    )*};
}
spelled!(
    Removal: parse_removal,
    ParamCount: |text| parse_param_count(text).map(Self),
    ByteSize: |text| parse_size(text).map(Self)
);

impl fmt::Display for Removal {
    /// As it is read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Params(params) => write!(f, "{params}"),
            Self::Share { numerator, denominator } => {
                // Of percents, as many decimals as the denominator has zeros beyond those of 100.
                let (one, decimals) = (denominator / 100, (denominator / 100).max(1).ilog10() as usize);
                write!(f, "{}", numerator / one)?;
                if decimals > 0 {
                    write!(f, ".{:0decimals$}", numerator % one)?;
                }
                f.write_str("%")
            }
        }
    }
}

impl From<Removal> for String {
    fn from(removal: Removal) -> Self {
        removal.to_string()
    }
}

/// `10B`, `10e9`, `10_000_000_000` parameters, or `20%` of all the checkpoint's parameters.
fn parse_removal(text: &str) -> Result<Removal, BudgetError> {
    let expected = "a number of parameters (10B, 10e9, 10_000_000_000) or a share below 100% (20%)";
    let syntax = || BudgetError::Syntax { text: clip(text), expected };
    let removal = match text.trim().strip_suffix('%') {
        Some(percent) => {
            let Decimal { digits, scale } = Decimal::parse(percent.trim_end()).ok_or_else(syntax)?;
            let denominator =
                10_u64.checked_pow(scale).and_then(|d| d.checked_mul(100)).ok_or_else(syntax)?;
            if digits >= denominator {
                return Err(syntax());
            }
            Removal::Share { numerator: digits, denominator }
        }
        None => Removal::Params(parse_params(text).ok_or_else(syntax)?),
    };
    match removal {
        Removal::Params(0) | Removal::Share { numerator: 0, .. } => Err(BudgetError::Zero),
        removal => Ok(removal),
    }
}

/// A count of parameters: `36.7B`.
fn parse_param_count(text: &str) -> Result<u64, BudgetError> {
    let expected = "a number of parameters (36.7B, 36.7e9, 36_700_000_000)";
    parse_params(text).ok_or(BudgetError::Syntax { text: clip(text), expected })
}

/// A size in bytes that is more than nothing: `74GB`, `68.9GiB`.
fn parse_size(text: &str) -> Result<u64, BudgetError> {
    match parse_bytes(text)? {
        0 => Err(BudgetError::Syntax { text: clip(text), expected: "a size of at least one byte" }),
        bytes => Ok(bytes),
    }
}

/// Bytes: `4GiB`, `5GB`, `512MiB`, `1000`.
fn parse_bytes(text: &str) -> Result<u64, BudgetError> {
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

fn parse_params(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, power) = match text.char_indices().last()? {
        (at, 'k' | 'K') => (&text[..at], 3),
        (at, 'm' | 'M') => (&text[..at], 6),
        (at, 'b' | 'B' | 'g' | 'G') => (&text[..at], 9),
        (at, 't' | 'T') => (&text[..at], 12),
        _ => (text, 0),
    };
    let Decimal { digits, scale } = Decimal::parse(number.trim_end())?;
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
            assert_eq!(parse_removal(text), Ok(Removal::Params(10_000_000_000)), "{text}");
        }
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
            assert!(matches!(parse_removal(text), Err(BudgetError::Syntax { .. })), "{text}");
        }
        assert_eq!(parse_removal("0"), Err(BudgetError::Zero));
        assert_eq!(parse_removal("20 %"), parse_removal("20%"));
        assert_eq!(parse_removal("10 B"), parse_removal("10B"));
        for text in ["GB", "1XB", "1e40GB", ""] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_removal_is_written_as_it_is_read() {
        for (text, written) in
            [("10B", "10000000000"), ("20%", "20%"), ("21.412%", "21.412%"), ("0.05%", "0.05%")]
        {
            let removal: Removal = text.parse().unwrap();
            assert_eq!(removal.to_string(), written);
            assert_eq!(written.parse(), Ok(removal));
        }
    }
}
