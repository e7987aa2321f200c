//! The dimensions of a model, read from `config.json` (Hugging Face) or `params.json` (Mistral).
//!
//! Every number is checked here once, so that no other crate meets a zero, a huge value or a missing key.

use crate::{ErrorKind, MatrixId, MatrixShape, Projection};
use serde_json::Value;

/// Why a model description was refused.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// The text is not a JSON object.
    #[error("is not a JSON object: {0}")]
    NotJson(String),
    /// `model_type` names something this tool does not know.
    #[error("unknown family: `model_type` is `{0}`; known: mixtral, lowrank_mixtral")]
    UnknownFamily(String),
    /// A key the model needs is absent.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A key has a value that cannot be.
    #[error("`{key}` is {value}, expected {expected}")]
    Bad {
        /// The key.
        key: &'static str,
        /// What was found.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// Weights are quantised.
    #[error(
        "the checkpoint is quantised (`quantization_config`: {0}); give the original f32, f16 or bf16 weights"
    )]
    Quantised(String),
}

impl ConfigError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownFamily(_) | Self::Quantised(_) => ErrorKind::Unsupported,
            Self::NotJson(_) | Self::Missing(_) | Self::Bad { .. } => ErrorKind::BrokenCheckpoint,
        }
    }
}

/// Dimensions and constants of a Mixtral. Shapes: `H` hidden_size, `F` intermediate_size, `E` num_local_experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// H, the width of the residual stream.
    pub hidden_size: usize,
    /// F, the inner width of an expert.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// E, experts per layer.
    pub num_local_experts: usize,
    /// Experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// ε inside RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Attention window in tokens, if limited.
    pub sliding_window: Option<usize>,
    /// lm_head is the embedding matrix.
    pub tie_word_embeddings: bool,
}

/// No dimension of a real model comes near this; a larger one is a lie or a mistake.
const DIMENSION_MAX: u64 = 1 << 24;

