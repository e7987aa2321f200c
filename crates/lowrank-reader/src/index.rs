//! `model.safetensors.index.json`: which shard holds which tensor.
//!
//! A pure function from bytes to [`Index`]. Sizes in its `metadata` are not believed: they are counted from headers.

use crate::error::{ReadError, clip};
use crate::header::{TENSORS_MAX, is_printable};
use crate::json;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::error::Category;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path};

/// The index of a model with 1,000 tensors has 90 kB; that of one with 100,000 tensors 10 MB.
pub const INDEX_BYTES_MAX: u64 = 32 << 20;

/// Tensor to shard. Every shard is a plain file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Tensor name to shard name.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads and checks an index; `path` serves the messages.
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self, ReadError> {
        json::refuse_mark(path, json)?;
        let RawIndex { weight_map } =
            serde_json::from_slice(json).map_err(|source| match source.classify() {
                Category::Data => ReadError::NoIndex { path: path.into(), source },
                Category::Io | Category::Syntax | Category::Eof => {
                    ReadError::Json { path: path.into(), source }
                }
            })?;
        let Pairs(pairs) = weight_map.unwrap_or_default();
        if pairs.len() > TENSORS_MAX {
            return Err(ReadError::TooManyTensors { path: path.into(), limit: TENSORS_MAX });
        }
        let mut weight_map = BTreeMap::new();
        for (tensor, shard) in pairs {
            let path = path.to_path_buf();
            if !is_printable(&tensor) {
                return Err(ReadError::BadTensorName { path, tensor: clip(&tensor) });
            }
            if !is_plain_file_name(&shard) {
                return Err(ReadError::UnsafeShardName { path, tensor, shard: clip(&shard) });
            }
            if weight_map.insert(tensor.clone(), shard).is_some() {
                return Err(ReadError::IndexNamesTwice { path, tensor });
            }
        }
        if weight_map.is_empty() {
            return Err(ReadError::EmptyIndex { path: path.into() });
        }
        Ok(Self { weight_map })
    }

    /// The shards it names, sorted.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// One normal component: no `..`, no root, no folder, nothing that would not survive being printed.
fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let normal = matches!(components.next(), Some(Component::Normal(first)) if first.to_str() == Some(name));
    normal && components.next().is_none() && !name.contains('\\') && is_printable(name)
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: Option<Pairs>,
}

/// Pairs in the order of the text, equal keys included; at most one more than [`TENSORS_MAX`].
#[derive(Default)]
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to shard names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while pairs.len() <= TENSORS_MAX
                    && let Some(pair) = map.next_entry()?
                {
                    pairs.push(pair);
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Index, ReadError> {
        Index::parse(Path::new("index.json"), json.as_bytes())
    }

    #[test]
    fn an_index_names_each_shard_once() {
        let index = parse(r#"{"metadata":{"total_size":1},"weight_map":{"b":"2","a":"1","c":"1"}}"#).unwrap();
        assert_eq!(index.shards().into_iter().collect::<Vec<_>>(), ["1", "2"]);
    }

    #[test]
    fn shards_outside_the_folder_are_refused() {
        for shard in ["../x", "/etc/passwd", "a/b", "..", ".", "", "a/", "./a", "a\\\\b", "a\\nb"] {
            let error = parse(&format!(r#"{{"weight_map":{{"t":"{shard}"}}}}"#)).unwrap_err();
            assert!(matches!(error, ReadError::UnsafeShardName { .. }), "{shard}: {error}");
        }
    }

    #[test]
    fn an_index_of_a_million_tensors_is_refused() {
        let pairs: Vec<String> = (0..1_000_000).map(|at| format!("\"{at}\":\"s\"")).collect();
        let error = parse(&format!("{{\"weight_map\":{{{}}}}}", pairs.join(","))).unwrap_err();
        assert!(matches!(error, ReadError::TooManyTensors { .. }), "{error}");
    }

    #[test]
    fn what_is_no_index_is_refused() {
        for json in ["", "{", "[", r#"{"weight_map":{"#] {
            assert!(matches!(parse(json), Err(ReadError::Json { .. })), "{json:.40}");
        }
        for json in ["3", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":1}}"#, r#"{"weight_map":{"a":null}}"#]
        {
            assert!(matches!(parse(json), Err(ReadError::NoIndex { .. })), "{json:.40}");
        }
        for json in ["{}", r#"{"weight_map":null}"#, r#"{"weight_map":{}}"#] {
            assert!(matches!(parse(json), Err(ReadError::EmptyIndex { .. })), "{json:.40}");
        }
        assert!(matches!(
            parse(r#"{"weight_map":{"a":"1","a":"1"}}"#),
            Err(ReadError::IndexNamesTwice { tensor, .. }) if tensor == "a"
        ));
        let bomb = format!(r#"{{"x":{}}}"#, "[".repeat(1_000_000));
        assert!(matches!(parse(&bomb), Err(ReadError::Json { .. })));
    }
}
