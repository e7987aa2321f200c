//! A checkpoint's `tokenizer.json` at work. The file is foreign, and the library that reads it panics on some of what such
//! a file can say; here that is an error like any other.

use lowrank_model::display::abridge;
use serde_json::Value;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Mutex, PoisonError};
use tokenizers::Tokenizer;

/// Encodes without special tokens.
pub(crate) struct Encoder(Tokenizer);

impl Encoder {
    /// Of the JSON of a tokenizer; the error is one line.
    pub(crate) fn new(json: &[u8]) -> Result<Self, String> {
        let mut json: Value = serde_json::from_slice(json).map_err(|error| abridge(&error.to_string()))?;
        if let Some(json) = json.as_object_mut() {
            // Nothing is decoded here.
            json.shift_remove("decoder");
        }
        let json = json.to_string();
        guarded(|| Tokenizer::from_bytes(json)).map(Self)
    }

    /// Ids that the tokenizer puts before a text by itself, by its post-processor: BOS, for most.
    pub(crate) fn prefix(&self) -> Result<Vec<u32>, String> {
        let encoding = guarded(|| self.0.encode("a", true))?;
        let is_special = encoding.get_special_tokens_mask().iter();
        let length = is_special.take_while(|&&special| special == 1).count();
        Ok(encoding.get_ids()[..length].to_vec())
    }

    /// Ids of a piece of text.
    pub(crate) fn ids(&self, piece: &str) -> Result<Vec<u32>, String> {
        Ok(guarded(|| self.0.encode(piece, false))?.get_ids().to_vec())
    }
}

/// What the library says, whether it returns it or panics with it.
fn guarded<T>(act: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    /// The hook belongs to the process.
    static HOOK: Mutex<()> = Mutex::new(());
    let alone = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = take_hook();
    // The panic becomes the error's one line; it is not told twice.
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
                Encoder::new(tokenizer(decoder, "null").as_bytes()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(encoder.ids("abba"), Ok(vec![2, 1, 0]));
        }
    }

    #[test]
    fn what_stands_before_a_text_is_the_post_processors() {
        let plain = tokenizer("null", "null");
        let before = |json: &str| Encoder::new(json.as_bytes()).unwrap_or_else(|e| panic!("{e}")).prefix();
        assert_eq!(before(&plain), Ok(vec![]));
        let template = r#""post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "b", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"b": {"id": "b", "ids": [1], "tokens": ["b"]}}}"#;
        assert_eq!(before(&plain.replace("\"post_processor\": null", template)), Ok(vec![1]));
    }

    #[test]
    fn a_prefix_longer_than_its_words_is_an_error_and_no_panic() {
        let refused = Encoder::new(tokenizer("null", "\"longer than b\"").as_bytes()).err();
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
            let what = Encoder::new(text.as_bytes()).err().expect("refused");
            assert!(what.len() < 1000 && !what.contains(char::is_control), "{what}");
        }
    }
}
