//! The Python files beside factored weights: one that serves every family, and two small ones that name the family's classes.

use crate::template::fill;
use lowrank_model::{Family, Projection};

const EXPERTS: &str = include_str!("../assets/python/lowrank_experts.py");
const CONFIGURATION: &str = include_str!("../assets/python/configuration.py.jinja");
const MODELING: &str = include_str!("../assets/python/modeling.py.jinja");

/// Names and texts, in the order in which they are written.
pub fn files(family: &dyn Family) -> [(String, String); 3] {
    let (output, spelling) = (family.output(), family.spelling());
    let projection = |projection: Projection| spelling.projections[projection.index()];
    let values = [
        ("class", output.class),
        ("model_type", output.model_type),
        ("base_model_type", family.model_type()),
        ("moe", spelling.moe),
        ("gate", projection(Projection::Gate)),
        ("down", projection(Projection::Down)),
        ("up", projection(Projection::Up)),
        ("width", output.width_key),
    ];
    [
        (format!("configuration_{}.py", output.model_type), fill(CONFIGURATION, &values)),
        (format!("modeling_{}.py", output.model_type), fill(MODELING, &values)),
        ("lowrank_experts.py".into(), EXPERTS.into()),
    ]
}
