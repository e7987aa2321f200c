//! Qwen2-MoE and Qwen1.5-MoE (2407.10671): `Qwen2MoeForCausalLM`. A shared expert with a gate, biases of queries, keys and values.

use super::{allowed, keys};
use crate::block::{AttentionBias, Block, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule, ValueKind};
use crate::widths::Widths;
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
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "layer_types",
            "max_position_embeddings",
            "mlp_only_layers",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "num_local_experts",
            "qkv_bias",
            "rms_norm_eps",
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "shared_expert_intermediate_size",
            "tie_word_embeddings",
            "use_sliding_window",
            "vocab_size",
        ],
    ),
    // Read where there is a window, which is refused.
    (Rule::Harmless(ValueKind::Any), &["max_window_layers", "sliding_window"]),
];

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
        [allowed::HUGGING_FACE, CONFIG_KEYS, allowed::OTHER_FAMILIES].concat()
    }

    /// Defaults and their exceptions are those of transformers' `Qwen2MoeConfig`.
    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        keys::refuse_quantised(config)?;
        keys::check_class(config, &OUTPUT)?;
        allowed::check(config, &[&self.config_keys()])?;
        let hidden_size = keys::dimension_or(config, "hidden_size", 2048)?;
        let num_attention_heads = keys::dimension_or(config, "num_attention_heads", 16)?;
        let vocab_size = keys::dimension_or(config, "vocab_size", 151936)?;
        keys::check_loadable(config, vocab_size)?;
        let num_hidden_layers = keys::dimension_or(config, "num_hidden_layers", 24)?;
        keys::refuse_windows(config, num_hidden_layers)?;
        let dense_width = keys::dimension_or(config, "intermediate_size", 5632)?;
        Ok(ModelConfig {
            family: self,
            block: Block {
                router: Router::SoftmaxTopK { renormalise: keys::flag(config, "norm_topk_prob")? },
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::Gated {
                    intermediate_size: keys::dimension_or(config, "shared_expert_intermediate_size", 5632)?,
                },
                moe_layers: keys::moe_layers(config, num_hidden_layers, dense_width)?,
                query_key_norm: QueryKeyNorm::None,
                attention_bias: if keys::flag_or(config, "qkv_bias", true)? {
                    AttentionBias::QueryKeyValue
                } else {
                    AttentionBias::None
                },
            },
            hidden_size,
            intermediate_size: keys::dimension_or(config, "moe_intermediate_size", 1408)?,
            num_hidden_layers,
            num_local_experts: keys::num_experts(config, 60)?,
            num_experts_per_tok: keys::dimension_or(config, "num_experts_per_tok", 4)?,
            num_attention_heads,
            num_key_value_heads: keys::dimension_or(config, "num_key_value_heads", 16)?,
            head_dim: keys::dimension_or(config, "head_dim", hidden_size / num_attention_heads)?,
            vocab_size,
            max_position_embeddings: keys::dimension_or(config, "max_position_embeddings", 32768)?,
            rms_norm_eps: keys::positive(config, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: keys::rope_theta(config, 10_000.0)?,
            sliding_window: None,
            tie_word_embeddings: keys::flag(config, "tie_word_embeddings")?,
            clip_qkv: None,
            widths: Widths::default(),
        })
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{AttentionPart, Role};
    use serde_json::json;

    fn read(changes: Value) -> ModelConfig {
        let mut config = json!({"model_type": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [1]});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_hf_json(&config).unwrap()
    }

    #[test]
    fn the_shared_expert_has_a_width_of_its_own_and_layers_without_experts_have_none() {
        let config = read(json!({"shared_expert_intermediate_size": 72}));
        let shape = |name: &str| {
            let tensors = config.tensors();
            tensors.iter().find(|spec| spec.name == name).map(|spec| spec.shape.clone())
        };
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
