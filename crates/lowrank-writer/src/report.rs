//! `lowrank_report.json`: rank metadata and provenance. Loaders do not read it; people and `verify` do.
//!
//! A pure function of inputs and settings: no clock, host, path or thread count, so two runs give the same bytes.

use lowrank_model::{
    CostModel, MatrixId, MatrixShape, NamedMatrix, RankPlan, Recipe, Storage, Unit,
    plan::{Optimality, Size},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of this document.
pub const REPORT_VERSION: u32 = 3;

/// The document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompressionReport {
    /// [`REPORT_VERSION`].
    pub report_version: u32,
    /// `lowrank-compress`.
    pub tool: String,
    /// Of the tool.
    pub version: String,
    /// What was compressed.
    pub base_model: BaseModel,
    /// What was asked and what was done; absent when the ranks were given.
    pub budget: Option<BudgetReport>,
    /// The whole checkpoint before.
    pub before: Size,
    /// The whole checkpoint after.
    pub after: Size,
    /// How factored matrices are stored.
    pub storage: Storage,
    /// Every setting that decides the bytes, with defaults spelled out and the budget resolved; absent in version 1, which
    /// held them in another form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Recipe>,
    /// What decomposed the matrices: `cpu`, or the name of a device.
    #[serde(default)]
    pub algebra: String,
    /// What the allocation proves; absent when the ranks were given.
    pub optimality: Option<Optimality>,
    /// What the factors were fitted to; absent when errors were counted by the weights alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationReport>,
    /// Experts that keep some of their channels; the others keep all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertReport>,
    /// Layers whose experts share a base: there a factored matrix is the base plus its factors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_base_layers: Vec<usize>,
    /// One row per expert matrix, in stored order.
    pub matrices: Vec<MatrixReport>,
}

/// One narrowed expert.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertReport {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Expert within the layer, from 0.
    pub expert: usize,
    /// Channels that stay. Which: [`lowrank_model::format::CHANNELS_FILE`].
    pub width: usize,
    /// Predicted root of the share of its output's energy, on the calibration text, that is lost to the width alone.
    pub relative_error: Option<f64>,
}

/// What was compressed, by name and by content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BaseModel {
    /// `org/name`, if it was given so; never a path.
    pub id: Option<String>,
    /// Commit of the snapshot, if it came from the Hugging Face cache.
    pub revision: Option<String>,
    /// The files that were read, sorted by name.
    pub files: Vec<InputFile>,
}

/// One file of the base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    /// Relative name.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Lower-case hex.
    pub sha256: String,
}

/// The budget, in its own unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetReport {
    /// What is counted.
    pub unit: Unit,
    /// Remove at least this.
    pub asked: u64,
    /// What was removed.
    pub removed: u64,
    /// removed − asked.
    pub overshoot: u64,
}

/// What the factors were fitted to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// What was read: `source`, `bundled`, `sequences`, `tokens`, `window` of each text.
    pub texts: Vec<serde_json::Value>,
    /// Of all token ids.
    pub tokens_blake3: String,
    /// What ran the model.
    pub engine: String,
    /// Tokens routed to each expert, by layer.
    pub tokens_per_expert: Vec<Vec<u64>>,
    /// Experts that no token was routed to; they were compressed without data.
    pub unrouted_experts: Vec<String>,
    /// KL(original ‖ one projection of a layer at half its size), nats per token, for gate, down and up of every layer.
    pub kl_at_half: Option<Vec<[f64; 3]>>,
    /// KL per unit of calibrated error, likewise.
    pub sensitivity: Option<Vec<[f64; 3]>>,
    /// KL(original ‖ all experts of a layer at half their width), nats per token, by layer, where experts may be narrowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width_kl_at_half: Option<Vec<f64>>,
    /// KL per unit of calibrated error, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width_sensitivity: Option<Vec<f64>>,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Which matrix.
    #[serde(flatten)]
    pub matrix: NamedMatrix,
    /// [m, n], out × in, of the original.
    pub shape: [usize; 2],
    /// Absent: left dense.
    pub rank: Option<usize>,
    /// ‖W − u·v‖_F / ‖W‖_F; 0 for a dense matrix. Of a narrowed expert: of what is stored, with zeros for the channels that
    /// went. Before rounding to the stored dtype where errors were counted by the
    /// weights alone, where rounding adds at a right angle; of what is stored where factors were calibrated.
    pub relative_error: f64,
    /// The same in the norm of the calibration; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibrated_error: Option<f64>,
    /// Error / optimum − 1, against the best matrix of this rank (Eckart–Young), in the norm that was fitted to; absent where no full spectrum
    /// was taken.
    pub excess_over_optimum: Option<f64>,
    /// How the factors were found, followed by `cuda` where a device found them; `dense` for a matrix left dense.
    pub route: String,
    /// max |T| of a pivoted matrix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_coefficient: Option<f64>,
    /// ‖Ŵ_stored − u·v‖ / ‖u·v‖ of a pivoted matrix: what rounding to the stored dtype cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_trip_error: Option<f64>,
}

