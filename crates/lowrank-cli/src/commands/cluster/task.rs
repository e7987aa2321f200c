//! What every task does, whatever its job is.

use super::folder::Folder;
use super::limits;
use crate::args::MachineFlags;
use crate::commands::shared::open_base;
use crate::exit::Result;
use crate::job::Job;
use crate::progress::Console;
use crate::signals;
use lowrank_model::RankPlan;
use lowrank_pipeline::compress::units::{self, UnitStage};
use lowrank_pipeline::machine;
use lowrank_pipeline::workers::Resources;
use std::path::Path;

/// Which of the units of a stage a task does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    pub(super) task: usize,
    pub(super) tasks: usize,
}

impl Share {
    pub(super) fn has(self, unit: usize) -> bool {
        unit % self.tasks == self.task
    }

    /// Its units, of so many.
    fn units(self, of: usize) -> Vec<usize> {
        (0..of).filter(|&unit| self.has(unit)).collect()
    }
}

/// What a task may use: what the job says, within what Slurm gives it, and the job's cache.
pub(super) fn machine_of(flags: MachineFlags, folder: &Folder) -> Result<MachineFlags> {
    let flags = limits::within(flags, &|name| std::env::var(name).ok())?;
    Ok(MachineFlags { cache: Some(folder.cache().display().to_string()), ..flags })
}

/// Refuses a machine of another kind than the first that worked on the job.
pub(super) fn check_machine(folder: &Folder, resources: &Resources) -> Result<()> {
    folder.check_machine(&machine::kind(resources)?)
}

/// Does a task's share of a stage of units, and returns the plan, if that is what was made. `name`: the stage's in this job.
pub(super) fn run_units(
    folder: &Folder,
    job: &Job,
    (name, stage): (&str, UnitStage),
    share: Share,
) -> Result<Option<RankPlan>> {
    let mine = share.units(folder.units(name)?);
    let (checkpoint, interrupt) = (open_base(&job.model, &job.recipe)?, signals::watch()?);
    let out = job.out.as_deref().unwrap_or(Path::new(""));
    let request = job.request(out, &interrupt);
    let mut done = |unit| folder.mark(name, unit);
    units::run(&checkpoint, request, (stage, &mine), &Console::new(true), &mut done)
}
