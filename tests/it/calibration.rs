//! Calibration with the tool: what factors are fitted to, experts without routed tokens, and repeatable bytes.

use crate::support::{FEW_TOKENS, Outcome, compress, copy_of_model, data_range, files, run, tiny_mixtral};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

const BUDGET: [&str; 2] = ["--budget", "35%"];

/// A text so short that calibration uses all of it, so that the fit can be measured on the same tokens.
fn text() -> PathBuf {
    part_of("jack_sheppard")
}

fn part_of(book: &str) -> PathBuf {
    let book = format!("../../tests/fixtures/text/{book}.txt");
    let whole = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&book)).unwrap();
    let part = Path::new(env!("CARGO_TARGET_TMPDIR")).join(Path::new(&book).file_name().unwrap());
    // Write a temporary file and rename it, because tests run in parallel.
    let mut beside = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    beside.write_all(&whole.as_bytes()[..9_000]).unwrap();
    beside.persist(&part).unwrap();
    part
}

fn compressed(folder: &TempDir, model: &Path, name: &str, words: &[&str]) -> PathBuf {
    let out = folder.path().join(name);
    let text = text();
    let on_text = ["--calibrate", text.to_str().unwrap(), "--quiet"];
    let words = [&BUDGET[..], &FEW_TOKENS, &on_text, words].concat();
    compress(model, &out, &words).ok();
    out
}

fn plan(model: &Path, folder: &TempDir) -> Outcome {
    let (text, file) = (text(), folder.path().join("plan.json"));
    let words = ["plan", "-v", "--calibrate", text.to_str().unwrap(), "--plan-out", file.to_str().unwrap()];
    run([&words[..], &BUDGET, &FEW_TOKENS, &["--model", model.to_str().unwrap()]].concat()).ok()
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&files(out)["lowrank_report.json"]).unwrap()
}

fn verified(model: &Path, out: &Path, text: &Path) -> Value {
    let words =
        ["verify", "--json", "--quiet", "--max-tokens", "4096", "--original", model.to_str().unwrap()];
    let rest = ["--compressed", out.to_str().unwrap(), "--text", text.to_str().unwrap()];
    run([&words[..], &rest].concat()).ok().json()
}

/// On the calibration text, error propagation brings the outputs closer to the original's.
#[test]
fn fitted_factors_make_good_what_those_before_them_lose() {
    let folder = tempdir().unwrap();
    let [alone, experts, layers] = ["none", "experts", "layers"].map(|reach| {
        let words = ["--structures", "rank", "--propagate", reach];
        let out = compressed(&folder, &tiny_mixtral(), reach, &words);
        assert_eq!(report(&out)["recipe"]["propagate"], reach);
        verified(&tiny_mixtral(), &out, &text())["outcome"].clone()
    });
    let number = |value: &Value| value.as_f64().unwrap();
    let deep = alone["layers"].as_array().unwrap().len();
    let mut better = 0;
    for layer in 0..deep {
        let local = |outcome: &Value| number(&outcome["layers"][layer]["local"]);
        // A layer whose experts all stay dense has no error to correct.
        assert!(local(&experts) <= local(&alone) * 1.001, "layer {layer}");
        better += usize::from(local(&experts) < 0.99 * local(&alone));
    }
    assert!(better >= 2, "{better} layers");
    let kl = |outcome: &Value| number(&outcome["logits"]["mean_kl"]);
    let kls = [&alone, &experts, &layers].map(kl);
    assert!(kls[2] < kls[1] && kls[1] < kls[0], "{kls:?}");
}

