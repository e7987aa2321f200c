//! What a tensor is for, and how transformers spells it.
//!
//! Families differ in few words, so a family's spelling is data ([`Spelling`]). Inside the program a tensor has the name
//! that transformers v4 gives it: its *canonical* name.

use crate::matrix::expert_number;
use crate::{MatrixId, Projection, SHARED_EXPERT};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a checkpoint spells and packs its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// transformers v4, one tensor per expert matrix: `….experts.0.w1.weight`.
    HfPerExpert,
    /// transformers v5 on request, experts fused: `….mlp.experts.gate_up_proj [E, 2F, H]`, `down_proj [E, H, F]`.
    HfFused,
    /// Mistral's own: `layers.0.feed_forward.experts.0.w1.weight`, queries and keys in interleaved rotary order.
    Consolidated,
    /// Our own output: `….w1.u.weight`, `….w1.v.weight` (or `basis`, `coefficients`, `order`) where a rank is given,
    /// else as `HfPerExpert`.
    LowRank,
    /// minixtral's: `….w1.0.weight` (v), `….w1.1.weight` (u) where a rank is given.
    Minixtral,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HfPerExpert => "Hugging Face, one tensor per expert matrix (transformers v4)",
            Self::HfFused => "Hugging Face, fused experts (transformers v5)",
            Self::Consolidated => "Mistral consolidated",
            Self::LowRank => "lowrank-compress factors",
            Self::Minixtral => "minixtral factors",
        })
    }
}

/// What a tensor is for: its identity, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding, [V, H].
    Embedding,
    /// A projection of a layer's attention.
    Attention {
        /// Decoder layer.
        layer: usize,
        /// Which projection.
        part: AttentionPart,
    },
    /// The bias of such a projection, as long as its output.
    AttentionBias {
        /// Decoder layer.
        layer: usize,
        /// Which projection.
        part: AttentionPart,
    },
    /// The weights of a norm, `[H]` unless the place says otherwise.
    Norm(NormPlace),
    /// What a norm adds, as long as its weights.
    NormBias(NormPlace),
    /// The router of a layer, [E, H].
    Router {
        /// Decoder layer.
        layer: usize,
    },
    /// What is added to the scores of a layer's experts before they are chosen, `[E]`.
    RouterBias {
        /// Decoder layer.
        layer: usize,
    },
    /// A matrix of an expert; of a shared one where that is compressed.
    Expert(MatrixId),
    /// What the factored matrices of a layer's experts have in common: a factored matrix is this one plus its factors.
    SharedBase {
        /// Decoder layer.
        layer: usize,
        /// Of which matrices.
        projection: Projection,
    },
    /// A matrix of the expert that every token takes, where that stays as it is.
    SharedExpert {
        /// Decoder layer.
        layer: usize,
        /// Which matrix.
        projection: Projection,
    },
    /// A matrix of the one block of a layer without experts.
    DenseBlock {
        /// Decoder layer.
        layer: usize,
        /// Which matrix.
        projection: Projection,
    },
    /// What weights the shared expert's output, [1, H].
    SharedExpertGate {
        /// Decoder layer.
        layer: usize,
    },
    /// Output head, [V, H]; absent when tied to the embedding.
    Head,
    /// What is added to the logits, `[V]`, tied or not.
    HeadBias,
}

/// A projection of an attention layer with A query heads and G key/value heads of width D. Latent attention has latents of
/// widths rq and r, heads of which Dn entries do not turn and D do, and values of width Dv.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttentionPart {
    /// [A·D, H], or [A·(Dn + D), H]
    Query,
    /// [G·D, H]
    Key,
    /// [G·D, H]
    Value,
    /// [H, A·D], or [H, A·Dv]
    Output,
    /// [rq, H]
    QueryDown,
    /// [A·(Dn + D), rq]
    QueryUp,
    /// [r + D, H]: the latent, and the part of the keys that turns.
    LatentDown,
    /// [A·(Dn + Dv), r]
    LatentUp,
}

impl AttentionPart {
    /// Those of attention without latents, in the order in which they are stored.
    pub const GROUPED: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];
}

/// Where a norm is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NormPlace {
    /// Before the attention of a layer.
    Attention {
        /// Decoder layer.
        layer: usize,
    },
    /// Before the experts of a layer.
    Experts {
        /// Decoder layer.
        layer: usize,
    },
    /// Before the output head.
    Head,
    /// Of a layer's queries: `[D]`, or [A·D] if all heads are taken together.
    Query {
        /// Decoder layer.
        layer: usize,
    },
    /// Of a layer's keys: `[D]`, or [G·D] if all heads are taken together.
    Key {
        /// Decoder layer.
        layer: usize,
    },
    /// Of the latent that queries are made from, `[rq]`.
    QueryLatent {
        /// Decoder layer.
        layer: usize,
    },
    /// Of the latent that keys and values are made from, `[r]`.
    Latent {
        /// Decoder layer.
        layer: usize,
    },
}

