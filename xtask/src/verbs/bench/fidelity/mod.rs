//! `cargo xtask bench fidelity` measures what every method loses of a model at the same number of parameters. Writes
//! `docs/fidelity.md`.
//!
//! It runs the tool as a user does: `compress` writes a checkpoint, `verify` counts its headers and runs both models on texts
//! that the calibration did not see. The tool does not prune experts; `prune_experts` of `lowrank-bench` writes a model with fewer
//! experts and measures it with the same functions.

mod measure;
mod methods;
mod page;

use crate::shell::root;
use anyhow::{Context, Result, bail};
use measure::{Bench, Subject, Wanted};
use methods::BUDGET_USUAL;
pub(crate) use page::{machine, with_error};
use std::path::PathBuf;

/// Budgets in percent of the expert parameters.
const BUDGETS: [f64; 4] = [10.0, 22.2, 35.0, 50.0];
/// Tokens of every evaluation text.
const TOKENS: usize = 32_768;
/// Calibration tokens: the tool's default.
const CALIBRATION_TOKENS: usize = 65_536;
/// Evaluation and calibration tokens with `--small`.
const TOKENS_SMALL: usize = 8_192;

/// The hardest first: those whose experts began as copies of one dense block, as Mixtral-8x7B's are believed to have. Last those
/// with many small experts.
const MODELS: [&str; 7] = [
    "upcycled-alike",
    "upcycled-distinct",
    "tiny-mixtral",
    "second-mixtral",
    "many-olmoe",
    "many-qwen3",
    "many-qwen2",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint directory; repeat the flag for several [default: the bundled models]
    #[arg(long = "model", value_name = "DIR")]
    models: Vec<PathBuf>,
    /// Measure only rows whose name contains this; may be repeated [default: all without those of --ablation]
    #[arg(long = "row", value_name = "TEXT")]
    rows: Vec<String>,
    /// Shares of the expert parameters to remove, in percent [default: 10,22.2,35,50]
    #[arg(long, value_name = "PERCENT,...", value_delimiter = ',')]
    budgets: Vec<f64>,
    /// Text to evaluate on; repeat the flag for several [default: Jack Sheppard and the Inaugural Addresses]
    #[arg(long = "text", value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Text to calibrate on [default: the bundled passage; for the second bundled model, Shakespeare]
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of every evaluation text [default: 32768]
    #[arg(long)]
    tokens: Option<usize>,
    /// Tokens to calibrate on [default: 65536]
    #[arg(long)]
    calibration_tokens: Option<usize>,
    /// File to write [default: docs/fidelity.md; with --small, target/fidelity/fidelity.md]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Measure only one budget and a few methods of the first bundled model on few tokens, within a minute, as CI does
    #[arg(long)]
    pub(crate) small: bool,
    /// Measure each step from plain SVD to ranks alone, too
    #[arg(long)]
    ablation: bool,
}

/// The benchmark with `--small`, which CI runs.
pub(crate) fn small() -> Result<()> {
    let args = Args {
        models: Vec::new(),
        rows: Vec::new(),
        budgets: Vec::new(),
        texts: Vec::new(),
        calibrate: None,
        tokens: None,
        calibration_tokens: None,
        out: None,
        small: true,
        ablation: false,
    };
    run(&args)
}

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (tokens, calibration_tokens) =
        if args.small { (TOKENS_SMALL, TOKENS_SMALL) } else { (TOKENS, CALIBRATION_TOKENS) };
    let texts = root().join("tests/fixtures/text");
    let texts = match args.texts.as_slice() {
        [] => vec![texts.join("jack_sheppard.txt"), texts.join("inaugural_addresses.txt")],
        given => given.to_vec(),
    };
    let budgets = match args.budgets.as_slice() {
        [] if args.small => vec![BUDGET_USUAL],
        [] => BUDGETS.to_vec(),
        given => given.to_vec(),
    };
    if let Some(bad) = budgets.iter().find(|budget| !(0.0 < **budget && **budget < 100.0)) {
        bail!("--budgets: {bad} is no share in percent");
    }
    let bench = Bench::new(
        budgets,
        texts,
        args.tokens.unwrap_or(tokens),
        args.calibration_tokens.unwrap_or(calibration_tokens),
        Wanted { small: args.small, ablation: args.ablation, rows: args.rows.clone() },
    )?;
    let out = match (&args.out, args.small) {
        (Some(out), _) => out.clone(),
        (None, true) => bench.folder().join("fidelity.md"),
        (None, false) => root().join("docs/fidelity.md"),
    };
    let (mut measured, mut goals) = (Vec::new(), Vec::new());
    for subject in subjects(args) {
        measured.push(bench.measure(&subject).with_context(|| subject.model.display().to_string())?);
        goals = page::goals(&bench, &measured);
        // After every model: a run that is ended keeps those before.
        std::fs::write(&out, page::page(&bench, &measured, &goals)?)
            .with_context(|| out.display().to_string())?;
    }
    println!("{}", out.display());
    for goal in &goals {
        println!("{goal}");
    }
    if goals.iter().any(|goal| !goal.kept) {
        bail!("a goal is missed");
    }
    Ok(())
}

/// The models with their calibration texts.
fn subjects(args: &Args) -> Vec<Subject> {
    let fixtures = root().join("tests/fixtures");
    let models = match args.models.as_slice() {
        [] if args.small => vec![fixtures.join("tiny-mixtral")],
        [] => MODELS.iter().map(|name| fixtures.join(name)).collect(),
        given => given.to_vec(),
    };
    let subject = |model: PathBuf| {
        // This text differs from both evaluation texts, because the limits must also hold if the user calibrates on another
        // kind of text.
        let unlike = model.ends_with("second-mixtral").then(|| fixtures.join("text/shakespeare.txt"));
        Subject { model, calibrate: args.calibrate.clone().or(unlike) }
    };
    models.into_iter().map(subject).collect()
}
