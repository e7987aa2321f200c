//! How files are written.

use crate::budget::ByteSize;
use serde::{Deserialize, Serialize};

/// How files are written. Decides no number of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct OutputSettings {
    /// A new shard begins before this many bytes of tensors would be exceeded.
    pub max_shard_size: ByteSize,
}

impl Default for OutputSettings {
    fn default() -> Self {
        Self { max_shard_size: ByteSize(5_000_000_000) }
    }
}
