//! Parity with the CPU and speed on a GPU: `gpu_check FIXTURES OUT [--small]`, of the folder that `cargo xtask gpu-check`
//! collects. `gpu_check --device` only says which device there is.
//!
//! 1. The forward pass of every fixture, on the CPU and on the device: logits within 10⁻³ in f32.
//! 2. Spectrum and factors of a generated matrix: error within 10⁻⁵ of the optimum.
//! 3. Peaks of the device, every step of a factorisation, whole matrices on several lanes, and one decoder layer, in
//!    Mixtral-8x7B's dimensions (`--small`: tiny ones, to try the program itself).
//!
//! Writes OUT/results.json and OUT/results.md. Exit code 3: no CUDA here; 1: not equal.

use lowrank_compute::cuda::{Cuda, WeightProducts, measure};
use lowrank_compute::{Accumulate, Backend, Faer, Kernels};
use lowrank_forward::cuda::CudaEngine;
use lowrank_forward::engine::{StoredAttention, StoredExpert};
use lowrank_forward::{Cpu, Engine, Forward, Hidden};
use lowrank_model::{Dtype, ModelConfig, Tensor};
use lowrank_reader::{Checkpoint, StoredMatrix};
use lowrank_svd::factor::residual_energy;
use lowrank_svd::{FactorOptions, MethodChoice, PrecisionChoice, factor, spectrum};
use ndarray::Array2;
use serde_json::{Map, Value, json};
use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

type Failure = Box<dyn Error>;

/// Largest difference of logits, as a share of the largest logit.
const LOGITS_TOLERANCE: f64 = 1e-3;
/// Largest excess of the factors' error over the optimum.
const EXCESS_TOLERANCE: f64 = 1e-5;
/// Matrices of Mixtral-8x7B.
const MIXTRAL_MATRICES: f64 = 768.0;

/// Sizes of what is generated.
struct Sizes {
    matrix: (usize, usize),
    rank: usize,
    peak: usize,
    tokens: usize,
    window: usize,
    config: ModelConfig,
}

fn sizes(small: bool) -> Sizes {
    let mixtral = ModelConfig {
        hidden_size: 4096,
        intermediate_size: 14336,
        num_hidden_layers: 1,
        num_local_experts: 8,
        num_experts_per_tok: 2,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        vocab_size: 32000,
        max_position_embeddings: 32768,
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        sliding_window: None,
        tie_word_embeddings: false,
    };
    if !small {
        // Rank 2479: what 10 B of Mixtral-8x7B comes to.
        return Sizes {
            matrix: (14336, 4096),
            rank: 2479,
            peak: 8192,
            tokens: 4096,
            window: 256,
            config: mixtral,
        };
    }
    let config = ModelConfig {
        hidden_size: 64,
        intermediate_size: 96,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 8,
        ..mixtral
    };
    Sizes { matrix: (120, 80), rank: 40, peak: 64, tokens: 64, window: 16, config }
}

/// Results as they come in: for machines, and for people.
#[derive(Default)]
struct Results {
    json: Map<String, Value>,
    text: String,
    equal: bool,
}

impl Results {
    fn line(&mut self, text: impl AsRef<str>) {
        println!("{}", text.as_ref());
        self.text.push_str(text.as_ref());
        self.text.push('\n');
    }

