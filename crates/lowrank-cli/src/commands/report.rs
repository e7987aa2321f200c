//! `report`: one HTML file that shows what a compression did; also made after `compress` and `verify`.

use crate::args::Verbosity;
use crate::commands::shared::print_json;
use crate::exit::{Failure, Result, usage};
use clap::Args;
use lowrank_report::{CheckpointPage, Page, ReportError, SweepPage, place};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Flags of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The compressed checkpoint, or the folder of a sweep
    dir: PathBuf,
    /// What `verify` said [default: NAME.verification.json beside the checkpoint, if it is there]
    #[arg(long, value_name = "FILE")]
    verification: Option<PathBuf>,
    /// Where the page goes [default: NAME.report.html beside the checkpoint, report.html in the folder of a sweep]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Runs the command.
pub(crate) fn run(args: &ReportArgs) -> Result<()> {
    let (dir, name) = (&args.dir, place::name(&args.dir));
    let (page, usual) = if SweepPage::is_there(dir) {
        if args.verification.is_some() {
            return Err(usage("--verification is for a checkpoint; a sweep has its own"));
        }
        (Page::of_sweep(name, SweepPage::read(dir)?), dir.join(place::REPORT))
    } else {
        let page = CheckpointPage::read(dir)?.with_verification(dir, args.verification.as_deref())?;
        (Page::of_checkpoint(name, page), place::beside(dir, place::REPORT))
    };
    let file = args.out.clone().unwrap_or(usual);
    page.write(&file)?;
    if args.verbosity.json {
        return print_json(&json!({ "report": file }));
    }
    if !args.verbosity.quiet {
        println!("Report: {}", file.display());
    }
    Ok(())
}

/// What a page that nobody asked for shows of the text that the models were run on.
pub(crate) enum Verified<'a> {
    /// The checkpoint is new: whatever lies beside it is about another.
    NotYet,
    /// This was said just now.
    By(&'a Path),
}

/// After another command. That one has done its work, so a page that cannot be written is only said.
pub(crate) fn leave(dir: &Path, verified: Verified<'_>, verbosity: Verbosity) {
    let file = place::beside(dir, place::REPORT);
    let written = CheckpointPage::read(dir)
        .and_then(|page| match verified {
            Verified::NotYet => Ok(page),
            Verified::By(verification) => page.with_verification(dir, Some(verification)),
        })
        .and_then(|page| Page::of_checkpoint(place::name(dir), page).write(&file));
    match written {
        Ok(()) if !verbosity.quiet && !verbosity.json => println!("Report: {}", file.display()),
        // Not every checkpoint that is verified was written by this tool.
        Ok(()) | Err(ReportError::NotACheckpoint { .. }) => {}
        Err(error) if !verbosity.quiet => eprintln!("note: {}", Failure::from(error)),
        Err(_) => {}
    }
}
