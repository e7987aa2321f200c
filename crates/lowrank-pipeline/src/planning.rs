//! From a wish to a [`RankPlan`]: spectra and allocation for a budget, a check for ranks that were given.

use crate::base::InputHashes;
use crate::calibration::check_window;
use crate::memory::Demand;
use crate::spectra::{RunState, spectra};
pub use crate::subject::Subject;
use crate::subject::storage;
use crate::workers::{self, Resources};
use crate::{CalibrationContext, CalibrationText, Interrupt, JobContext, PipelineError, base};
use lowrank_calibrate::{DifferenceSpectra, ExpertWidths, Sensitivities, WidthsByExpert};
use lowrank_model::block::SharedExperts;
use lowrank_model::display::grouped;
use lowrank_model::params::{rank_max_saving, stored_params, usual_multiple};
use lowrank_model::plan::{Allocation, LayerSensitivity, RankGroups, Sensitivity, Size, Structures};
use lowrank_model::recipe::{
    CalibrationSettings, FixedRank, Goal, Pattern, PlanSettings, PropagationSettings, Removal,
    SharedExpertsChoice, TextChoice,
};
use lowrank_model::{
    CostModel, Dtype, ElementBytes, MatrixId, ModelConfig, Progress, RankPlan, Recipe, Spectrum,
    SpectrumCurves, Storage, Target, Unit,
};
use lowrank_reader::Checkpoint;
use lowrank_svd::allocate::{
    self, AllocationRequest, BaseCandidate, Candidate, Choices, ExpertCandidate, check, plan_from_ranks,
};
use lowrank_writer::report::{BaseModel, CalibrationReport};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A plan, and what it was made from.
#[derive(Debug)]
pub struct Planned {
    /// The table.
    pub plan: RankPlan,
    /// Singular values by matrix, in the norm of the calibration; empty when the ranks were given.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// What errors were counted on, if on anything.
    pub calibration: Option<CalibrationReport>,
}

