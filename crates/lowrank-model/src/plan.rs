//! The rank table: a pure value that is printed, stored as `plan.json`, and executed.

mod choices;
mod error;
mod size;
mod validate;
mod version;

pub use choices::{Allocation, LayerSensitivity, RankGroups, Sensitivity, Structures, WidthSensitivity};
pub use error::PlanError;
pub use size::Size;
pub use version::PLAN_VERSION;

use version::{PLAN_VERSION_RANKS, PLAN_VERSION_WIDTHS};

use crate::display::abridge;
use crate::widths::{KeptChannels, Widths, expert_shape};
use crate::{
    CostModel, ElementBytes, MatrixId, MatrixShape, ModelConfig, NamedMatrix, Projection, SpectrumCurves,
    Target, Unit,
};
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedMatrix {
    /// Which matrix.
    #[serde(flatten)]
    pub matrix: NamedMatrix,
    /// [m, n] in the model, whatever the width of its expert.
    pub shape: MatrixShape,
    /// Rank of its factors; absent: left dense, or all of a narrowed matrix.
    pub rank: Option<usize>,
    /// Predicted ‖W − Ŵ‖ / ‖W‖ before rounding, in the norm that errors were counted in; absent when ranks were given and no spectrum was taken.
    pub relative_error: Option<f64>,
    /// Its element sizes where they are not those of [`RankPlan::cost`]: matrices may have several dtypes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub element_bytes: Option<ElementBytes>,
}

impl PlannedMatrix {
    /// [m, n] of what stays of it where experts have these widths.
    pub fn stored_shape(&self, widths: &Widths) -> MatrixShape {
        let MatrixId { layer, expert, projection } = self.matrix.id;
        let hidden_size = if projection == Projection::Down { self.shape.rows } else { self.shape.cols };
        widths.of(layer, expert).map_or(self.shape, |width| expert_shape(projection, width, hidden_size))
    }
}

/// An expert that keeps some of its channels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedExpert {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Expert within the layer, from 0.
    pub expert: usize,
    /// The channels that stay; their number is the expert's width.
    pub channels: KeptChannels,
    /// Predicted root of the share of its output's energy, on the calibration text, that the expert loses to the width alone.
    pub relative_error: Option<f64>,
}

/// What the allocation proves about itself. Errors are s·‖W − Ŵ‖², summed over matrices.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Optimality {
    /// The weighing used.
    pub sensitivity: Sensitivity,
    /// Predicted sum of the plan.
    pub objective: f64,
    /// No plan within the budget can be below this.
    pub lower_bound: f64,
    /// (objective − lower_bound) / lower_bound; 0 when both are 0, absent when only the bound is: it then bounds no ratio.
    pub duality_gap: Option<f64>,
}

/// Which rank each expert matrix gets, and what that costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankPlan {
    /// Version of this document.
    pub plan_version: u32,
    /// What was asked for; absent when the ranks were given.
    pub target: Option<Target>,
    /// How cost is counted. Its element sizes hold for every row that has none of its own.
    pub cost: CostModel,
    /// Ranks are multiples of this.
    pub rank_multiple: usize,
    /// No rank that was chosen is below this.
    #[serde(default = "one")]
    pub rank_min: usize,
    /// Matrices whose name matched any of these were kept dense.
    #[serde(default, deserialize_with = "patterns")]
    pub keep_dense: Vec<String>,
    /// `PATTERN=RANK`: matrices whose name matched got this rank; of several the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "patterns")]
    pub fix_rank: Vec<String>,
    /// The whole checkpoint before.
    pub before: Size,
    /// The whole checkpoint after.
    pub after: Size,
    /// How the budget was spread.
    #[serde(default)]
    pub allocation: Allocation,
    /// What could be cut.
    #[serde(default, skip_serializing_if = "is_default")]
    pub structures: Structures,
    /// What shares one choice.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rank_groups: RankGroups,
    /// By layer; absent where nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivities: Option<Vec<LayerSensitivity>>,
    /// Proof of quality; absent when the ranks were given.
    pub optimality: Option<Optimality>,
    /// Experts that keep some of their channels, by layer and expert; the others keep all. Since version 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<PlannedExpert>,
    /// Layers whose experts share a base, rising: there a matrix with a rank is the base plus its factors. Since version 3.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_base_layers: Vec<usize>,
    /// One row per expert matrix, in stored order.
    pub matrices: Vec<PlannedMatrix>,
    /// The spectra that the ranks were chosen from, thinned, so that whoever executes the plan can show them; absent when
    /// the ranks were given.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "on_one_line")]
    pub spectra: Option<SpectrumCurves>,
}

