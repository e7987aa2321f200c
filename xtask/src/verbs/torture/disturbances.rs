//! The disturbances: kills, stops, full disks, deleted sources, and two runs at once.

use super::bench::{Bench, Cache, Run, files};
use super::tmpfs::Tmpfs;
use crate::verbs::demo::bundled_model;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

/// Number of places at which the disk fills.
const DISK_FULL_POINTS: u64 = 24;
/// Number of places at which the cache's disk fills.
const CACHE_FULL_POINTS: u64 = 4;
/// Number of places at which a run panics.
const PANIC_POINTS: u64 = 8;
/// Number of places at which the source is deleted or truncated.
const VANISHING_POINTS: u64 = 8;
/// Number of pairs of runs on one cache.
const PAIRS: u64 = 2;
/// `nobody` of Debian and most others.
const NOBODY: u32 = 65534;

/// Counts of how disturbed runs ended.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) killed_at_a_place: u64,
    pub(super) killed_at_a_moment: u64,
    pub(super) terminated: u64,
    pub(super) ended_before: u64,
    pub(super) died_after_publication: u64,
    pub(super) killed_again: u64,
    pub(super) with_a_cold_cache: u64,
}

/// When a run is killed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Death {
    /// At this write, flush or rename.
    Place(u64),
    /// At a random moment.
    Moment,
}

/// Disturbs one run, perhaps twice, then lets it run to the end.
pub(super) fn disturb(bench: &mut Bench, death: Death, cache: Cache, counts: &mut Counts) -> Result<()> {
    let out = bench.work.join("out");
    let model = bundled_model();
    bench.forget(&out)?;
    counts.with_a_cold_cache += u64::from(cache == Cache::Cold);
    let again = bench.dice.below(3) == 0;
    for round in 0..=u64::from(again) {
        let run = Run::new(&model, &out, cache).on(1 + bench.dice.below(3));
        let end = match death {
            Death::Place(place) => {
                let place = if round == 0 { place } else { 1 + bench.dice.below(bench.course(cache).places) };
                bench.wait(bench.start(run.failing(format!("kill:{place}")))?)?
            }
            Death::Moment => {
                let started = bench.start(run)?;
                let moment = bench.dice.below(bench.course(cache).takes.as_micros() as u64);
                std::thread::sleep(Duration::from_micros(moment));
                let which = if bench.dice.below(2) == 0 { Signal::KILL } else { Signal::TERM };
                // The run may have ended already.
                let _ = started.signal(which);
                bench.wait(started)?
            }
        };
        match (end.code, death) {
            (0, _) => counts.ended_before += 1,
            (-9, Death::Place(_)) => counts.killed_at_a_place += 1,
            (-9, Death::Moment) => counts.killed_at_a_moment += 1,
            // 143: the run had installed its signal handler; -15: it had not yet.
            (143 | -15, _) => counts.terminated += 1,
            (code, _) => bail!("exit code {code}: {}", end.stderr),
        }
        counts.killed_again += u64::from(round > 0 && end.code != 0);
        if out.exists() {
            // If the output is visible, it must be complete.
            bench.is_reference(&out, cache)?;
            counts.died_after_publication += u64::from(end.code != 0);
            return bench.forget(&out);
        }
        ensure!(end.code != 0, "success without an output");
    }
    let workers = 1 + bench.dice.below(3);
    bench.goes_on(Run::new(&model, &out, cache).on(workers))?;
    bench.forget(&out)
}

/// Runs pairs that fill one empty cache at the same time; kills and resumes one run of each. Returns the number of pairs.
pub(super) fn side_by_side(bench: &mut Bench) -> Result<u64> {
    let (model, out, other) = (bundled_model(), bench.work.join("out"), bench.work.join("other"));
    for _ in 0..PAIRS {
        bench.forget(&out)?;
        let place = 1 + bench.dice.below(bench.measuring_places);
        let killed = bench.start(Run::new(&model, &out, Cache::Cold).failing(format!("kill:{place}")))?;
        let neighbour = bench.start(Run::new(&model, &other, Cache::Cold))?;
        ensure!(bench.wait(killed)?.code == -9, "place {place} was not reached");
        let end = bench.wait(neighbour)?;
        ensure!(end.code == 0, "beside a run that was killed: {}", end.stderr);
        bench.is_reference(&other, Cache::Cold)?;
        bench.goes_on(Run::new(&model, &out, Cache::Cold))?;
        bench.forget(&other)?;
        bench.forget(&out)?;
    }
    Ok(PAIRS)
}

/// Fills the disk at seeded places. Returns (runs refused, runs that had enough space).
pub(super) fn disk_full(bench: &mut Bench, tmpfs: Option<&Tmpfs>) -> Result<(u64, u64)> {
    let (model, mut refused, mut had_room) = (bundled_model(), 0, 0);
    let out = tmpfs.map_or(bench.work.join("out"), |tmpfs| tmpfs.0.join("out"));
    let mut attempts = Vec::new();
    for index in 0..DISK_FULL_POINTS {
        // One place in each equal part of the run. The last few places need no space.
        let stretch = bench.warm.places / (DISK_FULL_POINTS + 1);
        attempts.push((Cache::Warm, 1 + index * stretch + bench.dice.below(stretch)));
    }
    if tmpfs.is_none() {
        for _ in 0..CACHE_FULL_POINTS {
            attempts.push((Cache::Cold, 1 + bench.dice.below(bench.measuring_places)));
        }
    }
    for (cache, place) in attempts {
        let run = Run::new(&model, &out, cache);
        let end = match tmpfs {
            None => bench.wait(bench.start(run.failing(format!("full:{place}")))?)?,
            Some(tmpfs) => {
                let mut started = bench.start(run.failing(format!("stop:{place}")))?;
                ensure!(started.has_stopped()?, "place {place} was not reached");
                tmpfs.fill()?;
                started.signal(Signal::CONT)?;
                let end = bench.wait(started)?;
                fs::remove_file(tmpfs.0.join("ballast"))?;
                end
            }
        };
        if end.code == 0 {
            had_room += 1;
            bench.is_reference(&out, cache)?;
        } else {
            refused += 1;
            end.is_refusal(&[9]).with_context(|| format!("disk full at place {place}, {cache:?} cache"))?;
            ensure!(!out.exists(), "published on a full disk");
            bench.goes_on(Run::new(&model, &out, cache))?;
        }
        bench.forget(&out)?;
    }
    Ok((refused, had_room))
}

