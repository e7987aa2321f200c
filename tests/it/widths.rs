//! Widths of experts beside ranks, and plain models with narrower experts.

use crate::support::{FEW_TOKENS, compress, document, files, run, tensors, tiny_mixtral, word};
use serde_json::Value;
use std::collections::BTreeSet;
use tempfile::tempdir;

const BUDGET: [&str; 2] = ["--budget", "40%"];

#[test]
fn widths_and_ranks_repeat_whatever_the_workers_and_the_plan_is_the_budgets() {
    let (model, folder) = (tiny_mixtral(), tempdir().unwrap());
    let at = |name: &str| folder.path().join(name);
    let words = [&BUDGET[..], &["--structures", "rank,width", "--vocabulary-share", "0.125"]].concat();
    let (one, two, planned, plan) = (at("one"), at("two"), at("planned"), at("plan.json"));
    compress(&model, &one, &[&words[..], &["--workers", "1"]].concat()).ok();
    compress(&model, &two, &[&words[..], &["--workers", "2", "--cache", "none"]].concat()).ok();
    assert_eq!(files(&one), files(&two));
    run([&["plan", "--quiet", "--model", word(&model), "--plan-out", word(&plan)], &words[..], &FEW_TOKENS]
        .concat())
    .ok();
    let settings = ["--plan", word(&plan), "--vocabulary-share", "0.125"];
    compress(&model, &planned, &settings).ok();
    assert_eq!(
        files(&planned)["model-00001-of-00001.safetensors"],
        files(&one)["model-00001-of-00001.safetensors"]
    );

    let lowrank = &document(&one, "config.json")["lowrank_config"];
    let widths = lowrank["widths"].as_object().unwrap();
    let distinct: BTreeSet<u64> = widths.values().filter_map(Value::as_u64).collect();
    assert!(distinct.len() > 4 && distinct.iter().all(|width| (1..448).contains(width)), "{distinct:?}");
    assert!(!lowrank["ranks"].as_object().unwrap().is_empty());
    let channels = document(&one, "lowrank_channels.json");
    assert_eq!(channels.as_object().unwrap().len(), widths.len());

    let verified =
        run(["verify", "--json", "--original", word(&model), "--compressed", word(&one)].to_vec()).ok();
    assert_eq!(verified.json()["verdict"], "passed");
    for sample in [&[][..], &["--quick", "--sample", "6"]] {
        let again = [&["reproduce", word(&one), "--model", word(&model)][..], sample].concat();
        run(again).ok();
    }
}

#[test]
fn one_width_for_all_experts_gives_a_plain_model() {
    let (model, folder) = (tiny_mixtral(), tempdir().unwrap());
    let out = folder.path().join("out");
    compress(&model, &out, &[&BUDGET[..], &["--structures", "width", "--allocation", "uniform"]].concat())
        .ok();
    let config = document(&out, "config.json");
    assert_eq!(config["model_type"], "mixtral");
    assert!(config.get("lowrank_config").is_none() && config.get("auto_map").is_none(), "{config}");
    let width = config["intermediate_size"].as_u64().unwrap();
    assert!((100..448).contains(&width), "{width}");
    assert!(!files(&out).keys().any(|name| name.ends_with(".py")));
    let report = document(&out, "lowrank_report.json");
    let removed = report["budget"]["removed"].as_u64().unwrap();
    // The next width, a multiple of 8, would have missed the budget.
    let channel = 4 * 8 * 3 * 128;
    assert_eq!((removed, width % 8), ((448 - width) * channel, 0));
    assert!(removed - report["budget"]["asked"].as_u64().unwrap() < 8 * channel);
    let verified =
        run(["verify", "--json", "--original", word(&model), "--compressed", word(&out)].to_vec()).ok();
    assert_eq!(verified.json()["verdict"], "passed");
    run(["reproduce", word(&out), "--model", word(&model)].to_vec()).ok();
    // Another channel in the list is found out.
    let mut channels = document(&out, "lowrank_channels.json");
    let first = channels.as_object_mut().unwrap().values_mut().next().unwrap();
    let bits = first.as_str().unwrap();
    let moved: String = bits.chars().rev().collect();
    assert_ne!(moved, bits);
    *first = moved.into();
    std::fs::write(out.join("lowrank_channels.json"), channels.to_string()).unwrap();
    let words = ["verify", "--static-only", "--original", word(&model), "--compressed", word(&out)];
    assert_eq!(run(words.to_vec()).code, 11);
}

