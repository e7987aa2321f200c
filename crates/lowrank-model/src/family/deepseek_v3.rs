//! DeepSeek-V3 and R1 (2412.19437): `DeepseekV3ForCausalLM`. Latent attention, a router with groups and a bias, shared experts; the first
//! layers have no experts.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, latent, rotation};
use crate::block::{Block, NormKind, QueryKeyNorm, Router, Score};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Neutral, Rule, ValueKind};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &DeepseekV3;

#[derive(Debug)]
struct DeepseekV3;

const OUTPUT: Output =
    Output { model_type: "lowrank_deepseek_v3", class: "DeepseekV3", width_key: "moe_intermediate_size" };

/// What `DeepseekV3Config` of transformers has beside the keys of every model, and what DeepSeek's own class reads.
const CONFIG_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "first_k_dense_replace",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "num_mtp_layers",
            "num_nextn_predict_layers",
            "rope_interleave",
            "routed_scaling_factor",
            "topk_group",
        ],
    ),
    latent::KEYS,
    // Of training.
    (Rule::Harmless(ValueKind::Number), &["aux_loss_alpha", "ep_size"]),
    (Rule::Harmless(ValueKind::Flag), &["seq_aux"]),
    // What the class of transformers takes for granted.
    (Rule::Only(&[Neutral::Null, Neutral::Text("sigmoid")]), &["scoring_func"]),
    (Rule::Only(&[Neutral::Null, Neutral::Text("noaux_tc")]), &["topk_method"]),
];

/// Those of `DeepseekV3Config`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 7168,
    expert_width: 2048,
    num_hidden_layers: 61,
    num_experts: 256,
    count_experts: keys::n_routed_experts,
    num_experts_per_tok: 8,
    num_attention_heads: 128,
    num_key_value_heads: KeyValueHeads::NumberOrAsQueries(128),
    vocab_size: 129_280,
    max_position_embeddings: 4096,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-6,
    rotation: rotation::YARN,
};

