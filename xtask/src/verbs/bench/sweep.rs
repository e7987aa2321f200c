//! `cargo xtask bench sweep` runs `sweep_plans` and `plan_shapes` of `lowrank-bench`.

use crate::shell::{command, program, run as sh};
use anyhow::Result;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of plans made at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

/// Runs the benchmark.
pub(crate) fn run(args: &Args) -> Result<()> {
    sh(command(program("sweep_plans", &[])?).arg(args.jobs.to_string()))?;
    sh(&mut command(program("plan_shapes", &[])?))
}
