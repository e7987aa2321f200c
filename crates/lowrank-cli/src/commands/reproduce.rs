//! `reproduce`: does a second run give the same bytes?

use crate::args::{Verbosity, cache_place};
use crate::commands::shared::{open, print_json};
use crate::exit::{Failure, Result};
use crate::progress::Console;
use crate::signals;
use clap::Args;
use lowrank_model::ErrorKind;
use lowrank_model::recipe::TextChoice;
use lowrank_pipeline::reproduce::{Difference, Reproduce, Sample, reproduce};
use lowrank_pipeline::workers::Resources;
use lowrank_reader::Checkpoint;
use std::path::PathBuf;

/// Flags of `reproduce`.
#[derive(Debug, Args)]
pub(crate) struct ReproduceArgs {
    /// The compressed checkpoint
    out: PathBuf,
    /// What it was made from: a directory, or org/name in the local Hugging Face cache
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    model: String,
    /// Make only a few matrices again; every file is still compared with the manifest
    #[arg(long)]
    quick: bool,
    /// How many matrices --quick makes
    #[arg(long, value_name = "N", default_value_t = 8, requires = "quick")]
    sample: usize,
    /// Which matrices --quick makes
    #[arg(long, value_name = "N", default_value_t = 0, requires = "quick")]
    sample_seed: u64,
    /// The text that was calibrated on, if it was not the bundled one; repeated as it was then
    #[arg(long, value_name = "FILE|bundled")]
    calibrate: Vec<TextChoice>,
    /// The output was made on another kind of CPU: let tensors differ by what rounding them once more could, and decimals
    /// in texts by 0.5 %
    #[arg(long)]
    other_cpu: bool,
    /// Where measured numbers are kept; `none` measures again [default: with your other caches]
    #[arg(long, value_name = "DIR|none")]
    cache: Option<String>,
    /// Matrices in flight at once [default: one per core, as memory allows]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    workers: usize,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Differences that are printed before "and N more".
const SHOWN: usize = 20;

/// Runs the command.
pub(crate) fn run(args: &ReproduceArgs) -> Result<()> {
    let base = open(&args.model)?;
    let base = match Checkpoint::open(&args.out) {
        Ok(out) => base.taken_as_in(&out),
        Err(_) => base, // which is said below
    };
    let interrupt = signals::watch()?;
    let resources = Resources {
        workers: args.workers,
        cache: cache_place(args.cache.as_deref()),
        ..Resources::default()
    };
    let job = Reproduce {
        out: &args.out,
        model: &args.model,
        sample: args.quick.then_some(Sample { count: args.sample, seed: args.sample_seed }),
        texts: &args.calibrate,
        resources: &resources,
        interrupt: &interrupt,
    };
    let done = reproduce(&base, job, &Console::new(args.verbosity.quiet))?;
    if args.verbosity.json {
        print_json(&done)?;
    } else if !args.verbosity.quiet {
        for difference in done.differences.iter().take(SHOWN) {
            println!("{difference}");
        }
        if done.differences.len() > SHOWN {
            println!("and {} more", done.differences.len() - SHOWN);
        }
    }
    // The most telling first: a tensor that was only copied shows another base, one that was made another run.
    let made = |tensor: &str| {
        let mut module = tensor;
        while let Some((above, _)) = module.rsplit_once('.') {
            module = above;
            if base.config().matrix_named(module).is_some() {
                return true;
            }
        }
        tensor.contains(".experts.")
    };
    let telling = |one: &&Difference| match &one.tensor {
        Some(tensor) if !made(tensor) => 0,
        Some(_) => 1,
        None => 2,
    };
    let only_rounding = done.differences.iter().all(|difference| difference.is_rounding);
    let missed = done.differences.iter().filter(|difference| !(args.other_cpu && difference.is_rounding));
    if let Some(first) = missed.min_by_key(telling) {
        let line = format!(
            "{}: not reproduced, {} differences; {first}{}",
            args.out.display(),
            done.differences.len(),
            if only_rounding {
                "; all differences are rounding, as another kind of CPU makes: --other-cpu accepts them"
            } else {
                ""
            }
        );
        return Err(Failure::new(ErrorKind::NotReproduced, line));
    }
    if !args.verbosity.json && !args.verbosity.quiet && !done.differences.is_empty() {
        println!("Reproduced but for rounding; {} matrices were made again.", done.matrices);
    } else if !args.verbosity.json && !args.verbosity.quiet {
        let scope = if args.quick { "agree with the manifest" } else { "are the same, byte for byte" };
        println!("Reproduced: {} files {scope}; {} matrices were made again.", done.files, done.matrices);
    }
    Ok(())
}
