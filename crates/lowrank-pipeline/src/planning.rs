//! From a wish to a [`RankPlan`]: spectra and allocation for a budget, a check for ranks that were given.

use crate::base::InputHashes;
use crate::compress::say_substituted;
use crate::memory::Demand;
use crate::spectra::{Course, spectra};
use crate::workers::{self, Resources};
use crate::{CalibrationText, FixedRank, Goal, Interrupt, Lens, PipelineError, PlanSettings, base};
use lowrank_calibrate::Sensitivities;
use lowrank_model::params::rank_max_saving;
use lowrank_model::plan::{Allocation, LayerSensitivity, Sensitivity, Size};
use lowrank_model::{
    Budget, CostModel, Dtype, MatrixId, ModelConfig, Progress, Projection, RankPlan, Spectrum,
    SpectrumCurves, Target, Unit,
};
use lowrank_reader::Checkpoint;
use lowrank_svd::allocate::{AllocationRequest, Allocator, Candidate, Choices, check, plan_from_ranks};
use lowrank_writer::report::{BaseModel, CalibrationReport};
use std::collections::BTreeMap;

/// Short sides from here on belong to models whose matrices are multiplied on tensor cores.
const TRUE_SIZE: usize = 1024;
/// What tensor cores like.
const RANK_MULTIPLE_TRUE_SIZE: usize = 8;

/// A plan, and what it was made from.
#[derive(Debug)]
pub struct Planned {
    /// The table.
    pub plan: RankPlan,
    /// Singular values by matrix, in the norm of the lens; empty when the ranks were given.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// What errors were counted on, if on anything.
    pub calibration: Option<CalibrationReport>,
}

