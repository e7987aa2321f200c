//! `cargo xtask lapack`: the tests of the linear algebra again, with LAPACK beside faer.

use crate::shell::{cargo, command, run as sh};
use anyhow::{Result, bail};
use std::process::Command;

/// The verb. Needs Debian's libopenblas-dev; installs it where it may.
pub(crate) fn run() -> Result<()> {
    if !has_openblas() {
        let root = Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0"));
        if !root || Command::new("apt-get").arg("--version").output().is_err() {
            bail!(
                "OpenBLAS is not installed: install libopenblas-dev and pkg-config (or your system's equivalent)"
            );
        }
        sh(command("apt-get").args(["update", "-qq"]))?;
        let mut install = command("apt-get");
        install.args(["install", "-y", "-qq", "--no-install-recommends", "libopenblas-dev", "pkg-config"]);
        sh(install.env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    let features = ["--features", "lowrank-compute/lapack,lowrank-svd/lapack"];
    sh(cargo(&["test", "--locked", "--package", "lowrank-compute", "--package", "lowrank-svd"])
        .args(features))
}

fn has_openblas() -> bool {
    Command::new("pkg-config").args(["--exists", "openblas"]).status().is_ok_and(|status| status.success())
}
