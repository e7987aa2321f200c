//! What reads bytes that somebody else wrote, as functions of those bytes: bodies of the targets of `cargo fuzz` (`fuzz/`)
//! and of the driver that runs on stable (`main.rs`, `cargo xtask fuzz`). Promises and figures: `docs/reliability.md`.
//!
//! A body panics where a promise is broken: the code under test did, or accepted what it must not, or says what is wrong
//! in more than one line. It returns a sign of what happened, by which the driver knows inputs that lead somewhere new.

mod checkpoint;
mod documents;
mod mutate;
mod weights;

pub use mutate::Mutator;

use std::fmt::{Debug, Display};

/// A body.
pub type Body = fn(&[u8]) -> u64;

/// Every target by name.
pub const TARGETS: [(&str, Body); 12] = [
    ("header", weights::header),
    ("index", weights::index),
    ("config", weights::config),
    ("checkpoint", checkpoint::checkpoint),
    ("plan", documents::plan),
    ("rank_map", documents::rank_map),
    ("budget", documents::budget),
    ("text", documents::text),
    ("tokenizer", documents::tokenizer),
    ("cache", documents::cache),
    ("journal", documents::journal),
    ("report", documents::report),
];

/// The body of a target.
///
/// # Panics
/// If there is none of that name.
pub fn target(name: &str) -> Body {
    TARGETS.iter().find(|(found, _)| *found == name).expect("a name in `TARGETS`").1
}

/// Longest message of a refusal.
const MESSAGE_BYTES_MAX: usize = 8192;

/// Holds a refusal to what is promised of it: one short line. → a sign of its kind.
fn refused(error: &(impl Debug + Display)) -> u64 {
    let message = error.to_string();
    assert!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes", message.len());
    assert!(!message.contains(char::is_control), "a message that breaks its line: {message:?}");
    sign(&kind(&format!("{error:?}")))
}

/// The variant of an error, and what a parser below it complains of; nothing that is quoted from the input.
fn kind(debug: &str) -> String {
    let variant = debug.chars().take_while(char::is_ascii_alphabetic);
    let said = debug.split("Error(\"").nth(1).or_else(|| debug.strip_prefix('"')).unwrap_or_default();
    let said = said.chars().take_while(|c| !"`\"".contains(*c)).filter(char::is_ascii_alphabetic);
    variant.chain(said.take(32)).collect()
}

/// A number for a kind of outcome.
fn sign(kind: &str) -> u64 {
    u64::from_le_bytes(*blake3::hash(kind.as_bytes()).as_bytes().first_chunk().expect("32 bytes"))
}
