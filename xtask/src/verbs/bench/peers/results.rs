//! What is measured, and where each result is kept: one file by model, program and budget.

use crate::shell::target;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// In percent of the expert parameters.
pub(crate) const BUDGETS: [f64; 2] = [22.2, 50.0];
/// Tokens of every evaluation text.
pub(crate) const TOKENS: usize = 32_768;
/// Of the calibration text: the default of this project's program.
pub(crate) const CALIBRATION_TOKENS: usize = 65_536;
/// The bundled models, the hardest first, with what they are.
pub(crate) const MODELS: [(&str, &str); 4] = [
    ("upcycled-distinct", "upcycled, mean cosine between the experts of a layer 0.31 to 0.36"),
    ("upcycled-alike", "upcycled, mean cosine 0.85 to 0.93"),
    ("second-mixtral", "trained from scratch, calibrated on Shakespeare, which differs from both texts"),
    ("tiny-mixtral", "trained from scratch"),
];
/// The texts to evaluate on.
pub(crate) const TEXTS: [&str; 2] = ["jack_sheppard", "inaugural_addresses"];

/// Where the results are.
pub(crate) fn folder() -> PathBuf {
    target().join("peers")
}

/// The file of one result.
pub(crate) fn result_file(model: &str, key: &str, budget: f64) -> PathBuf {
    folder().join(model).join(format!("{key}-{budget}.json"))
}

/// A result that was measured before.
pub(crate) fn stored(file: &Path) -> Result<Option<Value>> {
    if !file.exists() {
        return Ok(None);
    }
    serde_json::from_slice(&std::fs::read(file)?).with_context(|| file.display().to_string()).map(Some)
}
