//! DeepSeek-V2 and V2-Lite (2405.04434): `DeepseekV2ForCausalLM`. Latent attention, a softmax router that may choose among groups, shared
//! experts; the first layers have no experts.

use super::defaults::{self, Defaults, KeyValueHeads};
use super::{keys, latent, rotation};
use crate::block::{Block, ExpertGroups, NormKind, QueryKeyNorm, Router};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::Spelling;
use crate::rules::{Keys, Rule, ValueKind};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &DeepseekV2;

#[derive(Debug)]
struct DeepseekV2;

const OUTPUT: Output =
    Output { model_type: "lowrank_deepseek_v2", class: "DeepseekV2", width_key: "moe_intermediate_size" };

/// What `DeepseekV2Config` of transformers has beside the keys of every model, and what DeepSeek's own class reads.
const CONFIG_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "first_k_dense_replace",
            "moe_intermediate_size",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "routed_scaling_factor",
            "topk_group",
            "topk_method",
        ],
    ),
    latent::KEYS,
    // Of training.
    (Rule::Harmless(ValueKind::Number), &["aux_loss_alpha", "ep_size"]),
    (Rule::Harmless(ValueKind::Flag), &["seq_aux"]),
];

/// Those of `DeepseekV2Config`. It has none for the experts of a token, and versions differ in that of the vocabulary: a config
/// must have both.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 4096,
    expert_width: 1407,
    num_hidden_layers: 32,
    num_experts: 64,
    count_experts: keys::n_routed_experts,
    num_experts_per_tok: 0,
    num_attention_heads: 32,
    num_key_value_heads: KeyValueHeads::AsQueries,
    vocab_size: 0,
    max_position_embeddings: 2048,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-6,
    rotation: rotation::YARN,
};

