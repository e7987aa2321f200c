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
//! | plan | one | sensitivities, the plan |
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
use lowrank_forward::Forward;
use lowrank_model::recipe::PropagationScope;
use lowrank_model::{MatrixId, Progress, Projection, RankPlan, Recipe};
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

impl fmt::Display for UnitStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hash => f.write_str("hash"),
            Self::States => f.write_str("states"),
            Self::Moments => f.write_str("moments"),
            Self::Halves => f.write_str("halves"),
            Self::Divergences => f.write_str("divergences"),
            Self::Plan => f.write_str("plan"),
            Self::Factors { layer } => write!(f, "factors-{layer}"),
            Self::Through { layer } => write!(f, "through-{layer}"),
        }
    }
}

impl FromStr for UnitStage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let single = [Self::Hash, Self::States, Self::Moments, Self::Halves, Self::Divergences, Self::Plan];
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
fn moe_layers(checkpoint: &Checkpoint) -> Vec<usize> {
    let config = checkpoint.config();
    (0..config.num_hidden_layers).filter(|&layer| config.experts_in(layer) > 0).collect()
}

fn expert_groups(checkpoint: &Checkpoint) -> usize {
    checkpoint.config().num_local_experts.min(EXPERT_GROUPS)
}

/// The experts of a group.
fn experts_of(checkpoint: &Checkpoint, group: usize) -> Vec<usize> {
    let (experts, groups) = (checkpoint.config().num_local_experts, expert_groups(checkpoint));
    (experts * group / groups..experts * (group + 1) / groups).collect()
}

/// Parts of the text, and of the windows that sensitivities are measured with.
fn parts(checkpoint: &Checkpoint, text: &CalibrationText) -> [usize; 2] {
    let hidden_size = checkpoint.config().hidden_size;
    [text.parts(), text.parts_of_sample(hidden_size)]
}

/// The stages of a job in their order, each with the number of its units. Without a calibration text there is none: such a job is
/// small.
pub fn stages(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Vec<(UnitStage, usize)>, PipelineError> {
    let Some(text) = CalibrationText::read(checkpoint, recipe)? else { return Ok(Vec::new()) };
    let (layers, groups) = (moe_layers(checkpoint), expert_groups(checkpoint));
    let [of_text, of_sample] = parts(checkpoint, &text);
    let mut stages =
        vec![(UnitStage::Hash, checkpoint.shards().len()), (UnitStage::States, of_text + of_sample)];
    stages.push((UnitStage::Moments, layers.len() * groups));
    if recipe.goal.is_budget() && is_measured(recipe) {
        stages.extend([(UnitStage::Halves, layers.len()), (UnitStage::Divergences, of_sample)]);
    }
    stages.push((UnitStage::Plan, 1));
    for (at, &layer) in layers.iter().enumerate() {
        stages.push((UnitStage::Factors { layer }, groups));
        if recipe.propagation.propagate == PropagationScope::Layers && at + 1 < layers.len() {
            stages.push((UnitStage::Through { layer }, of_text));
        }
    }
    Ok(stages)
}

fn is_measured(recipe: &Recipe) -> bool {
    recipe.sensitivity() == lowrank_model::plan::Sensitivity::Measured
}

/// Does some units of a stage, one after another, and tells which is done. Returns the plan, if that is what was made.
pub fn run(
    checkpoint: &Checkpoint,
    request: Request<'_>,
    (stage, units): (UnitStage, &[usize]),
    progress: &dyn Progress,
    done: &mut dyn FnMut(usize) -> Result<(), PipelineError>,
) -> Result<Option<RankPlan>, PipelineError> {
    planning::refuse_early(checkpoint, request.recipe, progress)?;
    let Request { recipe, resources, interrupt, .. } = request;
    let shards = SharedHashes::new(checkpoint, &resources.cache()?);
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
    let algebra = resources.algebra()?;
    let dtype = workers::widest(checkpoint, recipe.factor.dtype);
    let pool = &workers::pool(&Demand::compress(checkpoint.config(), dtype, recipe), resources)?;
    let context = JobContext { resources, pool, progress, interrupt };
    let text = CalibrationText::read(checkpoint, recipe)?.ok_or(PipelineError::NothingToMeasureOn)?;
    let resolved = Subject::of(checkpoint).resolve(recipe);
    let job = described(checkpoint, &resolved, Some(&text), resources, &algebra);
    let [of_text, _] = parts(checkpoint, &text);
    let inputs = InputHashes::known(shards.all(checkpoint)?, progress);
    let structures = resolved.measured_structures();
    let pieces = Pieces::new(checkpoint, &inputs, Some(text), structures, algebra, context)?
        .ok_or(PipelineError::NothingToMeasureOn)?;
    let (layers, groups) = (moe_layers(checkpoint), expert_groups(checkpoint));
    match stage {
        UnitStage::States => {
            each(&mut |unit| match unit.checked_sub(of_text) {
                None => pieces.run_text(unit, context),
                Some(part) => pieces.run_sample(part, context),
            })?;
            return Ok(None);
        }
        UnitStage::Moments => {
            each(&mut |unit| {
                pieces.moments(layers[unit / groups], &experts_of(checkpoint, unit % groups), context)
            })?;
            return Ok(None);
        }
        _ => {}
    }
    let calibration = pieces.measured()?;
    match stage {
        UnitStage::Halves => {
            each(&mut |unit| calibration.piece_of_sensitivities(|apart| apart.layer(layers[unit]), context))?;
            return Ok(None);
        }
        UnitStage::Divergences => {
            each(&mut |unit| calibration.piece_of_sensitivities(|apart| apart.part(unit), context))?;
            return Ok(None);
        }
        UnitStage::Plan if resolved.goal.is_budget() && is_measured(&resolved) => {
            calibration.put_sensitivities_together(context)?;
        }
        _ => {}
    }
    let state = RunState { staging: None, scratch: None, interrupt };
    let planned = planning::plan_through(checkpoint, &calibration, &resolved, context, state)?;
    let request = Request { recipe: &resolved, ..request };
    let factors = Factors { checkpoint, calibration: &calibration, planned: &planned, request, job: &job };
    each(&mut |unit| match stage {
        UnitStage::Factors { layer } => factors.make(layer, &experts_of(checkpoint, unit), context),
        UnitStage::Through { layer } => factors.through(layer, unit, context),
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
            PropagationScope::Layers if layer != moe_layers(self.checkpoint)[0] => {
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

    /// Runs a part of the text from a layer's MoE block to the next one's, in the compressed model.
    fn through(&self, layer: usize, part: usize, context: JobContext<'_>) -> Result<(), PipelineError> {
        let layers = moe_layers(self.checkpoint);
        let Some(&next) = layers.iter().find(|&&other| other > layer) else { return Ok(()) };
        let states = self.calibration.compressed_states(self.job)?;
        if states.has(next, part) {
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
            true => self.calibration.states_of_text()?.of_part(layer, part)?,
            false => states.of_part(layer, part)?,
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
            Ok::<_, PipelineError>(states.put(next, part, &hidden)?)
        })
    }
}