/// Makes the plan. Reads every expert matrix once if the goal is a budget and their spectra are not known yet.
pub fn plan(
    checkpoint: &Checkpoint,
    model: &str,
    recipe: &Recipe,
    resources: &Resources,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<Planned, PipelineError> {
    refuse_early(checkpoint, recipe, progress)?;
    let algebra = resources.algebra()?;
    let mut measured = recipe.clone();
    if !recipe.goal.is_budget() {
        measured.calibration = CalibrationSettings::off();
    }
    let demand = Demand::plan(checkpoint.config(), workers::widest(checkpoint, None), &measured);
    let pool = &workers::pool(&demand, resources)?;
    let context = JobContext { resources, pool, progress, interrupt };
    let state = RunState { staging: None, scratch: None, interrupt };
    // Given ranks are checked without a look at the weights.
    let (text, base) = match recipe.goal.is_budget() {
        true => (
            CalibrationText::read(checkpoint, recipe)?,
            base::identify_remembered(checkpoint, model, pool, progress, interrupt, resources)?,
        ),
        false => (None, BaseModel::default()),
    };
    let inputs = InputHashes::known(base.files, progress);
    let calibration =
        CalibrationContext::new(checkpoint, &inputs, text, recipe.measured_structures(), algebra, context)?;
    let planned = plan_through(checkpoint, &calibration, recipe, context, state)?;
    calibration.note_substituted(progress);
    Ok(planned)
}

/// Refuses what needs no look at the weights: a budget that cannot be met, a pattern that matches nothing, a plan or ranks
/// for another model.
pub fn refuse_early(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    progress: &dyn Progress,
) -> Result<(), PipelineError> {
    refuse_factored(checkpoint)?;
    checkpoint.refuse_adapter()?;
    if recipe.calibration().is_none() && recipe.plan.sensitivity == Some(Sensitivity::Measured) {
        return Err(PipelineError::NothingToMeasureOn);
    }
    refuse_structures(recipe)?;
    check_window(checkpoint, recipe)?;
    let subject = Subject::of(checkpoint);
    if let Some(line) = hardly_a_budget(recipe, subject.before) {
        progress.note(&line);
    }
    if let Some(line) = subject.after_then(recipe) {
        progress.note(&line);
    }
    match subject.target(recipe) {
        None => recorded(recipe, &plan_of_given(&subject, recipe)?).map(|_| ()),
        Some(target) => {
            let errors = subject.without_errors(recipe.structures());
            subject
                .with_request(recipe, target?, &errors, |request| Ok(check(request, recipe.plan.allocation)?))
        }
    }
}

/// Says, in one line, that a budget is so small that it was hardly meant: `--budget 20` is 20 parameters.
fn hardly_a_budget(recipe: &Recipe, before: Size) -> Option<String> {
    /// A millionth of the checkpoint.
    const LEAST_SHARE: u64 = 1_000_000;
    match recipe.goal {
        Goal::Budget(Removal::Params(asked)) if asked.saturating_mul(LEAST_SHARE) < before.params => {
            Some(format!(
                "{} of {} parameters are to go, less than a millionth; a share is written `20%`, billions `20B`",
                grouped(asked),
                grouped(before.params)
            ))
        }
        _ => None,
    }
}

/// Refuses widths and shared bases without what only a calibration can measure, or one choice for all beside ranks.
pub fn refuse_structures(recipe: &Recipe) -> Result<(), PipelineError> {
    let structures = recipe.measured_structures();
    if !structures.need_activations() {
        return Ok(());
    }
    if recipe.calibration().is_none() || recipe.sensitivity() != Sensitivity::Measured {
        return Err(PipelineError::StructuresNotMeasured);
    }
    let is_free =
        recipe.plan.allocation == Allocation::Global && recipe.plan.rank_groups == RankGroups::Matrix;
    if structures.has_bases() && !is_free {
        return Err(PipelineError::SharedBasesAndEqualExperts);
    }
    if recipe.plan.allocation == Allocation::Uniform && recipe.structures().has_ranks() {
        return Err(PipelineError::UniformWidths);
    }
    Ok(())
}

/// Only what is dense can be compressed.
pub fn refuse_factored(checkpoint: &Checkpoint) -> Result<(), PipelineError> {
    if !checkpoint.is_compressed() {
        return Ok(());
    }
    Err(PipelineError::AlreadyFactored(checkpoint.layout()))
}

/// As [`plan`], with a calibration at hand.
pub fn plan_through(
    checkpoint: &Checkpoint,
    calibration: &CalibrationContext<'_>,
    recipe: &Recipe,
    context: JobContext<'_>,
    state: RunState<'_>,
) -> Result<Planned, PipelineError> {
    if !recipe.goal.is_budget() {
        let plan = plan_of_given(&Subject::of(checkpoint), recipe)?;
        return Ok(Planned { plan, spectra: BTreeMap::new(), calibration: None });
    }
    let errors = errors(checkpoint, calibration, recipe.sensitivity(), context, state)?;
    let subject = Subject::of(checkpoint);
    let plan = plan_from(&subject, recipe, &errors)?;
    if let Some(line) = cost_of_groups(&subject, recipe, &errors, &plan)? {
        context.progress.note(&line);
    }
    let calibration = calibration.report(plan.sensitivities.as_deref());
    Ok(Planned { plan, spectra: errors.spectra, calibration })
}

/// What it costs that experts share one choice, in one line.
fn cost_of_groups(
    subject: &Subject,
    recipe: &Recipe,
    errors: &Errors,
    plan: &RankPlan,
) -> Result<Option<String>, PipelineError> {
    if recipe.plan.rank_groups == RankGroups::Matrix {
        return Ok(None);
    }
    let mut free = recipe.clone();
    free.plan.rank_groups = RankGroups::Matrix;
    let objective = |plan: &RankPlan| plan.optimality.map_or(0.0, |proof| proof.objective);
    Ok(Some(format!(
        "the experts of a layer share one width and one rank for each projection: predicted error {:.3e}; with choices of their own {:.3e}",
        objective(plan),
        objective(&plan_from(subject, &free, errors)?)
    )))
}

/// A recipe as the report embeds it. The plan knows how it was made, so that a stored plan gives the same report as its
/// budget did.
pub fn recorded(resolved: &Recipe, plan: &RankPlan) -> Result<Recipe, PipelineError> {
    let wrong = |what: String| PipelineError::Record { path: "plan".into(), what };
    let name = |text: &TextChoice| match text {
        // No path: the same text gives the same report anywhere.
        TextChoice::File(path) => TextChoice::File(path.file_name().unwrap_or_default().into()),
        text => text.clone(),
    };
    let mut recipe = resolved.clone();
    recipe.goal = plan.target.map_or_else(|| Goal::Ranks(plan.ranks()), Goal::Remove);
    recipe.plan = PlanSettings {
        rank_multiple: Some(plan.rank_multiple.max(1)),
        min_rank: plan.rank_min.max(1),
        keep_dense: plan
            .keep_dense
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()
            .map_err(wrong)?,
        fix_rank: plan.fix_rank.iter().map(|text| text.parse()).collect::<Result<_, _>>().map_err(wrong)?,
        sensitivity: Some(plan.optimality.map(|optimality| optimality.sensitivity).unwrap_or_default()),
        allocation: plan.allocation,
        structures: Some(plan.structures),
        rank_groups: plan.rank_groups,
        then: None,
    };
    recipe.factor.storage = Some(plan.cost.storage);
    recipe.calibration.calibrate = recipe.calibration.calibrate.iter().map(name).collect();
    Ok(recipe)
}

/// What a compression of one model is known by, beside model and version. Takes a resolved recipe; tokens stand for the
/// names of texts.
pub fn identity(resolved: &Recipe, text: Option<&CalibrationText>) -> Value {
    let mut sorted = resolved.clone();
    sorted.plan.keep_dense = sorted_patterns(&resolved.plan.keep_dense);
    let mut identity = json!(sorted);
    identity["calibrate"] = json!(text.map(CalibrationText::blake3));
    identity
}

/// Each pattern once: their order is of no account.
pub(crate) fn sorted_patterns(patterns: &[Pattern]) -> Vec<Pattern> {
    let mut sorted = patterns.to_vec();
    sorted.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    sorted.dedup();
    sorted
}

/// What a plan is made from: the errors of every rank of every matrix, and how they compare.
#[derive(Debug, Clone)]
pub struct Errors {
    /// In the norm of the calibration.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// How they compare.
    pub sensitivity: Sensitivity,
    /// By layer, where that was measured.
    pub layers: Option<Vec<LayerSensitivity>>,
    /// Of the experts that may be narrowed.
    pub widths: WidthsByExpert,
    /// Of the matrices of layers whose experts may share a base, without it.
    pub differences: DifferenceSpectra,
}

/// Looks up or measures what plans are made from; any budget's plan then takes milliseconds.
pub fn errors(
    checkpoint: &Checkpoint,
    calibration: &CalibrationContext<'_>,
    sensitivity: Sensitivity,
    context: JobContext<'_>,
    state: RunState<'_>,
) -> Result<Errors, PipelineError> {
    if sensitivity != Sensitivity::Measured {
        let spectra = spectra(checkpoint, calibration, context.pool, context.progress, state)?;
        let (widths, differences) = (WidthsByExpert::new(), DifferenceSpectra::new());
        return Ok(Errors { spectra, sensitivity, layers: None, widths, differences });
    }
    let measured = calibration.sensitivities(checkpoint, context)?;
    let Sensitivities { spectra, layers } = measured.ok_or(PipelineError::NothingToMeasureOn)?;
    let differences = calibration.differences(&spectra, context)?;
    let widths = calibration.widths(context)?;
    Ok(Errors { spectra, sensitivity, layers: Some(layers), widths, differences })
}

impl Errors {
    /// The spectra of routed experts thinned, for a plan to carry.
    pub fn curves(&self, config: &ModelConfig) -> Option<SpectrumCurves> {
        let routed = self.spectra.iter().filter(|(id, _)| !id.is_shared());
        SpectrumCurves::of(routed.map(|(&id, spectrum)| (config.module_name(id), spectrum)))
    }
}

/// The plan of a recipe whose goal is a budget.
pub fn plan_from(subject: &Subject, recipe: &Recipe, errors: &Errors) -> Result<RankPlan, PipelineError> {
    let mut plan = plans_from(subject, &[recipe], errors)?.remove(0)?;
    plan.spectra = errors.curves(&subject.config);
    Ok(plan)
}

/// The plans of recipes that differ in budget and allocation alone, in their order and without [`RankPlan::spectra`]. They
/// share what is costly, so one more costs a millisecond. Fails where none can be made.
///
/// # Panics
/// If a goal is no budget.
pub fn plans_from(
    subject: &Subject,
    recipes: &[&Recipe],
    errors: &Errors,
) -> Result<Vec<Result<RankPlan, PipelineError>>, PipelineError> {
    let target = |recipe: &&Recipe| subject.target(recipe).expect("only budgets are planned");
    let targets: Vec<_> = recipes.iter().map(target).collect();
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
        let removals: Vec<_> = here
            .iter()
            .map(|&(index, target)| (target.remove_at_least, recipes[index].plan.allocation))
            .collect();
        let made = subject
            .with_request(recipes[0], first, errors, |request| Ok(allocate::plans(request, &removals)?))?;
        for ((index, _), plan) in here.into_iter().zip(made) {
            plans[index] = Some(plan.map_err(PipelineError::from));
        }
    }
    let recorded = |plan: RankPlan, recipe: &Recipe| {
        let settings = &recipe.plan;
        let patterns = settings.keep_dense.iter().map(ToString::to_string).collect();
        let fixed = settings.fix_rank.iter().map(ToString::to_string).collect();
        plan.constrained(settings.min_rank, patterns, fixed).chosen_by(
            settings.allocation,
            recipe.structures(),
            settings.rank_groups,
            errors.layers.clone(),
        )
    };
    let plans = plans.into_iter().map(|plan| plan.expect("every budget is in one of the units"));
    Ok(plans.zip(recipes).map(|(plan, recipe)| plan.map(|plan| recorded(plan, recipe))).collect())
}

