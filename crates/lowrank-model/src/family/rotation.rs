//! How queries and keys turn with their position: `rope_theta`, `rope_parameters`, `rope_scaling`.
//!
//! transformers 5 reads `rope_scaling` if it says anything, else `rope_parameters`; where the one that it reads has no number, the one
//! beside them, and then its default. transformers 4.57 knows only the last two. So no two values may be said.

use super::{allowed, keys};
use crate::config::ConfigError;
use crate::rules::{Keys, Rule, ValueKind};
use crate::{LongRope, Rotation, Stretch, Yarn};
use serde_json::Value;

/// What a family lets a config say of the rotation, beside `rope_theta`.
pub(super) struct RotationKeys {
    /// Keys of the rotation `default`.
    of_default: &'static [Keys],
    /// The family's other rotation, if it has one.
    other: Option<Other>,
}

/// A rotation beside `default`.
#[derive(Debug, Clone, Copy)]
enum Other {
    Yarn,
    Long,
}

impl Other {
    const fn name(self) -> &'static str {
        match self {
            Self::Yarn => "yarn",
            Self::Long => "longrope",
        }
    }

    const fn keys(self) -> &'static [Keys] {
        match self {
            Self::Yarn => &[(
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
            Self::Long => &[
                (
                    Rule::Read,
                    &[
                        "long_factor",
                        "long_mscale",
                        "original_max_position_embeddings",
                        "short_factor",
                        "short_mscale",
                    ],
                ),
                // Amplitudes follow from them in other families.
                (Rule::Harmless(ValueKind::Number), &["attention_factor", "factor"]),
            ],
        }
    }
}

/// Nothing: the rotation `default`, of whole heads.
pub(super) const WHOLE_HEADS: RotationKeys = RotationKeys { of_default: &[], other: None };
/// That only the first part of each head turns, by `partial_rotary_factor`.
pub(super) const PARTS_OF_HEADS: RotationKeys =
    RotationKeys { of_default: &[(Rule::Read, &["partial_rotary_factor"])], other: None };
/// The rotation `yarn`.
pub(super) const YARN: RotationKeys = RotationKeys { of_default: &[], other: Some(Other::Yarn) };
/// The rotation `longrope`.
pub(super) const LONG: RotationKeys = RotationKeys { of_default: &[], other: Some(Other::Long) };

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
                Some(Value::String(name)) if name == "default" => kinds.push(None),
                Some(Value::String(name)) => match self.other.filter(|other| other.name() == name) {
                    Some(other) => kinds.push(Some(other)),
                    None => {
                        let supported = match self.other {
                            None => "the rotation `default`".to_owned(),
                            Some(other) => format!("the rotations `default` and `{}`", other.name()),
                        };
                        return Err(ConfigError::unsupported(key, rotation, &supported));
                    }
                },
                Some(other) => return Err(ConfigError::bad(&format!("{key}.{kind}"), other, "`default`")),
            }
        }
        if let [one, other] = kinds[..]
            && one.is_some() != other.is_some()
        {
            return Err(ConfigError::unsupported(key, rotation, "one rotation"));
        }
        let own = kinds.into_iter().flatten().next().map_or(self.of_default, Other::keys);
        allowed::check(rotation, &[own, allowed::ROPE]).map_err(|error| error.inside(key))
    }

    /// The rotation of heads of which so many entries turn, in a model for so many positions. transformers 4.57 reads
    /// `rope_scaling` alone, so a second one must be the same.
    pub(super) fn read(
        &self,
        config: &Value,
        positions: usize,
        turning: usize,
    ) -> Result<Rotation, ConfigError> {
        let (scaling, parameters) = self.objects(config)?;
        let read = |key: &str, object: Option<&Value>| {
            let read = match (self.other, object) {
                (Some(other), Some(object)) if is_named(object, other) => match other {
                    Other::Yarn => read_yarn(object, positions).map(Rotation::Yarn),
                    Other::Long => read_long(object, turning / 2).map(Rotation::Long),
                },
                _ => Ok(Rotation::Plain),
            };
            read.map_err(|error| error.inside(key))
        };
        let (of_scaling, of_parameters) =
            (read("rope_scaling", scaling)?, read("rope_parameters", parameters)?);
        if let (Some(scaling), Some(_)) = (scaling, parameters)
            && of_scaling != of_parameters
        {
            let supported = "what `rope_parameters` says, too";
            return Err(ConfigError::unsupported("rope_scaling", scaling, supported));
        }
        let rotation = if scaling.is_some() { of_scaling } else { of_parameters };
        let trained_positions = match &rotation {
            Rotation::Plain => None,
            Rotation::Yarn(yarn) => Some(yarn.trained_positions),
            Rotation::Long(long) => Some(long.trained_positions),
        };
        // transformers 5 prefers what stands outside to what stands within.
        if let (Some(trained), Some(outside)) = (trained_positions, config.get(TRAINED))
            && outside.as_u64() != Some(trained as u64)
        {
            let supported = format!("{trained}, as the rotation says");
            return Err(ConfigError::unsupported(TRAINED, outside, &supported));
        }
        if matches!(rotation, Rotation::Yarn(_)) && self.theta(config, 10_000.0)? <= 1.0 {
            return Err(ConfigError::Bad {
                key: "rope_theta".into(),
                value: "1".into(),
                expected: "more than 1 with the rotation `yarn`",
            });
        }
        Ok(rotation)
    }
}

const TRAINED: &str = "original_max_position_embeddings";

fn is_named(rotation: &Value, other: Other) -> bool {
    ["rope_type", "type"].iter().any(|kind| rotation.get(kind).is_some_and(|name| name == other.name()))
}

/// A number for each pair of entries that turn together, and what they are multiplied with, for short texts and for long ones.
/// All of them must be there, without which one version of transformers or the other does not load.
fn read_long(object: &Value, pairs: usize) -> Result<LongRope, ConfigError> {
    let factors = |key: &'static str| {
        let value = object.get(key).ok_or(ConfigError::Missing(key))?;
        let numbers = value.as_array().map_or(&[][..], Vec::as_slice).iter().map(Value::as_f64);
        match numbers.collect::<Option<Vec<f64>>>() {
            Some(numbers) if numbers.len() == pairs && numbers.iter().all(|&number| number > 0.0) => {
                Ok(numbers)
            }
            _ => Err(ConfigError::bad(key, value, "a positive number for each pair of entries of a head")),
        }
    };
    let stretch = |factor: &'static str, amplitude: &'static str| {
        let factors = factors(factor)?;
        let amplitude = keys::positive(object, amplitude)?.ok_or(ConfigError::Missing(amplitude))?;
        Ok(Stretch { factors, amplitude })
    };
    let trained_positions = keys::dimension(object, TRAINED)?;
    if trained_positions < 2 {
        // transformers divides by its logarithm.
        return Err(ConfigError::bad(TRAINED, &object[TRAINED], "at least 2"));
    }
    Ok(LongRope {
        trained_positions,
        short: stretch("short_factor", "short_mscale")?,
        long: stretch("long_factor", "long_mscale")?,
    })
}

/// Defaults are those of transformers. Null is as good as absent where it takes a default for null, and false for a flag.
fn read_yarn(object: &Value, positions: usize) -> Result<Yarn, ConfigError> {
    let factor = keys::positive(object, "factor")?.ok_or(ConfigError::Missing("factor"))?;
    if factor < 1.0 {
        return Err(ConfigError::bad("factor", &object["factor"], "a number of at least 1"));
    }
    Ok(Yarn {
        factor,
        trained_positions: keys::dimension_or(object, TRAINED, positions)?,
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
