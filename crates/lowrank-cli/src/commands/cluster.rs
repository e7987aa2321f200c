//! `cluster`: a compression on several machines, as a chain of Slurm job arrays over a folder that they share. `sweep --cluster`
//! makes such a chain of a sweep.

mod compress;
mod estimate;
mod folder;
mod limits;
mod script;
mod status;
mod submit;
mod sweep;
mod task;

use crate::args::{JobArgs, SlurmFlags};
use crate::exit::Result;
use clap::{Args, Subcommand};
use folder::{Folder, Subject};
use std::path::PathBuf;
pub(crate) use sweep::begin as begin_sweep;
use task::Share;

/// Flags of `cluster`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ClusterArgs {
    #[command(subcommand)]
    command: Option<ClusterCommand>,
    #[command(flatten)]
    slurm: SlurmFlags,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Show how far a job is, and what stopped it
    Status {
        /// Its folder
        dir: PathBuf,
        /// Put one machine-readable JSON document on stdout instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Do one task of a stage: what the script calls
    #[command(hide = true)]
    Run {
        /// The job's folder
        dir: PathBuf,
        /// Which stage
        stage: String,
        /// Which task of it
        task: usize,
        /// Tasks of the stage in all
        tasks: usize,
    },
}

/// Runs the command.
pub(crate) fn run(args: ClusterArgs) -> Result<()> {
    match &args.command {
        Some(ClusterCommand::Status { dir, json }) => status::show(&Folder::open(dir)?, *json),
        Some(ClusterCommand::Run { dir, stage, task, tasks }) => {
            let share = Share { task: *task, tasks: (*tasks).max(1) };
            work(&Folder::open(dir)?, stage, share)
        }
        None => compress::begin(args.job, &args.slurm),
    }
}

/// Does a task.
fn work(folder: &Folder, stage: &str, share: Share) -> Result<()> {
    match &folder.settings().subject {
        Subject::Compress(settings) => compress::work(folder, settings.clone(), stage, share),
        Subject::Sweep(sweep) => sweep::work(folder, sweep, stage, share),
    }
}
