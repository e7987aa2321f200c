//! Writes the page from the stored results, those of earlier calls included.

use super::programs::{Kind, PROGRAMS, Program};
use super::results::{BUDGETS, CALIBRATION_TOKENS, MODELS, TEXTS, TOKENS, folder, result_file, stored};
use crate::shell::root;
use crate::verbs::bench::fidelity::{machine, with_error};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Key of the row that the others are compared with.
const DEFAULT: &str = "ours-default";

/// Writes the page, and says where. A page with more figures, such as one from another machine's results, is kept.
pub(crate) fn write(out: Option<&Path>) -> Result<PathBuf> {
    let page = page()?;
    let mut place = out.map_or_else(|| root().join("docs/research/peers.md"), Path::to_path_buf);
    let figures = |text: &str| text.matches('±').count();
    let before = std::fs::read_to_string(&place).unwrap_or_default();
    if out.is_none() && figures(&before) > figures(&page) {
        eprintln!("{} has more figures than there are results here, and is kept", place.display());
        place = folder().join("peers.md");
    }
    std::fs::write(&place, page).with_context(|| place.display().to_string())?;
    Ok(place)
}

/// Results of one model, by program and budget; absent where there is none.
struct Results<'a> {
    model: &'a str,
    rows: Vec<(&'static Program, Vec<Option<Value>>)>,
}

fn results() -> Result<Vec<Results<'static>>> {
    let row = |model: &str, program: &'static Program| {
        let cells = BUDGETS.iter().map(|&budget| stored(&result_file(model, program.key, budget)));
        Ok((program, cells.collect::<Result<_>>()?))
    };
    let of_model = |model: &'static str| {
        let rows = PROGRAMS.iter().map(|program| row(model, program)).collect::<Result<_>>()?;
        Ok(Results { model, rows })
    };
    MODELS.iter().map(|(model, _)| of_model(model)).collect()
}

fn page() -> Result<String> {
    let all = results()?;
    let cells = || all.iter().flat_map(|model| &model.rows).flat_map(|(_, cells)| cells).flatten();
    let dates: BTreeSet<&str> = cells().filter_map(|cell| cell["date"].as_str()).collect();
    let dates: Vec<&str> = dates.into_iter().collect();
    let mut page = String::new();
    writeln!(
        page,
        "# Published programs beside this tool\n\n\
         Written by `cargo xtask bench peers --sources DIR`, {}, {}. On demand, not in CI.\n\n\
         Increase of perplexity in percent on {}, then the share of the **expert** parameters that was removed, counted exactly.\n\
         The published programs run by their own code on the CPU, out of clones that whoever runs the command makes; no code of theirs is in\n\
         this repository. One evaluator (`tests/bench/peers/evaluator.py`, transformers 4.57, f32) measures all on the first {TOKENS} tokens of\n\
         each text in windows of 256 that begin with BOS; ± is the standard error of the paired difference over windows. All programs that\n\
         calibrate read {CALIBRATION_TOKENS} tokens of the same text in windows of 256 that begin with BOS; of ours an eighth comes from the vocabulary instead.\n",
        dates.join(", "),
        machine(),
        TEXTS.join(" / "),
    )?;
    for (results, (_, what)) in all.iter().zip(MODELS) {
        table(&mut page, results, what)?;
    }
    let ahead: Vec<String> = all.iter().flat_map(ahead).collect();
    writeln!(page, "## Where a published program loses less than the default, beyond both errors\n")?;
    match ahead.as_slice() {
        [] => writeln!(page, "Nowhere among the cells where both were measured.\n")?,
        some => writeln!(page, "{}\n", some.join("\n"))?,
    }
    not_run(&mut page, &all)?;
    programs(&mut page, &all)?;
    page.push_str(BY_HAND);
    Ok(page)
}

