//! What a parser did with an input, as a number for its kind, and the checks of every refusal.

use lowrank_model::failure;
use std::error::Error;
use std::fmt::Debug;

/// Longest error message.
const MESSAGE_BYTES_MAX: usize = 8192;

/// Checks that an error message is one short line; returns a number for its kind.
pub(crate) fn refused(error: impl Debug + Into<Box<dyn Error>>) -> u64 {
    let kind = kind(&format!("{error:?}"));
    let message = failure::chain(&*error.into());
    assert!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes", message.len());
    assert!(!message.contains(char::is_control), "a message that breaks its line: {message:?}");
    sign(&kind)
}

/// The variant of an error and the message of the parser below it, without anything quoted from the input.
fn kind(debug: &str) -> String {
    let variant = debug.chars().take_while(char::is_ascii_alphabetic);
    let said = debug.split("Error(\"").nth(1).or_else(|| debug.strip_prefix('"')).unwrap_or_default();
    let said = said.chars().take_while(|c| !"`\"".contains(*c)).filter(char::is_ascii_alphabetic);
    variant.chain(said.take(32)).collect()
}

/// A number for a kind of outcome.
pub(crate) fn sign(kind: &str) -> u64 {
    u64::from_le_bytes(*blake3::hash(kind.as_bytes()).as_bytes().first_chunk().expect("32 bytes"))
}
