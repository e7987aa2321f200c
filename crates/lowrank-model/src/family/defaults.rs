//! What a family's `config.json` says of dimensions, read with the defaults of its class in transformers.
//!
//! Keys and their meaning are the same for all families that were made after Qwen2-MoE; defaults are not.

use super::rotation::RotationKeys;
use super::{allowed, keys};
use crate::Rotation;
use crate::block::Block;
use crate::config::{ConfigError, Family, ModelConfig};
use crate::rules::{Keys, Rule};
use crate::widths::Widths;
use serde_json::Value;
use std::collections::BTreeSet;

/// Values of absent keys.
pub(super) struct Defaults {
    pub(super) hidden_size: usize,
    /// Of [`crate::config::Output::width_key`].
    pub(super) expert_width: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_experts: usize,
    /// Reads their number, given its default.
    pub(super) count_experts: fn(&Value, usize) -> Result<usize, ConfigError>,
    pub(super) num_experts_per_tok: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: KeyValueHeads,
    pub(super) vocab_size: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rope_theta: f64,
    pub(super) rms_norm_eps: f64,
    pub(super) rotation: RotationKeys,
}

/// Key/value heads where the config does not say.
pub(super) enum KeyValueHeads {
    /// So many. Null is no number.
    Number(usize),
    /// So many; as many as query heads where the key is null.
    NumberOrAsQueries(usize),
    /// As many as query heads, also where the key is null.
    AsQueries,
}

/// Keys that all of these families read beside those of the experts.
pub(super) const READ: Keys = (
    Rule::Read,
    &[
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
);

/// Every key that a family with `own` keys may have.
pub(super) fn config_keys(own: &[Keys]) -> Vec<Keys> {
    [allowed::HUGGING_FACE, &[READ], own, allowed::OTHER_FAMILIES].concat()
}

impl Defaults {
    /// Reads a config; `block` is given the number of layers.
    pub(super) fn read(
        &self,
        family: &'static dyn Family,
        config: &Value,
        block: impl FnOnce(usize) -> Result<Block, ConfigError>,
    ) -> Result<ModelConfig, ConfigError> {
        let or = |key, default| keys::dimension_or(config, key, default);
        let fp8_blocks = keys::fp8_blocks(config)?;
        keys::check_class(config, family)?;
        allowed::check(config, &[&family.config_keys()])?;
        let hidden_size = or("hidden_size", self.hidden_size)?;
        let num_attention_heads = or("num_attention_heads", self.num_attention_heads)?;
        let vocab_size = or("vocab_size", self.vocab_size)?;
        keys::check_loadable(config, vocab_size)?;
        let num_hidden_layers = or("num_hidden_layers", self.num_hidden_layers)?;
        let block = block(num_hidden_layers)?;
        let num_key_value_heads = match self.num_key_value_heads {
            KeyValueHeads::Number(number) => or("num_key_value_heads", number)?,
            KeyValueHeads::NumberOrAsQueries(number) => match config.get("num_key_value_heads") {
                Some(Value::Null) => num_attention_heads,
                _ => or("num_key_value_heads", number)?,
            },
            KeyValueHeads::AsQueries => {
                keys::optional_dimension(config, "num_key_value_heads")?.unwrap_or(num_attention_heads)
            }
        };
        Ok(ModelConfig {
            family,
            block,
            hidden_size,
            intermediate_size: or(family.output().width_key, self.expert_width)?,
            num_hidden_layers,
            num_local_experts: (self.count_experts)(config, self.num_experts)?,
            num_experts_per_tok: or("num_experts_per_tok", self.num_experts_per_tok)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: hidden_size / num_attention_heads,
            vocab_size,
            max_position_embeddings: or("max_position_embeddings", self.max_position_embeddings)?,
            rms_norm_eps: keys::positive(config, "rms_norm_eps")?.unwrap_or(self.rms_norm_eps),
            rope_theta: self.rotation.theta(config, self.rope_theta)?,
            partial_rotary_factor: None,
            rotation: Rotation::Plain,
            sliding_window: None,
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
}
