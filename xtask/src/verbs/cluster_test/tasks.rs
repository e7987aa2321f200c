//! The tasks of jobs that run now, found among the processes of this machine.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A task that runs.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) pid: u32,
    /// Which node, from 0.
    pub(super) node: Option<usize>,
    /// Slurm's number of it.
    pub(super) job: Option<String>,
}

/// The tasks of a stage of the job in a folder.
pub(super) fn of_stage(folder: &Path, stage: &str) -> Vec<Task> {
    let wanted: [&OsStr; 4] = ["cluster".as_ref(), "run".as_ref(), folder.as_os_str(), stage.as_ref()];
    let is_task = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        // Not the shell that starts it: its arguments are one text.
        let arguments: Vec<&OsStr> = line.split(|&byte| byte == 0).skip(1).map(OsStr::from_bytes).collect();
        arguments.starts_with(&wanted)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(is_task).map(task).collect()
}

fn task(pid: u32) -> Task {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let variable = |name: &str| {
        let of_name = |entry: &[u8]| Some(String::from_utf8_lossy(entry).strip_prefix(name)?.to_owned());
        environment.split(|&byte| byte == 0).find_map(of_name)
    };
    let node = variable("SLURMD_NODENAME=n").and_then(|node| node.parse().ok());
    Task { pid, node, job: variable("SLURM_JOB_ID=") }
}