/// Widths of a plain model are multiples of this: grouped products of runtimes want rows of whole 16 bytes, in bf16 too.
pub const PLAIN_WIDTH_MULTIPLE: usize = 8;
/// The most patterns of matrices to keep dense.
const PATTERNS_MAX: usize = 1 << 16;

impl RankPlan {
    /// Assembles a plan from chosen ranks and proves its arithmetic. Refuses matrices that are larger than the checkpoint.
    pub fn new(
        target: Option<Target>,
        cost: CostModel,
        rank_multiple: usize,
        before: Size,
        optimality: Option<Optimality>,
        matrices: Vec<PlannedMatrix>,
    ) -> Result<Self, PlanError> {
        let after = size_after(&cost, before, &matrices, &Widths::default(), &[])?;
        Ok(Self {
            plan_version: PLAN_VERSION_RANKS,
            target,
            cost,
            rank_multiple,
            rank_min: 1,
            keep_dense: Vec::new(),
            fix_rank: Vec::new(),
            allocation: Allocation::default(),
            structures: Structures::default(),
            rank_groups: RankGroups::default(),
            sensitivities: None,
            before,
            after,
            optimality,
            experts: Vec::new(),
            shared_base_layers: Vec::new(),
            matrices,
            spectra: None,
        })
    }

    /// The version that such a plan has.
    const fn version(&self) -> u32 {
        match (self.shared_base_layers.is_empty(), self.experts.is_empty()) {
            (false, _) => PLAN_VERSION,
            (true, false) => PLAN_VERSION_WIDTHS,
            (true, true) => PLAN_VERSION_RANKS,
        }
    }

    fn counted(mut self) -> Result<Self, PlanError> {
        self.plan_version = self.version();
        let bases = &self.shared_base_layers;
        self.after = size_after(&self.cost, self.before, &self.matrices, &self.widths(), bases)?;
        Ok(self)
    }

    /// Records in which layers the experts share a base, and what is then left of the checkpoint.
    pub fn with_shared_bases(mut self, layers: Vec<usize>) -> Result<Self, PlanError> {
        self.shared_base_layers = layers;
        self.counted()
    }

    /// Records which experts keep some of their channels alone, in order, and what is then left of the checkpoint.
    pub fn narrowed(mut self, experts: Vec<PlannedExpert>) -> Result<Self, PlanError> {
        self.experts = experts;
        self.counted()
    }

    /// The width of every expert of a plan that gives all experts the same and factors nothing: its output is an ordinary model
    /// with a smaller `intermediate_size`.
    pub fn plain_width(&self) -> Option<usize> {
        let width = self.experts.first()?.channels.width();
        let alike = self.experts.iter().all(|row| row.channels.width() == width);
        let is_plain = alike
            && width.is_multiple_of(PLAIN_WIDTH_MULTIPLE)
            && 3 * self.experts.len() == self.matrices.len()
            && self.matrices.iter().all(|row| row.rank.is_none());
        is_plain.then_some(width)
    }

    /// Widths of the experts that keep some of their channels.
    pub fn widths(&self) -> Widths {
        self.experts.iter().map(|row| (row.layer, row.expert, row.channels.width())).collect()
    }

    /// The model as it is stored: with its widths and shared bases.
    pub fn stored_config(&self, config: &ModelConfig) -> ModelConfig {
        config
            .with_shared_experts(self.compresses_shared_experts())
            .with_widths(self.widths())
            .with_shared_bases(self.shared_base_layers.iter().copied())
    }

    /// Whether matrices of shared experts are among those that it has ranks for.
    pub fn compresses_shared_experts(&self) -> bool {
        self.matrices.iter().any(|row| row.matrix.id.is_shared())
    }

    /// Records the constraints under which the ranks were chosen.
    #[must_use]
    pub fn constrained(self, rank_min: usize, keep_dense: Vec<String>, fix_rank: Vec<String>) -> Self {
        Self { rank_min, keep_dense, fix_rank, ..self }
    }

