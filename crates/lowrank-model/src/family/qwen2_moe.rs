//! Qwen2-MoE and Qwen1.5-MoE (2407.10671): `Qwen2MoeForCausalLM`. A shared expert with a gate, biases of queries, keys and values.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, rotation};
use crate::block::{Attention, AttentionBias, Block, NormKind, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule, ValueKind};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Qwen2Moe;

#[derive(Debug)]
struct Qwen2Moe;

const OUTPUT: Output =
    Output { model_type: "lowrank_qwen2_moe", class: "Qwen2Moe", width_key: "moe_intermediate_size" };

/// What `Qwen2MoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "decoder_sparse_step",
            "head_dim",
            "layer_types",
            "mlp_only_layers",
            "moe_intermediate_size",
            "qkv_bias",
            "shared_expert_intermediate_size",
            "use_sliding_window",
        ],
    ),
    // Read where there is a window, which is refused.
    (Rule::Harmless(ValueKind::Any), &["max_window_layers", "sliding_window"]),
];

/// Those of `Qwen2MoeConfig`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 2048,
    expert_width: 1408,
    num_hidden_layers: 24,
    num_experts: 60,
    count_experts: keys::num_experts,
    num_experts_per_tok: 4,
    num_attention_heads: 16,
    num_key_value_heads: KeyValueHeads::Number(16),
    vocab_size: 151_936,
    max_position_embeddings: 32_768,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-6,
    rotation: rotation::WHOLE_HEADS,
};

impl Family for Qwen2Moe {
    fn model_type(&self) -> &'static str {
        "qwen2_moe"
    }

    fn title(&self) -> &'static str {
        "Qwen2-MoE"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::QWEN2_MOE
    }

    fn config_keys(&self) -> Vec<Keys> {
        defaults::config_keys(CONFIG_KEYS)
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let read = DEFAULTS.read(self, config, |layers| {
            keys::refuse_windows(config, layers)?;
            let dense_width = keys::dimension_or(config, "intermediate_size", 5632)?;
            Ok(Block {
                router: Router::softmax(keys::flag(config, "norm_topk_prob")?),
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::Gated {
                    intermediate_size: keys::dimension_or(config, "shared_expert_intermediate_size", 5632)?,
                },
                moe_layers: keys::moe_layers(config, layers, dense_width)?,
                attention: Attention::Grouped,
                query_key_norm: QueryKeyNorm::None,
                attention_bias: if keys::flag_or(config, "qkv_bias", true)? {
                    AttentionBias::QueryKeyValue
                } else {
                    AttentionBias::None
                },
                norm: NormKind::RootMeanSquare,
            })
        })?;
        Ok(ModelConfig { head_dim: keys::dimension_or(config, "head_dim", read.head_dim)?, ..read })
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::test_support;
    use crate::names::{AttentionPart, Role};
    use serde_json::json;

    fn read(changes: Value) -> ModelConfig {
        let base = json!({"model_type": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [1]});
        test_support::read(base, changes).unwrap()
    }

    #[test]
    fn the_shared_expert_has_a_width_of_its_own_and_layers_without_experts_have_none() {
        let config = read(json!({"shared_expert_intermediate_size": 72}));
        let shape = |name: &str| test_support::shape(&config, name);
        assert_eq!(shape("model.layers.0.mlp.shared_expert.down_proj.weight"), Some(vec![2048, 72]));
        assert_eq!(shape("model.layers.0.mlp.shared_expert_gate.weight"), Some(vec![1, 2048]));
        assert_eq!(shape("model.layers.1.mlp.shared_expert_gate.weight"), None);
        assert_eq!(shape("model.layers.1.mlp.gate_proj.weight"), Some(vec![5632, 2048]));
    }

    #[test]
    fn biases_are_there_unless_the_config_says_otherwise() {
        let biases = |changes: Value| {
            let tensors = read(changes).tensors();
            tensors.iter().filter(|spec| matches!(spec.role, Role::AttentionBias { .. })).count()
        };
        assert_eq!([biases(json!({})), biases(json!({"qkv_bias": false}))], [6, 0]);
        assert!(!AttentionBias::QueryKeyValue.has(AttentionPart::Output));
    }
}
