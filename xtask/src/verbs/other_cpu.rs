//! `cargo xtask other-cpu` checks whether an older kind of CPU gives the same output.
//!
//! It compresses the bundled model here, and again on an emulated CPU that has neither AVX nor FMA. `reproduce
//! --other-cpu` makes the second output and compares. Figures: `docs/reliability.md`.

use crate::shell::{command, install_from_debian, lowrank_compress, output, run as sh, target};
use crate::verbs::demo::bundled_model;
use anyhow::{Result, ensure};
use serde_json::Value;
use std::process::Command;

const EMULATOR: &str = "qemu-x86_64";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// CPU to emulate, as qemu names it
    #[arg(long, default_value = "Nehalem")]
    pub(crate) cpu: String,
    /// Tokens to calibrate on; 0 runs without calibration, because emulation is slow
    #[arg(long, default_value_t = 0)]
    pub(crate) tokens: usize,
}

impl Default for Args {
    fn default() -> Self {
        Self { cpu: "Nehalem".into(), tokens: 0 }
    }
}

/// Runs this verb. Needs Debian's qemu-user; installs it if it can, and otherwise says that it skips the check.
pub(crate) fn run(args: &Args) -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        println!("other-cpu: skipped, this is no x86-64");
        return Ok(());
    }
    if !has_emulator() && !install_from_debian(&["qemu-user"]).unwrap_or(false) {
        println!("other-cpu: skipped, {EMULATOR} is not installed (Debian's package qemu-user)");
        return Ok(());
    }
    let tool = lowrank_compress()?;
    let folder = target().join("other-cpu");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let out = folder.join("out");
    let tokens = args.tokens.to_string();
    let calibration = match args.tokens {
        0 => vec!["--calibrate", "none"],
        _ => vec!["--calibration-tokens", &tokens, "--sensitivity-tokens", &tokens],
    };
    sh(command(&tool)
        .args(["--quiet", "--budget", "21.412%"])
        .args(calibration)
        .arg("--model")
        .arg(bundled_model())
        .arg("--out")
        .arg(&out))?;
    let mut emulated = command(EMULATOR);
    emulated.args(["-cpu", &args.cpu]).arg(&tool).args([
        "reproduce",
        "--json",
        "--other-cpu",
        "--cache",
        "none",
    ]);
    emulated.arg(&out).arg("--model").arg(bundled_model());
    let told: Value = serde_json::from_str(&output(&mut emulated)?)?;
    let differences = told["differences"].as_array().cloned().unwrap_or_default();
    ensure!(differences.iter().all(|one| one["is_rounding"] == true), "more than rounding: {told}");
    let tensors = differences.iter().filter(|one| !one["tensor"].is_null()).count();
    println!(
        "other-cpu: {} gives {} tensors and {} texts that differ, all by rounding",
        args.cpu,
        tensors,
        differences.len() - tensors
    );
    for difference in &differences {
        println!("  {} {}: {}", difference["file"], difference["tensor"], difference["what"]);
    }
    Ok(())
}

fn has_emulator() -> bool {
    Command::new(EMULATOR).arg("--version").output().is_ok_and(|told| told.status.success())
}