    /// Records how the ranks were chosen.
    #[must_use]
    pub fn chosen_by(
        self,
        allocation: Allocation,
        structures: Structures,
        rank_groups: RankGroups,
        sensitivities: Option<Vec<LayerSensitivity>>,
    ) -> Self {
        Self { allocation, structures, rank_groups, sensitivities, ..self }
    }

    /// Ranks of the factored matrices; a matrix left dense is absent.
    pub fn ranks(&self) -> BTreeMap<MatrixId, usize> {
        self.matrices.iter().filter_map(|row| Some((row.matrix.id, row.rank?))).collect()
    }

    /// Parameters removed.
    pub fn removed_params(&self) -> u64 {
        self.before.params.saturating_sub(self.after.params)
    }

    /// Bytes of weights removed.
    pub fn removed_bytes(&self) -> u64 {
        self.before.bytes.saturating_sub(self.after.bytes)
    }

    /// How much more was removed than asked, in the target's unit.
    pub fn overshoot(&self) -> Option<u64> {
        let target = self.target?;
        Some(self.removed(target.unit).saturating_sub(target.remove_at_least))
    }

    /// Reads a plan; what it says is for [`RankPlan::validate`] to check.
    pub fn from_json(json: &[u8]) -> Result<Self, PlanError> {
        serde_json::from_slice(json).map_err(|error| PlanError::Json(abridge(&error.to_string())))
    }

    fn removed(&self, unit: Unit) -> u64 {
        match unit {
            Unit::Params => self.removed_params(),
            Unit::Bytes => self.removed_bytes(),
        }
    }
}

/// However prettily the rest is printed: tens of thousands of numbers are not read line by line.
fn on_one_line<S: serde::Serializer>(
    curves: &Option<SpectrumCurves>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serde_json::value::to_raw_value(curves).map_err(serde::ser::Error::custom)?.serialize(serializer)
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> usize {
    1
}

/// Patterns of a file: a list of a million empty ones must not become memory.
fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct PatternsVisitor;
    impl<'de> Visitor<'de> for PatternsVisitor {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of patterns")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
            let mut patterns = Vec::new();
            while let Some(pattern) = list.next_element()? {
                if patterns.len() == PATTERNS_MAX {
                    return Err(A::Error::custom(format_args!(
                        "a list has more than {PATTERNS_MAX} patterns"
                    )));
                }
                patterns.push(pattern);
            }
            Ok(patterns)
        }
    }
    deserializer.deserialize_seq(PatternsVisitor)
}