impl Role {
    /// The plural used in tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention { .. } | Self::AttentionBias { .. } => "attention",
            Self::Norm(_) | Self::NormBias(_) => "norms",
            Self::Router { .. } | Self::RouterBias { .. } => "routers",
            Self::Expert(id) if id.is_shared() => "shared experts",
            Self::Expert(_) | Self::SharedBase { .. } => "experts",
            Self::SharedExpert { .. } | Self::SharedExpertGate { .. } => "shared experts",
            Self::DenseBlock { .. } => "dense blocks",
            Self::Head | Self::HeadBias => "lm_head",
        }
    }
}

/// The words in which families of transformers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spelling {
    /// The module of a layer that holds router and experts: `mlp`.
    pub moe: &'static str,
    /// An expert's matrices, in the order of [`Projection::ALL`].
    pub projections: [&'static str; 3],
    /// The module of the shared expert, within `moe`; its gate is the same with `_gate`.
    pub shared_expert: &'static str,
    /// How experts are spelled where a layer's experts share two tensors.
    pub fused: FusedSpelling,
}

/// Names of fused experts: gate and up in one tensor [E, 2F, H], down in another [E, H, F].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedSpelling {
    /// The module of a layer that holds router and experts.
    pub moe: &'static str,
    /// The router's module, within that module.
    pub router: &'static str,
    /// Of gate and up, within that module.
    pub gate_up: &'static str,
    /// Of down, within that module.
    pub down: &'static str,
}

impl FusedSpelling {
    /// As transformers v5 holds them in memory, and saves them on request.
    pub const TRANSFORMERS_5: Self =
        Self { moe: "mlp", router: "gate", gate_up: "experts.gate_up_proj", down: "experts.down_proj" };

    /// Name of the tensor that holds a matrix.
    pub fn expert(&self, id: MatrixId) -> String {
        let tensor = match id.projection {
            Projection::Gate | Projection::Up => self.gate_up,
            Projection::Down => self.down,
        };
        format!("model.layers.{}.{}.{tensor}", id.layer, self.moe)
    }

    /// Name of a layer's router.
    pub fn router(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.{}.weight", self.moe, self.router)
    }

    /// Whether a tensor holds fused experts.
    pub fn is_fused(&self, tensor: &str) -> bool {
        tensor.ends_with(&format!(".{}.{}", self.moe, self.gate_up))
    }
}

impl Spelling {
    /// Of Qwen2-MoE, and of some twenty families that took its names.
    pub const QWEN2_MOE: Self = Self {
        moe: "mlp",
        projections: ["gate_proj", "down_proj", "up_proj"],
        shared_expert: "shared_expert",
        fused: FusedSpelling::TRANSFORMERS_5,
    };

    /// Of Mixtral.
    pub const MIXTRAL: Self = Self {
        moe: "block_sparse_moe",
        projections: ["w1", "w2", "w3"],
        shared_expert: "shared_expert",
        fused: FusedSpelling::TRANSFORMERS_5,
    };

    /// Of DeepSeek and of those that took its block.
    pub const DEEPSEEK: Self = Self { shared_expert: "shared_experts", ..Self::QWEN2_MOE };

