//! What lies in files: plain text, documents as `.jsonl` or `.json`, token ids as `.json` or `.ids`.
//!
//! Pure functions from bytes to values, in memory that is a small multiple of the file's. The error says what was found,
//! where, and what to do; the caller knows the file.

use lowrank_model::display::{abridge, clip};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// UTF-8's byte order mark, which some editors and spreadsheets write.
const MARK: char = '\u{feff}';

/// Bytes without the mark at their beginning.
pub(crate) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

/// The characters of a text file: UTF-8 without its mark. Anything else is refused by what it is.
pub fn text_of(bytes: Vec<u8>) -> Result<String, String> {
    const CONVERT: &str = "expected UTF-8 text; convert it, as with `iconv -f";
    for (magic, what) in [
        (&b"\x1f\x8b"[..], "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
        (b"%PDF", "PDF"),
        (b"PAR1", "Parquet"),
    ] {
        if bytes.starts_with(magic) {
            return Err(format!("is {what} data, expected UTF-8 text; unpack it, or export its text"));
        }
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(format!("is UTF-16 by its byte order mark, {CONVERT} UTF-16 -t UTF-8`"));
    }
    if let Some(at) = bytes.iter().position(|&byte| byte == 0) {
        return Err(format!(
            "byte {at} is NUL: binary data, or UTF-16 without its byte order mark; expected UTF-8 text"
        ));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let (at, byte) = (error.utf8_error().valid_up_to(), error.utf8_error().error_len());
        match byte {
            None => format!("ends inside a UTF-8 character, at byte {at}: it was cut there; cut it at a line's end"),
            Some(_) => {
                let byte = error.as_bytes()[at];
                format!("byte {at} is {byte:#04x}, which is not UTF-8 (perhaps Latin-1), {CONVERT} LATIN1 -t UTF-8`")
            }
        }
    })?;
    Ok(match text.strip_prefix(MARK) {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// What a `.json` file holds.
#[derive(Debug, PartialEq, Eq)]
pub enum JsonContent {
    /// Texts and chats.
    Documents(Vec<Document>),
    /// Streams of token ids.
    Ids(Vec<Vec<u32>>),
}

/// A text, or a chat that a model's template makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// As it is.
    Text(String),
    /// `messages`, each an object with a `role`.
    Chat(Vec<Value>),
}

/// Every line's text: its `text` field, or the line itself where it is a JSON string; or the chat in its `messages`.
pub fn documents_of_jsonl(text: &str) -> Result<Vec<Document>, String> {
    let lines = text.lines().map(|line| line.trim_start_matches(MARK)).enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let refused = |what: &str| format!("line {}: {}", number + 1, abridge(what));
            let mut line = serde_json::Deserializer::from_str(line);
            let item = ItemSeed.deserialize(&mut line).and_then(|item| line.end().map(|()| item));
            match item.map_err(|error| refused(&without_place(&error)))? {
                Item::Document(document) => Ok(document),
                Item::Id(_) | Item::Stream(_) => {
                    Err(refused("is no object with a `text`; give token ids as .json or .ids"))
                }
            }
        })
        .collect()
}

/// What is wrong, without serde's own ` at line 1 column 7`, which counts from the start of the row.
fn without_place(error: &serde_json::Error) -> String {
    let (said, place) = (error.to_string(), format!(" at line {} column {}", error.line(), error.column()));
    said.strip_suffix(&place).unwrap_or(&said).to_owned()
}

/// Token ids with whitespace between them.
pub fn ids_of_words(text: &str) -> Result<Vec<u32>, String> {
    text.split_whitespace()
        .map(|word| word.parse().map_err(|_| format!("`{}` is not a token id", clip(word))))
        .collect()
}

/// An array of token ids or an array of such arrays, one stream each; or an array of texts, as strings or as objects with
/// a `text`. A stream of which nothing can be predicted, as it has no second token, is left out: a million of them are a
/// small file and much memory.
pub fn content_of_json(text: &str) -> Result<JsonContent, String> {
    let Items { one, many, documents } = serde_json::from_str(text).map_err(|error| {
        format!(
            "is neither an array of texts nor one of token ids or of arrays of them: {}",
            abridge(&error.to_string())
        )
    })?;
    Ok(match (documents.is_empty(), many.is_empty()) {
        (false, _) => JsonContent::Documents(documents),
        (true, false) => JsonContent::Ids(many),
        (true, true) => JsonContent::Ids(vec![one]),
    })
}

/// One stream, or many, or texts: only one of them has anything in it.
#[derive(Default)]
struct Items {
    one: Vec<u32>,
    many: Vec<Vec<u32>>,
    documents: Vec<Document>,
}

/// A number, a list of numbers, or a document.
enum Item {
    Id(u32),
    Stream(Vec<u32>),
    Document(Document),
}

impl Item {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Id(_) => "token ids",
            Self::Stream(_) => "arrays of token ids",
            Self::Document(_) => "texts",
        }
    }
}

