//! `cargo xtask fuzz` runs every parser of foreign bytes on almost valid inputs (`crates/lowrank-fuzz`).
//!
//! It runs on stable Rust with random inputs. With `--coverage` it runs `cargo fuzz` on nightly, which is guided by coverage
//! (install it with `cargo install cargo-fuzz`). The folders of `fuzz/seeds` are the targets with their seeds.

use crate::shell::{self, cargo, command, output, run as sh};
use anyhow::{Result, ensure};
use std::fs;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only this target
    #[arg(long)]
    pub(crate) target: Option<String>,
    /// Number of executions, over all targets
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) executions: u64,
    /// Seconds to run, over all targets [default: 60, unless --executions is given]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) seconds: u64,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Guide the inputs by code coverage: use `cargo fuzz` on nightly Rust
    #[arg(long)]
    pub(crate) coverage: bool,
}

impl Args {
    /// All targets with random inputs for so many seconds.
    pub(crate) fn for_seconds(seconds: u64) -> Self {
        Self { target: None, executions: 0, seconds, seed: 0, coverage: false }
    }
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let seeds = shell::root().join("fuzz/seeds");
    let mut targets = Vec::new();
    for entry in fs::read_dir(&seeds)? {
        targets.push(entry?.file_name().to_string_lossy().into_owned());
    }
    targets.retain(|target| args.target.as_ref().is_none_or(|only| only == target));
    targets.sort();
    ensure!(!targets.is_empty(), "no such target; fuzz/seeds has a folder for each");
    let share = |all: u64| all.div_ceil(targets.len() as u64);
    let seconds = if args.executions == 0 && args.seconds == 0 { 60 } else { args.seconds };
    let (executions, seconds) = (share(args.executions), share(seconds));
    if !args.coverage {
        // A debug build, so that overflowing arithmetic is a finding. Built with the whole workspace, as the tests are, so
        // that its libraries need not be built again with other features.
        sh(&mut cargo(&["build", "--workspace", "--locked", "--bin", "lowrank-fuzz"]))?;
    }
    let findings = shell::target().join("fuzz/findings");
    let mut lines = Vec::new();
    for target in &targets {
        if args.coverage {
            lines.push(led_by_coverage(target, executions, seconds, args.seed)?);
            continue;
        }
        let mut driver = command(shell::target().join("debug/lowrank-fuzz"));
        driver.arg(target).arg(seeds.join(target));
        driver.args([args.seed, executions, seconds].map(|number| number.to_string())).arg(&findings);
        let line = output(&mut driver)?;
        print!("{line}");
        lines.push(line);
    }
    let executions: u64 = lines.iter().filter_map(|line| executions_in(line)).sum();
    println!("fuzz: {executions} executions of {} targets, no finding", targets.len());
    Ok(())
}

fn executions_in(line: &str) -> Option<u64> {
    line.split(" executions").next()?.split_whitespace().next_back()?.parse().ok()
}

/// Runs `cargo fuzz`. New inputs go under `target/`; the seeds do not change.
fn led_by_coverage(target: &str, executions: u64, seconds: u64, seed: u64) -> Result<String> {
    let folder = |name: &str| -> Result<PathBuf> {
        let folder = shell::target().join("fuzz").join(name).join(target);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    };
    let (corpus, findings) = (folder("corpus")?, folder("findings")?);
    let mut fuzz = command("cargo");
    // No sanitizer: there is no unsafe code to check, and a sanitizer would distort the memory limit.
    fuzz.args(["+nightly", "fuzz", "run", "--sanitizer", "none", target]);
    fuzz.arg(&corpus).arg(shell::root().join("fuzz/seeds").join(target)).arg("--");
    fuzz.args(["-timeout=1", "-rss_limit_mb=1024", "-max_len=65536", "-print_final_stats=1", "-verbosity=0"]);
    fuzz.arg(format!("-seed={}", seed + 1)).arg(format!("-artifact_prefix={}/", findings.display()));
    if executions > 0 {
        fuzz.arg(format!("-runs={executions}"));
    }
    if seconds > 0 {
        fuzz.arg(format!("-max_total_time={seconds}"));
    }
    // These variables select the toolchain that runs this program; `cargo fuzz` needs another one.
    for variable in ["RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC", "CARGO"] {
        fuzz.env_remove(variable);
    }
    fuzz.env("CARGO_TARGET_DIR", shell::target().join("fuzz/build"));
    let told = fuzz.stderr(std::process::Stdio::piped()).output()?;
    let told_text = String::from_utf8_lossy(&told.stderr);
    ensure!(told.status.success(), "{target}: {}", told_text);
    let stat = |name: &str| -> u64 {
        let line = told_text.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    };
    let line = format!(
        "{target:<10} {:>9} executions, {} inputs added, at most {} MiB",
        stat("number_of_executed_units"),
        stat("new_units_added"),
        stat("peak_rss_mb")
    );
    println!("{line}");
    Ok(line)
}
