//! How far a job is.

use super::folder::{Folder, Progress, Stage};
use crate::commands::shared::print_json;
use crate::exit::Result;
use crate::tables::table;
use serde_json::json;
use std::fs;

/// Prints a row for each stage, and what the tasks of the first one that is not done said of errors.
pub(super) fn show(folder: &Folder, json: bool) -> Result<()> {
    let stages: Vec<(&Stage, Progress)> =
        folder.settings().stages.iter().map(|stage| (stage, folder.progress(&stage.name))).collect();
    let open = stages.iter().find(|(stage, progress)| progress.done < stage.units);
    let errors = open.map(|(open, _)| errors(folder, &open.name)).unwrap_or_default();
    if json {
        let stage = |(stage, progress): &(&Stage, Progress)| {
            json!({
                "stage": stage.name, "units": stage.units, "done": progress.done,
                "cpu_seconds": progress.took.cpu_seconds, "task_seconds": progress.took.wall_seconds,
            })
        };
        let stages: Vec<_> = stages.iter().map(stage).collect();
        return print_json(&json!({ "stages": stages, "is_done": open.is_none(), "errors": errors }));
    }
    let row = |(stage, progress): &(&Stage, Progress)| {
        let seconds = [progress.took.cpu_seconds, progress.took.wall_seconds];
        let seconds = seconds.map(|seconds| format!("{seconds:.1}"));
        [stage.name.clone(), progress.done.to_string(), stage.units.to_string()]
            .into_iter()
            .chain(seconds)
            .collect()
    };
    println!("{}", table(&["stage", "done", "units", "CPU s", "task s"], stages.iter().map(row)));
    if open.is_none() {
        println!("All is done.");
    }
    errors.iter().for_each(|line| println!("{line}"));
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
