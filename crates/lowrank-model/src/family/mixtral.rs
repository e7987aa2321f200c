//! Mixtral (Jiang et al., *Mixtral of Experts*, 2401.04088): `MixtralForCausalLM`, Mistral's own files, and minixtral's
//! factors.

use super::{allowed, keys, rotation};
use crate::Rotation;
use crate::block::{
    Activation, Attention, AttentionBias, Block, MoeLayers, NormKind, QueryKeyNorm, Router, SharedExperts,
};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::{AttentionPart, NormPlace, Role, Spelling};
use crate::rules::{Keys, Neutral, Rule, ValueKind};
use crate::widths::Widths;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The family.
pub(super) const FAMILY: &dyn Family = &Mixtral;

#[derive(Debug)]
struct Mixtral;

const OUTPUT: Output =
    Output { model_type: "lowrank_mixtral", class: "Mixtral", width_key: "intermediate_size" };

/// What `MixtralConfig` of transformers has beside the keys of every model.
const CONFIG_KEYS: &[Keys] = &[(
    Rule::Read,
    &[
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
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
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    ],
)];

const ABSENT: Rule = Rule::Only(&[Neutral::Null]);
const OFF: Rule = Rule::Only(&[Neutral::Null, Neutral::False]);

/// `TransformerArgs` of mistral-inference, and what vLLM reads in the same file.
const PARAMS_KEYS: &[Keys] = &[
    (
        Rule::Read,
        &[
            "_sliding_window",
            "dim",
            "head_dim",
            "hidden_dim",
            "max_position_embeddings",
            "moe",
            "n_heads",
            "n_kv_heads",
            "n_layers",
            "norm_eps",
            "quantization",
            "rope_theta",
            "sliding_window",
            "tied_embeddings",
            "vocab_size",
        ],
    ),
    (Rule::Harmless(ValueKind::Number), &["max_batch_size", "max_seq_len"]),
    (Rule::Only(&[Neutral::Text("transformer")]), &["model_type"]),
    (Rule::Only(&[Neutral::Null, Neutral::True]), &["causal"]),
    (ABSENT, &["llama_4_scaling", "lora", "softmax_scale", "vision_encoder", "yarn"]),
    (OFF, &["qk_norm", "use_biases"]),
];

/// Inside `moe` of the same file.
const MOE_KEYS: &[Keys] = &[
    (Rule::Read, &["num_experts", "num_experts_per_tok"]),
    (Rule::Only(&[Neutral::Null, Neutral::Number(0)]), &["first_k_dense_replace", "num_shared_experts"]),
    (Rule::Only(&[Neutral::Null, Neutral::Number(1)]), &["routed_scale", "route_every_n"]),
    (ABSENT, &["expert_hidden_dim"]),
];

fn block(activation: Activation) -> Block {
    Block {
        router: Router::softmax(true),
        activation,
        shared_experts: SharedExperts::None,
        moe_layers: MoeLayers::All,
        attention: Attention::Grouped,
        query_key_norm: QueryKeyNorm::None,
        attention_bias: AttentionBias::None,
        norm: NormKind::RootMeanSquare,
    }
}

