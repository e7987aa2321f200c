//! The families that this program knows, and which one a checkpoint is of.
//!
//! `model_type` of `config.json` decides, or the keys of `params.json`; never a file's or a model's name. To add a
//! family, write its file below `family/` and list it in [`ALL`]: `docs/architecture.md`, "A family".

mod allowed;
mod deepseek_v2;
mod deepseek_v3;
mod defaults;
mod glm4_moe;
mod keys;
mod latent;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_moe;
mod rotation;
#[cfg(test)]
mod test_support;

use crate::config::ConfigError;
use crate::display::clip;
use crate::matrix::{MatrixId, Projection, expert_number};
use crate::{ModelConfig, config::Family};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;

/// Every known family.
pub const ALL: &[&dyn Family] = &[
    mixtral::FAMILY,
    qwen3_moe::FAMILY,
    qwen2_moe::FAMILY,
    olmoe::FAMILY,
    glm4_moe::FAMILY,
    deepseek_v3::FAMILY,
    deepseek_v2::FAMILY,
    phimoe::FAMILY,
];

/// The family that a `config.json` names.
fn of_config(config: &Value) -> Result<&'static dyn Family, ConfigError> {
    let found = config.get("model_type").and_then(Value::as_str).ok_or(ConfigError::Missing("model_type"))?;
    let named = |family: &&&dyn Family| [family.model_type(), family.output().model_type].contains(&found);
    let family = ALL.iter().find(named).or_else(|| ALL.iter().find(|family| family.claims(config)));
    family.copied().ok_or_else(|| {
        let known: Vec<&str> =
            ALL.iter().flat_map(|family| [family.model_type(), family.output().model_type]).collect();
        let class = config.get("architectures").and_then(|classes| classes.get(0)).and_then(Value::as_str);
        ConfigError::UnknownFamily {
            found: found.into(),
            architecture: class.map(Into::into),
            known: known.join(", "),
        }
    })
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf_json(config: &Value) -> Result<Self, ConfigError> {
        if !config.is_object() {
            return Err(ConfigError::NotJson("top level".into()));
        }
        of_config(config)?.read_config(config)?.checked()
    }

    /// Reads a `params.json`, which lies beside `consolidated*.safetensors`.
    pub fn from_params_json(params: &Value) -> Result<Self, ConfigError> {
        if !params.is_object() {
            return Err(ConfigError::NotJson("top level".into()));
        }
        // Of all known models published so, what a mixture of experts has and others have not.
        let read = ALL.iter().find_map(|family| family.read_params(params));
        read.unwrap_or(Err(ConfigError::NoExperts))?.checked()
    }
}

impl MatrixId {
    /// Reads `layers.3.experts.5.gate`, or what any known family calls it.
    pub fn parse(name: &str) -> Option<Self> {
        parse_neutral(name).or_else(|| ALL.iter().find_map(|family| family.spelling().parse_module(name)))
    }
}

fn parse_neutral(name: &str) -> Option<MatrixId> {
    let (layer, rest) = name.strip_prefix("layers.")?.split_once('.')?;
    let (expert, projection) = rest.rsplit_once('.')?;
    let expert = expert_number(expert, "shared_expert")?;
    let projection = Projection::ALL.into_iter().find(|one| one.as_str() == projection)?;
    let id = MatrixId { layer: layer.parse().ok()?, expert, projection };
    // `007` would name the same matrix twice.
    (id.to_string() == name).then_some(id)
}

impl<'de> Deserialize<'de> for MatrixId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).ok_or_else(|| {
            let name = clip(&name);
            D::Error::custom(format_args!("`{name}` is not the name of an expert matrix"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SHARED_EXPERT;

    #[test]
    fn every_spelling_of_a_matrix_is_read() {
        for projection in Projection::ALL {
            let id = MatrixId { layer: 30, expert: 7, projection };
            assert_eq!(MatrixId::parse(&id.to_string()), Some(id));
            let shared = MatrixId { expert: SHARED_EXPERT, ..id };
            assert_eq!(MatrixId::parse(&shared.to_string()), Some(shared));
            for family in ALL {
                for id in [id, shared] {
                    assert_eq!(
                        MatrixId::parse(&family.spelling().module(id)),
                        Some(id),
                        "{}",
                        family.title()
                    );
                }
            }
            let text = serde_json::to_string(&id).unwrap();
            assert_eq!(text, format!("\"layers.30.experts.7.{projection}\""));
            assert_eq!(serde_json::from_str::<MatrixId>(&text).unwrap(), id);
        }
        for bad in [
            "layers.0.experts.00.gate",
            "layers.0.experts.65536.gate",
            "layers.0.shared_expert.0.gate",
            "layers.0.experts.0.w1",
            "layers.0.gate",
            "experts.0.gate",
            "",
        ] {
            assert_eq!(MatrixId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn families_differ_in_what_they_are_known_by() {
        let mut types: Vec<&str> =
            ALL.iter().flat_map(|family| [family.model_type(), family.output().model_type]).collect();
        let count = types.len();
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), count);
    }
}