impl Family for DeepseekV2 {
    fn model_type(&self) -> &'static str {
        "deepseek_v2"
    }

    fn title(&self) -> &'static str {
        "DeepSeek-V2"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::DEEPSEEK
    }

    fn config_keys(&self) -> Vec<Keys> {
        defaults::config_keys(CONFIG_KEYS)
    }

    /// DeepSeek published it before transformers had a class, which computes the same.
    fn makers_code(&self) -> &'static [&'static str] {
        &["modeling_deepseek.DeepseekV2Model", "modeling_deepseek.DeepseekV2ForCausalLM"]
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        for key in ["num_experts_per_tok", "vocab_size"] {
            keys::dimension(config, key)?;
        }
        let read = DEFAULTS.read(self, config, |layers| {
            // DeepSeek's own class divides by the sum, transformers' does not.
            if keys::flag(config, "norm_topk_prob")? {
                let supported = "`false`: transformers does not divide by the sum here";
                return Err(ConfigError::unsupported("norm_topk_prob", &true.into(), supported));
            }
            let dense_width = keys::dimension_or(config, "intermediate_size", 11_008)?;
            let expert_width = keys::dimension_or(config, OUTPUT.width_key, DEFAULTS.expert_width)?;
            Ok(Block {
                router: Router {
                    groups: groups(config)?,
                    scale: keys::positive(config, "routed_scaling_factor")?.unwrap_or(1.0),
                    ..Router::softmax(false)
                },
                activation: keys::activation(config)?,
                shared_experts: keys::shared_experts(config, 2, expert_width)?,
                moe_layers: keys::moe_layers_after_first(config, layers, 0, dense_width)?,
                attention: latent::attention(config, true)?,
                query_key_norm: QueryKeyNorm::None,
                attention_bias: latent::bias(config)?,
                norm: NormKind::RootMeanSquare,
            })
        })?;
        if !read.hidden_size.is_multiple_of(read.num_attention_heads) {
            let expected = "a divisor of `hidden_size`, without which transformers 5 does not load";
            return Err(ConfigError::bad("num_attention_heads", &read.num_attention_heads.into(), expected));
        }
        latent::heads(config, read)
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

/// Groups that score by their best expert, or none: `topk_method`, which has no group by default.
fn groups(config: &Value) -> Result<ExpertGroups, ConfigError> {
    const KEY: &str = "topk_method";
    match config.get(KEY) {
        None => Ok(ExpertGroups::NONE),
        Some(Value::String(name)) if name == "greedy" => Ok(ExpertGroups::NONE),
        Some(Value::String(name)) if name == "group_limited_greedy" => Ok(ExpertGroups {
            count: keys::dimension(config, "n_group")?,
            chosen: keys::dimension(config, "topk_group")?,
            scored_by: 1,
        }),
        Some(other) => Err(ConfigError::unsupported(KEY, other, "`greedy` and `group_limited_greedy`")),
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
        let base = json!({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "vocab_size": 102_400});
        test_support::read(base, changes)
    }

    fn yarn(changes: Value) -> Value {
        changed(
            json!({
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn"
            }),
            changes,
        )
    }

    /// `config.json` of DeepSeek-V2-Lite.
    #[test]
    fn the_config_of_v2_lite_is_read() {
        let says_no_shape = json!({
            "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV2Config", "AutoModel": "modeling_deepseek.DeepseekV2Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"
            },
            "aux_loss_alpha": 0.001, "bos_token_id": 100_000, "eos_token_id": 100_001, "ep_size": 1, "hidden_act": "silu",
            "initializer_range": 0.02, "moe_layer_freq": 1, "n_group": 1, "norm_topk_prob": false, "pretraining_tp": 1,
            "rms_norm_eps": 1e-6, "rope_scaling": yarn(json!({})), "rope_theta": 10_000, "routed_scaling_factor": 1.0,
            "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 1,
            "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
        });
        let shapes = json!({
            "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10_944, "kv_lora_rank": 512,
            "max_position_embeddings": 163_840, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
            "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
            "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102_400,
        });
        let config = read(changed(says_no_shape, shapes)).unwrap();
        assert_eq!(config.matrices().count(), 26 * 64 * 3);
        assert_eq!(config.block.router, Router::softmax(false));
        let of_layer_1 = |name: &str| shape(&config, &format!("model.layers.1.{name}"));
        assert_eq!(of_layer_1("self_attn.q_proj.weight"), Some(vec![3072, 2048]));
        assert_eq!(of_layer_1("self_attn.kv_b_proj.weight"), Some(vec![4096, 512]));
        assert_eq!(of_layer_1("mlp.gate.e_score_correction_bias"), None);
        assert_eq!(of_layer_1("mlp.shared_experts.down_proj.weight"), Some(vec![2048, 2816]));
        assert_eq!(shape(&config, "model.layers.0.mlp.down_proj.weight"), Some(vec![2048, 10_944]));
        let params: u64 = config.tensors().iter().map(|spec| spec.elements()).sum();
        assert_eq!(params, 15_706_484_224);
        let Rotation::Yarn(yarn) = config.rotation else { panic!("{:?}", config.rotation) };
        assert_eq!(yarn.amplitude(), 1.0);
        assert!((yarn.score_scale() - 1.5896).abs() < 1e-4);
    }

    /// The keys in which the `config.json` of DeepSeek-V2 differs.
    #[test]
    fn the_config_of_v2_is_read() {
        let config = read(json!({
            "first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12_288, "moe_intermediate_size": 1536,
            "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
            "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3,
            "topk_method": "group_limited_greedy", "rope_scaling": yarn(json!({})), "max_position_embeddings": 163_840,
        }))
        .unwrap();
        let groups = ExpertGroups { count: 8, chosen: 3, scored_by: 1 };
        assert_eq!(config.block.router, Router { groups, scale: 16.0, ..Router::softmax(false) });
        assert_eq!(shape(&config, "model.layers.1.self_attn.q_a_proj.weight"), Some(vec![1536, 5120]));
        let params: u64 = config.tensors().iter().map(|spec| spec.elements()).sum();
        assert_eq!(params, 235_741_434_880);
    }

    #[test]
    fn without_groups_their_numbers_say_nothing() {
        let router = |changes: Value| read(changes).unwrap().block.router;
        assert_eq!(router(json!({"n_group": 7, "topk_group": 9})), router(json!({})));
        assert_eq!(router(json!({"n_group": null, "topk_group": null})), router(json!({})));
        // A group may be one expert.
        let alone = json!({"topk_method": "group_limited_greedy", "n_group": 64, "topk_group": 6});
        assert_eq!(router(alone).groups.count, 64);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let grouped = |count: Value, chosen: Value| json!({"topk_method": "group_limited_greedy", "n_group": count, "topk_group": chosen});
        for (kind, key, changes) in [
            (Unsupported, "scoring_func", json!({"scoring_func": "sigmoid"})),
            (Unsupported, "topk_method", json!({"topk_method": "noaux_tc"})),
            (Unsupported, "topk_method", json!({"topk_method": null})),
            (Unsupported, "norm_topk_prob", json!({"norm_topk_prob": true})),
            (Unsupported, "mlp_bias", json!({"mlp_bias": true})),
            (Unsupported, "moe_layer_freq", json!({"moe_layer_freq": 2})),
            (Unsupported, "num_key_value_heads", json!({"num_key_value_heads": 8})),
            (Unsupported, "head_dim", json!({"head_dim": 128})),
            (Unsupported, "rope_scaling", json!({"rope_scaling": yarn(json!({"type": "linear"}))})),
            (BrokenCheckpoint, "num_attention_heads", json!({"num_attention_heads": 24})),
            (BrokenCheckpoint, "n_shared_experts", json!({"n_shared_experts": null})),
            (BrokenCheckpoint, "num_experts_per_tok", json!({"num_experts_per_tok": null})),
            (BrokenCheckpoint, "n_group", grouped(json!(null), json!(3))),
            (BrokenCheckpoint, "n_group", grouped(json!(7), json!(3))),
            (BrokenCheckpoint, "topk_group", grouped(json!(64), json!(5))),
        ] {
            refused_by_name(read(changes), kind, key);
        }
        for key in ["num_experts_per_tok", "vocab_size"] {
            let mut config = json!({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "vocab_size": 64});
            config.as_object_mut().unwrap().remove(key);
            assert_eq!(ModelConfig::from_hf_json(&config), Err(ConfigError::Missing(key)));
        }
    }
}
