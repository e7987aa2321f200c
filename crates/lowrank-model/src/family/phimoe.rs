//! Phi-3.5-MoE (Abdin et al., 2404.14219): `PhimoeForCausalLM`. Mixtral's names; a SparseMixer router, LayerNorm with biases, a head with
//! one, and angles that depend on the length of the text.

use super::defaults::{Defaults, KeyValueHeads};
use super::{allowed, keys, rotation};
use crate::block::{Attention, Block, MoeLayers, NormKind, QueryKeyNorm, Router, Score, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::{FusedSpelling, Spelling};
use crate::rules::{Keys, Neutral, Rule, ValueKind};
use serde_json::Value;

/// The family.
pub(super) const FAMILY: &dyn Family = &Phimoe;

#[derive(Debug)]
struct Phimoe;

const SPELLING: Spelling = Spelling {
    fused: FusedSpelling { router: "router", ..FusedSpelling::TRANSFORMERS_5 },
    ..Spelling::MIXTRAL
};

const OUTPUT: Output =
    Output { model_type: "lowrank_phimoe", class: "Phimoe", width_key: "intermediate_size" };

/// What `PhimoeConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "attention_bias",
            "head_dim",
            "hidden_act",
            "hidden_size",
            "intermediate_size",
            "lm_head_bias",
            "max_position_embeddings",
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
            "router_jitter_noise",
            "sliding_window",
            "tie_word_embeddings",
            "use_sliding_window",
            "vocab_size",
        ],
    ),
    // Of training.
    (Rule::Harmless(ValueKind::Number), &["input_jitter_noise"]),
    // Of other routers.
    (Rule::Only(&[Neutral::Null]), &["norm_topk_prob", "scoring_func"]),
];

/// Those of `PhimoeConfig`.
const DEFAULTS: Defaults = Defaults {
    hidden_size: 4096,
    expert_width: 6400,
    num_hidden_layers: 32,
    num_experts: 16,
    count_experts: keys::num_local_experts,
    num_experts_per_tok: EXPERTS_OF_A_TOKEN,
    num_attention_heads: 32,
    num_key_value_heads: KeyValueHeads::NumberOrAsQueries(8),
    vocab_size: 32_064,
    max_position_embeddings: 131_072,
    rope_theta: 1e6,
    rms_norm_eps: 1e-5,
    rotation: rotation::LONG,
};
const ROUTER_JITTER_NOISE: f64 = 0.01;
/// The router of transformers takes so many, whatever the config says.
const EXPERTS_OF_A_TOKEN: usize = 2;

