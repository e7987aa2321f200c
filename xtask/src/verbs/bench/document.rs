//! Writes the part of `docs/benchmarks.md` between its markers, and the plot, from the results of `bench speed`.

use crate::shell::root;
use anyhow::{Context, Result};
use plotters::prelude::*;
use serde_json::Value;
use std::fmt::Write;

const BEGIN: &str = "<!-- cargo xtask bench speed writes from here -->";
const END: &str = "<!-- to here -->";
const NOT_RUN: &str = "not run";

/// Replaces the part between the markers and the plot.
pub(crate) fn write(results: &Value) -> Result<()> {
    let path = root().join("docs/benchmarks.md");
    let page = std::fs::read_to_string(&path)?;
    let (head, rest) = page.split_once(BEGIN).context("docs/benchmarks.md has lost its first marker")?;
    let (_, tail) = rest.split_once(END).context("docs/benchmarks.md has lost its second marker")?;
    std::fs::write(&path, format!("{head}{BEGIN}\n\n{}\n{END}{tail}", text(results)))?;
    let folder = root().join("docs/benchmarks");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("speed.svg"), plot(results))?;
    Ok(())
}

/// The median of a field over runs; absent if nothing was run.
fn median(runs: &Value, pointer: &str) -> Option<f64> {
    let mut values: Vec<f64> =
        runs.as_array()?.iter().filter_map(|run| run.pointer(pointer)?.as_f64()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        even if even % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| NOT_RUN.to_owned(), |value| format!("{value:.digits$}"))
}

fn gib(value: Option<f64>) -> String {
    shown(value.map(|bytes| bytes / f64::from(1 << 30)), 2)
}

fn over(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a? / b.filter(|&b| b > 0.0)?)
}

/// A measurement of one matrix: its name, its runs, and the JSON pointer to its times in them.
struct Row<'a> {
    name: String,
    runs: &'a Value,
    took: &'static str,
}

impl Row<'_> {
    fn cpu(&self) -> Option<f64> {
        median(self.runs, &format!("{}/cpu_s", self.took))
    }

    fn wall(&self) -> Option<f64> {
        median(self.runs, &format!("{}/wall_s", self.took))
    }

    fn peak(&self) -> Option<f64> {
        median(self.runs, "/peak_resident_bytes")
    }
}

fn rows(results: &Value) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> = [
        ("ours, u·v, f32", &results["matrix"]["uv_f32"]),
        ("ours, u·v, f64", &results["matrix"]["uv_f64"]),
        ("ours, pivoted, f32", &results["matrix"]["pivoted_f32"]),
        ("ours through OpenBLAS (`lapack`), u·v, f32", &results["lapack"]["uv_f32"]),
    ]
    .into_iter()
    .map(|(name, runs)| Row { name: name.into(), runs, took: "/total" })
    .collect();
    for (key, runs) in results["peers"].as_object().into_iter().flatten() {
        let words: Vec<&str> = key.split('_').collect();
        let [library, dtype, threads] = words[..] else { continue };
        let threads = if threads == "1" { "1 thread".into() } else { format!("{threads} threads") };
        rows.push(Row { name: format!("{library}, thin SVD, {dtype}, {threads}"), runs, took: "/took" });
    }
    rows
}

/// The fewest CPU seconds that scipy took in a precision, over all numbers of threads.
fn scipy(results: &Value, dtype: &str) -> Option<f64> {
    let peers = results["peers"].as_object()?;
    let matching = peers.iter().filter(|(key, _)| key.starts_with(&format!("scipy_{dtype}_")));
    matching.filter_map(|(_, runs)| median(runs, "/took/cpu_s")).min_by(f64::total_cmp)
}

/// The whole text.
pub(crate) fn text(results: &Value) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = ratios(&mut out, results)
        .and_then(|()| matrices(&mut out, results))
        .and_then(|()| stages(&mut out, results))
        .and_then(|()| whole(&mut out, results))
        .and_then(|()| calibrated(&mut out, results))
        .and_then(|()| memory(&mut out, results));
    out
}