/// Lets runs panic at seeded places: each prints one line, and the same command resumes. Returns their number.
pub(super) fn panicking(bench: &mut Bench) -> Result<u64> {
    let (model, out) = (bundled_model(), bench.work.join("out"));
    for _ in 0..PANIC_POINTS {
        // The last places come after publication.
        let place = 1 + bench.dice.below(bench.warm.places * 3 / 4);
        let run = Run::new(&model, &out, Cache::Warm).failing(format!("panic:{place}"));
        let end = bench.wait(bench.start(run)?)?;
        end.is_refusal(&[1]).with_context(|| format!("a panic at place {place}"))?;
        ensure!(!out.exists(), "published after a panic");
        bench.goes_on(Run::new(&model, &out, Cache::Warm))?;
        bench.forget(&out)?;
    }
    Ok(PANIC_POINTS)
}

/// Tries disks that are too small from the start. Returns their number.
pub(super) fn too_small(bench: &Bench) -> Result<u64> {
    let mut tried = 0;
    for megabytes in [1, 5, 20, 40] {
        let Some(tiny) = Tmpfs::mount(bench.work.join("tiny"), &format!("size={megabytes}m")) else { break };
        let (model, out) = (bundled_model(), tiny.0.join("out"));
        bench.wait(bench.start(Run::new(&model, &out, Cache::Warm))?)?.is_refusal(&[9])?;
        ensure!(fs::read_dir(&tiny.0)?.next().is_none(), "something was left on a disk that is too small");
        tried += 1;
    }
    Ok(tried)
}

/// Truncates or deletes the source at seeded places. After the source is restored, the same command must succeed. Returns
/// (runs refused, runs unharmed).
pub(super) fn vanishing_source(bench: &mut Bench) -> Result<(u64, u64)> {
    let (model, out) = (bench.work.join("model"), bench.work.join("out"));
    let (mut refused, mut unharmed) = (0, 0);
    for index in 0..VANISHING_POINTS {
        copy_of_model(&model)?;
        // Every fourth time during calibration.
        let (cache, places) = match index % 4 {
            3 => (Cache::Cold, bench.measuring_places),
            _ => (Cache::Warm, bench.warm.places * 3 / 4),
        };
        let place = 1 + bench.dice.below(places);
        let mut started = bench.start(Run::new(&model, &out, cache).failing(format!("stop:{place}")))?;
        ensure!(started.has_stopped()?, "place {place} was not reached");
        for name in files(&model)?.keys().filter(|name| name.ends_with(".safetensors")) {
            let shard = model.join(name);
            if index % 2 == 0 {
                fs::remove_file(shard)?
            } else {
                File::options().write(true).open(shard)?.set_len(99)?
            }
        }
        started.signal(Signal::CONT)?;
        let end = bench.wait(started)?;
        if end.code == 0 {
            // The run had the file open, or had read all of it.
            unharmed += 1;
            bench.is_reference(&out, cache)?;
        } else {
            refused += 1;
            end.is_refusal(&[5, 10])?;
            ensure!(!out.exists(), "published without a source");
            bench.goes_on(Run::new(&bundled_model(), &out, cache))?;
        }
        bench.forget(&out)?;
    }
    Ok((refused, unharmed))
}

fn copy_of_model(to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::create_dir(to)?;
    for (name, bytes) in files(&bundled_model())? {
        fs::write(to.join(name), bytes)?;
    }
    Ok(())
}

/// Tries folders that cannot be written to. Returns their descriptions.
pub(super) fn forbidden_output(bench: &Bench) -> Result<Vec<&'static str>> {
    let mut tried = Vec::new();
    let model = bundled_model();
    if let Some(read_only) = Tmpfs::mount(bench.work.join("read-only"), "ro") {
        let out = read_only.0.join("out");
        bench.wait(bench.start(Run::new(&model, &out, Cache::Warm))?)?.is_refusal(&[8])?;
        tried.push("read-only file system");
    }
    let closed = bench.work.join("closed");
    fs::create_dir_all(&closed)?;
    fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o555))?;
    let out = closed.join("out");
    let run = Run::new(&model, &out, Cache::Warm);
    let started = match rustix::process::geteuid().is_root() {
        true => bench.start_as(NOBODY, run)?,
        false => Some(bench.start(run)?),
    };
    if let Some(started) = started {
        bench.wait(started)?.is_refusal(&[8])?;
        ensure!(fs::read_dir(&closed)?.next().is_none(), "something was left in a closed folder");
        tried.push("folder without permission");
    }
    Ok(tried)
}
