//! Patterns of module names, which serialise as their text.

use crate::display::clip;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A regular expression that is searched for in module names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(regex::Regex);

/// A rank that is given to the matrices of a pattern: `REGEX=RANK`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FixedRank {
    /// Of module names.
    pub pattern: Pattern,
    /// Need not be a multiple of anything.
    pub rank: usize,
}

impl Pattern {
    /// Whether it occurs in the name.
    pub fn is_match(&self, name: &str) -> bool {
        self.0.is_match(name)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for Pattern {}

impl FromStr for Pattern {
    /// The line that says why it is none.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains(char::is_control) {
            return Err("has a control character, which no module name has".to_owned());
        }
        regex::Regex::new(text).map(Self).map_err(|error| {
            let reason = error.to_string();
            let line = reason.lines().last().unwrap_or_default().trim();
            line.trim_start_matches("error: ").to_owned()
        })
    }
}

impl FromStr for FixedRank {
    /// What is wrong with it.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, rank) = text.rsplit_once('=').ok_or("expected REGEX=RANK")?;
        let rank = rank.trim().parse().map_err(|_| format!("`{rank}` is no rank; expected REGEX=RANK"))?;
        Ok(Self { pattern: pattern.parse()?, rank })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for FixedRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.rank)
    }
}

/// Both are read from and written as text.
macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                // A document has many patterns: say which one.
                text.parse().map_err(|reason| format!("`{}`: {reason}", clip(&text)))
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}
as_text!(Pattern, FixedRank);
