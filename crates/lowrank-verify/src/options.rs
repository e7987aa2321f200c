//! What to verify with, and what is good enough.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Tokens of a window, unless told otherwise.
pub const WINDOW_TOKENS: usize = 256;

/// How to verify.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyOptions {
    /// How deep to look.
    pub depth: Depth,
    /// On what to run the models.
    pub text: TextSource,
    /// Tokens of a window; windows do not overlap and do not see each other.
    pub window: usize,
    /// Whole windows are taken from the start of the text until this many tokens; absent: all.
    pub max_tokens: Option<usize>,
    /// What is good enough.
    pub thresholds: Thresholds,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            depth: Depth::Full,
            text: TextSource::Passage,
            window: WINDOW_TOKENS,
            max_tokens: None,
            thresholds: Thresholds::default(),
        }
    }
}

/// How deep to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// Files only: tensors, counts, ranks, errors of the factors.
    Static,
    /// Files, then both models on the same tokens.
    Full,
}

/// Where the tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextSource {
    /// The bundled passage.
    Passage,
    /// `.txt`, `.jsonl` with a `text` field, or token ids as `.json` (an array, or an array of arrays) or `.ids`
    /// (whitespace between them).
    File(PathBuf),
}

/// Limits; absent ones are not held against the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Mean KL(original ‖ compressed), in nats per token.
    pub max_kl: Option<f64>,
    /// perplexity(compressed) / perplexity(original) − 1; `0.05` is 5 %.
    pub max_perplexity_increase: Option<f64>,
    /// Share of positions where both models rank the same token first.
    pub min_top1: Option<f64>,
    /// Largest local error of any layer's mixture.
    pub max_layer_error: Option<f64>,
}
