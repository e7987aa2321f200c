//! Latent attention, as the configs of DeepSeek's families say it. Defaults are those of all their classes in transformers.

use super::{keys, rotation};
use crate::block::{Attention, AttentionBias, LatentAttention};
use crate::config::{ConfigError, ModelConfig};
use crate::rules::{Keys, Rule};
use serde_json::Value;

/// The keys that it reads.
pub(super) const KEYS: Keys = (
    Rule::Read,
    &[
        "attention_bias",
        "head_dim",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ],
);

/// Its widths.
pub(super) fn attention(config: &Value, pairs_side_by_side: bool) -> Result<Attention, ConfigError> {
    Ok(Attention::Latent(LatentAttention {
        query_rank: match config.get("q_lora_rank") {
            None => Some(1536),
            Some(_) => keys::optional_dimension(config, "q_lora_rank")?,
        },
        key_value_rank: keys::dimension_or(config, "kv_lora_rank", 512)?,
        fixed_dim: fixed_dim(config)?,
        value_dim: keys::dimension_or(config, "v_head_dim", 128)?,
        pairs_side_by_side,
    }))
}

fn fixed_dim(config: &Value) -> Result<usize, ConfigError> {
    keys::dimension_or(config, "qk_nope_head_dim", 128)
}

/// Its biases.
pub(super) fn bias(config: &Value) -> Result<AttentionBias, ConfigError> {
    let there = keys::flag(config, "attention_bias")?;
    Ok(if there { AttentionBias::LatentsAndOutput } else { AttentionBias::None })
}

/// A model whose other keys are read, with the part of its heads that turns, and how it turns.
pub(super) fn heads(config: &Value, read: ModelConfig) -> Result<ModelConfig, ConfigError> {
    if read.num_key_value_heads != read.num_attention_heads {
        let supported = "as many as `num_attention_heads`: a latent serves all heads";
        let found = read.num_key_value_heads.into();
        return Err(ConfigError::unsupported("num_key_value_heads", &found, supported));
    }
    let head_dim = keys::dimension_or(config, "qk_rope_head_dim", 64)?;
    // transformers computes both from the keys above, saves them, and reads them back.
    for (key, dim) in [("head_dim", head_dim), ("qk_head_dim", fixed_dim(config)? + head_dim)] {
        if let Some(value) = config.get(key).filter(|value| value.as_u64() != Some(dim as u64)) {
            let supported = format!("{dim}, as `qk_rope_head_dim` and `qk_nope_head_dim` say");
            return Err(ConfigError::unsupported(key, value, &supported));
        }
    }
    let rotation = rotation::YARN.read(config, read.max_position_embeddings, head_dim)?;
    Ok(ModelConfig { head_dim, rotation, ..read })
}
