//! An expert matrix as documents carry it: what it is, and what its checkpoint calls it.

use crate::display::clip;
use crate::{MatrixId, ModelConfig, Projection, SHARED_EXPERT};
use serde::{Deserialize, Serialize};

/// `{"name": "model.layers.0.block_sparse_moe.experts.0.w1", "layer": 0, "expert": 0, "projection": "gate"}`; `"expert": "shared"`
/// of a shared expert.
///
/// Documents of older versions have the name alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Raw", try_from = "Raw")]
pub struct NamedMatrix {
    /// The module's canonical name.
    pub name: String,
    /// Which matrix.
    pub id: MatrixId,
}

impl ModelConfig {
    /// A matrix and its name.
    pub fn named(&self, id: MatrixId) -> NamedMatrix {
        NamedMatrix { name: self.module_name(id), id }
    }
}

#[derive(Serialize, Deserialize)]
struct Raw {
    name: String,
    layer: Option<usize>,
    expert: Option<RawExpert>,
    projection: Option<Projection>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum RawExpert {
    Routed(usize),
    Shared(Shared),
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Shared {
    Shared,
}

impl From<MatrixId> for RawExpert {
    fn from(id: MatrixId) -> Self {
        if id.is_shared() { Self::Shared(Shared::Shared) } else { Self::Routed(id.expert) }
    }
}

impl From<NamedMatrix> for Raw {
    fn from(NamedMatrix { name, id }: NamedMatrix) -> Self {
        Self { name, layer: Some(id.layer), expert: Some(id.into()), projection: Some(id.projection) }
    }
}

impl TryFrom<Raw> for NamedMatrix {
    type Error = String;

    fn try_from(raw: Raw) -> Result<Self, String> {
        let Raw { name, layer, expert, projection } = raw;
        let by_name = MatrixId::parse(&name);
        let id = match (layer, expert, projection, by_name) {
            (Some(layer), Some(expert), Some(projection), _) => {
                let expert = match expert {
                    RawExpert::Routed(expert) => expert,
                    RawExpert::Shared(Shared::Shared) => SHARED_EXPERT,
                };
                MatrixId { layer, expert, projection }
            }
            (None, None, None, Some(id)) => id,
            (None, None, None, None) => {
                return Err(format!("`{}` is not the name of an expert matrix", clip(&name)));
            }
            _ => {
                let name = clip(&name);
                return Err(format!("{name}: of `layer`, `expert` and `projection` some are missing"));
            }
        };
        match by_name {
            Some(other) if other != id => Err(format!(
                "`{}` and its `layer`, `expert` and `projection` contradict each other",
                clip(&name)
            )),
            _ => Ok(Self { name, id }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NAME: &str = "model.layers.1.block_sparse_moe.experts.2.w3";

    #[test]
    fn a_name_alone_is_enough_and_a_contradiction_is_refused() {
        let id = MatrixId { layer: 1, expert: 2, projection: Projection::Up };
        let named = NamedMatrix { name: NAME.into(), id };
        let full = json!({ "name": NAME, "layer": 1, "expert": 2, "projection": "up" });
        assert_eq!(serde_json::to_value(&named).unwrap(), full);
        for read in [full.clone(), json!({ "name": NAME })] {
            assert_eq!(serde_json::from_value::<NamedMatrix>(read).unwrap(), named);
        }
        let shared = json!({
            "name": "model.layers.1.mlp.shared_expert.up_proj", "layer": 1, "expert": "shared", "projection": "up",
        });
        let read: NamedMatrix = serde_json::from_value(shared.clone()).unwrap();
        assert!(read.id.is_shared());
        assert_eq!(serde_json::to_value(&read).unwrap(), shared);
        for (key, value) in [
            ("expert", json!("shared")),
            ("expert", json!("other")),
            ("layer", json!(0)),
            ("projection", json!("down")),
            ("projection", json!("w3")),
            ("expert", json!(null)),
            ("expert", json!(-1)),
            ("name", json!(null)),
        ] {
            let mut bad = full.clone();
            bad[key] = value;
            assert!(serde_json::from_value::<NamedMatrix>(bad.clone()).is_err(), "{bad}");
        }
        assert!(serde_json::from_value::<NamedMatrix>(json!({ "name": "lm_head" })).is_err());
    }
}
