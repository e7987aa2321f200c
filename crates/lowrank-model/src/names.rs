//! How tensors are spelled: the one table, per family and on-disk layout.
//!
//! Everything inside the program speaks canonical names, those of transformers v4. [`locate`] says where a canonical
//! tensor lies in a checkpoint of a given layout, and [`locate_matrix`] does the same for an expert matrix that may be
//! factored. To add a family, add its table here.

use crate::{MatrixId, MatrixShape, ModelConfig, Projection, Storage, pivots::factor_shapes};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How a checkpoint spells and packs its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// transformers v4, one tensor per expert matrix: `….block_sparse_moe.experts.0.w1.weight`.
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

/// What a tensor is for; parameters are reported by this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding.
    Embedding,
    /// Query, key, value and output projections.
    Attention,
    /// RMSNorm weights.
    Norm,
    /// The router of a layer.
    Router,
    /// An expert matrix.
    Expert(MatrixId),
    /// Output head.
    Head,
}

impl Role {
    /// The plural used in tables.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Norm => "norms",
            Self::Router => "routers",
            Self::Expert(_) => "experts",
            Self::Head => "lm_head",
        }
    }
}

/// A tensor that a model must have, under its canonical name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Canonical name, with `.weight`.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

impl TensorSpec {
    /// Product of the dimensions.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dimension| dimension as u64).product()
    }
}

/// Where a canonical tensor lies inside a checkpoint: a contiguous run of elements of one stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Name in the checkpoint.
    pub tensor: String,
    /// Full shape of the stored tensor.
    pub tensor_shape: Vec<usize>,
    /// First element of the run.
    pub first_element: u64,
    /// Shape of the run.
    pub shape: Vec<usize>,
    /// How the rows are ordered.
    pub row_order: RowOrder,
}

/// Order of the rows of a stored matrix compared with the canonical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// The same.
    Canonical,
    /// Rotary pairs stand side by side within each head (Mistral); canonical order has them half a head apart.
    RotaryInterleaved {
        /// Heads among the rows.
        heads: usize,
    },
}

/// Where an expert matrix lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatrixLocation {
    /// One dense matrix [m, n].
    Dense(Slice),
    /// W ≈ u·v.
    Factored {
        /// [m, r]
        u: Slice,
        /// [r, n]
        v: Slice,
    },
    /// Pivots and what makes the rest of them, see [`crate::pivots`].
    Pivoted {
        /// [m, r] or [r, n]
        basis: Slice,
        /// [r, n − r] or [m − r, r]
        coefficients: Slice,
        /// Name of the index, [min(m, n)].
        order: String,
    },
}

/// Canonical name of an expert matrix' module.
pub fn expert_module(id: MatrixId) -> String {
    format!("{}.{}", expert(id.layer, id.expert), id.projection.as_str())
}

/// Canonical name of an expert.
pub fn expert(layer: usize, expert: usize) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}")
}

/// Reads a canonical module name back; `None` for any other spelling.
pub fn parse_expert_module(name: &str) -> Option<MatrixId> {
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let rest = rest.strip_prefix("block_sparse_moe.experts.")?;
    let (expert, projection) = rest.split_once('.')?;
    let projection = Projection::ALL.into_iter().find(|candidate| candidate.as_str() == projection)?;
    let id = MatrixId { layer: layer.parse().ok()?, expert: expert.parse().ok()?, projection };
    // Only the canonical spelling: `007` would name the same matrix twice.
    (expert_module(id) == name).then_some(id)
}

/// Names of the tensors of a factored matrix in our own output: (u [m, r], v [r, n]).
pub fn factor_names(id: MatrixId) -> (String, String) {
    let module = expert_module(id);
    (format!("{module}.u.weight"), format!("{module}.v.weight"))
}

/// Names of the tensors of a pivoted matrix in our own output: (basis, coefficients, order).
pub fn pivoted_names(id: MatrixId) -> (String, String, String) {
    let module = expert_module(id);
    (format!("{module}.basis.weight"), format!("{module}.coefficients.weight"), format!("{module}.order"))
}

/// Canonical name of a layer's tensor, e.g. `layer_tensor(3, "input_layernorm")`.
pub fn layer_tensor(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}.weight")
}

/// Canonical name of the router of a layer, `[E, H]`.
pub fn router(layer: usize) -> String {
    layer_tensor(layer, "block_sparse_moe.gate")
}

