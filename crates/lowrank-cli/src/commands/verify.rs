//! `verify`: is this checkpoint what it claims to be, and how much did it lose?

use crate::args::Verbosity;
use crate::commands::report::{self, Verified};
use crate::commands::shared::{print_json, resolve};
use crate::exit::{Failure, Result, unwritten, usage};
use crate::progress::Console;
use clap::Args;
use lowrank_forward::choose;
use lowrank_model::recipe::Bos;
use lowrank_model::{Device, ErrorKind, Layout};
use lowrank_reader::Checkpoint;
use lowrank_report::place;
use lowrank_text::{Passage, TextSource};
use lowrank_verify::{Depth, Thresholds, Verdict, Verification, VerifyError, VerifyOptions, verify_on};
use std::path::{Path, PathBuf};

/// Flags of `verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The checkpoint that was compressed: a directory, or org/name in the local Hugging Face cache
    #[arg(long, value_name = "DIR|ORG/NAME")]
    original: String,
    /// The checkpoint to verify
    #[arg(long, value_name = "DIR")]
    compressed: PathBuf,
    /// Run both models on this text: .txt or .md, .jsonl or .ndjson with a `text` or a chat (`messages`) in every row, .json (an array of texts or
    /// of token ids), .ids (token ids) [default: a bundled passage]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of a window; attention does not cross windows
    #[arg(long, value_name = "N", default_value_t = VerifyOptions::default().window)]
    window: usize,
    /// Whether a window starts with the tokenizer's BOS
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    bos: Bos,
    /// Use the first whole windows up to this many tokens [default: all]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Check files only, run no model; thresholds need a run
    #[arg(long, conflicts_with_all = ["max_kl", "max_perplexity_increase", "min_top1", "max_layer_error"])]
    static_only: bool,
    /// Where the models run
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,
    /// Largest mean KL(original ‖ compressed), in nats per token
    #[arg(long, value_name = "NATS")]
    max_kl: Option<f64>,
    /// Largest increase of perplexity: 5%, or 0.05
    #[arg(long, value_name = "PERCENT", value_parser = increase)]
    max_perplexity_increase: Option<f64>,
    /// Least share of positions where both models rank the same token first: 90%, or 0.9
    #[arg(long, value_name = "PERCENT", value_parser = share)]
    min_top1: Option<f64>,
    /// Largest relative error of any layer's MoE block on the original's inputs: 10%, or 0.1
    #[arg(long, value_name = "PERCENT", value_parser = increase)]
    max_layer_error: Option<f64>,
    /// Where the verdict goes [default: verification.json beside the compressed checkpoint, as NAME.verification.json]
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// A share that may be larger than the whole: `5%` or `0.05`. A bare number from 1 on can be meant either way.
fn increase(text: &str) -> Result<f64, String> {
    match text.trim().strip_suffix('%') {
        Some(percent) => number(percent).map(|percent| percent / 100.0),
        None => match number(text)? {
            share if share >= 1.0 => {
                Err(format!("`{0}` can mean {0}% or {1}%: write one of them", text.trim(), 100.0 * share))
            }
            share => Ok(share),
        },
    }
}

/// A share of a whole: `90%` or `0.9`.
fn share(text: &str) -> Result<f64, String> {
    let share = match text.trim().strip_suffix('%') {
        Some(percent) => number(percent)? / 100.0,
        None => number(text)?,
    };
    if share > 1.0 {
        return Err(match text.trim().strip_suffix('%') {
            Some(_) => "a share is at most 100%".to_owned(),
            None => format!("a share is at most 1: write {0}% if {0} percent are meant", text.trim()),
        });
    }
    Ok(share)
}

/// Zero or more.
fn number(text: &str) -> Result<f64, String> {
    let number = text.trim().parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a share: 5%, or 0.05".to_owned())
}

/// Runs the command.
pub(crate) fn run(args: &VerifyArgs) -> Result<()> {
    if args.window < 2 {
        return Err(usage("--window is at least 2: one token to see and one to predict"));
    }
    let options = VerifyOptions {
        depth: if args.static_only { Depth::Static } else { Depth::Full },
        text: args.text.clone().map_or(TextSource::Bundled(Passage::Verification), TextSource::File),
        window: args.window,
        bos: args.bos,
        max_tokens: args.max_tokens,
        thresholds: Thresholds {
            max_kl: args.max_kl,
            max_perplexity_increase: args.max_perplexity_increase,
            min_top1: args.min_top1,
            max_layer_error: args.max_layer_error,
        },
    };
    let original = resolve(&args.original)?;
    // A plain checkpoint would pass whatever it is compared with: the library compares it, a user cannot mean it.
    let is_plain = |path: &Path| {
        Checkpoint::open(path).is_ok_and(|checkpoint| {
            !checkpoint.is_compressed()
                && !checkpoint.is_narrow()
                && !matches!(checkpoint.layout(), Layout::LowRank | Layout::Minixtral)
        })
    };
    if is_plain(&args.compressed) && is_plain(&original) {
        return Err(VerifyError::NothingFactored { path: args.compressed.clone() }.into());
    }
    // Files are compared on the CPU alone: no device is opened for that.
    let device = if args.static_only { Device::Cpu } else { args.device };
    let chosen = choose(device).map_err(VerifyError::Forward)?;
    if let Some(why) = chosen.fallback.filter(|_| !args.verbosity.quiet) {
        eprintln!("models run on the CPU: {why}");
    }
    let console = Console::new(args.verbosity.quiet);
    let report = verify_on(&*chosen.engine, &original, &args.compressed, &options, &console)?;
    let file = args.report.clone().unwrap_or_else(|| place::beside(&args.compressed, place::VERIFICATION));
    lowrank_files::write_whole(&file, report.to_json().as_bytes())
        .map_err(|error| unwritten(&file, "the report was not written", &error))?;
    if args.verbosity.json {
        print_json(&report)?;
    } else if !args.verbosity.quiet {
        print!("{report}");
        println!("Verification: {}", file.display());
    }
    report::leave(&args.compressed, Verified::By(&file), args.verbosity);
    judge(&report)
}

fn judge(report: &Verification) -> Result<()> {
    let Some(first) = report.findings.first().filter(|_| report.verdict != Verdict::Passed) else {
        return Ok(());
    };
    let more = match report.findings.len() - 1 {
        0 => String::new(),
        more => format!(" (and {more} more findings, see the report)"),
    };
    let line = match report.verdict {
        Verdict::ThresholdMissed => format!("verification: {first}{more}"),
        verdict => format!("verification {verdict}: {first}{more}"),
    };
    Err(Failure::new(ErrorKind::VerificationMissed, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_in_both_spellings() {
        for read in [share, increase] {
            assert_eq!(read("5%"), Ok(0.05));
            assert_eq!(read(" 5 % "), Ok(0.05));
            assert_eq!(read("0.05"), Ok(0.05));
            for bad in ["", "%", "five", "-1%", "nan", "inf"] {
                assert!(read(bad).is_err(), "{bad}");
            }
        }
    }

    #[test]
    fn a_bare_number_that_can_be_percent_is_refused_with_both_readings() {
        assert_eq!(increase("500%"), Ok(5.0));
        for (bare, readings) in [("5", ["5%", "500%"]), ("1", ["1%", "100%"]), ("2.5", ["2.5%", "250%"])] {
            let refused = increase(bare).unwrap_err();
            assert!(readings.iter().all(|reading| refused.contains(reading)), "{refused}");
        }
        assert_eq!(share("1"), Ok(1.0));
        assert!(share("90").unwrap_err().contains("write 90%"));
        assert!(share("101%").is_err());
    }
}
