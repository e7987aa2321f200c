//! How a job is given to Slurm: as a script, printed or submitted.

use super::folder::{Folder, Stage};
use super::script::Script;
use crate::args::SlurmFlags;
use crate::exit::{Result, unwritten, usage};
use crate::tables::table;
use std::path::{Path, PathBuf, absolute};
use std::process::Command;

fn nodes(slurm: &SlurmFlags) -> u32 {
    slurm.nodes.unwrap_or(1)
}

/// The job's folder.
pub(super) fn dir(slurm: &SlurmFlags, out: &Path) -> Result<PathBuf> {
    match &slurm.dir {
        Some(dir) => absolute_path(dir),
        None => absolute_path(&PathBuf::from(format!("{}.cluster", out.display()))),
    }
}

/// Prints or submits the script.
pub(super) fn deliver(slurm: &SlurmFlags, folder: &Folder) -> Result<()> {
    let script = Script { folder, nodes: nodes(slurm), sbatch: &slurm.sbatch }.text()?;
    if !slurm.submit {
        print!("{script}");
        return Ok(());
    }
    let file = folder.path().join("job.sh");
    lowrank_files::write_whole(&file, script.as_bytes())
        .map_err(|error| unwritten(&file, "the script was not written", &error))?;
    match Command::new("sbatch").arg(&file).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(usage(format!("sbatch {}: {status}", file.display()))),
        Err(error) => {
            Err(usage(format!("cannot start sbatch: {error}; is this a machine of a Slurm cluster?")))
        }
    }
}

/// Prints the stages.
pub(super) fn print(slurm: &SlurmFlags, stages: &[Stage]) {
    let nodes = nodes(slurm);
    let row =
        |stage: &Stage| vec![stage.name.clone(), stage.units.to_string(), stage.tasks(nodes).to_string()];
    println!("{}", table(&["stage", "units", "tasks"], stages.iter().map(row)));
}

/// A path that every machine understands.
pub(super) fn absolute_path(path: &Path) -> Result<PathBuf> {
    absolute(path).map_err(|error| usage(format!("{}: {error}", path.display())))
}
