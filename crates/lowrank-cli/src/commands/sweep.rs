//! `sweep`: plans of many points, compression and verification of some, and files that hold what came of each.

mod points;
mod rows;
mod run;

use crate::args::{JobArgs, MachineFlags, Verbosity};
use crate::commands::shared::{open, print_json};
use crate::exit::{Failure, Result, unwritten, usage};
use crate::grid::{Sweep, plain};
use crate::progress::Console;
use crate::signals;
use crate::tables::table;
use clap::Args;
use lowrank_model::ErrorKind;
use lowrank_pipeline::memory::Demand;
use lowrank_pipeline::planning::{Subject, refuse_factored};
use lowrank_pipeline::workers::{self, CachePlace};
use lowrank_pipeline::{PipelineError, base};
use lowrank_report::{Page, SweepPage, place};
use lowrank_sweep::{PointId, Results, ResultsHeader, Row, Status, header};
use lowrank_writer::report::BaseModel;
use points::{Identified, Verification, check_patterns, identify};
use rows::print_rows;
use run::Run;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Flags of `sweep`.
#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    /// TOML file: what all points share, the grid, what is compressed (docs/sweeps.md)
    config: PathBuf,
    /// Folder of the results; a sweep that is there is resumed [default: sweep]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Checkpoint directory, or org/name in the local Hugging Face cache, instead of the config's
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    model: Option<String>,
    /// Plans made at once [default: one per core]; checkpoints are made one after another
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    jobs: usize,
    /// Only the first N points of the config
    #[arg(long, value_name = "N")]
    max_points: Option<usize>,
    /// Check the config and list its points, but do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    machine: MachineFlags,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Runs the command.
pub(crate) fn run(args: &SweepArgs) -> Result<()> {
    let (model, machine) = (args.model.clone(), args.machine.clone());
    let flags = JobArgs { model, machine, ..JobArgs::default() };
    let config = Sweep::read(&args.config, &flags)?;
    if args.max_points == Some(0) {
        return Err(usage("--max-points starts at 1"));
    }
    let first = &config.points[0];
    let mut resources = first.job.resources.clone();
    // Points share what is measured, also where nothing is to be kept.
    let run_cache = tempfile::tempdir()
        .map_err(|error| unwritten(&std::env::temp_dir(), "cannot create a folder", &error))?;
    if resources.cache == CachePlace::Nowhere {
        resources.cache = CachePlace::At(run_cache.path().to_owned());
    }
    let model = &first.job.model;
    let checkpoint = open(model)?;
    refuse_factored(&checkpoint)?;
    let subject = Subject::of(&checkpoint);
    check_patterns(&config, &subject)?;
    let (texts, points) = identify(&config, &checkpoint, &subject)?;
    let out = args.out.clone().or(config.shared.out.clone()).unwrap_or_else(|| "sweep".into());
    base::check_place(&checkpoint, &out)?;
    let verification = Verification::new(&config, &checkpoint)?;
    if args.dry_run {
        return list(&config, &points, &out, args.verbosity);
    }
    // A device that is not there fails the sweep, not each of its points.
    resources.algebra().map_err(PipelineError::from)?;
    let interrupt = signals::watch()?;
    let console = Console::new(args.verbosity.quiet);
    let dtype = workers::widest(&checkpoint, None);
    let demand = |one: &Identified<'_>| Demand::plan(checkpoint.config(), dtype, &one.point.job.recipe);
    let pool = workers::pool(&Demand::of_each(points.iter().map(demand)), &resources)?;
    let base = base::identify_remembered(&checkpoint, model, &pool, &console, &interrupt, &resources)?;
    let results = Results::open(&out, &header_of(&config, &base, &subject, &verification), &config.axes)?;
    let sweep = Run {
        config: &config,
        points: &points,
        last: args.max_points.unwrap_or(usize::MAX),
        texts: &texts,
        checkpoint: &checkpoint,
        subject: &subject,
        base: &base,
        resources: &resources,
        interrupt: &interrupt,
        console: &console,
        out: &out,
        verification: &verification,
        results: Mutex::new(results),
    };
    let done = sweep.run(&pool, args.jobs).map_err(|failure| match failure.kind() {
        kind if kind.is_stop() => Failure::new(
            kind,
            format!(
                "stopped; {} holds the finished points, run the same command again to resume",
                out.display()
            ),
        ),
        _ => failure,
    });
    // Also after an early end: what is there is in order and can be looked at.
    let ordered = sweep.order();
    done.and(ordered)?;
    conclude(&sweep, args.verbosity)
}