impl Family for Phimoe {
    fn model_type(&self) -> &'static str {
        "phimoe"
    }

    fn title(&self) -> &'static str {
        "Phi-3.5-MoE"
    }

    fn spelling(&self) -> &'static Spelling {
        &SPELLING
    }

    /// Its own first: what it reads is harmless elsewhere.
    fn config_keys(&self) -> Vec<Keys> {
        [CONFIG_KEYS, allowed::HUGGING_FACE, allowed::OTHER_FAMILIES].concat()
    }

    /// Microsoft published it before transformers had a class, which computes the same.
    fn makers_code(&self) -> &'static [&'static str] {
        &["modeling_phimoe.PhiMoEForCausalLM"]
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let read = DEFAULTS.read(self, config, |_| {
            Ok(Block {
                router: Router {
                    score: Score::SparseMixer { jitter: jitter(config)? },
                    ..Router::softmax(false)
                },
                activation: keys::activation(config)?,
                shared_experts: SharedExperts::None,
                moe_layers: MoeLayers::All,
                attention: Attention::Grouped,
                query_key_norm: QueryKeyNorm::None,
                attention_bias: keys::attention_bias(config)?,
                norm: NormKind::MeanAndVariance,
            })
        })?;
        if read.num_experts_per_tok != EXPERTS_OF_A_TOKEN {
            let supported = "2: the router of transformers takes two experts, whatever this key says";
            let found = read.num_experts_per_tok.into();
            return Err(ConfigError::unsupported("num_experts_per_tok", &found, supported));
        }
        check_heads(config, &read)?;
        let rotation = DEFAULTS.rotation.read(config, read.max_position_embeddings, read.head_dim)?;
        Ok(ModelConfig {
            rotation,
            sliding_window: sliding_window(config)?,
            head_bias: keys::flag(config, "lm_head_bias")?,
            ..read
        })
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

/// The noise of training, which also says how near a logit must be to the best to have a share. Not null: transformers
/// multiplies it.
fn jitter(config: &Value) -> Result<f64, ConfigError> {
    const KEY: &str = "router_jitter_noise";
    let Some(value) = config.get(KEY) else { return Ok(ROUTER_JITTER_NOISE) };
    match value.as_f64() {
        Some(jitter) if jitter >= 0.0 => Ok(jitter),
        _ => Err(ConfigError::bad(KEY, value, "a number of at least 0")),
    }
}

/// transformers 4.57 divides the hidden size among the heads, whatever `head_dim` says; 5 reads the key.
fn check_heads(config: &Value, read: &ModelConfig) -> Result<(), ConfigError> {
    if !read.hidden_size.is_multiple_of(read.num_attention_heads) {
        let expected = "a divisor of `hidden_size`, without which transformers 4.57 does not load";
        return Err(ConfigError::bad("num_attention_heads", &read.num_attention_heads.into(), expected));
    }
    match config.get("head_dim").filter(|value| value.as_u64() != Some(read.head_dim as u64)) {
        None => Ok(()),
        Some(value) => {
            let supported = format!("{}, as `hidden_size` and `num_attention_heads` say", read.head_dim);
            Err(ConfigError::unsupported("head_dim", value, &supported))
        }
    }
}

/// The window of attention. transformers 4.57 has none if `use_sliding_window` is there and not true; 5 does not read it.
fn sliding_window(config: &Value) -> Result<Option<usize>, ConfigError> {
    const SWITCH: &str = "use_sliding_window";
    let window = keys::optional_dimension(config, "sliding_window")?;
    match config.get(SWITCH) {
        None => Ok(window),
        Some(Value::Null) if window.is_none() => Ok(window),
        Some(value) if value.as_bool() == Some(window.is_some()) => Ok(window),
        Some(value) => {
            let supported = format!("{}, as `sliding_window` says", window.is_some());
            Err(ConfigError::unsupported(SWITCH, value, &supported))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind::{BrokenCheckpoint, Unsupported};
    use crate::block::AttentionBias;
    use crate::family::test_support::{self, changed, refused_by_name, shape};
    use crate::names::{NormPlace, Role};
    use crate::{Layout, LongRope, Rotation, Stretch};
    use serde_json::json;

    fn read(changes: Value) -> Result<ModelConfig, ConfigError> {
        test_support::read(json!({"model_type": "phimoe"}), changes)
    }

    /// Of a model with four entries in a head.
    fn long(changes: Value) -> Value {
        let rotation = json!({
            "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2, 30.5], "short_mscale": 1.1, "long_mscale": 1.25,
            "original_max_position_embeddings": 4096
        });
        json!({"hidden_size": 128, "rope_scaling": changed(rotation, changes)})
    }

    #[test]
    fn an_empty_config_is_transformers_default() {
        let config = read(json!({})).unwrap();
        assert_eq!((config.hidden_size, config.intermediate_size, config.head_dim), (4096, 6400, 128));
        assert_eq!((config.num_local_experts, config.num_experts_per_tok), (16, 2));
        assert_eq!((config.rope_theta, &config.rotation), (1e6, &Rotation::Plain));
        assert_eq!(config.block.router.score, Score::SparseMixer { jitter: 0.01 });
        assert!(!config.block.router.renormalise);
        assert_eq!((config.block.attention_bias, config.head_bias), (AttentionBias::None, false));
        assert_eq!(config.sliding_window, None);
        assert_eq!(shape(&config, "lm_head.bias"), None);
    }

    /// `config.json` of Phi-3.5-MoE-instruct, with other factors in the lists.
    #[test]
    fn the_config_of_phi_3_5_is_read() {
        let config = read(json!({
            "architectures": ["PhiMoEForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phimoe.PhiMoEConfig", "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"
            },
            "bos_token_id": 1, "eos_token_id": 32_000, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
            "initializer_range": 0.02, "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": true,
            "max_position_embeddings": 131_072, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096,
            "output_router_logits": false, "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "long_factor": vec![1.5; 64], "long_mscale": 1.243_163_121_016_122, "original_max_position_embeddings": 4096,
                "short_factor": vec![1.0; 64], "short_mscale": 1.243_163_121_016_122, "type": "longrope"
            },
            "rope_theta": 10_000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131_072,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": true,
            "vocab_size": 32_064,
        }))
        .unwrap();
        assert_eq!(config.matrices().count(), 32 * 16 * 3);
        assert_eq!(config.sliding_window, Some(131_072));
        let of_layer_5 = |name: &str| shape(&config, &format!("model.layers.5.{name}"));
        assert_eq!(of_layer_5("block_sparse_moe.experts.15.w2.weight"), Some(vec![4096, 6400]));
        assert_eq!(of_layer_5("block_sparse_moe.gate.weight"), Some(vec![16, 4096]));
        assert_eq!(of_layer_5("input_layernorm.bias"), Some(vec![4096]));
        assert_eq!(of_layer_5("post_attention_layernorm.bias"), Some(vec![4096]));
        assert_eq!(of_layer_5("self_attn.k_proj.bias"), Some(vec![1024]));
        assert_eq!(of_layer_5("self_attn.o_proj.bias"), Some(vec![4096]));
        assert_eq!(shape(&config, "model.norm.bias"), Some(vec![4096]));
        assert_eq!(shape(&config, "lm_head.bias"), Some(vec![32_064]));
        let params: u64 = config.tensors().iter().map(|spec| spec.elements()).sum();
        assert_eq!(params, 41_873_153_344);
    }

    #[test]
    fn a_tied_head_keeps_its_bias() {
        let config = read(json!({"tie_word_embeddings": true, "lm_head_bias": true})).unwrap();
        assert_eq!(shape(&config, "lm_head.weight"), None);
        assert_eq!(shape(&config, "lm_head.bias"), Some(vec![32_064]));
    }

    #[test]
    fn fused_tensors_are_named_as_transformers_5_names_them() {
        let config = read(json!({})).unwrap();
        let stored = |role| config.locate(Layout::HfFused, role).tensor;
        assert_eq!(stored(Role::Router { layer: 3 }), "model.layers.3.mlp.router.weight");
        assert_eq!(stored(Role::Expert(config.first_matrix())), "model.layers.0.mlp.experts.gate_up_proj");
        assert_eq!(stored(Role::NormBias(NormPlace::Head)), "model.norm.bias");
    }

    #[test]
    fn factors_of_short_and_of_long_texts_are_read() {
        let expected = Rotation::Long(LongRope {
            trained_positions: 4096,
            short: Stretch { factors: vec![1.0, 1.5], amplitude: 1.1 },
            long: Stretch { factors: vec![2.0, 30.5], amplitude: 1.25 },
        });
        for changes in [
            json!({}),
            json!({"rope_type": "longrope"}),
            json!({"factor": 32.0, "attention_factor": null}),
            json!({"rope_theta": 1e6}),
        ] {
            assert_eq!(read(long(changes.clone())).unwrap().rotation, expected, "{changes}");
        }
        let mut both = long(json!({}));
        both["rope_parameters"] = changed(both["rope_scaling"].clone(), json!({"rope_theta": 5e5}));
        both["rope_theta"] = json!(5e5);
        let config = read(both.clone()).unwrap();
        assert_eq!((&config.rotation, config.rope_theta), (&expected, 5e5));
        both["rope_parameters"]["long_factor"] = json!([2, 30]);
        refused_by_name(read(both), Unsupported, "rope_scaling");
    }

    #[test]
    fn what_an_output_says_of_the_rotation_is_read_back() {
        let config = read(long(json!({}))).unwrap();
        let again = read(json!({"hidden_size": 128, "rope_scaling": config.rotation.to_json()})).unwrap();
        assert_eq!(again.rotation, config.rotation);
    }

    #[test]
    fn a_window_may_have_a_switch() {
        let window = |changes: Value| read(changes).map(|config| config.sliding_window);
        assert_eq!(window(json!({"sliding_window": 7})), Ok(Some(7)));
        assert_eq!(window(json!({"sliding_window": 7, "use_sliding_window": true})), Ok(Some(7)));
        assert_eq!(window(json!({"use_sliding_window": null})), Ok(None));
        for refused in [json!(false), json!(null)] {
            let changes = json!({"sliding_window": 7, "use_sliding_window": refused});
            refused_by_name(read(changes), Unsupported, "use_sliding_window");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let without = |key: &str| {
            let mut config = long(json!({}));
            config["rope_scaling"].as_object_mut().unwrap().remove(key);
            config
        };
        for (kind, key, changes) in [
            (Unsupported, "num_experts_per_tok", json!({"num_experts_per_tok": 1})),
            (Unsupported, "num_experts_per_tok", json!({"num_experts_per_tok": 3})),
            (Unsupported, "norm_topk_prob", json!({"norm_topk_prob": true})),
            (Unsupported, "scoring_func", json!({"scoring_func": "softmax"})),
            (Unsupported, "num_experts", json!({"num_experts": 8})),
            (Unsupported, "head_dim", json!({"head_dim": 64})),
            (Unsupported, "head_dim", json!({"head_dim": null})),
            (Unsupported, "hidden_act", json!({"hidden_act": "gelu"})),
            (Unsupported, "qkv_bias", json!({"qkv_bias": true})),
            (Unsupported, "architectures", json!({"architectures": ["PhiMoEForSequenceClassification"]})),
            (Unsupported, "rope_scaling", long(json!({"type": "yarn"}))),
            (Unsupported, "rope_scaling", long(json!({"type": "su"}))),
            (Unsupported, "rope_scaling", long(json!({"rope_type": "default"}))),
            (Unsupported, "mscale", long(json!({"mscale": 1.0}))),
            (Unsupported, "original_max_position_embeddings", {
                changed(long(json!({})), json!({"original_max_position_embeddings": 2048}))
            }),
            (BrokenCheckpoint, "router_jitter_noise", json!({"router_jitter_noise": null})),
            (BrokenCheckpoint, "router_jitter_noise", json!({"router_jitter_noise": -0.1})),
            (BrokenCheckpoint, "num_local_experts", json!({"num_local_experts": 1})),
            (BrokenCheckpoint, "num_attention_heads", json!({"num_attention_heads": 24})),
            (BrokenCheckpoint, "lm_head_bias", json!({"lm_head_bias": 1})),
            (BrokenCheckpoint, "long_factor", long(json!({"long_factor": [1.0]}))),
            (BrokenCheckpoint, "long_factor", long(json!({"long_factor": [1.0, 0.0]}))),
            (BrokenCheckpoint, "short_factor", long(json!({"short_factor": 1.0}))),
            (BrokenCheckpoint, "short_mscale", long(json!({"short_mscale": 0}))),
            (BrokenCheckpoint, "original_max", long(json!({"original_max_position_embeddings": 1}))),
            (BrokenCheckpoint, "long_mscale", without("long_mscale")),
            (BrokenCheckpoint, "long_factor", without("long_factor")),
            (
                BrokenCheckpoint,
                "original_max_position_embeddings",
                without("original_max_position_embeddings"),
            ),
        ] {
            refused_by_name(read(changes), kind, key);
        }
    }
}
