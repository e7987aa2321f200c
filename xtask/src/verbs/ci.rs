//! `cargo xtask ci` runs every check, those that fail fastest first. CI calls exactly this.

use crate::shell::{cargo, run as sh};
use anyhow::Result;
use std::time::Instant;

/// Runs all checks; stops at the first that fails.
fn run_all(steps: &[(&str, &dyn Fn() -> Result<()>)]) -> Result<()> {
    let mut took = Vec::new();
    for (name, step) in steps {
        eprintln!("\n== {name}");
        let start = Instant::now();
        step()?;
        took.push((name, start.elapsed().as_secs()));
    }
    eprintln!();
    for (name, seconds) in took {
        eprintln!("{seconds:>5} s  {name}");
    }
    Ok(())
}

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    run_all(&[
        ("format", &|| sh(&mut cargo(&["fmt", "--all", "--check"]))),
        ("clippy", &|| {
            sh(&mut cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
        }),
        ("tidy", &super::tidy::run),
        ("tests", &|| sh(&mut cargo(&["test", "--workspace", "--locked"]))),
        ("docs", &|| {
            let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--locked", "--document-private-items"]);
            sh(doc.env("RUSTDOCFLAGS", "-D warnings"))
        }),
        ("LAPACK cross-check", &super::lapack::run),
        ("torture", &|| super::torture::run(&super::torture::Args { runs: 40, seed: 0 })),
        ("fuzzing for 40 s", &|| super::fuzz::run(&super::fuzz::Args::for_seconds(40))),
        ("GPU code on an emulated device", &super::gpu_check::without_gpu),
        ("demo", &|| super::demo::run(&super::demo::Args::default())),
        ("speed benchmark, small matrices", &|| {
            super::bench::speed::run(&super::bench::speed::Args { small: true, only: Vec::new(), repeats: 1 })
        }),
        ("fidelity benchmark, few methods and tokens", &super::bench::fidelity::small),
        ("example sweep, killed and resumed", &super::sweep::run),
        ("a Slurm cluster, of which a node dies", &|| {
            super::cluster_test::run(&super::cluster_test::Args { small: true, disturbances: 0, seed: 0 })
        }),
        ("the same output on an emulated older CPU", &|| {
            super::other_cpu::run(&super::other_cpu::Args::default())
        }),
        ("report pages in a browser", &super::report_test::run),
        ("conformance with transformers", &super::conformance::run),
        ("the wheel of the Python package", &super::wheel_test::run),
    ])
}
