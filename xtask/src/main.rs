//! `cargo xtask VERB`: everything about this repository that a person or CI runs. One verb, one file under `verbs/`.

mod python;
mod shell;
mod verbs;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Compress the bundled model by the share that 10 B is of Mixtral-8x7B, verify it, and say where it lies
    Demo(verbs::demo::Args),
    /// Every check: format, clippy, docs, tidiness, tests, second linear-algebra backend, demo, conformance
    Ci,
    /// Check the rules of the house that no compiler knows
    Tidy,
    /// Load compressed checkpoints in real Hugging Face transformers, an old and a new one
    Conformance,
    /// Cross-check linear algebra against LAPACK (installs Debian's libopenblas-dev where it may)
    Lapack,
    /// Sweep the bundled model by the example config, kill it in the middle, and let it go on
    Sweep,
    /// Open report pages in headless Chromium, and compare what is drawn with its documents (installs it where it may)
    ReportTest,
    /// Kill, stop and starve runs on the bundled model, let them go on, and compare the bytes
    Torture(verbs::torture::Args),
    /// Make an output again on an emulated older CPU, and compare (installs Debian's qemu-user where it may)
    OtherCpu(verbs::other_cpu::Args),
    /// Read headers, configs, plans and texts that are nearly right, a million of them if told so
    Fuzz(verbs::fuzz::Args),
    /// Collect what checks and measures a machine with a GPU, or check what needs none
    GpuCheck(verbs::gpu_check::Args),
    /// Measure, or write what is measured on
    #[command(subcommand)]
    Bench(verbs::bench::What),
    /// Make the golden fixtures anew with transformers
    Fixtures,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Demo(args) => verbs::demo::run(&args),
        Verb::Ci => verbs::ci::run(),
        Verb::Tidy => verbs::tidy::run(),
        Verb::Conformance => verbs::conformance::run(),
        Verb::Lapack => verbs::lapack::run(),
        Verb::Sweep => verbs::sweep::run(),
        Verb::ReportTest => verbs::report_test::run(),
        Verb::Torture(args) => verbs::torture::run(&args),
        Verb::OtherCpu(args) => verbs::other_cpu::run(&args),
        Verb::Fuzz(args) => verbs::fuzz::run(&args),
        Verb::GpuCheck(args) => verbs::gpu_check::run(&args),
        Verb::Bench(what) => verbs::bench::run(&what),
        Verb::Fixtures => verbs::fixtures::run(),
    }
}