/// Canonical name of the token embedding, `[vocab_size, H]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Canonical name of the final norm, `[H]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Canonical name of the output head, `[vocab_size, H]`; absent when tied to the embedding.
pub const HEAD: &str = "lm_head.weight";

/// Every tensor that a model of these dimensions has, in the order in which it is written.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let (h, v, d) = (config.hidden_size, config.vocab_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let spec = |name: String, shape: Vec<usize>, role: Role| TensorSpec { name, shape, role };
    let mut all = vec![spec(EMBEDDING.into(), vec![v, h], Role::Embedding)];
    for layer in 0..config.num_hidden_layers {
        let named = |module: &str| layer_tensor(layer, module);
        all.push(spec(named("input_layernorm"), vec![h], Role::Norm));
        all.push(spec(named("self_attn.q_proj"), vec![q, h], Role::Attention));
        all.push(spec(named("self_attn.k_proj"), vec![kv, h], Role::Attention));
        all.push(spec(named("self_attn.v_proj"), vec![kv, h], Role::Attention));
        all.push(spec(named("self_attn.o_proj"), vec![h, q], Role::Attention));
        all.push(spec(named("post_attention_layernorm"), vec![h], Role::Norm));
        all.push(spec(router(layer), vec![config.num_local_experts, h], Role::Router));
        for expert in 0..config.num_local_experts {
            for projection in Projection::ALL {
                let id = MatrixId { layer, expert, projection };
                let MatrixShape { rows, cols } = config.matrix_shape(projection);
                all.push(spec(format!("{}.weight", id.module_name()), vec![rows, cols], Role::Expert(id)));
            }
        }
    }
    all.push(spec(FINAL_NORM.into(), vec![h], Role::Norm));
    if !config.tie_word_embeddings {
        all.push(spec(HEAD.into(), vec![v, h], Role::Head));
    }
    all
}

/// Where a canonical tensor lies in a checkpoint of this layout. Expert matrices are taken as dense here.
pub fn locate(layout: Layout, config: &ModelConfig, spec: &TensorSpec) -> Slice {
    let whole = |tensor: String| Slice {
        tensor,
        tensor_shape: spec.shape.clone(),
        first_element: 0,
        shape: spec.shape.clone(),
        row_order: RowOrder::Canonical,
    };
    match layout {
        Layout::HfPerExpert | Layout::LowRank | Layout::Minixtral => whole(spec.name.clone()),
        Layout::HfFused => match spec.role {
            Role::Expert(id) => fused_expert(config, id),
            Role::Router => whole(spec.name.replace("block_sparse_moe", "mlp")),
            _ => whole(spec.name.clone()),
        },
        Layout::Consolidated => {
            let mut slice = whole(consolidated_name(&spec.name));
            if spec.name.ends_with("q_proj.weight") {
                slice.row_order = RowOrder::RotaryInterleaved { heads: config.num_attention_heads };
            } else if spec.name.ends_with("k_proj.weight") {
                slice.row_order = RowOrder::RotaryInterleaved { heads: config.num_key_value_heads };
            }
            slice
        }
    }
}

/// Where an expert matrix lies: dense without a rank, else its factors. Only our own layout has a choice of storage.
pub fn locate_matrix(
    layout: Layout,
    config: &ModelConfig,
    id: MatrixId,
    storage: Storage,
    rank: Option<usize>,
) -> MatrixLocation {
    let matrix = config.matrix_shape(id.projection);
    let MatrixShape { rows, cols } = matrix;
    let module = id.module_name();
    let factor = |suffix: &str, shape: [usize; 2]| Slice {
        tensor: format!("{module}.{suffix}.weight"),
        tensor_shape: shape.to_vec(),
        first_element: 0,
        shape: shape.to_vec(),
        row_order: RowOrder::Canonical,
    };
    match (layout, rank) {
        (Layout::LowRank, Some(r)) if storage == Storage::Pivoted => {
            let [basis, coefficients] = factor_shapes(matrix, r);
            MatrixLocation::Pivoted {
                basis: factor("basis", basis),
                coefficients: factor("coefficients", coefficients),
                order: pivoted_names(id).2,
            }
        }
        (Layout::LowRank, Some(r)) => {
            MatrixLocation::Factored { u: factor("u", [rows, r]), v: factor("v", [r, cols]) }
        }
        (Layout::Minixtral, Some(r)) => {
            MatrixLocation::Factored { u: factor("1", [rows, r]), v: factor("0", [r, cols]) }
        }
        _ => {
            let spec = TensorSpec {
                name: format!("{module}.weight"),
                shape: vec![rows, cols],
                role: Role::Expert(id),
            };
            MatrixLocation::Dense(locate(layout, config, &spec))
        }
    }
}

