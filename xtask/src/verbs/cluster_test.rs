//! `cargo xtask cluster-test` starts a Slurm cluster of three nodes on this machine, compresses the bundled model on it, kills and
//! breaks what a cluster kills and breaks, and compares every byte with an ordinary run. Needs Debian's slurm-wlm and munge;
//! installs them if it can.

mod disturb;
mod slurm;

use super::demo::bundled_model;
use super::torture::bench::{Files, files};
use super::torture::{dice::Dice, tmpfs::Tmpfs};
use crate::shell::{command, install_from_debian, lowrank_compress, output, run as sh, target};
use anyhow::{Context, Result, bail, ensure};
use disturb::Disturbance;
use slurm::Slurm;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// One run on three nodes, of which one dies
    #[arg(long)]
    pub(crate) small: bool,
    /// Runs that are disturbed at a random moment
    #[arg(long, default_value_t = 0)]
    pub(crate) disturbances: u64,
    /// Seed of what disturbs them, and when
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Longest time that a job may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// Time without any job in the queue after which nothing comes any more.
const SETTLED: Duration = Duration::from_secs(2);

/// The job of every run.
const JOB: [&str; 6] = ["--budget", "40%", "--calibration-tokens", "4096", "--sensitivity-tokens", "1024"];

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !slurm::is_installed() && !install_from_debian(&["slurm-wlm", "munge"]).unwrap_or(false) {
        println!("cluster-test: skipped, Slurm is not installed (Debian's packages slurm-wlm and munge)");
        return Ok(());
    }
    let bench = Bench::new()?;
    let slurm = Slurm::start(3)?;
    if args.disturbances > 0 {
        return bench.disturbed(&slurm, args.disturbances, args.seed);
    }
    bench.with_a_dead_node(&slurm)?;
    if !args.small {
        for nodes in 1..=3 {
            bench.on_nodes(&slurm, nodes)?;
        }
        bench.with_cancelled_tasks(&slurm)?;
        bench.with_another_file(&slurm)?;
        bench.with_another_machine()?;
    }
    Ok(())
}

/// The tool, and what it makes on one machine without Slurm.
struct Bench {
    tool: PathBuf,
    folder: PathBuf,
    expected: Files,
}

