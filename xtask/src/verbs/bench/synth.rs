//! `cargo xtask bench synth` generates an ordinary Mixtral directory with the dimensions of Mixtral-8x7B from a seed.

use crate::shell::{output, program, root, target};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of decoder layers; each takes 2.9 GB
    #[arg(long, default_value_t = 1)]
    layers: usize,
    /// Folder to write to; must not exist [default: target/bench/synth-LAYERS]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rows of the embedding and of the head; at least 1,024, as the tokenizer has (in Mixtral-8x7B they take 262 MB each)
    #[arg(long, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(1024..))]
    vocab_size: u32,
}

/// The dimensions of a generated checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dimensions {
    pub(crate) layers: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) experts: usize,
    pub(crate) vocab_size: u32,
}

impl Dimensions {
    /// The dimensions of Mixtral-8x7B.
    pub(crate) fn mixtral(layers: usize) -> Self {
        Self { layers, hidden_size: 4096, intermediate_size: 14_336, experts: 8, vocab_size: 32_000 }
    }
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let dimensions = Dimensions { vocab_size: args.vocab_size, ..Dimensions::mixtral(args.layers) };
    let usual = || target().join(format!("bench/synth-{}", args.layers));
    let out = std::path::absolute(args.out.clone().unwrap_or_else(usual))?;
    let start = Instant::now();
    build(&[])?;
    let written = write(dimensions, args.seed, &out)?;
    println!("{}: {written} in {:.0} s", out.display(), start.elapsed().as_secs_f64());
    Ok(())
}

/// Writes a checkpoint; returns a summary of its content.
pub(crate) fn write(dimensions: Dimensions, seed: u64, out: &Path) -> Result<Value> {
    let Dimensions { layers, hidden_size, intermediate_size, experts, vocab_size } = dimensions;
    let job = json!({
        "job": "synth",
        "out": out,
        "layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "experts": experts,
        "vocab_size": vocab_size,
        "seed": seed,
        "tokenizer": root().join("tests/fixtures/tiny-mixtral"),
        // Small enough that a checkpoint with one layer has several shards.
        "shard_bytes_max": 500_000_000_u64,
    });
    job_built(&job)
}

/// Builds `lowrank-bench` with these additional features.
pub(crate) fn build(features: &[&str]) -> Result<()> {
    program("lowrank-bench", features).map(drop)
}

/// Runs a job with the latest build; returns its result.
pub(crate) fn job_built(job: &Value) -> Result<Value> {
    let result = output(Command::new(target().join("release/lowrank-bench")).arg(job.to_string()))?;
    Ok(serde_json::from_str(&result)?)
}
