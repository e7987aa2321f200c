//! `cargo xtask sweep` runs the example sweep on the bundled model, kills it in the middle, and resumes it. No point may run
//! twice: the rows from before the kill must still be there, with the same recorded times.

use crate::shell::{command, lowrank_compress, root, run as sh, target};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Minimum number of points of the example.
const POINTS_MIN: usize = 24;
/// The sweep is killed after so many verified points.
const KILLED_AFTER: usize = 2;
/// Time limit for the first points.
const PATIENCE: Duration = Duration::from_secs(300);

/// The folder of the sweep.
pub(crate) fn folder() -> PathBuf {
    target().join("sweep/tiny")
}

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    let tool = lowrank_compress()?;
    let out = folder();
    if out.exists() {
        std::fs::remove_dir_all(&out)?;
    }
    let cache = target().join("sweep/cache");
    let sweep = || -> Command {
        let mut sweep = command(&tool);
        sweep.args(["sweep", "configs/sweep-tiny.toml", "--cache"]).arg(&cache).arg("--out").arg(&out);
        sweep
    };
    let mut child = sweep().arg("--quiet").stdout(Stdio::null()).spawn().context("cannot start the sweep")?;
    let start = Instant::now();
    while verified(&out)?.len() < KILLED_AFTER {
        if let Some(status) = child.try_wait()? {
            bail!("the sweep ended ({status}) before it could be killed");
        }
        ensure!(start.elapsed() < PATIENCE, "no {KILLED_AFTER} points were verified in {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill()?;
    child.wait()?;
    let before = rows(&out)?;
    sh(&mut sweep())?;
    let after = rows(&out)?;

    ensure!(after.len() >= POINTS_MIN, "{} points, at least {POINTS_MIN} are wanted", after.len());
    for (id, row) in &before {
        let now = after.get(id).with_context(|| format!("point {id} is gone"))?;
        ensure!(row["plan_seconds"] == now["plan_seconds"], "point {id} was planned twice");
        let verified = row["status"] == "verified";
        ensure!(!verified || row == now, "point {id} was verified twice: {row} {now}");
    }
    let missing = after.values().filter(|row| row["on_front"] == true && row["status"] != "verified").count();
    ensure!(missing == 0, "{missing} points of the front were not verified");
    // Another run has nothing to do.
    sh(sweep().arg("--quiet"))?;
    ensure!(rows(&out)? == after, "a sweep that was done did something");
    let (count, all) = (verified(&out)?.len(), after.len());
    println!("sweep: {all} points, {count} verified, killed after {}, nothing done twice", before.len());
    println!("Report: {}", out.join("report.html").strip_prefix(root()).unwrap_or(&out).display());
    Ok(())
}

/// Complete lines of the results, by id. An incomplete line does not count as a row.
fn rows(out: &Path) -> Result<BTreeMap<String, Value>> {
    let Ok(text) = std::fs::read_to_string(out.join("results.jsonl")) else { return Ok(BTreeMap::new()) };
    let whole = text.rfind('\n').map_or(0, |last| last + 1);
    text[..whole]
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line)?;
            Ok((row["id"].as_str().context("a row has an id")?.to_owned(), row))
        })
        .collect()
}

fn verified(out: &Path) -> Result<Vec<String>> {
    Ok(rows(out)?.into_iter().filter(|(_, row)| row["status"] == "verified").map(|(id, _)| id).collect())
}
