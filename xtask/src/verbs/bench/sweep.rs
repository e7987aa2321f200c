//! `cargo xtask bench sweep` runs `crates/lowrank-pipeline/examples/sweep_plans.rs`.

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
    let mut bench =
        cargo(&["run", "--release", "--package", "lowrank-pipeline", "--example", "sweep_plans", "--"]);
    sh(bench.arg(args.jobs.to_string()))
}
