//! `sweep`: plans of many points, compression and verification of some, and files that hold what came of each.

mod args;
mod one;
mod opened;
mod points;
mod rows;
mod run;

use crate::args::Verbosity;
use crate::commands::shared::print_json;
use crate::exit::{Failure, Result, usage};
use crate::grid::plain;
use crate::tables::table;
pub(crate) use args::SweepArgs;
use lowrank_model::ErrorKind;
use lowrank_report::{Page, SweepPage, place};
use lowrank_sweep::{PointId, Row, Status};
pub(crate) use one::Compressing;
pub(crate) use opened::{Opened, opened};
pub(crate) use points::Identified;
use rows::print_rows;
pub(crate) use run::Run;
use serde_json::json;

/// Runs the command on this machine.
pub(crate) fn run(args: &SweepArgs) -> Result<()> {
    if let Some(flag) = args.slurm.first_given() {
        return Err(usage(format!("{flag} says how a cluster is used: add --cluster")));
    }
    opened(args, |sweep| if args.dry_run { list(sweep, args.verbosity) } else { sweep_all(sweep, args) })
}

/// Plans, compresses and verifies on this machine.
fn sweep_all(sweep: &Opened<'_>, args: &SweepArgs) -> Result<()> {
    Run::with(sweep, args.verbosity, |run, pool| {
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
