//! Parts that hold the device against the CPU.

use crate::generated::{Sizes, generated, layer, states};
use crate::results::{Failure, Results};
use crate::routes::{ROUTES, options, run_layer, spectrum};
use lowrank_compute::Faer;
use lowrank_compute::cuda::{Cuda, WeightProducts};
use lowrank_forward::cuda::CudaEngine;
use lowrank_forward::{Cpu, Engine, Forward};
use lowrank_reader::Checkpoint;
use lowrank_svd::residual::residual_energy;
use lowrank_svd::{Factored, PrecisionChoice, SvdOptions, factor};
use std::path::{Path, PathBuf};

/// Largest difference of logits, as a share of the largest logit.
const LOGITS_TOLERANCE: f64 = 1e-3;
/// Largest excess of the factors' error over the optimum.
const EXCESS_TOLERANCE: f64 = 1e-5;
/// Largest difference as a share of the largest value; NaN is never equal.
pub(crate) fn difference(actual: &[f32], expected: &[f32]) -> f64 {
    if actual.len() != expected.len() || actual.iter().chain(expected).any(|value| !value.is_finite()) {
        return f64::NAN;
    }
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let worst = actual.iter().zip(expected).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
    f64::from(worst) / f64::from(largest.max(f32::MIN_POSITIVE))
}

pub(crate) fn forward_parity(
    _: &Cuda,
    fixtures: &Path,
    _: &Sizes,
    results: &mut Results,
) -> Result<(), Failure> {
    results.parity_table("Logits against the CPU");
    let mut worst = 0.0_f64;
    let mut directories = vec![fixtures.join("tiny-mixtral")];
    let mut golden: Vec<PathBuf> = std::fs::read_dir(fixtures.join("golden"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    golden.retain(|path| path.is_dir());
    golden.sort();
    directories.extend(golden);
    let exact = CudaEngine::new()?;
    let fast = CudaEngine::with_products(WeightProducts::Bf16)?;
    for directory in directories {
        let checkpoint = Checkpoint::open(&directory)?;
        let vocab = checkpoint.config().vocab_size;
        let sequences: Vec<Vec<u32>> = [40, 1, 17]
            .into_iter()
            .map(|length| (0..length).map(|i| ((i * i * 7 + i * 13 + length) % vocab) as u32).collect())
            .collect();
        let logits = |engine: &dyn Engine| -> Result<Vec<f32>, Failure> {
            let forward = Forward::on(&checkpoint, engine);
            let hidden = forward.run(&sequences, &mut ())?;
            let head = forward.head()?;
            let mut all = Vec::new();
            for sequence in 0..sequences.len() {
                all.extend(head.logits(&hidden, sequence)?);
            }
            Ok(all)
        };
        let expected = logits(&Cpu)?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let apart = difference(&logits(&exact)?, &expected);
        // NaN must stay.
        worst = if apart <= worst { worst } else { apart };
        results.judge(&format!("logits of {name}, f32"), apart, LOGITS_TOLERANCE)?;
        // For information: bf16 rounds the inputs of every product.
        let rounded = difference(&logits(&fast)?, &expected);
        results.line(format!("| logits of {name}, bf16 products | {rounded:.1e} | | |"));
    }
    results.set("worst", worst)
}

pub(crate) fn algebra_parity(
    cuda: &Cuda,
    _: &Path,
    sizes: &Sizes,
    results: &mut Results,
) -> Result<(), Failure> {
    let (m, n) = sizes.matrix;
    results.parity_table(&format!("One {m} × {n} matrix at rank {} against the CPU", sizes.rank));
    let w = generated(sizes.matrix, 1);
    let optimum = spectrum(&Faer, &w, PrecisionChoice::F64)?;
    let on_device = spectrum(cuda, &w, PrecisionChoice::Auto)?;
    let worst = (1..optimum.sigma().len())
        .map(|rank| (on_device.relative_error(rank) / optimum.relative_error(rank) - 1.0).abs())
        .fold(0.0, f64::max);
    results.judge("predicted error, worst of all ranks", worst, 1e-3)?;
    // Factored by the device one after another, and recomputed by the CPU side by side.
    let mut made: Vec<(&str, Factored)> = Vec::new();
    for route in ROUTES {
        let factored =
            factor(cuda, &w, sizes.rank, &SvdOptions { spectrum: Some(&on_device), ..options(route) })?;
        results.line(format!("| route asked for: {}; taken: {} | | | |", route.0, factored.route));
        made.push((route.0, factored));
    }
    let least = optimum.relative_error(sizes.rank);
    let energy = optimum.energy();
    let excess: Vec<f64> = std::thread::scope(|scope| {
        let threads: Vec<_> = made
            .iter()
            .map(|(_, made)| scope.spawn(|| (residual_energy(&Faer, &w, &made.factors) / energy).sqrt()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_or(f64::NAN, |error| error / least - 1.0))
            .collect()
    });
    for ((name, _), excess) in made.iter().zip(&excess) {
        results.judge(&format!("excess error, {name}"), *excess, EXCESS_TOLERANCE)?;
    }
    results.set("excess", excess)
}

pub(crate) fn repeatability(
    cuda: &Cuda,
    _: &Path,
    sizes: &Sizes,
    results: &mut Results,
) -> Result<(), Failure> {
    results.parity_table("A second run, alone and beside three others");
    let w = generated(sizes.matrix, 1);
    let bits = |route| -> Result<Vec<u64>, Failure> {
        let known = spectrum(cuda, &w, PrecisionChoice::Auto)?;
        let factors =
            factor(cuda, &w, sizes.rank, &SvdOptions { spectrum: Some(&known), ..options(route) })?.factors;
        let sigma = known.sigma().iter().map(|value| value.to_bits());
        let numbers = factors.u.iter().chain(&factors.v).map(|value| u64::from(value.to_bits()));
        Ok(sigma.chain(numbers).collect())
    };
    let mut differing = 0;
    for route in ROUTES {
        let first = bits(route)?;
        let others: Vec<Result<Vec<u64>, Failure>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| bits(route))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err("a thread panicked".into())))
                .collect()
        });
        let mut numbers = 0;
        for other in others {
            let other = other?;
            numbers +=
                first.iter().zip(&other).filter(|(a, b)| a != b).count() + first.len().abs_diff(other.len());
        }
        results.judge(&format!("numbers that differ, {}", route.0), numbers as f64, 0.0)?;
        differing += numbers;
    }
    results.set("differing", differing)
}

pub(crate) fn layer_parity(_: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    results.parity_table("One generated decoder layer against the CPU");
    let config = &sizes.config;
    let (mut on_cpu, mut on_device) = (states(config, sizes.window, sizes.window / 2), None);
    let (_, expected) = run_layer(&Cpu, config, layer(config), &mut on_cpu)?;
    let engine = CudaEngine::new()?;
    let hidden = on_device.insert(states(config, sizes.window, sizes.window / 2));
    let (_, output) = run_layer(&engine, config, layer(config), hidden)?;
    let attention = difference(hidden.states(), on_cpu.states());
    results.judge("a generated layer, after attention, f32", attention, LOGITS_TOLERANCE)?;
    // Tokens whose second and third expert are equal to rounding may be routed apart: compare all others.
    let h = config.hidden_size;
    let apart = output
        .chunks(h)
        .zip(expected.chunks(h))
        .filter(|(a, b)| difference(a, b).partial_cmp(&LOGITS_TOLERANCE) != Some(std::cmp::Ordering::Less))
        .count();
    let share = apart as f64 / (output.len() / h) as f64;
    results.judge("a generated layer, share of tokens mixed differently, f32", share, 0.01)
}
