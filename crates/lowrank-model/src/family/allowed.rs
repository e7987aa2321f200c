//! Which keys a model's description may have, and what each may say.
//!
//! A key that nobody here has read about may change what the model computes, so it is refused by name. The lists follow
//! `PretrainedConfig`, `GenerationConfig` and the masks of Hugging Face transformers 4.57 and 5; `cargo xtask conformance`
//! loads a model for every key and value that they accept and compares its logits with ours.

use crate::config::ConfigError;
use crate::display::clip;
use crate::rules::{Keys, Neutral, Rule, ValueKind};
use serde_json::Value;

const OFF: Rule = Rule::Only(&[Neutral::Null, Neutral::False]);
const NULL: Rule = Rule::Only(&[Neutral::Null]);
const ZERO: Rule = Rule::Only(&[Neutral::Null, Neutral::Number(0)]);
const ONE: Rule = Rule::Only(&[Neutral::Null, Neutral::Number(1)]);
const EMPTY: Rule = Rule::Only(&[Neutral::Null, Neutral::EmptyList, Neutral::EmptyObject]);

/// Keys of every `config.json`, whatever the family.
pub(super) const HUGGING_FACE: &[Keys] = &[
    (Rule::Read, &["model_type", "architectures", "auto_map", "dtype", "torch_dtype", "pad_token_id"]),
    (Rule::Read, &["quantization_config", "compression_config", "quantization"]),
    (Rule::Read, &["id2label", "label2id", "problem_type", "num_labels"]),
    // Of this program's own output, and of minixtral's.
    (Rule::Read, &[crate::format::CONFIG_KEY, "ranks"]),
    // What a loader keeps and returns.
    (
        Rule::Harmless(ValueKind::Flag),
        &[
            "use_cache",
            "output_hidden_states",
            "output_attentions",
            "output_router_logits",
            "torchscript",
            "tie_last_hidden_states",
            "is_decoder",
            "tf_legacy_loss",
            "use_bfloat16",
            "gradient_checkpointing",
            "use_flash_attention",
            "_flash_attn_2_enabled",
            "_attn_implementation_autoset",
            "unsloth_fixed",
        ],
    ),
    // Training: dropout, losses, noise, and how weights began.
    (
        Rule::Harmless(ValueKind::Number),
        &[
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_pdrop",
            "classifier_dropout",
            "dropout",
            "embd_pdrop",
            "hidden_dropout",
            "hidden_dropout_prob",
            "resid_pdrop",
            "initializer_range",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "router_z_loss_coef",
            "chunk_size_feed_forward",
        ],
    ),
    // Lengths that tokenizers and servers look at.
    (
        Rule::Harmless(ValueKind::Number),
        &[
            "max_seq_len",
            "max_sequence_length",
            "model_max_length",
            "original_max_position_embeddings",
            "seq_length",
        ],
    ),
    // Who made it, with what.
    (
        Rule::Harmless(ValueKind::Text),
        &[
            "_commit_hash",
            "_name_or_path",
            "finetuning_task",
            "name_or_path",
            "prefix",
            "processor_class",
            "tokenizer_class",
            "transformers_version",
            "unsloth_version",
        ],
    ),
    (Rule::Harmless(ValueKind::Any), &["task_specific_params"]),
    // Other ways to compute the same.
    (
        Rule::Only(&[
            Neutral::Null,
            Neutral::Text("eager"),
            Neutral::Text("sdpa"),
            Neutral::Text("flash_attention_2"),
            Neutral::Text("flash_attention_3"),
            Neutral::Text("flex_attention"),
        ]),
        &["_attn_implementation", "_attn_implementation_internal", "attn_implementation"],
    ),
    (
        Rule::Only(&[Neutral::Null, Neutral::Text("eager"), Neutral::Text("grouped_mm")]),
        &["_experts_implementation", "_experts_implementation_internal", "experts_implementation"],
    ),
    (
        Rule::Harmless(ValueKind::TokenIds),
        &[
            "bos_token_id",
            "cls_token_id",
            "decoder_start_token_id",
            "eos_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "mask_token_id",
            "sep_token_id",
            "unk_token_id",
        ],
    ),
    // Of generation, which older versions kept here.
    (
        Rule::Harmless(ValueKind::Any),
        &[
            "assistant_confidence_threshold",
            "assistant_lookbehind",
            "bad_words_ids",
            "begin_suppress_tokens",
            "diversity_penalty",
            "do_sample",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "encoder_repetition_penalty",
            "epsilon_cutoff",
            "eta_cutoff",
            "exponential_decay_length_penalty",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "min_length",
            "no_repeat_ngram_size",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_scores",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict_in_generate",
            "suppress_tokens",
            "target_lookbehind",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ],
    ),
    (OFF, &["is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"]),
    (NULL, &["cross_attention_hidden_size", "attention_chunk_size", "text_config"]),
    (Rule::Only(&[Neutral::Null, Neutral::EmptyObject]), &["pruned_heads", "per_layer_config"]),
    (ONE, &["pretraining_tp"]),
    // transformers takes null for false here, and without `return_dict` gives itself tuples that it cannot read.
    (Rule::Only(&[Neutral::True]), &["is_causal", "return_dict"]),
];

