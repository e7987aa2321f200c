//! Calibration through the tool: what factors are fitted to, experts that nobody asks, and that bytes repeat.

use crate::support::{FEW_TOKENS, compress, copy_of_model, data_range, files, run, tiny_mixtral};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

const BUDGET: [&str; 2] = ["--budget", "35%"];

/// A text of our own, to calibrate and to verify on.
fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/text/jack_sheppard.txt")
}

fn compressed(folder: &TempDir, model: &Path, name: &str, words: &[&str]) -> PathBuf {
    let out = folder.path().join(name);
    let text = text();
    let on_text = ["--calibrate", text.to_str().unwrap(), "--quiet"];
    let words = [&BUDGET[..], &FEW_TOKENS, &on_text, words].concat();
    compress(model, &out, &words).ok();
    out
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

/// On the text that they were fitted to, factors that know what the factors before them lose are nearer to the original.
#[test]
fn fitted_factors_make_good_what_those_before_them_lose() {
    let folder = tempdir().unwrap();
    let [alone, experts, layers] = ["none", "experts", "layers"].map(|reach| {
        let out = compressed(&folder, &tiny_mixtral(), reach, &["--propagate", reach]);
        assert_eq!(report(&out)["calibration"]["propagate"], reach);
        verified(&tiny_mixtral(), &out, &text())["outcome"].clone()
    });
    let number = |value: &Value| value.as_f64().unwrap();
    let deep = alone["layers"].as_array().unwrap().len();
    let mut better = 0;
    for layer in 0..deep {
        let local = |outcome: &Value| number(&outcome["layers"][layer]["local"]);
        // A layer whose experts stayed whole has nothing to make good.
        assert!(local(&experts) <= local(&alone) * 1.001, "layer {layer}");
        better += usize::from(local(&experts) < 0.99 * local(&alone));
    }
    assert!(better >= 2, "{better} layers");
    let last = |outcome: &Value| number(&outcome["layers"][deep - 1]["propagated"]);
    assert!(last(&layers) < 0.99 * last(&experts), "{} {}", last(&layers), last(&experts));
    let kl = |outcome: &Value| number(&outcome["logits"]["mean_kl"]);
    assert!(kl(&layers) < kl(&experts) && kl(&experts) < kl(&alone));
}

/// Nothing comes from a cache, so moments and sensitivities are summed anew with every number of workers.
#[test]
fn any_number_of_workers_gives_the_same_bytes_without_a_cache() {
    let folder = tempdir().unwrap();
    for reach in ["experts", "layers"] {
        let made = ["1", "2", "5"].map(|workers| {
            let words = ["--propagate", reach, "--workers", workers, "--cache", "none"];
            files(&compressed(&folder, &tiny_mixtral(), &format!("{reach}-{workers}"), &words))
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
fn own_share_one_wants_nothing_of_the_original() {
    let folder = tempdir().unwrap();
    let words = |share| ["--propagate", "layers", "--propagate-own-share", share];
    let [zero, one] = ["0", "1"].map(|share| {
        let out = compressed(&folder, &tiny_mixtral(), &format!("share-{share}"), &words(share));
        verified(&tiny_mixtral(), &out, &text())["outcome"]["logits"]["mean_kl"].as_f64().unwrap()
    });
    assert!(zero < one, "{zero} {one}");
}

/// Experts that tie with experts before them are never among the first two.
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
    let said = compress(&model, &folder.path().join("said"), &BUDGET).ok();
    assert!(said.stderr.contains("model.layers.1.block_sparse_moe.experts.7"), "{}", said.stderr);
}

#[test]
fn verify_says_how_unlike_its_text_is_to_the_calibration_text() {
    let folder = tempdir().unwrap();
    let out = compressed(&folder, &tiny_mixtral(), "out", &[]);
    let other = text().with_file_name("shakespeare.txt");
    let distance = |text: &Path| {
        let outcome = verified(&tiny_mixtral(), &out, text)["outcome"].clone();
        outcome["routing_distance"].as_f64().unwrap()
    };
    let (same, unlike) = (distance(&text()), distance(&other));
    assert!(0.0 < same && same < unlike && unlike < 1.0, "{same} {unlike}");
}
