//! Sizes of checkpoints.

use serde::{Deserialize, Serialize};

/// Size of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Stored parameters.
    pub params: u64,
    /// Bytes of stored weights.
    pub bytes: u64,
}