/// A plan or ranks that were given, held against the checkpoint.
///
/// # Panics
/// If the goal is a budget.
pub fn plan_of_given(subject: &Subject, recipe: &Recipe) -> Result<RankPlan, PipelineError> {
    let (config, before) = (&subject.config, subject.before);
    match &recipe.goal {
        Goal::Plan(plan) => {
            if let Some(asked) = recipe.factor.storage.filter(|&asked| asked != plan.cost.storage) {
                return Err(PipelineError::PlanStorage { asked, planned: plan.cost.storage });
            }
            plan.validate(config, before)?;
            for row in &plan.matrices {
                let name = row.matrix.id;
                let planned = plan.cost.with(row.element_bytes).element_bytes();
                let actual = subject.element_bytes_of(recipe, name);
                for (what, planned, actual) in
                    [("", planned.dense, actual.dense), ("the factors of ", planned.factor, actual.factor)]
                {
                    if planned != actual {
                        return Err(PipelineError::PlanDtype { what, name, planned, actual });
                    }
                }
            }
            Ok((**plan).clone())
        }
        Goal::Ranks(ranks) => {
            let cost = subject.cost_model(recipe, Unit::Params);
            Ok(plan_from_ranks(config, ranks, cost, &subject.element_bytes(recipe), before)?)
        }
        _ => unreachable!("a budget gives no ranks"),
    }
}

