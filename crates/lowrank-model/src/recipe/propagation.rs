//! Error propagation: which compressed matrices a matrix is fitted behind.

use super::error::{RecipeError, validate_share};
use serde::{Deserialize, Serialize};

/// What the factors of a matrix are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PropagationSettings {
    /// Whose errors the factors of a matrix compensate.
    pub propagate: PropagationScope,
    /// Where the target of the fit lies between the original's output on the original's inputs (0) and the original
    /// matrix' output on the compressed model's inputs (1).
    pub target_interpolation: f64,
}

/// Whose errors the factors of a matrix compensate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum PropagationScope {
    /// Only its own: every matrix is fitted to the original's inputs
    None,
    /// Those of its expert: w2 (down) is fitted behind the factors of w1 (gate) and w3 (up)
    Experts,
    /// Those of all layers before it: every layer is fitted to the inputs that the compressed model gives it (slowest)
    Layers,
}

impl Default for PropagationSettings {
    /// Within experts alone it is nearly as good, at a third of the price.
    fn default() -> Self {
        Self { propagate: PropagationScope::Layers, target_interpolation: 0.0 }
    }
}

impl PropagationSettings {
    /// Every matrix for itself.
    pub const OFF: Self = Self { propagate: PropagationScope::None, target_interpolation: 0.0 };

    pub(super) fn validate(&self) -> Result<(), RecipeError> {
        validate_share("target-interpolation", self.target_interpolation)
    }
}