fn ratios(out: &mut String, results: &Value) -> std::fmt::Result {
    let at = &results["conditions"];
    let text = |key: &str| at[key].as_str().unwrap_or(NOT_RUN).to_owned();
    writeln!(
        out,
        "`cargo xtask bench speed`, {}: {} cores of {}{}, {:.0} GiB, load {} at the end, {}. Figures are medians. \"Ours\" is lowrank-compress.\n",
        text("date"),
        at["cores"],
        text("cpu"),
        if at["avx512"] == true { " with AVX-512" } else { "" },
        at["memory_gib"].as_f64().unwrap_or_default(),
        text("load"),
        text("rustc"),
    )?;
    let ours = |key: &str| median(&results["matrix"][key], "/total/cpu_s");
    let workers = &results["workers"];
    let wall = |key: &str| median(&workers[key], "/took/wall_s");
    let peak = |key: &str| median(&workers[key], "/peak_resident_bytes");
    let io = &results["io"];
    let rate = |runs: &Value, bytes: &str| over(median(runs, bytes), median(runs, "/took/wall_s"));
    let copied = rate(&io["copied"], "/read_bytes");
    let streamed = rate(&io["streamed"], "/bytes");
    let manifests: Vec<&Value> = ["one", "two"]
        .iter()
        .flat_map(|key| workers[key].as_array().into_iter().flatten())
        .map(|run| &run["manifest"])
        .collect();
    let same = match manifests.as_slice() {
        [] => NOT_RUN,
        [first, rest @ ..] if rest.iter().all(|other| other == first) => "the same bytes",
        _ => "DIFFERENT bytes",
    };
    let excess = |key: &str| {
        let first = results["matrix"][key][0]["excess"].as_f64();
        first.map_or_else(|| NOT_RUN.to_owned(), |excess| format!("{excess:.0e}"))
    };
    writeln!(out, "| Within one run | Measured | Goal |\n|---|---|---|")?;
    let row = |out: &mut String, what: &str, measured: String, goal: &str| {
        writeln!(out, "| {what} | {measured} | {goal} |")
    };
    let with = |value: Option<f64>, digits: usize, unit: &str| match value {
        Some(value) => format!("{value:.digits$} {unit}"),
        None => NOT_RUN.to_owned(),
    };
    let times = |value: Option<f64>| with(value, 2, "times");
    row(
        out,
        "CPU seconds of scipy's thin SVD (`gesdd`) in f64, divided by ours in f64, u·v",
        times(over(scipy(results, "f64"), ours("uv_f64"))),
        "≥ 2.5",
    )?;
    row(
        out,
        "CPU seconds of scipy's in f64, divided by ours in f32",
        times(over(scipy(results, "f64"), ours("uv_f32"))),
        "≥ 4",
    )?;
    row(
        out,
        "CPU seconds of scipy's in f32, divided by ours in f32",
        times(over(scipy(results, "f32"), ours("uv_f32"))),
        "",
    )?;
    row(
        out,
        "excess error over the optimum, f32; f64",
        format!("{}; {}", excess("uv_f32"), excess("uv_f64")),
        "≤ 1e-6",
    )?;
    row(
        out,
        "wall time of one worker, divided by that of two",
        times(over(wall("one"), wall("two"))),
        "≥ 1.9",
    )?;
    row(out, "output of one worker and of two", same.into(), "the same bytes")?;
    row(
        out,
        "peak resident memory of two workers, GiB: 1 layer; 4 layers",
        format!("{}; {}", gib(peak("one_layer")), gib(peak("two"))),
        "≤ 2, the same",
    )?;
    row(
        out,
        "throughput of copying a checkpoint with all hashes (SHA-256, BLAKE3), as a share of plain streaming on the same disk, measured alternately",
        with(over(copied, streamed).map(|share| share * 100.0), 0, "%"),
        "≥ 80 %",
    )?;
    row(
        out,
        "seconds for one more plan from cached spectra of 768 matrices with a shorter side of 128",
        shown(median(&results["plan"]["further"], "/took/wall_s"), 2),
        "< 1",
    )?;
    writeln!(out)
}

