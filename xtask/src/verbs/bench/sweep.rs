//! `cargo xtask bench sweep` runs `sweep_plans` and `plan_shapes` of `lowrank-bench`.

use crate::shell::{cargo, run as sh};
use anyhow::Result;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of plans made at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

/// Runs the benchmark.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut bench = cargo(&["run", "--release", "--package", "lowrank-bench", "--bin", "sweep_plans", "--"]);
    sh(bench.arg(args.jobs.to_string()))?;
    sh(&mut cargo(&["run", "--release", "--package", "lowrank-bench", "--bin", "plan_shapes"]))
}
