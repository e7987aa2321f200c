//! Which expert matrix is meant, and its shape.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::fmt;

/// The three matrices of a SwiGLU expert: `w2(silu(w1 x) ∘ w3 x)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// gate, `[intermediate_size, hidden_size]`
    W1,
    /// down, `[hidden_size, intermediate_size]`
    W2,
    /// up, `[intermediate_size, hidden_size]`
    W3,
}

impl Projection {
    /// All three, in the order in which they are stored.
    pub const ALL: [Self; 3] = [Self::W1, Self::W2, Self::W3];

    /// `w1`, `w2` or `w3`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::W1 => "w1",
            Self::W2 => "w2",
            Self::W3 => "w3",
        }
    }
}

/// One expert matrix of a model. Ordered as stored: by layer, then expert, then projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MatrixId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Expert within the layer, from 0.
    pub expert: usize,
    /// Which of the expert's three matrices.
    pub projection: Projection,
}

impl MatrixId {
    /// The module's canonical name: `model.layers.0.block_sparse_moe.experts.0.w1`.
    /// Rank maps, plans and error messages use it.
    pub fn module_name(self) -> String {
        crate::names::expert_module(self)
    }

    /// Reads a canonical module name back.
    pub fn parse(name: &str) -> Option<Self> {
        crate::names::parse_expert_module(name)
    }
}

impl fmt::Display for MatrixId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.module_name())
    }
}

impl Serialize for MatrixId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.module_name())
    }
}

impl<'de> Deserialize<'de> for MatrixId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).ok_or_else(|| {
            let name = crate::display::clip(&name);
            D::Error::custom(format_args!("`{name}` is not the name of an expert matrix"))
        })
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
