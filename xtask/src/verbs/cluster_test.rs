//! `cargo xtask cluster-test` starts a Slurm cluster of three nodes on this machine, compresses the bundled model on it, kills and
//! breaks what a cluster kills and breaks, and compares every byte with an ordinary run. Needs Debian's slurm-wlm and munge;
//! installs them if it can.

mod bench;
mod disturb;
mod disturbed;
mod slurm;
mod tasks;

use super::bench::synth::{self, Dimensions};
use super::demo::bundled_model;
use super::torture::{bench::files, dice::Dice, tmpfs::Tmpfs};
use crate::shell::{command, install_from_debian, output, run as sh};
use anyhow::{Context, Result, ensure};
use bench::{Bench, JOB, folder_of};
use disturb::Disturbance;
use disturbed::{Disturbed, Ended};
use serde_json::{Map, Value};
use slurm::Slurm;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// One run on three nodes, of which one dies
    #[arg(long)]
    pub(crate) small: bool,
    /// Disturb jobs in several stages each, until so many disturbances happened
    #[arg(long, default_value_t = 0)]
    pub(crate) disturbances: u64,
    /// Seed of what disturbs them, and in which stages
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Disturbances of a job at most.
const DISTURBANCES_PER_JOB: usize = 12;
/// CPU seconds of a cluster, divided by those of one process.
const OVERHEAD_MAX: f64 = 1.1;
/// What overhead is measured on: large enough that the start of a task is little beside its work.
const GENERATED: Dimensions =
    Dimensions { layers: 3, hidden_size: 1024, intermediate_size: 3584, experts: 8, vocab_size: 1024 };
const GENERATED_JOB: [&str; 6] =
    ["--budget", "25%", "--calibration-tokens", "8192", "--sensitivity-tokens", "1024"];
/// The sweep: two groups of points that are measured apart, some of which are compressed.
const SWEEP: &str = r#"
compress = "pareto"
calibration-tokens = 2048
sensitivity-tokens = 512
[verify]
max-tokens = 1024
[grid]
storage = ["pivoted", "uv"]
structures = ["rank", "rank,width"]
budget = ["20%", "40%"]
"#;

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
        bench.sweep(&slurm)?;
        bench.disturbed_in_every_stage(&slurm)?;
        bench.with_another_file(&slurm)?;
        bench.with_another_machine()?;
        bench.overhead(&slurm)?;
    }
    Ok(())
}

/// What is tried.
impl Bench {
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

