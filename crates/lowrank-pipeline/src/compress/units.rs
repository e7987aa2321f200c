//! A compression in units, for machines that share a folder. Each unit leaves its numbers in the cache, where later units find
//! them; the last one is an ordinary run, which finds everything. So the bytes are those of an ordinary run, on however many
//! machines.
//!
//! | Stage | Units | Leaves |
//! |---|---|---|
//! | hash | a shard each | its content |
//! | states | a part of the calibration text each | hidden states before every MoE block; of the windows for sensitivities, too |
//! | moments | some experts of a layer each | second moments, orders of channels, errors of widths |
//! | halves | a layer each | spectra, and its outputs with one projection halved |
//! | divergences | a part of those windows each | what each half does to the logits |
//! | errors | one | sensitivities, errors of every rank and width |
//! | plan | one | the plan |
//! | factors-N | some experts of layer N each | their matrices, fitted to the states before it |
//! | through-N | a part of the text each | states of the compressed model behind layer N |
//!
//! Units of one stage do not depend on each other, and each stage on those before it alone. A unit that is done ends at once.

use super::described;
use super::kept_factors::KeptFactors;
use super::request::Request;
use super::tensors::Work;
use crate::base::InputHashes;
use crate::calibration::pieces::Pieces;
use crate::memory::Demand;
use crate::planning::{self, Planned, Subject};
use crate::propagate::Propagation;
use crate::shared_hashes::SharedHashes;
use crate::spectra::RunState;
use crate::workers::{self, Resources};
use crate::{CalibrationContext, CalibrationText, JobContext, PipelineError};
use lowrank_calibrate::CalibrateError;
use lowrank_calibrate::states::parts_of;
use lowrank_forward::Forward;
use lowrank_model::recipe::PropagationScope;
use lowrank_model::{MatrixId, ModelConfig, Progress, Projection, RankPlan, Recipe};
use lowrank_reader::Checkpoint;
use serde_json::Value;
use std::fmt;
use std::str::FromStr;

/// Units that the experts of a layer are cut into at most.
const EXPERT_GROUPS: usize = 8;

/// Work that can be done at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitStage {
    /// Of the shards.
    Hash,
    /// Of the texts.
    States,
    /// Of the experts.
    Moments,
    /// Of the layers.
    Halves,
    /// Of the windows that sensitivities are measured with.
    Divergences,
    /// Everything that ranks and widths are chosen from.
    Errors,
    /// The choice.
    Plan,
    /// Of a layer's experts.
    Factors {
        /// Which layer.
        layer: usize,
    },
    /// Of the texts, from a layer's MoE block to the next one's.
    Through {
        /// Which layer.
        layer: usize,
    },
}

/// What comes after all units: an ordinary run, which finds everything in the cache and writes the output.
pub const PUBLISH: &str = "publish";
/// Tasks of a stage for each node, so that one that is slow holds up little.
pub const TASKS_PER_NODE: usize = 4;

/// Tasks that so many units are shared out to.
pub fn tasks(units: usize, nodes: usize, tasks_per_node: usize) -> usize {
    units.min(nodes.saturating_mul(tasks_per_node)).max(1)
}

impl UnitStage {
    /// Tasks for each node: one where a task reads the same weights for all its units, else several.
    pub fn tasks_per_node(self) -> usize {
        match self {
            Self::States | Self::Through { .. } => 1,
            _ => TASKS_PER_NODE,
        }
    }
}

impl fmt::Display for UnitStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hash => f.write_str("hash"),
            Self::States => f.write_str("states"),
            Self::Moments => f.write_str("moments"),
            Self::Halves => f.write_str("halves"),
            Self::Divergences => f.write_str("divergences"),
            Self::Errors => f.write_str("errors"),
            Self::Plan => f.write_str("plan"),
            Self::Factors { layer } => write!(f, "factors-{layer}"),
            Self::Through { layer } => write!(f, "through-{layer}"),
        }
    }
}

impl FromStr for UnitStage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let single = [
            Self::Hash,
            Self::States,
            Self::Moments,
            Self::Halves,
            Self::Divergences,
            Self::Errors,
            Self::Plan,
        ];
        if let Some(stage) = single.into_iter().find(|stage| stage.to_string() == text) {
            return Ok(stage);
        }
        let layer = |prefix: &str| text.strip_prefix(prefix)?.parse().ok();
        match (layer("factors-"), layer("through-")) {
            (Some(layer), _) => Ok(Self::Factors { layer }),
            (_, Some(layer)) => Ok(Self::Through { layer }),
            _ => Err(format!("`{text}` is no stage")),
        }
    }
}

