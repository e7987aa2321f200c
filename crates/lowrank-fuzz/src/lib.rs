//! The fuzz targets: one function of bytes for every parser of foreign input, for the planner, and for the writer. Both `cargo fuzz` (`fuzz/`) and the driver for
//! stable Rust (`main.rs`, `cargo xtask fuzz`) run them. Guarantees and figures: `docs/reliability.md`.
//!
//! A target panics if the code under test panics, accepts something that it must refuse, or reports an error in more than
//! one line. It returns a number for the kind of outcome, so that the driver recognises inputs with new outcomes.

mod checkpoint;
mod documents;
mod mutate;
mod outcome;
mod planner;
mod weights;
mod writer;

pub use mutate::Mutator;

/// The function of a target.
pub type Body = fn(&[u8]) -> u64;

/// All targets by name.
pub const TARGETS: [(&str, Body); 14] = [
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
    ("planner", planner::planner),
    ("writer", writer::writer),
];

/// The function of a target.
///
/// # Panics
/// If no target has this name.
pub fn target(name: &str) -> Body {
    TARGETS.iter().find(|(found, _)| *found == name).expect("a name in `TARGETS`").1
}
