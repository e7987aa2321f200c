//! How queries and keys turn with their position: `rope_theta`, `rope_parameters`, `rope_scaling`.
//!
//! transformers 5 reads `rope_scaling` if it says anything, else `rope_parameters`; where the one that it reads has no number, the one
//! beside them, and then its default. transformers 4.57 knows only the last two. So no two values may be said.

use super::{allowed, keys};
use crate::config::ConfigError;
use crate::rules::{Keys, Rule};
use serde_json::Value;

/// What a family lets a config say of the rotation, beside `rope_theta`.
pub(super) struct RotationKeys(&'static [Keys]);

/// Nothing: the rotation `default`, of whole heads.
pub(super) const WHOLE_HEADS: RotationKeys = RotationKeys(&[]);
/// That only the first part of each head turns, by `partial_rotary_factor`.
pub(super) const PARTS_OF_HEADS: RotationKeys = RotationKeys(&[(Rule::Read, &["partial_rotary_factor"])]);

impl RotationKeys {
    /// Base of the angles.
    pub(super) fn theta(&self, config: &Value, default: f64) -> Result<f64, ConfigError> {
        self.number(config, "rope_theta", default, base_of_angles)
    }

    /// Share of a head that turns.
    pub(super) fn partial_factor(&self, config: &Value, default: f64) -> Result<f64, ConfigError> {
        const KEY: &str = "partial_rotary_factor";
        self.number(config, KEY, default, |object| match keys::positive(object, KEY)? {
            Some(factor) if factor > 1.0 => Err(ConfigError::bad(KEY, &object[KEY], "a number of at most 1")),
            factor => Ok(factor),
        })
    }

    /// A number that both versions of transformers find, wherever it is said.
    fn number(
        &self,
        config: &Value,
        key: &str,
        default: f64,
        read: impl Fn(&Value) -> Result<Option<f64>, ConfigError>,
    ) -> Result<f64, ConfigError> {
        let object = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(object @ Value::Object(keys)) => {
                self.check(key, object)?;
                Ok(Some(object).filter(|_| !keys.is_empty()))
            }
            Some(other) => Err(ConfigError::bad(key, other, "an object or null")),
        };
        let (scaling, parameters) = (object("rope_scaling")?, object("rope_parameters")?);
        let inside = |object: Option<&Value>| object.map_or(Ok(None), &read);
        let beside = read(config)?;
        let chosen = inside(scaling.or(parameters))?.or(beside).unwrap_or(default);
        for (place, said) in [("`rope_parameters`", inside(parameters)?), ("the config itself", beside)] {
            if let Some(said) = said.filter(|said| *said != chosen) {
                return Err(ConfigError::Unsupported {
                    key: key.into(),
                    value: format!("{said} in {place}, where transformers 5 takes {chosen}"),
                    supported: "one value, because versions of transformers read different ones".into(),
                });
            }
        }
        Ok(chosen)
    }

    /// Other rotations than the default one are refused. `rope_type` was `type` before.
    fn check(&self, key: &str, rotation: &Value) -> Result<(), ConfigError> {
        for kind in ["rope_type", "type"] {
            match rotation.get(kind) {
                None => {}
                Some(Value::String(name)) if name == "default" => {}
                Some(Value::String(_)) => {
                    return Err(ConfigError::unsupported(key, rotation, "the rotation `default`"));
                }
                Some(other) => return Err(ConfigError::bad(&format!("{key}.{kind}"), other, "`default`")),
            }
        }
        allowed::check(rotation, &[self.0, allowed::ROPE]).map_err(|error| error.inside(key))
    }
}

/// `rope_theta` of an object, `None` where the key is absent. Below 1 the angles grow with the dimension, beyond what f32 holds.
pub(super) fn base_of_angles(object: &Value) -> Result<Option<f64>, ConfigError> {
    match keys::positive(object, "rope_theta")? {
        Some(theta) if theta < 1.0 => {
            Err(ConfigError::bad("rope_theta", &object["rope_theta"], "a number of at least 1"))
        }
        theta => Ok(theta),
    }
}
