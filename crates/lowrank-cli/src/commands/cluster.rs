//! `cluster`: a compression on several machines, as a chain of Slurm job arrays over a folder that they share.

mod folder;
mod script;
mod status;

use crate::args::{JobArgs, given};
use crate::commands::compress;
use crate::commands::shared::{open, resolve, write_plan};
use crate::config::{flags_of, with_config};
use crate::exit::{Result, usage};
use crate::job::Job;
use crate::progress::Console;
use crate::signals;
use crate::tables::table;
use clap::{Args, Subcommand};
use folder::{Folder, Settings};
use lowrank_pipeline::compress::units::{self, UnitStage};
use lowrank_pipeline::machine;
use script::{LAST, Script};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf, absolute};
use std::process::Command;

/// Flags of `cluster`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ClusterArgs {
    #[command(subcommand)]
    command: Option<ClusterCommand>,
    /// Machines that work at the same time at most; the bytes do not depend on it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    nodes: u32,
    /// Give the script to sbatch instead of printing it
    #[arg(long)]
    submit: bool,
    /// Folder on a disk that all machines see, for what they share [default: OUT.cluster]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Option of sbatch for every job, such as --partition=long; may be repeated
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    sbatch: Vec<String>,
    /// Let machines have CPUs of different kinds: bytes then depend on which did what
    #[arg(long)]
    other_cpu: bool,
    #[command(flatten)]
    job: JobArgs,
}

#[derive(Debug, Subcommand)]
enum ClusterCommand {
    /// Show how far a job is, and what stopped it
    Status {
        /// Its folder
        dir: PathBuf,
    },
    /// Do one task of a stage: what the script calls
    #[command(hide = true)]
    Run {
        /// The job's folder
        dir: PathBuf,
        /// Which stage
        stage: String,
        /// Which task of it
        task: usize,
        /// Tasks of the stage in all
        tasks: usize,
    },
}

/// Runs the command.
pub(crate) fn run(args: ClusterArgs) -> Result<()> {
    match &args.command {
        Some(ClusterCommand::Status { dir }) => status::show(&Folder::open(dir)?),
        Some(ClusterCommand::Run { dir, stage, task, tasks }) => work(dir, stage, (*task, *tasks)),
        None => begin(args),
    }
}

/// Prepares the folder, and prints or submits the script.
fn begin(args: ClusterArgs) -> Result<()> {
    let ClusterArgs { nodes, submit, dir, sbatch, other_cpu, job, .. } = args;
    let flags = shared_paths(with_config(job)?)?;
    let (verbosity, dry_run) = (flags.verbosity, flags.dry_run);
    let out = flags.out.clone().ok_or_else(|| usage("--out is missing: where shall the result go?"))?;
    let dir = match dir {
        Some(dir) => absolute_path(&dir)?,
        None => PathBuf::from(format!("{}.cluster", out.display())),
    };
    let settings = given(&flags);
    let job = Job::new(flags)?;
    let checkpoint = open(&job.model)?;
    let stages = units::stages(&checkpoint, &job.recipe)?;
    if stages.is_empty() {
        return Err(usage(
            "a job without a calibration text is done by one machine in hours: leave `cluster` out",
        ));
    }
    lowrank_pipeline::planning::refuse_early(&checkpoint, &job.recipe, &Console::new(verbosity.quiet))?;
    if dry_run {
        println!("{}", table(&["stage", "units", "tasks"], script::rows(&stages, nodes)));
        return Ok(());
    }
    let stages = stages.into_iter().map(|(stage, units)| (stage.to_string(), units)).collect();
    let folder = Folder::prepare(&dir, Settings { settings, stages, other_cpu })?;
    let script = Script { folder: &folder, nodes, sbatch: &sbatch }.text()?;
    if !submit {
        print!("{script}");
        return Ok(());
    }
    let file = folder.path().join("job.sh");
    lowrank_files::write_whole(&file, script.as_bytes())
        .map_err(|error| crate::exit::unwritten(&file, "the script was not written", &error))?;
    let status = Command::new("sbatch").arg(&file).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(usage(format!("sbatch {}: {status}", file.display()))),
        Err(error) => {
            Err(usage(format!("cannot start sbatch: {error}; is this a machine of a Slurm cluster?")))
        }
    }
}

fn absolute_path(path: &Path) -> Result<PathBuf> {
    absolute(path).map_err(|error| usage(format!("{}: {error}", path.display())))
}

/// The same flags with paths that every machine understands.
fn shared_paths(flags: JobArgs) -> Result<JobArgs> {
    let mut settings = given(&flags);
    let path_of = |value: &Value| -> Result<Value> {
        Ok(json!(absolute_path(Path::new(value.as_str().unwrap_or_default()))?))
    };
    for key in ["out", "plan", "ranks"] {
        if let Some(value) = settings.get(key) {
            let path = path_of(value)?;
            settings.insert(key.into(), path);
        }
    }
    if let Some(model) = &flags.model
        && Path::new(model).is_dir()
    {
        settings.insert("model".into(), json!(absolute_path(&resolve(model)?)?));
    }
    if let Some(Value::Array(texts)) = settings.get_mut("calibrate") {
        for text in texts {
            if Path::new(text.as_str().unwrap_or_default()).is_file() {
                *text = path_of(text)?;
            }
        }
    }
    flags_of(settings)
}

/// Does a task: its share of the units of a stage.
fn work(dir: &Path, stage: &str, (task, tasks): (usize, usize)) -> Result<()> {
    let folder = Folder::open(dir)?;
    let mut settings: Map<String, Value> = folder.settings().settings.clone();
    settings.insert("cache".into(), json!(folder.cache()));
    settings.insert("quiet".into(), true.into());
    let flags = flags_of(settings)?;
    let job = Job::new(flags.clone())?;
    folder.check_machine(&machine::kind(&job.resources)?)?;
    if stage == LAST {
        // Submitted again after the end.
        if folder.done(LAST) == 0 {
            units::check_shards(&open(&job.model)?, &job.resources)?;
            compress::run(flags)?;
        }
        return folder.mark(LAST, 0);
    }
    let stage: UnitStage = stage.parse().map_err(usage)?;
    let name = stage.to_string();
    let units = folder.settings().stages.iter().find(|(own, _)| *own == name).map(|(_, units)| *units);
    let units = units.ok_or_else(|| usage(format!("{name}: not a stage of this job")))?;
    let mine: Vec<usize> = (0..units).filter(|unit| unit % tasks.max(1) == task).collect();
    let out = job.out.as_deref().unwrap_or(Path::new(""));
    let (checkpoint, interrupt) = (open(&job.model)?, signals::watch()?);
    let request = job.request(out, &interrupt);
    let mut failed = None;
    let mut done = |unit| {
        folder.mark(&name, unit).or_else(|failure| {
            failed = Some(failure);
            Ok(())
        })
    };
    let plan = units::run(&checkpoint, request, (stage, &mine), &Console::new(true), &mut done)?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    plan.map_or(Ok(()), |plan| write_plan(&folder.path().join("plan.json"), &plan))
}
