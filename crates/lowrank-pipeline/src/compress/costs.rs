//! What the units of a job cost, by count: operations at the rate of one core, and bytes from and to the disk.
//!
//! `COLLECT`, `ORDER`, `SPECTRUM`, `FACTORS` and `FIT` are stages' times in the benchmark of a calibrated job (docs/benchmarks.md)
//! divided by the operations that their formulas count, so a count at those dimensions gives those times. Elsewhere it is an
//! extrapolation. Symbols: N tokens, k experts of a token, H hidden size, F intermediate size, n and m the short and the long
//! side of an expert matrix.

use super::units::{self, Shape, UnitStage};
use crate::memory::Demand;
use lowrank_model::recipe::CalibrationSettings;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{Dtype, ModelConfig, Recipe};

/// Operations per second of one core of the benchmark's machine: its peak in f32 products.
pub const OPERATIONS_PER_SECOND: f64 = 105e9;
/// Bytes per second of one node from and to the shared disk, where nobody says otherwise: a modest one.
pub const BYTES_PER_SECOND: f64 = 1e9;
/// Bytes that one core hashes, or copies and hashes, in a second.
const HASHED_BYTES_PER_SECOND: f64 = 1.2e9;
/// Operations in f32 products take so many times the peak's time in a pass that sums moments.
const COLLECT: f64 = 1.1;
/// Order of channels, widths' errors: times F³, per expert.
const ORDER: f64 = 3.6;
/// A spectrum in a calibrated norm, and factors of half its size: times n² m.
const SPECTRUM: f64 = 16.2;
/// Factors fitted in a metric: times n² m.
const FACTORS: f64 = 19.0;
/// What factors of an expert are fitted to: times the operations of its forward pass, per routed token.
const FIT: f64 = 2.9;
/// Up to this short side eigenproblems are solved in f64, at half the rate.
const SHORT_SIDE_F64: usize = 1024;
/// Seconds of a plan for each matrix.
const PLAN_SECONDS: f64 = 7e-5;
/// Seconds until a task works: Slurm starts it, it hashes its own program, reads headers and the text.
pub const START_SECONDS: f64 = 2.0;

/// What a unit costs, and what a task costs beside its units.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct UnitCost {
    /// Seconds of one core.
    pub core_seconds: f64,
    /// Bytes from the disk.
    pub read_bytes: f64,
    /// Bytes to the disk.
    pub written_bytes: f64,
    /// Seconds of one core, once for all units of a task.
    pub task_core_seconds: f64,
    /// Bytes from the disk, once for all units of a task.
    pub task_read_bytes: f64,
}

/// What a cluster is, as far as the count goes.
#[derive(Debug, Clone, Copy)]
pub struct Machines {
    /// Nodes.
    pub nodes: usize,
    /// Cores that a task has.
    pub cores: usize,
    /// Bytes per second that one node reads or writes.
    pub bytes_per_second: f64,
}

/// A job, as costs are counted from it.
#[derive(Debug, Clone)]
pub struct Costs<'a> {
    config: &'a ModelConfig,
    recipe: &'a Recipe,
    shape: Shape,
    /// Bytes of a stored weight.
    weight_bytes: f64,
    /// Of the model on disk.
    model_bytes: f64,
    settings: CalibrationSettings,
}

impl<'a> Costs<'a> {
    /// Of a recipe with a calibration text that fills its windows, for a model in files of 5 GB whose weights take so many
    /// bytes each; `None` without a text.
    pub fn new(config: &'a ModelConfig, recipe: &'a Recipe, weight_bytes: f64) -> Option<Self> {
        let settings = recipe.calibration()?.clone();
        let window = settings.window(config.hidden_size, config.max_position_embeddings);
        let sampled = CalibrationSettings::sensitivity_window(window);
        let tokens = settings.sensitivity_tokens(config.hidden_size).min(settings.calibration_tokens);
        let params: u64 = config.tensors().iter().map(TensorSpec::elements).sum();
        let model_bytes = params as f64 * weight_bytes;
        let shards = (model_bytes / 5e9).ceil() as usize;
        let windows = [settings.calibration_tokens.div_ceil(window), tokens.div_ceil(sampled)];
        let shape = units::Shape::new(config, shards, windows);
        Some(Self { config, recipe, shape, weight_bytes, model_bytes, settings })
    }

