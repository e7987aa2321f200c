//! Which expert matrix is meant, and its shape: the same for every family.

use serde::{Deserialize, Serialize, Serializer};
use std::fmt;

/// The three matrices of a gated expert: `down(act(gate x) ∘ up x)`.
///
/// The field also calls them w1, w2 and w3. Their order is that of plans, reports and shards, whatever the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Projection {
    /// `[intermediate_size, hidden_size]`
    Gate,
    /// `[hidden_size, intermediate_size]`
    Down,
    /// `[intermediate_size, hidden_size]`
    Up,
}

impl Projection {
    /// All three, in the order in which they are stored.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Down, Self::Up];

    /// `gate`, `down` or `up`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Down => "down",
            Self::Up => "up",
        }
    }

    /// Index into [`Projection::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The number of a layer's shared expert, which every token takes: above that of every routed one, of which a model has at most
/// so many in all.
pub const SHARED_EXPERT: usize = 1 << 16;

/// The number of an expert that a name calls `experts.N`, or as shared ones are called.
pub(crate) fn expert_number(name: &str, shared: &str) -> Option<usize> {
    match name.strip_prefix("experts.") {
        Some(number) => number.parse().ok(),
        None => (name == shared).then_some(SHARED_EXPERT),
    }
}

/// One expert matrix of a model. Ordered as stored: by layer, then expert, then projection.
///
/// Shown as `layers.3.experts.5.gate`, or `layers.3.shared_expert.gate`. What its checkpoint calls it is
/// [`crate::ModelConfig::module_name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatrixId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Expert within the layer, from 0; or [`SHARED_EXPERT`].
    pub expert: usize,
    /// Which of the expert's three matrices.
    pub projection: Projection,
}

impl MatrixId {
    /// Whether it is of the expert that every token takes.
    pub const fn is_shared(self) -> bool {
        self.expert == SHARED_EXPERT
    }
}

impl fmt::Display for MatrixId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, expert, projection } = self;
        match self.is_shared() {
            true => write!(f, "layers.{layer}.shared_expert.{projection}"),
            false => write!(f, "layers.{layer}.experts.{expert}.{projection}"),
        }
    }
}

impl Serialize for MatrixId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Shape of a weight, out × in: `y = W x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MatrixShape {
    /// m, the output features.
    pub rows: usize,
    /// n, the input features.
    pub cols: usize,
}

impl MatrixShape {
    /// min(m, n): the length of the spectrum.
    pub fn short_side(self) -> usize {
        self.rows.min(self.cols)
    }
}

impl fmt::Display for MatrixShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}]", self.rows, self.cols)
    }
}
