//! GLM-4.5 and GLM-4.6 (2508.06471): `Glm4MoeForCausalLM`. DeepSeek-V3's router and shared experts beside grouped attention, whose heads turn
//! in part; the first layers have no experts.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, rotation};
use crate::block::{Attention, AttentionBias, Block, NormKind, QueryKeyNorm, Router, Score};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Glm4Moe;

#[derive(Debug)]
struct Glm4Moe;

const OUTPUT: Output =
    Output { model_type: "lowrank_glm4_moe", class: "Glm4Moe", width_key: "moe_intermediate_size" };

/// What `Glm4MoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[(
    Rule::Read,
    &[
        "attention_bias",
        "first_k_dense_replace",
        "head_dim",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "partial_rotary_factor",
        "routed_scaling_factor",
        "topk_group",
        "use_qk_norm",
    ],
)];

/// Those of `Glm4MoeConfig`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 4096,
    expert_width: 1408,
    num_hidden_layers: 46,
    num_experts: 128,
    count_experts: keys::n_routed_experts,
    num_experts_per_tok: 8,
    num_attention_heads: 96,
    num_key_value_heads: KeyValueHeads::Number(8),
    vocab_size: 151_552,
    max_position_embeddings: 131_072,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-5,
    rotation: rotation::PARTS_OF_HEADS,
};
const PARTIAL_ROTARY_FACTOR: f64 = 0.5;

impl Family for Glm4Moe {
    fn model_type(&self) -> &'static str {
        "glm4_moe"
    }

    fn title(&self) -> &'static str {
        "GLM-4.5"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::DEEPSEEK
    }

    fn config_keys(&self) -> Vec<Keys> {
        defaults::config_keys(CONFIG_KEYS)
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let read = DEFAULTS.read(self, config, |layers| {
            let dense_width = keys::dimension_or(config, "intermediate_size", 10_944)?;
            let expert_width = keys::dimension_or(config, OUTPUT.width_key, DEFAULTS.expert_width)?;
            Ok(Block {
                router: Router {
                    score: Score::SigmoidAndBias,
                    groups: keys::groups_scored_by_two(config, [1, 1])?,
                    renormalise: keys::flag_or(config, "norm_topk_prob", true)?,
                    scale: keys::positive(config, "routed_scaling_factor")?.unwrap_or(1.0),
                },
                activation: keys::activation(config)?,
                shared_experts: keys::shared_experts(config, 1, expert_width)?,
                moe_layers: keys::moe_layers_after_first(config, layers, 1, dense_width)?,
                attention: Attention::Grouped,
                query_key_norm: if keys::flag(config, "use_qk_norm")? {
                    QueryKeyNorm::PerHead
                } else {
                    QueryKeyNorm::None
                },
                attention_bias: if keys::flag(config, "attention_bias")? {
                    AttentionBias::QueryKeyValue
                } else {
                    AttentionBias::None
                },
                norm: NormKind::RootMeanSquare,
            })
        })?;
        Ok(ModelConfig {
            head_dim: keys::dimension_or(config, "head_dim", read.head_dim)?,
            partial_rotary_factor: Some(DEFAULTS.rotation.partial_factor(config, PARTIAL_ROTARY_FACTOR)?),
            prediction_layers: keys::prediction_layers(config)?,
            ..read
        })
    }

    fn also_written(&self, _config: &ModelConfig) -> Vec<(&'static str, Value)> {
        keys::no_prediction_layers()
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind::{BrokenCheckpoint, Unsupported};
    use crate::block::ExpertGroups;
    use crate::family::test_support::{self, refused_by_name};
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        let base = json!({"model_type": "glm4_moe", "num_hidden_layers": 3, "num_attention_heads": 32});
        test_support::read(base, changes)
    }

    #[test]
    fn an_empty_config_is_transformers_default() {
        let config = read(json!({})).unwrap();
        assert_eq!((config.num_local_experts, config.num_experts_per_tok), (128, 8));
        assert_eq!((config.head_dim, config.rotary_dim()), (128, 64));
        let groups = ExpertGroups { scored_by: 2, ..ExpertGroups::NONE };
        let router = Router { score: Score::SigmoidAndBias, groups, renormalise: true, scale: 1.0 };
        assert_eq!(config.block.router, router);
        assert_eq!(config.block.shared_experts.width(), 1408);
        assert_eq!(config.matrices().count(), 2 * 128 * 3);
    }

    #[test]
    fn tensors_are_named_as_transformers_names_them() {
        let config =
            read(json!({"n_shared_experts": 2, "use_qk_norm": true, "attention_bias": true})).unwrap();
        let shape = |name: &str| test_support::shape(&config, name);
        assert_eq!(shape("model.layers.0.mlp.gate_proj.weight"), Some(vec![10_944, 4096]));
        assert_eq!(shape("model.layers.0.mlp.gate.e_score_correction_bias"), None);
        assert_eq!(shape("model.layers.1.mlp.gate.e_score_correction_bias"), Some(vec![128]));
        assert_eq!(shape("model.layers.1.mlp.shared_experts.down_proj.weight"), Some(vec![4096, 2816]));
        assert_eq!(shape("model.layers.1.self_attn.q_norm.weight"), Some(vec![128]));
        assert_eq!(shape("model.layers.1.self_attn.k_proj.bias"), Some(vec![1024]));
        assert_eq!(shape("model.layers.1.self_attn.o_proj.bias"), None);
    }

    #[test]
    fn layers_that_predict_later_tokens_are_left_out_and_no_others() {
        let config = read(json!({"num_nextn_predict_layers": 1})).unwrap();
        assert!(config.leaves_out("model.layers.3.eh_proj.weight").is_some());
        assert!(config.leaves_out("model.layers.4.eh_proj.weight").is_none());
        assert!(read(json!({})).unwrap().leaves_out("model.layers.3.eh_proj.weight").is_none());
    }

    #[test]
    fn groups_must_hold_the_experts_that_a_token_takes() {
        let groups = |count: usize, chosen: usize| read(json!({"n_group": count, "topk_group": chosen}));
        assert!(groups(8, 4).is_ok());
        for (count, chosen) in [(7, 1), (128, 128), (4, 5), (32, 1)] {
            assert_eq!(groups(count, chosen).unwrap_err().kind(), BrokenCheckpoint, "{count} {chosen}");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (kind, key, value) in [
            (Unsupported, "scoring_func", json!("sigmoid")),
            (Unsupported, "hidden_act", json!("gelu")),
            (Unsupported, "first_k_dense_replace", json!(3)),
            (Unsupported, "num_local_experts", json!(64)),
            (Unsupported, "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
            (BrokenCheckpoint, "n_shared_experts", json!(0)),
            (BrokenCheckpoint, "partial_rotary_factor", json!(1.5)),
            (BrokenCheckpoint, "partial_rotary_factor", json!(0.01)),
            (BrokenCheckpoint, "first_k_dense_replace", json!(-1)),
        ] {
            refused_by_name(read(json!({ key: value })), kind, key);
        }
    }

    #[test]
    fn the_share_of_a_head_that_turns_is_said_once() {
        let share = |changes: Value| read(changes).map(|config| config.rotary_dim());
        assert_eq!(share(json!({"partial_rotary_factor": 1.0})), Ok(128));
        assert_eq!(share(json!({"rope_parameters": {"partial_rotary_factor": 0.25}})), Ok(32));
        let two = json!({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}});
        assert_eq!(share(two).unwrap_err().kind(), Unsupported);
    }
}
