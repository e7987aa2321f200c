//! Every bad input: one line that names file and tensor, its exit code, nothing at `--out`.

use crate::support::{
    INDEX, compress, copy_of_model, data_range, edit_header, edit_json, outcome, run, shard_of, tiny_mixtral,
    tool,
};
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

const SHARD: &str = "model-00002-of-00004.safetensors";
const W1: &str = "model.layers.1.block_sparse_moe.experts.3.w1.weight";

/// Breaks a copy of the model and expects this refusal, with nothing left behind.
#[track_caller]
fn broken(break_it: impl FnOnce(&Path), code: i32, parts: &[&str]) {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    break_it(&model);
    refused(&folder, &model, &["--budget", "20%"], code, parts);
}

#[track_caller]
fn refused(folder: &TempDir, model: &Path, words: &[&str], code: i32, parts: &[&str]) {
    let out = folder.path().join("out");
    compress(model, &out, words).refused(code, parts);
    assert!(!out.exists());
    let left: Vec<PathBuf> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.iter().all(|path| *path == folder.path().join("model")), "left behind: {left:?}");
}

fn poison(model: &Path, tensor: &str, bits: u16) {
    let path = shard_of(model, tensor);
    let mut bytes = std::fs::read(&path).unwrap();
    let range = data_range(&bytes, tensor);
    bytes[range.start + 20..range.start + 22].copy_from_slice(&bits.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_missing_shard() {
    broken(|model| std::fs::remove_file(model.join(SHARD)).unwrap(), 5, &[SHARD]);
}

#[test]
fn a_truncated_shard() {
    let cut = |model: &Path| {
        let path = model.join(SHARD);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    };
    broken(cut, 5, &[SHARD]);
}

#[test]
fn a_shard_with_an_extra_tensor_and_one_less() {
    let rename = |model: &Path| edit_header(&shard_of(model, W1), W1, &W1.replace("w1", "w9"));
    broken(rename, 5, &[W1]);
}

#[test]
fn an_index_that_names_an_absent_tensor() {
    let add = |model: &Path| {
        edit_json(&model.join(INDEX), |index| index["weight_map"]["model.ghost.weight"] = SHARD.into());
    };
    broken(add, 5, &["model.ghost.weight"]);
}

#[test]
fn an_index_that_leads_outside() {
    let lead = |model: &Path| {
        edit_json(&model.join(INDEX), |index| index["weight_map"][W1] = "../elsewhere.safetensors".into());
    };
    broken(lead, 5, &["../elsewhere.safetensors"]);
}

#[test]
fn a_wrong_shape() {
    let lie = |model: &Path| {
        edit_json(&model.join("config.json"), |config| config["intermediate_size"] = 449.into());
    };
    broken(lie, 5, &["449", "448"]);
}

#[test]
fn a_foreign_dtype() {
    let lie = |model: &Path| edit_header(&shard_of(model, W1), "\"BF16\"", "\"I16\" ");
    broken(lie, 4, &["I16"]);
}

#[test]
fn a_nan_in_a_weight() {
    broken(|model| poison(model, W1, 0x7fc0), 6, &[W1]);
}

#[test]
fn an_infinity_in_a_weight() {
    broken(|model| poison(model, W1, 0x7f80), 6, &[W1]);
}

#[test]
fn a_nan_in_a_tensor_that_is_only_copied() {
    broken(|model| poison(model, "model.embed_tokens.weight", 0x7fc0), 6, &["model.embed_tokens.weight"]);
}

#[test]
fn a_quantised_checkpoint() {
    let quantise = |model: &Path| {
        edit_json(&model.join("config.json"), |config| {
            config["quantization_config"] = serde_json::json!({"quant_method": "gptq"});
        });
    };
    broken(quantise, 4, &["gptq", "config.json"]);
}

#[test]
fn an_unknown_family() {
    let rename = |model: &Path| {
        edit_json(&model.join("config.json"), |config| config["model_type"] = "llama".into());
    };
    broken(rename, 4, &["llama"]);
}

#[test]
fn a_config_that_is_no_json() {
    broken(|model| std::fs::write(model.join("config.json"), "{").unwrap(), 5, &["config.json"]);
}

#[test]
fn no_such_model() {
    let folder = tempdir().unwrap();
    refused(&folder, Path::new("nobody/nothing-at-all"), &["--budget", "20%"], 3, &["nobody/nothing-at-all"]);
}

#[test]
fn an_output_that_exists() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "mine").unwrap();
    compress(&tiny_mixtral(), &out, &["--budget", "20%"]).refused(8, &["out"]);
    assert_eq!(std::fs::read(out.join("precious")).unwrap(), b"mine");
}