    /// The same for a checkpoint, whose shards and text are known.
    pub fn with_shape(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// The stages of a job in their order, and what writes its output (`publish`), on so many nodes.
    pub fn stages(&self, nodes: usize) -> Vec<StageCost> {
        let stages = self.shape.stages(self.recipe).into_iter().map(|(stage, units)| {
            let tasks = units::tasks(units, nodes, stage.tasks_per_node());
            StageCost { name: stage.to_string(), units, tasks, unit: self.unit(stage) }
        });
        let publish = StageCost { name: units::PUBLISH.into(), units: 1, tasks: 1, unit: self.publish() };
        stages.chain([publish]).collect()
    }

    /// N
    fn tokens(&self) -> f64 {
        self.settings.calibration_tokens as f64
    }

    /// Tokens that sensitivities are measured with.
    fn sampled(&self) -> f64 {
        let tokens = self.settings.sensitivity_tokens(self.config.hidden_size);
        tokens.min(self.settings.calibration_tokens) as f64
    }

    fn sides(&self) -> [f64; 2] {
        [self.config.hidden_size, self.config.intermediate_size].map(|side| side as f64)
    }

    fn layers(&self) -> f64 {
        self.config.num_hidden_layers as f64
    }

    /// n² m of one matrix, in operations of the precision that it is decomposed in.
    fn decomposition(&self) -> f64 {
        let [h, f] = self.sides();
        let slower = if h.min(f) <= SHORT_SIDE_F64 as f64 { 2.0 } else { 1.0 };
        slower * h.min(f).powi(2) * h.max(f)
    }

    /// Operations of an expert's forward pass, per token.
    fn expert(&self) -> f64 {
        let [h, f] = self.sides();
        6.0 * h * f
    }

    /// Operations of the experts of a token.
    fn experts_of_token(&self) -> f64 {
        self.config.num_experts_per_tok as f64 * self.expert()
    }

    fn attention_weights(&self) -> f64 {
        let parts = self.config.block.attention.parts().iter();
        parts.map(|&part| self.config.attention_shape(part).iter().product::<usize>() as f64).sum()
    }

    /// Operations of a token's way through a layer: attention without its scores, experts, shared experts.
    fn layer(&self) -> f64 {
        let shared = self.config.block.shared_experts.width() as f64;
        2.0 * self.attention_weights() + self.experts_of_token() + 6.0 * self.sides()[0] * shared
    }

    fn matrices_of_layer(&self) -> f64 {
        3.0 * self.shape.experts as f64
    }

    /// Bytes of a layer's expert matrices on disk.
    fn experts_bytes(&self) -> f64 {
        let [h, f] = self.sides();
        self.matrices_of_layer() * h * f * self.weight_bytes
    }

    /// Bytes of hidden states of so many tokens.
    fn states(&self, tokens: f64) -> f64 {
        4.0 * tokens * self.sides()[0]
    }

    /// Bytes of the second moments of an expert in the cache: the lower triangles of two of [H, H].
    fn moments(&self) -> f64 {
        4.0 * self.sides()[0].powi(2)
    }

    /// Everything that the folder holds in the end, beside the output.
    pub fn folder_bytes(&self) -> f64 {
        let stages = self.shape.stages(self.recipe).into_iter();
        stages.map(|(stage, units)| units as f64 * self.unit(stage).written_bytes).sum()
    }

    /// One unit of a stage, on average.
    fn unit(&self, stage: UnitStage) -> UnitCost {
        let shape = &self.shape;
        let groups = units::groups_of(shape.experts) as f64;
        match stage {
            UnitStage::Hash => {
                let read_bytes = self.model_bytes / shape.shards as f64;
                UnitCost {
                    core_seconds: read_bytes / HASHED_BYTES_PER_SECOND,
                    read_bytes,
                    ..UnitCost::default()
                }
            }
            UnitStage::States => {
                let tokens = self.tokens_and_sampled() / (shape.parts_of_text + shape.parts_of_sample) as f64;
                UnitCost {
                    core_seconds: seconds_of(tokens * self.layers() * self.layer()),
                    written_bytes: self.states(tokens) * self.moe_layers(),
                    task_read_bytes: self.model_bytes,
                    ..UnitCost::default()
                }
            }
            UnitStage::Moments => {
                let ([h, f], experts) = (self.sides(), shape.experts as f64 / groups);
                let (activations, order) = match self.recipe.measured_structures().need_activations() {
                    true => (f * f, experts * ORDER * f.powi(3)),
                    false => (0.0, 0.0),
                };
                let routed = self.tokens() * self.config.num_experts_per_tok as f64 / groups;
                UnitCost {
                    core_seconds: seconds_of(
                        COLLECT * routed * (self.expert() + activations + h * h) + order,
                    ),
                    read_bytes: self.states(self.tokens()) + self.experts_bytes() / groups,
                    written_bytes: experts * self.moments(),
                    ..UnitCost::default()
                }
            }
            UnitStage::Halves => {
                let spectra = self.matrices_of_layer() * SPECTRUM * self.decomposition();
                UnitCost {
                    core_seconds: seconds_of(
                        spectra + self.sampled() * self.halves() * self.experts_of_token(),
                    ),
                    read_bytes: self.experts_bytes() + shape.experts as f64 * self.moments(),
                    written_bytes: self.states(self.sampled()) * self.halves(),
                    ..UnitCost::default()
                }
            }
            UnitStage::Divergences => {
                // A halved layer changes what comes after it alone.
                let passes = 1.0 + self.halves() * self.moe_layers() / 2.0;
                let tokens = self.sampled() / shape.parts_of_sample as f64;
                UnitCost {
                    core_seconds: seconds_of(tokens * passes * self.layers() * self.layer()),
                    read_bytes: self.model_bytes,
                    ..UnitCost::default()
                }
            }
            UnitStage::Errors | UnitStage::Plan => self.planning(),
            UnitStage::Factors { .. } => {
                let fits = FACTORS * self.matrices_of_layer() * self.decomposition();
                let inputs = FIT * self.tokens() * self.experts_of_token();
                let experts = self.experts_bytes() / groups;
                UnitCost {
                    core_seconds: seconds_of((fits + inputs) / groups),
                    read_bytes: experts + 2.0 * self.states(self.tokens()),
                    written_bytes: self.as_factors(experts),
                    ..self.planning()
                }
            }
            UnitStage::Through { .. } => {
                let tokens = self.tokens() / shape.parts_of_text as f64;
                let states = self.states(tokens);
                let planning = self.planning();
                UnitCost {
                    core_seconds: seconds_of(tokens * self.layer()),
                    read_bytes: states,
                    written_bytes: states,
                    task_read_bytes: planning.task_read_bytes + self.as_factors(self.experts_bytes()),
                    ..planning
                }
            }
        }
    }

    fn tokens_and_sampled(&self) -> f64 {
        self.tokens() + self.sampled()
    }

    fn moe_layers(&self) -> f64 {
        self.shape.layers.len() as f64
    }

    /// Groups of matrices of a layer that are halved to measure sensitivities.
    fn halves(&self) -> f64 {
        if self.recipe.measured_structures().has_widths() { 4.0 } else { 3.0 }
    }

    /// Of every task that plans from the cache: that of the plan, and each behind it.
    fn planning(&self) -> UnitCost {
        UnitCost {
            task_core_seconds: self.matrices_of_layer() * self.moe_layers() * PLAN_SECONDS,
            task_read_bytes: self.spectra(),
            ..UnitCost::default()
        }
    }

    /// Bytes of stored weights in the dtype of factors, which is never fp8, if none of them goes.
    fn as_factors(&self, stored_bytes: f64) -> f64 {
        let bytes = self.recipe.factor.dtype.map_or(self.weight_bytes, |dtype| dtype.size_bytes() as f64);
        bytes.max(2.0) / self.weight_bytes * stored_bytes
    }

    /// Bytes of all singular values.
    fn spectra(&self) -> f64 {
        let [h, f] = self.sides();
        8.0 * self.matrices_of_layer() * self.moe_layers() * h.min(f)
    }

    /// The last stage: everything is read once more, hashed, and written.
    fn publish(&self) -> UnitCost {
        let bytes = self.model_bytes;
        UnitCost {
            core_seconds: 2.0 * bytes / HASHED_BYTES_PER_SECOND,
            read_bytes: bytes,
            written_bytes: bytes,
            ..self.planning()
        }
    }

    /// Memory of a task with one worker, and of each further one.
    pub fn memory_bytes(&self, dtype: Dtype) -> [u64; 2] {
        let demand = Demand::compress(self.config, dtype, self.recipe);
        let [one, two] = [1, 2].map(|workers| demand.peak(workers).bytes(workers));
        [one, two.saturating_sub(one)]
    }
}

/// Of one core.
fn seconds_of(operations: f64) -> f64 {
    operations / OPERATIONS_PER_SECOND
}

/// A stage: units, the tasks that they are shared out to, and what one costs.
#[derive(Debug, Clone)]
pub struct StageCost {
    /// As `cluster` names it.
    pub name: String,
    /// Units.
    pub units: usize,
    /// Tasks.
    pub tasks: usize,
    /// Of one unit.
    pub unit: UnitCost,
}

impl StageCost {
    /// Seconds of one core.
    pub fn core_seconds(&self) -> f64 {
        self.tasks as f64 * self.unit.task_core_seconds + self.units as f64 * self.unit.core_seconds
    }

