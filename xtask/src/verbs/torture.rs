//! `cargo xtask torture`: kills, stops and starves runs on the bundled model, lets them go on, and compares the bytes.
//!
//! The tool is built with fail points (`lowrank-writer/src/failpoint.rs`): every write, flush and rename can be the last
//! thing a run does. Three of four runs die at such a place, each place once before any twice; the others at a random
//! moment. What is promised, and figures: `docs/reliability.md`.

use crate::shell::{self, cargo, run as sh};
use crate::verbs::demo::bundled_model;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Points at which the disk fills.
const DISK_FULL_POINTS: u64 = 24;
/// Points at which the source is taken away.
const VANISHING_POINTS: u64 = 8;
/// Room for the output and the slack that the tool asks for.
const TMPFS: &str = "size=48m";
/// `nobody` of Debian and most others.
const NOBODY: u32 = 65534;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Runs that are killed or stopped
    #[arg(long, default_value_t = 50)]
    pub(crate) runs: u64,
    /// Decides moments and places
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    fn shuffled(&mut self, mut values: Vec<u64>) -> Vec<u64> {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last as u64 + 1) as usize);
        }
        values
    }
}

type Files = BTreeMap<String, Vec<u8>>;

fn files(dir: &Path) -> Result<Files> {
    let read = |entry: std::io::Result<fs::DirEntry>| -> Result<_> {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
    };
    fs::read_dir(dir).with_context(|| dir.display().to_string())?.map(read).collect()
}

/// How a run ended.
struct End {
    /// Exit code, or minus the signal.
    code: i32,
    stderr: String,
}

impl End {
    fn is_refusal(&self, codes: &[i32]) -> Result<()> {
        let errors = self.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        ensure!(codes.contains(&self.code), "exit code {}, expected {codes:?}: {}", self.code, self.stderr);
        ensure!(errors == 1, "{errors} error lines: {}", self.stderr);
        Ok(())
    }
}

struct Bench {
    tool: PathBuf,
    work: PathBuf,
    dice: Dice,
    reference: Files,
    points: u64,
}

impl Bench {
    fn new(seed: u64) -> Result<Self> {
        sh(&mut cargo(&["build", "--package", "lowrank-cli", "--features", "failpoints"]))?;
        let folder = shell::target().join("torture");
        let work = folder.join("work");
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir_all(&work)?;
        let tool = folder.join("lowrank-compress");
        fs::copy(shell::target().join("debug/lowrank-compress"), &tool)?;
        let mut bench = Self { tool, work, dice: Dice(seed), reference: Files::new(), points: 0 };
        let out = bench.work.join("undisturbed");
        let end = bench.wait(bench.start(&bundled_model(), &out, "count:0", 1)?)?;
        ensure!(end.code == 0, "the undisturbed run failed: {}", end.stderr);
        bench.reference = files(&out)?;
        let counted = end.stderr.lines().find_map(|line| line.strip_prefix("fail points: "));
        bench.points = counted.context("the tool was built without fail points")?.parse()?;
        Ok(bench)
    }

    fn command(&self, model: &Path, out: &Path, failpoint: &str, workers: u64) -> Result<Command> {
        let mut command = Command::new(&self.tool);
        // Few tokens: what is tried is the writing.
        command.args(["--budget", "21.412%", "--calibration-tokens", "2048"]);
        command.args(["--workers", &workers.to_string(), "--model"]);
        command.arg(model).arg("--out").arg(out).env("LOWRANK_FAILPOINT", failpoint);
        command.stdout(Stdio::null()).stderr(File::create(self.work.join("stderr"))?);
        Ok(command)
    }

    fn start(&self, model: &Path, out: &Path, failpoint: &str, workers: u64) -> Result<Child> {
        Ok(self.command(model, out, failpoint, workers)?.spawn()?)
    }

    fn wait(&self, mut child: Child) -> Result<End> {
        let start = Instant::now();
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if start.elapsed() > PATIENCE => {
                    child.kill()?;
                    bail!("a run hangs");
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
        Ok(End { code, stderr: fs::read_to_string(self.work.join("stderr"))? })
    }

    /// Waits until a run has stopped itself; false if it ended before.
    fn wait_for_stop(&self, child: &mut Child) -> Result<bool> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if child.try_wait()?.is_some() {
                return Ok(false);
            }
            let stat = fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
            if stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T')) {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill()?;
        bail!("a run neither stops nor ends")
    }

    /// The output is the reference, and nothing is beside it.
    fn is_reference(&self, out: &Path) -> Result<()> {
        let made = files(out)?;
        let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
        ensure!(names(&made) == names(&self.reference), "other files: {:?}", names(&made));
        for (name, bytes) in &self.reference {
            ensure!(&made[name] == bytes, "{name} differs from an undisturbed run");
        }
        Ok(())
    }

    /// Runs to the end; whatever was left is gone on with.
    fn goes_on(&self, model: &Path, out: &Path, workers: u64) -> Result<()> {
        let end = self.wait(self.start(model, out, "", workers)?)?;
        ensure!(end.code == 0, "cannot go on: {}", end.stderr);
        self.is_reference(out)?;
        ensure!(!partial(out).exists(), "the hidden folder stays after publication");
        Ok(())
    }