impl Bench {
    fn new() -> Result<Self> {
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
    fn submit(&self, slurm: &Slurm, name: &str, nodes: u32) -> Result<PathBuf> {
        let out = self.folder.join(name);
        self.again(slurm, &out, nodes)?;
        Ok(out)
    }

    fn again(&self, slurm: &Slurm, out: &Path, nodes: u32) -> Result<()> {
        let mut submit = slurm.command(&self.tool);
        submit.arg("cluster").args(JOB).arg("--model").arg(bundled_model()).arg("--out").arg(out);
        sh(submit.args(["--nodes", &nodes.to_string(), "--submit"]))
    }

    /// Waits until no job is in the queue; `meanwhile` is called again and again.
    fn wait(&self, slurm: &Slurm, mut meanwhile: impl FnMut() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let mut empty_since = None;
        loop {
            meanwhile()?;
            let queue = output(slurm.command("squeue").args(["--noheader", "--format=%i %T"]))?;
            match (queue.trim().is_empty(), empty_since) {
                (false, _) => empty_since = None,
                (true, None) => empty_since = Some(Instant::now()),
                (true, Some(since)) if since.elapsed() > SETTLED => return Ok(()),
                _ => {}
            }
            ensure!(start.elapsed() < PATIENCE, "jobs are still in the queue after {PATIENCE:?}:\n{queue}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn compare(&self, out: &Path) -> Result<()> {
        if !out.exists() {
            let folder =
                out.with_file_name(format!("{}.cluster", out.file_name().context("a name")?.display()));
            sh(command(&self.tool).args(["cluster", "status"]).arg(folder))?;
            bail!("{} was not published", out.display());
        }
        let found = files(out)?;
        ensure!(found == self.expected, "{}: other bytes than those of an ordinary run", out.display());
        Ok(())
    }

    fn on_nodes(&self, slurm: &Slurm, nodes: u32) -> Result<()> {
        let start = Instant::now();
        let out = self.submit(slurm, &format!("on-{nodes}"), nodes)?;
        self.wait(slurm, || Ok(()))?;
        self.compare(&out)?;
        println!(
            "cluster-test: {nodes} nodes give the bytes of one machine, in {:.0} s",
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// A node is killed with its tasks while they take moments: Slurm runs them again elsewhere.
    fn with_a_dead_node(&self, slurm: &Slurm) -> Result<()> {
        let out = self.submit(slurm, "dead-node", 3)?;
        let mut killed = false;
        self.wait(slurm, || {
            ensure!(!out.exists() || killed, "the job ended before a node could be killed");
            if !killed && self.done(&out, "moments") > 0 {
                slurm.kill_node(1)?;
                killed = true;
            }
            Ok(())
        })?;
        slurm.start_node(1)?;
        if !out.exists() {
            self.again(slurm, &out, 3)?;
            self.wait(slurm, || Ok(()))?;
        }
        self.compare(&out)?;
        println!("cluster-test: a killed node changes no byte");
        Ok(())
    }

    /// Every task of a stage is cancelled; the same command goes on.
    fn with_cancelled_tasks(&self, slurm: &Slurm) -> Result<()> {
        for stage in ["states", "moments", "halves", "factors-1"] {
            let out = self.submit(slurm, &format!("cancelled-{stage}"), 3)?;
            let mut cancelled = false;
            self.wait(slurm, || {
                let running =
                    output(slurm.command("squeue").args(["--noheader", "--states=running", "--format=%j"]))?;
                if !cancelled && running.lines().any(|name| name == format!("lowrank-{stage}")) {
                    sh(slurm.command("scancel").arg(format!("--name=lowrank-{stage}")))?;
                    cancelled = true;
                }
                Ok(())
            })?;
            ensure!(!out.exists() || !cancelled, "cancelled in {stage}, and published nevertheless");
            self.again(slurm, &out, 2)?;
            self.wait(slurm, || Ok(()))?;
            self.compare(&out)?;
        }
        println!("cluster-test: cancelled tasks are done by the next submission, with the same bytes");
        Ok(())
    }

    /// A shard changes while the job runs: the next task says so, and nothing is published.
    fn with_another_file(&self, slurm: &Slurm) -> Result<()> {
        let model = self.folder.join("model");
        super::gpu_check::copy_folder(&bundled_model(), &model)?;
        let out = self.folder.join("other-file");
        let mut submit = slurm.command(&self.tool);
        submit.arg("cluster").args(JOB).arg("--model").arg(&model).arg("--out").arg(&out);
        sh(submit.args(["--nodes", "2", "--submit"]))?;
        let shard = std::fs::read_dir(&model)?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|end| end == "safetensors"))
            .context("the model has a shard")?;
        let mut changed = false;
        self.wait(slurm, || {
            if !changed && self.done(&out, "states") > 0 {
                let mut bytes = std::fs::read(&shard)?;
                *bytes.last_mut().context("not empty")? ^= 1;
                std::fs::write(&shard, bytes)?;
                changed = true;
            }
            Ok(())
        })?;
        ensure!(changed && !out.exists(), "a changed shard was not noticed");
        let folder = self.folder.join("other-file.cluster");
        let said = output(command(&self.tool).args(["cluster", "status"]).arg(folder))?;
        ensure!(said.contains("is not the file that this job was begun with"), "{said}");
        println!("cluster-test: a changed shard is refused by name");
        Ok(())
    }

    /// A machine of another kind, and another program, are refused before they compute.
    fn with_another_machine(&self) -> Result<()> {
        let folder = self.folder.join("on-3.cluster");
        let task = |tool: &Path| -> Result<String> {
            let done =
                command(tool).arg("cluster").arg("run").arg(&folder).args(["moments", "0", "1"]).output()?;
            ensure!(!done.status.success(), "not refused");
            Ok(String::from_utf8(done.stderr)?)
        };
        let (kind, kept) = (folder.join("machine.json"), self.folder.join("machine.json"));
        std::fs::rename(&kind, &kept)?;
        std::fs::write(&kind, "\"a processor of the past\"")?;
        let said = task(&self.tool)?;
        ensure!(said.contains("begun on a processor of the past, this machine is"), "{said}");
        std::fs::rename(&kept, &kind)?;
        // The same program with one byte more is another one.
        let other = self.folder.join("other/lowrank-compress");
        std::fs::create_dir(self.folder.join("other"))?;
        std::fs::copy(&self.tool, &other)?;
        std::io::Write::write_all(&mut std::fs::OpenOptions::new().append(true).open(&other)?, b" ")?;
        let said = task(&other)?;
        ensure!(said.contains("give every machine the same program"), "{said}");
        println!("cluster-test: another kind of CPU and another program are refused by name");
        Ok(())
    }

    /// Runs that are disturbed at seeded moments: after each the job ends by itself or by one more submission, with the same bytes.
    fn disturbed(&self, slurm: &Slurm, runs: u64, seed: u64) -> Result<()> {
        let start = Instant::now();
        let mut dice = Dice(seed);
        let (mut counts, mut by_itself) = (BTreeMap::<String, u64>::new(), 0);
        // Large enough for the folder and the output.
        let disk = Tmpfs::mount(self.folder.join("disk"), "size=96m");
        for run in 0..runs {
            let disturbance = Disturbance::any(&mut dice);
            let after = Duration::from_millis(dice.below(40_000));
            let place = disk.as_ref().map_or(&self.folder, |disk| &disk.0);
            let out = place.join(format!("disturbed-{run}"));
            self.again(slurm, &out, 3)?;
            let (submitted, mut happened) = (Instant::now(), false);
            self.wait(slurm, || {
                if !happened && submitted.elapsed() > after {
                    happened = disturbance.happen(slurm, disk.as_ref())?;
                }
                Ok(())
            })?;
            if happened {
                disturbance.mend(slurm, disk.as_ref())?;
                *counts.entry(format!("{disturbance:?}")).or_default() += 1;
            }
            match out.exists() {
                true => by_itself += 1,
                false => {
                    self.again(slurm, &out, 3)?;
                    self.wait(slurm, || Ok(()))?;
                }
            }
            self.compare(&out)?;
            std::fs::remove_dir_all(&out)?;
            std::fs::remove_dir_all(place.join(format!("disturbed-{run}.cluster")))?;
            println!(
                "cluster-test: run {run}: {disturbance:?} after {after:?}, {}",
                if happened { "done" } else { "too late" }
            );
        }
        println!(
            "cluster-test: {runs} runs in {:.0} s, disturbed by {counts:?}; {by_itself} ended by themselves, the others by one more submission; all bytes the same",
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Finished units of a stage.
    fn done(&self, out: &Path, stage: &str) -> usize {
        let folder = PathBuf::from(format!("{}.cluster", out.display())).join("done").join(stage);
        std::fs::read_dir(folder).map_or(0, |entries| entries.flatten().count())
    }
}
