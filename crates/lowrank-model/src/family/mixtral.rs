//! Mixtral (Jiang et al., *Mixtral of Experts*, 2401.04088): `MixtralForCausalLM`, Mistral's own files, and minixtral's
//! factors.

use super::keys;
use crate::block::{Activation, AttentionBias, Block, MoeLayers, QueryKeyNorm, Router, SharedExperts};
use crate::config::{ConfigError, Family, ModelConfig, Output};
use crate::names::{AttentionPart, FusedSpelling, NormPlace, Role, Spelling};
use serde_json::{Value, json};

/// The family.
pub(super) const FAMILY: &dyn Family = &Mixtral;

#[derive(Debug)]
struct Mixtral;

const SPELLING: Spelling = Spelling {
    moe: "block_sparse_moe",
    projections: ["w1", "w2", "w3"],
    fused: FusedSpelling::TRANSFORMERS_5,
};

const OUTPUT: Output = Output {
    model_type: "lowrank_mixtral",
    architecture: "LowRankMixtralForCausalLM",
    // In this order: vLLM asks for AutoModel.
    auto_map: &[
        ("AutoConfig", "configuration_lowrank_mixtral.LowRankMixtralConfig"),
        ("AutoModel", "modeling_lowrank_mixtral.LowRankMixtralModel"),
        ("AutoModelForCausalLM", "modeling_lowrank_mixtral.LowRankMixtralForCausalLM"),
    ],
    code: &[
        ("configuration_lowrank_mixtral.py", include_str!("../../assets/configuration_lowrank_mixtral.py")),
        ("modeling_lowrank_mixtral.py", include_str!("../../assets/modeling_lowrank_mixtral.py")),
    ],
    dense_architecture: "MixtralForCausalLM",
};

fn block(activation: Activation) -> Block {
    Block {
        router: Router::SoftmaxTopK { renormalise: true },
        activation,
        shared_experts: SharedExperts::None,
        moe_layers: MoeLayers::All,
        query_key_norm: QueryKeyNorm::None,
        attention_bias: AttentionBias::None,
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
        &SPELLING
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
                },
            ),
            Role::Norm(NormPlace::Attention { layer }) => of_layer(layer, "attention_norm"),
            Role::Norm(NormPlace::Experts { layer }) => of_layer(layer, "ffn_norm"),
            Role::Norm(NormPlace::Head) => "norm.weight".into(),
            Role::Router { layer } => of_layer(layer, "feed_forward.gate"),
            Role::Expert(id) => {
                let projection = SPELLING.projections[id.projection.index()];
                of_layer(id.layer, &format!("feed_forward.experts.{}.{projection}", id.expert))
            }
            Role::Head => "output.weight".into(),
        })
    }

    /// minixtral names its own class and keeps Mixtral's keys.
    fn claims(&self, config: &Value) -> bool {
        config.get("ranks").is_some() && config.get("num_local_experts").is_some()
    }

    fn read_config(&'static self, config: &Value) -> Result<ModelConfig, ConfigError> {
        keys::refuse_quantised(config)?;
        let activation = keys::activation(config)?;
        let hidden_size = keys::dimension(config, "hidden_size")?;
        let num_attention_heads = keys::dimension(config, "num_attention_heads")?;
        Ok(ModelConfig {
            family: self,
            block: block(activation),
            hidden_size,
            intermediate_size: keys::dimension(config, "intermediate_size")?,
            num_hidden_layers: keys::dimension(config, "num_hidden_layers")?,
            num_local_experts: keys::dimension(config, "num_local_experts")?,
            num_experts_per_tok: keys::dimension(config, "num_experts_per_tok")?,
            num_attention_heads,
            num_key_value_heads: keys::dimension(config, "num_key_value_heads")?,
            head_dim: keys::optional_dimension(config, "head_dim")?
                .unwrap_or(hidden_size / num_attention_heads),
            vocab_size: keys::dimension(config, "vocab_size")?,
            max_position_embeddings: keys::optional_dimension(config, "max_position_embeddings")?
                .unwrap_or(32_768),
            rms_norm_eps: keys::positive(config, "rms_norm_eps")?.unwrap_or(1e-5),
            rope_theta: keys::rope_theta(config)?.unwrap_or(1e6),
            sliding_window: keys::optional_dimension(config, "sliding_window")?,
            tie_word_embeddings: keys::flag(config, "tie_word_embeddings"),
        })
    }

    fn read_params(&'static self, params: &Value) -> Option<Result<ModelConfig, ConfigError>> {
        let moe = params.get("moe").filter(|value| value.is_object())?;
        let read = || {
            if params.get("quantization").is_some_and(|value| !value.is_null()) {
                return Err(ConfigError::Quantised("params.json".into()));
            }
            let hidden_size = keys::dimension(params, "dim")?;
            let num_attention_heads = keys::dimension(params, "n_heads")?;
            Ok(ModelConfig {
                family: self,
                block: block(Activation::Silu),
                hidden_size,
                intermediate_size: keys::dimension(params, "hidden_dim")?,
                num_hidden_layers: keys::dimension(params, "n_layers")?,
                num_local_experts: keys::dimension(moe, "num_experts")?,
                num_experts_per_tok: keys::dimension(moe, "num_experts_per_tok")?,
                num_attention_heads,
                num_key_value_heads: keys::dimension(params, "n_kv_heads")?,
                head_dim: keys::optional_dimension(params, "head_dim")?
                    .unwrap_or(hidden_size / num_attention_heads),
                vocab_size: keys::dimension(params, "vocab_size")?,
                max_position_embeddings: 32_768,
                rms_norm_eps: keys::positive(params, "norm_eps")?.unwrap_or(1e-5),
                rope_theta: keys::positive(params, "rope_theta")?.unwrap_or(1e6),
                sliding_window: None,
                tie_word_embeddings: keys::flag(params, "tied_embeddings"),
            })
        };
        Some(read())
    }

    fn write_config(&self, config: &ModelConfig) -> Value {
        json!({
            "architectures": [OUTPUT.dense_architecture],
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
    use crate::{Layout, MatrixId, MatrixShape, Projection};

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
        assert_eq!(config.matrix_shape(Projection::Down), MatrixShape { rows: 4096, cols: 14336 });
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
    fn a_lying_config_is_refused() {
        for (key, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-1)),
            ("hidden_size", json!(null)),
            ("vocab_size", json!(u64::MAX)),
            ("num_key_value_heads", json!(5)),
            ("num_experts_per_tok", json!(9)),
            ("hidden_act", json!("gelu")),
            ("quantization_config", json!({"quant_method": "gptq"})),
            ("model_type", json!("llama")),
            ("head_dim", json!(3)),
            ("head_dim", json!(1 << 24)),
            ("intermediate_size", json!((1 << 24) + 1)),
            ("num_hidden_layers", json!(1 << 20)),
            ("num_local_experts", json!(1 << 20)),
        ] {
            let mut config = mixtral();
            config[key] = value;
            assert!(ModelConfig::from_hf_json(&config).is_err(), "{key} was accepted");
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
