//! Qwen3-MoE (Qwen3 technical report, 2505.09388): `Qwen3MoeForCausalLM`. Norms of queries and keys, head by head.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, rotation};
use crate::block::{Attention, Block, NormKind, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule, ValueKind};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Qwen3Moe;

#[derive(Debug)]
struct Qwen3Moe;

const OUTPUT: Output =
    Output { model_type: "lowrank_qwen3_moe", class: "Qwen3Moe", width_key: "moe_intermediate_size" };

/// What `Qwen3MoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "attention_bias",
            "decoder_sparse_step",
            "head_dim",
            "layer_types",
            "mlp_only_layers",
            "moe_intermediate_size",
            "use_sliding_window",
        ],
    ),
    // Read where there is a window, which is refused.
    (Rule::Harmless(ValueKind::Any), &["max_window_layers", "sliding_window"]),
];

/// Those of `Qwen3MoeConfig`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 2048,
    expert_width: 768,
    num_hidden_layers: 24,
    num_experts: 128,
    count_experts: keys::num_experts,
    num_experts_per_tok: 8,
    num_attention_heads: 32,
    num_key_value_heads: KeyValueHeads::Number(4),
    vocab_size: 151_936,
    max_position_embeddings: 32_768,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-6,
    rotation: rotation::WHOLE_HEADS,
};

impl Family for Qwen3Moe {
    fn model_type(&self) -> &'static str {
        "qwen3_moe"
    }

    fn title(&self) -> &'static str {
        "Qwen3-MoE"
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
            let dense_width = keys::dimension_or(config, "intermediate_size", 6144)?;
            Ok(Block {
                router: Router::softmax(keys::flag(config, "norm_topk_prob")?),
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::None,
                moe_layers: keys::moe_layers(config, layers, dense_width)?,
                attention: Attention::Grouped,
                query_key_norm: QueryKeyNorm::PerHead,
                attention_bias: keys::attention_bias(config)?,
                norm: NormKind::RootMeanSquare,
            })
        })?;
        Ok(ModelConfig { head_dim: keys::dimension_or(config, "head_dim", read.head_dim)?, ..read })
    }

    /// transformers 5 saves `num_local_experts`; 4.57 reads `num_experts` alone.
    fn also_written(&self, config: &ModelConfig) -> Vec<(&'static str, Value)> {
        vec![("num_experts", config.num_local_experts.into())]
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind::{BrokenCheckpoint, Unsupported};
    use crate::family::test_support::{self, refused_by_name};
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        test_support::read(json!({"model_type": "qwen3_moe", "num_hidden_layers": 4}), changes)
    }

    #[test]
    fn an_empty_config_is_transformers_default() {
        let config = read(json!({})).unwrap();
        assert_eq!((config.hidden_size, config.intermediate_size, config.head_dim), (2048, 768, 64));
        assert_eq!((config.num_local_experts, config.num_experts_per_tok), (128, 8));
        assert_eq!(config.block.router, Router::softmax(false));
        assert_eq!(config.matrices().count(), 4 * 128 * 3);
    }

    #[test]
    fn layers_without_experts_follow_both_keys() {
        let dense = |changes: Value| {
            let config = read(changes).unwrap();
            (0..4).filter(|&layer| config.experts_in(layer) == 0).collect::<Vec<_>>()
        };
        assert_eq!(dense(json!({"mlp_only_layers": [0, 9]})), [0]);
        assert_eq!(dense(json!({"mlp_only_layers": null, "decoder_sparse_step": 2})), [0, 2]);
        assert_eq!(dense(json!({"mlp_only_layers": [1], "decoder_sparse_step": 2})), [0, 1, 2]);
        for (kind, changes) in [
            (Unsupported, json!({"mlp_only_layers": [0, 1, 2, 3]})),
            (Unsupported, json!({"decoder_sparse_step": 5})),
            (BrokenCheckpoint, json!({"decoder_sparse_step": 0})),
            (BrokenCheckpoint, json!({"mlp_only_layers": [-1]})),
            (BrokenCheckpoint, json!({"mlp_only_layers": "all"})),
        ] {
            assert_eq!(read(changes.clone()).unwrap_err().kind(), kind, "{changes}");
        }
    }

    #[test]
    fn experts_are_counted_by_either_key() {
        assert_eq!(read(json!({"num_local_experts": 16})).unwrap().num_local_experts, 16);
        assert_eq!(read(json!({"num_local_experts": 16, "num_experts": 16})).unwrap().num_local_experts, 16);
        assert!(read(json!({"num_local_experts": 16, "num_experts": 8})).is_err());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("use_sliding_window", json!(true)),
            ("layer_types", json!(["sliding_attention"])),
            ("hidden_act", json!("gelu")),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            ("scoring_func", json!("sigmoid")),
            ("n_shared_experts", json!(1)),
        ] {
            refused_by_name(read(json!({ key: value })), Unsupported, key);
        }
    }
}
