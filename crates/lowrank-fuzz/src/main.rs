//! Runs one target on inputs made from its seeds: `lowrank-fuzz TARGET SEEDS NUMBER EXECUTIONS SECONDS FINDINGS`.
//!
//! It needs neither nightly Rust nor coverage; `cargo xtask fuzz` runs all targets with it. A finding is a panic, an input
//! that takes more than a second of CPU time, or one that takes more than 1 GiB of memory. It stores the input in FINDINGS
//! and exits with code 1.

use lowrank_fuzz::{Body, Mutator, TARGETS};
use rustix::time::{ClockId, clock_gettime};
use std::collections::HashSet;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// An input that takes more CPU time counts as a hang.
const HANGS: Duration = Duration::from_secs(1);
/// An input that takes more memory is a finding.
const MEMORY_MAX_KB: u64 = 1 << 20;
/// Interval at which time and memory are checked.
const WATCH: Duration = Duration::from_millis(20);

struct Job {
    target: String,
    body: Body,
    seeds: PathBuf,
    number: u64,
    executions: u64,
    seconds: u64,
    findings: PathBuf,
}

fn main() -> ExitCode {
    match job(std::env::args().skip(1).collect()).and_then(|job| run(&job)) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("error: {what}");
            ExitCode::FAILURE
        }
    }
}

fn job(words: Vec<String>) -> Result<Job, String> {
    let [target, seeds, number, executions, seconds, findings] = <[String; 6]>::try_from(words)
        .map_err(|_| "lowrank-fuzz TARGET SEEDS NUMBER EXECUTIONS SECONDS FINDINGS".to_owned())?;
    let body = TARGETS.iter().find(|(name, _)| *name == target).map(|(_, body)| *body);
    let count = |text: String| text.parse().map_err(|_| format!("`{text}` is not a count"));
    Ok(Job {
        body: body.ok_or_else(|| format!("no target `{target}`"))?,
        target,
        seeds: seeds.into(),
        number: count(number)?,
        executions: count(executions)?,
        seconds: count(seconds)?,
        findings: findings.into(),
    })
}

/// The current input, and the CPU time at which it began.
#[derive(Default)]
struct Now {
    input: Vec<u8>,
    began: Duration,
}

fn run(job: &Job) -> Result<String, String> {
    let seeds = seeds(&job.seeds)?;
    let start = Instant::now();
    let now = Arc::new(Mutex::new(Now::default()));
    watch(job, Arc::clone(&now));
    // We report the panic ourselves, once and with the input.
    std::panic::set_hook(Box::new(|_| ()));
    let mut met = HashSet::new();
    let mut slowest = Duration::ZERO;
    let mut executions = 0;
    let mut mutator = Mutator::new(seeds.clone(), job.number);
    let mut first = seeds.into_iter();
    let over = |executions: u64| {
        (job.executions > 0 && executions >= job.executions)
            || (job.seconds > 0 && start.elapsed() >= Duration::from_secs(job.seconds))
    };
    while !over(executions) {
        let input = first.next().unwrap_or_else(|| mutator.input());
        let began = processor_time();
        {
            let mut now = now.lock().unwrap_or_else(PoisonError::into_inner);
            now.input.clone_from(&input);
            now.began = began;
        }
        let outcome = catch_unwind(|| (job.body)(&input));
        executions += 1;
        slowest = slowest.max(processor_time().saturating_sub(began));
        match outcome {
            Ok(sign) if met.insert(sign) => mutator.keep(input),
            Ok(_) => {}
            Err(panic) => {
                let said = panic.downcast_ref::<String>().map(String::as_str);
                let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                return Err(finding(job, &input, said));
            }
        }
    }
    Ok(format!(
        "{:<10} {executions:>9} executions, {:>3} outcomes, slowest {:>4} ms, at most {:>4} MiB, {:>4} s",
        job.target,
        met.len(),
        slowest.as_millis(),
        memory_kb("VmHWM") / 1024,
        start.elapsed().as_secs(),
    ))
}

/// Ends the process if an input takes too much time or memory.
fn watch(job: &Job, now: Arc<Mutex<Now>>) {
    let job =
        Job { target: job.target.clone(), seeds: PathBuf::new(), findings: job.findings.clone(), ..*job };
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(WATCH);
            let now = now.lock().unwrap_or_else(PoisonError::into_inner);
            let took = processor_time().saturating_sub(now.began);
            let said = if !now.input.is_empty() && took > HANGS {
                format!("hangs: {} ms of processor time", took.as_millis())
            } else if memory_kb("VmRSS") > MEMORY_MAX_KB {
                format!("takes {} MiB of memory", memory_kb("VmRSS") / 1024)
            } else {
                continue;
            };
            eprintln!("error: {}", finding(&job, &now.input, &said));
            std::process::exit(1);
        }
    });
}

fn finding(job: &Job, input: &[u8], said: &str) -> String {
    let said = said.escape_debug().take(400).collect::<String>();
    let path = job.findings.join(format!("{}-{:016x}", job.target, fingerprint(input)));
    match std::fs::create_dir_all(&job.findings).and_then(|()| std::fs::write(&path, input)) {
        Ok(()) => format!("{}: {said}; the input is {}", job.target, path.display()),
        Err(error) => format!("{}: {said}; the input could not be kept: {error}", job.target),
    }
}

fn fingerprint(input: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    hasher.finish()
}

/// CPU time of all threads; the watching thread takes almost none. Unlike wall time, it does not depend on other processes.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The value of a line in `/proc/self/status`; 0 if it is missing.
fn memory_kb(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn seeds(folder: &Path) -> Result<Vec<Vec<u8>>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    if paths.is_empty() {
        return Err(format!("{}: no seeds", folder.display()));
    }
    paths.iter().map(|path| std::fs::read(path).map_err(failed)).collect()
}
