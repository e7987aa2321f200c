//! What came of points: rows of the results, the table on the terminal.

use crate::grid::{Sweep, plain};
use crate::tables::table;
use lowrank_model::RankPlan;
use lowrank_model::display::grouped;
use lowrank_sweep::{Row, Status};
use lowrank_verify::{Verdict, Verification};
use std::time::Duration;

/// A point that was planned.
pub(super) fn planned(row: Row, plan: &RankPlan, scale: &str, took: Duration) -> Row {
    let factored = plan.matrices.iter().filter(|row| row.rank.is_some()).count();
    Row {
        params: Some(plan.after.params),
        removed_params: Some(plan.removed_params()),
        bytes: Some(plan.after.bytes),
        factored: Some(factored),
        dense: Some(plan.matrices.len() - factored),
        scale: Some(scale.to_owned()),
        predicted_error: plan.optimality.map(|optimality| optimality.objective),
        lower_bound: plan.optimality.map(|optimality| optimality.lower_bound),
        duality_gap: plan.optimality.and_then(|optimality| optimality.duality_gap),
        plan_seconds: Some(took.as_secs_f64()),
        ..row
    }
}

/// A point that was verified.
pub(super) fn measured(
    row: Row,
    verified: &Verification,
    compressing: Option<Duration>,
    verifying: Duration,
) -> Row {
    let logits = verified.outcome.as_ref().and_then(|outcome| outcome.logits);
    let row = Row {
        status: Status::Verified,
        mean_kl: logits.map(|logits| logits.mean_kl),
        mean_kl_error: logits.and_then(|logits| logits.mean_kl_error),
        perplexity_original: logits.map(|logits| logits.perplexity_original),
        perplexity: logits.map(|logits| logits.perplexity_compressed),
        perplexity_ratio: logits.map(|logits| logits.perplexity_ratio),
        perplexity_ratio_error: logits.and_then(|logits| logits.perplexity_ratio_error),
        top1_agreement: logits.map(|logits| logits.top1_agreement),
        top1_error: logits.and_then(|logits| logits.top1_error),
        compress_seconds: compressing.map(|took| took.as_secs_f64()),
        verify_seconds: Some(verifying.as_secs_f64()),
        ..row
    };
    match verified.findings.first().filter(|_| verified.verdict != Verdict::Passed) {
        None => row,
        Some(finding) => row.failed(format!("verification {}: {finding}", verified.verdict)),
    }
}

/// The front, or with `--verbose` every point.
pub(super) fn print_rows(rows: &[&Row], config: &Sweep, verbose: bool) {
    let axes = config.differing();
    let header = ["point", "parameters", "predicted", "mean KL", "perplexity", "same top-1"];
    let header: Vec<&str> = header.into_iter().chain(axes.iter().map(String::as_str)).collect();
    let shown = rows.iter().filter(|row| verbose || row.on_front || row.status == Status::Verified);
    let number =
        |value: Option<f64>, decimals: usize| value.map_or("-".into(), |value| format!("{value:.decimals$}"));
    let cells = |row: &&&Row| -> Vec<String> {
        let settings = axes.iter().map(|key| row.settings.get(key).map_or("-".into(), plain));
        [
            row.point.to_string(),
            row.params.map_or("failed".into(), grouped),
            row.predicted_error.map_or("-".into(), |error| format!("{error:.4e}")),
            number(row.mean_kl, 5),
            row.perplexity_ratio.map_or("-".into(), |ratio| format!("× {ratio:.4}")),
            row.top1_agreement.map_or("-".into(), |share| format!("{:.2} %", share * 100.0)),
        ]
        .into_iter()
        .chain(settings)
        .collect()
    };
    println!("{}", table(&header, shown.map(|row| cells(&row))));
}
