//! `cargo xtask report-test` opens report pages in a headless browser and compares the figures with the documents that they
//! were made from. Screenshots and prints are kept under `target/report-test/shots`.

use crate::shell::{command, install_from_debian, lowrank_compress, root, run as sh, target};
use crate::{python, verbs::demo::bundled_model};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Names under which Chromium may be installed.
const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// Runs this verb. Needs Chromium; installs Debian's if it can.
pub(crate) fn run() -> Result<()> {
    let chromium = chromium()?;
    let tool = lowrank_compress()?;
    let folder = target().join("report-test");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;

    let verified = folder.join("verified");
    compress(&tool, &["--budget", "21.412%"], &verified)?;
    sh(command(&tool)
        .args(["verify", "--quiet", "--max-tokens", "4096", "--original"])
        .arg(bundled_model())
        .arg("--compressed")
        .arg(&verified))?;

    // A page with gaps: ranks were given, and nothing was verified.
    let (given, map) = (folder.join("given"), folder.join("ranks.json"));
    let ranks = json!({
        "model.layers.0.block_sparse_moe.experts.0.w1": 40, "model.layers.3.block_sparse_moe.experts.7.w3": 17,
    });
    std::fs::write(&map, ranks.to_string())?;
    compress(&tool, &["--ranks", &map.to_string_lossy()], &given)?;

    // A page without calibration and verification.
    let plain = folder.join("plain");
    compress(&tool, &["--budget", "40%", "--storage", "uv", "--calibrate", "none"], &plain)?;

    // A page with widths.
    let narrowed = folder.join("narrowed");
    let widths = ["--budget", "40%", "--structures", "rank,width", "--calibration-tokens", "4096"];
    compress(&tool, &widths, &narrowed)?;

    let sweep = super::sweep::folder();
    if !sweep.join("report.html").is_file() {
        super::sweep::run()?;
    }
    // Drawn by this build.
    sh(command(&tool).args(["report", "--quiet"]).arg(&sweep))?;

    let pages = [&verified, &given, &plain, &narrowed].map(|dir| dir.with_extension("report.html"));
    let mut check = python::with_browser_driver()?;
    check.arg("tests/report/check_report.py").arg("--chromium").arg(&chromium).arg("--shots");
    sh(check.arg(folder.join("shots")).args(pages).arg(sweep.join("report.html")))?;
    catches_a_wrong_figure(&chromium)
}

fn compress(tool: &Path, words: &[&str], out: &Path) -> Result<()> {
    sh(command(tool).arg("--quiet").args(words).arg("--model").arg(bundled_model()).arg("--out").arg(out))
}

fn chromium() -> Result<PathBuf> {
    let found = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .flat_map(|folder| BROWSERS.map(|name| folder.join(name)))
            .find(|file| file.is_file())
    };
    if let Some(file) = found() {
        return Ok(file);
    }
    if !install_from_debian(&["chromium"])? {
        bail!("Chromium is not installed: install chromium (or your system's equivalent)");
    }
    found().with_context(|| format!("chromium was installed and is not on PATH, below {}", root().display()))
}

/// A test of the check: changes a page but not its documents, and expects the check to fail.
fn catches_a_wrong_figure(chromium: &Path) -> Result<()> {
    let folder = target().join("report-test");
    let page = folder.join("given.report.html");
    let right = std::fs::read_to_string(&page)?;
    let (line, broken) =
        ("row.layer, value(row), row.name]", "row.layer, value(row) && value(row) + 1, row.name]");
    let wrong = right.replacen(line, broken, 1);
    if wrong == right {
        bail!("page.js no longer has the line that this test breaks");
    }
    std::fs::write(&page, wrong)?;
    let mut check = python::with_browser_driver()?;
    check.arg("tests/report/check_report.py").arg("--chromium").arg(chromium);
    check.arg("--shots").arg(folder.join("shots-wrong")).arg(&page);
    eprintln!("an error is expected now:");
    let caught = !check.status()?.success();
    std::fs::write(&page, right)?;
    if !caught {
        bail!("ranks drawn one too high were not noticed");
    }
    Ok(())
}
