//! `lowrank-compress`: the command line. Flags, tables, progress bars and exit codes live here and nowhere else;
//! the jobs are in `lowrank-pipeline`.

mod args;
mod cli;
mod commands;
mod config;
mod exit;
mod grid;
mod home;
mod job;
mod progress;
mod signals;
mod tables;

use clap::CommandFactory;
use cli::{Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(exit::guarded(|| {
        signals::end_on_closed_pipe()?;
        run(cli::parse()?)
    }))
}

fn run(cli: Cli) -> exit::Result<()> {
    match cli.command {
        None => commands::compress::run(cli.job),
        Some(Command::Compress(job)) => commands::compress::run(*job),
        Some(Command::Plan(job)) => commands::compress::run_plan(*job),
        Some(Command::Cluster(args)) => commands::cluster::run(*args),
        Some(Command::Inspect(args)) => commands::inspect::run(&args),
        Some(Command::Densify(args)) => commands::densify::run(&args),
        Some(Command::Verify(args)) => commands::verify::run(&args),
        Some(Command::Reproduce(args)) => commands::reproduce::run(&args),
        Some(Command::Sweep(args)) if args.cluster => commands::cluster::begin_sweep(&args),
        Some(Command::Sweep(args)) => commands::sweep::run(&args),
        Some(Command::Report(args)) => commands::report::run(&args),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "lowrank-compress", &mut std::io::stdout());
            Ok(())
        }
        Some(Command::Man { dir }) => commands::man::run(&dir),
    }
}