/// The layers with experts.
fn moe_layers(config: &ModelConfig) -> Vec<usize> {
    (0..config.num_hidden_layers).filter(|&layer| config.experts_in(layer) > 0).collect()
}

/// Groups that so many experts are cut into.
pub(super) fn groups_of(experts: usize) -> usize {
    experts.min(EXPERT_GROUPS)
}

/// The experts of a group of a layer.
fn experts_of(config: &ModelConfig, layer: usize, group: usize) -> Vec<usize> {
    let experts: Vec<usize> = config.compressed_experts(layer).collect();
    let (all, groups) = (experts.len(), groups_of(experts.len()));
    experts[all * group / groups..all * (group + 1) / groups].to_vec()
}

/// Parts of the text, and of the windows that sensitivities are measured with.
fn parts(checkpoint: &Checkpoint, text: &CalibrationText) -> [usize; 2] {
    let hidden_size = checkpoint.config().hidden_size;
    [text.parts(), text.parts_of_sample(hidden_size)]
}

/// A stage, and how many units it has.
pub type StageUnits = (UnitStage, usize);

/// What decides how many units the stages of a job have; `None` without a calibration text.
pub fn shape(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Option<Shape>, PipelineError> {
    Ok(CalibrationText::read(checkpoint, recipe)?.map(|text| Shape::of(checkpoint, &text)))
}

/// What decides how many units stages have.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Files of the checkpoint.
    pub shards: usize,
    /// Layers with experts.
    pub layers: Vec<usize>,
    /// Experts of a layer that are compressed.
    pub experts: usize,
    /// Parts of the calibration text.
    pub parts_of_text: usize,
    /// Parts of the windows that sensitivities are measured with.
    pub parts_of_sample: usize,
}

impl Shape {
    /// Of a model in so many files, and so many windows of the text and of those that sensitivities are measured with.
    pub(super) fn new(config: &ModelConfig, shards: usize, windows: [usize; 2]) -> Self {
        let [parts_of_text, parts_of_sample] = windows.map(parts_of);
        let (layers, experts) = (moe_layers(config), config.compressed_experts_per_layer());
        Self { shards, layers, experts, parts_of_text, parts_of_sample }
    }

    fn of(checkpoint: &Checkpoint, text: &CalibrationText) -> Self {
        let [parts_of_text, parts_of_sample] = parts(checkpoint, text);
        let shards = checkpoint.shards().len();
        Self { parts_of_text, parts_of_sample, ..Self::new(checkpoint.config(), shards, [1, 1]) }
    }

    /// The stages of a job in their order.
    pub fn stages(&self, recipe: &Recipe) -> Vec<StageUnits> {
        let mut stages = self.stages_of_measuring(recipe);
        stages.push((UnitStage::Plan, 1));
        for (at, &layer) in self.layers.iter().enumerate() {
            stages.push((UnitStage::Factors { layer }, groups_of(self.experts)));
            if recipe.propagation.propagate == PropagationScope::Layers && at + 1 < self.layers.len() {
                stages.push((UnitStage::Through { layer }, self.parts_of_text));
            }
        }
        stages
    }

    /// Those that measure what plans are made from: all before the plan.
    pub fn stages_of_measuring(&self, recipe: &Recipe) -> Vec<StageUnits> {
        let mut stages = vec![
            (UnitStage::Hash, self.shards),
            (UnitStage::States, self.parts_of_text + self.parts_of_sample),
            (UnitStage::Moments, self.layers.len() * groups_of(self.experts)),
        ];
        if recipe.goal.is_budget() {
            if is_measured(recipe) {
                stages.push((UnitStage::Halves, self.layers.len()));
                stages.push((UnitStage::Divergences, self.parts_of_sample));
            }
            stages.push((UnitStage::Errors, 1));
        }
        stages
    }
}

fn is_measured(recipe: &Recipe) -> bool {
    recipe.sensitivity() == lowrank_model::plan::Sensitivity::Measured
}

