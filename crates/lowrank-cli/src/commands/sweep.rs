//! `sweep`: plans of many points, compression and verification of some, and files that hold what came of each.

mod one;
mod points;
mod rows;
mod run;

use crate::args::{JobArgs, MachineFlags, SlurmFlags, Verbosity};
use crate::commands::shared::{open, print_json};
use crate::exit::{Failure, Result, unwritten, usage};
use crate::grid::{Compress, Sweep, plain};
use crate::progress::Console;
use crate::signals;
use crate::tables::table;
use clap::Args;
use lowrank_model::ErrorKind;
use lowrank_pipeline::memory::Demand;
use lowrank_pipeline::planning::{Subject, refuse_factored};
use lowrank_pipeline::workers::{self, CachePlace, Resources};
use lowrank_pipeline::{CalibrationText, Interrupt, PipelineError, base};
use lowrank_reader::Checkpoint;
use lowrank_report::{Page, SweepPage, place};
use lowrank_sweep::{PointId, Results, ResultsHeader, Row, Status, header};
use lowrank_writer::report::BaseModel;
pub(crate) use one::Compressing;
pub(crate) use points::Identified;
use points::{Verification, check_patterns, identify};
use rows::print_rows;
pub(crate) use run::Run;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Flags of `sweep`.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(crate) struct SweepArgs {
    /// TOML file: what all points share, the grid, what is compressed (docs/sweeps.md)
    pub(crate) config: PathBuf,
    /// Folder of the results; a sweep that is there is resumed [default: sweep]
    #[arg(long, short, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Checkpoint directory, or org/name in the local Hugging Face cache, instead of the config's
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    pub(crate) model: Option<String>,
    /// Plans made at once [default: one per core]; checkpoints are made one after another
    #[arg(long, short, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) jobs: usize,
    /// Only the first N points of the config
    #[arg(long, value_name = "N")]
    pub(crate) max_points: Option<usize>,
    /// Check the config and list its points, but do nothing
    #[arg(long)]
    #[serde(skip)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) machine: MachineFlags,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) verbosity: Verbosity,
    /// Print the script that makes the sweep on several machines by Slurm (docs/cluster.md), instead of making it
    #[arg(long, help_heading = "Slurm")]
    #[serde(skip)]
    pub(crate) cluster: bool,
    #[command(flatten)]
    #[serde(skip)]
    pub(crate) slurm: SlurmFlags,
}

/// Runs the command on this machine.
pub(crate) fn run(args: &SweepArgs) -> Result<()> {
    if let Some(flag) = args.slurm.first_given() {
        return Err(usage(format!("{flag} says how a cluster is used: add --cluster")));
    }
    opened(args, |sweep| if args.dry_run { list(sweep, args.verbosity) } else { sweep_all(sweep, args) })
}

/// A sweep that is checked against its model, before anything runs.
pub(crate) struct Opened<'a> {
    config: &'a Sweep,
    /// The last point of the config that is wanted.
    last: usize,
    texts: &'a [CalibrationText],
    points: &'a [Identified<'a>],
    pub(crate) model: &'a str,
    pub(crate) checkpoint: &'a Checkpoint,
    subject: &'a Subject,
    pub(crate) resources: &'a Resources,
    pub(crate) out: &'a Path,
    verification: &'a Verification,
}

/// Opens a sweep.
pub(crate) fn opened<R>(args: &SweepArgs, act: impl FnOnce(&Opened<'_>) -> Result<R>) -> Result<R> {
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
    act(&Opened {
        config: &config,
        last: args.max_points.unwrap_or(usize::MAX),
        texts: &texts,
        points: &points,
        model,
        checkpoint: &checkpoint,
        subject: &subject,
        resources: &resources,
        out: &out,
        verification: &verification,
    })
}

impl Opened<'_> {
    /// With what runs it.
    pub(crate) fn running<R>(
        &self,
        verbosity: Verbosity,
        act: impl FnOnce(&Run<'_>, &rayon::ThreadPool) -> Result<R>,
    ) -> Result<R> {
        let Self { checkpoint, resources, out, model, .. } = *self;
        // A device that is not there fails the sweep, not each of its points.
        resources.algebra().map_err(PipelineError::from)?;
        let interrupt = signals::watch()?;
        let console = Console::new(verbosity.quiet);
        let dtype = workers::widest(checkpoint, None);
        let demand = |one: &Identified<'_>| Demand::plan(checkpoint.config(), dtype, &one.point.job.recipe);
        let pool = workers::pool(&Demand::of_each(self.points.iter().map(demand)), resources)?;
        let base = base::identify_remembered(checkpoint, model, &pool, &console, &interrupt, resources)?;
        let results = Results::open(out, &self.header(&base), &self.config.axes)?;
        let compressing = self.compressing(&interrupt);
        let (base, console) = (&base, &console);
        let run = Run { sweep: self, base, compressing, console, results: Mutex::new(results) };
        act(&run, &pool)
    }

    /// What makes and verifies checkpoints of points.
    pub(crate) fn compressing<'a>(&'a self, interrupt: &'a Interrupt) -> Compressing<'a> {
        let Self { checkpoint, resources, out, verification, .. } = *self;
        Compressing { checkpoint, resources, out, verification, interrupt }
    }

    /// Those that this sweep does.
    pub(crate) fn points(&self) -> impl Iterator<Item = &Identified<'_>> {
        self.points.iter().filter(|one| one.point.number <= self.last)
    }

    /// Whether the config wants a planned point to be compressed and verified.
    pub(crate) fn wants(&self, row: &Row) -> bool {
        row.status == Status::Planned
            && match self.config.compress {
                Compress::None => false,
                Compress::All => row.params.is_some(),
                Compress::Pareto => row.on_front,
            }
    }

    /// Whether points may be compressed at all.
    pub(crate) fn compresses(&self) -> bool {
        self.config.compress != Compress::None
    }

    fn header(&self, base: &BaseModel) -> ResultsHeader {
        ResultsHeader {
            sweep_version: header::SWEEP_VERSION,
            tool: "lowrank-compress".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            base_model: json!(base),
            params_before: self.subject.before.params,
            bytes_before: self.subject.before.bytes,
            verification: self.verification.of.clone(),
            axes: self.config.differing(),
        }
    }
}

/// Plans, compresses and verifies on this machine.
fn sweep_all(sweep: &Opened<'_>, args: &SweepArgs) -> Result<()> {
    sweep.running(args.verbosity, |run, pool| {
        let done = run.run(pool, args.jobs).map_err(|failure| match failure.kind() {
            kind if kind.is_stop() => Failure::new(
                kind,
                format!(
                    "stopped; {} holds the finished points, run the same command again to resume",
                    sweep.out.display()
                ),
            ),
            _ => failure,
        });
        // Also after an early end: what is there is in order and can be looked at.
        let ordered = run.order();
        done.and(ordered)?;
        conclude(run, args.verbosity)
    })
}

/// `--dry-run`.
fn list(sweep: &Opened<'_>, verbosity: Verbosity) -> Result<()> {
    let Opened { config, points, out, .. } = *sweep;
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

/// The page, the summary, and how it ended.
pub(crate) fn conclude(run: &Run<'_>, verbosity: Verbosity) -> Result<()> {
    let sweep = run.sweep;
    let page = sweep.out.join(place::REPORT);
    Page::of_sweep(place::name(sweep.out), SweepPage::read(sweep.out)?).write(&page)?;
    let results = run.results();
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