/// Makes the plan. Reads every expert matrix once if the goal is a budget and their spectra are not known yet.
pub fn plan(
    checkpoint: &Checkpoint,
    model: &str,
    settings: &PlanSettings,
    resources: &Resources,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Planned, PipelineError> {
    refuse_early(checkpoint, settings)?;
    let algebra = resources.algebra()?;
    let calibration = settings.calibration.as_ref().filter(|_| matches!(settings.goal, Goal::Budget(_)));
    let demand = Demand::plan(checkpoint.config(), workers::widest(checkpoint, None), calibration);
    let pool = workers::pool(&demand, resources)?;
    let course = Course { staging: None, scratch: None, interrupt };
    let text = calibration.map(|calibration| CalibrationText::read(checkpoint, calibration)).transpose()?;
    let base = match settings.goal {
        Goal::Budget(_) => {
            base::identify_remembered(checkpoint, model, &pool, progress, interrupt, resources)?
        }
        // Given ranks are checked without a look at the weights.
        _ => BaseModel::default(),
    };
    let inputs = InputHashes::known(base.files, progress);
    let lens = Lens::new(checkpoint, &inputs, text, algebra, resources, &pool, progress, interrupt)?;
    let planned = plan_through(checkpoint, &lens, settings, &pool, progress, course)?;
    say_substituted(lens.algebra(), progress);
    Ok(planned)
}

/// Refuses what needs no look at the weights: a budget that cannot be met, a pattern that matches nothing, a plan or ranks
/// for another model.
pub fn refuse_early(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<(), PipelineError> {
    refuse_factored(checkpoint)?;
    if settings.calibration.is_none() && settings.sensitivity == Some(Sensitivity::Measured) {
        return Err(PipelineError::NothingToMeasureOn);
    }
    match &settings.goal {
        Goal::Plan(_) | Goal::Ranks(_) => given(checkpoint, settings).map(|_| ()),
        Goal::Budget(budget) => {
            let subject = Subject::of(checkpoint);
            let target = budget.resolve(subject.before.params, subject.before.bytes)?;
            let errors = subject.without_errors();
            subject.with_request(settings, target, &errors, |request| Ok(check(request)?))
        }
    }
}

/// Only what is dense can be compressed.
pub fn refuse_factored(checkpoint: &Checkpoint) -> Result<(), PipelineError> {
    if checkpoint.ranks().is_empty() {
        return Ok(());
    }
    Err(PipelineError::AlreadyFactored(checkpoint.layout()))
}

/// As [`plan`], with a lens at hand.
pub fn plan_through(
    checkpoint: &Checkpoint,
    lens: &Lens<'_>,
    settings: &PlanSettings,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    course: Course<'_>,
) -> Result<Planned, PipelineError> {
    match &settings.goal {
        Goal::Plan(_) | Goal::Ranks(_) => {
            Ok(Planned { plan: given(checkpoint, settings)?, spectra: BTreeMap::new(), calibration: None })
        }
        Goal::Budget(budget) => {
            let errors = errors(checkpoint, lens, settings.sensitivity, pool, progress, course)?;
            let plan = plan_from(&Subject::of(checkpoint), settings, *budget, &errors)?;
            let calibration = lens.report(plan.sensitivities.as_deref());
            Ok(Planned { plan, spectra: errors.spectra, calibration })
        }
    }
}

/// What a plan is made from: the errors of every rank of every matrix, and how they compare.
#[derive(Debug, Clone)]
pub struct Errors {
    /// In the norm of the lens.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// How they compare.
    pub sensitivity: Sensitivity,
    /// By layer, where that was measured.
    pub layers: Option<Vec<LayerSensitivity>>,
}

/// Looks up or measures what plans are made from; any budget's plan then takes milliseconds.
pub fn errors(
    checkpoint: &Checkpoint,
    lens: &Lens<'_>,
    sensitivity: Option<Sensitivity>,
    pool: &rayon::ThreadPool,
    progress: &dyn Progress,
    course: Course<'_>,
) -> Result<Errors, PipelineError> {
    let sensitivity = sensitivity.unwrap_or(lens.usual_sensitivity());
    if sensitivity != Sensitivity::Measured {
        let spectra = spectra(checkpoint, lens, pool, progress, course)?;
        return Ok(Errors { spectra, sensitivity, layers: None });
    }
    let measured = lens.sensitivities(checkpoint, pool, progress, course.interrupt)?;
    let Sensitivities { spectra, layers } = measured.ok_or(PipelineError::NothingToMeasureOn)?;
    Ok(Errors { spectra, sensitivity, layers: Some(layers) })
}

impl Errors {
    /// The spectra thinned, for a plan to carry.
    pub fn curves(&self) -> Option<SpectrumCurves> {
        SpectrumCurves::of(self.spectra.iter().map(|(name, spectrum)| (*name, spectrum)))
    }
}

/// The plan of a budget; the settings' own goal is of no account.
pub fn plan_from(
    subject: &Subject,
    settings: &PlanSettings,
    budget: Budget,
    errors: &Errors,
) -> Result<RankPlan, PipelineError> {
    let mut plan = plans_from(subject, settings, &[(budget, settings.allocation)], errors)?.remove(0)?;
    plan.spectra = errors.curves();
    Ok(plan)
}

/// The plans of several budgets, in their order and without [`RankPlan::spectra`]. They share what is costly, so one more
/// costs a millisecond. Goal and allocation of the settings are of no account. Fails where none can be made.
pub fn plans_from(
    subject: &Subject,
    settings: &PlanSettings,
    wishes: &[(Budget, Allocation)],
    errors: &Errors,
) -> Result<Vec<Result<RankPlan, PipelineError>>, PipelineError> {
    let resolve = |budget: &Budget| budget.resolve(subject.before.params, subject.before.bytes);
    let targets: Vec<_> = wishes.iter().map(|(budget, _)| resolve(budget)).collect();
    let mut plans: Vec<Option<Result<RankPlan, PipelineError>>> =
        targets.iter().map(|target| target.as_ref().err().map(|error| Err(error.clone().into()))).collect();
    for unit in [Unit::Params, Unit::Bytes] {
        let here: Vec<(usize, Target)> = targets
            .iter()
            .enumerate()
            .filter_map(|(index, target)| Some((index, *target.as_ref().ok()?)))
            .filter(|(_, target)| target.unit == unit)
            .collect();
        let Some(&(_, first)) = here.first() else { continue };
        let removals: Vec<_> =
            here.iter().map(|&(index, target)| (target.remove_at_least, wishes[index].1)).collect();
        let made = subject
            .with_request(settings, first, errors, |request| Ok(Allocator::new(request)?.plans(&removals)))?;
        for ((index, _), plan) in here.into_iter().zip(made) {
            plans[index] = Some(plan.map_err(PipelineError::from));
        }
    }
    let patterns: Vec<String> = settings.keep_dense.iter().map(ToString::to_string).collect();
    let fixed: Vec<String> = settings.fixed_ranks.iter().map(ToString::to_string).collect();
    let recorded = |plan: RankPlan, allocation| {
        let plan = plan.constrained(settings.rank_min, patterns.clone(), fixed.clone());
        plan.chosen_by(allocation, errors.layers.clone())
    };
    let plans = plans.into_iter().map(|plan| plan.expect("every budget is in one of the units"));
    Ok(plans.zip(wishes).map(|(plan, wish)| plan.map(|plan| recorded(plan, wish.1))).collect())
}

/// A plan or ranks that were given, held against the checkpoint.
fn given(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<RankPlan, PipelineError> {
    let subject = Subject::of(checkpoint);
    let (config, before) = (&subject.config, subject.before);
    match &settings.goal {
        Goal::Plan(plan) => {
            if let Some(asked) = settings.storage.filter(|&asked| asked != plan.cost.storage) {
                return Err(PipelineError::PlanStorage { asked, planned: plan.cost.storage });
            }
            plan.validate(config, before)?;
            let cost = subject.cost_model(settings, plan.cost.unit);
            for (what, planned, actual) in [
                ("matrix", plan.cost.dense_element_bytes, cost.dense_element_bytes),
                ("factor", plan.cost.factor_element_bytes, cost.factor_element_bytes),
            ] {
                if planned != actual {
                    return Err(PipelineError::PlanDtype { what, planned, actual });
                }
            }
            Ok((**plan).clone())
        }
        Goal::Ranks(ranks) => {
            let cost = subject.cost_model(settings, Unit::Params);
            Ok(plan_from_ranks(config, ranks, cost, before)?)
        }
        Goal::Budget(_) => unreachable!("a budget gives no ranks"),
    }
}

/// What a plan has to know of a checkpoint: nothing of its weights.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Which matrices there are, and their shapes.
    pub config: ModelConfig,
    /// The whole checkpoint.
    pub before: Size,
    /// Of the expert matrices, which share one.
    pub dtype: Dtype,
}

impl Subject {
    /// As its headers say.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let first = MatrixId { layer: 0, expert: 0, projection: Projection::W1 };
        Self {
            config: checkpoint.config().clone(),
            before: checkpoint.size(),
            dtype: checkpoint.matrix_dtype(first),
        }
    }

    /// Multiples that ranks are of, unless the settings say.
    pub fn rank_multiple(&self, settings: &PlanSettings) -> usize {
        let short = self.config.matrix_shape(Projection::W1).short_side();
        let usual = if short >= TRUE_SIZE { RANK_MULTIPLE_TRUE_SIZE } else { 1 };
        settings.rank_multiple.unwrap_or(usual)
    }

    /// For questions that only shapes decide.
    fn without_errors(&self) -> Errors {
        let zeros = |id: MatrixId| vec![0.0; self.config.matrix_shape(id.projection).short_side()];
        let spectrum = |id| Spectrum::new(zeros(id)).expect("zeros do not rise");
        Errors {
            spectra: self.config.matrices().map(|id| (id, spectrum(id))).collect(),
            sensitivity: Sensitivity::default(),
            layers: None,
        }
    }

    /// Puts together what an allocation needs.
    fn with_request<R>(
        &self,
        settings: &PlanSettings,
        target: Target,
        errors: &Errors,
        act: impl FnOnce(&AllocationRequest<'_>) -> Result<R, PipelineError>,
    ) -> Result<R, PipelineError> {
        let choices = self.choices(settings)?;
        let measured =
            |id: MatrixId| errors.layers.as_ref().map_or(1.0, |layers| layers[id.layer].of(id.projection));
        let candidate = |(&name, spectrum)| Candidate {
            name,
            shape: self.config.matrix_shape(name.projection),
            spectrum,
            measured: measured(name),
            choices: choices.get(&name).copied().unwrap_or_default(),
        };
        let candidates: Vec<Candidate<'_>> = errors.spectra.iter().map(candidate).collect();
        act(&AllocationRequest {
            matrices: &candidates,
            target,
            cost: self.cost_model(settings, target.unit),
            rank_multiple: self.rank_multiple(settings),
            rank_min: settings.rank_min,
            sensitivity: errors.sensitivity,
            before: self.before,
        })
    }

    /// Bytes per element before and after.
    fn cost_model(&self, settings: &PlanSettings, unit: Unit) -> CostModel {
        CostModel {
            storage: settings.storage.unwrap_or_default(),
            unit,
            dense_element_bytes: self.dtype.size_bytes(),
            factor_element_bytes: settings.factor_dtype.unwrap_or(self.dtype).size_bytes(),
        }
    }

    /// Matrices that patterns keep dense or give a rank, checked against each other and against what a rank may be. A
    /// pattern that matches nothing is a typing error.
    pub fn choices(&self, settings: &PlanSettings) -> Result<BTreeMap<MatrixId, Choices>, PipelineError> {
        let storage = settings.storage.unwrap_or_default();
        let mut held = BTreeMap::new();
        for FixedRank { pattern, rank } in &settings.fixed_ranks {
            for id in self.matching("fix-rank", pattern)? {
                let shape = self.config.matrix_shape(id.projection);
                let rank_max = rank_max_saving(shape, storage);
                if !(1..=rank_max).contains(rank) {
                    let pattern = pattern.to_string();
                    return Err(PipelineError::FixedRank {
                        pattern,
                        rank: *rank,
                        name: id,
                        storage,
                        rank_max,
                    });
                }
                held.insert(id, Choices::Rank(*rank));
            }
        }
        for pattern in &settings.keep_dense {
            for id in self.matching("keep-dense", pattern)? {
                if matches!(held.insert(id, Choices::Dense), Some(Choices::Rank(_))) {
                    return Err(PipelineError::DenseAndFixed { pattern: pattern.to_string(), name: id });
                }
            }
        }
        Ok(held)
    }

    fn matching(&self, key: &'static str, pattern: &regex::Regex) -> Result<Vec<MatrixId>, PipelineError> {
        let ids = self.config.matrices();
        let matches: Vec<MatrixId> = ids.filter(|id| pattern.is_match(&id.module_name())).collect();
        if matches.is_empty() {
            let pattern = pattern.to_string();
            return Err(PipelineError::PatternMatchesNothing { key, pattern });
        }
        Ok(matches)
    }
}
