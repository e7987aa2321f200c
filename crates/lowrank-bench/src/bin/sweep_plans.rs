//! Times 1,000 plans of an 8x7B model from generated spectra, without weights: `cargo xtask bench sweep [--jobs N]`.
//!
//! 768 spectra of 4096 values, a noise floor with a power-law head as trained experts have it, from a seed. The grid: 25
//! budgets × 2 layouts × 4 rank multiples × 5 sets of matrices kept dense.

use lowrank_bench::meter::peak_resident_bytes;
use lowrank_bench::spectra::trained_like;
use lowrank_model::plan::{Sensitivity, Size};
use lowrank_model::recipe::{CalibrationSettings, Goal, Removal};
use lowrank_model::{Dtype, MatrixId, ModelConfig, Recipe, Storage};
use lowrank_pipeline::planning::{Errors, Subject};
use lowrank_pipeline::sweep::{PlannedPoint, plan_many};
use lowrank_pipeline::{Interrupt, PipelineError};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use std::error::Error;
use std::sync::Mutex;
use std::time::Instant;

/// A plan of all 768 matrices takes less than this.
const SECONDS_PER_PLAN_MAX: f64 = 1.0;

fn main() -> Result<(), Box<dyn Error>> {
    let jobs: usize = std::env::args().nth(1).map_or(Ok(0), |text| text.parse())?;
    let subject = mixtral()?;
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let spectra = subject.config.matrices().map(|id: MatrixId| (id, trained_like(4096, &mut rng))).collect();
    let errors = Errors {
        spectra,
        sensitivity: Sensitivity::Relative,
        layers: None,
        widths: Default::default(),
        differences: Default::default(),
    };
    let points = grid()?;
    let asked: Vec<&Recipe> = points.iter().collect();
    let gaps = Mutex::new(Vec::new());
    let each = |_, PlannedPoint { plan, .. }: PlannedPoint| -> Result<(), PipelineError> {
        let gap = plan.expect("every budget can be met").optimality.expect("of a budget").duality_gap;
        let gap = gap.unwrap_or(f64::INFINITY);
        gaps.lock().expect("nobody panics").push(gap);
        Ok(())
    };
    let start = Instant::now();
    plan_many(&subject, &errors, &asked, jobs, &Interrupt::default(), &each)?;
    let seconds = start.elapsed().as_secs_f64();
    let gaps = gaps.into_inner()?;
    let largest = gaps.iter().copied().fold(0.0, f64::max);
    println!("{} plans of {} spectra in {seconds:.2} s", gaps.len(), errors.spectra.len());
    println!("largest duality gap {largest:.2e}");
    println!("peak resident memory {} MB", peak_resident_bytes()? / 1_000_000);
    let seconds_per_plan = seconds / gaps.len() as f64;
    if seconds_per_plan >= SECONDS_PER_PLAN_MAX {
        return Err(format!("{seconds_per_plan:.2} s per plan, more than {SECONDS_PER_PLAN_MAX} s").into());
    }
    Ok(())
}

/// Its shapes and its size in bf16.
fn mixtral() -> Result<Subject, Box<dyn Error>> {
    let config = ModelConfig::from_hf_json(&lowrank_bench::shapes::mixtral())?;
    let params = 46_702_792_704;
    let dtypes = config.matrices().map(|id| (id, Dtype::Bf16)).collect();
    Ok(Subject {
        config,
        before: Size { params, bytes: 2 * params },
        dtypes,
        quantised_rest: Default::default(),
    })
}

fn grid() -> Result<Vec<Recipe>, Box<dyn Error>> {
    let mut points = Vec::new();
    let kept = [None, Some(r"layers\.0\."), Some(r"layers\.31\."), Some(r"layers\.(0|31)\."), Some(r"\.w2$")];
    for dense in kept {
        for storage in [Storage::Pivoted, Storage::Uv] {
            for rank_multiple in [1, 8, 32, 64] {
                for step in 1..=25 {
                    let mut recipe = Recipe::new(Goal::Budget(Removal::Params(step * 800_000_000)));
                    recipe.calibration = CalibrationSettings::off();
                    recipe.plan.rank_multiple = Some(rank_multiple);
                    recipe.plan.keep_dense = dense.map(str::parse).transpose()?.into_iter().collect();
                    recipe.factor.storage = Some(storage);
                    points.push(recipe);
                }
            }
        }
    }
    Ok(points)
}
