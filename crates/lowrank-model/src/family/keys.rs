//! Reading one key of a model's description, checked.

use crate::block::{Activation, AttentionBias, ExpertGroups, LayerSet, MoeLayers, SharedExperts};
use crate::config::{ConfigError, Family};
use serde_json::Value;

/// No dimension of a real model comes near this; a larger one is a lie or a mistake.
const DIMENSION_MAX: u64 = 1 << 24;

/// An integer from 1 to 2^24.
pub(super) fn dimension(object: &Value, key: &'static str) -> Result<usize, ConfigError> {
    let value = object.get(key).ok_or(ConfigError::Missing(key))?;
    match value.as_u64() {
        Some(number @ 1..=DIMENSION_MAX) => Ok(number as usize),
        _ => Err(ConfigError::bad(key, value, "an integer from 1 to 16777216")),
    }
}

/// The same, with a default where the key is absent. Null is no dimension.
pub(super) fn dimension_or(object: &Value, key: &'static str, default: usize) -> Result<usize, ConfigError> {
    if object.get(key).is_some() { dimension(object, key) } else { Ok(default) }
}

/// The same, `None` where the key is absent or null.
pub(super) fn optional_dimension(object: &Value, key: &'static str) -> Result<Option<usize>, ConfigError> {
    match object.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(_) => dimension(object, key).map(Some),
    }
}

/// A positive number, `None` where the key is absent. Null is no number.
pub(super) fn positive(object: &Value, key: &'static str) -> Result<Option<f64>, ConfigError> {
    let Some(value) = object.get(key) else { return Ok(None) };
    match value.as_f64() {
        Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
        _ => Err(ConfigError::bad(key, value, "a positive number")),
    }
}

/// The same, `None` where the key is null, too.
pub(super) fn optional_positive(object: &Value, key: &'static str) -> Result<Option<f64>, ConfigError> {
    if object.get(key).is_some_and(Value::is_null) { Ok(None) } else { positive(object, key) }
}

/// True or false; false where the key is absent or null.
pub(super) fn flag(object: &Value, key: &str) -> Result<bool, ConfigError> {
    flag_or(object, key, false)
}

/// True or false, with a value for an absent key. Null is false.
pub(super) fn flag_or(object: &Value, key: &str, default: bool) -> Result<bool, ConfigError> {
    match object.get(key) {
        None => Ok(default),
        Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => Err(ConfigError::bad(key, other, "`true` or `false`")),
    }
}

/// Biases of all four projections of attention, or none: `attention_bias`.
pub(super) fn attention_bias(config: &Value) -> Result<AttentionBias, ConfigError> {
    Ok(if flag(config, "attention_bias")? { AttentionBias::All } else { AttentionBias::None })
}

/// The non-linearity of the experts, `hidden_act`. `swish` is transformers' other name of SiLU.
pub(super) fn activation(config: &Value) -> Result<Activation, ConfigError> {
    match config.get("hidden_act") {
        None => Ok(Activation::Silu),
        Some(Value::String(name)) if ["silu", "swish"].contains(&name.as_str()) => Ok(Activation::Silu),
        Some(value @ Value::String(_)) => {
            Err(ConfigError::unsupported("hidden_act", value, "`silu` and `swish`, which is the same"))
        }
        Some(other) => Err(ConfigError::bad("hidden_act", other, "`silu`")),
    }
}

/// Refuses quantised weights.
pub(super) fn refuse_quantised(config: &Value) -> Result<(), ConfigError> {
    for key in ["quantization_config", "compression_config", "quantization"] {
        if let Some(quantization) = config.get(key).filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown method");
            return Err(ConfigError::Quantised(format!("`{key}`: {method}")));
        }
    }
    Ok(())
}