impl Family for Mixtral {
    fn model_type(&self) -> &'static str {
        "mixtral"
    }

    fn title(&self) -> &'static str {
        "Mixtral"
    }

    fn spelling(&self) -> &'static Spelling {
        &Spelling::MIXTRAL
    }

    fn consolidated_name(&self, role: Role) -> Option<String> {
        let of_layer = |layer: usize, module: &str| format!("layers.{layer}.{module}.weight");
        Some(match role {
            Role::Embedding => "tok_embeddings.weight".into(),
            Role::Attention { layer, part } => of_layer(
                layer,
                match part {
                    AttentionPart::Query => "attention.wq",
                    AttentionPart::Key => "attention.wk",
                    AttentionPart::Value => "attention.wv",
                    AttentionPart::Output => "attention.wo",
                    AttentionPart::QueryDown
                    | AttentionPart::QueryUp
                    | AttentionPart::LatentDown
                    | AttentionPart::LatentUp => return None,
                },
            ),
            Role::Norm(NormPlace::Attention { layer }) => of_layer(layer, "attention_norm"),
            Role::Norm(NormPlace::Experts { layer }) => of_layer(layer, "ffn_norm"),
            Role::Norm(NormPlace::Head) => "norm.weight".into(),
            Role::AttentionBias { .. }
            | Role::NormBias(_)
            | Role::HeadBias
            | Role::Norm(
                NormPlace::Query { .. }
                | NormPlace::Key { .. }
                | NormPlace::QueryLatent { .. }
                | NormPlace::Latent { .. },
            )
            | Role::RouterBias { .. }
            | Role::SharedBase { .. }
            | Role::SharedExpert { .. }
            | Role::DenseBlock { .. }
            | Role::SharedExpertGate { .. } => return None,
            Role::Router { layer } => of_layer(layer, "feed_forward.gate"),
            Role::Expert(id) => {
                let projection = Spelling::MIXTRAL.projections[id.projection.index()];
                of_layer(id.layer, &format!("feed_forward.experts.{}.{projection}", id.expert))
            }
            Role::Head => "output.weight".into(),
        })
    }

    /// minixtral names its own class and keeps Mixtral's keys.
    fn claims(&self, config: &Value) -> bool {
        config.get("ranks").is_some() && config.get("num_local_experts").is_some()
    }

    fn config_keys(&self) -> Vec<Keys> {
        [allowed::HUGGING_FACE, allowed::OTHER_FAMILIES, CONFIG_KEYS].concat()
    }

    fn params_keys(&self) -> Vec<Keys> {
        PARAMS_KEYS.to_vec()
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        let fp8_blocks = keys::fp8_blocks(config)?;
        // minixtral's factors have a class and code of their own, and the same forward pass.
        if config.get("ranks").is_none_or(Value::is_null) {
            keys::check_class(config, self)?;
        }
        allowed::check(config, &[&self.config_keys()])?;
        // Defaults and their exceptions are those of transformers' `MixtralConfig`.
        let hidden_size = keys::dimension_or(config, "hidden_size", 4096)?;
        let num_attention_heads = keys::dimension_or(config, "num_attention_heads", 32)?;
        let num_local_experts = keys::num_local_experts(config, 8)?;
        let num_key_value_heads = match config.get("num_key_value_heads") {
            Some(Value::Null) => num_attention_heads,
            _ => keys::dimension_or(config, "num_key_value_heads", 8)?,
        };
        let sliding_window = keys::optional_dimension(config, "sliding_window")?;
        if let Some(value) = config.get("use_sliding_window").filter(|value| !value.is_null())
            && value.as_bool() != Some(sliding_window.is_some())
        {
            let supported = format!("{}, as `sliding_window` says", sliding_window.is_some());
            return Err(ConfigError::unsupported("use_sliding_window", value, &supported));
        }
        let vocab_size = keys::dimension_or(config, "vocab_size", 32_000)?;
        keys::check_loadable(config, vocab_size)?;
        Ok(ModelConfig {
            family: self,
            block: block(keys::activation(config)?),
            hidden_size,
            intermediate_size: keys::dimension_or(config, "intermediate_size", 14_336)?,
            num_hidden_layers: keys::dimension_or(config, "num_hidden_layers", 32)?,
            num_local_experts,
            num_experts_per_tok: keys::dimension_or(config, "num_experts_per_tok", 2)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: keys::optional_dimension(config, "head_dim")?
                .unwrap_or(hidden_size / num_attention_heads),
            vocab_size,
            max_position_embeddings: keys::optional_dimension(config, "max_position_embeddings")?
                .unwrap_or(4096 * 32),
            rms_norm_eps: keys::positive(config, "rms_norm_eps")?.unwrap_or(1e-5),
            rope_theta: rotation::WHOLE_HEADS.theta(config, 1e6)?,
            partial_rotary_factor: None,
            rotation: Rotation::Plain,
            sliding_window,
            tie_word_embeddings: keys::flag(config, "tie_word_embeddings")?,
            head_bias: false,
            clip_qkv: None,
            prediction_layers: 0,
            fp8_blocks,
            widths: Widths::default(),
            shared_bases: BTreeSet::new(),
            compresses_shared_experts: false,
        })
    }

    fn read_params(&'static self, params: &Value) -> Option<Result<ModelConfig, ConfigError>> {
        let moe = params.get("moe").filter(|value| value.is_object())?;
        let read = || {
            keys::refuse_quantised(params)?;
            allowed::check(params, &[PARAMS_KEYS])?;
            allowed::check(moe, &[MOE_KEYS]).map_err(|error| error.inside("moe"))?;
            // mistral-inference reads whichever of the two is not null, and refuses both.
            let [window, underscored] =
                ["sliding_window", "_sliding_window"].map(|key| match params.get(key) {
                    Some(list @ Value::Array(_)) => {
                        Err(ConfigError::unsupported(key, list, "one window for all layers"))
                    }
                    _ => keys::optional_dimension(params, key),
                });
            let (window, underscored) = (window?, underscored?);
            if window.is_some()
                && let Some(other) = underscored
            {
                let expected = "null beside `sliding_window`";
                return Err(ConfigError::bad("_sliding_window", &other.into(), expected));
            }
            // mistral-inference takes null and zero for its default.
            let theta = match params.get("rope_theta") {
                None | Some(Value::Null) => None,
                Some(_) => rotation::base_of_angles(params)?,
            };
            Ok(ModelConfig {
                family: self,
                block: block(Activation::Silu),
                hidden_size: keys::dimension(params, "dim")?,
                intermediate_size: keys::dimension(params, "hidden_dim")?,
                num_hidden_layers: keys::dimension(params, "n_layers")?,
                num_local_experts: keys::dimension(moe, "num_experts")?,
                num_experts_per_tok: keys::dimension(moe, "num_experts_per_tok")?,
                num_attention_heads: keys::dimension(params, "n_heads")?,
                num_key_value_heads: keys::dimension(params, "n_kv_heads")?,
                head_dim: keys::dimension(params, "head_dim")?,
                vocab_size: keys::dimension(params, "vocab_size")?,
                max_position_embeddings: keys::optional_dimension(params, "max_position_embeddings")?
                    .unwrap_or(32_768),
                rms_norm_eps: keys::positive(params, "norm_eps")?.ok_or(ConfigError::Missing("norm_eps"))?,
                rope_theta: theta.unwrap_or(1e6),
                partial_rotary_factor: None,
                rotation: Rotation::Plain,
                sliding_window: window.or(underscored),
                tie_word_embeddings: keys::flag(params, "tied_embeddings")?,
                head_bias: false,
                clip_qkv: None,
                prediction_layers: 0,
                fp8_blocks: None,
                widths: Widths::default(),
                shared_bases: BTreeSet::new(),
                compresses_shared_experts: false,
            })
        };
        Some(read())
    }

    fn write_config(&self, config: &ModelConfig) -> Value {
        json!({
            "architectures": [OUTPUT.dense_architecture()],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": self.model_type(),
            "num_attention_heads": config.num_attention_heads,
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "num_local_experts": config.num_local_experts,
            "output_router_logits": false,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "router_aux_loss_coef": 0.02,
            "sliding_window": config.sliding_window,
            "tie_word_embeddings": config.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": config.vocab_size,
        })
    }

    fn output(&self) -> &'static Output {
        &OUTPUT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, Layout, MatrixId, MatrixShape, Projection};

    fn mixtral() -> Value {
        json!({
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 32000, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": null
        })
    }

    #[test]
    fn mixtral_8x7b_has_768_expert_matrices() {
        let config = ModelConfig::from_hf_json(&mixtral()).unwrap();
        assert_eq!(config.matrices().count(), 768);
        assert_eq!(config.head_dim, 128);
        assert_eq!(
            config.matrix_shape(MatrixId { layer: 0, expert: 0, projection: Projection::Down }),
            MatrixShape { rows: 4096, cols: 14336 }
        );
        assert_eq!(ModelConfig::from_hf_json(&config.to_hf_json()).unwrap(), config);
    }

    #[test]
    fn rope_theta_is_found_in_both_places() {
        let mut config = mixtral();
        config.as_object_mut().unwrap().remove("rope_theta");
        config["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(ModelConfig::from_hf_json(&config).unwrap().rope_theta, 5e5);
        config["rope_parameters"]["rope_type"] = json!("yarn");
        assert!(ModelConfig::from_hf_json(&config).is_err());
    }

    #[test]
    fn keys_that_are_absent_or_null_mean_what_transformers_takes() {
        let bare = ModelConfig::from_hf_json(&json!({"model_type": "mixtral"})).unwrap();
        let full = ModelConfig::from_hf_json(&mixtral()).unwrap();
        assert_eq!(bare, ModelConfig { max_position_embeddings: 131_072, ..full.clone() });
        let read = |key: &str, value: Value| {
            let mut config = mixtral();
            config[key] = value;
            ModelConfig::from_hf_json(&config).unwrap()
        };
        assert_eq!(read("num_key_value_heads", json!(null)).num_key_value_heads, 32);
        for (key, value) in [
            ("head_dim", json!(null)),
            ("hidden_act", json!("swish")),
            ("num_experts", json!(8)),
            ("rope_scaling", json!({})),
            ("rope_scaling", json!({"type": "default", "rope_theta": 1e6})),
            ("use_sliding_window", json!(false)),
            ("tie_word_embeddings", json!(null)),
            ("auto_map", json!({"AutoTokenizer": ["tokenization_own.OwnTokenizer", null]})),
            ("a_key_of_tomorrow", json!(null)),
        ] {
            assert_eq!(read(key, value.clone()), full, "{key}: {value}");
        }
    }

    #[test]
    fn one_theta_wherever_it_is_said() {
        let theta = |keys: Value| {
            let mut config = mixtral();
            config.as_object_mut().unwrap().remove("rope_theta");
            config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            ModelConfig::from_hf_json(&config).map(|config| config.rope_theta)
        };
        assert_eq!(theta(json!({})), Ok(1e6));
        assert_eq!(theta(json!({"rope_parameters": {"rope_theta": 5e5}})), Ok(5e5));
        assert_eq!(theta(json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5})), Ok(5e5));
        for refused in [
            json!({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}),
            json!({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e4}}),
            // transformers 5 reads `rope_scaling` alone, and takes its default.
            json!({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "default"}}),
            json!({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 4.0}}),
            json!({"rope_parameters": {"rope_type": "yarn"}}),
            json!({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3]}}),
            json!({"rope_scaling": {"rope_type": "default", "factor": 2.0}}),
            json!({"partial_rotary_factor": 0.5}),
        ] {
            assert_eq!(theta(refused.clone()).unwrap_err().kind(), ErrorKind::Unsupported, "{refused}");
        }
        for broken in [
            json!({"rope_theta": null}),
            json!({"rope_theta": "1e6"}),
            json!({"rope_scaling": "linear"}),
            json!({"rope_parameters": {"rope_type": null}}),
        ] {
            assert_eq!(theta(broken.clone()).unwrap_err().kind(), ErrorKind::BrokenCheckpoint, "{broken}");
        }
    }

    #[test]
    fn a_lying_config_is_refused() {
        use ErrorKind::{BrokenCheckpoint, Unsupported};
        for (kind, key, value) in [
            (BrokenCheckpoint, "hidden_size", json!(0)),
            (BrokenCheckpoint, "hidden_size", json!(-1)),
            (BrokenCheckpoint, "hidden_size", json!(null)),
            (BrokenCheckpoint, "hidden_size", json!(4096.0)),
            (BrokenCheckpoint, "vocab_size", json!(u64::MAX)),
            (BrokenCheckpoint, "num_key_value_heads", json!(5)),
            (BrokenCheckpoint, "num_experts_per_tok", json!(9)),
            (BrokenCheckpoint, "rms_norm_eps", json!(null)),
            (BrokenCheckpoint, "hidden_act", json!(null)),
            (BrokenCheckpoint, "tie_word_embeddings", json!("false")),
            (BrokenCheckpoint, "pad_token_id", json!(32_000)),
            (BrokenCheckpoint, "torch_dtype", json!("torch.bfloat16")),
            (BrokenCheckpoint, "head_dim", json!(3)),
            (BrokenCheckpoint, "head_dim", json!(1 << 24)),
            (BrokenCheckpoint, "intermediate_size", json!((1 << 24) + 1)),
            (BrokenCheckpoint, "num_hidden_layers", json!(1 << 20)),
            (BrokenCheckpoint, "num_local_experts", json!(1 << 20)),
            (Unsupported, "hidden_act", json!("gelu")),
            (Unsupported, "num_experts", json!(16)),
            (Unsupported, "use_sliding_window", json!(true)),
            (Unsupported, "attention_bias", json!(true)),
            (Unsupported, "is_causal", json!(false)),
            (Unsupported, "final_logit_softcapping", json!(30.0)),
            (Unsupported, "n_shared_experts", json!(2)),
            (Unsupported, "a_key_of_tomorrow", json!(1)),
            (Unsupported, "architectures", json!(["MixtralForSequenceClassification"])),
            (Unsupported, "auto_map", json!({"AutoModelForCausalLM": "modeling_own.OwnMixtral"})),
            (Unsupported, "quantization_config", json!({"quant_method": "gptq"})),
            (Unsupported, "quantization", json!({"group_size": 64, "bits": 4})),
            (Unsupported, "model_type", json!("llama")),
        ] {
            let mut config = mixtral();
            config[key] = value.clone();
            let refused = ModelConfig::from_hf_json(&config).expect_err(key);
            assert_eq!(refused.kind(), kind, "{key}: {value}: {refused}");
            assert!(kind == BrokenCheckpoint || refused.to_string().contains(key), "{refused}");
        }
    }

    #[test]
    fn params_are_read_as_their_makers_do() {
        let params = || {
            json!({
                "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
                "norm_eps": 1e-5, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
            })
        };
        let mut windowed = params();
        windowed["_sliding_window"] = json!(4096);
        assert_eq!(ModelConfig::from_params_json(&windowed).unwrap().sliding_window, Some(4096));
        assert_eq!(ModelConfig::from_params_json(&params()).unwrap().rope_theta, 1e6);
        for (key, value) in [
            ("lora", json!({"rank": 8})),
            ("sliding_window", json!([1024, null])),
            ("yarn", json!({"factor": 4})),
            ("model_type", json!("mamba")),
            ("moe", json!({"num_experts_per_tok": 2, "num_experts": 8, "num_shared_experts": 1})),
            ("moe", json!(null)),
        ] {
            let mut params = params();
            params[key] = value;
            let refused = ModelConfig::from_params_json(&params).expect_err(key);
            assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        }
    }

    #[test]
    fn every_key_has_one_rule() {
        for keys in [Mixtral.config_keys(), Mixtral.params_keys()] {
            let mut names: Vec<&str> = keys.iter().flat_map(|(_, names)| *names).copied().collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count);
        }
    }

    #[test]
    fn modules_are_named_as_transformers_names_them() {
        let config = ModelConfig::from_hf_json(&mixtral()).unwrap();
        let id = MatrixId { layer: 3, expert: 1, projection: Projection::Down };
        assert_eq!(config.module_name(id), "model.layers.3.block_sparse_moe.experts.1.w2");
        for id in config.matrices() {
            assert_eq!(config.matrix_named(&config.module_name(id)), Some(id));
        }
        for bad in [
            "model.layers.00.block_sparse_moe.experts.0.w1",
            "model.layers.32.block_sparse_moe.experts.0.w1",
            "model.layers.0.block_sparse_moe.experts.8.w1",
            "model.layers.0.mlp.experts.0.w1",
            "layers.0.experts.0.gate",
        ] {
            assert_eq!(config.matrix_named(bad), None, "{bad}");
        }
    }

    #[test]
    fn consolidated_names_are_mistrals() {
        let config = ModelConfig::from_hf_json(&mixtral()).unwrap();
        let layer = 3;
        let id = MatrixId { layer, expert: 1, projection: Projection::Down };
        for (role, name) in [
            (Role::Expert(id), "layers.3.feed_forward.experts.1.w2.weight"),
            (Role::Router { layer }, "layers.3.feed_forward.gate.weight"),
            (Role::Attention { layer, part: AttentionPart::Output }, "layers.3.attention.wo.weight"),
            (Role::Norm(NormPlace::Experts { layer: 0 }), "layers.0.ffn_norm.weight"),
        ] {
            assert_eq!(config.locate(Layout::Consolidated, role).tensor, name);
        }
    }
}
