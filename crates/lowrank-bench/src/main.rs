//! The program that `cargo xtask bench` runs: it generates checkpoints and takes single measurements. Each measurement is a
//! separate process, so that CPU seconds and peak memory are its own.
//!
//! The only argument is a [`Job`] in JSON; the only line on stdout is its result in JSON.

mod matrix;
mod synth;
mod whole;

use serde::Deserialize;
use std::process::ExitCode;

/// One piece of work.
#[derive(Debug, Deserialize)]
#[serde(tag = "job", rename_all = "kebab-case", deny_unknown_fields)]
enum Job {
    /// Writes a checkpoint.
    Synth(synth::Synth),
    /// One matrix, stage by stage.
    Matrix(matrix::Matrix),
    /// The peak of a product.
    Gemm(matrix::Gemm),
    /// A whole compression.
    Compress(whole::Compress),
    /// Memory by the program's own count.
    Demand(whole::Demanded),
    /// A plan.
    Plan(whole::Plan),
    /// Streaming.
    Stream(whole::Stream),
    /// Touching memory.
    Warm(whole::Warm),
}

fn main() -> ExitCode {
    match run() {
        Ok(result) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<serde_json::Value> {
    let mut arguments = std::env::args().skip(1);
    let (Some(job), None) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("expected one argument, a job in JSON; `cargo xtask bench` gives it");
    };
    match serde_json::from_str(&job)? {
        Job::Synth(job) => job.run(),
        Job::Matrix(job) => job.run(),
        Job::Gemm(job) => job.run(),
        Job::Compress(job) => job.run(),
        Job::Demand(job) => job.run(),
        Job::Plan(job) => job.run(),
        Job::Stream(job) => job.run(),
        Job::Warm(job) => job.run(),
    }
}
