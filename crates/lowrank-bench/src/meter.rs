//! Measures wall time, CPU time of all threads, and peak resident memory of a piece of work.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::time::Instant;

/// Kernel clock ticks per second, the same on all usual Linux systems.
const TICKS: f64 = 100.0;

/// A clock that runs from its creation.
#[derive(Debug)]
pub struct Meter {
    wall: Instant,
    cpu: f64,
}

/// Seconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Took {
    /// CPU seconds of all threads.
    pub cpu_s: f64,
    /// Wall seconds.
    pub wall_s: f64,
}

impl Meter {
    /// Starts a clock.
    pub fn start() -> Result<Self> {
        Ok(Self { wall: Instant::now(), cpu: cpu_seconds()? })
    }

    /// The time since the start. The clock continues.
    pub fn took(&self) -> Result<Took> {
        Ok(Took { cpu_s: cpu_seconds()? - self.cpu, wall_s: self.wall.elapsed().as_secs_f64() })
    }
}

/// Runs something and returns its result and time.
pub fn timed<R>(work: impl FnOnce() -> Result<R>) -> Result<(R, Took)> {
    let meter = Meter::start()?;
    let result = work()?;
    Ok((result, meter.took()?))
}

/// User and system time of this process, to a hundredth of a second.
fn cpu_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
    // The name may contain any character, so count the fields after it: state is the first, user and system time are the 12th
    // and 13th.
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has no name")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

/// Peak resident memory of this process so far.
pub fn peak_resident_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.split_whitespace().nth(1).context("VmHWM without a number")?.parse()?;
    Ok(kib * 1024)
}