/// What factoring one matrix gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatrixOutcome {
    /// See [`MatrixReport::relative_error`].
    pub relative_error: f64,
    /// See [`MatrixReport::calibrated_error`].
    pub calibrated_error: Option<f64>,
    /// See [`MatrixReport::excess_over_optimum`].
    pub excess_over_optimum: Option<f64>,
    /// See [`MatrixReport::route`].
    pub route: String,
    /// See [`MatrixReport::largest_coefficient`].
    pub largest_coefficient: Option<f64>,
    /// See [`MatrixReport::round_trip_error`].
    pub round_trip_error: Option<f64>,
}

impl MatrixOutcome {
    /// Of a matrix that stays as it is.
    pub fn dense() -> Self {
        Self {
            relative_error: 0.0,
            calibrated_error: None,
            excess_over_optimum: None,
            route: "dense".into(),
            largest_coefficient: None,
            round_trip_error: None,
        }
    }
}

impl CompressionReport {
    /// Joins a plan with what came of it.
    ///
    /// # Panics
    /// If a matrix with a rank, or one of a narrowed expert, has no outcome.
    pub fn new(
        plan: &RankPlan,
        outcomes: &BTreeMap<MatrixId, MatrixOutcome>,
        base_model: BaseModel,
        recipe: Recipe,
        algebra: String,
        calibration: Option<CalibrationReport>,
    ) -> Self {
        let CostModel { storage, .. } = plan.cost;
        let budget = plan.target.zip(plan.overshoot()).map(|(target, overshoot)| BudgetReport {
            unit: target.unit,
            asked: target.remove_at_least,
            removed: target.remove_at_least + overshoot,
            overshoot,
        });
        let widths = plan.widths();
        let matrices = plan
            .matrices
            .iter()
            .map(|row| {
                let id = row.matrix.id;
                let is_made = row.rank.is_some() || widths.of(id.layer, id.expert).is_some();
                let outcome = if is_made { outcomes[&id].clone() } else { MatrixOutcome::dense() };
                let MatrixShape { rows, cols } = row.shape;
                MatrixReport {
                    matrix: row.matrix.clone(),
                    shape: [rows, cols],
                    rank: row.rank,
                    relative_error: outcome.relative_error,
                    calibrated_error: outcome.calibrated_error,
                    excess_over_optimum: outcome.excess_over_optimum,
                    route: outcome.route,
                    largest_coefficient: outcome.largest_coefficient,
                    round_trip_error: outcome.round_trip_error,
                }
            })
            .collect();
        Self {
            report_version: REPORT_VERSION,
            tool: lowrank_model::format::FORMAT.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            base_model,
            budget,
            before: plan.before,
            after: plan.after,
            storage,
            recipe: Some(recipe),
            algebra,
            optimality: plan.optimality,
            calibration,
            experts: plan
                .experts
                .iter()
                .map(|row| ExpertReport {
                    layer: row.layer,
                    expert: row.expert,
                    width: row.channels.width(),
                    relative_error: row.relative_error,
                })
                .collect(),
            shared_base_layers: plan.shared_base_layers.clone(),
            matrices,
        }
    }

    /// What the relative errors are errors of, to follow `‖W − Ŵ‖ / ‖W‖` in a sentence. A matrix was calibrated if it has a
    /// calibrated error; an expert without routed tokens is compressed by its weights alone in a calibrated run, too.
    pub fn error_basis(&self) -> String {
        let (stored, exact) = ("of the stored values", "before rounding to the stored number format");
        let factored = || self.matrices.iter().filter(|row| row.rank.is_some());
        let calibrated = factored().filter(|row| row.calibrated_error.is_some()).count();
        match factored().count() - calibrated {
            _ if calibrated == 0 => exact.into(),
            0 => stored.into(),
            1 => format!("{stored} ({exact} for 1 matrix that was compressed without calibration data)"),
            others => {
                format!(
                    "{stored} ({exact} for {others} matrices that were compressed without calibration data)"
                )
            }
        }
    }