fn matrices(out: &mut String, results: &Value) -> std::fmt::Result {
    let matrix = &results["matrix"];
    writeln!(
        out,
        "The next two tables and the plot are about one matrix, a w1 of the generated checkpoint, at rank {} (pivoted: {}). Our times cover the \
         whole way from the file to flushed factors: read, spectrum, read again, factors, round, write. The peers' times cover only the call of the SVD.\n",
        matrix["rank"], matrix["rank_pivoted"]
    )?;
    writeln!(out, "| Program | CPU s | Wall s | Peak GiB | Share of the GEMM peak |\n|---|---|---|---|---|")?;
    for row in rows(results) {
        let precision = if row.name.contains("f64") { "f64" } else { "f32" };
        let share = over(median(row.runs, "/operations"), row.cpu())
            .and_then(|rate| Some(100.0 * rate / matrix["gemm"][precision].as_f64()?));
        let share = share.map_or_else(|| "–".to_owned(), |share| format!("{share:.0} %"));
        let (cpu, wall) = (shown(row.cpu(), 1), shown(row.wall(), 1));
        writeln!(out, "| {} | {cpu} | {wall} | {} | {share} |", row.name, gib(row.peak()))?;
    }
    let gemm = |precision: &str| shown(matrix["gemm"][precision].as_f64().map(|rate| rate / 1e9), 0);
    writeln!(
        out,
        "\nOne thread of faer reaches a GEMM peak of {} GFLOP/s in f32 and {} in f64. The shares of it count m·n² + 4/3 n³ + 2 n² r + 2 m n r \
         operations for a matrix [m, n] at rank r.\nVersions:",
        gemm("f32"),
        gemm("f64")
    )?;
    for (key, runs) in results["peers"].as_object().into_iter().flatten() {
        if key.ends_with("_1") || !key.contains("f32") {
            continue;
        }
        let kernels: Vec<&str> =
            runs[0]["kernels"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let kernels = kernels.join(", ");
        let library = key.split('_').next().unwrap_or_default();
        writeln!(out, "{library} {} ({kernels}).", runs[0]["version"].as_str().unwrap_or_default())?;
    }
    writeln!(out, "\n![CPU seconds of one matrix](benchmarks/speed.svg)\n")
}

fn stages(out: &mut String, results: &Value) -> std::fmt::Result {
    writeln!(out, "| CPU s by stage | u·v, f32 | u·v, f64 | pivoted, f32 |\n|---|---|---|---|")?;
    let of = |key: &str, stage: &str| stage_median(&results["matrix"][key], stage, "cpu_s");
    for stage in
        ["read", "spectrum", "read again", "factors", "pivots", "round", "error of rounding", "write"]
    {
        let cells = ["uv_f32", "uv_f64", "pivoted_f32"].map(|key| of(key, stage));
        writeln!(out, "| {stage} | {} |", cells.join(" | "))?;
    }
    writeln!(out)
}

/// The median over runs of the seconds that a stage took.
fn stage_median(runs: &Value, stage: &str, seconds: &str) -> String {
    let mut values: Vec<f64> = runs
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|run| run["stages"].as_array().into_iter().flatten())
        .filter(|entry| entry["stage"] == stage)
        .filter_map(|entry| entry["took"][seconds].as_f64())
        .collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"))
}

fn whole(out: &mut String, results: &Value) -> std::fmt::Result {
    writeln!(
        out,
        "Whole runs on checkpoints with the dimensions of Mixtral-8x7B but two experts per layer; u·v, no calibration, {} % removed. \"Only \
         copied\": the run factors no matrix. \"Only streamed\": a plain copy of the files, without hashes.\n",
        results["workers"]["budget_percent"]
    )?;
    writeln!(out, "| Run | Wall s | CPU s | Peak GiB |\n|---|---|---|---|")?;
    let workers = &results["workers"];
    for (name, runs) in [
        ("1 layer, 2 workers", &workers["one_layer"]),
        ("4 layers, 1 worker", &workers["one"]),
        ("4 layers, 2 workers", &workers["two"]),
        ("4 layers, only copied, 2 workers", &results["io"]["copied"]),
        ("4 layers, only streamed", &results["io"]["streamed"]),
    ] {
        let of = |pointer: &str| shown(median(runs, pointer), 1);
        let peak = median(runs, "/peak_resident_bytes");
        let peak = peak.map_or_else(|| "–".to_owned(), |peak| gib(Some(peak)));
        writeln!(out, "| {name} | {} | {} | {peak} |", of("/took/wall_s"), of("/took/cpu_s"))?;
    }
    whole_stages(out, results)?;
    let busy = over(median(&workers["two"], "/took/cpu_s"), median(&workers["two"], "/took/wall_s"));
    let (copied, run) =
        (median(&results["io"]["copied"], "/took/wall_s"), median(&workers["two"], "/took/wall_s"));
    if let (Some(busy), Some(share)) = (busy, over(copied, run)) {
        let bound = if share > 0.5 { "the disk" } else { "the processor" };
        writeln!(
            out,
            "\nTwo workers keep {busy:.2} cores busy. Hashing, reading and writing alone take {:.0} % of the wall time of a run on \
             the same checkpoint, so {bound} limits it.",
            100.0 * share
        )?;
    }
    Ok(())
}