/// Does some units of a stage, one after another or, where they read the same weights, together; tells which is done. Returns the plan, if that is what was made.
pub fn run<E: From<PipelineError>>(
    checkpoint: &Checkpoint,
    request: Request<'_>,
    (stage, units): (UnitStage, &[usize]),
    progress: &dyn Progress,
    done: &mut dyn FnMut(usize) -> Result<(), E>,
) -> Result<Option<RankPlan>, E> {
    planning::refuse_early(checkpoint, request.recipe, progress)?;
    let Request { recipe, resources, interrupt, .. } = request;
    let cache = resources.cache().map_err(PipelineError::from)?;
    let shards = SharedHashes::new(checkpoint, &cache);
    let mut each = |act: &mut dyn FnMut(usize) -> Result<(), PipelineError>| {
        units.iter().try_for_each(|&unit| {
            interrupt.check()?;
            act(unit)?;
            done(unit)
        })
    };
    if stage == UnitStage::Hash {
        return each(&mut |unit| shards.put(checkpoint, unit)).map(|()| None);
    }
    let algebra = resources.algebra().map_err(PipelineError::from)?;
    let dtype = workers::widest(checkpoint, recipe.factor.dtype);
    let pool = &workers::pool(&Demand::compress(checkpoint.config(), dtype, recipe), resources)?;
    let context = JobContext { resources, pool, progress, interrupt };
    let text = CalibrationText::read(checkpoint, recipe)?.ok_or(PipelineError::NothingToMeasureOn)?;
    let resolved = Subject::of(checkpoint).resolve(recipe);
    let job = described(checkpoint, &resolved, Some(&text), resources, &algebra);
    let [parts_of_text, _] = parts(checkpoint, &text);
    let inputs = InputHashes::known(shards.all(checkpoint)?, progress);
    let structures = resolved.measured_structures();
    let pieces = Pieces::new(checkpoint, &inputs, Some(text), structures, algebra, context)?
        .ok_or(PipelineError::NothingToMeasureOn)?;
    let config = checkpoint.config();
    let (layers, groups) = (moe_layers(config), groups_of(config.compressed_experts_per_layer()));
    match stage {
        UnitStage::States => {
            let (of_text, of_sample): (Vec<usize>, Vec<usize>) =
                units.iter().partition(|&&unit| unit < parts_of_text);
            let of_sample: Vec<usize> = of_sample.into_iter().map(|unit| unit - parts_of_text).collect();
            pieces.run_text(&of_text, context)?;
            pieces.run_sample(&of_sample, context)?;
            return each(&mut |_| Ok(())).map(|()| None);
        }
        UnitStage::Moments => {
            each(&mut |unit| {
                let layer = layers[unit / groups];
                pieces.moments(layer, &experts_of(config, layer, unit % groups), context)
            })?;
            return Ok(None);
        }
        _ => {}
    }
    let calibration = pieces.measured()?;
    let state = RunState { staging: None, scratch: None, interrupt };
    match stage {
        UnitStage::Halves => {
            each(&mut |unit| calibration.piece_of_sensitivities(|apart| apart.layer(layers[unit]), context))?;
            return Ok(None);
        }
        UnitStage::Divergences => {
            each(&mut |unit| calibration.piece_of_sensitivities(|apart| apart.part(unit), context))?;
            return Ok(None);
        }
        UnitStage::Errors => {
            if is_measured(&resolved) {
                calibration.put_sensitivities_together(context)?;
            }
            planning::errors(checkpoint, &calibration, resolved.sensitivity(), context, state)?;
            each(&mut |_| Ok(()))?;
            return Ok(None);
        }
        _ => {}
    }
    let planned = planning::plan_through(checkpoint, &calibration, &resolved, context, state)?;
    let request = Request { recipe: &resolved, ..request };
    let factors = Factors { checkpoint, calibration: &calibration, planned: &planned, request, job: &job };
    if let UnitStage::Through { layer } = stage {
        factors.through(layer, units, context)?;
    }
    each(&mut |unit| match stage {
        UnitStage::Factors { layer } => factors.make(layer, &experts_of(config, layer, unit), context),
        _ => Ok(()),
    })?;
    Ok((stage == UnitStage::Plan).then_some(planned.plan))
}

/// Refuses shards that are not those that the units worked on.
pub fn check_shards(checkpoint: &Checkpoint, resources: &Resources) -> Result<(), PipelineError> {
    SharedHashes::new(checkpoint, &resources.cache()?).all(checkpoint).map(drop)
}

/// What makes matrices of a planned job.
struct Factors<'a> {
    checkpoint: &'a Checkpoint,
    calibration: &'a CalibrationContext<'a>,
    planned: &'a Planned,
    request: Request<'a>,
    job: &'a Value,
}

