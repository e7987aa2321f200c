//! Fuzz target for the planner: checkpoints of any dimensions and dtypes, any spectra, and every setting of a recipe.

use crate::outcome::{refused, sign};
use lowrank_calibrate::DifferenceSpectra;
use lowrank_calibrate::widths::{ExpertWidths, WidthsByExpert, width_grid};
use lowrank_model::display::abridge;
use lowrank_model::plan::{LayerSensitivity, Sensitivity, Size, WidthSensitivity};
use lowrank_model::recipe::Goal;
use lowrank_model::spectrum::SpectrumError;
use lowrank_model::{Dtype, MatrixId, ModelConfig, Projection, RankPlan, Recipe, Spectrum, Target, Unit};
use lowrank_pipeline::PipelineError;
use lowrank_pipeline::planning::{Errors, Subject, plan_from, plan_of_given};
use lowrank_reader::{ReadError, family};
use lowrank_svd::NarrowedErrors;
use lowrank_svd::allocate::AllocateError;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Largest model that is planned.
const MATRICES_MAX: usize = 96;
/// Longest spectrum.
const SHORT_SIDE_MAX: usize = 48;

/// Most channels of an expert.
const CHANNELS_MAX: usize = 1 << 12;

/// An input. Lists are used in turn, from their start again where they end.
#[derive(Deserialize)]
struct Input {
    config: Value,
    recipe: Value,
    #[serde(default)]
    dtypes: Vec<Dtype>,
    #[serde(default)]
    spectra: Vec<Vec<f64>>,
    #[serde(default)]
    sensitivity: Sensitivity,
    #[serde(default)]
    measured: Vec<f64>,
    /// What each channel of an expert carries, in its order of importance. None: widths were not measured.
    #[serde(default)]
    channels: Vec<Vec<f64>>,
    /// What of each layer's singular values a shared base leaves. None: no layer may have one.
    #[serde(default)]
    differences: Vec<f64>,
}

/// Plans what the input describes, and checks that the plan is what was asked for.
pub(crate) fn planner(bytes: &[u8]) -> u64 {
    let input: Input = match serde_json::from_slice(bytes) {
        Err(_) => return sign("no input"),
        Ok(input) => input,
    };
    let recipe: Result<Recipe, _> = serde_json::from_value(input.recipe.clone());
    let config = match described(&input.config) {
        Err(error) => return refused(error),
        Ok(config) => {
            config.with_shared_experts(recipe.as_ref().is_ok_and(Recipe::compresses_shared_experts))
        }
    };
    let shapes = || config.matrices().map(|id| config.matrix_shape(id));
    if config.matrices().nth(MATRICES_MAX).is_some()
        || config.intermediate_size > CHANNELS_MAX
        || shapes().any(|shape| shape.short_side() > SHORT_SIDE_MAX)
    {
        return sign("large");
    }
    let recipe = match recipe {
        // Whoever prints it takes the control characters out.
        Err(error) => return refused(abridge(&error.to_string())),
        Ok(recipe) => recipe,
    };
    if let Err(error) = recipe.validate() {
        return refused(error);
    }
    let subject = subject(&config, &input);
    let resolved = subject.resolve(&recipe);
    assert_eq!(subject.resolve(&resolved), resolved, "a resolved recipe is resolved");
    if !recipe.goal.is_budget() {
        return plan_of_given(&subject, &recipe).map_or_else(refused, |plan| check(&plan, &subject));
    }
    let errors = match errors(&config, &input) {
        Err(error) => return refused(error),
        Ok(errors) => errors,
    };
    match plan_from(&subject, &recipe, &errors) {
        Ok(plan) => check(&plan, &subject),
        Err(PipelineError::Allocate(AllocateError::Infeasible { most, unit, .. })) => {
            let goal = |remove_at_least| Goal::Remove(Target { unit, remove_at_least });
            let of = |remove| plan_from(&subject, &Recipe { goal: goal(remove), ..recipe.clone() }, &errors);
            if most > 0 {
                check(&of(most).expect("the most that can be removed can be removed"), &subject);
            }
            assert!(of(most + 1).is_err(), "more than the most was removed");
            sign("infeasible")
        }
        Err(error) => refused(error),
    }
}

/// The model of a config, as the reader reads it.
pub(crate) fn described(config: &Value) -> Result<ModelConfig, ReadError> {
    let json = serde_json::to_vec(config).expect("plain values serialise");
    family::from_hugging_face(Path::new("config.json"), &json).map(|description| description.config)
}

/// A checkpoint of these dimensions, in which dtypes take turns.
fn subject(config: &ModelConfig, input: &Input) -> Subject {
    let mut turn = input.dtypes.iter().copied().cycle();
    let mut next = || turn.next().unwrap_or(Dtype::Bf16);
    let dtypes: BTreeMap<MatrixId, Dtype> = config.matrices().map(|id| (id, next())).collect();
    let mut before = Size { params: 0, bytes: 0 };
    let mut add = |elements: u64, dtype: Dtype| {
        before.params += elements;
        before.bytes += elements * dtype.size_bytes();
    };
    for spec in config.tensors() {
        match spec.role {
            lowrank_model::names::Role::Expert(id) => add(spec.elements(), dtypes[&id]),
            _ => add(spec.elements(), next()),
        }
    }
    Subject { config: config.clone(), before, dtypes, quantised_rest: BTreeMap::new() }
}

