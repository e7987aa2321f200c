//! Unusual numbers and absurd values on the default path, which runs the model on a text. The tool must give a correct
//! result or one clear line.

use crate::support::{
    Outcome, compress, copy_of_model, data_range, edit_json, poison_all, run, shard_of, tiny_mixtral,
};
use std::path::Path;
use tempfile::tempdir;

/// Few tokens, because the tests are not about the text.
const JOB: [&str; 9] = [
    "--budget",
    "20%",
    "--calibration-tokens",
    "1024",
    "--sensitivity-tokens",
    "512",
    "--cache",
    "none",
    "--quiet",
];

fn weight(projection: &str) -> String {
    format!("model.layers.1.block_sparse_moe.experts.3.{projection}.weight")
}

fn verified(original: &Path, compressed: &Path) -> Outcome {
    let words = ["verify", "--static-only", "--quiet", "--original"].map(AsRef::as_ref);
    let dirs = [original.as_os_str(), "--compressed".as_ref(), compressed.as_os_str()];
    run(words.into_iter().chain(dirs))
}

/// Compresses a changed copy of the model, and verifies the result.
#[track_caller]
fn is_compressed(change: impl FnOnce(&Path)) {
    let folder = tempdir().unwrap();
    let (model, out) = (copy_of_model(&folder), folder.path().join("out"));
    change(&model);
    compress(&model, &out, &JOB).ok();
    verified(&model, &out).ok();
}

/// Expects that the tool refuses a changed copy with this message and leaves nothing.
#[track_caller]
fn is_refused(change: impl FnOnce(&Path), words: &[&str], code: i32, parts: &[&str]) {
    let folder = tempdir().unwrap();
    let (model, out) = (copy_of_model(&folder), folder.path().join("out"));
    change(&model);
    compress(&model, &out, &[&JOB[..], words].concat()).refused(code, parts);
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "only the model is left");
}

#[test]
fn an_expert_of_zeros() {
    is_compressed(|model| ["w1", "w2", "w3"].iter().for_each(|w| poison_all(model, &weight(w), 0)));
}

#[test]
fn a_matrix_of_denormals() {
    is_compressed(|model| poison_all(model, &weight("w1"), 1));
}

#[test]
fn a_matrix_of_one_row_again_and_again() {
    is_compressed(|model| {
        let (name, cols) = (weight("w1"), 128);
        let shard = shard_of(model, &name);
        let mut bytes = std::fs::read(&shard).unwrap();
        let range = data_range(&bytes, &name);
        let row = bytes[range.start..range.start + 2 * cols].to_vec();
        bytes[range].chunks_mut(2 * cols).for_each(|other| other.copy_from_slice(&row));
        std::fs::write(shard, bytes).unwrap();
    });
}

#[test]
fn numbers_so_large_that_the_model_overflows() {
    // The largest number in bf16.
    let change = |model: &Path| poison_all(model, &weight("w2"), 0x7f7f);
    is_refused(change, &[], 6, &["layer 1, expert 3", "--calibrate none"]);
}

#[test]
fn constants_that_no_model_has() {
    for (key, value) in [("rms_norm_eps", 1e308), ("rms_norm_eps", 1e-320)] {
        is_compressed(|model| edit_json(&model.join("config.json"), |config| config[key] = value.into()));
    }
    for (key, value) in [("sliding_window", 1), ("num_experts_per_tok", 8)] {
        is_compressed(|model| edit_json(&model.join("config.json"), |config| config[key] = value.into()));
    }
}

#[test]
fn tokenizers_that_do_not_serve() {
    let broken =
        |text: &'static str| move |model: &Path| std::fs::write(model.join("tokenizer.json"), text).unwrap();
    is_refused(broken("{"), &[], 2, &["tokenizer.json", "give token ids"]);
    is_refused(|model| broken(&*"[".repeat(1_000_000).leak())(model), &[], 2, &["tokenizer.json"]);
    is_refused(
        |model| std::fs::remove_file(model.join("tokenizer.json")).unwrap(),
        &[],
        2,
        &["tokenizer.json"],
    );
    // Of another model: its tokens have no embedding here.
    let foreign = |model: &Path| {
        edit_json(&model.join("tokenizer.json"), |tokenizer| {
            for (_, id) in tokenizer["model"]["vocab"].as_object_mut().unwrap() {
                *id = (id.as_u64().unwrap() + 100_000).into();
            }
        });
    };
    is_refused(foreign, &[], 2, &["outside the vocabulary of 1024"]);
}

#[test]
fn texts_that_do_not_serve() {
    let folder = tempdir().unwrap();
    let text = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for (path, part) in [
        (text("a.txt", b"\xff\xfe"), "UTF-8"),
        (text("b.txt", b""), "0 tokens"),
        (text("c.ids", b"5"), "1 tokens"),
        (text("d.json", "[".repeat(1_000_000).as_bytes()), "d.json"),
        (folder.path().to_str().unwrap().to_owned(), "give a .txt"),
        (text("e.jsonl", b"{\"conversations\": []}"), "apply_chat_template"),
        (text("f.jsonl", b"{\"messages\": []}"), "`messages` is no list"),
        (text("g.md", &"caf\u{e9} ".repeat(3000).chars().map(|c| c as u8).collect::<Vec<_>>()), "Latin-1"),
        (text("h.txt", &[0; 5000]), "NUL"),
        // 18 tokens, of 1024 asked for.
        (text("i.txt", b"A short text, of which a model can say nothing."), "give at least 512"),
    ] {
        is_refused(|_| (), &["--calibrate", &path], 2, &[part]);
    }
}

