//! A flat rank map: `{"layers.0.experts.0.gate": 96, …}`, or with the names of the checkpoint's own modules.
//!
//! A pure function from text to ranks by matrix. Whether they fit a model is for the plan to say.

use crate::MatrixId;
use crate::display::{abridge, clip};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

/// The longest plan or rank map that is read; one of 196,608 matrices, the most a model may have, is shorter.
pub const JSON_BYTES_MAX: u64 = 64 << 20;

/// Why a rank map was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RankMapError {
    /// Not a map from names of expert matrices to ranks.
    #[error("{0}")]
    Json(String),
    /// The map says two things about one matrix.
    #[error("{0} is named twice; keep one of its ranks")]
    Twice(MatrixId),
}

/// Reads a rank map.
pub fn parse(json: &[u8]) -> Result<BTreeMap<MatrixId, usize>, RankMapError> {
    let RawMap { ranks, twice } =
        serde_json::from_slice(json).map_err(|error| RankMapError::Json(abridge(&error.to_string())))?;
    match twice {
        Some(name) => Err(RankMapError::Twice(name)),
        None => Ok(ranks),
    }
}

/// A map, and the first matrix that it names twice.
struct RawMap {
    ranks: BTreeMap<MatrixId, usize>,
    twice: Option<MatrixId>,
}

impl<'de> Deserialize<'de> for RawMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawMapVisitor;
        impl<'de> Visitor<'de> for RawMapVisitor {
            type Value = RawMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from names of expert matrices to ranks")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawMap, A::Error> {
                let mut raw = RawMap { ranks: BTreeMap::new(), twice: None };
                while let Some(name) = map.next_key::<MatrixId>()? {
                    let rank = map.next_value().map_err(|error| {
                        A::Error::custom(format_args!("{name}: {}", clip(&error.to_string())))
                    })?;
                    match raw.ranks.entry(name) {
                        Entry::Vacant(vacant) => drop(vacant.insert(rank)),
                        Entry::Occupied(_) => raw.twice = raw.twice.or(Some(name)),
                    }
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_map(RawMapVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const W1: &str = "model.layers.0.block_sparse_moe.experts.0.w1";
    const GATE: &str = "layers.0.experts.0.gate";

    #[test]
    fn names_become_matrices() {
        let ranks = parse(format!("{{\"{W1}\": 7, \"{}\": 9}}", W1.replace("w1", "w3")).as_bytes()).unwrap();
        assert_eq!(
            ranks.into_iter().map(|(id, rank)| (id.to_string(), rank)).collect::<Vec<_>>(),
            [(GATE.to_owned(), 7), (GATE.replace("gate", "up"), 9)]
        );
        assert_eq!(parse(b"{}"), Ok(BTreeMap::new()));
    }

    #[test]
    fn a_matrix_that_stands_twice_is_named() {
        for (second, rank) in [(W1, 7), (W1, 8), (GATE, 7)] {
            let text = format!("{{\"{W1}\": 7, \"{second}\": {rank}}}");
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, RankMapError::Twice(name) if name.to_string() == GATE), "{error}");
        }
    }

    #[test]
    fn what_is_no_rank_map_is_refused_with_its_place() {
        for (text, part) in [
            ("", "line 1"),
            ("[1]", "a map from names of expert matrices"),
            ("{\"lm_head\": 3}", "`lm_head` is not the name of an expert matrix"),
            (&format!("{{\"{W1}\": -3}}"), GATE),
            (&format!("{{\"{GATE}\": 1.5}}"), GATE),
            (&format!("{{\"{W1}\": \"{}\"}}", "x".repeat(100_000)), GATE),
            (&format!("{{\"{}\": 3}}", "\\u0007".repeat(100_000)), "line 1"),
            (&"[".repeat(100_000), "a map"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part) && error.len() < 1000, "{error}");
            assert!(!error.contains(char::is_control), "{error:?}");
        }
    }
}
