//! A checkpoint's `tokenizer.json`, used for encoding alone. The file is foreign, and the library that reads it panics on
//! some of what such a file can hold; here that is an error like any other.
//!
//! Trainers save a tokenizer with `truncation` and `padding` switched on, and transformers resets both at every call. Here
//! they are removed before the library reads them, as is `dropout`, which would make ids depend on chance. Tokens that
//! only `tokenizer_config.json` declares (`added_tokens_decoder`) are added, as transformers does.

use crate::readers::without_mark;
use lowrank_model::display::abridge;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, PoisonError};
use tokenizers::{AddedToken, Tokenizer};

/// Encodes without special tokens.
pub(crate) struct Encoder {
    tokenizer: Tokenizer,
    /// What the model calls a word that it does not know.
    unknown: Option<(u32, String)>,
}

/// `tokenizer_config.json`, as far as it decides ids.
#[derive(Deserialize, Default)]
struct Config {
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, Added>,
}

/// A token that is no word of the model's.
#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Added {
    fn token(&self) -> AddedToken {
        AddedToken::from(self.content.clone(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized.unwrap_or(!self.special))
    }
}

impl Encoder {
    /// From `tokenizer.json` and, if there is one, `tokenizer_config.json`; the error is one line.
    pub(crate) fn new(json: &[u8], config: Option<&[u8]>) -> Result<Self, String> {
        let mut json: Value =
            serde_json::from_slice(without_mark(json)).map_err(|error| abridge(&error.to_string()))?;
        let mut unknown = None;
        if let Some(json) = json.as_object_mut() {
            // Nothing is decoded here.
            for key in ["decoder", "truncation", "padding"] {
                json.shift_remove(key);
            }
            if let Some(model) = json.get_mut("model").and_then(Value::as_object_mut) {
                model.shift_remove("dropout");
                unknown = model.get("unk_token").and_then(Value::as_str).map(str::to_owned);
            }
        }
        let json = json.to_string();
        let mut tokenizer = guarded(|| Tokenizer::from_bytes(json))?;
        let config = match config {
            None => Config::default(),
            Some(config) => serde_json::from_slice(without_mark(config))
                .map_err(|error| format!("tokenizer_config.json: {}", abridge(&error.to_string())))?,
        };
        // In the order of their ids, which is not that of the keys as text.
        let mut added: Vec<(u32, &Added)> = config
            .added_tokens_decoder
            .iter()
            .filter_map(|(id, added)| Some((id.parse().ok()?, added)))
            .collect();
        added.sort_by_key(|(id, _)| *id);
        for (_, added) in added {
            if tokenizer.token_to_id(&added.content).is_none() {
                guarded(|| Ok(tokenizer.add_tokens(&[added.token()])))?;
            }
        }
        let unknown = unknown.and_then(|token| Some((tokenizer.token_to_id(&token)?, token)));
        Ok(Self { tokenizer, unknown })
    }

    /// The id and the name of the token for words that the model does not know.
    pub(crate) fn unknown(&self) -> Option<(u32, &str)> {
        self.unknown.as_ref().map(|(id, token)| (*id, token.as_str()))
    }

    /// Ids that the tokenizer puts before a text by itself, by its post-processor: BOS, for most.
    pub(crate) fn prefix(&self) -> Result<Vec<u32>, String> {
        let encoding = guarded(|| self.tokenizer.encode("a", true))?;
        let is_special = encoding.get_special_tokens_mask().iter();
        let length = is_special.take_while(|&&special| special == 1).count();
        Ok(encoding.get_ids()[..length].to_vec())
    }

    /// Ids of a piece of text.
    pub(crate) fn ids(&self, piece: &str) -> Result<Vec<u32>, String> {
        Ok(guarded(|| self.tokenizer.encode(piece, false))?.get_ids().to_vec())
    }
}

