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

mod generated;
mod parity;
mod results;
mod routes;
mod speed;
mod summary;

use generated::{Sizes, sizes};
use lowrank_compute::cuda::Cuda;
use parity::{algebra_parity, forward_parity, layer_parity, repeatability};
use results::{Failure, Results};
use serde_json::Map;
use speed::{layer_speed, steps, whole_matrices};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use summary::summary;

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
        ["--summary", out] => summary(&PARTS.map(|(part, _)| part), Path::new(out)),
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
