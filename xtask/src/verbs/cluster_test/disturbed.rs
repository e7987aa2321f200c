//! A job that is disturbed in some of its stages: it must end by itself or by submissions of the same command, with the same bytes.

use super::bench::{Bench, folder_of};
use super::disturb::{Disturbance, mend};
use super::slurm::Slurm;
use super::tasks;
use crate::verbs::torture::tmpfs::Tmpfs;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Submissions of a job at most, beside one for each disturbance.
const MORE_SUBMISSIONS: usize = 2;
/// What settles after a disturbance before the next one: a dead node is noticed after five seconds.
const APART: Duration = Duration::from_secs(1);

/// A job that was submitted.
pub(super) struct Disturbed<'a> {
    bench: &'a Bench,
    slurm: &'a Slurm,
    disk: Option<&'a Tmpfs>,
    out: PathBuf,
}

/// What happened to jobs.
#[derive(Debug, Default)]
pub(super) struct Ended {
    jobs: u64,
    counts: BTreeMap<Disturbance, u64>,
    /// Their stages had ended before they could happen.
    missed: u64,
    /// Jobs by the number of further submissions that they took.
    submissions: BTreeMap<usize, u64>,
    seconds: f64,
}

impl Ended {
    pub(super) fn happened(&self) -> u64 {
        self.counts.values().sum()
    }

    pub(super) fn add(&mut self, other: Self) {
        self.jobs += other.jobs;
        self.missed += other.missed;
        self.seconds += other.seconds;
        other.counts.into_iter().for_each(|(kind, count)| *self.counts.entry(kind).or_default() += count);
        for (submissions, count) in other.submissions {
            *self.submissions.entry(submissions).or_default() += count;
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (happened, missed) = (self.happened(), self.missed);
        write!(
            f,
            "{} jobs, {happened} disturbances {:?}, {missed} too late; jobs by further submissions {:?}; same bytes; {:.0} s",
            self.jobs, self.counts, self.submissions, self.seconds
        )
    }
}

impl<'a> Disturbed<'a> {
    /// Submits it.
    pub(super) fn begin(
        bench: &'a Bench,
        slurm: &'a Slurm,
        name: &str,
        disk: Option<&'a Tmpfs>,
    ) -> Result<Self> {
        let out = disk.map_or(&bench.folder, |disk| &disk.0).join(name);
        bench.again(slurm, &out, 3)?;
        Ok(Self { bench, slurm, disk, out })
    }

    /// Its stages, in their order.
    pub(super) fn stages(&self) -> Result<Vec<String>> {
        let job: Value = serde_json::from_slice(&std::fs::read(folder_of(&self.out).join("job.json"))?)?;
        let stages = job["stages"].as_array().context("job.json has no stages")?;
        Ok(stages.iter().filter_map(|stage| Some(stage["name"].as_str()?.to_owned())).collect())
    }

    /// Disturbs it, submits it again until it is published, and compares its bytes.
    pub(super) fn end(self, list: Vec<(String, Disturbance)>) -> Result<Ended> {
        let Self { bench, slurm, disk, out } = self;
        let (start, most) = (Instant::now(), list.len() + MORE_SUBMISSIONS);
        let (mut ended, mut open) = (Ended { jobs: 1, ..Ended::default() }, VecDeque::from(list));
        let (mut submissions, mut last) = (0, Instant::now() - APART);
        loop {
            bench.wait(slurm, || {
                while open.front().is_some_and(|(stage, _)| bench.is_over(&out, stage)) {
                    open.pop_front();
                    ended.missed += 1;
                }
                let Some((stage, kind)) = open.front().cloned() else { return Ok(()) };
                if last.elapsed() < APART {
                    return Ok(());
                }
                let Some(task) = tasks::of_stage(&folder_of(&out), &stage).into_iter().next() else {
                    return Ok(());
                };
                ensure!(stage == "publish" || !out.exists(), "{} is there while {stage} runs", out.display());
                // At most one node is dead at a time.
                if kind == Disturbance::DeadNode {
                    slurm.start_dead_nodes()?;
                }
                if kind.happen(&task, slurm, disk)? {
                    *ended.counts.entry(kind).or_default() += 1;
                    open.pop_front();
                    last = Instant::now();
                }
                Ok(())
            })?;
            mend(slurm, disk)?;
            if out.exists() {
                break;
            }
            ensure!(
                submissions < most,
                "{}: not published after {submissions} more submissions",
                out.display()
            );
            submissions += 1;
            bench.again(slurm, &out, 3)?;
        }
        ended.missed += open.len() as u64;
        ended.submissions.insert(submissions, 1);
        ended.seconds = start.elapsed().as_secs_f64();
        bench.compare(&out)?;
        std::fs::remove_dir_all(&out)?;
        std::fs::remove_dir_all(folder_of(&out))?;
        Ok(ended)
    }
}