/// What the library says, whether it returns it or panics with it.
fn guarded<T>(act: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    /// The hook belongs to the process.
    static HOOK: Mutex<()> = Mutex::new(());
    let alone = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = take_hook();
    // The panic becomes the error's one line; it is not printed twice.
    set_hook(Box::new(|_| ()));
    // Whatever the library leaves half done is dropped with the error.
    let done = catch_unwind(AssertUnwindSafe(act));
    set_hook(hook);
    drop(alone);
    match done {
        Ok(done) => done.map_err(|error| abridge(&error.to_string())),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(format!("the tokenizer library cannot work with it ({})", abridge(said)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "ab" is a word; a decoder and a prefix as given.
    fn tokenizer(decoder: &str, prefix: &str) -> String {
        format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": null, "post_processor": null, "decoder": {decoder},
                "model": {{"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": {prefix},
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {{"a": 0, "b": 1, "ab": 2}}, "merges": ["a b"]}}}}"#
        )
    }

    #[test]
    fn a_tokenizer_encodes_whatever_its_decoder_is() {
        for decoder in ["null", "{\"type\": \"Fuse\"}", "{\"type\": \"of another library\"}"] {
            let encoder =
                Encoder::new(tokenizer(decoder, "null").as_bytes(), None).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(encoder.ids("abba"), Ok(vec![2, 1, 0]));
        }
    }

    /// The tokenizer above with one more key, or with a key of its model changed.
    fn changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut json = serde_json::from_str(&tokenizer("null", "null")).unwrap();
        change(&mut json);
        json.to_string().into_bytes()
    }

    fn ids(json: &[u8], config: Option<&str>, text: &str) -> Vec<u32> {
        let encoder = Encoder::new(json, config.map(str::as_bytes)).unwrap_or_else(|e| panic!("{e}"));
        encoder.ids(text).unwrap()
    }

    #[test]
    fn what_a_trainer_left_switched_on_changes_no_ids() {
        let text = "ab".repeat(50);
        let right = vec![2; 50];
        let json = |key: &'static str, value: Value| changed(move |json| json[key] = value);
        for tokenizer in [
            json(
                "truncation",
                serde_json::json!({"direction": "Left", "max_length": 3, "strategy": "OnlyFirst", "stride": 1}),
            ),
            json("truncation", serde_json::json!({"of": "another library"})),
            json(
                "padding",
                serde_json::json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 64, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}),
            ),
            json(
                "padding",
                serde_json::json!({"strategy": {"Fixed": 77}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0, "pad_token": "b"}),
            ),
            changed(|json| json["model"]["dropout"] = 0.9.into()),
        ] {
            assert_eq!(ids(&tokenizer, None, &text), right);
        }
    }

    #[test]
    fn a_token_that_only_the_config_declares_is_added() {
        let json = tokenizer("null", "null");
        let config = r#"{"added_tokens_decoder": {"10": {"content": "<z>", "special": true}, "3": {"content": "<y>"},
            "1": {"content": "b"}}}"#;
        assert_eq!(ids(json.as_bytes(), Some(config), "a<y>b<z>a"), [0, 3, 1, 4, 0]);
        assert_eq!(ids(json.as_bytes(), Some("{\"model_max_length\": 1e30}"), "ab"), [2]);
        let refused = Encoder::new(json.as_bytes(), Some(b"[")).err().expect("refused");
        assert!(refused.starts_with("tokenizer_config.json: "), "{refused}");
    }

    #[test]
    fn a_byte_order_mark_before_the_tokenizer_is_skipped() {
        let json = ["\u{feff}", &tokenizer("null", "null")].concat();
        assert_eq!(ids(json.as_bytes(), None, "ab"), [2]);
    }

    #[test]
    fn what_stands_before_a_text_is_the_post_processors() {
        let plain = tokenizer("null", "null");
        let before =
            |json: &str| Encoder::new(json.as_bytes(), None).unwrap_or_else(|e| panic!("{e}")).prefix();
        assert_eq!(before(&plain), Ok(vec![]));
        let template = r#""post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "b", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"b": {"id": "b", "ids": [1], "tokens": ["b"]}}}"#;
        assert_eq!(before(&plain.replace("\"post_processor\": null", template)), Ok(vec![1]));
    }

    #[test]
    fn a_prefix_longer_than_its_words_is_an_error_and_no_panic() {
        let refused = Encoder::new(tokenizer("null", "\"longer than b\"").as_bytes(), None).err();
        assert!(refused.as_ref().is_some_and(|what| what.contains("library")), "{refused:?}");
    }

    #[test]
    fn a_tokenizer_that_is_no_json_is_refused_in_a_short_line() {
        for text in [
            "",
            "{",
            "[]",
            "{\"a\": \"\\ud800\"}",
            &"[".repeat(100_000),
            "version https://git-lfs.github.com/spec/v1",
        ] {
            let what = Encoder::new(text.as_bytes(), None).err().expect("refused");
            assert!(what.len() < 1000 && !what.contains(char::is_control), "{what}");
        }
    }
}
