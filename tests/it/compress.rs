//! The main job: what it removes, what it writes, and repeatable bytes.

use crate::support::{brief, compress, data_range, files, run, tensors, tiny_mixtral};
use lowrank_model::{MatrixId, MatrixShape, Projection};
use std::collections::BTreeMap;
use tempfile::tempdir;

const PARAMS: u64 = 5_969_024;
/// What 10 B is of Mixtral-8x7B, of the bundled model.
const SHARE: &str = "21.412%";
const REMOVED_AT_LEAST: u64 = 1_278_088;

fn shape(id: MatrixId) -> MatrixShape {
    match id.projection {
        Projection::Gate | Projection::Up => MatrixShape { rows: 448, cols: 128 },
        Projection::Down => MatrixShape { rows: 128, cols: 448 },
    }
}

#[test]
fn the_budget_is_met_and_missed_by_less_than_one_step() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let printed = compress(&tiny_mixtral(), &out, &["--budget", SHARE, "--json"]).ok().json();
    let weights = tensors(&out).into_values().filter(|(dtype, _, _)| *dtype != safetensors::Dtype::I64);
    let stored: u64 = weights.map(|(_, shape, _)| shape.iter().map(|&d| d as u64).product::<u64>()).sum();
    let removed = PARAMS - stored;
    assert!(removed >= REMOVED_AT_LEAST, "{removed}");
    assert!(removed - REMOVED_AT_LEAST < 576, "no rank costs more than 575 parameters; {removed}");
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
    let words = ["--budget", SHARE, "--structures", "rank", "--layout", "uv", "--quiet"];
    compress(&tiny_mixtral(), &out, &words).ok();
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
                let module = name.strip_suffix(".weight").unwrap();
                let u = after.remove(&format!("{module}.u.weight")).unwrap();
                let v = after.remove(&format!("{module}.v.weight")).unwrap();
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
    // With error propagation, the optimum that w2's error could be compared with is not known.
    let randomized = ["--budget", "60%", "--structures", "rank", "--method", "randomized", "--seed", "7"];
    let words = [&randomized[..], &["--propagate", "none", "--quiet"]].concat();
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
    // As other commands name it.
    assert_eq!(run(["inspect".as_ref(), "-m".as_ref(), tiny_mixtral().as_os_str()]).ok().stdout, text);
    assert!(text.contains("5,969,024") && text.contains("BF16"), "{text}");
    // What `inspect` says can be removed is what a budget can ask for.
    let said = "can remove at most 5,492,736 parameters; ranks alone (--structures rank) 5,449,824";
    assert!(text.contains(said), "{text}");
    let folder = tempdir().unwrap();
    let plan = folder.path().join("plan.json");
    for (structures, most) in [("rank,width", "5,492,736"), ("rank", "5,449,824")] {
        let asking = |budget: u64| {
            let (budget, plan) = (budget.to_string(), plan.to_str().unwrap());
            let job =
                ["--budget", &budget, "--structures", structures, "--dry-run", "--quiet", "--plan-out", plan];
            compress(&tiny_mixtral(), &folder.path().join("out"), &job)
        };
        let params: u64 = most.replace(',', "").parse().unwrap();
        asking(params).ok();
        asking(params + 1).refused(7, &["the most that can be removed is", most]);
    }
}

#[test]
fn completions_name_the_commands() {
    assert!(run(["completions", "bash"]).ok().stdout.contains("densify"));
}

#[test]
fn every_command_has_a_manual_page_with_its_flags() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("share/man1");
    assert!(run(["man", dir.to_str().unwrap()]).ok().stdout.contains("lowrank-compress.1"));
    let page = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    assert!(page("lowrank-compress.1").contains("reproduce"));
    assert!(page("lowrank-compress-compress.1").contains("vocabulary\\-share"));
    assert!(page("lowrank-compress-verify.1").contains("max\\-tokens"));
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    run(["man", file.to_str().unwrap()]).refused(8, &["file", "manual pages"]);
}

/// Pivoted factors of the bundled model at the usual budget, all experts at their full width.
fn pivoted(folder: &tempfile::TempDir, name: &str, words: &[&str]) -> std::path::PathBuf {
    let out = folder.path().join(name);
    compress(
        &tiny_mixtral(),
        &out,
        &[&["--budget", SHARE, "--structures", "rank", "--layout", "pivoted", "--quiet"], words].concat(),
    )
    .ok();
    out
}

