//! `compress` and `plan`: the main job, and its first half.

use crate::args::{JobArgs, Verbosity};
use crate::commands::report::{self, Verified};
use crate::commands::shared::{open_base, print_json, write_plan};
use crate::config::with_config;
use crate::exit::{Failure, Result, usage};
use crate::job::Job;
use crate::progress::Console;
use crate::signals;
use crate::tables::{human_bytes, percent, table};
use lowrank_model::display::grouped;
use lowrank_model::plan::{PlannedMatrix, Sensitivity};
use lowrank_model::{MatrixShape, Progress, Projection, RankPlan, Unit};
use lowrank_pipeline::compress;
use lowrank_pipeline::planning;
use lowrank_writer::report::CalibrationReport;

/// Runs `compress`, or `plan` with `--dry-run`.
pub(crate) fn run(args: JobArgs) -> Result<()> {
    let args = with_config(args)?;
    let verbosity = args.verbosity;
    let job = Job::new(args)?;
    if job.dry_run {
        return plan(&job, verbosity);
    }
    let out = job.out.as_deref().ok_or_else(|| usage("--out is missing: where shall the result go?"))?;
    let checkpoint = open_base(&job.model, &job.recipe)?;
    let interrupt = signals::watch()?;
    let request = job.request(out, &interrupt);
    let done = compress::compress(&checkpoint, request, &Console::new(verbosity.quiet))?;
    if verbosity.json {
        print_json(&with_removed(&done.plan)?)?;
    } else if !verbosity.quiet {
        print_plan(&done.plan, verbosity.verbose);
        print_coverage(done.calibration.as_ref().filter(|_| verbosity.verbose));
        println!(
            "{}: {} parameters in {} shard{}, counted again from the headers that were written.",
            done.published.path.display(),
            grouped(done.published.params),
            done.published.shards,
            if done.published.shards == 1 { "" } else { "s" }
        );
    }
    report::leave(&done.published.path, Verified::NotYet, verbosity);
    Ok(())
}

/// Runs `plan`.
pub(crate) fn run_plan(args: JobArgs) -> Result<()> {
    if let Some(out) = &args.out {
        let out = out.display();
        return Err(usage(format!(
            "`plan` writes no checkpoint to {out}: --plan-out FILE is where the plan goes"
        )));
    }
    run(JobArgs { dry_run: true, ..args })
}

fn plan(job: &Job, verbosity: Verbosity) -> Result<()> {
    let checkpoint = open_base(&job.model, &job.recipe)?;
    let progress: &dyn Progress = &Console::new(verbosity.quiet);
    let interrupt = signals::watch()?;
    let planned = planning::plan(&checkpoint, &job.model, &job.recipe, &job.resources, progress, &interrupt)?;
    let coverage = planned.calibration.as_ref().filter(|_| verbosity.verbose);
    let plan = planned.plan;
    write_plan(&job.plan_out, &plan)?;
    if verbosity.json {
        return print_json(&with_removed(&plan)?);
    }
    if !verbosity.quiet {
        print_plan(&plan, verbosity.verbose);
        print_coverage(coverage);
        println!("Plan written to {}; `compress --plan {0}` executes it.", job.plan_out.display());
    }
    Ok(())
}

/// The plan as JSON, with the sums that everybody asks for, and without the curves, which are in `plan.json`.
fn with_removed(plan: &RankPlan) -> Result<serde_json::Value> {
    let mut value = serde_json::to_value(RankPlan { spectra: None, ..plan.clone() }).map_err(Failure::bug)?;
    value["removed_params"] = plan.removed_params().into();
    value["removed_bytes"] = plan.removed_bytes().into();
    value["overshoot"] = plan.overshoot().into();
    Ok(value)
}

