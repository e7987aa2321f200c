//! Parts that measure time.

use crate::generated::{Noise, Sizes, generated, layer, states};
use crate::results::{Failure, Results};
use crate::routes::{ROUTES, options, run_layer, spectrum};
use lowrank_compute::cuda::measure::{self, Measurement};
use lowrank_compute::cuda::{Cuda, WeightProducts};
use lowrank_compute::{Faer, Kernels, Split};
use lowrank_forward::cuda::CudaEngine;
use lowrank_model::Spectrum;
use lowrank_svd::{MethodChoice, Metric, PrecisionChoice, SvdOptions, factor, interpolative};
use ndarray::Array2;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Expert matrices of an 8x7B model.
const MIXTRAL_MATRICES: f64 = 768.0;
/// No further route is timed when a part has taken this long.
const TIMING_MAX: Duration = Duration::from_secs(120);
/// A route is timed once more while this is not spent, three times at most.
const ROUTE_MAX: Duration = Duration::from_secs(6);

pub(crate) fn steps(cuda: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    let lane = cuda.device().lane()?;
    const HEAD: &str = "| what | ms | TFLOP/s | GB/s | share of peak |\n|---|---|---|---|---|";
    results.line(format!("## Peaks\n\n{HEAD}"));
    let peaks = measure::peaks(&lane, sizes.peak)?;
    let mut rows = Vec::new();
    for figure in &peaks {
        rows.push(row(figure, &peaks, results));
    }
    results.set("peaks", rows)?;
    let (m, n) = sizes.matrix;
    results.line(format!("\n## Steps for one {m} × {n} matrix\n\n{HEAD}"));
    let w = generated(sizes.matrix, 1);
    let sigma = spectrum(cuda, &w, PrecisionChoice::F64)?;
    let values: Vec<f64> = sigma.sigma().iter().map(|sigma| sigma * sigma).collect();
    let split = Split::after(sizes.rank, &values).ok_or("the generated matrix has no gap after its rank")?;
    let (mut rows, mut saved) = (Vec::new(), Ok(()));
    measure::steps(&lane, &w, &split, &mut |figure| {
        rows.push(row(&figure, &peaks, results));
        saved = results.set("steps", rows.clone());
    })?;
    saved
}

pub(crate) fn row(figure: &Measurement, peaks: &[Measurement], results: &mut Results) -> Value {
    let (tflops, gb, share) = (figure.tflops(), figure.gb_per_s(), figure.share_of(peaks));
    let rate = |value: f64| if value > 0.0 { format!("{value:.1}") } else { String::new() };
    let percent = share.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share));
    results.line(format!(
        "| {} | {:.3} | {} | {} | {percent} |",
        figure.name,
        figure.milliseconds,
        rate(tflops),
        rate(gb)
    ));
    json!({ "name": figure.name, "ms": figure.milliseconds, "tflops": tflops, "gb_per_s": gb, "share": share })
}

