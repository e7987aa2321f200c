//! Reading one key of a model's description, checked.

use crate::block::Activation;
use crate::config::ConfigError;
use serde_json::Value;

/// No dimension of a real model comes near this; a larger one is a lie or a mistake.
const DIMENSION_MAX: u64 = 1 << 24;

/// An integer from 1 to 2^24.
pub(super) fn dimension(object: &Value, key: &'static str) -> Result<usize, ConfigError> {
    let value = object.get(key).ok_or(ConfigError::Missing(key))?;
    match value.as_u64() {
        Some(number @ 1..=DIMENSION_MAX) => Ok(number as usize),
        _ => {
            Err(ConfigError::Bad { key, value: value.to_string(), expected: "an integer from 1 to 16777216" })
        }
    }
}

/// The same, `None` where the key is absent or null.
pub(super) fn optional_dimension(object: &Value, key: &'static str) -> Result<Option<usize>, ConfigError> {
    match object.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(_) => dimension(object, key).map(Some),
    }
}

/// A positive number, `None` where the key is absent or null.
pub(super) fn positive(object: &Value, key: &'static str) -> Result<Option<f64>, ConfigError> {
    match object.get(key).filter(|value| !value.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(ConfigError::Bad { key, value: value.to_string(), expected: "a positive number" }),
        },
    }
}

/// True or false; false where the key is absent or no truth value.
pub(super) fn flag(object: &Value, key: &str) -> bool {
    object.get(key).and_then(Value::as_bool).unwrap_or(false)
}

/// The non-linearity of the experts, `hidden_act`.
pub(super) fn activation(config: &Value) -> Result<Activation, ConfigError> {
    match config.get("hidden_act").and_then(Value::as_str) {
        None | Some("silu") => Ok(Activation::Silu),
        Some(other) => {
            Err(ConfigError::Bad { key: "hidden_act", value: format!("`{other}`"), expected: "`silu`" })
        }
    }
}

/// Refuses quantised weights.
pub(super) fn refuse_quantised(config: &Value) -> Result<(), ConfigError> {
    match config.get("quantization_config").filter(|value| !value.is_null()) {
        None => Ok(()),
        Some(quantization) => {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown method");
            Err(ConfigError::Quantised(method.into()))
        }
    }
}

/// `rope_theta` inside `rope_parameters` (transformers v5) or at the top (v4); only the default rotation is known.
pub(super) fn rope_theta(config: &Value) -> Result<Option<f64>, ConfigError> {
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(parameters) = config.get(key).filter(|value| !value.is_null()) else { continue };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        if !matches!(kind, None | Some("default")) {
            let (value, expected) = (parameters.to_string(), "`rope_type` `default`");
            return Err(ConfigError::Bad { key, value, expected });
        }
        if let Some(theta) = positive(parameters, "rope_theta")? {
            return Ok(Some(theta));
        }
    }
    positive(config, "rope_theta")
}