fn table(page: &mut String, results: &Results<'_>, what: &str) -> Result<()> {
    let cells = || results.rows.iter().flat_map(|(_, cells)| cells).flatten();
    let original = cells().find_map(|cell| cell["texts"].as_array());
    let perplexities: Vec<String> = original
        .into_iter()
        .flatten()
        .map(|text| format!("{:.2}", text["perplexity_original"].as_f64().unwrap_or(f64::NAN)))
        .collect();
    let heads: Vec<String> = BUDGETS.iter().map(|budget| format!("−{budget} %")).collect();
    writeln!(
        page,
        "## {}\n\n{what}. Perplexity {}.\n\n| | {} |\n|---|{}",
        results.model,
        perplexities.join(" / "),
        heads.join(" | "),
        "---|".repeat(heads.len())
    )?;
    for (program, cells) in &results.rows {
        let shown: Vec<String> = cells.iter().map(|cell| shown(cell.as_ref())).collect();
        writeln!(page, "| {} | {} |", program.name, shown.join(" | "))?;
    }
    writeln!(page)?;
    Ok(())
}

/// Increase and standard error by text.
fn scores(cell: &Value) -> Option<Vec<(f64, f64)>> {
    let texts = cell["texts"].as_array()?.iter();
    texts.map(|text| Some((text["increase"].as_f64()?, text["increase_error"].as_f64()?))).collect()
}

fn removed(cell: &Value) -> Option<f64> {
    Some(100.0 * cell["removed_params"].as_f64()? / cell["expert_params"].as_f64()?)
}

fn shown(cell: Option<&Value>) -> String {
    let found = cell.and_then(|cell| Some((scores(cell)?, removed(cell)?)));
    found.map_or("not run".into(), |(scores, removed)| {
        let scores: Vec<String> = scores.into_iter().map(|score| with_error(score, 100.0, true)).collect();
        format!("{} (−{removed:.2} %)", scores.join(" / "))
    })
}

/// Texts on which a published program's increase is smaller than the default's by more than both errors.
fn ahead(results: &Results<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let Some((_, default)) = results.rows.iter().find(|(program, _)| program.key == DEFAULT) else {
        return found;
    };
    for (program, cells) in
        results.rows.iter().filter(|(program, _)| matches!(program.kind, Kind::Published(_)))
    {
        for ((cell, default), budget) in cells.iter().zip(default).zip(BUDGETS) {
            let pair = cell.as_ref().and_then(scores).zip(default.as_ref().and_then(scores));
            for (((is, error), (of, of_default)), text) in
                pair.into_iter().flat_map(|(is, of)| is.into_iter().zip(of)).zip(TEXTS)
            {
                if is + error + of_default < of {
                    let scores = [(is, error), (of, of_default)].map(|score| with_error(score, 100.0, true));
                    found.push(format!(
                        "- {}, {text}, −{budget} %: {} {} against {}",
                        results.model, program.name, scores[0], scores[1]
                    ));
                }
            }
        }
    }
    found
}