/// `--dry-run`.
fn list(config: &Sweep, points: &[Identified<'_>], out: &Path, verbosity: Verbosity) -> Result<()> {
    let known = lowrank_sweep::results::rows(out)?;
    let status = |id: &PointId| known.iter().find(|row| row.id == *id).map(|row| row.status);
    if verbosity.json {
        let point = |one: &Identified<'_>| json!({ "point": one.point.number, "id": one.id, "settings": one.point.settings, "status": status(&one.id) });
        return print_json(&json!({ "points": points.iter().map(point).collect::<Vec<_>>() }));
    }
    if verbosity.quiet {
        return Ok(());
    }
    let axes = config.differing();
    let header: Vec<&str> =
        ["point", "id", "so far"].into_iter().chain(axes.iter().map(String::as_str)).collect();
    let rows = points.iter().map(|one| {
        let status = status(&one.id).map_or("-", Status::as_str);
        let settings = axes.iter().map(|key| one.point.settings.get(key).map_or("-".into(), plain));
        [one.point.number.to_string(), one.id.to_string(), status.into()]
            .into_iter()
            .chain(settings)
            .collect()
    });
    println!("{}", table(&header, rows));
    println!("{} points; nothing was planned.", points.len());
    Ok(())
}

fn header_of(
    config: &Sweep,
    base: &BaseModel,
    subject: &Subject,
    verification: &Verification,
) -> ResultsHeader {
    ResultsHeader {
        sweep_version: header::SWEEP_VERSION,
        tool: "lowrank-compress".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        base_model: json!(base),
        params_before: subject.before.params,
        bytes_before: subject.before.bytes,
        verification: verification.of.clone(),
        axes: config.differing(),
    }
}

/// The page, the summary, and how it ended.
fn conclude(sweep: &Run<'_>, verbosity: Verbosity) -> Result<()> {
    let page = sweep.out.join(place::REPORT);
    Page::of_sweep(place::name(sweep.out), SweepPage::read(sweep.out)?).write(&page)?;
    let results = sweep.results();
    let rows: Vec<&Row> = results.rows().iter().filter(|row| row.point > 0).collect();
    let count = |status| rows.iter().filter(|row| row.status == status).count();
    if verbosity.json {
        print_json(&json!({
            "out": sweep.out,
            "report": page,
            "points": rows.len(),
            "planned": rows.iter().filter(|row| row.params.is_some()).count(),
            "verified": count(Status::Verified),
            "failed": count(Status::Failed),
            "front": rows.iter().filter(|row| row.on_front).map(|row| &row.id).collect::<Vec<_>>(),
        }))?;
    } else if !verbosity.quiet {
        print_rows(&rows, sweep.config, verbosity.verbose);
        println!(
            "{} points: {} planned, {} verified, {} failed.",
            rows.len(),
            rows.iter().filter(|row| row.params.is_some()).count(),
            count(Status::Verified),
            count(Status::Failed)
        );
        println!("Results: {}", sweep.out.join(lowrank_sweep::results::CSV).display());
        println!("Report: {}", page.display());
    }
    match rows.iter().find(|row| row.status == Status::Failed) {
        None => Ok(()),
        Some(first) => {
            let (failed, all, point) = (count(Status::Failed), rows.len(), first.point);
            let error = first.error.as_deref().unwrap_or_default();
            let line = format!("{failed} of {all} points failed; the first, point {point}: {error}");
            Err(Failure::new(ErrorKind::PointsFailed, line))
        }
    }
}