    fn forget(&self, out: &Path) -> Result<()> {
        for path in [out.to_owned(), partial(out)] {
            if path.exists() {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

fn partial(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.lowrank-partial"))
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no such process")?;
    Ok(kill_process(pid, signal)?)
}

#[derive(Debug, Default)]
struct Counts {
    killed_at_a_place: u64,
    killed_at_a_moment: u64,
    terminated: u64,
    ended_before: u64,
    died_after_publication: u64,
    killed_again: u64,
}

/// One run that is disturbed, perhaps twice, and then left in peace.
fn disturb(bench: &mut Bench, run: u64, place: u64, counts: &mut Counts) -> Result<()> {
    let out = bench.work.join("out");
    let model = bundled_model();
    bench.forget(&out)?;
    let again = bench.dice.below(3) == 0;
    for round in 0..=u64::from(again) {
        let workers = 1 + bench.dice.below(3);
        let at_a_place = run % 4 != 3;
        let end = if at_a_place {
            let place = if round == 0 { place } else { 1 + bench.dice.below(bench.points) };
            bench.wait(bench.start(&model, &out, &format!("kill:{place}"), workers)?)?
        } else {
            let child = bench.start(&model, &out, "", workers)?;
            std::thread::sleep(Duration::from_micros(bench.dice.below(600_000)));
            let which = if bench.dice.below(2) == 0 { Signal::KILL } else { Signal::TERM };
            // It may be gone; then there is nothing to kill.
            let _ = signal(&child, which);
            bench.wait(child)?
        };
        match end.code {
            0 => counts.ended_before += 1,
            -9 if at_a_place => counts.killed_at_a_place += 1,
            -9 => counts.killed_at_a_moment += 1,
            // 143: it listened already; -15: it had only just started.
            143 | -15 => counts.terminated += 1,
            code => bail!("exit code {code}: {}", end.stderr),
        }
        counts.killed_again += u64::from(round > 0 && end.code != 0);
        if out.exists() {
            // Visible means whole.
            bench.is_reference(&out)?;
            counts.died_after_publication += u64::from(end.code != 0);
            return bench.forget(&out);
        }
        ensure!(end.code != 0, "success without an output");
    }
    let workers = 1 + bench.dice.below(3);
    bench.goes_on(&model, &out, workers)?;
    bench.forget(&out)
}

/// A small file system of its own, if this user may mount one.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir_all(&at).ok()?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then_some(Self(at))
    }

    /// Takes all that is left.
    fn fill(&self) -> Result<()> {
        let mut ballast = File::create(self.0.join("ballast"))?;
        for size in [1 << 20, 1 << 12, 1] {
            while ballast.write_all(&vec![0; size]).is_ok() {}
        }
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// The disk fills at seeded places. Returns (refused, had room to the end).
fn disk_full(bench: &mut Bench, tmpfs: Option<&Tmpfs>) -> Result<(u64, u64)> {
    let (model, mut refused, mut had_room) = (bundled_model(), 0, 0);
    let out = tmpfs.map_or(bench.work.join("out"), |tmpfs| tmpfs.0.join("out"));
    for index in 0..DISK_FULL_POINTS {
        // One in each stretch; the last few places write nothing that needs room.
        let stretch = bench.points / (DISK_FULL_POINTS + 1);
        let place = 1 + index * stretch + bench.dice.below(stretch);
        let end = match tmpfs {
            None => bench.wait(bench.start(&model, &out, &format!("full:{place}"), 2)?)?,
            Some(tmpfs) => {
                let mut child = bench.start(&model, &out, &format!("stop:{place}"), 2)?;
                ensure!(bench.wait_for_stop(&mut child)?, "place {place} was not reached");
                tmpfs.fill()?;
                signal(&child, Signal::CONT)?;
                let end = bench.wait(child)?;
                fs::remove_file(tmpfs.0.join("ballast"))?;
                end
            }
        };
        if end.code == 0 {
            had_room += 1;
            bench.is_reference(&out)?;
        } else {
            refused += 1;
            end.is_refusal(&[9]).with_context(|| format!("disk full at place {place}"))?;
            ensure!(!out.exists(), "published on a full disk");
            bench.goes_on(&model, &out, 2)?;
        }
        bench.forget(&out)?;
    }
    Ok((refused, had_room))
}

/// The source is cut short or deleted at seeded places; put back, the same command succeeds.
fn vanishing_source(bench: &mut Bench) -> Result<(u64, u64)> {
    let (model, out) = (bench.work.join("model"), bench.work.join("out"));
    let (mut refused, mut unharmed) = (0, 0);
    for index in 0..VANISHING_POINTS {
        if model.exists() {
            fs::remove_dir_all(&model)?;
        }
        fs::create_dir(&model)?;
        for (name, bytes) in files(&bundled_model())? {
            fs::write(model.join(name), bytes)?;
        }
        let place = 1 + bench.dice.below(bench.points * 3 / 4);
        let mut child = bench.start(&model, &out, &format!("stop:{place}"), 2)?;
        ensure!(bench.wait_for_stop(&mut child)?, "place {place} was not reached");
        for name in files(&model)?.keys().filter(|name| name.ends_with(".safetensors")) {
            let shard = model.join(name);
            if index % 2 == 0 {
                fs::remove_file(shard)?
            } else {
                File::options().write(true).open(shard)?.set_len(99)?
            }
        }
        signal(&child, Signal::CONT)?;
        let end = bench.wait(child)?;
        if end.code == 0 {
            // It had the file open, or had read all of it.
            unharmed += 1;
            bench.is_reference(&out)?;
        } else {
            refused += 1;
            end.is_refusal(&[5, 10])?;
            ensure!(!out.exists(), "published without a source");
            bench.goes_on(&bundled_model(), &out, 2)?;
        }
        bench.forget(&out)?;
    }
    Ok((refused, unharmed))
}

/// Folders that cannot be written to. Returns what was tried.
fn forbidden_output(bench: &Bench) -> Result<Vec<&'static str>> {
    let mut tried = Vec::new();
    let is_root = rustix::process::geteuid().is_root();
    if let Some(read_only) = Tmpfs::mount(bench.work.join("read-only"), "ro") {
        let out = read_only.0.join("out");
        bench.wait(bench.start(&bundled_model(), &out, "", 1)?)?.is_refusal(&[8])?;
        tried.push("read-only file system");
    }
    let closed = bench.work.join("closed");
    fs::create_dir_all(&closed)?;
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o555))?;
    let mut command = bench.command(&bundled_model(), &closed.join("out"), "", 1)?;
    if is_root {
        command.uid(NOBODY);
    }
    // As another user the tool itself may be out of reach.
    if let Ok(child) = command.spawn() {
        bench.wait(child)?.is_refusal(&[8])?;
        ensure!(fs::read_dir(&closed)?.next().is_none(), "something was left in a closed folder");
        tried.push("folder without permission");
    }
    Ok(tried)
}

/// The verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut bench = Bench::new(args.seed)?;
    let every_place = (1..=bench.points).collect();
    let places = bench.dice.shuffled(every_place);
    let mut counts = Counts::default();
    for run in 0..args.runs {
        let place = places[((run - run / 4) % bench.points) as usize];
        disturb(&mut bench, run, place, &mut counts)
            .with_context(|| format!("run {run} of seed {}, place {place}", args.seed))?;
        if (run + 1) % 50 == 0 {
            eprintln!("{} of {} runs, {} s", run + 1, args.runs, start.elapsed().as_secs());
        }
    }
    let (refused, had_room) = disk_full(&mut bench, None)?;
    let small = Tmpfs::mount(bench.work.join("small"), TMPFS);
    let on_tmpfs = small.as_ref().map(|small| disk_full(&mut bench, Some(small))).transpose()?;
    drop(small);
    let mut too_small = 0;
    for megabytes in [1, 5, 20, 40] {
        let Some(tiny) = Tmpfs::mount(bench.work.join("tiny"), &format!("size={megabytes}m")) else { break };
        bench.wait(bench.start(&bundled_model(), &tiny.0.join("out"), "", 1)?)?.is_refusal(&[9])?;
        ensure!(fs::read_dir(&tiny.0)?.next().is_none(), "something was left on a disk that is too small");
        too_small += 1;
    }
    let (without_source, unharmed) = vanishing_source(&mut bench)?;
    let forbidden = forbidden_output(&bench)?;
    fs::remove_dir_all(&bench.work)?;

