//! The script that gives a job to Slurm: one array of tasks for each stage, each after the one before.

use super::folder::Folder;
use crate::exit::{Failure, Result, usage};
use std::fmt::Write;

/// What is written.
pub(super) struct Script<'a> {
    pub(super) folder: &'a Folder,
    pub(super) nodes: u32,
    /// More options of sbatch.
    pub(super) sbatch: &'a [String],
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
             # What this script was given is not what its jobs are given.\n\
             unset SLURM_MEM_PER_NODE SLURM_MEM_PER_CPU\n\
             program={program}\n\
             dir={dir}\n\
             after=\n\
             stage() {{ # NAME TASKS UNITS\n\
             \x20 # What is done is not begun again.\n\
             \x20 if [ \"$(find \"$dir/done/$1\" -name '[0-9]*' 2>/dev/null | wc -l)\" -ge \"$3\" ]; then return; fi\n\
             \x20 after=$(sbatch --parsable --requeue --nodes=1 --ntasks=1 --job-name=\"lowrank-$1\" --array=\"0-$(($2 - 1))%{nodes}\" \\\n\
             \x20   --kill-on-invalid-dep=yes ${{after:+--dependency=afterok:$after}} --output=\"$dir/logs/$1-%a.log\" {options} \\\n\
             \x20   --wrap \"exec \\\"$program\\\" cluster run \\\"$dir\\\" $1 \\$SLURM_ARRAY_TASK_ID $2\")\n\
             \x20 after=${{after%%;*}}\n\
             }}\n",
            nodes = self.nodes,
        );
        for stage in &self.folder.settings().stages {
            writeln!(text, "stage {} {} {}", stage.name, stage.tasks(self.nodes), stage.units)
                .map_err(Failure::bug)?;
        }
        text.push_str("echo \"the last job is ${after:-none: all is done}\"\n");
        Ok(text)
    }
}
