//! Times a plan of each of three large models with many small experts, from generated spectra, without weights:
//! `cargo xtask bench sweep`.

use lowrank_bench::meter::peak_resident_bytes;
use lowrank_bench::shapes::large_models;
use lowrank_bench::spectra::trained_like;
use lowrank_model::params::stored_params;
use lowrank_model::plan::{Sensitivity, Size};
use lowrank_model::recipe::{CalibrationSettings, Goal, Removal};
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{Dtype, ModelConfig, Recipe, Storage};
use lowrank_pipeline::planning::{Errors, Subject};
use lowrank_pipeline::sweep::plan_many;
use lowrank_pipeline::{Interrupt, PipelineError};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::error::Error;
use std::sync::Mutex;
use std::time::Instant;

/// A plan takes less than this.
const SECONDS_MAX: f64 = 5.0;
/// Percent of the expert parameters that are removed.
const SHARE: u64 = 20;

fn main() -> Result<(), Box<dyn Error>> {
    for (name, config) in large_models() {
        let config = ModelConfig::from_hf_json(&config)?;
        let params: u64 = config.tensors().iter().map(TensorSpec::elements).sum();
        let dense = |id| stored_params(config.matrix_shape(id), Storage::Uv, None);
        let expert_params: u64 = config.matrices().map(dense).sum();
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let spectra: std::collections::BTreeMap<_, _> = config
            .matrices()
            .map(|id| (id, trained_like(config.matrix_shape(id).short_side(), &mut rng)))
            .collect();
        let count = spectra.len();
        let errors = Errors {
            spectra,
            sensitivity: Sensitivity::Relative,
            layers: None,
            widths: Default::default(),
            differences: Default::default(),
        };
        let asked = expert_params * SHARE / 100;
        let mut recipe = Recipe::new(Goal::Budget(Removal::Params(asked)));
        recipe.calibration = CalibrationSettings::off();
        let dtypes = config.matrices().map(|id| (id, Dtype::Bf16)).collect();
        let subject = Subject {
            config,
            before: Size { params, bytes: 2 * params },
            dtypes,
            quantised_rest: Default::default(),
        };
        let made = Mutex::new(None);
        let start = Instant::now();
        plan_many(&subject, &errors, &[&recipe], 1, &Interrupt::default(), &|_, point| {
            *made.lock().expect("nobody panics") = Some(point.plan);
            Ok::<_, PipelineError>(())
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let plan = made.into_inner()?.ok_or("no plan was made")??;
        plan.validate(&subject.config, subject.before)?;
        let (removed, gap) = (plan.removed_params(), plan.optimality.and_then(|found| found.duality_gap));
        let gap = gap.ok_or("the plan says no gap")?;
        let gigabytes = peak_resident_bytes()? as f64 / 1e9;
        println!(
            "{name}: {params} parameters, {count} expert matrices, plan in {seconds:.2} s, {removed} removed of {asked} asked \
             ({} more), duality gap {gap:.1e}, peak resident memory so far {gigabytes:.1} GB",
            removed.saturating_sub(asked)
        );
        if removed < asked {
            return Err(format!("{name}: the budget is missed").into());
        }
        if seconds >= SECONDS_MAX {
            return Err(format!("{name}: {seconds:.2} s, more than {SECONDS_MAX} s").into());
        }
    }
    Ok(())
}
