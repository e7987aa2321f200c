//! Runs that end early and are resumed, and outputs that are reproduced.

use crate::support::{
    FEW_TOKENS, compress, copy_of_model, data_range, edit_json, files, run, tiny_mixtral, tool,
};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::tempdir;

/// Widths have runs of their own in `widths.rs`; these count tensors and factors of ranks.
const BUDGET: [&str; 4] = ["--budget", "20%", "--structures", "rank"];
/// A factor of a layer that loses so much that none of its matrices stays dense.
const T: &str = "model.layers.1.block_sparse_moe.experts.0.w2.coefficients.weight";

/// Starts a run and sends it a signal when most of its tensors are written; returns its exit code.
fn stopped_while_factoring(model: &Path, out: &Path, words: &[&str], signal: &str) -> i32 {
    let mut child = tool()
        .args(FEW_TOKENS)
        .args(words)
        .args(["--workers", "1", "--model"])
        .arg(model)
        .arg("--out")
        .arg(out)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut stderr = child.stderr.take().unwrap();
    let mut block = [0; 256];
    while !String::from_utf8_lossy(&said).contains("factor and write: 96/") {
        let length = stderr.read(&mut block).unwrap();
        assert!(length > 0, "{}", String::from_utf8_lossy(&said));
        said.extend(&block[..length]);
    }
    let kill = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    child.wait().unwrap().code().unwrap_or(-1)
}

#[test]
fn a_run_that_is_stopped_says_so_and_the_same_command_goes_on() {
    let folder = tempdir().unwrap();
    let (undisturbed, out) = (folder.path().join("undisturbed"), folder.path().join("out"));
    for (reach, ends) in [
        ("none", &[("KILL", -1)][..]),
        ("experts", &[("INT", 130), ("TERM", 143), ("KILL", -1)]),
        ("layers", &[("KILL", -1)]),
    ] {
        let words = [&BUDGET[..], &["--propagate", reach]].concat();
        compress(&tiny_mixtral(), &undisturbed, &words).ok();
        for &(signal, code) in ends {
            assert_eq!(stopped_while_factoring(&tiny_mixtral(), &out, &words, signal), code, "{signal}");
            assert!(!out.exists());
            let partial = folder.path().join(".out.lowrank-partial");
            assert!(partial.exists());
            // Other settings are refused, and the unfinished work is kept.
            for other in [
                ["--budget", "30%", "--structures", "rank", "--propagate", reach],
                ["--budget", "20%", "--structures", "rank", "--propagate-own-share", "1"],
            ] {
                compress(&tiny_mixtral(), &out, &other).refused(8, &["--restart", "lowrank-partial"]);
            }
            let resumed = compress(&tiny_mixtral(), &out, &words).ok();
            assert!(resumed.stderr.contains("note: going on from"), "{}", resumed.stderr);
            assert!(files(&out) == files(&undisturbed), "{reach} {signal}");
            assert!(!partial.exists());
            std::fs::remove_dir_all(&out).unwrap();
        }
        std::fs::remove_dir_all(&undisturbed).unwrap();
    }
}

#[test]
fn finished_bytes_that_changed_meanwhile_are_made_again() {
    let folder = tempdir().unwrap();
    let (undisturbed, out) = (folder.path().join("undisturbed"), folder.path().join("out"));
    compress(&tiny_mixtral(), &undisturbed, &BUDGET).ok();
    stopped_while_factoring(&tiny_mixtral(), &out, &BUDGET, "TERM");
    let shard = folder.path().join(".out.lowrank-partial/out/model-00001-of-00001.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    for name in ["model.embed_tokens.weight", T] {
        let range = data_range(&bytes, name);
        bytes[range.start] ^= 1;
    }
    std::fs::write(&shard, bytes).unwrap();
    compress(&tiny_mixtral(), &out, &BUDGET).ok();
    assert!(files(&out) == files(&undisturbed));
}

#[test]
fn another_job_begins_only_with_restart() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    stopped_while_factoring(&tiny_mixtral(), &out, &BUDGET, "TERM");
    let words = ["--budget", "30%", "--restart"];
    compress(&tiny_mixtral(), &out, &words).ok();
    let fresh = folder.path().join("fresh");
    compress(&tiny_mixtral(), &fresh, &words).ok();
    assert!(files(&out) == files(&fresh));
}

fn reproduce(out: &Path, model: &Path, words: &[&str]) -> crate::support::Outcome {
    let start = ["reproduce".as_ref(), out.as_os_str(), "--model".as_ref(), model.as_os_str()];
    run(start.into_iter().chain(words.iter().map(AsRef::as_ref)))
}

#[test]
fn an_output_is_reproduced_with_any_number_of_workers() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--keep-dense", "layers.1.*w1", "--min-rank", "3"])
        .ok();
    for workers in ["1", "2", "8"] {
        reproduce(&out, &tiny_mixtral(), &["--workers", workers]).ok();
    }
    reproduce(&out, &tiny_mixtral(), &["--quick", "--sample", "4"]).ok();
    let beside = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let beside: std::collections::BTreeSet<_> = beside.collect();
    assert!(beside.iter().eq(["out", "out.report.html"]), "nothing else is left beside: {beside:?}");
}

#[test]
fn one_byte_of_the_output_of_the_base_or_of_the_settings_is_named() {
    let folder = tempdir().unwrap();
    let (out, model) = (folder.path().join("out"), copy_of_model(&folder));
    compress(&model, &out, &BUDGET).ok();
    reproduce(&out, &model, &[]).ok();

    let shard = out.join("model-00001-of-00001.safetensors");
    let good = std::fs::read(&shard).unwrap();
    let mut bad = good.clone();
    bad[data_range(&good, T).start] ^= 1;
    std::fs::write(&shard, bad).unwrap();
    for words in [&[][..], &["--quick", "--sample", "1000"]] {
        reproduce(&out, &model, words).refused(12, &[T, "1 of "]);
    }
    std::fs::write(&shard, good).unwrap();

    let report = out.join("lowrank_report.json");
    let good = std::fs::read(&report).unwrap();
    edit_json(&report, |report| report["recipe"]["seed"] = 1.into());
    reproduce(&out, &model, &[]).refused(12, &["lowrank_report.json"]);
    std::fs::write(&report, good).unwrap();
    reproduce(&out, &model, &[]).ok();

    let name = "model.norm.weight";
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model.join("model.safetensors.index.json")).unwrap()).unwrap();
    let base_shard = model.join(index["weight_map"][name].as_str().unwrap());
    let mut bytes = std::fs::read(&base_shard).unwrap();
    let at = data_range(&bytes, name).start;
    bytes[at] ^= 1;
    std::fs::write(&base_shard, bytes).unwrap();
    let answer = reproduce(&out, &model, &[]);
    answer.refused(12, &[name]);
    assert!(answer.stdout.contains("is not the file that was compressed"), "{answer:?}");
}

#[test]
fn a_pivoted_output_is_reproduced_whole_and_by_sample() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--layout", "pivoted", "--quiet"]).ok();
    reproduce(&out, &tiny_mixtral(), &["--workers", "2"]).ok();
    reproduce(&out, &tiny_mixtral(), &["--quick", "--sample", "3"]).ok();
}
