//! What a piece of work took: wall time, CPU time of all threads, and the most memory that was resident.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::time::Instant;

/// Kernel ticks in a second, of all Linux that is met.
const TICKS: f64 = 100.0;

/// Running since it was made.
pub(crate) struct Meter {
    wall: Instant,
    cpu: f64,
}

/// Seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Took {
    pub(crate) cpu_s: f64,
    pub(crate) wall_s: f64,
}

impl Meter {
    pub(crate) fn start() -> Result<Self> {
        Ok(Self { wall: Instant::now(), cpu: cpu_seconds()? })
    }

    /// Since the start; goes on.
    pub(crate) fn took(&self) -> Result<Took> {
        Ok(Took { cpu_s: cpu_seconds()? - self.cpu, wall_s: self.wall.elapsed().as_secs_f64() })
    }
}

/// Runs something and says what it took.
pub(crate) fn timed<R>(work: impl FnOnce() -> Result<R>) -> Result<(R, Took)> {
    let meter = Meter::start()?;
    let result = work()?;
    Ok((result, meter.took()?))
}

/// User and system time of this process, to a hundredth.
fn cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
    // After the name, which may hold anything: state is the first field, user and system time the 12th and 13th.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

/// The most that this process held in memory so far.
pub(crate) fn peak_resident_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.split_whitespace().nth(1).context("VmHWM without a number")?.parse()?;
    Ok(kib * 1024)
}
