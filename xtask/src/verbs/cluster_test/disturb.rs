//! What goes wrong on clusters, done on purpose at a seeded moment.

use super::slurm::Slurm;
use crate::shell::{command, output, run as sh};
use crate::verbs::torture::{dice::Dice, tmpfs::Tmpfs};
use anyhow::Result;

/// Nodes of the cluster.
const NODES: u64 = 3;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Disturbance {
    /// A node is killed with its tasks, and is not seen again until the next submission.
    DeadNode(u64),
    /// The process of a task is killed.
    KilledTask,
    /// All tasks that run are cancelled.
    CancelledTasks,
    /// The controller is killed and started again.
    Controller,
    /// The disk of the job's folder is full.
    FullDisk,
}

impl Disturbance {
    /// Any of them.
    pub(super) fn any(dice: &mut Dice) -> Self {
        match dice.below(5) {
            0 => Self::DeadNode(dice.below(NODES)),
            1 => Self::KilledTask,
            2 => Self::CancelledTasks,
            3 => Self::Controller,
            _ => Self::FullDisk,
        }
    }

    /// Does it; false if there was nothing to disturb at this moment.
    pub(super) fn happen(self, slurm: &Slurm, disk: Option<&Tmpfs>) -> Result<bool> {
        match self {
            Self::DeadNode(node) => slurm.kill_node(node as usize)?,
            Self::KilledTask => {
                let tasks =
                    output(command("pgrep").args(["-f", "lowrank-compress cluster run"])).unwrap_or_default();
                let Some(task) = tasks.split_whitespace().next() else { return Ok(false) };
                // It may have ended by now.
                return Ok(command("kill").args(["-KILL", task]).status()?.success());
            }
            Self::CancelledTasks => {
                let running = ["--noheader", "--array", "--states=running", "--format=%i"];
                let running = output(slurm.command("squeue").args(running))?;
                let tasks: Vec<&str> = running.split_whitespace().collect();
                if tasks.is_empty() {
                    return Ok(false);
                }
                sh(slurm.command("scancel").args(tasks))?;
            }
            Self::Controller => slurm.restart_controller()?,
            Self::FullDisk => {
                let Some(disk) = disk else { return Ok(false) };
                disk.fill()?;
            }
        }
        Ok(true)
    }

    /// Makes the cluster whole again.
    pub(super) fn mend(self, slurm: &Slurm, disk: Option<&Tmpfs>) -> Result<()> {
        match (self, disk) {
            (Self::DeadNode(node), _) => slurm.start_node(node as usize),
            (Self::FullDisk, Some(disk)) => Ok(std::fs::remove_file(disk.0.join("ballast"))?),
            _ => Ok(()),
        }
    }
}
