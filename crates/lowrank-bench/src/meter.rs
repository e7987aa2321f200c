//! Measures wall time, CPU time of all threads, and peak resident memory of a piece of work.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::time::Instant;

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

fn cpu_seconds() -> Result<f64> {
    lowrank_pipeline::machine::cpu_seconds()
        .context("/proc/self/stat does not say how long this process worked")
}

/// Peak resident memory of this process so far.
pub fn peak_resident_bytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.split_whitespace().nth(1).context("VmHWM without a number")?.parse()?;
    Ok(kib * 1024)
}
