//! A decoder layer as data: what a family's layer does beyond multiplying with its weights.
//!
//! The forward pass matches every value, so a family with a new one does not compile until the pass knows it.

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
    /// Of queries and keys, before their rotation.
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
}

/// Layers with experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoeLayers {
    /// Every layer.
    All,
}

impl MoeLayers {
    /// Whether a layer has experts.
    pub const fn contains(self, _layer: usize) -> bool {
        match self {
            Self::All => true,
        }
    }
}

/// A norm over each head's queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// There is none.
    None,
}

/// Biases of the attention projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// There are none.
    None,
}