impl Subject {
    /// The dtype of all expert matrices, if they share one.
    pub fn common_dtype(&self) -> Option<Dtype> {
        let first = *self.dtypes.values().next()?;
        self.dtypes.values().all(|&dtype| dtype == first).then_some(first)
    }

    /// What becomes of shared experts, if there are some.
    fn shared_experts(&self) -> Option<SharedExpertsChoice> {
        let has_some = self.config.block.shared_experts != SharedExperts::None;
        has_some.then_some(match self.config.compresses_shared_experts {
            true => SharedExpertsChoice::Compress,
            false => SharedExpertsChoice::Keep,
        })
    }

    /// Multiples that ranks are of, unless the settings say.
    fn rank_multiple(&self, settings: &PlanSettings) -> usize {
        let short = self.config.matrix_shape(self.config.first_matrix()).short_side();
        settings.rank_multiple.unwrap_or_else(|| usual_multiple(short))
    }

    /// The most parameters that the smallest rank of a matrix, or the smallest width of its expert, can remove from it with
    /// the default settings.
    pub(crate) fn most_removable(&self, id: MatrixId, structures: Structures) -> u64 {
        let (shape, full) = (self.config.matrix_shape(id), self.config.intermediate_size);
        let (least, storage) = (self.rank_multiple(&PlanSettings::default()), Storage::default());
        let count = |rank| stored_params(shape, storage, rank);
        match structures.has_widths() {
            true if !id.is_shared() => (count(None) / full as u64) * full.saturating_sub(least) as u64,
            _ if least > rank_max_saving(shape, storage) => 0,
            _ => count(None) - count(Some(least)),
        }
    }