#[test]
fn an_output_without_a_parent() {
    let folder = tempdir().unwrap();
    compress(&tiny_mixtral(), &folder.path().join("no/such/out"), &["--budget", "20%"])
        .refused(8, &["no/such"]);
}

#[test]
fn a_budget_beyond_what_can_be_removed_says_the_most() {
    let folder = tempdir().unwrap();
    // 96 matrices of 448·128 down to rank 1, which costs 575 by pivots, 576 as u·v: 96 · (57,344 − 575).
    for (budget, storage, most) in
        [("5_449_825", "pivoted", "5,449,824"), ("10B", "pivoted", "5,449,824"), ("10B", "uv", "5,449,728")]
    {
        let words = ["--budget", budget, "--structures", "rank", "--layout", storage];
        refused(&folder, &tiny_mixtral(), &words, 7, &[most]);
    }
    // 32 experts down to one channel, 3 · 128 parameters: 5,505,024 − 32 · 384.
    refused(&folder, &tiny_mixtral(), &["--budget", "5_492_737"], 7, &["5,492,736"]);
}

#[test]
fn nonsense_on_the_command_line() {
    let folder = tempdir().unwrap();
    for (words, part) in [
        (vec!["--budget", "ten"], "ten"),
        (vec!["--budget", "0"], "zero"),
        (vec!["--budget", "10%", "--target-params", "1M"], "exclude"),
        (vec![], "--budget"),
        (vec!["--budget", "10%", "--keep-dense", "("], "--keep-dense"),
        (vec!["--budget", "10%", "--keep-dense", "no such module"], "no such module"),
        (vec!["--budget", "10%", "--method", "magic"], "magic"),
        (vec!["--budget", "10%", "--dtype", "int4"], "int4"),
        (vec!["--budget", "10%", "--rank-multiple", "0"], "--rank-multiple"),
        (vec!["--budget", "10%", "--gate-weight", "cubed"], "cubed"),
        (vec!["--budget", "10%", "--calibration-target", "model"], "model"),
        (vec!["--budget", "10%", "--calibration-blend", "1.5"], "1.5"),
        (vec!["--budget", "10%", "--calibration-tokens", "1"], "--calibration-tokens"),
        (vec!["--budget", "10%", "--calibration-window", "1"], "--calibration-window is 1"),
        (vec!["--budget", "10%", "--calibration-window", "99999999"], "lower --calibration-window"),
        (vec!["--budget", "10%", "--calibrate", "none", "--calibrate", "a.txt"], "--calibrate none"),
        (vec!["--budget", "10%", "--calibrate", "none", "--gate-weight", "none"], "--calibrate none"),
        (vec!["--budget", "10%", "--calibrate", "none", "--sensitivity", "measured"], "--calibrate none"),
        (vec!["--budget", "10%", "--calibrate", "no-such.txt"], "no-such.txt"),
        (vec!["--budget", "10%", "--allocation", "fair"], "fair"),
        (vec!["--budget", "10%", "--memory", "1kB"], "memory"),
    ] {
        let code = if part == "memory" { 9 } else { 2 };
        refused(&folder, &tiny_mixtral(), &words, code, &[part]);
    }
    run(["compress", "--budget", "10%"]).refused(2, &["--model"]);
    run(["compress", "--budget", "10%", "--model", "x"]).refused(2, &["--out"]);
}

