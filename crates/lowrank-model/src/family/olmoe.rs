//! OLMoE (Muennighoff et al., 2409.02060): `OlmoeForCausalLM`. Norms of queries and keys over all heads, and a limit on their size.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, rotation};
use crate::block::{Attention, Block, MoeLayers, NormKind, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Olmoe;

#[derive(Debug)]
struct Olmoe;

const OUTPUT: Output = Output { model_type: "lowrank_olmoe", class: "Olmoe", width_key: "intermediate_size" };

/// What `OlmoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[(Rule::Read, &["attention_bias", "clip_qkv"])];

/// Those of `OlmoeConfig`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 2048,
    expert_width: 2048,
    num_hidden_layers: 16,
    num_experts: 64,
    count_experts: keys::num_experts,
    num_experts_per_tok: 8,
    num_attention_heads: 16,
    num_key_value_heads: KeyValueHeads::AsQueries,
    vocab_size: 50_304,
    max_position_embeddings: 4096,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-5,
    rotation: rotation::WHOLE_HEADS,
};

impl Family for Olmoe {
    fn model_type(&self) -> &'static str {
        "olmoe"
    }

    fn title(&self) -> &'static str {
        "OLMoE"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::QWEN2_MOE
    }

    fn config_keys(&self) -> Vec<Keys> {
        defaults::config_keys(CONFIG_KEYS)
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let read = DEFAULTS.read(self, config, |_| {
            Ok(Block {
                router: Router::softmax(keys::flag(config, "norm_topk_prob")?),
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::None,
                moe_layers: MoeLayers::All,
                attention: Attention::Grouped,
                query_key_norm: QueryKeyNorm::AllHeads,
                attention_bias: keys::attention_bias(config)?,
                norm: NormKind::RootMeanSquare,
            })
        })?;
        Ok(ModelConfig { clip_qkv: keys::optional_positive(config, "clip_qkv")?, ..read })
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::test_support;
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        test_support::read(json!({"model_type": "olmoe", "num_attention_heads": 8}), changes)
    }

    #[test]
    fn keys_are_as_many_as_queries_unless_the_config_says_otherwise() {
        assert_eq!(read(json!({})).unwrap().num_key_value_heads, 8);
        assert_eq!(read(json!({"num_key_value_heads": null})).unwrap().num_key_value_heads, 8);
        assert_eq!(read(json!({"num_key_value_heads": 2})).unwrap().num_key_value_heads, 2);
    }

    #[test]
    fn the_limit_of_queries_keys_and_values_is_read() {
        assert_eq!(read(json!({"clip_qkv": 8.0})).unwrap().clip_qkv, Some(8.0));
        assert_eq!(read(json!({"clip_qkv": null})).unwrap().clip_qkv, None);
        assert!(read(json!({"clip_qkv": -1})).is_err());
    }
}
