//! The main job: what is removed, what is written, that bytes repeat.

use crate::support::{compress, files, run, tensors, tiny_mixtral};
use lowrank_model::{MatrixId, MatrixShape, Projection};
use std::collections::BTreeMap;
use tempfile::tempdir;

const PARAMS: u64 = 5_969_024;
/// What 10 B is of Mixtral-8x7B, of the bundled model.
const SHARE: &str = "21.412%";
const REMOVED_AT_LEAST: u64 = 1_278_088;

fn shape(id: MatrixId) -> MatrixShape {
    match id.projection {
        Projection::W1 | Projection::W3 => MatrixShape { rows: 448, cols: 128 },
        Projection::W2 => MatrixShape { rows: 128, cols: 448 },
    }
}

#[test]
fn the_budget_is_met_and_missed_by_less_than_one_step() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let printed = compress(&tiny_mixtral(), &out, &["--budget", SHARE, "--json"]).ok().json();
    let stored: u64 =
        tensors(&out).values().map(|(_, shape, _)| shape.iter().map(|&d| d as u64).product::<u64>()).sum();
    let removed = PARAMS - stored;
    assert!(removed >= REMOVED_AT_LEAST, "{removed}");
    assert!(removed - REMOVED_AT_LEAST < 576, "one rank of u·v costs 576 parameters; {removed}");
    assert_eq!(printed["removed_params"], removed);
    assert_eq!(printed["after"]["params"], stored);
    let index: serde_json::Value =
        serde_json::from_slice(&files(&out)["model.safetensors.index.json"]).unwrap();
    assert_eq!(index["metadata"]["total_parameters"], stored);
}

#[test]
fn untouched_tensors_are_byte_identical_and_factors_have_their_rank() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", SHARE, "--quiet"]).ok();
    let config: serde_json::Value = serde_json::from_slice(&files(&out)["config.json"]).unwrap();
    assert_eq!(config["model_type"], "lowrank_mixtral");
    let ranks: BTreeMap<MatrixId, usize> =
        serde_json::from_value(config["lowrank_config"]["ranks"].clone()).unwrap();
    assert!(!ranks.is_empty());
    let (before, mut after) = (tensors(&tiny_mixtral()), tensors(&out));
    for (name, tensor) in &before {
        let id = MatrixId::parse(name.strip_suffix(".weight").unwrap());
        match id.and_then(|id| Some((id, *ranks.get(&id)?))) {
            None => assert_eq!(after.remove(name).as_ref(), Some(tensor), "{name}"),
            Some((id, rank)) => {
                let MatrixShape { rows, cols } = shape(id);
                let u = after.remove(&format!("{id}.u.weight")).unwrap();
                let v = after.remove(&format!("{id}.v.weight")).unwrap();
                assert_eq!((u.1, v.1), (vec![rows, rank], vec![rank, cols]));
                assert_eq!((u.0, v.0), (tensor.0, tensor.0));
            }
        }
    }
    assert_eq!(after.keys().collect::<Vec<_>>(), Vec::<&String>::new(), "nothing else is written");
}

#[test]
fn two_runs_and_any_number_of_workers_give_the_same_bytes() {
    let folder = tempdir().unwrap();
    let mut made = Vec::new();
    for (name, workers) in [("a", "1"), ("b", "2"), ("c", "2")] {
        let out = folder.path().join(name);
        compress(&tiny_mixtral(), &out, &["--budget", "30%", "--quiet", "--workers", workers]).ok();
        made.push(files(&out));
    }
    assert!(made[0] == made[1] && made[1] == made[2]);
}

#[test]
fn the_randomized_method_repeats_too_and_says_what_it_cost() {
    let folder = tempdir().unwrap();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    let words = ["--budget", "60%", "--method", "randomized", "--seed", "7", "--quiet"];
    compress(&tiny_mixtral(), &a, &[&words[..], &["--workers", "1"]].concat()).ok();
    compress(&tiny_mixtral(), &b, &[&words[..], &["--workers", "2"]].concat()).ok();
    assert!(files(&a) == files(&b));
    let report: serde_json::Value = serde_json::from_slice(&files(&a)["lowrank_report.json"]).unwrap();
    let excess: Vec<f64> = report["matrices"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| !row["rank"].is_null())
        .map(|row| row["excess_over_optimum"].as_f64().expect("always stated"))
        .collect();
    assert!(excess.iter().any(|&excess| excess > 0.0), "{excess:?}");
}

#[test]
fn companions_are_copied_verbatim_and_the_card_says_what_was_removed() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", SHARE, "--quiet"]).ok();
    let (before, after) = (files(&tiny_mixtral()), files(&out));
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        assert_eq!(before[name], after[name], "{name}");
    }
    let card = String::from_utf8(after["README.md"].clone()).unwrap();
    assert!(card.starts_with("---\n") && card.contains("trust_remote_code=True"), "{card}");
    assert!(card.contains("[INST]"), "{card}");
}

#[test]
fn densify_gives_back_the_names_and_shapes_of_the_base() {
    let folder = tempdir().unwrap();
    let (out, dense) = (folder.path().join("out"), folder.path().join("dense"));
    compress(&tiny_mixtral(), &out, &["--budget", SHARE, "--quiet"]).ok();
    let words =
        ["densify".as_ref(), "--model".as_ref(), out.as_os_str(), "--out".as_ref(), dense.as_os_str()];
    let said = run(words).ok();
    assert!(said.stdout.contains("saves no memory"), "{said:?}");
    let shapes = |dir| -> BTreeMap<String, Vec<usize>> {
        tensors(dir).into_iter().map(|(name, (_, shape, _))| (name, shape)).collect()
    };
    assert_eq!(shapes(&tiny_mixtral()), shapes(&dense));
}

#[test]
fn inspect_counts_parameters_by_kind() {
    let found = run(["inspect".as_ref(), tiny_mixtral().as_os_str(), "--json".as_ref()]).ok().json();
    assert_eq!(found["params"], PARAMS);
    let experts = found["kinds"].as_array().unwrap().iter().find(|kind| kind["kind"] == "experts").unwrap();
    assert_eq!((&experts["params"], &experts["tensors"]), (&5_505_024.into(), &96.into()));
    let text = run(["inspect".as_ref(), tiny_mixtral().as_os_str()]).ok().stdout;
    assert!(text.contains("5,969,024") && text.contains("BF16"), "{text}");
}

#[test]
fn completions_name_the_commands() {
    assert!(run(["completions", "bash"]).ok().stdout.contains("densify"));
}
