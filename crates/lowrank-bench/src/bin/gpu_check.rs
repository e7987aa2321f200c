//! Parity with the CPU and speed on a GPU, of the folder that `cargo xtask gpu-check` collects. `run.sh` there calls
//!
//! - `gpu_check --device`: which device there is; exit code 3: no CUDA here
//! - `gpu_check --parts`: the names below
//! - `gpu_check PART FIXTURES OUT [--small]`: one part, written to OUT/PART.json and OUT/PART.md as it goes; exit code 1: not
//!   equal, or stopped. A part is a process of its own: what breaks one does not break the next.
//! - `gpu_check --summary OUT`: all parts in OUT/results.md and OUT/results.json, and the rows of `docs/gpu.md`
//!
//! | Part | What |
//! |---|---|
//! | `forward` | every fixture on the CPU and on the device: logits within 10⁻³ in f32 |
//! | `layer` | the same for one generated decoder layer |
//! | `algebra` | spectrum and factors of a generated matrix: error within 10⁻⁵ of the optimum, by every route |
//! | `repeat` | the same bits in a second run, alone and beside others |
//! | `steps` | peaks of the device, and every step of a factorisation as a share of them |
//! | `matrices` | whole matrices, host to host, by every route on several lanes |
//! | `speed` | one decoder layer |
//!
//! Sizes are an 8x7B model's; `--small`: tiny ones, to try the program itself.