    let Counts {
        killed_at_a_place,
        killed_at_a_moment,
        terminated,
        ended_before,
        died_after_publication,
        killed_again,
    } = counts;
    println!(
        "torture: {0} of {0} runs ended byte-identical (seed {1}, {2} places, {3} s)",
        args.runs,
        args.seed,
        bench.points,
        start.elapsed().as_secs()
    );
    println!(
        "  SIGKILL at a write, flush or rename: {killed_at_a_place}, of them after publication: {died_after_publication}"
    );
    println!(
        "  SIGKILL at a random moment: {killed_at_a_moment}; SIGTERM: {terminated}; killed a second time: {killed_again}; ended before: {ended_before}"
    );
    println!("  disk full, injected: {refused} refused and gone on with, {had_room} had room");
    match on_tmpfs {
        Some((refused, had_room)) => {
            println!("  disk full, a real one: {refused} refused and gone on with, {had_room} had room")
        }
        None => println!("  disk full, a real one: not tried, this user cannot mount a tmpfs"),
    }
    println!("  disk too small from the start: {too_small} refused, nothing left");
    println!(
        "  source deleted or cut short while running: {without_source} refused and gone on with, {unharmed} unharmed"
    );
    println!(
        "  {}: refused, nothing left",
        if forbidden.is_empty() { "forbidden folders: not tried".into() } else { forbidden.join(", ") }
    );
    Ok(())
}
