//! The tensors of a model, and where each lies in a checkpoint of a given layout.

use crate::block::{Attention, LatentAttention, MoeLayers, QueryKeyNorm, SharedExperts};
use crate::names::{AttentionPart, Layout, NormPlace, Role};
use crate::pivots::factor_shapes;
use crate::{MatrixId, MatrixShape, ModelConfig, Projection, Storage};

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

impl Slice {
    /// All of a tensor.
    fn whole(tensor: String, shape: Vec<usize>) -> Self {
        Self { tensor, tensor_shape: shape.clone(), first_element: 0, shape, row_order: RowOrder::Canonical }
    }
}

/// Order of the rows of a stored matrix compared with the canonical one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// The same.
    Canonical,
    /// Rotary pairs lie side by side within each head (Mistral); canonical order has them half a head apart.
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
    /// Interpolative decomposition: pivots and the coefficients of the rest, see [`crate::pivots`].
    Pivoted {
        /// [m, r] or [r, n]
        basis: Slice,
        /// [r, n − r] or [m − r, r]
        coefficients: Slice,
        /// Name of the index, [min(m, n)].
        order: String,
    },
}

impl ModelConfig {
    /// Every tensor of the model, in the order in which it is written.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut roles = vec![Role::Embedding];
        let mut matrices = self.matrices().peekable();
        for layer in 0..self.num_hidden_layers {
            roles.extend(self.norm_roles(NormPlace::Attention { layer }));
            let parts = self.block.attention.parts().iter().copied();
            roles.extend(parts.clone().map(|part| Role::Attention { layer, part }));
            let biased = parts.filter(|&part| self.block.attention_bias.has(part));
            roles.extend(biased.map(|part| Role::AttentionBias { layer, part }));
            if self.block.query_key_norm != QueryKeyNorm::None {
                let places = [NormPlace::Query { layer }, NormPlace::Key { layer }];
                roles.extend(places.map(Role::Norm));
            }
            if let Attention::Latent(LatentAttention { query_rank, .. }) = self.block.attention {
                roles.extend(query_rank.map(|_| Role::Norm(NormPlace::QueryLatent { layer })));
                roles.push(Role::Norm(NormPlace::Latent { layer }));
            }
            roles.extend(self.norm_roles(NormPlace::Experts { layer }));
            if self.block.moe_layers.contains(layer) {
                roles.push(Role::Router { layer });
                if self.block.router.has_bias() {
                    roles.push(Role::RouterBias { layer });
                }
                if self.block.shared_experts.has_gate() {
                    roles.push(Role::SharedExpertGate { layer });
                }
                if self.block.shared_experts != SharedExperts::None && !self.compresses_shared_experts {
                    roles.extend(Projection::ALL.map(|projection| Role::SharedExpert { layer, projection }));
                }
            } else {
                roles.extend(Projection::ALL.map(|projection| Role::DenseBlock { layer, projection }));
            }
            if self.shared_bases.contains(&layer) {
                roles.extend(Projection::ALL.map(|projection| Role::SharedBase { layer, projection }));
            }
            while let Some(id) = matrices.next_if(|id| id.layer == layer) {
                roles.push(Role::Expert(id));
            }
        }
        roles.extend(self.norm_roles(NormPlace::Head));
        if !self.tie_word_embeddings {
            roles.push(Role::Head);
        }
        if self.head_bias {
            roles.push(Role::HeadBias);
        }
        roles.into_iter().map(|role| self.tensor(role)).collect()
    }

    /// The tensors of a norm of the residual stream.
    fn norm_roles(&self, place: NormPlace) -> impl Iterator<Item = Role> {
        let bias = self.block.norm.has_bias().then_some(Role::NormBias(place));
        [Role::Norm(place)].into_iter().chain(bias)
    }

    /// The tensor with a role.
    pub fn tensor(&self, role: Role) -> TensorSpec {
        let (h, d) = (self.hidden_size, self.head_dim);
        let (query, key) = (self.num_attention_heads * d, self.num_key_value_heads * d);
        let attention = |part| self.attention_shape(part);
        let block = |projection, width| match projection {
            Projection::Gate | Projection::Up => vec![width, h],
            Projection::Down => vec![h, width],
        };
        let shape = match role {
            Role::Embedding | Role::Head => vec![self.vocab_size, h],
            Role::Attention { part, .. } => attention(part).into(),
            Role::AttentionBias { part, .. } => vec![attention(part)[0]],
            Role::Norm(NormPlace::Query { .. }) => vec![self.norm_width(query)],
            Role::Norm(NormPlace::Key { .. }) => vec![self.norm_width(key)],
            Role::Norm(NormPlace::QueryLatent { .. }) => vec![attention(AttentionPart::QueryDown)[0]],
            Role::Norm(NormPlace::Latent { .. }) => vec![attention(AttentionPart::LatentUp)[1]],
            Role::NormBias(place) => self.tensor(Role::Norm(place)).shape,
            Role::Norm(_) => vec![h],
            Role::Router { .. } => vec![self.num_local_experts, h],
            Role::RouterBias { .. } => vec![self.num_local_experts],
            Role::Expert(id) => {
                let MatrixShape { rows, cols } = self.matrix_shape(id);
                vec![rows, cols]
            }
            Role::SharedBase { projection, .. } => {
                let MatrixShape { rows, cols } = self.full_shape(projection);
                vec![rows, cols]
            }
            Role::SharedExpert { projection, .. } => block(projection, self.block.shared_experts.width()),
            Role::DenseBlock { projection, .. } => match self.block.moe_layers {
                MoeLayers::All => Vec::new(),
                MoeLayers::Except { intermediate_size, .. } => block(projection, intermediate_size),
            },
            Role::SharedExpertGate { .. } => vec![1, h],
            Role::HeadBias => vec![self.vocab_size],
        };
        TensorSpec { name: self.family.spelling().tensor(role), shape, role }
    }

    /// Shape of a projection of the attention, out × in; zeros for one that this attention has not.
    pub fn attention_shape(&self, part: AttentionPart) -> [usize; 2] {
        use AttentionPart as Part;
        let (h, heads, d) = (self.hidden_size, self.num_attention_heads, self.head_dim);
        match self.block.attention {
            Attention::Grouped => match part {
                Part::Query => [heads * d, h],
                Part::Key | Part::Value => [self.num_key_value_heads * d, h],
                Part::Output => [h, heads * d],
                Part::QueryDown | Part::QueryUp | Part::LatentDown | Part::LatentUp => [0, 0],
            },
            Attention::Latent(LatentAttention {
                query_rank, key_value_rank, fixed_dim, value_dim, ..
            }) => {
                let rank = query_rank.unwrap_or(0);
                match part {
                    Part::Query => [heads * (fixed_dim + d), h],
                    Part::QueryDown => [rank, h],
                    Part::QueryUp => [heads * (fixed_dim + d), rank],
                    Part::LatentDown => [key_value_rank + d, h],
                    Part::LatentUp => [heads * (fixed_dim + value_dim), key_value_rank],
                    Part::Output => [h, heads * value_dim],
                    Part::Key | Part::Value => [0, 0],
                }
            }
        }
    }

    /// Weights of a norm of queries or keys, whose heads are `width` wide together.
    fn norm_width(&self, width: usize) -> usize {
        match self.block.query_key_norm {
            QueryKeyNorm::None => 0,
            QueryKeyNorm::PerHead => self.head_dim,
            QueryKeyNorm::AllHeads => width,
        }
    }

    /// Where a tensor lies in a checkpoint of this layout. Expert matrices are taken as dense here.
    pub fn locate(&self, layout: Layout, role: Role) -> Slice {
        let TensorSpec { name, shape, .. } = self.tensor(role);
        let fused = self.family.spelling().fused;
        match (layout, role) {
            (Layout::HfPerExpert | Layout::LowRank | Layout::Minixtral, _) => Slice::whole(name, shape),
            (Layout::HfFused, Role::Expert(id)) if !id.is_shared() => self.fused_expert(id),
            (Layout::HfFused, Role::Router { layer }) => Slice::whole(fused.router(layer), shape),
            (Layout::HfFused, _) => Slice::whole(name, shape),
            (Layout::Consolidated, _) => {
                let name = self.family.consolidated_name(role).unwrap_or(name);
                let row_order = match role {
                    Role::Attention { part: AttentionPart::Query, .. } => {
                        RowOrder::RotaryInterleaved { heads: self.num_attention_heads }
                    }
                    Role::Attention { part: AttentionPart::Key, .. } => {
                        RowOrder::RotaryInterleaved { heads: self.num_key_value_heads }
                    }
                    _ => RowOrder::Canonical,
                };
                Slice { row_order, ..Slice::whole(name, shape) }
            }
        }
    }

    /// Where an expert matrix lies: dense without a rank, else its factors. Only our own layout has a choice of storage.
    pub fn locate_matrix(
        &self,
        layout: Layout,
        id: MatrixId,
        storage: Storage,
        rank: Option<usize>,
    ) -> MatrixLocation {
        let matrix = self.matrix_shape(id);
        let MatrixShape { rows, cols } = matrix;
        match (layout, rank) {
            (Layout::LowRank, Some(r)) if storage == Storage::Pivoted => {
                let (basis, coefficients, order) = self.pivoted_names(id);
                let [basis_shape, coefficients_shape] = factor_shapes(matrix, r).map(Vec::from);
                MatrixLocation::Pivoted {
                    basis: Slice::whole(basis, basis_shape),
                    coefficients: Slice::whole(coefficients, coefficients_shape),
                    order,
                }
            }
            (Layout::LowRank, Some(r)) => {
                let (u, v) = self.factor_names(id);
                MatrixLocation::Factored {
                    u: Slice::whole(u, vec![rows, r]),
                    v: Slice::whole(v, vec![r, cols]),
                }
            }
            (Layout::Minixtral, Some(r)) => {
                let module = self.module_name(id);
                MatrixLocation::Factored {
                    u: Slice::whole(format!("{module}.1.weight"), vec![rows, r]),
                    v: Slice::whole(format!("{module}.0.weight"), vec![r, cols]),
                }
            }
            _ => MatrixLocation::Dense(self.locate(layout, Role::Expert(id))),
        }
    }

    /// Names of the tensors of a factored matrix in our own output: (u [m, r], v [r, n]).
    pub fn factor_names(&self, id: MatrixId) -> (String, String) {
        let module = self.module_name(id);
        (format!("{module}.u.weight"), format!("{module}.v.weight"))
    }

    /// Names of the tensors of a pivoted matrix in our own output: (basis, coefficients, order).
    pub fn pivoted_names(&self, id: MatrixId) -> (String, String, String) {
        let module = self.module_name(id);
        (format!("{module}.basis.weight"), format!("{module}.coefficients.weight"), format!("{module}.order"))
    }

    /// The first tensor holds gate's rows, then up's, expert by expert; the second holds down.
    fn fused_expert(&self, id: MatrixId) -> Slice {
        let (e, f, h) = (self.num_local_experts, self.intermediate_size, self.hidden_size);
        let MatrixShape { rows, cols } = self.matrix_shape(id);
        let matrix = (f * h) as u64;
        let expert = id.expert as u64;
        let (tensor_shape, first_element) = match id.projection {
            Projection::Gate => (vec![e, 2 * f, h], 2 * matrix * expert),
            Projection::Up => (vec![e, 2 * f, h], 2 * matrix * expert + matrix),
            Projection::Down => (vec![e, h, f], matrix * expert),
        };
        Slice {
            tensor: self.family.spelling().fused.expert(id),
            tensor_shape,
            first_element,
            shape: vec![rows, cols],
            row_order: RowOrder::Canonical,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn tiny() -> ModelConfig {
        ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_local_experts": 3, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 16,
        }))
        .unwrap()
    }

    #[test]
    fn fused_slices_cover_each_fused_tensor_exactly_once() {
        let config = tiny();
        let mut covered = BTreeMap::<String, Vec<(u64, u64)>>::new();
        for id in config.matrices() {
            let MatrixLocation::Dense(slice) = config.locate_matrix(Layout::HfFused, id, Storage::Uv, None)
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
        let untied = config.tensors().len();
        config.tie_word_embeddings = true;
        assert_eq!(config.tensors().len(), untied - 1);
    }

    #[test]
    fn every_role_has_one_tensor_of_its_own() {
        let config = tiny();
        for layout in [Layout::HfPerExpert, Layout::HfFused, Layout::Consolidated] {
            let places: Vec<(String, u64)> = config
                .tensors()
                .iter()
                .map(|spec| config.locate(layout, spec.role))
                .map(|slice| (slice.tensor, slice.first_element))
                .collect();
            let distinct: std::collections::BTreeSet<_> = places.iter().collect();
            assert_eq!(distinct.len(), places.len(), "{layout}");
        }
    }
}