use lowrank_compute::cuda::measure::{self, Measurement};
use lowrank_compute::cuda::{Cuda, WeightProducts};
use lowrank_compute::{Accumulate, Backend, Faer, Kernels, Split};
use lowrank_forward::cuda::CudaEngine;
use lowrank_forward::engine::{StoredAttention, StoredExpert, StoredRouter};
use lowrank_forward::{Cpu, Engine, Forward, Hidden};
use lowrank_model::{Dtype, ModelConfig, Spectrum, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::residual::residual_energy;
use lowrank_svd::{Factored, MethodChoice, Metric, PrecisionChoice, SvdError, SvdOptions};
use lowrank_svd::{factor, interpolative};
use ndarray::Array2;
use serde_json::{Map, Value, json};
use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Failure = Box<dyn Error + Send + Sync>;

/// Largest difference of logits, as a share of the largest logit.
const LOGITS_TOLERANCE: f64 = 1e-3;
/// Largest excess of the factors' error over the optimum.
const EXCESS_TOLERANCE: f64 = 1e-5;
/// Expert matrices of an 8x7B model.
const MIXTRAL_MATRICES: f64 = 768.0;
/// No further route is timed when a part has taken this long.
const TIMING_MAX: Duration = Duration::from_secs(120);
/// A route is timed once more while this is not spent, three times at most.
const ROUTE_MAX: Duration = Duration::from_secs(6);

/// The ways to factors that are held against each other.
const ROUTES: [(&str, MethodChoice, PrecisionChoice); 4] = [
    ("eigenvectors, f32", MethodChoice::Exact, PrecisionChoice::F32),
    ("eigenvectors, f64", MethodChoice::Exact, PrecisionChoice::F64),
    ("projector, f32", MethodChoice::Projector, PrecisionChoice::F32),
    ("projector, f64", MethodChoice::Projector, PrecisionChoice::F64),
];

/// Sizes of what is generated.
struct Sizes {
    matrix: (usize, usize),
    rank: usize,
    peak: usize,
    tokens: usize,
    window: usize,
    /// Threads at once; calibrated routes on the second number alone.
    lanes: &'static [usize],
    config: ModelConfig,
}

fn sizes(small: bool) -> Sizes {
    let mixtral = ModelConfig::from_hf_json(&json!({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000,
    }))
    .expect("the dimensions of a real model");
    if !small {
        // Rank 2479: what removing 10 B of an 8x7B model's parameters comes to.
        return Sizes {
            matrix: (14336, 4096),
            rank: 2479,
            peak: 8192,
            tokens: 4096,
            window: 256,
            lanes: &[1, 8, 4, 2],
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
    Sizes { matrix: (120, 80), rank: 40, peak: 64, tokens: 64, window: 16, lanes: &[1, 3], config }
}

/// What a part has found so far: for machines, and for people. Written as it grows.
struct Results {
    out: PathBuf,
    part: &'static str,
    json: Map<String, Value>,
    text: String,
    /// What was judged and is not equal.
    unequal: Vec<String>,
}

impl Results {
    fn line(&mut self, text: impl AsRef<str>) {
        println!("{}", text.as_ref());
        self.text.push_str(text.as_ref());
        self.text.push('\n');
    }

    fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<(), Failure> {
        self.json.insert(key.into(), value.into());
        self.save()
    }

    fn save(&self) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.out)?;
        std::fs::write(self.out.join(self.part).with_extension("md"), &self.text)?;
        let document = serde_json::to_string_pretty(&self.json)?;
        Ok(std::fs::write(self.out.join(self.part).with_extension("json"), document)?)
    }

    fn judge(&mut self, what: &str, value: f64, limit: f64) -> Result<(), Failure> {
        // Written so that NaN fails.
        let equal = value <= limit;
        if !equal {
            self.unequal.push(format!("{what}: {value:.1e}"));
        }
        let verdict = if equal { "yes" } else { "**NO**" };
        self.line(format!("| {what} | {value:.1e} | {limit:.0e} | {verdict} |"));
        self.save()
    }

    fn parity_table(&mut self, title: &str) {
        self.line(format!("## {title}\n\n| what | difference | allowed | equal |\n|---|---|---|---|"));
    }
}

type Part = fn(&Cuda, &Path, &Sizes, &mut Results) -> Result<(), Failure>;

const PARTS: [(&str, Part); 7] = [
    ("forward", forward_parity),
    ("layer", layer_parity),
    ("algebra", algebra_parity),
    ("repeat", repeatability),
    ("steps", steps),
    ("matrices", whole_matrices),
    ("speed", layer_speed),
];

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let small = arguments.iter().any(|argument| argument == "--small");
    arguments.retain(|argument| argument != "--small");
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--device"] => {
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
        ["--parts"] => {
            PARTS.iter().for_each(|(name, _)| println!("{name}"));
            return ExitCode::SUCCESS;
        }
        ["--summary", out] => summary(Path::new(out)),
        [name, fixtures, out] => match PARTS.iter().find(|(part, _)| part == name) {
            Some(&(part, run)) => one_part(part, run, Path::new(fixtures), Path::new(out), &sizes(small)),
            None => Err(format!("{name} is none of --parts").into()),
        },
        _ => Err("usage: gpu_check --device | --parts | PART FIXTURES OUT [--small] | --summary OUT".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn one_part(
    part: &'static str,
    run: Part,
    fixtures: &Path,
    out: &Path,
    sizes: &Sizes,
) -> Result<(), Failure> {
    let cuda = Cuda::new()?;
    let mut results =
        Results { out: out.into(), part, json: Map::new(), text: String::new(), unequal: Vec::new() };
    results.set("device", cuda.device().describe())?;
    results.set("finished", false)?;
    let start = Instant::now();
    let ran = run(&cuda, fixtures, sizes, &mut results);
    if let Err(error) = &ran {
        results.line(format!("\n**stopped: {error}**"));
        results.set("stopped", error.to_string())?;
    }
    let fallbacks = cuda.fallbacks();
    if let Some(first) = &fallbacks.first {
        results.line(format!(
            "\n**{} operations were computed by the CPU in place of the device, the first because of: {first}**",
            fallbacks.operations
        ));
    }
    results.set("fallbacks", fallbacks.operations)?;
    results.set("seconds", start.elapsed().as_secs_f64())?;
    results.set("unequal", results.unequal.clone())?;
    results.set("finished", ran.is_ok())?;
    ran?;
    if !results.unequal.is_empty() {
        return Err(format!("not equal: {}", results.unequal.join("; ")).into());
    }
    if fallbacks.operations > 0 {
        return Err("the CPU did the device's work".into());
    }
    Ok(())
}

// ---- the summary ---------------------------------------------------------------------------------------------------------

/// A number as it is shown: short, and never in the form 0.000.
fn shown(value: f64) -> String {
    match value {
        value if value != 0.0 && value.abs() < 1e-2 => format!("{value:.1e}"),
        value if value.abs() < 10.0 => format!("{value:.2}"),
        value => format!("{value:.0}"),
    }
}

fn summary(out: &Path) -> Result<(), Failure> {
    let mut all = Map::new();
    let mut text = String::from("# GPU check\n\n");
    for (part, _) in PARTS {
        let read = std::fs::read(out.join(part).with_extension("json")).map_err(Failure::from);
        let document = read.and_then(|bytes| Ok(serde_json::from_slice::<Value>(&bytes)?));
        let document = document.unwrap_or_else(|error| json!({ "stopped": format!("not run: {error}") }));
        all.insert(part.into(), document);
    }
    let device = all.values().find_map(|part| part["device"].as_str()).unwrap_or("no device").to_owned();
    text.push_str(&format!("{device}\n\n## Rows of docs/gpu.md\n\n| What | {device} |\n|---|---|\n"));
    for (what, value) in rows(&all) {
        let value = value.unwrap_or_else(|| "not run".into());
        writeln!(text, "| {what} | {value} |")?;
    }
    for (part, document) in &all {
        writeln!(text, "\n# {part}\n")?;
        match std::fs::read_to_string(out.join(part).with_extension("md")) {
            Ok(found) => text.push_str(&found),
            Err(_) => writeln!(text, "not run")?,
        }
        if document["finished"] != true {
            writeln!(text, "\n**{part} did not come to its end: {}**", document["stopped"])?;
        }
    }
    std::fs::write(out.join("results.md"), text)?;
    Ok(std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&all)?)?)
}