/// Spectra that take turns, cut or filled with zeros to the length that they must have.
fn errors(config: &ModelConfig, input: &Input) -> Result<Errors, SpectrumError> {
    let mut turn = input.spectra.iter().cycle();
    let spectrum = |id: MatrixId| {
        let mut sigma = turn.next().cloned().unwrap_or_default();
        sigma.resize(config.matrix_shape(id).short_side(), 0.0);
        Ok((id, Spectrum::new(sigma)?))
    };
    let spectra = config.matrices().map(spectrum).collect::<Result<_, _>>()?;
    let mut turn = input.measured.iter().copied().cycle();
    let mut next = || turn.next().unwrap_or(1.0);
    let layers = (0..config.num_hidden_layers)
        .map(|_| LayerSensitivity {
            kl: [0.0; 3],
            sensitivity: [next(), next(), next()],
            width: Some(WidthSensitivity { kl: 0.0, sensitivity: next() }),
        })
        .collect();
    let layers = (input.sensitivity == Sensitivity::Measured).then_some(layers);
    let widths = widths(config, input, &spectra);
    let differences = differences(config, input, &spectra)?;
    Ok(Errors { spectra, sensitivity: input.sensitivity, layers, widths, differences })
}

/// A share of the spectra of each layer with two experts or more.
fn differences(
    config: &ModelConfig,
    input: &Input,
    spectra: &BTreeMap<MatrixId, Spectrum>,
) -> Result<DifferenceSpectra, SpectrumError> {
    let layers = (0..config.num_hidden_layers).filter(|&layer| config.experts_in(layer) > 1);
    let of_layer = |(layer, &share): (usize, &f64)| {
        let own = spectra.iter().filter(|(id, _)| id.layer == layer);
        let scaled = own.map(|(&id, spectrum)| {
            Ok((id, Spectrum::new(spectrum.sigma().iter().map(|sigma| sigma * share).collect())?))
        });
        Ok((layer, scaled.collect::<Result<_, SpectrumError>>()?))
    };
    layers.zip(input.differences.iter().cycle()).map(of_layer).collect()
}

/// Orders that begin elsewhere in every expert, errors of all widths, and at each width of the grid a share of the spectra's.
fn widths(config: &ModelConfig, input: &Input, spectra: &BTreeMap<MatrixId, Spectrum>) -> WidthsByExpert {
    let full = config.intermediate_size;
    let mut turn = input.channels.iter().cycle();
    let of_expert = |id: MatrixId| {
        let mut errors = turn.next()?.clone();
        errors.resize(full, 0.0);
        errors.push(0.0);
        for width in (0..full).rev() {
            errors[width] += errors[width + 1];
        }
        let tails = |width: usize, projection| {
            let tails = spectra[&MatrixId { projection, ..id }].tail_energies();
            tails.into_iter().map(|tail| tail * width as f64 / full as f64).collect()
        };
        let narrowed = |width| NarrowedErrors { width, tails: Projection::ALL.map(|own| tails(width, own)) };
        let mut order: Vec<usize> = (0..full).collect();
        order.rotate_left((id.layer + id.expert) % full.max(1));
        let grid = width_grid(full, config.full_shape(Projection::Down)).into_iter().map(narrowed).collect();
        Some(((id.layer, id.expert), ExpertWidths { order, errors, grid }))
    };
    let experts = config.matrices().filter(|id| id.projection == Projection::Gate && !id.is_shared());
    experts.filter_map(of_expert).collect()
}

/// Whether a plan keeps what it promises, and reads back as it is written.
fn check(plan: &RankPlan, subject: &Subject) -> u64 {
    assert_eq!(plan.validate(&subject.config, subject.before), Ok(()));
    let json = serde_json::to_vec(plan).expect("plain values serialise");
    assert_eq!(RankPlan::from_json(&json).as_ref(), Ok(plan), "a plan reads back as it was");
    if let Some(proof) = plan.optimality {
        assert!(proof.objective.is_finite() && proof.lower_bound <= proof.objective, "{proof:?}");
        assert!(proof.duality_gap.is_none_or(|gap| gap >= 0.0), "{proof:?}");
    }
    let kind = plan.target.map(|target| {
        let removed = match target.unit {
            Unit::Params => plan.removed_params(),
            Unit::Bytes => plan.removed_bytes(),
        };
        assert!(removed >= target.remove_at_least, "{removed} of {target:?}");
        target.unit
    });
    let own = plan.matrices.iter().filter(|row| row.element_bytes.is_some()).count().min(2);
    let factored = plan.ranks().len().min(2);
    let (narrow, bases) = (plan.experts.len().min(2), plan.shared_base_layers.len().min(2));
    let shared = plan.ranks().keys().filter(|id| id.is_shared()).count().min(2);
    let how = (plan.cost.storage, plan.allocation, plan.structures, shared);
    sign(&format!("plan {kind:?} {own} {factored} {narrow} {bases} {how:?}"))
}
