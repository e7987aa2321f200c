//! The tool, submitted to a cluster, and what it makes on one machine without Slurm.

use super::slurm::Slurm;
use crate::shell::{command, lowrank_compress, run as sh, target};
use crate::verbs::demo::bundled_model;
use crate::verbs::torture::bench::{Files, files};
use anyhow::{Result, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest time that a job may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Time without any job in the queue after which nothing comes any more.
const SETTLED: Duration = Duration::from_secs(2);
/// How often the queue is looked at.
const QUEUE_EVERY: Duration = Duration::from_millis(250);

/// The job of every run.
pub(super) const JOB: [&str; 6] =
    ["--budget", "40%", "--calibration-tokens", "4096", "--sensitivity-tokens", "1024"];

/// The tool, and what it makes on one machine without Slurm.
pub(super) struct Bench {
    pub(super) tool: PathBuf,
    pub(super) folder: PathBuf,
    expected: Files,
}

impl Bench {
    pub(super) fn new() -> Result<Self> {
        let folder = target().join("cluster");
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        // A copy, so that a rebuild meanwhile changes nothing.
        let tool = folder.join("lowrank-compress");
        std::fs::copy(lowrank_compress()?, &tool)?;
        let out = folder.join("alone");
        let mut alone = command(&tool);
        alone.args(JOB).args(["--quiet", "--cache", "none", "--model"]).arg(bundled_model());
        sh(alone.arg("--out").arg(&out))?;
        Ok(Self { tool, expected: files(&out)?, folder })
    }

    /// Submits the job in a folder of its own.
    pub(super) fn submit(&self, slurm: &Slurm, name: &str, nodes: u32) -> Result<PathBuf> {
        let out = self.folder.join(name);
        self.again(slurm, &out, nodes)?;
        Ok(out)
    }

    pub(super) fn again(&self, slurm: &Slurm, out: &Path, nodes: u32) -> Result<()> {
        let mut submit = slurm.command(&self.tool);
        submit.arg("cluster").args(JOB).arg("--model").arg(bundled_model()).arg("--out").arg(out);
        sh(submit.args(["--nodes", &nodes.to_string(), "--submit"]))
    }

    /// Waits until no job is in the queue; `meanwhile` is called again and again.
    pub(super) fn wait(&self, slurm: &Slurm, mut meanwhile: impl FnMut() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let (mut empty_since, mut asked) = (None, start - QUEUE_EVERY);
        loop {
            meanwhile()?;
            std::thread::sleep(Duration::from_millis(10));
            if asked.elapsed() < QUEUE_EVERY {
                continue;
            }
            asked = Instant::now();
            // A controller that is starting answers later.
            let queue = slurm.command("squeue").args(["--noheader", "--format=%i %T %r"]).output()?;
            let queue_is_empty = queue.status.success() && queue.stdout.trim_ascii().is_empty();
            match (queue_is_empty, empty_since) {
                (false, _) => empty_since = None,
                (true, None) => empty_since = Some(Instant::now()),
                (true, Some(since)) if since.elapsed() > SETTLED => return Ok(()),
                _ => {}
            }
            let queue = String::from_utf8_lossy(&queue.stdout);
            // Slurm holds a task whose start a restarted controller repeats, until somebody looks at it.
            if queue.to_lowercase().contains("held") {
                sh(slurm.command("scancel").arg("--state=pending"))?;
            }
            ensure!(start.elapsed() < PATIENCE, "jobs are still in the queue after {PATIENCE:?}:\n{queue}");
        }
    }

    pub(super) fn compare(&self, out: &Path) -> Result<()> {
        if !out.exists() {
            sh(command(&self.tool).args(["cluster", "status"]).arg(folder_of(out)))?;
            bail!("{} was not published", out.display());
        }
        let found = files(out)?;
        ensure!(found == self.expected, "{}: other bytes than those of an ordinary run", out.display());
        Ok(())
    }

    /// Whether all units of a stage are done.
    pub(super) fn is_over(&self, out: &Path, stage: &str) -> bool {
        let job = std::fs::read(folder_of(out).join("job.json")).unwrap_or_default();
        let job: Value = serde_json::from_slice(&job).unwrap_or_default();
        let stages = job["stages"].as_array().into_iter().flatten();
        let units = stages.filter(|own| own["name"] == stage).find_map(|own| own["units"].as_u64());
        units.is_some_and(|units| self.done(out, stage) as u64 >= units)
    }

    /// Finished units of a stage.
    pub(super) fn done(&self, out: &Path, stage: &str) -> usize {
        let folder = folder_of(out).join("done").join(stage);
        std::fs::read_dir(folder).map_or(0, |entries| entries.flatten().count())
    }
}

/// The folder of a job.
pub(super) fn folder_of(out: &Path) -> PathBuf {
    PathBuf::from(format!("{}.cluster", out.display()))
}