    /// A node is killed in every stage, and in another job all tasks are cancelled in every stage.
    fn disturbed_in_every_stage(&self, slurm: &Slurm) -> Result<()> {
        for kind in [Disturbance::DeadNode, Disturbance::CancelledTasks] {
            let job = Disturbed::begin(self, slurm, &format!("every-stage-{kind:?}"), None)?;
            let list: Vec<(String, Disturbance)> =
                job.stages()?.into_iter().map(|stage| (stage, kind)).collect();
            let ended = job.end(list)?;
            println!("cluster-test: {ended}");
        }
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

    /// Jobs that are disturbed in several stages, drawn by a seed, until so many disturbances happened.
    fn disturbed(&self, slurm: &Slurm, disturbances: u64, seed: u64) -> Result<()> {
        let start = Instant::now();
        let mut dice = Dice(seed);
        let mut all = Ended::default();
        // Large enough for the folder and the output.
        let disk = Tmpfs::mount(self.folder.join("disk"), "size=96m");
        for run in 0_u64.. {
            let job = Disturbed::begin(self, slurm, &format!("disturbed-{run}"), disk.as_ref())?;
            let stages = job.stages()?;
            let places = dice.shuffled(0..stages.len() as u64);
            let mut places: Vec<u64> = places.into_iter().take(DISTURBANCES_PER_JOB).collect();
            places.sort_unstable();
            let list =
                places.into_iter().map(|at| (stages[at as usize].clone(), Disturbance::any(&mut dice)));
            let ended = job.end(list.collect())?;
            println!("cluster-test: job {run}: {ended}");
            all.add(ended);
            if all.happened() >= disturbances {
                break;
            }
        }
        println!("cluster-test: in all, in {:.0} s: {all}", start.elapsed().as_secs_f64());
        Ok(())
    }

    /// A sweep on three nodes gives the rows of one machine, except for seconds.
    fn sweep(&self, slurm: &Slurm) -> Result<()> {
        let config = self.folder.join("sweep.toml");
        std::fs::write(&config, SWEEP)?;
        let sweep = |command: &mut Command, out: &Path| {
            command.arg("sweep").arg(&config).arg("--model").arg(bundled_model()).arg("--out").arg(out);
        };
        let (alone, on_three) = (self.folder.join("sweep-alone"), self.folder.join("sweep-on-3"));
        let mut command = command(&self.tool);
        sweep(&mut command, &alone);
        sh(command.args(["--quiet", "--cache", "none"]))?;
        let mut command = slurm.command(&self.tool);
        sweep(&mut command, &on_three);
        sh(command.args(["--cluster", "--nodes", "3", "--submit"]))?;
        self.wait(slurm, || Ok(()))?;
        let rows = |out: &Path| -> Result<Vec<Value>> {
            let text = std::fs::read_to_string(out.join("results.jsonl"))?;
            let row = |line: &str| -> Result<Value> {
                let mut row: Map<String, Value> = serde_json::from_str(line)?;
                row.retain(|key, _| !key.ends_with("_seconds"));
                Ok(row.into())
            };
            text.lines().map(row).collect()
        };
        let (expected, found) = (rows(&alone)?, rows(&on_three)?);
        let verified = found.iter().filter(|row| row["status"] == "verified").count();
        ensure!(
            found == expected && verified > 1,
            "{}: other rows than those of one machine",
            on_three.display()
        );
        println!(
            "cluster-test: a sweep of {} points, {verified} of them compressed, has the rows of one machine",
            found.len()
        );
        Ok(())
    }

    /// CPU seconds of three nodes with one core each, beside those of one process with three workers.
    fn overhead(&self, slurm: &Slurm) -> Result<()> {
        let model = self.folder.join("generated");
        synth::build(&[])?;
        synth::write(GENERATED, 0, &model)?;
        let (alone, out) = (self.folder.join("generated-alone"), self.folder.join("generated-on-3"));
        let before = children_cpu_seconds()?;
        let mut command = command(&self.tool);
        command
            .args(GENERATED_JOB)
            .args(["--quiet", "--cache", "none", "--workers", "3", "--model"])
            .arg(&model);
        sh(command.arg("--out").arg(&alone))?;
        let alone_cpu_seconds = children_cpu_seconds()? - before;
        let mut command = slurm.command(&self.tool);
        command.arg("cluster").args(GENERATED_JOB).arg("--model").arg(&model).arg("--out").arg(&out);
        sh(command.args(["--nodes", "3", "--submit"]))?;
        self.wait(slurm, || Ok(()))?;
        ensure!(files(&alone)? == files(&out)?, "{}: other bytes than those of one machine", out.display());
        let status = output(
            crate::shell::command(&self.tool).args(["cluster", "status", "--json"]).arg(folder_of(&out)),
        )?;
        let status: Value = serde_json::from_str(&status)?;
        let stages = status["stages"].as_array().context("no stages")?;
        let seconds = |key: &str| stages.iter().filter_map(|stage| stage[key].as_f64()).sum::<f64>();
        let (cpu_seconds, ratio) = (seconds("cpu_seconds"), seconds("cpu_seconds") / alone_cpu_seconds);
        println!(
            "cluster-test: three nodes took {cpu_seconds:.1} CPU s, one process with three workers {alone_cpu_seconds:.1}: {ratio:.3} times (goal: at most {OVERHEAD_MAX})"
        );
        ensure!(ratio <= OVERHEAD_MAX, "the goal is missed");
        Ok(())
    }
}

/// CPU seconds of all ended children of this process.
fn children_cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks = fields.split_whitespace().skip(13).take(2).map(str::parse::<f64>);
    // Kernel clock ticks per second, the same on all usual Linux systems.
    Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
}
