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

use crate::args::{JobArgs, MachineFlags, SlurmFlags};
use crate::commands::shared::open;
use crate::exit::Result;
use crate::job::Job;
use crate::progress::Console;
use crate::signals;
use clap::{Args, Subcommand};
use folder::{Folder, Subject};
use lowrank_model::RankPlan;
use lowrank_pipeline::compress::units::{self, UnitStage};
use lowrank_pipeline::machine;
use lowrank_pipeline::workers::Resources;
use std::path::{Path, PathBuf};
pub(crate) use sweep::begin as begin_sweep;

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

/// Which of the units of a stage a task does.
#[derive(Debug, Clone, Copy)]
struct Share {
    task: usize,
    tasks: usize,
}

impl Share {
    fn has(self, unit: usize) -> bool {
        unit % self.tasks == self.task
    }

    /// Its units, of so many.
    fn units(self, of: usize) -> Vec<usize> {
        (0..of).filter(|&unit| self.has(unit)).collect()
    }
}

/// Does a task.
fn work(folder: &Folder, stage: &str, share: Share) -> Result<()> {
    match &folder.settings().subject {
        Subject::Compress(settings) => compress::work(folder, settings.clone(), stage, share),
        Subject::Sweep(sweep) => sweep::work(folder, sweep, stage, share),
    }
}

/// What a task may use: what the job says, within what Slurm gives it, and the job's cache.
fn machine_of(flags: MachineFlags, folder: &Folder) -> Result<MachineFlags> {
    let flags = limits::within(flags, &|name| std::env::var(name).ok())?;
    Ok(MachineFlags { cache: Some(folder.cache().display().to_string()), ..flags })
}

/// Refuses a machine of another kind than the first that worked on the job.
fn check_machine(folder: &Folder, resources: &Resources) -> Result<()> {
    folder.check_machine(&machine::kind(resources)?)
}

/// Does a task's share of a stage of units, and returns the plan, if that is what was made. `name`: the stage's in this job.
fn run_units(
    folder: &Folder,
    job: &Job,
    (name, stage): (&str, UnitStage),
    share: Share,
) -> Result<Option<RankPlan>> {
    let mine = share.units(folder.units(name)?);
    let (checkpoint, interrupt) = (open(&job.model)?, signals::watch()?);
    let out = job.out.as_deref().unwrap_or(Path::new(""));
    let request = job.request(out, &interrupt);
    let mut done = |unit| folder.mark(name, unit);
    units::run(&checkpoint, request, (stage, &mine), &Console::new(true), &mut done)
}