    fn judge(&mut self, what: &str, value: f64, limit: f64) {
        // Written so that NaN fails.
        let equal = value <= limit;
        self.equal &= equal;
        self.line(format!(
            "| {what} | {value:.1e} | {limit:.0e} | {} |",
            if equal { "yes" } else { "**NO**" }
        ));
    }
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|argument| argument == "--small");
    arguments.retain(|argument| argument != "--small");
    if arguments == ["--device"] {
        return match Cuda::new() {
            Ok(cuda) => {
                println!("{}; libraries from {}", cuda.device().describe(), cuda.device().libraries());
                ExitCode::SUCCESS
            }
            Err(why) => {
                println!("{why}");
                ExitCode::from(3)
            }
        };
    }
    let [fixtures, out] = arguments.as_slice() else {
        eprintln!("usage: gpu_check FIXTURES OUT [--small] | gpu_check --device");
        return ExitCode::from(2);
    };
    let (fixtures, out) = (PathBuf::from(fixtures), PathBuf::from(out));
    let cuda = match Cuda::new() {
        Ok(cuda) => cuda,
        Err(why) => {
            println!("{why}");
            let text = format!("# GPU check\n\nnot run: {why}\n");
            let written = std::fs::create_dir_all(&out)
                .and_then(|()| std::fs::write(out.join("results.md"), text))
                .and_then(|()| {
                    std::fs::write(out.join("results.json"), json!({ "not_run": why.why }).to_string())
                });
            return if written.is_ok() { ExitCode::from(3) } else { ExitCode::FAILURE };
        }
    };
    let mut results = Results { equal: true, ..Results::default() };
    let run = check(&cuda, &fixtures, &sizes(small), &mut results);
    if let Err(error) = &run {
        results.line(format!("\n**stopped: {error}**"));
        results.json.insert("stopped".into(), json!(error.to_string()));
    }
    results.json.insert("equal".into(), json!(results.equal && run.is_ok()));
    let document = serde_json::to_string_pretty(&results.json).unwrap_or_default();
    let written = std::fs::create_dir_all(&out)
        .and_then(|()| std::fs::write(out.join("results.md"), &results.text))
        .and_then(|()| std::fs::write(out.join("results.json"), document));
    if let Err(error) = written {
        eprintln!("{}: {error}", out.display());
        return ExitCode::FAILURE;
    }
    if results.equal && run.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check(cuda: &Cuda, fixtures: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    let device = cuda.device();
    results.line(format!("# GPU check\n\n{}; libraries from {}\n", device.describe(), device.libraries()));
    results.json.insert("device".into(), json!(device.describe()));
    results.line("## Parity with the CPU\n\n| what | difference | allowed | equal |\n|---|---|---|---|");
    forward_parity(fixtures, results)?;
    layer_parity(sizes, results)?;
    let w = generated(sizes.matrix, 1);
    let optimum = spectrum(&Faer, &w, PrecisionChoice::F64)?;
    linear_algebra_parity(cuda, &w, sizes.rank, &optimum, results)?;

    let lane = device.lane()?;
    results.line("\n## Peaks\n\n| what | ms | TFLOP/s | GB/s |\n|---|---|---|---|");
    let peaks = measure::peaks(&lane, sizes.peak)?;
    table(&peaks, "peaks", results);
    let (m, n) = sizes.matrix;
    results.line(format!(
        "\n## Steps for one {m} × {n} matrix\n\n| what | ms | TFLOP/s | GB/s |\n|---|---|---|---|"
    ));
    table(&measure::steps(&lane, &w, sizes.rank)?, "steps", results);
    drop(lane);
    whole_matrices(cuda, &w, sizes.rank, results)?;
    layer_speed(sizes, results)?;
    let fallbacks = cuda.fallbacks();
    results
        .line(format!("\nComputed by the CPU in place of the device: {} operations.", fallbacks.operations));
    if let Some(first) = fallbacks.first {
        results.line(format!("The first, because of: {first}"));
    }
    results.json.insert("fallbacks".into(), json!(fallbacks.operations));
    Ok(())
}

fn table(figures: &[measure::Figure], key: &str, results: &mut Results) {
    let mut rows = Vec::new();
    for figure in figures {
        let rate = |value: f64| if value > 0.0 { format!("{value:.1}") } else { String::new() };
        let (tflops, gb) = (figure.tflops(), figure.gb_per_s());
        let mut row = String::new();
        let _ =
            write!(row, "| {} | {:.3} | {} | {} |", figure.name, figure.milliseconds, rate(tflops), rate(gb));
        results.line(row);
        rows.push(
            json!({ "name": figure.name, "ms": figure.milliseconds, "tflops": tflops, "gb_per_s": gb }),
        );
    }
    results.json.insert(key.into(), Value::Array(rows));
}

// ---- parity -----------------------------------------------------------------------------------------------------------

/// Largest difference as a share of the largest value; NaN is never equal.
fn difference(actual: &[f32], expected: &[f32]) -> f64 {
    if actual.len() != expected.len() || actual.iter().chain(expected).any(|value| !value.is_finite()) {
        return f64::NAN;
    }
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let worst = actual.iter().zip(expected).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
    f64::from(worst) / f64::from(largest.max(f32::MIN_POSITIVE))
}