fn print_plan(plan: &RankPlan, verbose: bool) {
    if verbose {
        let widths = plan.widths();
        println!(
            "{}",
            table(
                &["matrix", "shape", "rank", "predicted error"],
                plan.matrices.iter().map(|row| matrix_row(row, row.stored_shape(&widths)))
            )
        );
    } else {
        // Where no layer has a base, or every expert keeps all channels, nobody asks which.
        let shown = [
            Some("layer"),
            (!plan.shared_base_layers.is_empty()).then_some("base"),
            (!plan.experts.is_empty()).then_some("width"),
            Some("gate rank"),
            Some("down rank"),
            Some("up rank"),
            plan.compresses_shared_experts().then_some("shared expert"),
            Some("dense"),
            Some("predicted error"),
        ];
        let header: Vec<&str> = shown.into_iter().flatten().collect();
        println!("{}", table(&header, layer_rows(plan)));
    }
    let row = |what: &str, before: u64, after: u64, show: fn(u64) -> String| {
        let removed = before.saturating_sub(after);
        vec![what.to_owned(), show(before), show(after), show(removed), percent(removed, before)]
    };
    println!(
        "{}",
        table(
            &["", "before", "after", "removed", "share"],
            [
                row("parameters", plan.before.params, plan.after.params, grouped),
                row("weights", plan.before.bytes, plan.after.bytes, human_bytes),
            ]
        )
    );
    if let (Some(target), Some(overshoot)) = (plan.target, plan.overshoot()) {
        let show: fn(u64) -> String = if target.unit == Unit::Bytes { human_bytes } else { grouped };
        let (asked, more) = (show(target.remove_at_least), grouped(overshoot));
        match target.unit {
            Unit::Bytes => println!("Asked to remove {asked}; {more} bytes more were removed."),
            Unit::Params => println!("Asked to remove {asked} parameters; {more} more were removed."),
        }
    }
    if let Some(optimality) = plan.optimality {
        println!(
            "Predicted {} = {:.6e}; no plan can be below {:.6e} ({}).",
            match optimality.sensitivity {
                Sensitivity::Measured => "KL Σ s·err, nats per token,",
                Sensitivity::Absolute | Sensitivity::Relative => "error Σ s·‖W−Ŵ‖²",
            },
            optimality.objective,
            optimality.lower_bound,
            match optimality.duality_gap {
                Some(gap) => format!("duality gap {gap:.2e}"),
                None => "no duality gap, as the bound is zero".into(),
            }
        );
    }
}

/// Tokens of the calibration text that were routed to each expert.
fn print_coverage(calibration: Option<&CalibrationReport>) {
    let Some(CalibrationReport { tokens_per_expert, .. }) = calibration else { return };
    let experts = tokens_per_expert.iter().map(Vec::len).max().unwrap_or(0);
    let mut header = vec!["routed tokens".to_owned()];
    header.extend((0..experts).map(|expert| format!("expert {expert}")));
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let rows = tokens_per_expert.iter().enumerate().map(|(layer, tokens)| {
        let counts = tokens.iter().map(|&tokens| if tokens == 0 { "none".into() } else { grouped(tokens) });
        std::iter::once(format!("layer {layer}")).chain(counts).collect()
    });
    println!("{}", table(&header, rows));
}

fn matrix_row(row: &PlannedMatrix, stored: MatrixShape) -> Vec<String> {
    vec![
        row.matrix.name.clone(),
        stored.to_string(),
        row.rank.map_or("dense".into(), |rank| rank.to_string()),
        row.relative_error.map_or("-".into(), |error| format!("{error:.4}")),
    ]
}

/// `3–7`, or the one value.
fn span(values: impl Iterator<Item = usize> + Clone) -> Option<String> {
    let (low, high) = (values.clone().min()?, values.max()?);
    Some(if low < high { format!("{low}–{high}") } else { low.to_string() })
}

/// One row per layer: whether its experts share a base, smallest–largest width, each if the plan has such, and rank of each projection, the
/// ranks of its shared expert's gate, down and up, if that is compressed, how many matrices are not factored, the layer's mean error.
fn layer_rows(plan: &RankPlan) -> Vec<Vec<String>> {
    let widths = plan.widths();
    let layers = plan.matrices.iter().map(|row| row.matrix.id.layer).max().map_or(0, |last| last + 1);
    (0..layers)
        .map(|layer| {
            let rows = || plan.matrices.iter().filter(move |row| row.matrix.id.layer == layer);
            let routed = || rows().filter(|row| !row.matrix.id.is_shared());
            let mut cells = vec![layer.to_string()];
            if !plan.shared_base_layers.is_empty() {
                let is_shared = plan.shared_base_layers.contains(&layer);
                cells.push(if is_shared { "shared" } else { "" }.to_owned());
            }
            if !plan.experts.is_empty() {
                let gates = routed().filter(|row| row.matrix.id.projection == Projection::Gate);
                cells.push(span(gates.map(|row| row.stored_shape(&widths).rows)).unwrap_or_default());
            }
            for projection in Projection::ALL {
                let ranks =
                    routed().filter(|row| row.matrix.id.projection == projection).filter_map(|row| row.rank);
                cells.push(span(ranks).unwrap_or_else(|| "dense".into()));
            }
            if plan.compresses_shared_experts() {
                let shared = rows().filter(|row| row.matrix.id.is_shared());
                let ranks = shared.map(|row| row.rank.map_or("dense".into(), |rank| rank.to_string()));
                cells.push(ranks.collect::<Vec<String>>().join(" "));
            }
            cells.push(rows().filter(|row| row.rank.is_none()).count().to_string());
            let errors: Vec<f64> = rows().filter_map(|row| row.relative_error).collect();
            cells.push(match errors.len() {
                0 => "-".into(),
                count => format!("{:.4}", errors.iter().sum::<f64>() / count as f64),
            });
            cells
        })
        .collect()
}
