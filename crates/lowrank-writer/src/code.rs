//! The Python files beside factored weights: one that serves every family, and two small ones that name the family's classes.

use crate::template::fill;
use lowrank_model::{Family, Projection};

const EXPERTS: &str = include_str!("../assets/python/lowrank_experts.py");
const CONFIGURATION: &str = include_str!("../assets/python/configuration.py.jinja");
const MODELING: &str = include_str!("../assets/python/modeling.py.jinja");

/// Names and texts, in the order in which they are written.
pub fn files(family: &dyn Family) -> [(String, String); 3] {
    let (output, values) = (family.output(), values(family));
    [
        (format!("configuration_{}.py", output.model_type), fill(CONFIGURATION, &values)),
        (format!("modeling_{}.py", output.model_type), fill(MODELING, &values)),
        ("lowrank_experts.py".into(), EXPERTS.into()),
    ]
}

/// What the templates call the parts of a family.
fn values(family: &dyn Family) -> [(&'static str, &'static str); 8] {
    let (output, spelling) = (family.output(), family.spelling());
    let projection = |projection: Projection| spelling.projections[projection.index()];
    [
        ("class", output.class),
        ("model_type", output.model_type),
        ("base_model_type", family.model_type()),
        ("moe", spelling.moe),
        ("gate", projection(Projection::Gate)),
        ("down", projection(Projection::Down)),
        ("up", projection(Projection::Up)),
        ("width", output.width_key),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// The Python package fills the same templates, from a file, because it cannot ask this crate.
    #[test]
    fn the_python_package_knows_the_same_families() {
        let packaged: Vec<BTreeMap<String, String>> =
            serde_json::from_str(include_str!("../assets/python/families.json")).unwrap();
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let known: Vec<BTreeMap<String, String>> =
            lowrank_model::family::ALL.iter().map(|family| values(*family).map(owned).into()).collect();
        assert_eq!(packaged, known);
    }
}
