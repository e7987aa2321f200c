//! The fuzz targets: one function of bytes for every parser of foreign input. Both `cargo fuzz` (`fuzz/`) and the driver for
//! stable Rust (`main.rs`, `cargo xtask fuzz`) run them. Guarantees and figures: `docs/reliability.md`.
//!
//! A target panics if the code under test panics, accepts something that it must refuse, or reports an error in more than
//! one line. It returns a number for the kind of outcome, so that the driver recognises inputs with new outcomes.

mod checkpoint;
mod documents;
mod mutate;
mod weights;

pub use mutate::Mutator;

use std::fmt::{Debug, Display};

/// The function of a target.
pub type Body = fn(&[u8]) -> u64;

/// All targets by name.
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

/// The function of a target.
///
/// # Panics
/// If no target has this name.
pub fn target(name: &str) -> Body {
    TARGETS.iter().find(|(found, _)| *found == name).expect("a name in `TARGETS`").1
}

/// Longest error message.
const MESSAGE_BYTES_MAX: usize = 8192;

/// Checks that an error message is one short line; returns a number for its kind.
fn refused(error: &(impl Debug + Display)) -> u64 {
    let message = error.to_string();
    assert!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes", message.len());
    assert!(!message.contains(char::is_control), "a message that breaks its line: {message:?}");
    sign(&kind(&format!("{error:?}")))
}

/// The variant of an error and the message of the parser below it, without anything quoted from the input.
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