/// Median seconds per matrix of `work` on so many threads at once, after a run that is not timed.
pub(crate) fn per_matrix(
    lanes: usize,
    work: &(dyn Fn() -> Result<(), Failure> + Sync),
) -> Result<f64, Failure> {
    let side_by_side = || -> Result<f64, Failure> {
        let start = Instant::now();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..lanes).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
        })?;
        Ok(start.elapsed().as_secs_f64() / lanes as f64)
    };
    // The first makes the lanes.
    side_by_side()?;
    let start = Instant::now();
    let mut seconds = Vec::new();
    while seconds.is_empty() || (seconds.len() < 3 && start.elapsed() < ROUTE_MAX) {
        seconds.push(side_by_side()?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

pub(crate) fn whole_matrices(
    cuda: &Cuda,
    _: &Path,
    sizes: &Sizes,
    results: &mut Results,
) -> Result<(), Failure> {
    results.line(
        "## Whole matrices, spectrum and factors, host to host\n\n| route | lanes | s per matrix | 768 matrices, min |\n|---|---|---|---|",
    );
    let (w, rank) = (&generated(sizes.matrix, 1), sizes.rank);
    let moment = &moment(sizes.matrix.1);
    let weights = &vec![1.0; sizes.matrix.0];
    let metric =
        Metric::Inputs { second_moment: moment, row_weights: weights, shrinkage: 0.1, map: None, root: None };
    type Work<'a> = Box<dyn Fn() -> Result<(), Failure> + Sync + 'a>;
    let mut routes: Vec<(String, Work<'_>)> = Vec::new();
    for route in ROUTES {
        let work = move || -> Result<(), Failure> {
            let known: Spectrum = spectrum(cuda, w, route.2)?;
            factor(cuda, w, rank, &SvdOptions { spectrum: Some(&known), ..options(route) })?;
            Ok(())
        };
        routes.push((route.0.into(), Box::new(work)));
    }
    // What a job does that is told nothing else: errors in the norm of the activations, pivots of the CPU.
    for (name, method) in [("eigenvectors", MethodChoice::Exact), ("projector", MethodChoice::Projector)] {
        let work = move || -> Result<(), Failure> {
            let options = SvdOptions { metric, method, ..SvdOptions::default() };
            let (known, _) = lowrank_svd::spectrum(cuda, w, &options)?;
            let factored = factor(cuda, w, rank, &SvdOptions { spectrum: Some(&known), ..options })?;
            interpolative(cuda, &factored.factors)?;
            Ok(())
        };
        routes.push((format!("calibrated, pivoted, {name}"), Box::new(work)));
    }
    let (plain, calibrated) = routes.split_at(ROUTES.len());
    let plan = sizes.lanes.iter().flat_map(|&lanes| {
        // Pivots are slow on one core: on many lanes only.
        let calibrated = calibrated.iter().filter(move |_| lanes == sizes.lanes[1]);
        plain.iter().chain(calibrated).map(move |route| (lanes, route))
    });
    let (start, mut rows) = (Instant::now(), Vec::new());
    for (lanes, (name, work)) in plan {
        if start.elapsed() > TIMING_MAX {
            results.line(format!("| {name} | {lanes} | not run: no time left | |"));
            continue;
        }
        let seconds = per_matrix(lanes, work)?;
        let minutes = seconds * MIXTRAL_MATRICES / 60.0;
        results.line(format!("| {name} | {lanes} | {seconds:.3} | {minutes:.1} |"));
        rows.push(json!({ "route": name, "lanes": lanes, "s_per_matrix": seconds, "minutes_768": minutes }));
        results.set("routes", rows.clone())?;
    }
    Ok(())
}

/// Σ x xᵀ of activations that some features see more of than others.
fn moment(size: usize) -> Array2<f64> {
    let mut noise = Noise(99);
    let seen = Array2::from_shape_simple_fn((size + size / 8, size), || f64::from(noise.next()));
    let mut moment = Array2::zeros((size, size));
    let kernels: &dyn Kernels<f64> = &Faer;
    kernels.gram_add(&mut moment, seen.view());
    for ((i, j), value) in moment.indexed_iter_mut() {
        *value /= (1.0 + i as f64 / 64.0).sqrt() * (1.0 + j as f64 / 64.0).sqrt();
    }
    moment
}

pub(crate) fn layer_speed(_: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    let config = &sizes.config;
    results.line(format!(
        "## One decoder layer, {} tokens in windows of {}, weights from host memory\n\n| products | attention, s | MoE block, s | tokens/s |\n|---|---|---|---|",
        sizes.tokens, sizes.window
    ));
    let mut rows = Vec::new();
    for (name, products) in [("f32", WeightProducts::F32), ("bf16", WeightProducts::Bf16)] {
        let engine = CudaEngine::with_products(products)?;
        let mut best = [f64::INFINITY; 2];
        for _ in 0..3 {
            let mut hidden = states(config, sizes.tokens, sizes.window);
            let (seconds, _) = run_layer(&engine, config, layer(config), &mut hidden)?;
            best = [best[0].min(seconds[0]), best[1].min(seconds[1])];
        }
        let speed = sizes.tokens as f64 / (best[0] + best[1]);
        results.line(format!("| {name} | {:.3} | {:.3} | {speed:.0} |", best[0], best[1]));
        rows.push(
            json!({ "products": name, "attention_s": best[0], "moe_block_s": best[1], "tokens_per_s": speed }),
        );
    }
    results.set("layer", rows)
}