/// Reads one item.
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
        f.write_str("an object with a `text`, a string, a token id or an array of token ids")
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Item, E> {
        u32::try_from(number).map(Item::Id).map_err(|_| E::custom(format_args!("{number} is not a token id")))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Document(Document::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Item, A::Error> {
        let mut stream = Vec::new();
        while let Some(id) = list.next_element()? {
            stream.push(id);
        }
        stream.shrink_to_fit();
        Ok(Item::Stream(stream))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Item, A::Error> {
        let (mut text, mut chat, mut others) = (None, None, Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            if key == "text" {
                let value = map.next_value();
                let value = value
                    .map_err(|error| A::Error::custom(format_args!("`text`: {}", clip(&error.to_string()))));
                if text.replace(value?).is_some() {
                    return Err(A::Error::duplicate_field("text"));
                }
            } else if key == "messages" {
                let value = map.next_value::<Vec<Value>>();
                let value = value.map_err(|error| {
                    A::Error::custom(format_args!("`messages`: {}", clip(&error.to_string())))
                })?;
                let role = |message: &Value| message.get("role").is_some_and(Value::is_string);
                if value.is_empty() || !value.iter().all(role) {
                    return Err(A::Error::custom("`messages` is no list of objects with a `role`"));
                }
                if chat.replace(value).is_some() {
                    return Err(A::Error::duplicate_field("messages"));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
                if others.len() < KEYS_SHOWN {
                    others.push(clip(&key));
                }
            }
        }
        let document = text.map(Document::Text).or(chat.map(Document::Chat));
        document.map(Item::Document).ok_or_else(|| A::Error::custom(without_text(&others)))
    }
}

/// Keys of an object that an error names.
const KEYS_SHOWN: usize = 6;

/// What to do with a row that has these keys and no `text`.
fn without_text(keys: &[String]) -> String {
    let named = |known: &[&str]| {
        let found: Vec<_> =
            keys.iter().filter(|key| known.contains(&key.as_str())).map(|key| format!("`{key}`")).collect();
        (!found.is_empty()).then(|| found.join(" and "))
    };
    if let Some(chat) = named(&["conversation", "conversations"]) {
        format!(
            "there is no `text`, but a chat in {chat}; write it as `messages`, a list of {{\"role\", \"content\"}}, or as `text`, \
             rendered by the model's chat template (tokenizer.apply_chat_template(…, tokenize=False))"
        )
    } else if let Some(ids) = named(&["input_ids", "token_ids", "tokens"]) {
        format!("there is no `text`, but {ids}; give token ids as a .json file, an array of arrays")
    } else if let Some(pair) = named(&[
        "prompt",
        "response",
        "completion",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "chosen",
    ]) {
        format!("there is no `text`, but {pair}; join them to one `text` as the model is to see them")
    } else if keys.is_empty() {
        "there is no `text`: the object is empty".to_owned()
    } else {
        let keys: Vec<_> = keys.iter().map(|key| format!("`{key}`")).collect();
        format!("there is no `text`, but {}; call the field that holds the text `text`", keys.join(", "))
    }
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemsVisitor;
        impl<'de> Visitor<'de> for ItemsVisitor {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Items, A::Error> {
                let mut items = Items::default();
                let mut kind = None;
                while let Some(item) = list.next_element_seed(ItemSeed)? {
                    let first = *kind.get_or_insert(item.kind());
                    if first != item.kind() {
                        return Err(A::Error::custom(format_args!(
                            "{first} and {} side by side",
                            item.kind()
                        )));
                    }
                    match item {
                        Item::Id(id) => items.one.push(id),
                        Item::Stream(stream) if stream.len() >= 2 => items.many.push(stream),
                        Item::Stream(_) => {}
                        Item::Document(document) => items.documents.push(document),
                    }
                }
                Ok(items)
            }
        }
        deserializer.deserialize_seq(ItemsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Document {
        Document::Text(text.to_owned())
    }

    #[test]
    fn one_stream_or_many_are_read() {
        assert_eq!(content_of_json("[1, 2, 4294967295]"), Ok(JsonContent::Ids(vec![vec![1, 2, u32::MAX]])));
        let many = vec![vec![1, 2], vec![4, 5, 6]];
        assert_eq!(content_of_json("[[1, 2], [3], [], [4, 5, 6]]"), Ok(JsonContent::Ids(many)));
        assert_eq!(content_of_json("[]"), Ok(JsonContent::Ids(vec![vec![]])));
        assert_eq!(ids_of_words(" 1\n2\t3 "), Ok(vec![1, 2, 3]));
        assert_eq!(
            documents_of_jsonl("{\"text\": \"a\"}\n\n{\"text\": \"b\", \"x\": 1}"),
            Ok(vec![text("a"), text("b")])
        );
    }

    #[test]
    fn texts_are_read_where_their_meaning_is_clear() {
        let documents = vec![text("a\n"), text("")];
        for text in [r#"["a\n", ""]"#, r#"[{"text": "a\n", "meta": {"text": 1}}, {"id": 7, "text": ""}]"#] {
            assert_eq!(content_of_json(text), Ok(JsonContent::Documents(documents.clone())), "{text}");
        }
        // Two files with marks, joined; Windows' line ends; a line that is a string.
        let rows = "\u{feff}{\"text\": \"a\"}\r\n\u{feff}{\"text\": \"b\"}\r\n\r\n\"c\"";
        assert_eq!(documents_of_jsonl(rows).unwrap(), ["a", "b", "c"].map(text));
    }

    #[test]
    fn chats_are_read_beside_texts_and_must_have_roles() {
        let rows = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"id\": 1}\n{\"text\": \"b\"}";
        let chat = serde_json::json!({"role": "user", "content": "a"});
        assert_eq!(documents_of_jsonl(rows).unwrap(), [Document::Chat(vec![chat]), text("b")]);
        for wrong in ["[]", "[1]", "[{\"content\": \"a\"}]", "\"a\"", "[{\"role\": 1}]"] {
            let refused = documents_of_jsonl(&format!("{{\"messages\": {wrong}}}")).unwrap_err();
            assert!(refused.contains("`messages`"), "{refused}");
        }
    }

    #[test]
    fn a_row_without_a_text_is_refused_by_what_it_has() {
        for (row, parts) in [
            (r#"{"conversations": [], "id": 1}"#, &["a chat in `conversations`", "apply_chat_template"][..]),
            (r#"{"instruction": "a", "output": "b"}"#, &["`instruction` and `output`", "join them"]),
            (r#"{"input_ids": [1]}"#, &["`input_ids`", ".json"]),
            (r#"{"content": "a", "url": "b"}"#, &["`content`, `url`", "call the field"]),
            ("{}", &["empty"]),
            (r#"{"text": null}"#, &["`text`: ", "null"]),
            (r#"{"text": "a", "text": "b"}"#, &["duplicate"]),
            ("[1, 2]", &["token ids as .json"]),
            (r#"{"text": "a"} {"text": "b"}"#, &["trailing"]),
        ] {
            for refused in
                [documents_of_jsonl(row).unwrap_err(), content_of_json(&format!("[{row}, 1]")).unwrap_err()]
            {
                assert!(refused.len() < 1000, "{refused}");
            }
            let refused = documents_of_jsonl(row).unwrap_err();
            assert!(parts.iter().all(|part| refused.contains(part)), "{row}: {refused}");
            assert!(refused.starts_with("line 1: "), "{refused}");
        }
    }

    #[test]
    fn what_is_no_utf_8_is_refused_by_what_it_is() {
        assert_eq!(text_of(b"\xef\xbb\xbfa\xc3\xa4".to_vec()), Ok("aä".to_owned()));
        let wide: Vec<u8> = "abc".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (bytes, parts) in [
            ([b"\xff\xfe", &wide[..]].concat(), &["UTF-16", "iconv"][..]),
            ([b"\xfe\xff", &wide[..]].concat(), &["UTF-16", "iconv"]),
            (wide, &["byte 1 is NUL", "UTF-16"]),
            (vec![0; 100], &["byte 0 is NUL"]),
            (b"caf\xe9 au lait".to_vec(), &["byte 3 is 0xe9", "Latin-1", "expected UTF-8"]),
            (b"caf\xc3".to_vec(), &["ends inside a UTF-8 character"]),
            (b"\x1f\x8b\x08".to_vec(), &["gzip"]),
            (b"PAR1".to_vec(), &["Parquet"]),
        ] {
            let refused = text_of(bytes).unwrap_err();
            assert!(parts.iter().all(|part| refused.contains(part)), "{refused}");
        }
    }

    #[test]
    fn what_are_no_ids_is_refused_in_a_short_line() {
        let long = "x".repeat(1_000_000);
        for refused in [
            content_of_json("[1, [2]]").unwrap_err(),
            content_of_json("[[1], 2]").unwrap_err(),
            content_of_json("[4294967296]").unwrap_err(),
            content_of_json("[-1]").unwrap_err(),
            content_of_json("[1.5]").unwrap_err(),
            content_of_json("{}").unwrap_err(),
            content_of_json("[[[1]]]").unwrap_err(),
            content_of_json(&"[".repeat(1_000_000)).unwrap_err(),
            content_of_json(&format!("[1, \"{long}\"]")).unwrap_err(),
            content_of_json(&format!("[[\"{long}\"]]")).unwrap_err(),
            ids_of_words(&long).unwrap_err(),
            ids_of_words("1 \u{7}").unwrap_err(),
            documents_of_jsonl(&format!("{{\"text\": 1, \"x\": \"{long}\"}}")).unwrap_err(),
        ] {
            assert!(refused.len() < 1000 && !refused.contains(char::is_control), "{refused}");
        }
        let refused = documents_of_jsonl("\n\n{\"text\": 1}").unwrap_err();
        assert!(refused.starts_with("line 3: ") && !refused.contains("column"), "{refused}");
    }
}
