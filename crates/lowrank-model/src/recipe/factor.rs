//! How factors are computed and stored.

use crate::{Dtype, Storage};
use serde::{Deserialize, Serialize};

/// How factors are computed and stored.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct FactorSettings {
    /// How factors are stored; `None`: pivoted, or as a given plan says.
    pub storage: Option<Storage>,
    /// Dtype of the factors; `None`: that of the matrix.
    pub dtype: Option<Dtype>,
    /// How they are computed.
    pub method: MethodChoice,
    /// Seed of the randomized method.
    pub seed: u64,
}

/// How factors are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum MethodChoice {
    /// Randomized where the rank is a small part of a large short side, else exact
    #[default]
    Auto,
    /// The optimum, by eigenvectors
    Exact,
    /// A random sketch; the report states how far it is from the optimum
    Randomized,
    /// The optimum, by matrix products where the spectrum has a gap after the rank: for devices that multiply much faster
    /// than they find eigenvectors
    Projector,
}
