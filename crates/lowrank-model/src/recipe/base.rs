//! What of the base is taken, and as what. The points of a sweep share one opened base, so they do not differ in it.

use serde::{Deserialize, Serialize};

/// What of the base is taken, and as what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct BaseSettings {
    /// What becomes of the base's fp8 tensors outside the experts; `None`: kept, widened where a quantiser comes after.
    pub fp8: Option<Fp8>,
    /// What becomes of shared experts; `None`: kept, or as a given plan says.
    pub shared_experts: Option<SharedExpertsChoice>,
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

/// What becomes of the experts that every token takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum SharedExpertsChoice {
    /// They stay as they are
    Keep,
    /// Their matrices get ranks from the same budget as those of routed experts; they keep all channels, and share no base
    Compress,
}
