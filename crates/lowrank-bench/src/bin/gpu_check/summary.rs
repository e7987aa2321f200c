//! All parts in one document, and the rows of `docs/gpu.md`.

use crate::results::Failure;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::Path;

/// A number as it is shown: short, and never in the form 0.000.
pub(crate) fn shown(value: f64) -> String {
    match value {
        value if value != 0.0 && value.abs() < 1e-2 => format!("{value:.1e}"),
        value if value.abs() < 10.0 => format!("{value:.2}"),
        value => format!("{value:.0}"),
    }
}

pub(crate) fn summary(parts: &[&'static str], out: &Path) -> Result<(), Failure> {
    let mut all = Map::new();
    let mut text = String::from("# GPU check\n\n");
    for &part in parts {
        let read = std::fs::read(out.join(part).with_extension("json")).map_err(Failure::from);
        let document = read.and_then(|bytes| Ok(serde_json::from_slice::<Value>(&bytes)?));
        let document = document.unwrap_or_else(|error| json!({ "stopped": format!("not run: {error}") }));
        all.insert(part.into(), document);
    }
    let device = all.values().find_map(|part| part["device"].as_str()).unwrap_or("no device").to_owned();
    text.push_str(&format!("{device}\n\n## Rows of docs/gpu.md\n\n| What | {device} |\n|---|---|\n"));
    for (what, value) in rows(&all) {
        let value = value.unwrap_or_else(|| "not run".into());
        writeln!(text, "| {what} | {value} |")?;
    }
    for (part, document) in &all {
        writeln!(text, "\n# {part}\n")?;
        match std::fs::read_to_string(out.join(part).with_extension("md")) {
            Ok(found) => text.push_str(&found),
            Err(_) => writeln!(text, "not run")?,
        }
        if document["finished"] != true {
            writeln!(text, "\n**{part} did not come to its end: {}**", document["stopped"])?;
        }
    }
    std::fs::write(out.join("results.md"), text)?;
    Ok(std::fs::write(out.join("results.json"), serde_json::to_string_pretty(&all)?)?)
}

/// The rows of `docs/gpu.md` that these results fill; nothing where they do not.
pub(crate) fn rows(all: &Map<String, Value>) -> Vec<(&'static str, Option<String>)> {
    let number = |part: &str, key: &str| all.get(part)?.get(key)?.as_f64();
    let list = |part: &str, key: &str| -> Vec<&Value> {
        all.get(part).and_then(|part| part.get(key)?.as_array()).into_iter().flatten().collect()
    };
    let joined = |parts: Vec<String>| (!parts.is_empty()).then(|| parts.join(", "));
    let figures = |key: &str, show: &dyn Fn(&Value) -> String, names: &[&str]| {
        let found = list("steps", key);
        let wanted = |figure: &&&Value| {
            let name = figure["name"].as_str().unwrap_or_default();
            names.iter().any(|wanted| name.starts_with(wanted))
        };
        joined(found.iter().filter(wanted).map(|figure| show(figure)).collect())
    };
    let speed = |figure: &Value| match (figure["tflops"].as_f64(), figure["gb_per_s"].as_f64()) {
        (Some(tflops), _) if tflops > 0.0 => format!("{} TFLOP/s", shown(tflops)),
        (_, gb) => format!("{} GB/s", shown(gb.unwrap_or(f64::NAN))),
    };
    let time = |figure: &Value| {
        let share = figure["share"].as_f64().map_or("–".into(), |share| format!("{:.0} %", 100.0 * share));
        format!("{} ({share})", shown(figure["ms"].as_f64().unwrap_or(f64::NAN)))
    };
    let routes = |lanes: u64, key: &str| {
        let rows = list("matrices", "routes");
        let rows = rows.iter().filter(|row| row["lanes"] == lanes);
        joined(rows.map(|row| shown(row[key].as_f64().unwrap_or(f64::NAN))).collect())
    };
    vec![
        ("logits, GPU against CPU, f32 (allowed: 10⁻³)", number("forward", "worst").map(shown)),
        (
            "excess error of factors: eigenvectors f32, f64; projector f32, f64 (allowed: 10⁻⁵)",
            joined(list("algebra", "excess").iter().filter_map(|v| v.as_f64().map(shown)).collect()),
        ),
        ("numbers that differ in a second run (allowed: 0)", number("repeat", "differing").map(shown)),
        ("peak: products in bf16, f32, f64", figures("peaks", &speed, &["product"])),
        (
            "peak: copies to the device (pinned, not pinned), from it, within it",
            figures("peaks", &speed, &["copy"]),
        ),
        (
            "ms per 14336 × 4096 matrix (share of peak): upload; Gram bf16, f32, f64",
            figures("steps", &time, &["upload, bf16", "Gram"]),
        ),
        (
            "ms: eigenvalues, eigenvectors, f32; f64",
            figures("steps", &time, &["eigenvalues", "eigenvectors"]),
        ),
        (
            "ms: span of the first r eigenvectors by products (projector), f32; f64",
            figures("steps", &time, &["upper"]),
        ),
        ("ms: projection at rank 2479, f32; f64", figures("steps", &time, &["projection"])),
        (
            "s per matrix, host to host, one at a time: eigenvectors f32, f64; projector f32, f64",
            routes(1, "s_per_matrix"),
        ),
        (
            "the same, 8 at a time; then calibrated and pivoted: eigenvectors, projector",
            routes(8, "s_per_matrix"),
        ),
        ("min for 768 matrices, 8 at a time", routes(8, "minutes_768")),
        (
            "tokens/s of one decoder layer in an 8x7B model's dimensions, f32, bf16",
            joined(
                list("speed", "layer")
                    .iter()
                    .filter_map(|row| row["tokens_per_s"].as_f64().map(shown))
                    .collect(),
            ),
        ),
    ]
}