/// By program and reason, the models and budgets that have no figures.
fn not_run(page: &mut String, all: &[Results<'_>]) -> Result<()> {
    writeln!(page, "## What did not run\n")?;
    let mut reasons: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for results in all {
        for (program, cells) in &results.rows {
            for (cell, budget) in cells.iter().zip(BUDGETS) {
                let reason = match cell {
                    Some(cell) if cell.get("texts").is_some() => continue,
                    Some(cell) => match (cell["not_run"].as_str(), cell["failed"].as_str()) {
                        (Some(reason), _) => reason.to_owned(),
                        (None, message) => format!("it stopped with `{}`", message.unwrap_or("no message")),
                    },
                    None => "not measured yet".to_owned(),
                };
                reasons
                    .entry((program.name, reason))
                    .or_default()
                    .push(format!("{} −{budget} %", results.model));
            }
        }
    }
    for ((program, reason), places) in &reasons {
        writeln!(page, "- {program}: {reason} ({})", places.join(", "))?;
    }
    writeln!(page, "{}", if reasons.is_empty() { "All of these tables did.\n" } else { "" })?;
    Ok(())
}

/// Versions, settings and patches.
fn programs(page: &mut String, all: &[Results<'_>]) -> Result<()> {
    writeln!(page, "## Programs, commits, settings, patches\n")?;
    for program in &PROGRAMS {
        let cells = all.iter().flat_map(|model| &model.rows).filter(|(of, _)| of.key == program.key);
        let cells: Vec<&Value> = cells.flat_map(|(_, cells)| cells).flatten().collect();
        let versions: BTreeSet<&str> = cells.iter().filter_map(|cell| cell["version"].as_str()).collect();
        let versions: Vec<&str> = versions.into_iter().collect();
        match &program.kind {
            Kind::Ours(flags) => {
                let flags = if flags.is_empty() { "no flags".into() } else { format!("`{flags}`") };
                let versions = if versions.is_empty() { "not run".into() } else { versions.join("; ") };
                writeln!(page, "**{}**: {flags}; {versions}.\n", program.name)?;
            }
            Kind::Published(published) => {
                let written_for =
                    format!("its driver was written for commit {:.12}, not run", published.commit);
                let versions = if versions.is_empty() { written_for } else { versions.join("; ") };
                writeln!(
                    page,
                    "**{}**: <https://github.com/{}>, {versions}, licence: {}.",
                    program.name, published.repository, published.licence
                )?;
                if let Some(settings) = cells.iter().find_map(|cell| cell["settings"].as_str()) {
                    let driver = published.driver;
                    writeln!(
                        page,
                        "Settings: {settings}. `{driver}` calls it, and at run time changes this:\n"
                    )?;
                }
                let patches = cells.iter().find_map(|cell| cell["patches"].as_array());
                for patch in patches.into_iter().flatten().filter_map(Value::as_str) {
                    writeln!(page, "- {patch}")?;
                }
                writeln!(page)?;
            }
        }
    }
    Ok(())
}

/// What no driver runs.
const BY_HAND: &str = "\
## Measured by hand before\n\n\
On 2026-11-25, by the programs' own code, without BOS and without errors over windows. PIFA-M and Lillama have no driver.\n\n\
| | tiny-mixtral −22.2 % | −50 % | second-mixtral −22.2 % | −50 % |\n\
|---|---|---|---|---|\n\
| HEAPr | −0.01 / +0.14 | +6.7 / +7.3 | +0.42 / +0.61 | +23 / +13 |\n\
| PIFA-M | +1.1 / +1.5 | +21 / +27 | +2.8 / +4.3 | +56 / +73 |\n\
| Lillama, 4 epochs of training | +2.6 / +3.0 | +15 / +17 | not run | not run |\n\
| SVD-LLM | +4.2 / +5.4 | +51 / +66 | +10 / +13 | +110 / +147 |\n\
| D²-MoE | +10 / +12 | +93 / +111 | not run | not run |\n\
| REAP, −25 % | +149 / +128 | +823 / +863 | not run | not run |\n\
| HC-SMoE, −25 % | +581 / +521 | not run | not run | not run |\n";

#[cfg(test)]
mod tests {
    use super::{Results, ahead, shown};
    use crate::verbs::bench::peers::programs::PROGRAMS;
    use serde_json::{Value, json};

    fn cell(increase: f64) -> Value {
        json!({
            "expert_params": 1000, "removed_params": 222,
            "texts": [
                { "increase": increase, "increase_error": 0.001, "perplexity_original": 20.0 },
                { "increase": 0.02, "increase_error": 0.001, "perplexity_original": 20.0 },
            ],
        })
    }

    #[test]
    fn a_cell_shows_both_texts_and_the_removed_share() {
        assert_eq!(shown(Some(&cell(0.01))), "+1.0 ±0.1 / +2.0 ±0.1 (−22.20 %)");
        assert_eq!(shown(Some(&json!({ "not_run": "it needs a GPU" }))), "not run");
        assert_eq!(shown(None), "not run");
    }

    #[test]
    fn a_published_program_is_ahead_only_beyond_both_errors() {
        let rows = |increase: f64| {
            let find = |key: &str| PROGRAMS.iter().find(|program| program.key == key).unwrap();
            vec![
                (find("ours-default"), vec![Some(cell(0.01)), None]),
                (find("heapr"), vec![Some(cell(increase)), None]),
            ]
        };
        let of = |increase| ahead(&Results { model: "a", rows: rows(increase) });
        assert_eq!(of(0.0085), Vec::<String>::new());
        assert_eq!(
            of(0.007),
            ["- a, jack_sheppard, −22.2 %: HEAPr (channels, by gradients) +0.7 ±0.1 against +1.0 ±0.1"]
        );
    }
}