/// Keys with which other families change what every family computes. Where they change nothing they are harmless.
pub(super) const OTHER_FAMILIES: &[Keys] = &[
    (
        OFF,
        &[
            "attention_bias",
            "bias",
            "lm_head_bias",
            "mlp_bias",
            "qk_layernorm",
            "qk_norm",
            "qkv_bias",
            "rope_interleaved",
            "use_bias",
            "use_qk_norm",
        ],
    ),
    (NULL, &["attn_logit_softcapping", "final_logit_softcapping", "layer_types", "moe_intermediate_size"]),
    (ZERO, &["first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "num_shared_experts"]),
    (
        ONE,
        &[
            "attention_multiplier",
            "decoder_sparse_step",
            "embedding_multiplier",
            "logit_scale",
            "logits_scaling",
            "moe_layer_freq",
            "residual_multiplier",
            "routed_scaling_factor",
        ],
    ),
    (EMPTY, &["mlp_only_layers"]),
    (Rule::Only(&[Neutral::Null, Neutral::True]), &["norm_topk_prob"]),
    (Rule::Only(&[Neutral::Null, Neutral::Text("softmax")]), &["scoring_func"]),
    // transformers 4 multiplies with it, and fails on null.
    (Rule::Only(&[Neutral::Number(1)]), &["partial_rotary_factor"]),
];

/// Keys inside `rope_parameters` and `rope_scaling`.
pub(super) const ROPE: &[Keys] = &[
    (Rule::Read, &["rope_theta", "rope_type", "type"]),
    (Rule::Harmless(ValueKind::Number), &["original_max_position_embeddings"]),
    (ONE, &["factor"]),
    (Rule::Only(&[Neutral::Number(1)]), &["partial_rotary_factor"]),
];

/// Refuses keys that no list has, and values that their rule does not allow. An unknown key that is null says nothing.
pub(super) fn check(object: &Value, lists: &[&[Keys]]) -> Result<(), ConfigError> {
    let Some(object) = object.as_object() else { return Ok(()) };
    let mut unknown = Vec::new();
    for (name, value) in object {
        let known = lists.iter().copied().flatten().find(|(_, names)| names.contains(&name.as_str()));
        let Some((rule, _)) = known else {
            if !value.is_null() {
                unknown.push(format!("`{name}`"));
            }
            continue;
        };
        match rule {
            Rule::Read => {}
            Rule::Harmless(kind) if value.is_null() || kind.fits(value) => {}
            Rule::Harmless(kind) => return Err(ConfigError::bad(name, value, kind.expected())),
            Rule::Only(neutral) => {
                if !neutral.iter().any(|neutral| neutral.is(value)) {
                    let only: Vec<String> = neutral.iter().map(|neutral| format!("`{neutral}`")).collect();
                    return Err(ConfigError::Unsupported {
                        key: name.clone(),
                        value: clip(&value.to_string()),
                        supported: only.join(" or "),
                    });
                }
            }
        }
    }
    if unknown.is_empty() { Ok(()) } else { Err(ConfigError::UnknownKeys(unknown.join(", "))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn unknown_keys_are_refused_together_and_by_name() {
        let check = |value: Value| check(&value, &[HUGGING_FACE]);
        assert_eq!(check(json!({"use_cache": true, "nothing_said": null})), Ok(()));
        let refused = check(json!({"soft_cap": 30.0, "use_cache": true, "head_scale": 2})).unwrap_err();
        assert_eq!(refused, ConfigError::UnknownKeys("`soft_cap`, `head_scale`".into()));
        assert_eq!(refused.kind(), crate::ErrorKind::Unsupported);
    }

    #[test]
    fn a_key_that_may_say_one_thing_says_no_other() {
        for (key, good, bad) in [
            ("attention_bias", json!(false), json!(true)),
            ("is_causal", json!(true), json!(null)),
            ("partial_rotary_factor", json!(1.0), json!(0.5)),
            ("norm_topk_prob", json!(null), json!(false)),
            ("scoring_func", json!("softmax"), json!("sigmoid")),
            ("pruned_heads", json!({}), json!({"0": [1]})),
        ] {
            let check = |value: Value| check(&json!({ key: value }), &[HUGGING_FACE, OTHER_FAMILIES]);
            assert_eq!(check(good), Ok(()), "{key}");
            let refused = check(bad).unwrap_err();
            assert!(matches!(&refused, ConfigError::Unsupported { key: named, .. } if named == key), "{key}");
        }
    }

    #[test]
    fn a_harmless_key_has_its_type() {
        let check = |value: Value| check(&value, &[HUGGING_FACE]);
        assert_eq!(
            check(json!({"eos_token_id": [2, 5], "temperature": "x", "initializer_range": 0})),
            Ok(())
        );
        for value in [json!({"use_cache": "yes"}), json!({"eos_token_id": ["</s>"]}), json!({"prefix": 1})] {
            assert_eq!(check(value).unwrap_err().kind(), crate::ErrorKind::BrokenCheckpoint);
        }
    }
}