    /// Bytes from the disk.
    pub fn read_bytes(&self) -> f64 {
        self.tasks as f64 * self.unit.task_read_bytes + self.units as f64 * self.unit.read_bytes
    }

    /// Bytes to the disk.
    pub fn written_bytes(&self) -> f64 {
        self.units as f64 * self.unit.written_bytes
    }

    /// Wall seconds: its tasks go to the nodes in rounds, and each does its units one after another on all its cores.
    pub fn wall_seconds(&self, machines: Machines) -> f64 {
        let (rounds, units) = (self.tasks.div_ceil(machines.nodes), self.units.div_ceil(self.tasks));
        let (rounds, units, unit) = (rounds as f64, units as f64, &self.unit);
        let computed = unit.task_core_seconds + units * unit.core_seconds;
        let moved = unit.task_read_bytes + units * (unit.read_bytes + unit.written_bytes);
        let working = (computed / machines.cores as f64).max(moved / machines.bytes_per_second);
        rounds * (START_SECONDS + working)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::recipe::{Goal, Removal};
    use serde_json::json;

    fn mixtral() -> ModelConfig {
        ModelConfig::from_hf_json(&json!({
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 32000, "max_position_embeddings": 32768,
        }))
        .unwrap()
    }

    /// The hours in docs/benchmarks.md are those of the whole pass over the text, so the states count to the moments.
    #[test]
    fn at_the_benchmarks_dimensions_the_hours_are_those_of_the_benchmark() {
        let (config, recipe) = (mixtral(), Recipe::new(Goal::Budget(Removal::Params(10_000_000_000))));
        let costs = Costs::new(&config, &recipe, 2.0).unwrap();
        let hours = |kind: &str| -> f64 {
            let stages = costs.stages(1).into_iter().filter(|stage| stage.name.starts_with(kind));
            stages.map(|stage| stage.units as f64 * stage.unit.core_seconds / 3600.0).sum()
        };
        let near = |counted: f64, measured: f64| (counted / measured - 1.0).abs() < 0.1;
        let calibrate = hours("moments");
        assert!(near(calibrate, 14.3), "{calibrate}");
        let spectra = hours("halves");
        assert!(near(spectra, 8.0), "{spectra}");
        let factors = hours("factors");
        assert!(near(factors, 20.6), "{factors}");
    }

    #[test]
    fn more_nodes_never_take_longer_and_never_less_than_the_longest_unit() {
        let unit = UnitCost { core_seconds: 100.0, read_bytes: 1e9, ..UnitCost::default() };
        let on = |nodes| {
            let tasks = units::tasks(24, nodes, units::TASKS_PER_NODE);
            let stage = StageCost { name: "one".into(), units: 24, tasks, unit };
            stage.wall_seconds(Machines { nodes, cores: 1, bytes_per_second: 1e9 })
        };
        let walls: Vec<f64> = [1, 2, 4, 8, 16, 32, 256].map(on).to_vec();
        assert!(walls.is_sorted_by(|a, b| a >= b), "{walls:?}");
        assert_eq!(on(1), 4.0 * (START_SECONDS + 600.0));
        assert_eq!(on(256), START_SECONDS + 100.0);
    }
}