    /// Canonical name of a tensor.
    pub fn tensor(&self, role: Role) -> String {
        let of_layer = |layer: usize, module: &str| format!("model.layers.{layer}.{module}.weight");
        let attention = |part| match part {
            AttentionPart::Query => "self_attn.q_proj",
            AttentionPart::Key => "self_attn.k_proj",
            AttentionPart::Value => "self_attn.v_proj",
            AttentionPart::Output => "self_attn.o_proj",
            AttentionPart::QueryDown => "self_attn.q_a_proj",
            AttentionPart::QueryUp => "self_attn.q_b_proj",
            AttentionPart::LatentDown => "self_attn.kv_a_proj_with_mqa",
            AttentionPart::LatentUp => "self_attn.kv_b_proj",
        };
        match role {
            Role::Embedding => "model.embed_tokens.weight".into(),
            Role::Attention { layer, part } => of_layer(layer, attention(part)),
            Role::AttentionBias { layer, part } => {
                format!("model.layers.{layer}.{}.bias", attention(part))
            }
            Role::Norm(NormPlace::Attention { layer }) => of_layer(layer, "input_layernorm"),
            Role::Norm(NormPlace::Experts { layer }) => of_layer(layer, "post_attention_layernorm"),
            Role::Norm(NormPlace::Head) => "model.norm.weight".into(),
            Role::Norm(NormPlace::Query { layer }) => of_layer(layer, "self_attn.q_norm"),
            Role::Norm(NormPlace::Key { layer }) => of_layer(layer, "self_attn.k_norm"),
            Role::Norm(NormPlace::QueryLatent { layer }) => of_layer(layer, "self_attn.q_a_layernorm"),
            Role::Norm(NormPlace::Latent { layer }) => of_layer(layer, "self_attn.kv_a_layernorm"),
            Role::NormBias(place) => as_bias(&self.tensor(Role::Norm(place))),
            Role::Router { layer } => of_layer(layer, &format!("{}.gate", self.moe)),
            Role::RouterBias { layer } => {
                format!("model.layers.{layer}.{}.gate.e_score_correction_bias", self.moe)
            }
            Role::Expert(id) => format!("{}.weight", self.module(id)),
            Role::SharedBase { layer, projection } => {
                let projection = self.projections[projection.index()];
                of_layer(layer, &format!("{}.experts.shared_base.{projection}", self.moe))
            }
            Role::SharedExpert { layer, projection } => {
                self.tensor(Role::Expert(MatrixId { layer, expert: SHARED_EXPERT, projection }))
            }
            Role::DenseBlock { layer, projection } => {
                of_layer(layer, &format!("{}.{}", self.moe, self.projections[projection.index()]))
            }
            Role::SharedExpertGate { layer } => {
                of_layer(layer, &format!("{}.{}_gate", self.moe, self.shared_expert))
            }
            Role::Head => "lm_head.weight".into(),
            Role::HeadBias => as_bias(&self.tensor(Role::Head)),
        }
    }

    /// Canonical name of an expert.
    pub fn expert(&self, layer: usize, expert: usize) -> String {
        match expert {
            SHARED_EXPERT => format!("model.layers.{layer}.{}.{}", self.moe, self.shared_expert),
            _ => format!("model.layers.{layer}.{}.experts.{expert}", self.moe),
        }
    }

    /// Canonical name of an expert matrix' module.
    pub fn module(&self, id: MatrixId) -> String {
        format!("{}.{}", self.expert(id.layer, id.expert), self.projections[id.projection.index()])
    }

    /// Reads a module name back; `None` for any other text.
    pub fn parse_module(&self, name: &str) -> Option<MatrixId> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (expert, projection) = rest.strip_prefix(self.moe)?.strip_prefix('.')?.rsplit_once('.')?;
        let expert = expert_number(expert, self.shared_expert)?;
        let projection =
            Projection::ALL.into_iter().find(|one| self.projections[one.index()] == projection)?;
        let id = MatrixId { layer: layer.parse().ok()?, expert, projection };
        // `007` would name the same matrix twice.
        (self.module(id) == name).then_some(id)
    }
}

/// The name of the bias beside a weight.
fn as_bias(weight: &str) -> String {
    format!("{}.bias", weight.trim_end_matches(".weight"))
}

/// Why a tensor that old exports stored beside the weights can be left out; `None` if it may be a weight.
pub fn known_buffer(tensor: &str) -> Option<&'static str> {
    const ROTARY: [&str; 4] = ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"];
    let (module, name) = tensor.rsplit_once('.').unwrap_or(("", tensor));
    if tensor == "rope.freqs"
        || tensor == "freqs_cis"
        || (ROTARY.contains(&name) && module.rsplit('.').next() == Some("rotary_emb"))
    {
        return Some("rotary frequencies follow from the config");
    }
    (["masked_bias", "position_ids"].contains(&name)).then_some("a buffer that holds no weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER: Spelling = Spelling::QWEN2_MOE;

    #[test]
    fn module_names_read_back_and_only_in_their_canonical_spelling() {
        for projection in Projection::ALL {
            for expert in [63, SHARED_EXPERT] {
                let id = MatrixId { layer: 11, expert, projection };
                assert_eq!(OTHER.parse_module(&OTHER.module(id)), Some(id));
            }
        }
        for bad in [
            "model.layers.00.mlp.experts.0.gate_proj",
            "model.layers.0.mlp.experts.0.w1",
            "model.layers.0.mlp.experts.gate_proj",
            "model.layers.0.mlp.experts.65536.gate_proj",
            "model.layers.0.mlp.shared_experts.gate_proj",
            "model.layers.0.mlp.shared_expert.0.gate_proj",
            "model.layers.0.mlpx.experts.0.gate_proj",
            "layers.0.experts.0.gate",
            "gate_proj",
            "",
        ] {
            assert_eq!(OTHER.parse_module(bad), None, "{bad}");
        }
    }
}
