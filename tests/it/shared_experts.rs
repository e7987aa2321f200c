//! Shared experts that are compressed as the routed ones are.

use crate::support::{compress, document, edit_json, files, run, tensors, tiny_mixtral, word};
use serde_json::{Value, json};
use std::path::PathBuf;
use tempfile::tempdir;

const FEW: [&str; 4] = ["--calibration-tokens", "2048", "--sensitivity-tokens", "512"];
const COMPRESS: [&str; 2] = ["--shared-experts", "compress"];

fn model(family: &str) -> PathBuf {
    tiny_mixtral().with_file_name("golden").join(family)
}

#[test]
fn they_get_ranks_from_the_same_budget_and_every_command_knows() {
    // The name of the module, and the structures beside which it has ranks.
    for (family, module, structures) in [
        ("qwen2-moe", "model.layers.1.mlp.shared_expert", "rank"),
        ("deepseek-v2", "model.layers.1.mlp.shared_experts", "rank,width,base"),
    ] {
        let (model, folder) = (model(family), tempdir().unwrap());
        let at = |name: &str| folder.path().join(name);
        let (one, two, plan, planned, dense) =
            (at("one"), at("two"), at("plan.json"), at("planned"), at("dense"));
        let job = [
            &["--budget", "10%", "--structures", structures, "--fix-rank", "shared_experts?.gate_proj=7"][..],
            &COMPRESS,
            &FEW,
        ]
        .concat();
        compress(&model, &one, &[&job[..], &["--workers", "1"]].concat()).ok();
        compress(&model, &two, &[&job[..], &["--workers", "2", "--cache", "none"]].concat()).ok();
        assert_eq!(files(&one), files(&two));

        let lowrank = document(&one, "config.json")["lowrank_config"].clone();
        assert_eq!(
            (&lowrank["format_version"], &lowrank["compressed_shared_experts"]),
            (&json!(4), &json!(true))
        );
        assert_eq!(lowrank["ranks"][format!("{module}.gate_proj")], 7);
        let report = document(&one, "lowrank_report.json");
        assert_eq!(report["recipe"]["shared-experts"], "compress");
        let rows = report["matrices"].as_array().unwrap();
        let shared: Vec<&Value> = rows.iter().filter(|row| row["expert"] == "shared").collect();
        // Two layers of three matrices.
        assert_eq!(shared.len(), 6);
        assert_eq!(shared[0]["rank"], 7);
        // In the calibrated norm and in the plain one there is an error, and no more than all.
        for key in ["relative_error", "calibrated_error"] {
            let error = shared[0][key].as_f64().unwrap();
            assert!((0.01..1.0).contains(&error), "{key} {error}");
        }
        let names = tensors(&one);
        assert!(
            names.keys().any(|name| name.starts_with(&format!("{module}.gate_proj."))),
            "{:?}",
            names.keys()
        );
        assert!(!names.contains_key(&format!("{module}.gate_proj.weight")));

        // A plan and ranks say themselves that shared experts are among the matrices.
        run([&["plan", "--quiet", "--model", word(&model), "--plan-out", word(&plan)], &job[..]].concat())
            .ok();
        compress(&model, &planned, &[&["--plan", word(&plan)][..], &FEW].concat()).ok();
        let shard = "model-00001-of-00001.safetensors";
        assert!(files(&planned)[shard] == files(&one)[shard]);
        if structures == "rank" {
            let (ranks, given) = (at("ranks.json"), at("given"));
            std::fs::write(&ranks, lowrank["ranks"].to_string()).unwrap();
            compress(&model, &given, &[&["--ranks", word(&ranks)][..], &FEW].concat()).ok();
            assert!(files(&given)[shard] == files(&one)[shard]);
        }

        let verify = ["verify", "--json", "--original", word(&model), "--compressed", word(&one)];
        assert_eq!(run(verify.to_vec()).ok().json()["verdict"], "passed");
        for sample in [&[][..], &["--quick", "--sample", "6"]] {
            run([&["reproduce", word(&one), "--model", word(&model)][..], sample].concat()).ok();
        }
        run(["densify", "--quiet", "--model", word(&one), "--out", word(&dense)].to_vec()).ok();
        assert!(document(&dense, "config.json").get("lowrank_config").is_none());
        assert_eq!(
            tensors(&dense)[&format!("{module}.gate_proj.weight")].1,
            tensors(&model)[&format!("{module}.gate_proj.weight")].1
        );

        for (said, line) in [(json!(false), "is false, expected true"), (json!("yes"), "is \"yes\"")] {
            edit_json(&two.join("config.json"), |config| {
                config["lowrank_config"]["compressed_shared_experts"] = said;
            });
            run(["inspect", word(&two)].to_vec()).refused(5, &["compressed_shared_experts", line]);
        }
        edit_json(&two.join("config.json"), |config| {
            config["lowrank_config"].as_object_mut().unwrap().remove("compressed_shared_experts");
        });
        run(["inspect", word(&two)].to_vec()).refused(4, &["format_version", "is 4"]);
    }
}

#[test]
fn they_are_kept_by_default_and_refused_where_they_cannot_be_compressed() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    let (qwen, job) = (model("qwen2-moe"), ["--budget", "10%", "--calibrate", "none"]);
    compress(&qwen, &out, &job).ok();
    assert_eq!(document(&out, "lowrank_report.json")["recipe"]["shared-experts"], "keep");
    let (before, after) = (tensors(&qwen), tensors(&out));
    let name = "model.layers.0.mlp.shared_expert.up_proj.weight";
    assert_eq!(before[name], after[name]);
    for (more, line) in [
        (["--structures", "width"], "keep with structures width"),
        (["--rank-groups", "layer"], "rank-groups layer"),
    ] {
        let job = [&["--budget", "10%"][..], &COMPRESS, &more].concat();
        compress(&qwen, &folder.path().join("none"), &job).refused(2, &["shared-experts is compress", line]);
    }
    compress(&tiny_mixtral(), &folder.path().join("none"), &[&job[..], &COMPRESS].concat())
        .refused(2, &["Mixtral has no shared experts"]);
}