    /// The recipe with every default spelled out that this checkpoint decides, and the budget resolved. One that cannot be
    /// met stays as it was asked for; planning says why. The dtype of factors stays absent where that of the matrices differs.
    pub fn resolve(&self, recipe: &Recipe) -> Recipe {
        let mut resolved = recipe.clone();
        if let Some(Ok(target)) = self.target(recipe) {
            resolved.goal = Goal::Remove(target);
            resolved.plan.then = None;
        }
        resolved.plan.rank_multiple = Some(self.rank_multiple(&recipe.plan));
        resolved.plan.sensitivity = Some(recipe.sensitivity());
        resolved.plan.structures = Some(recipe.structures());
        resolved.base.fp8 = self.config.fp8_blocks.map(|_| recipe.fp8());
        resolved.base.shared_experts = self.shared_experts();
        resolved.factor.storage = Some(storage(recipe));
        resolved.factor.dtype = recipe.factor.dtype.or_else(|| self.common_dtype());
        match recipe.calibration() {
            Some(calibration) => {
                let tokens = calibration.sensitivity_tokens(self.config.hidden_size);
                resolved.calibration.sensitivity_tokens = Some(tokens);
                let window = calibration.window(self.config.hidden_size, self.config.max_position_embeddings);
                resolved.calibration.calibration_window = Some(window);
            }
            None => {
                resolved.calibration = CalibrationSettings::off();
                resolved.propagation = PropagationSettings::OFF;
            }
        }
        resolved
    }

    /// For questions that only shapes decide.
    fn without_errors(&self, structures: Structures) -> Errors {
        let zeros = |id: MatrixId| vec![0.0; self.config.matrix_shape(id).short_side()];
        let spectrum = |id| Spectrum::new(zeros(id)).expect("zeros do not rise");
        Errors {
            spectra: self.config.matrices().map(|id| (id, spectrum(id))).collect(),
            sensitivity: if structures.has_widths() { Sensitivity::Measured } else { Sensitivity::default() },
            layers: None,
            widths: self.widths_without_errors(structures),
            // A base costs something, so it does not decide what can be removed at most.
            differences: DifferenceSpectra::new(),
        }
    }

    fn widths_without_errors(&self, structures: Structures) -> WidthsByExpert {
        let channels = self.config.intermediate_size;
        let own = || ExpertWidths {
            order: (0..channels).collect(),
            errors: vec![0.0; channels + 1],
            grid: Vec::new(),
        };
        let ids = self.config.matrices().filter(|id| structures.has_widths() && !id.is_shared());
        ids.map(|id| ((id.layer, id.expert), own())).collect()
    }

