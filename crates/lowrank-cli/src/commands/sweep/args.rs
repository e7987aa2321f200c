//! Flags of `sweep`.

use crate::args::{MachineFlags, SlurmFlags, Verbosity};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Flags of `sweep`.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(crate) struct SweepArgs {
    /// TOML file: what all points share, the grid, what is compressed (docs/sweeps.md)
    pub(crate) config: PathBuf,
    /// Folder of the results; a sweep that is there is resumed [default: sweep]
    #[arg(long, short, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Checkpoint directory, or org/name in the local Hugging Face cache, instead of the config's
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    pub(crate) model: Option<String>,
    /// Plans made at once [default: one per core]; checkpoints are made one after another
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) jobs: usize,
    /// Only the first N points of the config
    #[arg(long, value_name = "N")]
    pub(crate) max_points: Option<usize>,
    /// Check the config and list its points, but do nothing
    #[arg(long)]
    #[serde(skip)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) machine: MachineFlags,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) verbosity: Verbosity,
    /// Print the script that makes the sweep on several machines by Slurm (docs/cluster.md), instead of making it
    #[arg(long, help_heading = "Slurm")]
    #[serde(skip)]
    pub(crate) cluster: bool,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) slurm: SlurmFlags,
}