/// Wall seconds of the stages of whole runs.
fn whole_stages(out: &mut String, results: &Value) -> std::fmt::Result {
    let workers = &results["workers"];
    let runs = [&workers["one_layer"], &workers["one"], &workers["two"], &results["io"]["copied"]];
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        for stage in
            run[0]["stages"].as_array().into_iter().flatten().filter_map(|stage| stage["stage"].as_str())
        {
            if !names.contains(&stage) {
                names.push(stage);
            }
        }
    }
    if names.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n| Wall s by stage | 1 layer, 2 workers | 4 layers, 1 worker | 4 layers, 2 workers | 4 layers, only copied |\n|---|---|---|---|---|"
    )?;
    for name in names {
        let cells = runs.map(|runs| stage_median(runs, name, "wall_s"));
        writeln!(out, "| {name} | {} |", cells.join(" | "))?;
    }
    Ok(())
}

/// Layers and expert matrices of Mixtral-8x7B, and the default number of calibration tokens.
const MIXTRAL: [f64; 3] = [32.0, 768.0, 65_536.0];

/// The times of calibrated jobs, split into the part that grows with tokens and the part that grows with matrices.
fn calibrated(out: &mut String, results: &Value) -> std::fmt::Result {
    let part = &results["calibrated"];
    let (Some(few), Some(more)) = (part["tokens"][0].as_f64(), part["tokens"][1].as_f64()) else {
        return Ok(());
    };
    writeln!(
        out,
        "\nCalibrated jobs: one layer with two experts, one worker, no GPU, sensitivities measured on {} tokens, one run for each \
         number of tokens. The router sends every token to both experts, so a layer processes as many routed tokens as one with eight experts and top-2 routing. The last \
         three columns are computed, not measured. \"CPU ms per token and layer\" is the part that grows with the tokens. \"CPU s per matrix\" is the \
         rest, over all six matrices. \"CPU hours\" adds \
         both up for 32 layers, 768 matrices and 65,536 tokens, as if the same share of the matrices were factored. The passes that measure sensitivities use few tokens here, and the last column does not \
         scale them up.",
        part["sensitivity_tokens"]
    )?;
    for runs in part["runs"].as_array().into_iter().flatten() {
        of_structures(out, runs, [few, more])?;
    }
    Ok(())
}

/// Of one kind of plan.
fn of_structures(out: &mut String, runs: &Value, [few_tokens, more_tokens]: [f64; 2]) -> std::fmt::Result {
    let (few, more) = (&runs["few"], &runs["more"]);
    let structures = runs["structures"]
        .as_str()
        .map_or("The default".to_owned(), |structures| format!("`--structures {structures}`"));
    writeln!(
        out,
        "\n{structures}, {} of 6 matrices factored:\n\n\
         | Stage | CPU s, {few_tokens} tokens | CPU s, {more_tokens} tokens | CPU s per matrix | CPU ms per token and layer | Mixtral-8x7B, CPU hours |\n|---|---|---|---|---|---|",
        more[0]["factored"]
    )?;
    let stages = more[0]["stages"].as_array().into_iter().flatten();
    let mut sum = 0.0;
    for (name, seconds) in
        stages.filter_map(|stage| Some((stage["stage"].as_str()?, stage["took"]["cpu_s"].as_f64()?)))
    {
        let before = few[0]["stages"].as_array().into_iter().flatten();
        let before =
            before.filter(|stage| stage["stage"] == name).find_map(|stage| stage["took"]["cpu_s"].as_f64());
        let before = before.unwrap_or_default();
        // Sensitivities use the same number of tokens in both runs, and errors of widths none.
        let (by_token, of_matrices) = match name {
            "spectra and sensitivities" | "divergences" | "errors of widths" => {
                (0.0, (before + seconds) / 2.0)
            }
            _ => {
                let by_token = ((seconds - before) / (more_tokens - few_tokens)).max(0.0);
                (by_token, (before - by_token * few_tokens).max(0.0))
            }
        };
        let by_matrix = of_matrices / 6.0;
        let [layers, matrices, tokens] = MIXTRAL;
        let hours = (by_matrix * matrices + by_token * layers * tokens) / 3600.0;
        sum += hours;
        writeln!(
            out,
            "| {name} | {before:.1} | {seconds:.1} | {by_matrix:.1} | {:.2} | {hours:.1} |",
            1000.0 * by_token
        )?;
    }
    writeln!(
        out,
        "| all | {} | {} | | | {sum:.1} |\n\nPeak resident memory: {} and {} GiB.",
        shown(median(few, "/took/cpu_s"), 1),
        shown(median(more, "/took/cpu_s"), 1),
        gib(median(few, "/peak_resident_bytes")),
        gib(median(more, "/peak_resident_bytes"))
    )
}