fn forward_parity(fixtures: &Path, results: &mut Results) -> Result<(), Failure> {
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
        results.judge(
            &format!("logits of {name}, f32"),
            difference(&logits(&exact)?, &expected),
            LOGITS_TOLERANCE,
        );
        // For information: bf16 rounds the inputs of every product.
        let rounded = difference(&logits(&fast)?, &expected);
        results.line(format!("| logits of {name}, bf16 products | {rounded:.1e} | | |"));
    }
    Ok(())
}

fn linear_algebra_parity(
    cuda: &Cuda,
    w: &Tensor,
    rank: usize,
    optimum: &lowrank_model::Spectrum,
    results: &mut Results,
) -> Result<(), Failure> {
    let on_device = spectrum(cuda, w, PrecisionChoice::Auto)?;
    let worst = (1..optimum.sigma().len())
        .map(|rank| (on_device.relative_error(rank) / optimum.relative_error(rank) - 1.0).abs())
        .fold(0.0, f64::max);
    results.judge("predicted error, worst of all ranks", worst, 1e-3);
    for (name, precision) in [("f32", PrecisionChoice::F32), ("f64", PrecisionChoice::F64)] {
        let options = FactorOptions { method: MethodChoice::Exact, precision, ..FactorOptions::default() };
        let factored = factor(cuda, w, rank, &options, None)?;
        // Recomputed by the CPU.
        let error = (residual_energy(&Faer, w, &factored.factors) / optimum.energy()).sqrt();
        let excess = error / optimum.relative_error(rank) - 1.0;
        results.judge(&format!("excess error of factors at rank {rank}, {name}"), excess, EXCESS_TOLERANCE);
    }
    Ok(())
}

// ---- a generated matrix and layer ---------------------------------------------------------------------------------------

/// xorshift64: quick, and good enough for weights.
struct Noise(u64);

impl Noise {
    /// Uniform in [-1, 1).
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Like a trained expert: a noise floor and a power-law head, in bf16.
fn generated((rows, cols): (usize, usize), seed: u64) -> Tensor {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut draw =
        |rows, cols, scale: f32| Array2::from_shape_simple_fn((rows, cols), || scale * noise.next());
    let head = rows.min(cols) / 8;
    let (mut a, b) = (draw(rows, head, 1.0), draw(head, cols, 1.0));
    for (k, mut column) in a.columns_mut().into_iter().enumerate() {
        column *= 0.01 * (k as f32 + 1.0).powf(-0.6);
    }
    let mut w = draw(rows, cols, 0.03);
    let kernels: &dyn Kernels<f32> = &Faer;
    kernels.gemm(a.view(), b.view(), w.view_mut(), Accumulate::Add);
    Tensor::from_f32(vec![rows, cols], Dtype::Bf16, w.as_slice().expect("row-major")).expect("fits its shape")
}

/// Noise of the size that keeps the variance of what passes through.
fn weights(rows: usize, cols: usize, seed: u64) -> Tensor {
    let mut noise = Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let scale = (3.0 / cols as f32).sqrt();
    let bytes = (0..rows * cols)
        .flat_map(|_| (((scale * noise.next()).to_bits() >> 16) as u16).to_le_bytes())
        .collect();
    Tensor::new(vec![rows, cols], Dtype::Bf16, bytes).expect("as many as the shape says")
}

struct Layer {
    attention: StoredAttention,
    router: Tensor,
    experts: Vec<StoredExpert>,
}

fn layer(config: &ModelConfig) -> Layer {
    let (h, f, d) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * d, config.num_key_value_heads * d);
    let ones = Tensor::from_f32(vec![h], Dtype::Bf16, &vec![1.0; h]).expect("h ones");
    let dense = |rows, cols, seed| StoredMatrix::Dense(weights(rows, cols, seed));
    Layer {
        attention: StoredAttention {
            norm: ones,
            query: weights(q, h, 2),
            key: weights(kv, h, 3),
            value: weights(kv, h, 4),
            output: weights(h, q, 5),
        },
        router: weights(config.num_local_experts, h, 6),
        experts: (0..config.num_local_experts as u64)
            .map(|e| StoredExpert {
                w1: dense(f, h, 10 + 3 * e),
                w2: dense(h, f, 11 + 3 * e),
                w3: dense(f, h, 12 + 3 * e),
            })
            .collect(),
    }
}

fn states(config: &ModelConfig, tokens: usize, window: usize) -> Hidden {
    let mut noise = Noise(77);
    let values = (0..tokens * config.hidden_size).map(|_| noise.next()).collect();
    Hidden::new(values, &vec![window; tokens / window], config.hidden_size)
}

