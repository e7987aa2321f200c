//! OLMoE (Muennighoff et al., 2409.02060): `OlmoeForCausalLM`. Norms of queries and keys over all heads, and a limit on their size.

use super::{allowed, keys};
use crate::block::{AttentionBias, Block, MoeLayers, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule};
use crate::widths::Widths;
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Olmoe;

#[derive(Debug)]
struct Olmoe;

const OUTPUT: Output = Output { model_type: "lowrank_olmoe", class: "Olmoe", width_key: "intermediate_size" };

/// What `OlmoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[(
    Rule::Read,
    &[
        "attention_bias",
        "clip_qkv",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_local_experts",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    ],
)];

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
        [allowed::HUGGING_FACE, CONFIG_KEYS, allowed::OTHER_FAMILIES].concat()
    }

    /// Defaults and their exceptions are those of transformers' `OlmoeConfig`.
    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        keys::refuse_quantised(config)?;
        keys::check_class(config, &OUTPUT)?;
        allowed::check(config, &[&self.config_keys()])?;
        let hidden_size = keys::dimension_or(config, "hidden_size", 2048)?;
        let num_attention_heads = keys::dimension_or(config, "num_attention_heads", 16)?;
        let vocab_size = keys::dimension_or(config, "vocab_size", 50304)?;
        keys::check_loadable(config, vocab_size)?;
        Ok(ModelConfig {
            family: self,
            block: Block {
                router: Router::SoftmaxTopK { renormalise: keys::flag(config, "norm_topk_prob")? },
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::None,
                moe_layers: MoeLayers::All,
                query_key_norm: QueryKeyNorm::AllHeads,
                attention_bias: if keys::flag(config, "attention_bias")? {
                    AttentionBias::All
                } else {
                    AttentionBias::None
                },
            },
            hidden_size,
            intermediate_size: keys::dimension_or(config, "intermediate_size", 2048)?,
            num_hidden_layers: keys::dimension_or(config, "num_hidden_layers", 16)?,
            num_local_experts: keys::num_experts(config, 64)?,
            num_experts_per_tok: keys::dimension_or(config, "num_experts_per_tok", 8)?,
            num_attention_heads,
            num_key_value_heads: keys::optional_dimension(config, "num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim: hidden_size / num_attention_heads,
            vocab_size,
            max_position_embeddings: keys::dimension_or(config, "max_position_embeddings", 4096)?,
            rms_norm_eps: keys::positive(config, "rms_norm_eps")?.unwrap_or(1e-5),
            rope_theta: keys::rope_theta(config, 10_000.0)?,
            sliding_window: None,
            tie_word_embeddings: keys::flag(config, "tie_word_embeddings")?,
            clip_qkv: keys::optional_positive(config, "clip_qkv")?,
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
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = json!({"model_type": "olmoe", "num_attention_heads": 8});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::from_hf_json(&config)
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