#[test]
fn values_that_nobody_means() {
    let patterns = "(".repeat(100_000);
    for (words, code, part) in [
        (&["--workers", "18446744073709551615"][..], 2, "--workers"),
        (&["--workers", "1025"], 2, "at most 1024"),
        (&["--rank-multiple", "18446744073709551615"], 7, "the most that can be removed is 0"),
        (
            &["--min-rank", "18446744073709551615", "--structures", "rank"],
            7,
            "the most that can be removed is 0",
        ),
        (&["--keep-dense", &patterns], 2, "unclosed group"),
        (&["--keep-dense", "(a{1000}){1000}{1000}"], 2, "size limit"),
    ] {
        let folder = tempdir().unwrap();
        let out = folder.path().join("out");
        let told = compress(&tiny_mixtral(), &out, &[&JOB[..], words].concat());
        told.refused(code, &[part]);
        assert!(told.stderr.len() < 2000, "{} bytes", told.stderr.len());
    }
}

#[test]
fn json_that_is_deeper_than_any_stack() {
    let folder = tempdir().unwrap();
    let bomb = folder.path().join("bomb.json");
    let toml = folder.path().join("bomb.toml");
    std::fs::write(&bomb, "{\"a\":".repeat(200_000)).unwrap();
    std::fs::write(&toml, format!("keep-dense = {}", "[".repeat(200_000))).unwrap();
    let out = folder.path().join("out");
    for flag in ["--plan", "--ranks"] {
        compress(&tiny_mixtral(), &out, &[flag, bomb.to_str().unwrap()]).refused(2, &["bomb.json"]);
    }
    compress(&tiny_mixtral(), &out, &["--config", toml.to_str().unwrap()]).refused(2, &["bomb.toml"]);
}

#[test]
fn a_cache_that_is_damaged_or_no_folder() {
    let folder = tempdir().unwrap();
    let (cache, out) = (folder.path().join("cache"), folder.path().join("out"));
    // With `--propagate layers` every second moment is computed again from the compressed model's activations.
    let reach = ["--propagate", "experts"];
    let ranks = ["--structures", "rank"];
    let job = [&JOB[..6], &reach, &ranks, &["--cache", cache.to_str().unwrap(), "--quiet"]].concat();
    compress(&tiny_mixtral(), &out, &job).ok();
    let made = crate::support::files(&out);
    std::fs::remove_dir_all(&out).unwrap();
    let entries: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    // Of an expert whose gate matrix is factored: nothing reads the second moments of a dense one again.
    let report: serde_json::Value = serde_json::from_slice(&made["lowrank_report.json"]).unwrap();
    let rows = report["matrices"].as_array().unwrap();
    let factored = rows.iter().find(|row| row["projection"] == "gate" && !row["rank"].is_null()).unwrap();
    let (layer, expert) = (factored["layer"].as_u64().unwrap(), factored["expert"].as_u64().unwrap());
    let name = format!("inputs-{layer:03}-{expert:03}");
    let moments =
        entries.iter().map(|entry| entry.join(format!("{name}.safetensors"))).find(|path| path.exists());
    let moments = moments.expect("second moments of the expert");
    let good = std::fs::read(&moments).unwrap();
    std::fs::write(&moments, &good[..good.len() - 1]).unwrap();
    compress(&tiny_mixtral(), &out, &job).refused(10, &[&name, "delete it and run again"]);
    // After deleting the file, as the message says, the tool measures again and writes the same bytes.
    std::fs::remove_file(&moments).unwrap();
    compress(&tiny_mixtral(), &out, &job).ok();
    assert!(crate::support::files(&out) == made);
    assert!(moments.exists());

    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let other = folder.path().join("other");
    let job = [&JOB[..6], &["--cache", file.to_str().unwrap(), "--quiet"]].concat();
    let told = compress(&tiny_mixtral(), &other, &job);
    told.refused(10, &["file", "--cache"]);
}

#[test]
fn a_report_that_lies_about_its_pivots() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--quiet"]).ok();
    verified(&tiny_mixtral(), &out).ok();
    let document = out.join("lowrank_report.json");
    let good = std::fs::read(&document).unwrap();
    for (key, value) in [("largest_coefficient", 0.5), ("round_trip_error", 0.9), ("round_trip_error", -1e-3)]
    {
        std::fs::write(&document, &good).unwrap();
        edit_json(&document, |report| {
            let rows = report["matrices"].as_array_mut().unwrap();
            let row = rows.iter_mut().find(|row| !row["rank"].is_null()).unwrap();
            assert!(row[key].is_number(), "{row}");
            row[key] = value.into();
        });
        verified(&tiny_mixtral(), &out).refused(11, &["the report says"]);
    }
}