/// Limits of memory, and what calibrated runs took of them.
fn memory(out: &mut String, results: &Value) -> std::fmt::Result {
    let part = &results["memory"];
    let Some(runs) = part["runs"].as_array() else { return Ok(()) };
    writeln!(
        out,
        "\nMemory of the calibrated default (`--only memory`): one layer with two experts, {} tokens, {} of them for the \
         sensitivities. The limit is `--memory`; \"computed\" is what the program counts before it starts, for as many workers \
         as fit the limit; \"measured\" is the peak of the resident set.\n",
        part["tokens"][0], part["tokens"][1]
    )?;
    writeln!(
        out,
        "| Limit, GiB | Workers | Computed, GiB | Measured, GiB | Wall s |\n|---|---|---|---|---|"
    )?;
    for run in runs {
        writeln!(
            out,
            "| {} | {} | {} | {} | {} |",
            gib(run["limit_bytes"].as_f64()),
            run["workers"],
            gib(run["computed_bytes"].as_f64()),
            gib(run["peak_resident_bytes"].as_f64()),
            shown(run["took"]["wall_s"].as_f64(), 0)
        )?;
    }
    for counted in part["demand"].as_array().into_iter().flatten() {
        let sum = |key: &str| {
            counted[key].as_array().into_iter().flatten().filter_map(|one| one["bytes"].as_f64()).sum()
        };
        writeln!(
            out,
            "\nWith {} the stage \"{}\" needs most: {} GiB once and {} GiB for each worker.",
            if counted["workers"] == 1 {
                "one worker".into()
            } else {
                format!("{} workers", counted["workers"])
            },
            counted["stage"].as_str().unwrap_or(NOT_RUN),
            gib(Some(sum("shared"))),
            gib(Some(sum("per_worker"))),
        )?;
    }
    Ok(())
}

/// A bar chart of the CPU seconds of one matrix.
fn plot(results: &Value) -> String {
    let bars: Vec<(String, f64)> =
        rows(results).into_iter().filter_map(|row| Some((row.name.clone(), row.cpu()?))).collect();
    let mut svg = String::new();
    if !bars.is_empty() {
        draw(&mut svg, &bars).expect("drawing into a string does not fail");
    }
    svg
}

fn draw(svg: &mut String, bars: &[(String, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    const ROW_PX: usize = 34;
    const LABEL_PX: i32 = 360;
    const WIDTH_PX: u32 = 960;
    let height = (bars.len() + 2) * ROW_PX;
    let root = SVGBackend::with_string(svg, (WIDTH_PX, height as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = bars.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
    let room = f64::from(WIDTH_PX as i32 - LABEL_PX - 90);
    let font = ("sans-serif", 15).into_font();
    root.draw(&Text::new(
        "CPU seconds of one 14336 × 4096 matrix (less is better)",
        (16, 12),
        ("sans-serif", 17),
    ))?;
    for (index, (name, seconds)) in bars.iter().enumerate() {
        let top = ((index + 1) * ROW_PX + 8) as i32;
        let colour = if name.starts_with("ours") { RGBColor(31, 119, 180) } else { RGBColor(170, 170, 170) };
        let end = LABEL_PX + (room * seconds / most) as i32;
        root.draw(&Text::new(name.as_str(), (16, top + 4), font.clone()))?;
        root.draw(&Rectangle::new([(LABEL_PX, top), (end, top + 22)], colour.filled()))?;
        root.draw(&Text::new(format!("{seconds:.1}"), (end + 8, top + 4), font.clone()))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_not_run_is_said_and_what_was_is_a_median() {
        assert!(
            text(&json!({}))
                .contains("| wall time of one worker, divided by that of two | not run | ≥ 1.9 |")
        );
        let runs = |all: [f64; 3]| {
            json!(all.map(|cpu_s| json!({ "took": { "cpu_s": cpu_s }, "total": { "cpu_s": cpu_s } })))
        };
        let results = json!({
            "matrix": { "uv_f64": runs([12.0, 9.0, 10.0]) },
            "peers": { "scipy_f64_1": runs([41.0, 40.0, 99.0]), "scipy_f64_2": runs([50.0, 60.0, 70.0]) },
        });
        assert!(text(&results).contains("divided by ours in f64, u·v | 4.10 times | ≥ 2.5 |"));
        assert!(plot(&results).starts_with("<svg"));
    }
}