/// The rows of `docs/gpu.md` that these results fill; nothing where they do not.
fn rows(all: &Map<String, Value>) -> Vec<(&'static str, Option<String>)> {
    let number = |part: &str, key: &str| all.get(part)?.get(key)?.as_f64();
    let list = |part: &str, key: &str| -> Vec<&Value> {
        all.get(part).and_then(|part| part.get(key)?.as_array()).into_iter().flatten().collect()
    };
    let joined = |parts: Vec<String>| (!parts.is_empty()).then(|| parts.join(", "));
    let figures = |key: &str, show: &dyn Fn(&Value) -> String, names: &[&str]| {
        let found = list("steps", key);
        let wanted = |figure: &&&Value| {
            let name = figure["name"].as_str().unwrap_or_default();
            names.iter().any(|wanted| name.starts_with(wanted))
        };
        joined(found.iter().filter(wanted).map(|figure| show(figure)).collect())
    };
    let speed = |figure: &Value| match (figure["tflops"].as_f64(), figure["gb_per_s"].as_f64()) {
        (Some(tflops), _) if tflops > 0.0 => format!("{} TFLOP/s", shown(tflops)),
        (_, gb) => format!("{} GB/s", shown(gb.unwrap_or(f64::NAN))),
    };
    let time = |figure: &Value| {
        let share = figure["share"].as_f64().map_or("–".into(), |share| format!("{:.0} %", 100.0 * share));
        format!("{} ({share})", shown(figure["ms"].as_f64().unwrap_or(f64::NAN)))
    };
    let routes = |lanes: u64, key: &str| {
        let rows = list("matrices", "routes");
        let rows = rows.iter().filter(|row| row["lanes"] == lanes);
        joined(rows.map(|row| shown(row[key].as_f64().unwrap_or(f64::NAN))).collect())
    };
    vec![
        ("logits, GPU against CPU, f32 (allowed: 10⁻³)", number("forward", "worst").map(shown)),
        (
            "excess error of factors: eigenvectors f32, f64; projector f32, f64 (allowed: 10⁻⁵)",
            joined(list("algebra", "excess").iter().filter_map(|v| v.as_f64().map(shown)).collect()),
        ),
        ("numbers that differ in a second run (allowed: 0)", number("repeat", "differing").map(shown)),
        ("peak: products in bf16, f32, f64", figures("peaks", &speed, &["product"])),
        (
            "peak: copies to the device (pinned, not pinned), from it, within it",
            figures("peaks", &speed, &["copy"]),
        ),
        (
            "ms per 14336 × 4096 matrix (share of peak): upload; Gram bf16, f32, f64",
            figures("steps", &time, &["upload, bf16", "Gram"]),
        ),
        (
            "ms: eigenvalues, eigenvectors, f32; f64",
            figures("steps", &time, &["eigenvalues", "eigenvectors"]),
        ),
        (
            "ms: span of the first r eigenvectors by products (projector), f32; f64",
            figures("steps", &time, &["upper"]),
        ),
        ("ms: projection at rank 2479, f32; f64", figures("steps", &time, &["projection"])),
        (
            "s per matrix, host to host, one at a time: eigenvectors f32, f64; projector f32, f64",
            routes(1, "s_per_matrix"),
        ),
        (
            "the same, 8 at a time; then calibrated and pivoted: eigenvectors, projector",
            routes(8, "s_per_matrix"),
        ),
        ("min for 768 matrices, 8 at a time", routes(8, "minutes_768")),
        (
            "tokens/s of one decoder layer in an 8x7B model's dimensions, f32, bf16",
            joined(
                list("speed", "layer")
                    .iter()
                    .filter_map(|row| row["tokens_per_s"].as_f64().map(shown))
                    .collect(),
            ),
        ),
    ]
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

fn forward_parity(_: &Cuda, fixtures: &Path, _: &Sizes, results: &mut Results) -> Result<(), Failure> {
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

fn options((_, method, precision): (&str, MethodChoice, PrecisionChoice)) -> SvdOptions<'static> {
    SvdOptions { method, precision, ..SvdOptions::default() }
}

fn spectrum(backend: &dyn Backend, w: &Tensor, precision: PrecisionChoice) -> Result<Spectrum, SvdError> {
    let options = SvdOptions { precision, ..SvdOptions::default() };
    Ok(lowrank_svd::spectrum(backend, w, &options)?.0)
}

fn algebra_parity(cuda: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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

fn repeatability(cuda: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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
    router: StoredRouter,
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
        router: StoredRouter {
            weights: weights(config.num_local_experts, h, 6),
            rule: config.block.router,
            experts_per_token: config.num_experts_per_tok,
        },
        experts: (0..config.num_local_experts as u64)
            .map(|e| StoredExpert {
                gate: dense(f, h, 10 + 3 * e),
                down: dense(h, f, 11 + 3 * e),
                up: dense(f, h, 12 + 3 * e),
            })
            .collect(),
    }
}

fn states(config: &ModelConfig, tokens: usize, window: usize) -> Hidden {
    let mut noise = Noise(77);
    let values = (0..tokens * config.hidden_size).map(|_| noise.next()).collect();
    Hidden::new(values, &vec![window; tokens / window], config.hidden_size)
}

/// Seconds of attention and of the MoE block, and its output.
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
    let mut moe = engine.moe(&inputs, &layer.router)?;
    for (expert, weights) in layer.experts.into_iter().enumerate() {
        moe.expert((0, expert), weights, &mut ())?;
    }
    let output = moe.outputs()?.remove(0);
    Ok(([attention_s, start.elapsed().as_secs_f64()], output))
}

fn layer_parity(_: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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

// ---- speed --------------------------------------------------------------------------------------------------------------

fn steps(cuda: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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

fn row(figure: &Measurement, peaks: &[Measurement], results: &mut Results) -> Value {
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
fn per_matrix(lanes: usize, work: &(dyn Fn() -> Result<(), Failure> + Sync)) -> Result<f64, Failure> {
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

fn whole_matrices(cuda: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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

fn layer_speed(_: &Cuda, _: &Path, sizes: &Sizes, results: &mut Results) -> Result<(), Failure> {
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