impl Factors<'_> {
    fn work(&self) -> Work<'_> {
        Work::new(self.checkpoint, self.planned, None, self.calibration, (self.request, self.job))
    }

    /// With a propagation that takes matrices to the cache and finds them there.
    fn with_propagation<R>(
        &self,
        (work, kept): (&Work<'_>, &KeptFactors),
        act: impl FnOnce(&Propagation<'_>) -> Result<R, PipelineError>,
    ) -> Result<R, PipelineError> {
        let propagation = Propagation {
            checkpoint: self.checkpoint,
            algebra: self.calibration.algebra(),
            ranks: &work.ranks,
            kept: &work.kept,
            bases: &|layer| {
                let bases = work.bases();
                bases.of_layer(layer, &|projection| bases.tensor(layer, projection))
            },
            wanted: &|id| !kept.has(id),
            finished: &|id| {
                let shape = work.config.matrix_shape(id);
                Ok(kept.get(work, id)?.map(|(factored, _)| crate::stored::stored(&factored.pieces, shape)))
            },
            make: &|id, matrix, metric, is_alone| work.fit(id, matrix, metric, is_alone),
            take: &|id, factored, is_alone| kept.put(id, &factored, is_alone),
            interrupt: self.request.interrupt,
        };
        act(&propagation)
    }

    /// Makes the matrices of some experts of a layer.
    fn make(&self, layer: usize, experts: &[usize], context: JobContext<'_>) -> Result<(), PipelineError> {
        let work = self.work();
        let Some(calibrated) = work.fitted()? else { return Ok(()) };
        let kept = work.kept_factors()?;
        let is_open = |&expert: &usize| {
            let ids = Projection::ALL.map(|projection| MatrixId { layer, expert, projection });
            ids.into_iter().any(|id| work.is_made(id) && !kept.has(id))
        };
        let experts: Vec<usize> = experts.iter().copied().filter(is_open).collect();
        if experts.is_empty() {
            return Ok(());
        }
        let original = self.calibration.states_of_text()?.of_layer(layer)?;
        let compressed = match calibrated.propagation().propagate {
            PropagationScope::Layers if layer != moe_layers(self.checkpoint.config())[0] => {
                Some(self.calibration.compressed_states(self.job)?.of_layer(layer)?)
            }
            // Before the first of them both models are the same.
            PropagationScope::Layers => Some(original.clone()),
            _ => None,
        };
        let at = (layer, experts.as_slice());
        context.pool.install(|| {
            self.with_propagation((&work, &kept), |all| {
                all.of_experts(calibrated, at, &original, compressed.as_ref())
            })
        })
    }

    /// Runs parts of the text from a layer's MoE block to the next one's, in the compressed model. Together, so that every
    /// factor is read once for all of them.
    fn through(&self, layer: usize, parts: &[usize], context: JobContext<'_>) -> Result<(), PipelineError> {
        let layers = moe_layers(self.checkpoint.config());
        let Some(&next) = layers.iter().find(|&&other| other > layer) else { return Ok(()) };
        let states = self.calibration.compressed_states(self.job)?;
        let open: Vec<usize> = parts.iter().copied().filter(|&part| !states.has(next, part)).collect();
        if open.is_empty() {
            return Ok(());
        }
        let work = self.work();
        let Some(calibrated) = work.fitted()? else { return Ok(()) };
        // One that is not there would be taken for one that is as it was.
        let kept = work.kept_factors()?;
        let of_layer = self.checkpoint.config().matrices().filter(|id| id.layer == layer);
        if let Some(id) = of_layer.filter(|&id| work.is_made(id)).find(|&id| !kept.has(id)) {
            return Err(CalibrateError::NoPiece { name: id.to_string() }.into());
        }
        let mut hidden = match layer == layers[0] {
            true => self.calibration.states_of_text()?.of_parts(layer, &open)?,
            false => states.of_parts(layer, &open)?,
        };
        let forward = Forward::on(self.checkpoint, &*calibrated.engine);
        context.pool.install(|| {
            self.with_propagation((&work, &kept), |all| all.through(calibrated, layer, &mut hidden))?;
            for between in layer + 1..=next {
                forward.attention(between, &mut hidden).map_err(CalibrateError::from)?;
                if between < next {
                    let input = forward.moe_input(between, &hidden).map_err(CalibrateError::from)?;
                    let output = forward.moe(between, &[&input], &mut ()).map_err(CalibrateError::from)?;
                    forward.add(&mut hidden, &output[0]);
                }
            }
            Ok::<_, PipelineError>(states.put(next, &open, &hidden)?)
        })
    }
}
