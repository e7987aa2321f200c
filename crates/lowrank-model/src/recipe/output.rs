//! How files are written.

use crate::budget::ByteSize;
use serde::{Deserialize, Serialize};

/// How files are written. Decides no number of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct OutputSettings {
    /// A new shard begins before this many bytes of tensors would be exceeded.
    pub max_shard_size: ByteSize,
    /// What becomes of the base's fp8 tensors outside the experts; `None`: kept, widened where a quantiser comes after.
    pub fp8: Option<Fp8>,
}

/// What becomes of the base's fp8 tensors outside the experts. Experts are bf16 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Fp8 {
    /// They stay as they are, and loaders have to read fp8
    Keep,
    /// They become bf16
    Widen,
}

impl Default for OutputSettings {
    fn default() -> Self {
        Self { max_shard_size: ByteSize(5_000_000_000), fp8: None }
    }
}