/// `gate_up_proj [E, 2F, H]` holds w1's rows, then w3's; `down_proj [E, H, F]` holds w2.
fn fused_expert(config: &ModelConfig, id: MatrixId) -> Slice {
    let (e, f, h) = (config.num_local_experts, config.intermediate_size, config.hidden_size);
    let MatrixShape { rows, cols } = config.matrix_shape(id.projection);
    let matrix = (f * h) as u64;
    let expert = id.expert as u64;
    let (name, tensor_shape, first_element) = match id.projection {
        Projection::W1 => ("gate_up_proj", vec![e, 2 * f, h], 2 * matrix * expert),
        Projection::W3 => ("gate_up_proj", vec![e, 2 * f, h], 2 * matrix * expert + matrix),
        Projection::W2 => ("down_proj", vec![e, h, f], matrix * expert),
    };
    Slice {
        tensor: format!("model.layers.{}.mlp.experts.{name}", id.layer),
        tensor_shape,
        first_element,
        shape: vec![rows, cols],
        row_order: RowOrder::Canonical,
    }
}

/// Mistral's names differ word by word.
fn consolidated_name(canonical: &str) -> String {
    match canonical {
        EMBEDDING => return "tok_embeddings.weight".into(),
        FINAL_NORM => return "norm.weight".into(),
        HEAD => return "output.weight".into(),
        _ => {}
    }
    let name = canonical.strip_prefix("model.").unwrap_or(canonical);
    [
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("block_sparse_moe", "feed_forward"),
    ]
    .into_iter()
    .fold(name.to_owned(), |name, (hf, mistral)| name.replace(hf, mistral))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> ModelConfig {
        ModelConfig {
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 2,
            num_local_experts: 3,
            num_experts_per_tok: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            vocab_size: 16,
            max_position_embeddings: 32,
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            sliding_window: None,
            tie_word_embeddings: false,
        }
    }

    #[test]
    fn module_names_read_back_and_only_in_their_canonical_spelling() {
        for id in tiny().matrices() {
            assert_eq!(parse_expert_module(&id.module_name()), Some(id));
        }
        for bad in
            ["model.layers.00.block_sparse_moe.experts.0.w1", "model.layers.0.mlp.experts.0.w1", "w1", ""]
        {
            assert_eq!(parse_expert_module(bad), None, "{bad}");
        }
    }

    #[test]
    fn fused_slices_cover_each_fused_tensor_exactly_once() {
        let config = tiny();
        let mut covered = std::collections::BTreeMap::<String, Vec<(u64, u64)>>::new();
        for id in config.matrices() {
            let MatrixLocation::Dense(slice) = locate_matrix(Layout::HfFused, &config, id, Storage::Uv, None)
            else {
                panic!("fused experts are dense");
            };
            let elements: u64 = slice.shape.iter().map(|&d| d as u64).product();
            covered.entry(slice.tensor).or_default().push((slice.first_element, elements));
        }
        for (tensor, mut runs) in covered {
            runs.sort_unstable();
            let mut next = 0;
            for (first, elements) in runs {
                assert_eq!(first, next, "{tensor}");
                next = first + elements;
            }
            let total = if tensor.ends_with("gate_up_proj") { 3 * 24 * 8 } else { 3 * 8 * 12 };
            assert_eq!(next, total, "{tensor}");
        }
    }

    #[test]
    fn tied_models_have_no_head_tensor() {
        let mut config = tiny();
        let untied = tensors(&config).len();
        config.tie_word_embeddings = true;
        assert_eq!(tensors(&config).len(), untied - 1);
    }

    #[test]
    fn consolidated_names_are_mistrals() {
        assert_eq!(
            consolidated_name("model.layers.3.block_sparse_moe.experts.1.w2.weight"),
            "layers.3.feed_forward.experts.1.w2.weight"
        );
        assert_eq!(
            consolidated_name("model.layers.3.block_sparse_moe.gate.weight"),
            "layers.3.feed_forward.gate.weight"
        );
        assert_eq!(
            consolidated_name("model.layers.3.self_attn.o_proj.weight"),
            "layers.3.attention.wo.weight"
        );
        assert_eq!(
            consolidated_name("model.layers.0.post_attention_layernorm.weight"),
            "layers.0.ffn_norm.weight"
        );
    }
}
