//! How queries and keys turn with their position: `rope_theta`, `rope_parameters`, `rope_scaling`.
//!
//! transformers 5 reads `rope_scaling` if it says anything, else `rope_parameters`; where the one that it reads has no number, the one
//! beside them, and then its default. transformers 4.57 knows only the last two. So no two values may be said.

use super::{allowed, keys};
use crate::Yarn;
use crate::config::ConfigError;
use crate::rules::{Keys, Rule};
use serde_json::Value;

/// What a family lets a config say of the rotation, beside `rope_theta`.
pub(super) struct RotationKeys {
    /// Keys of the rotation `default`.
    of_default: &'static [Keys],
    /// Keys of the rotation `yarn`; none if the family has no such rotation.
    of_yarn: &'static [Keys],
}

/// Nothing: the rotation `default`, of whole heads.
pub(super) const WHOLE_HEADS: RotationKeys = RotationKeys { of_default: &[], of_yarn: &[] };
/// That only the first part of each head turns, by `partial_rotary_factor`.
pub(super) const PARTS_OF_HEADS: RotationKeys =
    RotationKeys { of_default: &[(Rule::Read, &["partial_rotary_factor"])], of_yarn: &[] };
/// The rotation `yarn`.
pub(super) const YARN: RotationKeys = RotationKeys {
    of_default: &[],
    of_yarn: &[(
        Rule::Read,
        &[
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "factor",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        ],
    )],
};

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
        let (scaling, parameters) = self.objects(config)?;
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

    /// `rope_scaling` and `rope_parameters`, each if it says anything.
    fn objects<'a>(&self, config: &'a Value) -> Result<(Option<&'a Value>, Option<&'a Value>), ConfigError> {
        let object = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(object @ Value::Object(keys)) => {
                self.check(key, object)?;
                Ok(Some(object).filter(|_| !keys.is_empty()))
            }
            Some(other) => Err(ConfigError::bad(key, other, "an object or null")),
        };
        Ok((object("rope_scaling")?, object("rope_parameters")?))
    }

    /// Other rotations than those of the family are refused. `rope_type` was `type` before; versions of transformers prefer
    /// one or the other.
    fn check(&self, key: &str, rotation: &Value) -> Result<(), ConfigError> {
        let mut kinds = Vec::new();
        for kind in ["rope_type", "type"] {
            match rotation.get(kind) {
                None => {}
                Some(Value::String(name)) if name == "default" => kinds.push(false),
                Some(Value::String(name)) if name == "yarn" && !self.of_yarn.is_empty() => kinds.push(true),
                Some(Value::String(_)) => {
                    let supported = if self.of_yarn.is_empty() {
                        "the rotation `default`"
                    } else {
                        "the rotations `default` and `yarn`"
                    };
                    return Err(ConfigError::unsupported(key, rotation, supported));
                }
                Some(other) => return Err(ConfigError::bad(&format!("{key}.{kind}"), other, "`default`")),
            }
        }
        if kinds == [true, false] || kinds == [false, true] {
            return Err(ConfigError::unsupported(key, rotation, "one rotation"));
        }
        let own = if kinds.contains(&true) { self.of_yarn } else { self.of_default };
        allowed::check(rotation, &[own, allowed::ROPE]).map_err(|error| error.inside(key))
    }

    /// The rotation `yarn`, if the config has it. transformers 4.57 reads `rope_scaling` alone, so a second one must be the same.
    pub(super) fn yarn(&self, config: &Value, positions: usize) -> Result<Option<Yarn>, ConfigError> {
        let (scaling, parameters) = self.objects(config)?;
        let read = |key: &str, object: Option<&Value>| match object {
            Some(object) if is_yarn(object) => {
                read_yarn(object, positions).map(Some).map_err(|error| error.inside(key))
            }
            _ => Ok(None),
        };
        let (of_scaling, of_parameters) =
            (read("rope_scaling", scaling)?, read("rope_parameters", parameters)?);
        if let (Some(scaling), Some(_)) = (scaling, parameters)
            && of_scaling != of_parameters
        {
            let supported = "what `rope_parameters` says, too";
            return Err(ConfigError::unsupported("rope_scaling", scaling, supported));
        }
        let yarn = of_scaling.or(of_parameters);
        // transformers 5 prefers what stands outside to what stands within.
        const TRAINED: &str = "original_max_position_embeddings";
        if let (Some(yarn), Some(outside)) = (yarn, config.get(TRAINED))
            && outside.as_u64() != Some(yarn.trained_positions as u64)
        {
            let supported = format!("{}, as the rotation says", yarn.trained_positions);
            return Err(ConfigError::unsupported(TRAINED, outside, &supported));
        }
        if yarn.is_some() && self.theta(config, 10_000.0)? <= 1.0 {
            return Err(ConfigError::Bad {
                key: "rope_theta".into(),
                value: "1".into(),
                expected: "more than 1 with the rotation `yarn`",
            });
        }
        Ok(yarn)
    }
}

fn is_yarn(rotation: &Value) -> bool {
    ["rope_type", "type"].iter().any(|kind| rotation.get(kind).is_some_and(|name| name == "yarn"))
}

/// Defaults are those of transformers. Null is as good as absent where it takes a default for null, and false for a flag.
fn read_yarn(object: &Value, positions: usize) -> Result<Yarn, ConfigError> {
    let factor = keys::positive(object, "factor")?.ok_or(ConfigError::Missing("factor"))?;
    if factor < 1.0 {
        return Err(ConfigError::bad("factor", &object["factor"], "a number of at least 1"));
    }
    Ok(Yarn {
        factor,
        trained_positions: keys::dimension_or(object, "original_max_position_embeddings", positions)?,
        beta_fast: keys::optional_positive(object, "beta_fast")?.unwrap_or(32.0),
        beta_slow: keys::optional_positive(object, "beta_slow")?.unwrap_or(1.0),
        mscale: keys::optional_positive(object, "mscale")?,
        mscale_all_dim: keys::optional_positive(object, "mscale_all_dim")?,
        attention_factor: keys::optional_positive(object, "attention_factor")?,
        truncate: keys::flag_or(object, "truncate", true)?,
    })
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