#[test]
fn linear_algebra_on_a_device_that_is_not_there() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    // This folder has no CUDA libraries, and the tool looks nowhere else, so this also fails on a machine with a GPU.
    let run = |command: &str, flag: &str| {
        let mut tool = tool();
        tool.args([command, "--budget", "20%", flag, "cuda", "--model"]).arg(tiny_mixtral());
        let place = if command == "plan" { "--plan-out" } else { "--out" };
        tool.arg(place).arg(&out).env("LOWRANK_CUDA_LIBS", folder.path());
        outcome(&mut tool)
    };
    for command in ["compress", "plan"] {
        run(command, "--algebra").refused(2, &["no CUDA here", "--algebra cuda", "--algebra cpu"]);
        run(command, "--device").refused(2, &["no CUDA here", "--device cpu"]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_config_file_with_an_unknown_key() {
    let folder = tempdir().unwrap();
    let config = folder.path().join("job.toml");
    std::fs::write(&config, "budget = \"10%\"\nbudgte = \"20%\"\n").unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--config", config.to_str().unwrap()])
        .refused(2, &["job.toml", "line 2", "budgte"]);
}

#[test]
fn a_rank_map_with_a_rank_above_break_even() {
    let folder = tempdir().unwrap();
    let map = folder.path().join("ranks.json");
    let name = W1.trim_end_matches(".weight");
    let out = folder.path().join("out");
    for (text, parts) in [
        (format!("{{\"{name}\": 128}}"), vec!["layers.1.experts.3.gate", "127"]),
        ("{\"layers.1.experts.3.gate\": 128}".to_owned(), vec!["layers.1.experts.3.gate", "127"]),
        (format!("{{\"{name}\": 0}}"), vec!["layers.1.experts.3.gate"]),
        ("{\"model.layers.9.block_sparse_moe.experts.0.w1\": 5}".to_owned(), vec!["layers.9"]),
        ("{\"some.module\": 5}".to_owned(), vec!["some.module"]),
        ("[1, 2]".to_owned(), vec!["ranks.json"]),
    ] {
        std::fs::write(&map, text).unwrap();
        compress(&tiny_mixtral(), &out, &["--ranks", map.to_str().unwrap()]).refused(2, &parts);
        assert!(!out.exists());
    }
}

#[test]
fn a_plan_that_was_edited() {
    let folder = tempdir().unwrap();
    let (plan, model, out) = (folder.path().join("plan.json"), tiny_mixtral(), folder.path().join("out"));
    let words = ["--budget", "20%", "--dry-run", "--quiet", "--plan-out", plan.to_str().unwrap()];
    compress(&model, &out, &words).ok();
    let good = std::fs::read(&plan).unwrap();
    type Edit = fn(&mut serde_json::Value);
    let edits: [(Edit, &str); 4] = [
        (|plan| plan["plan_version"] = 3.into(), "plan_version"),
        (|plan| plan["after"]["params"] = 1.into(), "parameters"),
        (|plan| drop(plan["matrices"].as_array_mut().unwrap().pop()), "layers.3.experts.7.up"),
        (|plan| plan["matrices"][0]["shape"]["rows"] = 449.into(), "449"),
    ];
    for (edit, part) in edits {
        std::fs::write(&plan, &good).unwrap();
        edit_json(&plan, edit);
        compress(&model, &out, &["--plan", plan.to_str().unwrap()]).refused(2, &[part]);
    }
}

#[test]
fn what_is_no_output_and_what_is_damaged_have_codes_of_their_own() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let model = tiny_mixtral();
    let reproduce = || run(["reproduce".as_ref(), out.as_os_str(), "--model".as_ref(), model.as_os_str()]);
    std::fs::create_dir(&out).unwrap();
    reproduce().refused(3, &["lowrank_report.json", "no output of this program"]);
    std::fs::write(out.join("lowrank_report.json"), "{").unwrap();
    reproduce().refused(14, &["lowrank_report.json", "EOF"]);
    run(["report".as_ref(), out.as_os_str()]).refused(14, &["lowrank_report.json", "EOF"]);
}

#[test]
fn a_reader_that_closes_the_pipe_ends_the_command_without_a_word() {
    let mut tool = tool();
    tool.args(["inspect", "--verbose"]).arg(tiny_mixtral());
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = tool.stdout(writer).stderr(std::process::Stdio::piped()).spawn().unwrap().wait_with_output();
    let output = output.unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(141), 0), "{output:?}");
}