/// The checkpoint without the dense matrices and with what is stored in their place.
fn size_after(
    cost: &CostModel,
    before: Size,
    matrices: &[PlannedMatrix],
    widths: &Widths,
    shared_base_layers: &[usize],
) -> Result<Size, PlanError> {
    let of_base =
        |row: &&PlannedMatrix| row.matrix.id.expert == 0 && shared_base_layers.contains(&row.matrix.id.layer);
    let bases: Vec<&PlannedMatrix> = matrices.iter().filter(of_base).collect();
    let total = |unit: Unit, whole: u64| {
        let of = |row: &PlannedMatrix| {
            let cost = CostModel { unit, ..*cost }.with(row.element_bytes);
            (cost.cost(row.shape, None), cost.cost(row.stored_shape(widths), row.rank))
        };
        let add = |(dense, stored): (u64, u64), row| {
            let (one_dense, one_stored) = of(row);
            Some((dense.checked_add(one_dense)?, stored.checked_add(one_stored)?))
        };
        let (dense, stored) = matrices.iter().try_fold((0, 0), add)?;
        let base = |row: &&PlannedMatrix| {
            CostModel { unit, ..*cost }.with(row.element_bytes).of_shared_base(row.shape)
        };
        let bases = bases.iter().map(base).try_fold(0_u64, u64::checked_add)?;
        whole.checked_sub(dense)?.checked_add(stored)?.checked_add(bases)
    };
    let size = || {
        Some(Size { params: total(Unit::Params, before.params)?, bytes: total(Unit::Bytes, before.bytes)? })
    };
    size().ok_or(PlanError::LargerThanCheckpoint { before })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Storage;

    /// One layer, one expert: three matrices of 448 · 128.
    fn config() -> ModelConfig {
        ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 1,
            "num_local_experts": 1, "num_experts_per_tok": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 32
        }))
        .unwrap()
    }

    fn row(rank: Option<usize>) -> PlannedMatrix {
        PlannedMatrix {
            matrix: config().named(MatrixId { layer: 0, expert: 0, projection: Projection::Gate }),
            shape: MatrixShape { rows: 448, cols: 128 },
            rank,
            relative_error: None,
            element_bytes: None,
        }
    }

    const COST: CostModel = CostModel {
        storage: Storage::Uv,
        unit: Unit::Params,
        dense_element_bytes: 2,
        factor_element_bytes: 2,
    };

    #[test]
    fn sizes_follow_from_the_rows() {
        let before = Size { params: 100_000, bytes: 200_000 };
        let target = Some(Target { unit: Unit::Params, remove_at_least: 20_000 });
        let plan = RankPlan::new(target, COST, 1, before, None, vec![row(Some(64))]).unwrap();
        assert_eq!(plan.removed_params(), 448 * 128 - 64 * 576);
        assert_eq!(plan.after.bytes, 2 * plan.after.params);
        assert_eq!(plan.overshoot(), Some(480));
        let dense = RankPlan::new(None, COST, 1, before, None, vec![row(None)]).unwrap();
        assert_eq!(dense.removed_params(), 0);
        let larger = Size { params: 448 * 128 - 1, bytes: 1_000_000 };
        assert_eq!(
            RankPlan::new(None, COST, 1, larger, None, vec![row(None)]),
            Err(PlanError::LargerThanCheckpoint { before: larger })
        );
    }

    #[test]
    fn a_shared_base_costs_three_dense_matrices_in_the_dtype_of_factors() {
        let before = Size { params: 1_000_000, bytes: 2_000_000 };
        let of = |expert, projection| PlannedMatrix {
            matrix: config().named(MatrixId { layer: 0, expert, projection }),
            ..row(Some(8))
        };
        let rows = (0..2).flat_map(|expert| Projection::ALL.map(|projection| of(expert, projection)));
        let cost = CostModel { factor_element_bytes: 4, ..COST };
        let plan = RankPlan::new(None, cost, 1, before, None, rows.collect()).unwrap();
        let based = plan.clone().with_shared_bases(vec![0]).unwrap();
        assert_eq!(based.after.params - plan.after.params, 3 * 448 * 128);
        assert_eq!(based.after.bytes - plan.after.bytes, 4 * 3 * 448 * 128);
        assert_eq!((plan.plan_version, based.plan_version), (1, 3));
        let json = serde_json::to_string(&based).unwrap();
        assert_eq!(RankPlan::from_json(json.as_bytes()).unwrap(), based);
    }

    #[test]
    fn a_row_may_have_element_sizes_of_its_own() {
        let before = Size { params: 200_000, bytes: 600_000 };
        let wide =
            PlannedMatrix { element_bytes: Some(ElementBytes { dense: 4, factor: 2 }), ..row(Some(64)) };
        let plan = RankPlan::new(None, COST, 1, before, None, vec![row(Some(64)), wide]).unwrap();
        assert_eq!(plan.removed_params(), 2 * (448 * 128 - 64 * 576));
        assert_eq!(plan.removed_bytes(), (2 + 4) * 448 * 128 - (2 + 2) * 64 * 576);
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(
            json["matrices"][0].get("element_bytes"),
            None,
            "rows like the plan's cost stay as they were"
        );
        assert_eq!(json["matrices"][1]["element_bytes"], serde_json::json!({ "dense": 4, "factor": 2 }));
        assert_eq!(RankPlan::from_json(json.to_string().as_bytes()).unwrap(), plan);
    }

    #[test]
    fn a_plan_survives_json() {
        let before = Size { params: 100_000, bytes: 200_000 };
        let mut plan = RankPlan::new(None, COST, 8, before, None, vec![row(Some(64))]).unwrap();
        let lines = serde_json::to_string_pretty(&plan).unwrap().lines().count();
        let spectrum = crate::Spectrum::new((1..=128).map(|i| 1.0 / f64::from(i)).collect()).unwrap();
        plan.spectra = SpectrumCurves::of([(plan.matrices[0].matrix.name.clone(), &spectrum)]);
        let text = serde_json::to_string_pretty(&plan).unwrap();
        assert_eq!(RankPlan::from_json(text.as_bytes()).unwrap(), plan);
        assert_eq!(serde_json::from_value::<RankPlan>(serde_json::to_value(&plan).unwrap()).unwrap(), plan);
        assert_eq!(text.lines().count(), lines + 1, "{text}");
    }

    fn small() -> (ModelConfig, RankPlan) {
        let config = config();
        let rows = config.matrices().map(|id| PlannedMatrix {
            matrix: config.named(id),
            shape: config.matrix_shape(id),
            ..row(Some(64))
        });
        let before = Size { params: 200_000, bytes: 400_000 };
        let target = Some(Target { unit: Unit::Params, remove_at_least: 60_000 });
        let plan = RankPlan::new(target, COST, 1, before, None, rows.collect()).unwrap();
        (config, plan)
    }

    #[test]
    fn a_plan_that_lies_is_refused_by_what_it_lies_about() {
        let (config, good) = small();
        assert_eq!(good.validate(&config, good.before), Ok(()));
        type Lie = fn(&mut RankPlan);
        let lies: [(Lie, &str); 12] = [
            (
                |plan| plan.cost.dense_element_bytes = u64::MAX,
                "`dense_element_bytes` is 18446744073709551615",
            ),
            (|plan| plan.cost.factor_element_bytes = 0, "`factor_element_bytes` is 0"),
            // Twice the size of the whole checkpoint.
            (
                |plan| plan.cost.dense_element_bytes = 4,
                "the dense matrices are larger than the whole checkpoint",
            ),
            (
                |plan| plan.matrices[1].element_bytes = Some(ElementBytes { dense: 2, factor: 3 }),
                "down: `element_bytes` is 2 dense and 3 factored",
            ),
            (|plan| plan.rank_multiple = 0, "`rank_multiple` is 0"),
            // It has one expert, which shares nothing.
            (
                |plan| {
                    plan.plan_version = PLAN_VERSION;
                    plan.shared_base_layers = vec![0];
                },
                "`shared_base_layers`: 0 is not in its place, or is no layer",
            ),
            (
                |plan| plan.shared_base_layers = vec![7],
                "`plan_version` is 1, this program knows 3 of a plan with",
            ),
            (|plan| plan.rank_min = 0, "`rank_min` is 0"),
            (
                |plan| plan.matrices[1].relative_error = Some(-0.5),
                "layers.0.experts.0.down: `relative_error` is -0.5",
            ),
            (|plan| plan.matrices[1].relative_error = Some(1e300), "down: `relative_error`"),
            (
                |plan| plan.target = Some(Target { unit: Unit::Params, remove_at_least: u64::MAX }),
                "at least 18446744073709551615 parameters were to go, and its rows remove 61440",
            ),
            (
                |plan| plan.target = Some(Target { unit: Unit::Bytes, remove_at_least: 122_881 }),
                "at least 122881 bytes were to go, and its rows remove 122880",
            ),
        ];
        for (lie, part) in lies {
            let mut plan = good.clone();
            lie(&mut plan);
            let error = plan.validate(&config, good.before).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn rows_of_older_plans_have_names_alone_and_rows_of_other_models_are_refused() {
        let (config, good) = small();
        let mut old = serde_json::to_value(&good).unwrap();
        for row in old["matrices"].as_array_mut().unwrap() {
            let row = row.as_object_mut().unwrap();
            for key in ["layer", "expert", "projection"] {
                row.remove(key).unwrap();
            }
        }
        assert_eq!(RankPlan::from_json(old.to_string().as_bytes()).unwrap(), good);
        let mut other = good.clone();
        other.matrices[1].matrix.name = "model.layers.0.mlp.experts.0.down_proj".into();
        let error = other.validate(&config, other.before).unwrap_err().to_string();
        assert!(error.contains("model.layers.0.mlp.experts.0.down_proj is not an expert matrix"), "{error}");
    }

    #[test]
    fn a_plan_of_a_million_patterns_is_refused() {
        let (_, plan) = small();
        let mut json = serde_json::to_value(plan).unwrap();
        json["keep_dense"] = vec![""; 1_000_000].into();
        let error = RankPlan::from_json(json.to_string().as_bytes()).unwrap_err();
        assert!(error.to_string().contains("more than 65536 patterns"), "{error}");
    }
}