/// Sides of the blocks that share a scale, if weights are fp8 as DeepSeek stores them. Every other quantisation is refused.
pub(super) fn fp8_blocks(config: &Value) -> Result<Option<[usize; 2]>, ConfigError> {
    const KEY: &str = "quantization_config";
    let Some(object) = config.get(KEY).filter(|value| value["quant_method"] == "fp8") else {
        return refuse_quantised(config).map(|()| None);
    };
    let is_e4m3 = object.get("fmt").is_none_or(|format| format == "e4m3");
    let sides = object.get("weight_block_size").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let sides: Vec<u64> = sides.iter().filter_map(Value::as_u64).collect();
    match sides.as_slice() {
        &[rows @ 1..=DIMENSION_MAX, cols @ 1..=DIMENSION_MAX] if is_e4m3 => {
            Ok(Some([rows as usize, cols as usize]))
        }
        _ => Err(ConfigError::Quantised(format!("`{KEY}`: fp8, but not E4M3 with a scale for each block"))),
    }
}

/// Refuses models that are no causal language models of the family, and Python code that may compute something else.
pub(super) fn check_class(config: &Value, family: &dyn Family) -> Result<(), ConfigError> {
    let output = family.output();
    if let Some(value) = config.get("architectures").filter(|value| !value.is_null()) {
        let Some(classes) = value.as_array() else {
            return Err(ConfigError::bad("architectures", value, "a list of classes"));
        };
        let known = [output.dense_architecture(), output.architecture()];
        let is_makers = |class: &str| {
            let code = family.makers_code().iter().filter_map(|code| Some(code.split_once('.')?.1));
            code.filter(|code| code.ends_with("ForCausalLM")).any(|code| code == class)
        };
        let is_known = |class: &&Value| {
            class.as_str().is_some_and(|class| known.iter().any(|it| it == class) || is_makers(class))
        };
        if let Some(other) = classes.iter().find(|class| !is_known(class)) {
            let supported = format!("`{}`", output.dense_architecture());
            return Err(ConfigError::unsupported("architectures", other, &supported));
        }
    }
    // transformers does not load a model whose `auto_map` is null.
    let Some(value) = config.get("auto_map") else { return Ok(()) };
    let Some(classes) = value.as_object() else {
        return Err(ConfigError::bad("auto_map", value, "an object"));
    };
    let own = |class: &Value| {
        let is_makers = family.makers_code().iter().any(|&makers| class.as_str() == Some(makers));
        is_makers || output.auto_map().iter().any(|(_, own)| class.as_str() == Some(own))
    };
    match classes.iter().find(|(auto, class)| auto.starts_with("AutoModel") && !own(class)) {
        None => Ok(()),
        Some((_, code)) => Err(ConfigError::unsupported(
            "auto_map",
            code,
            "transformers' own code of the model; remove the key if that code computes the same",
        )),
    }
}

/// Values on which transformers fails when it loads the model.
pub(super) fn check_loadable(config: &Value, vocab_size: usize) -> Result<(), ConfigError> {
    const DTYPES: [&str; 7] = ["float32", "float16", "bfloat16", "float64", "float", "half", "double"];
    for key in ["dtype", "torch_dtype"] {
        match config.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(name)) if DTYPES.contains(&name.as_str()) => {}
            Some(other) => return Err(ConfigError::bad(key, other, "`float32`, `float16` or `bfloat16`")),
        }
    }
    if let Some(value) = config.get("pad_token_id").filter(|value| !value.is_null()) {
        // Python counts negative ones from the end.
        let rows = vocab_size as i64;
        if !value.as_i64().is_some_and(|id| (-rows..rows).contains(&id)) {
            let expected = "null or a token id below `vocab_size`, without which transformers does not load";
            return Err(ConfigError::bad("pad_token_id", value, expected));
        }
    }
    let labels = |key: &str, numbered: bool| match config.get(key) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(map)) if !numbered || map.keys().all(|key| key.parse::<u32>().is_ok()) => Ok(()),
        Some(other) => Err(ConfigError::bad(key, other, "an object of labels")),
    };
    labels("id2label", true)?;
    labels("label2id", false)?;
    if let Some(value) = config.get("num_labels").filter(|value| !value.is_u64()) {
        return Err(ConfigError::bad("num_labels", value, "a count"));
    }
    // One label is a regression.
    let classes = ["regression", "single_label_classification", "multi_label_classification"];
    let single = config.get("num_labels").and_then(Value::as_u64) == Some(1)
        || config.get("id2label").and_then(Value::as_object).is_some_and(|labels| labels.len() == 1);
    match config.get("problem_type") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(name))
            if classes.contains(&name.as_str()) && !(single && name.starts_with("single")) =>
        {
            Ok(())
        }
        Some(other) => Err(ConfigError::bad("problem_type", other, "null")),
    }
}

