//! `cargo xtask bench cluster` runs `cluster_times` of `lowrank-bench`.

use crate::shell::{command, program, run as sh};
use anyhow::Result;

/// Prints the tables.
pub(crate) fn run() -> Result<()> {
    sh(&mut command(program("cluster_times", &[])?))
}