impl Family for DeepseekV3 {
    fn model_type(&self) -> &'static str {
        "deepseek_v3"
    }

    fn title(&self) -> &'static str {
        "DeepSeek-V3"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::DEEPSEEK
    }

    fn config_keys(&self) -> Vec<Keys> {
        defaults::config_keys(CONFIG_KEYS)
    }

    /// DeepSeek published it before transformers had a class, which computes the same.
    fn makers_code(&self) -> &'static [&'static str] {
        &["modeling_deepseek.DeepseekV3Model", "modeling_deepseek.DeepseekV3ForCausalLM"]
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let read = DEFAULTS.read(self, config, |layers| {
            let dense_width = keys::dimension_or(config, "intermediate_size", 18_432)?;
            let expert_width = keys::dimension_or(config, OUTPUT.width_key, DEFAULTS.expert_width)?;
            Ok(Block {
                router: Router {
                    score: Score::SigmoidAndBias,
                    groups: keys::groups_scored_by_two(config, [8, 4])?,
                    renormalise: keys::flag_or(config, "norm_topk_prob", true)?,
                    scale: keys::positive(config, "routed_scaling_factor")?.unwrap_or(2.5),
                },
                activation: keys::activation(config)?,
                shared_experts: keys::shared_experts(config, 1, expert_width)?,
                moe_layers: keys::moe_layers_after_first(config, layers, 3, dense_width)?,
                attention: latent::attention(config, keys::flag_or(config, "rope_interleave", true)?)?,
                query_key_norm: QueryKeyNorm::None,
                attention_bias: latent::bias(config)?,
                norm: NormKind::RootMeanSquare,
            })
        })?;
        let prediction_layers = keys::prediction_layers(config)?;
        latent::heads(config, ModelConfig { prediction_layers, ..read })
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
    use crate::Rotation;
    use crate::family::test_support::{self, changed, refused_by_name, shape};
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        test_support::read(json!({"model_type": "deepseek_v3"}), changes)
    }

    /// `config.json` of DeepSeek-V3, without its quantisation.
    #[test]
    fn deepseeks_own_config_is_read() {
        let config = read(json!({
            "architectures": ["DeepseekV3ForCausalLM"], "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1,
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"
            },
            "max_position_embeddings": 163_840, "num_nextn_predict_layers": 1, "pretraining_tp": 1, "rope_theta": 10_000,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn"
            },
            "scoring_func": "sigmoid", "seq_aux": true, "topk_method": "noaux_tc",
        }))
        .unwrap();
        assert_eq!(config.matrices().count(), 58 * 256 * 3);
        let of_layer_3 = |name: &str| shape(&config, &format!("model.layers.3.{name}"));
        assert_eq!(of_layer_3("self_attn.q_a_proj.weight"), Some(vec![1536, 7168]));
        assert_eq!(of_layer_3("self_attn.q_b_proj.weight"), Some(vec![24_576, 1536]));
        assert_eq!(of_layer_3("self_attn.kv_a_proj_with_mqa.weight"), Some(vec![576, 7168]));
        assert_eq!(of_layer_3("self_attn.kv_b_proj.weight"), Some(vec![32_768, 512]));
        assert_eq!(of_layer_3("self_attn.o_proj.weight"), Some(vec![7168, 16_384]));
        assert_eq!(of_layer_3("self_attn.q_a_layernorm.weight"), Some(vec![1536]));
        assert_eq!(of_layer_3("self_attn.kv_a_layernorm.weight"), Some(vec![512]));
        let params: u64 = config.tensors().iter().map(|spec| spec.elements()).sum();
        assert_eq!(params, 671_026_419_200);
        let Rotation::Yarn(yarn) = config.rotation else { panic!("{:?}", config.rotation) };
        assert_eq!(yarn.amplitude(), 1.0);
        assert!((yarn.score_scale() - 1.8739).abs() < 1e-4);
    }

    #[test]
    fn queries_may_have_no_latent_and_biases_follow_the_latents() {
        let config = read(json!({"q_lora_rank": null, "attention_bias": true})).unwrap();
        let of_layer_3 = |name: &str| shape(&config, &format!("model.layers.3.self_attn.{name}"));
        assert_eq!(of_layer_3("q_proj.weight"), Some(vec![24_576, 7168]));
        assert_eq!(of_layer_3("q_a_proj.weight"), None);
        assert_eq!(of_layer_3("q_proj.bias"), None);
        assert_eq!(of_layer_3("kv_a_proj_with_mqa.bias"), Some(vec![576]));
        assert_eq!(of_layer_3("kv_b_proj.bias"), None);
        assert_eq!(of_layer_3("o_proj.bias"), Some(vec![7168]));
    }

    #[test]
    fn fp8_with_a_scale_for_each_block_is_read_and_no_other_quantisation() {
        let blocks = |changes: Value| {
            let quantised = json!({
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 64]
            });
            read(json!({"quantization_config": changed(quantised, changes)})).map(|config| config.fp8_blocks)
        };
        assert_eq!(blocks(json!({})), Ok(Some([128, 64])));
        assert_eq!(read(json!({"quantization_config": null})).unwrap().fp8_blocks, None);
        for changes in [
            json!({"quant_method": "gptq"}),
            json!({"fmt": "e5m2"}),
            json!({"weight_block_size": null}),
            json!({"weight_block_size": [128]}),
            json!({"weight_block_size": [128, 0]}),
        ] {
            let error = blocks(changes.clone()).unwrap_err();
            assert!(matches!(error, ConfigError::Quantised(_)), "{changes}: {error}");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let yarn = |changes: Value| {
            let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
            json!({"rope_scaling": changed(yarn, changes)})
        };
        assert!(read(yarn(json!({}))).is_ok());
        for (kind, key, changes) in [
            (Unsupported, "scoring_func", json!({"scoring_func": "softmax"})),
            (Unsupported, "topk_method", json!({"topk_method": "greedy"})),
            (Unsupported, "num_key_value_heads", json!({"num_key_value_heads": 8})),
            (Unsupported, "head_dim", json!({"head_dim": 56})),
            (Unsupported, "moe_layer_freq", json!({"moe_layer_freq": 2})),
            (Unsupported, "rope_scaling", yarn(json!({"rope_type": "longrope"}))),
            (Unsupported, "rope_scaling", yarn(json!({"type": "default"}))),
            (Unsupported, "short_factor", yarn(json!({"short_factor": [1.0]}))),
            (BrokenCheckpoint, "factor", yarn(json!({"factor": 0.5}))),
            (BrokenCheckpoint, "factor", yarn(json!({"factor": null}))),
            (Unsupported, "original_max_position_embeddings", {
                let mut two = yarn(json!({}));
                two["original_max_position_embeddings"] = json!(32);
                two
            }),
            (
                Unsupported,
                "auto_map",
                json!({"auto_map": {"AutoModelForCausalLM": "own.DeepseekV3ForCausalLM"}}),
            ),
        ] {
            refused_by_name(read(changes), kind, key);
        }
    }
}