    /// Parameters removed.
    pub fn removed_params(&self) -> u64 {
        self.before.params.saturating_sub(self.after.params)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use lowrank_model::plan::{PlannedMatrix, Sensitivity};
    use lowrank_model::recipe::Goal;
    use lowrank_model::{ModelConfig, Projection, Target};

    /// Two layers of two experts, 448 × 128.
    pub(crate) fn model() -> ModelConfig {
        ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 2,
            "num_local_experts": 2, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 32
        }))
        .unwrap()
    }

    /// Two layers of two experts, 448 × 128, every third matrix dense.
    pub(crate) fn report() -> CompressionReport {
        let mut matrices = Vec::new();
        let mut outcomes = BTreeMap::new();
        for layer in 0..2 {
            for expert in 0..2 {
                for (position, projection) in Projection::ALL.into_iter().enumerate() {
                    let id = MatrixId { layer, expert, projection };
                    let shape = match projection {
                        Projection::Down => MatrixShape { rows: 128, cols: 448 },
                        _ => MatrixShape { rows: 448, cols: 128 },
                    };
                    let rank = (position != 2).then_some(40 + 8 * layer + expert);
                    let matrix = model().named(id);
                    matrices.push(PlannedMatrix {
                        matrix,
                        shape,
                        rank,
                        relative_error: Some(0.25),
                        element_bytes: None,
                    });
                    if rank.is_some() {
                        let outcome = MatrixOutcome {
                            relative_error: 0.25,
                            calibrated_error: None,
                            excess_over_optimum: Some(1e-7),
                            route: "exact".into(),
                            largest_coefficient: None,
                            round_trip_error: None,
                        };
                        outcomes.insert(id, outcome);
                    }
                }
            }
        }
        let cost = CostModel {
            storage: Storage::Uv,
            unit: Unit::Params,
            dense_element_bytes: 2,
            factor_element_bytes: 2,
        };
        let optimality = Optimality {
            sensitivity: Sensitivity::Absolute,
            objective: 2.0,
            lower_bound: 1.9,
            duality_gap: Some(0.1 / 1.9),
        };
        let plan = RankPlan::new(
            Some(Target { unit: Unit::Params, remove_at_least: 250_000 }),
            cost,
            1,
            Size { params: 1_000_000, bytes: 2_000_000 },
            Some(optimality),
            matrices,
        )
        .unwrap();
        let recipe = Recipe::new(Goal::Remove(Target { unit: Unit::Params, remove_at_least: 250_000 }));
        let base = BaseModel { id: Some("org/base".into()), ..BaseModel::default() };
        CompressionReport::new(&plan, &outcomes, base, recipe, "cpu".into(), None)
    }

    /// [`report`] with a calibrated error for all factored matrices but the last `without`.
    pub(crate) fn calibrated(without: usize) -> CompressionReport {
        let mut report = report();
        let mut factored: Vec<_> = report.matrices.iter_mut().filter(|row| row.rank.is_some()).collect();
        let count = factored.len() - without;
        for row in &mut factored[..count] {
            row.calibrated_error = Some(0.125);
            row.excess_over_optimum = None;
        }
        report
    }

    #[test]
    fn errors_are_of_what_is_stored_where_matrices_were_calibrated() {
        let exact = "before rounding to the stored number format";
        assert_eq!(report().error_basis(), exact);
        assert_eq!(calibrated(8).error_basis(), exact);
        assert_eq!(calibrated(0).error_basis(), "of the stored values");
        let others =
            |count| format!("of the stored values ({exact} for {count} compressed without calibration data)");
        assert_eq!(calibrated(1).error_basis(), others("1 matrix that was"));
        assert_eq!(calibrated(3).error_basis(), others("3 matrices that were"));
    }

    #[test]
    fn the_budget_adds_up() {
        let report = report();
        // Ranks 40, 41, 48, 49, each in gate and down of one expert.
        let removed = 2 * (4 * 448 * 128 - (40 + 41 + 48 + 49) * 576);
        assert_eq!(report.removed_params(), removed);
        let budget = report.budget.unwrap();
        assert_eq!((budget.removed, budget.overshoot), (removed, removed - 250_000));
        assert_eq!(report.matrices[2].rank, None);
        assert_eq!(report.matrices[2].route, "dense");
    }

    #[test]
    fn a_report_survives_json() {
        let report = report();
        let text = crate::documents::pretty(&report);
        assert_eq!(serde_json::from_slice::<CompressionReport>(&text).unwrap(), report);
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["matrices"][0]["name"], "model.layers.0.block_sparse_moe.experts.0.w1");
        let place = ["layer", "expert", "projection"].map(|key| value["matrices"][5][key].clone());
        assert_eq!(serde_json::json!(place), serde_json::json!([0, 1, "up"]));
        assert_eq!(value["matrices"][0]["shape"], serde_json::json!([448, 128]));
        assert_eq!(value["matrices"][2]["rank"], serde_json::Value::Null);
        assert_eq!(value["storage"], "uv");
    }
}