/// Experts of a layer: `num_experts` (transformers 4.57, and 5 for most families) or `num_local_experts`, which must agree.
pub(super) fn num_experts(config: &Value, default: usize) -> Result<usize, ConfigError> {
    // Null stands for no count there.
    let local =
        config.get("num_local_experts").map(|_| dimension(config, "num_local_experts")).transpose()?;
    let experts = dimension_or(config, "num_experts", local.unwrap_or(default))?;
    match local {
        Some(local) if local != experts => {
            let supported = format!("{experts}, as `num_experts` says");
            Err(ConfigError::unsupported("num_local_experts", &local.into(), &supported))
        }
        _ => Ok(experts),
    }
}

/// Experts of a layer where the key is `num_local_experts`. transformers 5 may read `num_experts` for it, 4.57 does not.
pub(super) fn num_local_experts(config: &Value, default: usize) -> Result<usize, ConfigError> {
    let experts = dimension_or(config, "num_local_experts", default)?;
    match config.get("num_experts").filter(|value| value.as_u64() != Some(experts as u64)) {
        None => Ok(experts),
        Some(value) => {
            let supported = format!("{experts}, which is `num_local_experts`; write this key alone");
            Err(ConfigError::unsupported("num_experts", value, &supported))
        }
    }
}

/// Experts of a layer where the key is `n_routed_experts`. transformers 5 reads it under another name, too; 4.57 does not.
pub(super) fn n_routed_experts(config: &Value, default: usize) -> Result<usize, ConfigError> {
    let experts = dimension_or(config, "n_routed_experts", default)?;
    for other in ["num_local_experts", "num_experts"] {
        if let Some(value) = config.get(other).filter(|value| value.as_u64() != Some(experts as u64)) {
            let supported = format!("{experts}, as `n_routed_experts` says");
            return Err(ConfigError::unsupported(other, value, &supported));
        }
    }
    Ok(experts)
}

/// Groups of experts, and how many of them a token may take, with defaults for both numbers.
pub(super) fn groups_scored_by_two(
    config: &Value,
    [count, chosen]: [usize; 2],
) -> Result<ExpertGroups, ConfigError> {
    Ok(ExpertGroups {
        count: dimension_or(config, "n_group", count)?,
        chosen: dimension_or(config, "topk_group", chosen)?,
        scored_by: 2,
    })
}

/// Shared experts whose number alone the config says.
pub(super) fn shared_experts(
    config: &Value,
    default: usize,
    expert_width: usize,
) -> Result<SharedExperts, ConfigError> {
    let experts = dimension_or(config, "n_shared_experts", default)?;
    Ok(SharedExperts::AsWideAsRouted { intermediate_size: experts * expert_width })
}

/// Layers behind the last that predict later tokens. transformers 5 has two names for their number.
pub(super) fn prediction_layers(config: &Value) -> Result<usize, ConfigError> {
    let layers = count_or(config, "num_nextn_predict_layers", 0)?.max(count_or(config, "num_mtp_layers", 0)?);
    Ok(layers)
}

