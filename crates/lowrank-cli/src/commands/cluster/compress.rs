//! A compression of one checkpoint on a cluster.

use super::estimate;
use super::folder::{Folder, Settings, Stage, Subject};
use super::submit::{self, absolute_path};
use super::task::{Share, check_machine, machine_of, run_units};
use crate::args::{JobArgs, SlurmFlags, given};
use crate::commands::compress;
use crate::commands::shared::{open_base, resolve, write_plan};
use crate::config::{flags_of, with_config};
use crate::exit::{Result, usage};
use crate::job::Job;
use crate::progress::Console;
use lowrank_pipeline::compress::units::{self, PUBLISH, UnitStage};
use lowrank_pipeline::planning;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Prepares the folder, and prints or submits the script.
pub(super) fn begin(job: JobArgs, slurm: &SlurmFlags) -> Result<()> {
    let flags = shared_paths(with_config(job)?)?;
    let (verbosity, dry_run) = (flags.verbosity, flags.dry_run);
    let out = flags.out.clone().ok_or_else(|| usage("--out is missing: where shall the result go?"))?;
    let dir = submit::dir(slurm, &out)?;
    let settings = given(&flags);
    let job = Job::new(flags)?;
    let checkpoint = open_base(&job.model, &job.recipe)?;
    let Some(shape) = units::shape(&checkpoint, &job.recipe)? else {
        return Err(usage(
            "a job without a calibration text is done by one machine in hours: leave `cluster` out",
        ));
    };
    planning::refuse_early(&checkpoint, &job.recipe, &Console::new(verbosity.quiet))?;
    if dry_run {
        return estimate::print(&checkpoint, &job, shape, slurm);
    }
    let stages = shape.stages(&job.recipe).into_iter();
    let stages = stages.map(|(stage, units)| Stage::of(stage, stage.to_string(), units));
    let stages = stages.chain([Stage::other(PUBLISH, 1)]).collect();
    let subject = Subject::Compress(settings);
    let folder = Folder::prepare(&dir, Settings { subject, stages, other_cpu: slurm.other_cpu })?;
    submit::deliver(slurm, &folder)
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
pub(super) fn work(
    folder: &Folder,
    mut settings: Map<String, Value>,
    stage: &str,
    share: Share,
) -> Result<()> {
    settings.insert("quiet".into(), true.into());
    let mut flags = flags_of(settings)?;
    flags.machine = machine_of(flags.machine, folder)?;
    let job = Job::new(flags.clone())?;
    check_machine(folder, &job.resources)?;
    if stage == PUBLISH {
        // Submitted again after the end.
        if folder.progress(PUBLISH).done == 0 {
            units::check_shards(&open_base(&job.model, &job.recipe)?, &job.resources)?;
            compress::run(flags)?;
        }
        return folder.mark(PUBLISH, 0);
    }
    let unit_stage: UnitStage = stage.parse().map_err(usage)?;
    let plan = run_units(folder, &job, (stage, unit_stage), share)?;
    plan.map_or(Ok(()), |plan| write_plan(&folder.path().join("plan.json"), &plan))
}
