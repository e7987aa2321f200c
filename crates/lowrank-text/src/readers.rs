//! What lies in files: documents as `.jsonl`, token ids as `.json` or `.ids`.
//!
//! Pure functions from text to values, in memory that is a small multiple of the text's. The error says what is wrong and
//! where; who calls knows the file.

use lowrank_model::display::{abridge, clip};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use std::fmt;

/// The `text` of every line.
pub fn documents_of_jsonl(text: &str) -> Result<Vec<String>, String> {
    #[derive(Deserialize)]
    struct Line {
        text: String,
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line)
                .map(|line: Line| line.text)
                .map_err(|error| format!("line {}: {}", number + 1, abridge(&error.to_string())))
        })
        .collect()
}

/// Token ids with whitespace between them.
pub fn ids_of_words(text: &str) -> Result<Vec<u32>, String> {
    text.split_whitespace()
        .map(|word| word.parse().map_err(|_| format!("`{}` is not a token id", clip(word))))
        .collect()
}

/// An array of token ids, or an array of such arrays: one stream each. A stream of which nothing can be predicted, as it
/// has no second token, is left out: a million of them are a small file and much memory.
pub fn ids_of_json(text: &str) -> Result<Vec<Vec<u32>>, String> {
    let Streams { one, many } = serde_json::from_str(text).map_err(|error| {
        format!(
            "is neither an array of token ids nor an array of such arrays: {}",
            abridge(&error.to_string())
        )
    })?;
    Ok(if many.is_empty() { vec![one] } else { many })
}

/// One stream, or many: never both.
#[derive(Default)]
struct Streams {
    one: Vec<u32>,
    many: Vec<Vec<u32>>,
}

/// A number, or a list of numbers.
enum Item {
    Id(u32),
    Stream(Vec<u32>),
}

/// Reads an item into memory that is used again.
struct ItemSeed;

impl<'de> DeserializeSeed<'de> for ItemSeed {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Item, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ItemSeed {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token id or an array of token ids")
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Item, E> {
        u32::try_from(number).map(Item::Id).map_err(|_| E::custom(format_args!("{number} is not a token id")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Item, A::Error> {
        let mut stream = Vec::new();
        while let Some(id) = list.next_element()? {
            stream.push(id);
        }
        stream.shrink_to_fit();
        Ok(Item::Stream(stream))
    }
}

impl<'de> Deserialize<'de> for Streams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StreamsVisitor;
        impl<'de> Visitor<'de> for StreamsVisitor {
            type Value = Streams;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Streams, A::Error> {
                let mut streams = Streams::default();
                let (mut ids, mut lists) = (false, false);
                while let Some(item) = list.next_element_seed(ItemSeed)? {
                    match item {
                        Item::Id(id) => {
                            ids = true;
                            streams.one.push(id);
                        }
                        Item::Stream(stream) => {
                            lists = true;
                            if stream.len() >= 2 {
                                streams.many.push(stream);
                            }
                        }
                    }
                    if ids && lists {
                        return Err(A::Error::custom("token ids and arrays of them side by side"));
                    }
                }
                Ok(streams)
            }
        }
        deserializer.deserialize_seq(StreamsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stream_or_many_are_read() {
        assert_eq!(ids_of_json("[1, 2, 4294967295]"), Ok(vec![vec![1, 2, u32::MAX]]));
        assert_eq!(ids_of_json("[[1, 2], [3], [], [4, 5, 6]]"), Ok(vec![vec![1, 2], vec![4, 5, 6]]));
        assert_eq!(ids_of_json("[]"), Ok(vec![vec![]]));
        assert_eq!(ids_of_words(" 1\n2\t3 "), Ok(vec![1, 2, 3]));
        assert_eq!(
            documents_of_jsonl("{\"text\": \"a\"}\n\n{\"text\": \"b\", \"x\": 1}"),
            Ok(vec!["a".into(), "b".into()])
        );
    }

    #[test]
    fn what_are_no_ids_is_refused_in_a_short_line() {
        let long = "x".repeat(1_000_000);
        for refused in [
            ids_of_json("[1, [2]]").unwrap_err(),
            ids_of_json("[[1], 2]").unwrap_err(),
            ids_of_json("[4294967296]").unwrap_err(),
            ids_of_json("[-1]").unwrap_err(),
            ids_of_json("[1.5]").unwrap_err(),
            ids_of_json("{}").unwrap_err(),
            ids_of_json("[[[1]]]").unwrap_err(),
            ids_of_json(&"[".repeat(1_000_000)).unwrap_err(),
            ids_of_json(&format!("[\"{long}\"]")).unwrap_err(),
            ids_of_words(&long).unwrap_err(),
            ids_of_words("1 \u{7}").unwrap_err(),
            documents_of_jsonl(&format!("{{\"text\": 1, \"x\": \"{long}\"}}")).unwrap_err(),
        ] {
            assert!(refused.len() < 1000 && !refused.contains(char::is_control), "{refused}");
        }
        assert!(documents_of_jsonl("\n\n{\"text\": 1}").unwrap_err().starts_with("line 3: "));
    }
}
