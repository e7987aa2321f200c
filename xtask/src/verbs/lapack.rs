//! `cargo xtask lapack` runs the tests of the linear algebra again with LAPACK in addition to faer.

use crate::shell::{cargo, install_from_debian, run as sh};
use anyhow::{Result, bail};
use std::process::Command;

/// Runs this verb. Needs Debian's libopenblas-dev; installs it if it can.
pub(crate) fn run() -> Result<()> {
    ensure_openblas()?;
    let features = ["--features", "lowrank-compute/lapack,lowrank-svd/lapack"];
    sh(cargo(&["test", "--locked", "--package", "lowrank-compute", "--package", "lowrank-svd"])
        .args(features))
}

/// Installs OpenBLAS if it is missing and can be installed.
pub(crate) fn ensure_openblas() -> Result<()> {
    if !has_openblas() && !install_from_debian(&["libopenblas-dev", "pkg-config"])? {
        bail!(
            "OpenBLAS is not installed: install libopenblas-dev and pkg-config (or your system's equivalent)"
        );
    }
    Ok(())
}

fn has_openblas() -> bool {
    Command::new("pkg-config").args(["--exists", "openblas"]).status().is_ok_and(|status| status.success())
}
