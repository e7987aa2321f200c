//! What to verify with, and what is good enough.

use lowrank_model::recipe::Bos;
use lowrank_text::{Passage, Pick, TextRequest, TextSource};
use serde::{Deserialize, Serialize};

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
    /// Whether a window starts with the tokenizer's BOS.
    pub bos: Bos,
    /// Whole windows are taken from the start of the text until this many tokens; absent: all.
    pub max_tokens: Option<usize>,
    /// What is good enough.
    pub thresholds: Thresholds,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            depth: Depth::Full,
            text: TextSource::Bundled(Passage::Verification),
            window: WINDOW_TOKENS,
            bos: Bos::Auto,
            max_tokens: None,
            thresholds: Thresholds::default(),
        }
    }
}

impl VerifyOptions {
    /// The tokens that these options mean.
    pub fn text_request(&self) -> TextRequest<'_> {
        let &Self { ref text, window, bos, max_tokens, .. } = self;
        TextRequest { source: text, window, bos, max_tokens, pick: Pick::First }
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

/// Limits; absent ones are not held against the report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// Mean KL(original ‖ compressed), in nats per token.
    pub max_kl: Option<f64>,
    /// perplexity(compressed) / perplexity(original) − 1; `0.05` is 5 %.
    pub max_perplexity_increase: Option<f64>,
    /// Share of positions where both models rank the same token first.
    pub min_top1: Option<f64>,
    /// Largest local error of any layer's MoE block.
    pub max_layer_error: Option<f64>,
}
