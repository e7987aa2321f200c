//! `cargo xtask wheel-test` builds the Python package's wheel and tries it in an environment that has nothing else of this
//! repository: the command, transformers' classes without remote code, a plan as a table and as a plot.

use super::demo::bundled_model;
use crate::python;
use crate::shell::{self, command, run as sh, target};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    let folder = target().join("wheel");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let wheel = built(&folder.join("dist"))?;
    println!("wheel-test: {}", wheel.display());
    let python = python::with_only(&wheel, &folder.join("venv"))?;
    // Not in the checkout, where Python would find the package's sources.
    let mut script = command(&python);
    script.current_dir(&folder).arg(shell::root().join("tests/python/use_wheel.py"));
    script.env("HF_HUB_OFFLINE", "1").env("HF_HOME", folder.join("hf-home"));
    script.env("XDG_CACHE_HOME", folder.join("cache"));
    // The command must come from the wheel.
    script.env_remove("LOWRANK_COMPRESS").env_remove("PYTHONPATH");
    sh(script.arg(bundled_model()).arg(folder.join("out")))
}

/// The wheel, built with the release build of the workspace.
fn built(dist: &PathBuf) -> Result<PathBuf> {
    let mut maturin = python::maturin()?;
    maturin.args(["build", "--release", "--locked", "--out"]).arg(dist);
    maturin.arg("--target-dir").arg(target());
    sh(maturin.current_dir(shell::root().join("python")))?;
    let mut found = std::fs::read_dir(dist)?.flatten().map(|entry| entry.path());
    found.find(|path| path.extension().is_some_and(|end| end == "whl")).context("maturin built no wheel")
}