    /// Puts together what an allocation needs.
    fn with_request<R>(
        &self,
        recipe: &Recipe,
        target: Target,
        errors: &Errors,
        act: impl FnOnce(&AllocationRequest<'_>) -> Result<R, PipelineError>,
    ) -> Result<R, PipelineError> {
        let (choices, element_bytes) = (self.choices(recipe)?, self.element_bytes(recipe));
        let measured =
            |id: MatrixId| errors.layers.as_ref().map_or(1.0, |layers| layers[id.layer].of(id.projection));
        let width_measured =
            |layer: usize| errors.layers.as_ref().map_or(1.0, |layers| layers[layer].of_width());
        let candidate = |(&name, spectrum)| Candidate {
            name,
            shape: self.config.matrix_shape(name),
            spectrum,
            measured: measured(name),
            choices: choices.get(&name).copied().unwrap_or_default(),
            element_bytes: element_bytes.get(&name).copied(),
        };
        let candidates: Vec<Candidate<'_>> = errors.spectra.iter().map(candidate).collect();
        let expert = |(place, own)| {
            let (&(layer, expert), ExpertWidths { order, errors, grid }): (&(usize, usize), &ExpertWidths) =
                (place, own);
            let measured = width_measured(layer);
            let ranks = recipe.structures().has_ranks();
            ExpertCandidate { layer, expert, order, errors, measured, grid, ranks }
        };
        let narrowed = errors.widths.iter().filter(|_| recipe.structures().has_widths());
        let experts: Vec<ExpertCandidate<'_>> = narrowed.map(expert).collect();
        let may_share = errors.differences.iter().filter(|_| recipe.structures().has_bases());
        let shared_bases: Vec<BaseCandidate<'_>> =
            may_share.map(|(&layer, differences)| BaseCandidate { layer, differences }).collect();
        act(&AllocationRequest {
            family: self.config.family,
            matrices: &candidates,
            experts: &experts,
            shared_bases: &shared_bases,
            target,
            cost: self.cost_model(recipe, target.unit),
            rank_multiple: self.rank_multiple(&recipe.plan),
            rank_min: recipe.plan.min_rank,
            sensitivity: errors.sensitivity,
            rank_groups: recipe.plan.rank_groups,
            before: self.before,
        })
    }

    /// How cost is counted, with the element sizes of the first matrix.
    fn cost_model(&self, recipe: &Recipe, unit: Unit) -> CostModel {
        let ElementBytes { dense, factor } = self.element_bytes_of(recipe, self.config.first_matrix());
        CostModel { storage: storage(recipe), unit, dense_element_bytes: dense, factor_element_bytes: factor }
    }

    /// Element sizes of one matrix.
    fn element_bytes_of(&self, recipe: &Recipe, id: MatrixId) -> ElementBytes {
        let own = self.dtypes[&id];
        ElementBytes { dense: own.size_bytes(), factor: recipe.factor.dtype.unwrap_or(own).size_bytes() }
    }

    /// Element sizes of the matrices where they are not those of the first one.
    fn element_bytes(&self, recipe: &Recipe) -> BTreeMap<MatrixId, ElementBytes> {
        let common = self.cost_model(recipe, Unit::Bytes).element_bytes();
        let all = self.dtypes.keys().map(|&id| (id, self.element_bytes_of(recipe, id)));
        all.filter(|(_, own)| *own != common).collect()
    }

    /// Matrices that patterns keep dense or give a rank, checked against each other and against what a rank may be. A
    /// pattern that matches nothing is a typing error.
    pub fn choices(&self, recipe: &Recipe) -> Result<BTreeMap<MatrixId, Choices>, PipelineError> {
        let (settings, storage) = (&recipe.plan, storage(recipe));
        let mut held = BTreeMap::new();
        for FixedRank { pattern, rank } in &settings.fix_rank {
            for id in self.matching("fix-rank", pattern)? {
                let shape = self.config.matrix_shape(id);
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

    fn matching(&self, key: &'static str, pattern: &Pattern) -> Result<Vec<MatrixId>, PipelineError> {
        let ids = self.config.matrices();
        let matches: Vec<MatrixId> =
            ids.filter(|id| pattern.is_match(&self.config.module_name(*id))).collect();
        if matches.is_empty() {
            let pattern = pattern.to_string();
            let example =
                self.config.matrices().next().map_or_else(String::new, |id| self.config.module_name(id));
            return Err(PipelineError::PatternMatchesNothing { key, pattern, example });
        }
        Ok(matches)
    }
}
