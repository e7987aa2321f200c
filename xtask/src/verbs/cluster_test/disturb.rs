//! What goes wrong on clusters, done on purpose while a stage runs.

use super::slurm::Slurm;
use super::tasks::Task;
use crate::shell::{command, output, run as sh};
use crate::verbs::torture::{dice::Dice, tmpfs::Tmpfs};
use anyhow::Result;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Disturbance {
    /// The node of a task is killed with it, and is not seen again for a while.
    DeadNode,
    /// The process of a task is killed.
    KilledTask,
    /// All tasks that run are cancelled.
    CancelledTasks,
    /// A task hangs until Slurm ends it at its time limit.
    TimeLimit,
    /// The controller is killed and started again.
    Controller,
    /// The disk of the job's folder is full.
    FullDisk,
}

impl Disturbance {
    /// Any of them; a time limit, which takes more than a minute, less often.
    pub(super) fn any(dice: &mut Dice) -> Self {
        match dice.below(16) {
            0..3 => Self::DeadNode,
            3..6 => Self::KilledTask,
            6..9 => Self::CancelledTasks,
            9 => Self::TimeLimit,
            10..13 => Self::Controller,
            _ => Self::FullDisk,
        }
    }

    /// Does it while a task runs; false if there was nothing left to disturb.
    pub(super) fn happen(self, task: &Task, slurm: &Slurm, disk: Option<&Tmpfs>) -> Result<bool> {
        let signal = |name: &str| command("kill").args([name, &task.pid.to_string()]).output();
        match self {
            Self::DeadNode => {
                let Some(node) = task.node else { return Ok(false) };
                slurm.kill_node(node)?;
            }
            // It may have ended by now.
            Self::KilledTask => return Ok(signal("-KILL")?.status.success()),
            Self::CancelledTasks => {
                let running = ["--noheader", "--array", "--states=running", "--format=%i"];
                let running = output(slurm.command("squeue").args(running))?;
                let tasks: Vec<&str> = running.split_whitespace().collect();
                if tasks.is_empty() {
                    return Ok(false);
                }
                sh(slurm.command("scancel").args(tasks))?;
            }
            Self::TimeLimit => {
                let Some(job) = task.job.as_deref().filter(|_| signal("-STOP").is_ok()) else {
                    return Ok(false);
                };
                let update = slurm
                    .command("scontrol")
                    .args(["update", &format!("JobId={job}"), "TimeLimit=1"])
                    .output()?;
                if !update.status.success() {
                    signal("-CONT")?;
                    return Ok(false);
                }
            }
            Self::Controller => slurm.restart_controller()?,
            Self::FullDisk => {
                let Some(disk) = disk else { return Ok(false) };
                disk.fill()?;
            }
        }
        Ok(true)
    }
}

/// Makes the cluster whole again.
pub(super) fn mend(slurm: &Slurm, disk: Option<&Tmpfs>) -> Result<()> {
    if let Some(ballast) = disk.map(|disk| disk.0.join("ballast")).filter(|ballast| ballast.exists()) {
        std::fs::remove_file(ballast)?;
    }
    slurm.start_dead_nodes()
}