#[test]
fn pivoted_storage_buys_more_rank_for_the_same_budget() {
    let folder = tempdir().unwrap();
    let (uv, out) = (folder.path().join("uv"), pivoted(&folder, "pivoted", &[]));
    let words = ["--budget", SHARE, "--structures", "rank", "--layout", "uv", "--quiet"];
    compress(&tiny_mixtral(), &uv, &words).ok();
    let json = |dir, file: &str| -> serde_json::Value { serde_json::from_slice(&files(dir)[file]).unwrap() };
    let config = json(&out, "config.json");
    assert_eq!(config["lowrank_config"]["storage"], "pivoted");

    // Counted from the tensors. Indices count as bytes but not as parameters.
    let all = tensors(&out);
    let (indices, weights): (Vec<_>, Vec<_>) =
        all.values().partition(|(dtype, _, _)| *dtype == safetensors::Dtype::I64);
    let stored: u64 =
        weights.iter().map(|(_, shape, _)| shape.iter().map(|&d| d as u64).product::<u64>()).sum();
    let bytes: usize = all.values().map(|(_, _, bytes)| bytes.len()).sum();
    let (index, report) = (json(&out, "model.safetensors.index.json"), json(&out, "lowrank_report.json"));
    assert_eq!(index["metadata"]["total_parameters"], stored);
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert_eq!((&report["after"]["params"], &report["after"]["bytes"]), (&stored.into(), &bytes.into()));
    let removed = PARAMS - stored;
    assert_eq!(report["budget"]["removed"], removed);
    assert!(removed >= REMOVED_AT_LEAST && removed - REMOVED_AT_LEAST < 576, "{removed}");

    let ranks: BTreeMap<MatrixId, usize> =
        serde_json::from_value(config["lowrank_config"]["ranks"].clone()).unwrap();
    assert_eq!(indices.len(), ranks.len());
    let planned: u64 = ranks.values().map(|&r| (r * (448 + 128 - r)) as u64).sum();
    let factors: u64 = all
        .iter()
        .filter(|(name, _)| name.contains(".basis.") || name.contains(".coefficients."))
        .map(|(_, (_, shape, _))| (shape[0] * shape[1]) as u64)
        .sum();
    assert_eq!(factors, planned);
    for row in report["matrices"].as_array().unwrap().iter().filter(|row| !row["rank"].is_null()) {
        let (largest, error) = (&row["largest_coefficient"], &row["round_trip_error"]);
        assert!(largest.as_f64().unwrap() <= 1.5, "{row}");
        assert!((1e-4..2e-2).contains(&error.as_f64().unwrap()), "{row}");
    }

    // More rank, less error.
    let lost = |report: &serde_json::Value| -> f64 { report["optimality"]["objective"].as_f64().unwrap() };
    assert!(lost(&report) < 0.8 * lost(&json(&uv, "lowrank_report.json")));
}

#[test]
fn pivoted_bytes_are_the_same_for_any_number_of_workers() {
    let folder = tempdir().unwrap();
    let one = files(&pivoted(&folder, "one", &["--workers", "1"]));
    assert!(one == files(&pivoted(&folder, "two", &["--workers", "2"])));
}

