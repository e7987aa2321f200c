//! A decoder layer as data: what a family's layer does beyond multiplying with its weights.
//!
//! The forward pass matches every value, so a family with a new one does not compile until the pass knows it.

use crate::names::AttentionPart;

/// How the layers of a model compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// How tokens are given to experts.
    pub router: Router,
    /// Between gate and up of an expert.
    pub activation: Activation,
    /// Experts that every token takes, beside the router's.
    pub shared_experts: SharedExperts,
    /// Which layers have experts at all.
    pub moe_layers: MoeLayers,
    /// Norms of queries and keys, before their rotation.
    pub query_key_norm: QueryKeyNorm,
    /// What is added to the products of attention.
    pub attention_bias: AttentionBias,
}

/// Which experts a token takes, and how their outputs are weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Router {
    /// Softmax over the logits of all experts, then the k largest.
    SoftmaxTopK {
        /// Divide the k weights by their sum.
        renormalise: bool,
    },
}

/// The non-linearity of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e⁻ˣ)
    Silu,
}

/// Experts without a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedExperts {
    /// There are none.
    None,
    /// One, added with the weight σ(g·x), where g `[H]` is stored beside it (Qwen2-MoE).
    Gated {
        /// Its inner width.
        intermediate_size: usize,
    },
}

/// Layers with experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoeLayers {
    /// Every layer.
    All,
    /// All but some, which have one block of this inner width that every token takes.
    Except {
        /// Layers without experts.
        dense: LayerSet,
        /// Inner width of their blocks.
        intermediate_size: usize,
    },
}

impl MoeLayers {
    /// Whether a layer has experts.
    pub const fn contains(self, layer: usize) -> bool {
        match self {
            Self::All => true,
            Self::Except { dense, .. } => !dense.contains(layer),
        }
    }
}

/// A set of decoder layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerSet([u64; LayerSet::WORDS]);

impl LayerSet {
    const WORDS: usize = 16;
    /// The number of the last layer that a set can hold, plus one.
    pub const LAYERS_MAX: usize = 64 * Self::WORDS;

    /// Adds a layer; `false` if it lies beyond [`LayerSet::LAYERS_MAX`].
    pub fn insert(&mut self, layer: usize) -> bool {
        match self.0.get_mut(layer / 64) {
            Some(word) => {
                *word |= 1 << (layer % 64);
                true
            }
            None => false,
        }
    }

    /// Whether a layer is in it.
    pub const fn contains(self, layer: usize) -> bool {
        layer < Self::LAYERS_MAX && self.0[layer / 64] >> (layer % 64) & 1 == 1
    }

    /// Whether it holds no layer.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// A norm (RMSNorm) of the products of the query and key matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// There is none.
    None,
    /// Of each head, with weights `[D]` that the heads share (Qwen3-MoE).
    PerHead,
    /// Of all heads together, with weights [A·D] and [G·D] (OLMoE).
    AllHeads,
}

/// Biases of the attention projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// There are none.
    None,
    /// Of queries, keys and values.
    QueryKeyValue,
    /// Of all four projections.
    All,
}

impl AttentionBias {
    /// Whether a projection has one.
    pub const fn has(self, part: AttentionPart) -> bool {
        match self {
            Self::None => false,
            Self::QueryKeyValue => !matches!(part, AttentionPart::Output),
            Self::All => true,
        }
    }
}