/// Seconds of attention and of the mixture, and the mixture's output.
fn run_layer(
    engine: &dyn Engine,
    config: &ModelConfig,
    layer: Layer,
    hidden: &mut Hidden,
) -> Result<([f64; 2], Vec<f32>), Failure> {
    let start = Instant::now();
    engine.attention(config, layer.attention, hidden)?;
    let attention_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let input = engine.norm(hidden.states(), &vec![1.0; config.hidden_size], config.rms_norm_eps as f32)?;
    let inputs = [input.as_slice()];
    let mut mixture = engine.mixture(&inputs, &layer.router, config.num_experts_per_tok)?;
    for (expert, weights) in layer.experts.into_iter().enumerate() {
        mixture.expert((0, expert), weights, &mut ())?;
    }
    let output = mixture.outputs()?.remove(0);
    Ok(([attention_s, start.elapsed().as_secs_f64()], output))
}

fn layer_parity(sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    let config = &sizes.config;
    let (mut on_cpu, mut on_device) = (states(config, sizes.window, sizes.window / 2), None);
    let (_, expected) = run_layer(&Cpu, config, layer(config), &mut on_cpu)?;
    let engine = CudaEngine::new()?;
    let hidden = on_device.insert(states(config, sizes.window, sizes.window / 2));
    let (_, output) = run_layer(&engine, config, layer(config), hidden)?;
    let attention = difference(hidden.states(), on_cpu.states());
    results.judge("a generated layer, after attention, f32", attention, LOGITS_TOLERANCE);
    // Tokens whose second and third expert are equal to rounding may be routed apart: compare all others.
    let h = config.hidden_size;
    let apart = output
        .chunks(h)
        .zip(expected.chunks(h))
        .filter(|(a, b)| difference(a, b).partial_cmp(&LOGITS_TOLERANCE) != Some(std::cmp::Ordering::Less))
        .count();
    let share = apart as f64 / (output.len() / h) as f64;
    results.judge("a generated layer, share of tokens mixed differently, f32", share, 0.01);
    Ok(())
}

// ---- speed --------------------------------------------------------------------------------------------------------------

fn whole_matrices(cuda: &Cuda, w: &Tensor, rank: usize, results: &mut Results) -> Result<(), Failure> {
    results.line(
        "\n## Whole matrices, spectrum and factors, host to host\n\n| route | lanes | s per matrix | 768 matrices, min |\n|---|---|---|---|",
    );
    let mut rows = Vec::new();
    let backend: &dyn Backend = cuda;
    for (name, precision) in [("f32", PrecisionChoice::F32), ("f64", PrecisionChoice::F64)] {
        for lanes in [1, 2, 4, 8] {
            let options =
                FactorOptions { method: MethodChoice::Exact, precision, ..FactorOptions::default() };
            let work = || -> Result<(), String> {
                let spectrum = spectrum(backend, w, precision).map_err(|error| error.to_string())?;
                factor(backend, w, rank, &options, Some(&spectrum)).map_err(|error| error.to_string())?;
                Ok(())
            };
            let side_by_side = || -> Result<f64, String> {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..lanes).map(|_| scope.spawn(work)).collect();
                    threads
                        .into_iter()
                        .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
                })?;
                Ok(start.elapsed().as_secs_f64() / lanes as f64)
            };
            // The first makes the lanes.
            side_by_side()?;
            let seconds = side_by_side()?.min(side_by_side()?);
            let minutes = seconds * MIXTRAL_MATRICES / 60.0;
            results.line(format!("| exact, {name} | {lanes} | {seconds:.3} | {minutes:.1} |"));
            rows.push(
                json!({ "route": name, "lanes": lanes, "s_per_matrix": seconds, "minutes_768": minutes }),
            );
        }
    }
    results.json.insert("whole_matrices".into(), Value::Array(rows));
    Ok(())
}

fn layer_speed(sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
    let config = &sizes.config;
    results.line(format!(
        "\n## One decoder layer, {} tokens in windows of {}, weights from host memory\n\n| products | attention, s | mixture, s | tokens/s |\n|---|---|---|---|",
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
            json!({ "products": name, "attention_s": best[0], "mixture_s": best[1], "tokens_per_s": speed }),
        );
    }
    results.json.insert("layer".into(), Value::Array(rows));
    Ok(())
}
