//! How far a job is.

use super::folder::{Folder, Stage};
use crate::exit::Result;
use crate::tables::table;
use std::fs;

/// Prints a row for each stage, and what the tasks of the first one that is not done said of errors.
pub(super) fn show(folder: &Folder) -> Result<()> {
    let stages = &folder.settings().stages;
    let row = |Stage { name, units, .. }: &Stage| {
        let took = folder.took_together(name);
        let seconds = [took.cpu_seconds, took.wall_seconds].map(|seconds| format!("{seconds:.1}"));
        [name.clone(), folder.done(name).to_string(), units.to_string()].into_iter().chain(seconds).collect()
    };
    println!("{}", table(&["stage", "done", "units", "CPU s", "task s"], stages.iter().map(row)));
    let open = stages.iter().find(|stage| folder.done(&stage.name) < stage.units);
    let Some(open) = open else {
        println!("All is done.");
        return Ok(());
    };
    for line in errors(folder, &open.name) {
        println!("{line}");
    }
    Ok(())
}

/// Lines of a stage's logs that begin with `error: ` or are Slurm's own, each with its file.
fn errors(folder: &Folder, stage: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder.path().join("logs")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&format!("{stage}-")) {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let is_error = |line: &&str| line.starts_with("error: ") || line.starts_with("slurmstepd: error");
        found.extend(text.lines().filter(is_error).map(|line| format!("{name}: {line}")));
    }
    found.sort();
    found
}
