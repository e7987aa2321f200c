//! `cargo xtask VERB` runs all automation of this repository, for people and for CI. Each verb has a file under `verbs/`.

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
    /// Compress the bundled model by 21.4 % (what 10 B is of Mixtral-8x7B), verify it, and print where it is
    Demo(verbs::demo::Args),
    /// Run all checks: format, clippy, docs, tidy, tests, LAPACK cross-check, demo, conformance and more
    Ci,
    /// Check rules of this repository that the compiler does not check, such as which crate may depend on which
    Tidy,
    /// Load compressed checkpoints in Hugging Face transformers, in an old and a new version
    Conformance,
    /// Build the Python package's wheel, install it into an environment of its own, and use it
    WheelTest,
    /// Serve original and compressed models with vLLM over HTTP, run plain ones as GGUF with llama.cpp, and compare with
    /// transformers and our own forward pass (installs 6 GB and compiles llama.cpp; on demand, not in CI)
    ServeTest(verbs::serve_test::Args),
    /// Quantise outputs, train adapters on them, evaluate them with lm-eval, and run the documents' Python with what that needs
    /// (installs 1 GB, and vLLM's 6 GB unless --without-vllm; on demand, not in CI)
    UseTest(verbs::use_test::Args),
    /// Cross-check the linear algebra against LAPACK (installs Debian's libopenblas-dev if it can)
    Lapack,
    /// Run the example sweep on the bundled model, kill it in the middle, and resume it
    Sweep,
    /// Open report pages in headless Chromium and compare the figures with the documents (installs Chromium if it can)
    ReportTest,
    /// Kill and stop runs on the bundled model, fill their disk, resume them, and compare the resulting bytes
    Torture(verbs::torture::Args),
    /// Compress on a Slurm cluster of three nodes on this machine, kill nodes and tasks, and compare the bytes with an ordinary run
    /// (installs Debian's slurm-wlm and munge if it can)
    ClusterTest(verbs::cluster_test::Args),
    /// Reproduce an output on an emulated older CPU, and compare (installs Debian's qemu-user if it can)
    OtherCpu(verbs::other_cpu::Args),
    /// Feed almost valid headers, configs, plans and texts to every parser
    Fuzz(verbs::fuzz::Args),
    /// Collect a folder that checks and measures a machine with a GPU, or run the checks that need no GPU
    GpuCheck(verbs::gpu_check::Args),
    /// Run a benchmark, or generate a checkpoint for one
    #[command(subcommand)]
    Bench(verbs::bench::What),
    /// Make the golden fixtures again with transformers
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
        Verb::WheelTest => verbs::wheel_test::run(),
        Verb::ServeTest(args) => verbs::serve_test::run(&args),
        Verb::UseTest(args) => verbs::use_test::run(&args),
        Verb::Lapack => verbs::lapack::run(),
        Verb::Sweep => verbs::sweep::run(),
        Verb::ReportTest => verbs::report_test::run(),
        Verb::Torture(args) => verbs::torture::run(&args),
        Verb::ClusterTest(args) => verbs::cluster_test::run(&args),
        Verb::OtherCpu(args) => verbs::other_cpu::run(&args),
        Verb::Fuzz(args) => verbs::fuzz::run(&args),
        Verb::GpuCheck(args) => verbs::gpu_check::run(&args),
        Verb::Bench(what) => verbs::bench::run(&what),
        Verb::Fixtures => verbs::fixtures::run(),
    }
}