#[test]
fn a_pivoted_checkpoint_is_inspected_verified_and_densified() {
    let folder = tempdir().unwrap();
    let (out, dense) = (pivoted(&folder, "out", &[]), folder.path().join("dense"));
    let found = run(["inspect".as_ref(), out.as_os_str(), "--json".as_ref()]).ok().json();
    let kinds: u64 =
        found["kinds"].as_array().unwrap().iter().map(|kind| kind["bytes"].as_u64().unwrap()).sum();
    assert_eq!(found["bytes"], kinds);
    let original = tiny_mixtral();
    run([
        "verify".as_ref(),
        "--original".as_ref(),
        original.as_os_str(),
        "--compressed".as_ref(),
        out.as_os_str(),
        "--static-only".as_ref(),
    ])
    .ok();
    run([
        "densify".as_ref(),
        "--model".as_ref(),
        out.as_os_str(),
        "--out".as_ref(),
        dense.as_os_str(),
        "--dtype".as_ref(),
        "f32".as_ref(),
    ])
    .ok();
    // The definition, computed from the stored numbers: W = basis [I T] Π.
    let (stored, dense) = (tensors(&out), tensors(&dense));
    let module = "model.layers.0.block_sparse_moe.experts.0.w1";
    let bf16 = |name: String| -> Vec<f32> {
        let (_, _, bytes) = &stored[&name];
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
            .collect()
    };
    let (basis, table) =
        (bf16(format!("{module}.basis.weight")), bf16(format!("{module}.coefficients.weight")));
    let order: Vec<usize> = stored[&format!("{module}.order")]
        .2
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&bytes| i64::from_le_bytes(bytes) as usize)
        .collect();
    let (r, rest) = (basis.len() / 448, 128 - basis.len() / 448);
    let w = dense[&format!("{module}.weight")].2.as_chunks::<4>().0;
    for i in [0, 7, 447] {
        for (position, &place) in order.iter().enumerate() {
            let column = |k: usize| f64::from(basis[i * r + k]);
            let expected = match position.checked_sub(r) {
                None => column(position),
                Some(j) => (0..r).map(|k| column(k) * f64::from(table[k * rest + j])).sum(),
            };
            let got = f64::from(f32::from_le_bytes(w[i * 128 + place]));
            assert!((got - expected).abs() < 1e-5, "{i} {place}: {got} {expected}");
        }
    }
}

#[test]
fn a_plan_for_other_storage_is_refused() {
    let folder = tempdir().unwrap();
    let plan = folder.path().join("plan.json");
    let plan = plan.to_str().unwrap();
    let model = tiny_mixtral();
    let words =
        ["plan", "--model", model.to_str().unwrap(), "--budget", "20%", "--plan-out", plan, "--quiet"];
    run(brief(&words)).ok();
    let words = ["--plan", plan, "--layout", "uv", "--quiet"];
    compress(&model, &folder.path().join("out"), &words)
        .refused(2, &["stored as pivoted", "as uv", "--storage"]);
}

#[test]
fn an_edited_index_of_pivots_is_caught_by_name() {
    let folder = tempdir().unwrap();
    let out = pivoted(&folder, "out", &[]);
    let module = "model.layers.1.block_sparse_moe.experts.2.w1";
    let name = format!("{module}.order");
    let index: serde_json::Value =
        serde_json::from_slice(&files(&out)["model.safetensors.index.json"]).unwrap();
    let shard = out.join(index["weight_map"][&name].as_str().unwrap());
    let whole = std::fs::read(&shard).unwrap();
    let range = data_range(&whole, &name);
    let order: Vec<i64> =
        whole[range.clone()].as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
    let verify = |order: &[i64]| {
        let mut edited = whole.clone();
        edited[range.clone()]
            .copy_from_slice(&order.iter().flat_map(|index| index.to_le_bytes()).collect::<Vec<_>>());
        std::fs::write(&shard, edited).unwrap();
        let original = tiny_mixtral();
        run([
            "verify".as_ref(),
            "--original".as_ref(),
            original.as_os_str(),
            "--compressed".as_ref(),
            out.as_os_str(),
            "--static-only".as_ref(),
        ])
    };
    assert_eq!(verify(&order).code, 0);

    // With one entry changed it is no longer a permutation.
    let mut edited = order.clone();
    edited[3] = edited[4];
    let said = verify(&edited);
    assert!(said.code != 0 && format!("{said:?}").contains(&name), "{said:#?}");

    // If a pivot changes places with an index that is not a pivot, it is still a permutation, but another matrix.
    let mut edited = order.clone();
    let rank = order.windows(2).position(|pair| pair[1] < pair[0]).unwrap() + 1;
    let (pivot, other) = (0..rank)
        .find_map(|k| Some((k, rank + order[rank..].iter().position(|&other| other == order[k] + 1)?)))
        .unwrap();
    edited.swap(pivot, other);
    let said = verify(&edited);
    assert!(said.code != 0 && format!("{said:?}").contains(module), "{said:#?}");
}
