//! The whole verification, in order: open, compare files, run both models, hold against the limits.

use crate::claims::{check, config_differences};
use crate::error::VerifyError;
use crate::options::{Depth, Thresholds, VerifyOptions};
use crate::outcome;
use crate::record::read_record;
use crate::report::{Finding, FindingKind, ModelComparison, Verification};
use lowrank_forward::{Cpu, Engine};
use lowrank_model::{ModelConfig, Progress, failure};
use lowrank_reader::Checkpoint;
use lowrank_text::windows;
use std::path::Path;

/// Holds a compressed checkpoint against its original; both models run on the CPU.
pub fn verify(
    original: &Path,
    compressed: &Path,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verification, VerifyError> {
    verify_on(&Cpu, original, compressed, options, progress)
}

/// Holds a compressed checkpoint against its original; both models run on an engine.
///
/// Fails only where no verdict can be reached: the original does not open, a file cannot be read, the text is unusable.
/// A compressed checkpoint that does not open has failed.
pub fn verify_on(
    engine: &dyn Engine,
    original: &Path,
    compressed: &Path,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verification, VerifyError> {
    let original = Checkpoint::open(original)?;
    if original.is_compressed() {
        return Err(VerifyError::FactoredOriginal { path: original.dir().into() });
    }
    if !compressed.is_dir() {
        return Err(VerifyError::NoFolder { path: compressed.into() });
    }
    // Before hours of work: is there a text?
    let windows = match options.depth {
        Depth::Static => None,
        Depth::Full => Some(windows(original.dir(), &options.text_request())?),
    };
    windows.iter().flat_map(|windows| &windows.notes).for_each(|note| progress.note(note));
    if options.depth == Depth::Full
        && let Some(line) = lowrank_forward::router::indistinct(&original)?
    {
        progress.note(&line);
    }
    let failed = |findings| Ok(Verification::new(findings, None, None, options.thresholds));
    let compressed = match Checkpoint::open(compressed) {
        Ok(compressed) if compressed.is_narrow() => {
            compressed.narrowed_from(original.config().intermediate_size)
        }
        Ok(compressed) => compressed,
        Err(error) => {
            return failed(vec![Finding {
                kind: FindingKind::Unreadable,
                name: None,
                detail: failure::chain(&error),
            }]);
        }
    };
    let original = original.taken_as_in(&compressed);
    let mut findings = config_differences(&original, &compressed);
    let ModelConfig { widths, shared_bases, .. } = compressed.config().clone();
    let stored = original.config().with_widths(widths).with_shared_bases(shared_bases);
    if stored.tensors() != compressed.specs() {
        // Other tensors: nothing further can be compared.
        return failed(findings);
    }
    let (files, wrong) = check(&original, &compressed, progress)?;
    findings.extend(wrong);
    let outcome = match &windows {
        None => None,
        Some(windows) => {
            let (mut outcome, wrong) = outcome::run(&original, &compressed, windows, engine, progress)?;
            findings.extend(wrong);
            // A record that cannot be read is a finding already.
            let calibration = read_record(compressed.dir()).ok().and_then(|record| record.calibration);
            outcome.routing_distance = calibration.and_then(|calibration| {
                outcome::routing_distance(&outcome.tokens_per_expert, &calibration.tokens_per_expert)
            });
            Some(outcome)
        }
    };
    if let Some(outcome) = &outcome {
        findings.extend(missed(&options.thresholds, outcome));
    }
    Ok(Verification::new(findings, Some(files), outcome, options.thresholds))
}

/// A unit, and whether a value keeps a limit.
type Limit = (&'static str, fn(f64, f64) -> bool);

/// Limits that are not kept. A number that is absent keeps no limit.
fn missed(thresholds: &Thresholds, outcome: &ModelComparison) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut hold = |what: &str, value: Option<f64>, limit: Option<f64>, (unit, kept): Limit| {
        let Some(limit) = limit else { return };
        if !value.is_some_and(|value| kept(value, limit)) {
            let show = |value: f64| match unit {
                "%" => format!("{:.4} %", 100.0 * value),
                unit => format!("{value:.4e} {unit}"),
            };
            let value = value.map_or("not finite".into(), show);
            let detail = format!("{what} is {value}, the limit is {}", show(limit));
            findings.push(Finding { kind: FindingKind::Threshold, name: None, detail });
        }
    };
    let at_most = |value, limit| value <= limit;
    let logits = outcome.logits;
    hold("mean KL", logits.map(|l| l.mean_kl), thresholds.max_kl, ("nats per token", at_most));
    let increase = logits.map(|l| l.perplexity_ratio - 1.0);
    hold("the increase of perplexity", increase, thresholds.max_perplexity_increase, ("%", at_most));
    let agreement = logits.map(|l| l.top1_agreement);
    hold("top-1 agreement", agreement, thresholds.min_top1, ("%", |value, limit| value >= limit));
    for row in &outcome.layers {
        let what = format!("the local error of layer {}", row.layer);
        hold(&what, row.local, thresholds.max_layer_error, ("%", at_most));
    }
    findings
}
