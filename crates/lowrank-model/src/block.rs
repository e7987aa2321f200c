//! A decoder layer as data: what a family's layer does beyond multiplying with its weights.
//!
//! The forward pass matches every value, so a family with a new one does not compile until the pass knows it.

use crate::names::AttentionPart;

/// How the layers of a model compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Block {
    /// How tokens are given to experts.
    pub router: Router,
    /// Between gate and up of an expert.
    pub activation: Activation,
    /// Experts that every token takes, beside the router's.
    pub shared_experts: SharedExperts,
    /// Which layers have experts at all.
    pub moe_layers: MoeLayers,
    /// How attention gets queries, keys and values.
    pub attention: Attention,
    /// Norms of queries and keys, before their rotation.
    pub query_key_norm: QueryKeyNorm,
    /// What is added to the products of attention.
    pub attention_bias: AttentionBias,
    /// What the norms of the residual stream compute: before attention, before the experts, before the head.
    pub norm: NormKind,
}

/// Which experts a token takes, and how their outputs are weighted: the k experts with the best scores, by their scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// How logits become scores.
    pub score: Score,
    /// Experts outside the best groups are not chosen.
    pub groups: ExpertGroups,
    /// Divide the k weights by their sum.
    pub renormalise: bool,
    /// What the weights are multiplied with in the end.
    pub scale: f64,
}

impl Router {
    /// Softmax over the logits of all experts, then the k largest.
    pub const fn softmax(renormalise: bool) -> Self {
        Self { score: Score::Softmax, groups: ExpertGroups::NONE, renormalise, scale: 1.0 }
    }

    /// Whether a bias is stored beside the matrix.
    pub const fn has_bias(self) -> bool {
        match self.score {
            Score::Softmax | Score::SparseMixer { .. } => false,
            Score::SigmoidAndBias => true,
        }
    }
}

/// How a router's logits become the scores of experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// Softmax over the logits of all experts.
    Softmax,
    /// σ of each logit. A bias `[E]`, stored beside the router, is added where experts are chosen, and not in their weights
    /// (DeepSeek-V3, GLM-4.5).
    SigmoidAndBias,
    /// SparseMixer (Liu et al., 2409.12136): the expert of the largest logit, then that of the largest of the others, and so on.
    /// Each has a softmax of its own, over the logits that are left and near it: those z with (best − z) / max(|z|, best) of
    /// at most 2·jitter (Phi-3.5-MoE).
    SparseMixer {
        /// The noise with which the router was trained, `router_jitter_noise`.
        jitter: f64,
    },
}

/// Experts in groups of equal size, one group after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups of a layer; 1 if all experts compete.
    pub count: usize,
    /// Groups whose experts a token may take.
    pub chosen: usize,
    /// How many of the largest scores in a group add up to the group's.
    pub scored_by: usize,
}

impl ExpertGroups {
    /// All experts compete.
    pub const NONE: Self = Self { count: 1, chosen: 1, scored_by: 1 };
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
    /// Some, stored as one block and added as it is. Each is as wide as an expert that is routed to, and the config has no other
    /// number for it (DeepSeek, GLM-4.5).
    AsWideAsRouted {
        /// Inner width of all of them together.
        intermediate_size: usize,
    },
}

impl SharedExperts {
    /// Inner width of their block; 0 if there are none.
    pub const fn width(self) -> usize {
        match self {
            Self::None => 0,
            Self::Gated { intermediate_size } | Self::AsWideAsRouted { intermediate_size } => {
                intermediate_size
            }
        }
    }

    /// Whether a config can give routed experts another width and leave it as it is.
    pub const fn has_width_of_its_own(self) -> bool {
        match self {
            Self::None | Self::Gated { .. } => true,
            Self::AsWideAsRouted { .. } => false,
        }
    }

    /// Whether a gate is stored beside it.
    pub const fn has_gate(self) -> bool {
        match self {
            Self::None | Self::AsWideAsRouted { .. } => false,
            Self::Gated { .. } => true,
        }
    }
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

/// How attention gets queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// From a matrix each. Several query heads may share a key/value head.
    Grouped,
    /// Keys and values of all heads from one short latent (DeepSeek-V2, 2405.04434).
    Latent(LatentAttention),
}

/// Widths of latent attention, beside `head_dim`: here that of the part of a head that turns with its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentAttention {
    /// Width of the latent that queries are made from; `None` if they are made from the layer's input.
    pub query_rank: Option<usize>,
    /// Width of the latent that keys and values are made from.
    pub key_value_rank: usize,
    /// Entries of a query's or key's head that do not turn. They come before those that do.
    pub fixed_dim: usize,
    /// Width of a value's head.
    pub value_dim: usize,
    /// Entries that turn together are neighbours, not half a head apart.
    pub pairs_side_by_side: bool,
}

impl Attention {
    /// The matrices, in the order in which they are stored.
    pub const fn parts(self) -> &'static [AttentionPart] {
        use AttentionPart as Part;
        match self {
            Self::Grouped => &AttentionPart::GROUPED,
            Self::Latent(LatentAttention { query_rank: Some(_), .. }) => {
                &[Part::QueryDown, Part::QueryUp, Part::LatentDown, Part::LatentUp, Part::Output]
            }
            Self::Latent(LatentAttention { query_rank: None, .. }) => {
                &[Part::Query, Part::LatentDown, Part::LatentUp, Part::Output]
            }
        }
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

/// What a norm of the residual stream computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / √(mean(x²) + ε) ∘ weight: RMSNorm.
    RootMeanSquare,
    /// (x − mean(x)) / √(variance(x) + ε) ∘ weight + bias: LayerNorm, whose bias is stored beside its weight (Phi-3.5-MoE).
    MeanAndVariance,
}

impl NormKind {
    /// Whether a bias is stored beside the weight.
    pub const fn has_bias(self) -> bool {
        match self {
            Self::RootMeanSquare => false,
            Self::MeanAndVariance => true,
        }
    }
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
    /// Of those that make latents, and of the output.
    LatentsAndOutput,
}

impl AttentionBias {
    /// Whether a projection has one.
    pub const fn has(self, part: AttentionPart) -> bool {
        match self {
            Self::None => false,
            Self::QueryKeyValue => !matches!(part, AttentionPart::Output),
            Self::All => true,
            Self::LatentsAndOutput => {
                use AttentionPart::{LatentDown, Output, QueryDown};
                matches!(part, QueryDown | LatentDown | Output)
            }
        }
    }
}
