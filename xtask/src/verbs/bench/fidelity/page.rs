//! Writes the page: conditions, one table per model and measure, and the limits that the default must keep.

use super::measure::{Bench, Cell, Measured, Row, Score};
use super::methods::{
    BUDGET_DEEP, BUDGET_USUAL, DATA_FREE_PIVOTED, DEFAULT, How, METHODS, Method, PRUNED, RANKS, WHITENED,
    WIDTHS,
};
use crate::shell::{command, output};
use anyhow::Result;
use std::fmt::{self, Write};

/// What was set out to be reached: (model, budget, largest perplexity increase by text).
const LARGEST: [(&str, f64, [f64; 2]); 4] = [
    ("tiny-mixtral", BUDGET_USUAL, [0.0025, 0.0021]),
    ("tiny-mixtral", BUDGET_DEEP, [0.009, 0.011]),
    ("second-mixtral", BUDGET_USUAL, [0.002, 0.005]),
    ("second-mixtral", BUDGET_DEEP, [0.07, 0.09]),
];
/// On models whose name begins so, the default may lose at most this share of what ranks alone lose: (budget, share).
const UPCYCLED: (&str, [(f64, f64); 2]) = ("upcycled-", [(BUDGET_USUAL, 0.5), (BUDGET_DEEP, 0.4)]);
/// The default may lose at most this share of what whitening alone loses.
const SHARE_OF_WHITENED: f64 = 0.25;

/// A limit and whether it is kept.
pub(crate) struct Goal {
    what: String,
    pub(crate) kept: bool,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", if self.kept { "kept" } else { "MISSED" }, self.what)
    }
}

fn increases(measured: &Measured, name: &str, budget: usize) -> Option<Vec<f64>> {
    let row = measured.rows.iter().find(|row| row.method.name == name)?;
    Some(row.cells[budget].scores.iter().map(|score| score.increase.0).collect())
}

/// All limits, checked against the figures.
pub(crate) fn goals(bench: &Bench, measured: &[Measured]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for model in measured {
        for (at, &budget) in bench.budgets.iter().enumerate() {
            let Some(default) = increases(model, DEFAULT, at) else { continue };
            let mut hold = |limits: Vec<f64>, why: &str| {
                let kept = default.iter().zip(&limits).all(|(is, limit)| is <= limit);
                let what = format!(
                    "{}, −{budget} %: the default's {} at most {}, {why}",
                    model.model,
                    percents(&default),
                    percents(&limits)
                );
                goals.push(Goal { what, kept });
            };
            let set = LARGEST.iter().find(|(of, at, _)| *of == model.model && *at == budget);
            if let Some((_, _, largest)) = set.filter(|_| default.len() == 2) {
                hold(largest.to_vec(), "the goal of this model");
            }
            let share = UPCYCLED.1.iter().find(|(at, _)| *at == budget).map(|(_, share)| *share);
            if let Some(share) = share.filter(|_| model.model.starts_with(UPCYCLED.0))
                && let Some(ranks) = increases(model, RANKS, at)
            {
                let limits = ranks.iter().map(|loss| loss * share).collect();
                hold(limits, &format!("{share} of what ranks alone lose"));
            }
            if let Some(whitened) = increases(model, WHITENED, at).filter(|_| budget == BUDGET_USUAL) {
                let limits = whitened.iter().map(|loss| loss * SHARE_OF_WHITENED).collect();
                hold(limits, "a quarter of whitened, uniform, u·v");
            }
            for name in DATA_FREE_PIVOTED {
                if let Some(limits) = increases(model, name, at) {
                    hold(limits, name);
                }
            }
            for (what, name) in [("ranks alone", RANKS), ("widths alone", WIDTHS)] {
                if let Some(worse) = worse_than(name, model, at) {
                    goals.push(Goal {
                        what: format!(
                            "{}, −{budget} %: the default is worse than {what} on no text beyond both errors",
                            model.model
                        ),
                        kept: !worse,
                    });
                }
            }
            let beaten_by = beaten_by(model, at);
            let what = match beaten_by.as_slice() {
                [] => format!(
                    "{}, −{budget} %: no row beats the default beyond both errors on all texts",
                    model.model
                ),
                rows => format!("{}, −{budget} %: the default is beaten by {}", model.model, rows.join("; ")),
            };
            goals.push(Goal { what, kept: beaten_by.is_empty() });
        }
    }
    goals
}

/// Whether the default loses more than another row on any text, by more than both standard errors.
fn worse_than(other: &str, measured: &Measured, budget: usize) -> Option<bool> {
    let scores = |name: &str| {
        let row = measured.rows.iter().find(|row| row.method.name == name)?;
        Some(row.cells[budget].scores.iter().map(|score| score.increase))
    };
    let mut pairs = scores(DEFAULT)?.zip(scores(other)?);
    Some(pairs.any(|((is, error), (limit, of_limit))| is > limit + error + of_limit))
}

/// Rows whose perplexity increase is smaller than the default's on every text, by more than twice the standard errors of both.
fn beaten_by(measured: &Measured, budget: usize) -> Vec<&'static str> {
    let scores = |row: &Row| row.cells[budget].scores.iter().map(|score| score.increase).collect::<Vec<_>>();
    let Some(default) = measured.rows.iter().find(|row| row.method.name == DEFAULT) else {
        return Vec::new();
    };
    let beats = |row: &&Row| {
        let pairs = scores(row).into_iter().zip(scores(default));
        pairs
            .into_iter()
            .all(|((is, error), (default, of_default))| is + 2.0 * (error + of_default) < default)
    };
    measured.rows.iter().filter(beats).map(|row| row.method.name).collect()
}

