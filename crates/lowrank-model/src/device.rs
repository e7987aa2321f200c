//! Where work is done, as the user asks for it.

use serde::{Deserialize, Serialize};

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Device {
    /// A GPU if there is one, else the CPU
    #[default]
    Auto,
    /// The CPU
    Cpu,
    /// A GPU, or fail
    Cuda,
}

/// Where matrices are decomposed. Decides bits, so nothing but the user chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum AlgebraChoice {
    /// The CPU: the same bytes on every machine of one architecture
    #[default]
    Cpu,
    /// A GPU, or fail: the bytes of this machine's GPU
    Cuda,
}
