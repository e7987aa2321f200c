//! Times every route on one generated matrix of an 8x7B model's size and prints its excess error over the optimum:
//! `cargo run --release -p lowrank-bench --bin true_size [rows cols rank]`.
//!
//! The matrix is what trained experts look like: a noise floor with a power-law head, rounded to bf16.

use lowrank_compute::{Accumulate, Backend, Faer, Kernels};
use lowrank_model::{Dtype, Spectrum, Tensor};
use lowrank_svd::residual::residual_energy;
use lowrank_svd::{MethodChoice, PrecisionChoice, SvdOptions, factor, spectrum};
use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::time::Instant;

fn generated(rows: usize, cols: usize) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(2479);
    // Sums of four uniform numbers: near enough to normal, variance 1/3.
    let mut noise = |rows, cols, scale: f32| {
        Array2::from_shape_simple_fn((rows, cols), || {
            let bytes = rng.next_u32().to_le_bytes();
            scale * bytes.iter().map(|&byte| (f32::from(byte) - 127.5) / 256.0).sum::<f32>()
        })
    };
    let head = cols.min(rows) / 8;
    let (mut a, b) = (noise(rows, head, 1.0), noise(head, cols, 1.0));
    for (k, mut column) in a.columns_mut().into_iter().enumerate() {
        column *= 0.01 * (k as f32 + 1.0).powf(-0.6);
    }
    let mut w = noise(rows, cols, 0.03);
    let kernels: &dyn Kernels<f32> = &Faer;
    kernels.gemm(a.view(), b.view(), w.view_mut(), Accumulate::Add);
    Tensor::from_f32(vec![rows, cols], Dtype::Bf16, w.as_slice().expect("row-major")).expect("fits its shape")
}

fn timed<R>(what: &str, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    println!("{what}: {:.2} s", start.elapsed().as_secs_f64());
    result
}

fn report(backend: &dyn Backend, w: &Tensor, rank: usize, options: SvdOptions<'_>, exact: &Spectrum) {
    let start = Instant::now();
    // The projector needs a threshold; the others do without a spectrum.
    let spectrum = (options.method == MethodChoice::Projector).then_some(exact);
    let options = SvdOptions { spectrum, ..options };
    let factored = factor(backend, w, rank, &options).expect("the matrix is finite");
    let seconds = start.elapsed().as_secs_f64();
    let error = (residual_energy(backend, w, &factored.factors) / exact.energy()).sqrt();
    println!(
        "rank {rank}, {}: {seconds:.2} s, error {error:.6}, excess {:.2e}, reported error off by {:.1e}",
        factored.route,
        error / exact.relative_error(rank) - 1.0,
        factored.relative_error / error - 1.0,
    );
}

fn main() {
    let given: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let &[rows, cols, rank] = given.as_slice() else {
        return run(14336, 4096, 2479);
    };
    run(rows, cols, rank);
}

fn run(rows: usize, cols: usize, rank: usize) {
    let backend = &Faer;
    let w = timed("generate", || generated(rows, cols));
    let [exact, auto] = [("spectrum f64", PrecisionChoice::F64), ("spectrum auto", PrecisionChoice::Auto)]
        .map(|(what, precision)| {
            let options = SvdOptions { precision, ..SvdOptions::default() };
            timed(what, || spectrum(backend, &w, &options)).expect("finite").0
        });
    let sigma = exact.sigma();
    println!("σ₁/σᵣ {:.1}, σ₁/σₙ {:.1}", sigma[0] / sigma[rank - 1], sigma[0] / sigma[sigma.len() - 1]);
    println!(
        "predicted error at rank {rank} off by {:.1e}",
        auto.relative_error(rank) / exact.relative_error(rank) - 1.0
    );
    for method in [MethodChoice::Exact, MethodChoice::Projector] {
        for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
            report(backend, &w, rank, SvdOptions { method, precision, ..Default::default() }, &exact);
        }
    }
    let short = rows.min(cols);
    for rank in [short / 64, short / 32, short / 20, short / 10] {
        for power_iterations in [1, 2, 4] {
            let method = MethodChoice::Randomized;
            let options = SvdOptions { method, power_iterations, ..SvdOptions::default() };
            report(backend, &w, rank.max(1), options, &exact);
        }
    }
}
