//! What of a machine decides bits: machines that share a job must have it alike. And how long this process has worked.

use crate::PipelineError;
use crate::workers::Resources;
use lowrank_calibrate::CalibrateError;

/// The kind of this machine as far as it decides bits: its processor, where models run, and what decomposes matrices.
pub fn kind(resources: &Resources) -> Result<String, PipelineError> {
    let engine = lowrank_forward::choose(resources.device).map_err(CalibrateError::from)?.engine.describe();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = |key: &str| {
        let line = cpu.lines().find(|line| line.starts_with(key)).and_then(|line| line.split_once(": "));
        line.map(|(_, value)| value).unwrap_or_default()
    };
    let flags: Vec<&str> = ["avx2", "fma", "avx512f"]
        .into_iter()
        .filter(|flag| line("flags").split(' ').any(|own| own == *flag))
        .collect();
    let caches = (0..4).filter_map(|index| {
        let place = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        Some(std::fs::read_to_string(place).ok()?.trim().to_owned())
    });
    let caches = caches.collect::<Vec<_>>().join("/");
    let (model, flags) = (line("model name"), flags.join(" "));
    let algebra = resources.algebra()?.identity();
    Ok(format!("{model} ({flags}; caches {caches}), models on {engine}, matrices by {algebra}"))
}

/// Kernel clock ticks per second, the same on all usual Linux systems.
const TICKS: f64 = 100.0;

/// User and system time of all threads of this process, to a hundredth of a second; `None` where the system does not say.
pub fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name may contain any character, so count the fields after it: state is the first, user and system time are the 12th
    // and 13th.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Some(ticks.sum::<Result<f64, _>>().ok()? / TICKS)
}
