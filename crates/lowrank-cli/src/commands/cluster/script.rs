//! The script that gives a job to Slurm: one array of tasks for each stage, each after the one before.

use super::folder::Folder;
use crate::exit::{Failure, Result, usage};
use lowrank_pipeline::compress::units::UnitStage;
use std::fmt::Write;

/// The stage that writes the output: an ordinary run, which finds everything in the cache.
pub(super) const LAST: &str = "publish";
/// Tasks for each machine, so that one that is slow holds up little.
const TASKS_PER_NODE: usize = 4;

/// What is written.
pub(super) struct Script<'a> {
    pub(super) folder: &'a Folder,
    pub(super) nodes: u32,
    /// More options of sbatch.
    pub(super) sbatch: &'a [String],
}

/// Tasks of a stage.
fn tasks(units: usize, nodes: u32) -> usize {
    units.min(nodes as usize * TASKS_PER_NODE).max(1)
}

/// A row for each stage.
pub(super) fn rows(stages: &[(UnitStage, usize)], nodes: u32) -> Vec<Vec<String>> {
    let row = |name: String, units: usize| vec![name, units.to_string(), tasks(units, nodes).to_string()];
    let own = stages.iter().map(|&(stage, units)| row(stage.to_string(), units));
    own.chain([row(LAST.into(), 1)]).collect()
}

impl Script<'_> {
    /// The whole script.
    pub(super) fn text(&self) -> Result<String> {
        let program = std::env::current_exe().map_err(Failure::bug)?;
        let quoted = |text: &str| match text.contains(['\'', '\n']) {
            true => {
                Err(usage(format!("{text}: a path with a quote or a line break cannot stand in a script")))
            }
            false => Ok(format!("'{text}'")),
        };
        let dir = quoted(&self.folder.path().display().to_string())?;
        let program = quoted(&program.display().to_string())?;
        let options = self.sbatch.iter().map(|option| quoted(option)).collect::<Result<Vec<_>>>()?.join(" ");
        let mut text = format!(
            "#!/bin/bash\n\
             # Compresses a checkpoint on at most {nodes} machines at a time: one array of tasks for each stage, each after the one before.\n\
             # Give it to sbatch, or run it where sbatch works. Again after a failure: what is finished stays.\n\
             # How far it is: lowrank-compress cluster status {dir}\n\
             #SBATCH --job-name=lowrank-compress --nodes=1 --ntasks=1 --cpus-per-task=1\n\
             #SBATCH --output=/dev/null\n\
             set -euo pipefail\n\
             program={program}\n\
             dir={dir}\n\
             after=\n\
             stage() {{ # NAME TASKS\n\
             \x20 after=$(sbatch --parsable --requeue --nodes=1 --ntasks=1 --job-name=\"lowrank-$1\" --array=\"0-$(($2 - 1))%{nodes}\" \\\n\
             \x20   --kill-on-invalid-dep=yes ${{after:+--dependency=afterok:$after}} --output=\"$dir/logs/$1-%a.log\" {options} \\\n\
             \x20   --wrap \"exec \\\"$program\\\" cluster run \\\"$dir\\\" $1 \\$SLURM_ARRAY_TASK_ID $2\")\n\
             \x20 after=${{after%%;*}}\n\
             }}\n",
            nodes = self.nodes,
        );
        let last = (LAST.to_owned(), 1);
        for (name, units) in self.folder.settings().stages.iter().chain([&last]) {
            writeln!(text, "stage {name} {}", tasks(*units, self.nodes)).map_err(Failure::bug)?;
        }
        text.push_str("echo \"the last job is $after\"\n");
        Ok(text)
    }
}