fn percents(values: &[f64]) -> String {
    let percent = |value: &f64| format!("{:+.2} %", 100.0 * value).replace('-', "−");
    values.iter().map(percent).collect::<Vec<_>>().join(" / ")
}

/// The whole page.
pub(crate) fn page(bench: &Bench, measured: &[Measured], goals: &[Goal]) -> Result<String> {
    let mut page = String::new();
    let texts: Vec<String> = bench
        .texts
        .iter()
        .map(|text| text.file_stem().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    let texts = texts.join(" / ");
    let date = output(command("date").args(["-u", "+%F"]))?;
    writeln!(
        page,
        "# Fidelity: what compression costs\n\n\
         Written by `cargo xtask bench fidelity{flags}`, {date}, {machine}, {seconds} s.\n\n\
         Every row removes the same number of **expert** parameters, counted from the headers of the written checkpoints. Rows that\n\
         calibrate use the text named in the heading (`--calibration-tokens {calibration}`). `compress` and `verify` run as a user runs them, and\n\
         `verify` compares both models on the first {tokens} tokens of *other* texts ({texts}) in windows of 256 that begin with the tokenizer's BOS; bf16, seed 0.\n\
         ± is the standard error of the paired difference over windows. Each row has one calibration set, so a difference\n\
         between two rows means little unless it is several times its error.\n\n\
         What each step from plain SVD to ranks alone does: [ablation](research/ablation.md). Other programs: [peers](research/peers.md).\n",
        flags = bench.flags(),
        date = date.trim(),
        machine = machine(),
        seconds = bench.seconds(),
        calibration = bench.calibration_tokens,
        tokens = bench.tokens,
    )?;
    for model in measured {
        let distance =
            |share: &Option<f64>| share.map_or("?".into(), |share| format!("{:.1} %", 100.0 * share));
        let distances: Vec<String> = model.routing_distances.iter().map(distance).collect();
        let perplexities: Vec<String> = model.perplexities.iter().map(|p| format!("{p:.3}")).collect();
        writeln!(
            page,
            "## {}, calibrated on {}\n\n\
             {} of its {} parameters are in the experts. Its perplexity is {}. Compared with the calibration text, its router\n\
             sends {} of the tokens to other experts.\n",
            model.model,
            model.calibrated_on,
            model.expert_params,
            model.params,
            perplexities.join(" / "),
            distances.join(" / ")
        )?;
        table(&mut page, bench, model, &format!("Increase of perplexity in percent, {texts}"), |score| {
            with_error(score.increase, 100.0, true)
        })?;
        table(
            &mut page,
            bench,
            model,
            &format!("KL(original ‖ compressed) in 10⁻³ nats per token, {texts}"),
            |score| with_error(score.kl, 1000.0, false),
        )?;
        table(
            &mut page,
            bench,
            model,
            &format!("Positions where both rank the same token first, in percent, {texts}"),
            |score| with_error(score.top1, 100.0, false),
        )?;
    }
    writeln!(page, "## What must hold\n\nThe command fails if one of these is missed.\n")?;
    for goal in goals {
        writeln!(page, "- {goal}")?;
    }
    writeln!(page, "\n## The rows\n\n| Row | Flags |\n|---|---|")?;
    let is_measured = |method: &&Method| {
        measured.iter().flat_map(|model| &model.rows).any(|row| row.method.name == method.name)
    };
    for method in METHODS.iter().filter(is_measured) {
        let flags = match method.how {
            How::DataFree(flags) => format!("`{}`", ["--calibrate none", flags].join(" ").trim()),
            How::Calibrated("") => "none".into(),
            How::Calibrated(flags) => format!("`{flags}`"),
            How::Pruned => "`cargo run --release -p lowrank-bench --bin prune_experts`: in every layer the experts with the \
                            smallest mean g·‖output‖ on the calibration text go, the router is renormalised over the rest"
                .into(),
        };
        writeln!(page, "| {} | {flags} |", method.name)?;
    }
    Ok(page)
}

fn table(
    page: &mut String,
    bench: &Bench,
    model: &Measured,
    title: &str,
    show: impl Fn(&Score) -> String,
) -> fmt::Result {
    let heads: Vec<String> = bench.budgets.iter().map(|budget| format!("−{budget} %")).collect();
    writeln!(page, "{title}:\n\n| Method | {} |\n|---|{}", heads.join(" | "), "---|".repeat(heads.len()))?;
    for row in &model.rows {
        let cells: Vec<String> = row
            .cells
            .iter()
            .map(|cell| {
                let scores: Vec<String> = cell.scores.iter().map(&show).collect();
                format!("{}{}", scores.join(" / "), removed_instead(model, row.method.name, cell))
            })
            .collect();
        writeln!(page, "| {} | {} |", row.method.name, cells.join(" | "))?;
    }
    writeln!(page)
}

/// The actual ratio of expert pruning, which removes whole experts.
fn removed_instead(model: &Measured, name: &str, cell: &Cell) -> String {
    let share = 100.0 * cell.removed_params as f64 / model.expert_params as f64;
    if name == PRUNED { format!(" (−{share:.1} %)") } else { String::new() }
}

/// A figure with its standard error, both times `scale`, to the digits that the error allows.
pub(crate) fn with_error((value, error): (f64, f64), scale: f64, sign: bool) -> String {
    let (value, error) = (value * scale, error * scale);
    // At most two significant digits of the standard error.
    let digits = if error >= 0.95 {
        0
    } else if error >= 0.095 {
        1
    } else {
        2
    };
    let value = if sign { format!("{value:+.digits$}") } else { format!("{value:.digits$}") };
    format!("{} ±{error:.digits$}", value.replace('-', "−"))
}

/// The processor and its number of cores.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    format!("{cores} cores of {}", name.map_or("an unknown processor", |(_, name)| name.trim()))
}