/// Nothing comes from a cache, so every number of workers computes second moments and sensitivities itself.
#[test]
fn any_number_of_workers_gives_the_same_bytes_without_a_cache() {
    let folder = tempdir().unwrap();
    for reach in ["experts", "layers"] {
        let made = ["1", "2", "5"].map(|workers| {
            let (text, out) = (text(), folder.path().join(format!("{reach}-{workers}")));
            let words = ["--calibrate", text.to_str().unwrap(), "--calibration-tokens", "1024", "--quiet"];
            let how = ["--propagate", reach, "--workers", workers, "--cache", "none"];
            compress(&tiny_mixtral(), &out, &[&words[..], &how, &BUDGET].concat()).ok();
            files(&out)
        });
        assert!(made[0] == made[1] && made[1] == made[2], "{reach}");
        let out = folder.path().join(format!("{reach}-1"));
        let model = tiny_mixtral();
        let words = ["reproduce", out.to_str().unwrap(), "--model", model.to_str().unwrap(), "--calibrate"];
        let text = text();
        run([&words[..], &[text.to_str().unwrap(), "--quick", "--sample", "3"]].concat()).ok();
    }
}

#[test]
fn interpolation_one_takes_no_target_from_the_original() {
    let folder = tempdir().unwrap();
    // Ranks alone: w2 of a narrowed expert is fitted to what the original gives, whatever the share.
    let words = |share| ["--structures", "rank", "--propagate", "layers", "--target-interpolation", share];
    let [zero, one] = ["0", "1"].map(|share| {
        let out = compressed(&folder, &tiny_mixtral(), &format!("share-{share}"), &words(share));
        verified(&tiny_mixtral(), &out, &text())["outcome"]["logits"]["mean_kl"].as_f64().unwrap()
    });
    assert!(zero < one, "{zero} {one}");
}

/// Experts whose router scores tie with those of earlier experts are never among the first two.
#[test]
fn experts_that_nobody_asks_are_named_and_compressed_without_data() {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    let name = "model.layers.1.block_sparse_moe.gate.weight";
    let index: Value = serde_json::from_slice(&files(&model)["model.safetensors.index.json"]).unwrap();
    let shard = model.join(index["weight_map"][name].as_str().unwrap());
    let mut bytes = std::fs::read(&shard).unwrap();
    let range = data_range(&bytes, name);
    let row = range.len() / 8;
    for expert in 1..8 {
        bytes.copy_within(range.start..range.start + row, range.start + expert * row);
    }
    std::fs::write(&shard, bytes).unwrap();
    for reach in ["none", "experts", "layers"] {
        let out = compressed(&folder, &model, reach, &["--propagate", reach]);
        let report = report(&out);
        let unrouted = report["calibration"]["unrouted_experts"].as_array().unwrap();
        assert_eq!(unrouted.len(), 6, "{unrouted:?}");
        assert_eq!(unrouted[0], "model.layers.1.block_sparse_moe.experts.2");
        for row in report["matrices"].as_array().unwrap().iter().filter(|row| !row["rank"].is_null()) {
            let unseen =
                unrouted.iter().any(|name| row["name"].as_str().unwrap().starts_with(name.as_str().unwrap()));
            assert_eq!(unseen, row["calibrated_error"].is_null(), "{row}");
        }
        assert_eq!(verified(&model, &out, &text())["verdict"], "passed");
    }
    let said = plan(&model, &folder);
    assert!(
        said.stderr.contains("model.layers.1.block_sparse_moe.experts.7: compressed without"),
        "{said:?}"
    );
    // The table of -v.
    let row = said.stdout.lines().find(|line| line.contains("layer 1")).unwrap().to_owned();
    assert_eq!(row.matches("none").count(), 6, "{row}");
}

#[test]
fn verify_says_how_unlike_its_text_is_to_the_calibration_text() {
    let folder = tempdir().unwrap();
    // Without the vocabulary the calibration text is this text alone.
    let out = compressed(&folder, &tiny_mixtral(), "out", &["--vocabulary-share", "0"]);
    let distance = |text: &Path| {
        let outcome = verified(&tiny_mixtral(), &out, text)["outcome"].clone();
        outcome["routing_distance"].as_f64().unwrap()
    };
    let (same, unlike) = (distance(&text()), distance(&part_of("shakespeare")));
    assert_eq!(same, 0.0);
    assert!(0.01 < unlike && unlike < 1.0, "{unlike}");
}
