//! A sweep on a cluster: what points are planned from is measured in units, one task plans, and the tasks of one array compress
//! and verify the chosen points. Their rows are merged in the end.

use super::folder::{Folder, Settings, Stage, Subject, SweepJob, refused};
use super::submit::{self, absolute_path};
use super::task::{Share, check_machine, machine_of, run_units};
use crate::args::Verbosity;
use crate::commands::sweep::{Compressing, Identified, Opened, Run, SweepArgs, conclude, opened};
use crate::exit::{Failure, Result, unwritten, usage};
use crate::progress::Console;
use crate::signals;
use lowrank_forward::Chosen;
use lowrank_pipeline::compress::units::{self, UnitStage};
use lowrank_sweep::{Row, Status, results};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One task: plans of all points.
const PLAN: &str = "plan";
/// A unit is a point, which may have to be compressed and verified or not.
const POINTS: &str = "points";
/// One task: all rows in one table.
const MERGE: &str = "merge";

/// Prepares the folder, and prints or submits the script.
pub(crate) fn begin(args: &SweepArgs) -> Result<()> {
    let (job, stages, dir) = opened(args, |sweep| {
        let out = absolute_path(sweep.out)?;
        let model = match Path::new(sweep.model).is_dir() {
            true => absolute_path(Path::new(sweep.model))?.display().to_string(),
            false => sweep.model.to_owned(),
        };
        let flags = SweepArgs {
            config: absolute_path(&args.config)?,
            out: Some(out.clone()),
            model: Some(model),
            ..args.clone()
        };
        let config_blake3 = hash_of(&args.config)?;
        let job = SweepJob { flags, config_blake3, work_dir: absolute_path(Path::new("."))? };
        Ok((job, stages(sweep)?, submit::dir(&args.slurm, &out)?))
    })?;
    if args.dry_run {
        submit::print(&args.slurm, &stages);
        return Ok(());
    }
    let settings =
        Settings { subject: Subject::Sweep(Box::new(job)), stages, other_cpu: args.slurm.other_cpu };
    submit::deliver(&args.slurm, &Folder::prepare(&dir, settings)?)
}

fn hash_of(config: &Path) -> Result<String> {
    let bytes = std::fs::read(config).map_err(|error| usage(format!("{}: {error}", config.display())))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// A point of each group that shares what it is planned from, and has a text to measure on.
fn groups<'a>(sweep: &'a Opened<'_>) -> Vec<&'a Identified<'a>> {
    let mut groups = BTreeMap::new();
    for one in sweep.points().filter(|one| one.is_calibrated()) {
        groups.entry(one.measured_like()).or_insert(one);
    }
    groups.into_values().collect()
}

/// All stages with their units. With several groups, the stages of each have its number.
fn stages(sweep: &Opened<'_>) -> Result<Vec<Stage>> {
    let mut stages = Vec::new();
    let groups = groups(sweep);
    for (at, one) in groups.iter().enumerate() {
        let recipe = &one.point.job.recipe;
        let shape = units::shape(sweep.checkpoint, recipe)?;
        for (stage, units) in shape.map(|shape| shape.stages_of_measuring(recipe)).unwrap_or_default() {
            match stage {
                UnitStage::Hash if at > 0 => {}
                UnitStage::Hash => stages.push(Stage::of(stage, stage.to_string(), units)),
                _ => stages.push(Stage::of(stage, name(stage, at, groups.len()), units)),
            }
        }
    }
    stages.push(Stage::other(PLAN, 1));
    if sweep.compresses() {
        stages.push(Stage::other(POINTS, sweep.points().count()));
    }
    stages.push(Stage::other(MERGE, 1));
    Ok(stages)
}

fn name(stage: UnitStage, group: usize, groups: usize) -> String {
    match groups {
        1 => stage.to_string(),
        _ => format!("{stage}-of-{}", group + 1),
    }
}