impl ModelConfig {
    /// Reads a Hugging Face `config.json`; the family is decided by `model_type`, never by a name.
    pub fn from_hf_json(config: &Value) -> Result<Self, ConfigError> {
        let object = config.as_object().ok_or_else(|| ConfigError::NotJson("top level".into()))?;
        match object.get("model_type").and_then(Value::as_str) {
            Some("mixtral" | crate::format::MODEL_TYPE) => {}
            // minixtral's config names its own class but keeps Mixtral's keys.
            Some(_) if object.contains_key("ranks") && object.contains_key("num_local_experts") => {}
            Some(other) => return Err(ConfigError::UnknownFamily(other.into())),
            None => return Err(ConfigError::Missing("model_type")),
        }
        if let Some(quantization) = object.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown method");
            return Err(ConfigError::Quantised(method.into()));
        }
        if let Some(act) = object.get("hidden_act").and_then(Value::as_str)
            && act != "silu"
        {
            return Err(ConfigError::Bad {
                key: "hidden_act",
                value: format!("`{act}`"),
                expected: "`silu`",
            });
        }
        let hidden_size = dimension(config, "hidden_size")?;
        let num_attention_heads = dimension(config, "num_attention_heads")?;
        let head_dim = match object.get("head_dim").filter(|value| !value.is_null()) {
            Some(_) => dimension(config, "head_dim")?,
            None => hidden_size / num_attention_heads,
        };
        Self {
            hidden_size,
            intermediate_size: dimension(config, "intermediate_size")?,
            num_hidden_layers: dimension(config, "num_hidden_layers")?,
            num_local_experts: dimension(config, "num_local_experts")?,
            num_experts_per_tok: dimension(config, "num_experts_per_tok")?,
            num_attention_heads,
            num_key_value_heads: dimension(config, "num_key_value_heads")?,
            head_dim,
            vocab_size: dimension(config, "vocab_size")?,
            max_position_embeddings: match object.get("max_position_embeddings") {
                Some(_) => dimension(config, "max_position_embeddings")?,
                None => 32_768,
            },
            rms_norm_eps: positive(object.get("rms_norm_eps"), "rms_norm_eps")?.unwrap_or(1e-5),
            rope_theta: rope_theta(config)?,
            sliding_window: match object.get("sliding_window").filter(|value| !value.is_null()) {
                Some(_) => Some(dimension(config, "sliding_window")?),
                None => None,
            },
            tie_word_embeddings: object.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        }
        .checked()
    }

    /// Reads Mistral's `params.json`, which stands beside `consolidated*.safetensors`.
    pub fn from_mistral_params(params: &Value) -> Result<Self, ConfigError> {
        if !params.is_object() {
            return Err(ConfigError::NotJson("top level".into()));
        }
        let Some(moe) = params.get("moe").filter(|value| value.is_object()) else {
            return Err(ConfigError::Missing("moe"));
        };
        if params.get("quantization").is_some_and(|value| !value.is_null()) {
            return Err(ConfigError::Quantised("params.json".into()));
        }
        let hidden_size = dimension(params, "dim")?;
        let num_attention_heads = dimension(params, "n_heads")?;
        Self {
            hidden_size,
            intermediate_size: dimension(params, "hidden_dim")?,
            num_hidden_layers: dimension(params, "n_layers")?,
            num_local_experts: dimension(moe, "num_experts")?,
            num_experts_per_tok: dimension(moe, "num_experts_per_tok")?,
            num_attention_heads,
            num_key_value_heads: dimension(params, "n_kv_heads")?,
            head_dim: if params.get("head_dim").is_some() {
                dimension(params, "head_dim")?
            } else {
                hidden_size / num_attention_heads
            },
            vocab_size: dimension(params, "vocab_size")?,
            max_position_embeddings: 32_768,
            rms_norm_eps: positive(params.get("norm_eps"), "norm_eps")?.unwrap_or(1e-5),
            rope_theta: positive(params.get("rope_theta"), "rope_theta")?.unwrap_or(1e6),
            sliding_window: None,
            tie_word_embeddings: params.get("tied_embeddings").and_then(Value::as_bool).unwrap_or(false),
        }
        .checked()
    }

    /// The Hugging Face `config.json` of this model, for inputs that have none.
    pub fn to_hf_json(&self) -> Value {
        serde_json::json!({
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "mixtral",
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.num_local_experts,
            "output_router_logits": false,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.02,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// Every expert matrix in stored order.
    pub fn matrices(&self) -> impl Iterator<Item = MatrixId> + use<> {
        let (layers, experts) = (self.num_hidden_layers, self.num_local_experts);
        (0..layers).flat_map(move |layer| {
            (0..experts).flat_map(move |expert| {
                Projection::ALL.into_iter().map(move |projection| MatrixId { layer, expert, projection })
            })
        })
    }

    /// Shape of an expert matrix, out × in.
    pub fn matrix_shape(&self, projection: Projection) -> MatrixShape {
        let (f, h) = (self.intermediate_size, self.hidden_size);
        match projection {
            Projection::W1 | Projection::W3 => MatrixShape { rows: f, cols: h },
            Projection::W2 => MatrixShape { rows: h, cols: f },
        }
    }

    fn checked(self) -> Result<Self, ConfigError> {
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(ConfigError::Bad {
                key: "num_key_value_heads",
                value: self.num_key_value_heads.to_string(),
                expected: "a divisor of `num_attention_heads`",
            });
        }
        if self.num_experts_per_tok > self.num_local_experts {
            return Err(ConfigError::Bad {
                key: "num_experts_per_tok",
                value: self.num_experts_per_tok.to_string(),
                expected: "at most `num_local_experts`",
            });
        }
        // Sizes stay exact in u64 from here on: no weight above 2^40 elements, no more than 2^16 experts in all.
        const ELEMENTS_MAX: u128 = 1 << 40;
        const EXPERTS_MAX: u128 = 1 << 16;
        let heads_width = self.num_attention_heads as u128 * self.head_dim as u128;
        for (key, width) in [
            ("intermediate_size", self.intermediate_size as u128),
            ("vocab_size", self.vocab_size as u128),
            ("num_attention_heads", heads_width),
            ("num_local_experts", self.num_local_experts as u128),
        ] {
            if width * self.hidden_size as u128 > ELEMENTS_MAX {
                let (value, expected) = (width.to_string(), "a weight of at most 2^40 elements");
                return Err(ConfigError::Bad { key, value, expected });
            }
        }
        if self.num_hidden_layers as u128 * self.num_local_experts as u128 > EXPERTS_MAX {
            return Err(ConfigError::Bad {
                key: "num_local_experts",
                value: format!("{} in {} layers", self.num_local_experts, self.num_hidden_layers),
                expected: "at most 65536 experts in all",
            });
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::Bad {
                key: "head_dim",
                value: self.head_dim.to_string(),
                expected: "an even number (rotary embedding pairs its halves)",
            });
        }
        Ok(self)
    }
}

fn dimension(object: &Value, key: &'static str) -> Result<usize, ConfigError> {
    let value = object.get(key).ok_or(ConfigError::Missing(key))?;
    match value.as_u64() {
        Some(number @ 1..=DIMENSION_MAX) => Ok(number as usize),
        _ => {
            Err(ConfigError::Bad { key, value: value.to_string(), expected: "an integer from 1 to 16777216" })
        }
    }
}

fn positive(value: Option<&Value>, key: &'static str) -> Result<Option<f64>, ConfigError> {
    match value.filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(ConfigError::Bad { key, value: value.to_string(), expected: "a positive number" }),
        },
    }
}

/// `rope_theta` at the top (transformers v4) or inside `rope_parameters` (v5); only the default rotation is known.
fn rope_theta(config: &Value) -> Result<f64, ConfigError> {
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(parameters) = config.get(key).filter(|value| !value.is_null()) else { continue };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        if !matches!(kind, None | Some("default")) {
            return Err(ConfigError::Bad {
                key: if key == "rope_parameters" { "rope_parameters" } else { "rope_scaling" },
                value: parameters.to_string(),
                expected: "`rope_type` `default`",
            });
        }
        if let Some(theta) = positive(parameters.get("rope_theta"), "rope_theta")? {
            return Ok(theta);
        }
    }
    Ok(positive(config.get("rope_theta"), "rope_theta")?.unwrap_or(1e6))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
        assert_eq!(config.matrix_shape(Projection::W2), MatrixShape { rows: 4096, cols: 14336 });
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
}