#[test]
fn densified_experts_have_their_shapes_again_and_zeros_for_channels_that_went() {
    let (model, folder) = (tiny_mixtral(), tempdir().unwrap());
    let (out, dense) = (folder.path().join("out"), folder.path().join("dense"));
    compress(&model, &out, &[&BUDGET[..], &["--structures", "width"]].concat()).ok();
    run(["densify", "--quiet", "--model", word(&out), "--out", word(&dense)].to_vec()).ok();
    let verified =
        run(["verify", "--json", "--original", word(&model), "--compressed", word(&dense)].to_vec());
    // It is a plain model that is not the original.
    verified.refused(2, &["nothing in it is factored"]);
    let config = document(&dense, "config.json");
    assert_eq!((&config["intermediate_size"], &config["model_type"]), (&448.into(), &"mixtral".into()));
    let widths = document(&out, "config.json")["lowrank_config"]["widths"].clone();
    let (name, width) = widths.as_object().unwrap().iter().next().unwrap();
    let (_, shape, gate) = &tensors(&dense)[&format!("{name}.w1.weight")];
    assert_eq!(shape, &[448, 128]);
    let rows = gate.chunks(2 * 128).filter(|row| row.iter().any(|&byte| byte != 0)).count();
    assert_eq!(rows as u64, width.as_u64().unwrap());
}

#[test]
fn the_experts_of_a_layer_can_share_width_and_ranks() {
    let (folder, model) = (tempdir().unwrap(), tiny_mixtral());
    let out = folder.path().join("out");
    let said = compress(&model, &out, &[&BUDGET[..], &["--rank-groups", "layer"]].concat()).ok();
    assert!(said.stderr.contains("note: the experts of a layer share one width"), "{}", said.stderr);
    let report: Value = serde_json::from_slice(&files(&out)["lowrank_report.json"]).unwrap();
    assert_eq!(report["recipe"]["rank-groups"], "layer");
    let mut of_layer = std::collections::BTreeMap::new();
    for row in report["matrices"].as_array().unwrap() {
        let place = (row["layer"].as_u64(), row["projection"].to_string());
        of_layer.entry(place).or_insert_with(Vec::new).push((row["rank"].clone(), row["shape"].clone()));
    }
    assert_eq!(of_layer.len(), 12);
    assert!(of_layer.values().all(|rows| rows.len() == 8 && rows.iter().all(|row| *row == rows[0])));
    let widths: Vec<&Value> = report["experts"].as_array().into_iter().flatten().collect();
    assert!(!widths.is_empty(), "half of the parameters go: some layer is narrowed");
    run(["verify", "--static-only", "--original", word(&model), "--compressed", word(&out)]).ok();
}

#[test]
fn widths_without_what_they_are_measured_on_are_refused() {
    let (model, folder) = (tiny_mixtral(), tempdir().unwrap());
    let out = folder.path().join("out");
    for (words, part) in [
        (&["--structures", "width", "--calibrate", "none"][..], "drop --calibrate none"),
        (&["--structures", "rank,width", "--sensitivity", "relative"], "measured sensitivities"),
        (&["--structures", "rank,width", "--allocation", "uniform"], "--structures width or rank"),
    ] {
        compress(&model, &out, &[&BUDGET[..], words].concat()).refused(2, &[part]);
        assert!(!out.exists());
    }
}