/// Does a task.
pub(super) fn work(folder: &Folder, job: &SweepJob, stage: &str, share: Share) -> Result<()> {
    std::env::set_current_dir(&job.work_dir)
        .map_err(|error| usage(format!("{}: {error}", job.work_dir.display())))?;
    let config = &job.flags.config;
    if hash_of(config)? != job.config_blake3 {
        let what = "is not the config that this job was begun with; begin another one with --dir";
        return Err(refused(format!("{}: {what}", config.display())));
    }
    let machine = machine_of(job.flags.machine.clone(), folder)?;
    let verbosity = Verbosity { quiet: true, ..Verbosity::default() };
    let args = SweepArgs { machine, verbosity, ..job.flags.clone() };
    opened(&args, |sweep| {
        check_machine(folder, sweep.resources)?;
        match stage {
            PLAN => Run::with(sweep, verbosity, |run, pool| {
                run.plan_all(pool, 0)?;
                run.order()?;
                folder.mark(PLAN, 0)
            }),
            POINTS => points(folder, sweep, share),
            MERGE => Run::with(sweep, verbosity, |run, _| {
                for row in sweep.points().filter_map(|one| kept(folder, one)) {
                    run.results().put(row)?;
                }
                run.order()?;
                run.tidy()?;
                folder.mark(MERGE, 0)?;
                conclude(run, verbosity)
            }),
            _ => measure(folder, sweep, stage, share),
        }
    })
}

/// Units of what a group of points is planned from.
fn measure(folder: &Folder, sweep: &Opened<'_>, name: &str, share: Share) -> Result<()> {
    let groups = groups(sweep);
    let (stage, group) = match name.rsplit_once("-of-") {
        Some((stage, group)) => (stage, group.parse::<usize>().unwrap_or(0).wrapping_sub(1)),
        None => (name, 0),
    };
    let one = groups.get(group).ok_or_else(|| usage(format!("{name}: not a stage of this job")))?;
    let mut job = one.point.job.clone();
    job.resources = sweep.resources.clone();
    run_units(folder, &job, (name, stage.parse().map_err(usage)?), share).map(drop)
}

/// Compresses and verifies a task's share of the chosen points.
fn points(folder: &Folder, sweep: &Opened<'_>, share: Share) -> Result<()> {
    let rows: BTreeMap<_, Row> =
        results::rows(sweep.out)?.into_iter().map(|row| (row.id.clone(), row)).collect();
    let interrupt = signals::watch()?;
    let compressing = sweep.compressing(&interrupt);
    let console = Console::new(true);
    let engine = compressing.begin(&console)?;
    let mut chosen = 0;
    for (at, one) in sweep.points().enumerate() {
        match rows.get(&one.id).filter(|row| sweep.wants(row)) {
            // Shared out among themselves, so that every task has about as many.
            Some(row) => {
                chosen += 1;
                if share.has(chosen - 1) {
                    interrupt.check()?;
                    make(folder, (&compressing, &engine), one, row)?;
                    folder.mark(POINTS, at)?;
                }
            }
            None if share.has(at) => folder.mark(POINTS, at)?,
            None => {}
        }
    }
    Ok(())
}

/// Compresses and verifies a point, unless that is done.
fn make(
    folder: &Folder,
    (compressing, engine): (&Compressing<'_>, &Chosen),
    one: &Identified<'_>,
    row: &Row,
) -> Result<()> {
    if kept(folder, one).is_some_and(|row| row.status == Status::Verified) {
        return Ok(());
    }
    let row = compressing.row_of(one, row.clone(), engine, &Console::new(true))?;
    let path = place(folder, one);
    let text = serde_json::to_vec(&row).map_err(Failure::bug)?;
    let failed = |error: std::io::Error| unwritten(&path, "the row of a point was not written", &error);
    std::fs::create_dir_all(folder.path().join("rows")).map_err(failed)?;
    lowrank_files::write_whole(&path, &text).map_err(failed)
}

fn place(folder: &Folder, one: &Identified<'_>) -> PathBuf {
    folder.path().join("rows").join(format!("{}.json", one.id))
}

/// The row of a point that a task left; one that cannot be read is made again.
fn kept(folder: &Folder, one: &Identified<'_>) -> Option<Row> {
    serde_json::from_slice(&std::fs::read(place(folder, one)).ok()?).ok()
}