/// What an output's config says of them: none has such layers.
pub(super) fn no_prediction_layers() -> Vec<(&'static str, Value)> {
    vec![("num_nextn_predict_layers", 0.into())]
}

/// Refuses attention with a window, or of another kind in some layers.
pub(super) fn refuse_windows(config: &Value, layers: usize) -> Result<(), ConfigError> {
    if flag(config, "use_sliding_window")? {
        return Err(ConfigError::unsupported("use_sliding_window", &Value::Bool(true), "`false`"));
    }
    match config.get("layer_types").filter(|value| !value.is_null()) {
        None => Ok(()),
        Some(Value::Array(kinds))
            if kinds.len() == layers && kinds.iter().all(|kind| kind == "full_attention") =>
        {
            Ok(())
        }
        Some(other) => {
            Err(ConfigError::unsupported("layer_types", other, "`full_attention` for every layer"))
        }
    }
}

/// An integer from 0 to 2^24, with a default where the key is absent. Null is no count.
pub(super) fn count_or(object: &Value, key: &str, default: usize) -> Result<usize, ConfigError> {
    match object.get(key).map(|value| (value, value.as_u64())) {
        None => Ok(default),
        Some((_, Some(number @ 0..=DIMENSION_MAX))) => Ok(number as usize),
        Some((value, _)) => Err(ConfigError::bad(key, value, "an integer from 0 to 16777216")),
    }
}

/// Layers with experts: all but the first few, `first_k_dense_replace`.
pub(super) fn moe_layers_after_first(
    config: &Value,
    layers: usize,
    default: usize,
    dense_width: usize,
) -> Result<MoeLayers, ConfigError> {
    const KEY: &str = "first_k_dense_replace";
    let first = count_or(config, KEY, default)?;
    if first >= layers {
        return Err(ConfigError::unsupported(KEY, &first.into(), "models with experts in some layer"));
    }
    let mut dense = LayerSet::default();
    if !(0..first).all(|layer| dense.insert(layer)) {
        return Err(ConfigError::bad(KEY, &first.into(), "layers below 1024"));
    }
    Ok(match first {
        0 => MoeLayers::All,
        _ => MoeLayers::Except { dense, intermediate_size: dense_width },
    })
}

/// Layers with experts: those that `mlp_only_layers` does not list, and of these every `decoder_sparse_step`th.
pub(super) fn moe_layers(
    config: &Value,
    layers: usize,
    dense_width: usize,
) -> Result<MoeLayers, ConfigError> {
    let step = dimension_or(config, "decoder_sparse_step", 1)?;
    let mut dense = LayerSet::default();
    let mut add = |layer: usize, key: &str| {
        let fits = dense.insert(layer);
        let expected = "layers below 1024";
        if fits { Ok(()) } else { Err(ConfigError::bad(key, &layer.into(), expected)) }
    };
    for layer in (0..layers).filter(|layer| !(layer + 1).is_multiple_of(step)) {
        add(layer, "decoder_sparse_step")?;
    }
    match config.get("mlp_only_layers").filter(|value| !value.is_null()) {
        None => {}
        Some(Value::Array(listed)) => {
            for layer in listed {
                let Some(layer) = layer.as_u64() else {
                    return Err(ConfigError::bad("mlp_only_layers", layer, "numbers of layers"));
                };
                // transformers ignores layers that the model does not have.
                if layer < layers as u64 {
                    add(layer as usize, "mlp_only_layers")?;
                }
            }
        }
        Some(other) => return Err(ConfigError::bad("mlp_only_layers", other, "a list of layers")),
    }
    if (0..layers).all(|layer| dense.contains(layer)) {
        let value = config.get("mlp_only_layers").cloned().unwrap_or_default();
        return Err(ConfigError::unsupported("mlp_only_layers", &value, "models with experts in some layer"));
    }
    Ok(if dense.is_empty() {
        MoeLayers::All
    } else {
        MoeLayers::Except { dense, intermediate_size: dense_width }
    })
}
