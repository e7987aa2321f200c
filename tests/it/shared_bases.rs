//! Layers whose experts share a base, on an upcycled model.

use crate::support::{compress, data_range, document, files, run, tensors, word};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::tempdir;

const FEW: [&str; 4] = ["--calibration-tokens", "2048", "--sensitivity-tokens", "512"];

fn upcycled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/upcycled-alike")
}

#[test]
fn alike_experts_share_a_base_whatever_the_workers_and_every_lie_about_it_is_named() {
    let (model, folder) = (upcycled(), tempdir().unwrap());
    let at = |name: &str| folder.path().join(name);
    let (one, two, plan, planned, dense) =
        (at("one"), at("two"), at("plan.json"), at("planned"), at("dense"));
    let job = [&["--budget", "45%", "--storage", "uv"][..], &FEW].concat();
    compress(&model, &one, &[&job[..], &["--workers", "1"]].concat()).ok();
    compress(&model, &two, &[&job[..], &["--workers", "2", "--cache", "none"]].concat()).ok();
    assert_eq!(files(&one), files(&two));
    let said = run([&["plan", "--model", word(&model), "--plan-out", word(&plan)], &job[..]].concat()).ok();
    assert!(said.stdout.contains(" shared "), "{}", said.stdout);
    compress(&model, &planned, &[&["--plan", word(&plan)][..], &FEW].concat()).ok();
    let shard = "model-00001-of-00001.safetensors";
    assert_eq!(files(&planned)[shard], files(&one)[shard]);

    // The default chooses it here, and says so everywhere.
    let lowrank = &document(&one, "config.json")["lowrank_config"];
    assert_eq!(lowrank["format_version"], 3);
    let layers = lowrank["shared_base_layers"].as_array().unwrap();
    assert!(layers.len() > 2, "{layers:?}");
    let experts = format!("model.layers.{}.block_sparse_moe.experts", layers[0]);
    let report = document(&one, "lowrank_report.json");
    assert_eq!(&report["shared_base_layers"], &lowrank["shared_base_layers"]);
    assert_eq!(report["recipe"]["structures"], "rank,width,base");
    let card = String::from_utf8(files(&one)["README.md"].clone()).unwrap();
    assert!(card.contains("the experts share a base B"), "{card}");
    let inspected = run(["inspect", word(&one)].to_vec()).ok();
    assert!(inspected.stdout.contains("layers share a base"), "{}", inspected.stdout);

    let verify =
        ["verify", "--json", "--static-only", "--original", word(&model), "--compressed", word(&one)];
    assert_eq!(run(verify.to_vec()).ok().json()["verdict"], "passed");
    for sample in [&[][..], &["--quick", "--sample", "6"]] {
        run([&["reproduce", word(&one), "--model", word(&model)][..], sample].concat()).ok();
    }

    // Multiplied back, a matrix is the base plus its factors, within a rounding.
    run(["densify", "--quiet", "--model", word(&one), "--out", word(&dense)].to_vec()).ok();
    let config = document(&dense, "config.json");
    assert!(config.get("lowrank_config").is_none() && config["model_type"] == "mixtral", "{config}");
    assert!(!tensors(&dense).keys().any(|name| name.contains("shared_base")));
    let (factored, dense) = (tensors(&one), tensors(&dense));
    let of = |all: &BTreeMap<String, (_, Vec<usize>, Vec<u8>)>, name: &str| -> (Vec<usize>, Vec<f32>) {
        let (_, shape, bytes) = &all[&format!("{experts}.{name}.weight")];
        let wide = |raw: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
        (shape.clone(), bytes.as_chunks().0.iter().map(wide).collect())
    };
    let is_gate = |name: &&String| name.starts_with(&experts) && name.ends_with(".w1");
    let gate = lowrank["ranks"].as_object().unwrap().keys().find(is_gate).unwrap();
    let gate = gate.strip_prefix(&format!("{experts}.")).unwrap();
    let ((_, base), (_, found)) = (of(&factored, "shared_base.w1"), of(&dense, gate));
    let ((shape, u), (_, v)) = (of(&factored, &format!("{gate}.u")), of(&factored, &format!("{gate}.v")));
    let (rank, columns) = (shape[1], v.len() / shape[1]);
    let largest = base.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    for (at, (found, base)) in found.iter().zip(&base).enumerate() {
        let (row, column) = (at / columns, at % columns);
        let own: f32 = (0..rank).map(|k| u[row * rank + k] * v[k * columns + column]).sum();
        assert!((found - base - own).abs() <= largest / 128.0, "{at}: {found} {base} {own}");
    }
    assert!(found.iter().zip(&base).any(|(found, base)| (found - base).abs() > largest / 32.0));

    // Another base than the mean, another list in the report, another list in the config.
    let finds = |what: &str| {
        let found = run(verify.to_vec());
        assert_eq!(found.code, 11, "{what}: {}", found.stderr);
        assert!(found.stdout.contains(what), "{what}: {}", found.stdout);
    };
    let whole = files(&one);
    let restore = |name: &str| std::fs::write(one.join(name), &whole[name]).unwrap();
    let mut bytes = whole[shard].clone();
    let at = data_range(&bytes, &format!("{experts}.shared_base.w2.weight")).start;
    bytes.copy_within(at + 2..at + 4, at);
    std::fs::write(one.join(shard), &bytes).unwrap();
    finds("shared-base-differs");
    restore(shard);
    let mut lied = report.clone();
    lied["shared_base_layers"] = json!([0]);
    std::fs::write(one.join("lowrank_report.json"), lied.to_string()).unwrap();
    finds("shared-base-differs");
    restore("lowrank_report.json");
    for (list, part) in [(json!([9]), "9"), (json!([1, 0]), "0"), (json!([]), "[]"), (json!("x"), "x")] {
        let mut config = document(&one, "config.json");
        config["lowrank_config"]["shared_base_layers"] = list;
        std::fs::write(one.join("config.json"), config.to_string()).unwrap();
        let refused = run(["inspect", word(&one)].to_vec());
        let line = &refused.stderr;
        assert!(line.contains("`lowrank_config.shared_base_layers`: found") && line.contains(part), "{line}");
    }
    let mut config = document(&planned, "config.json");
    config["lowrank_config"]["format_version"] = json!(2);
    std::fs::write(one.join("config.json"), config.to_string()).unwrap();
    run(["inspect", word(&one)].to_vec()).refused(4, &["format_version", "reads 3"]);
}

#[test]
fn bases_are_refused_where_experts_must_be_equal_or_nothing_is_measured() {
    let (model, folder) = (upcycled(), tempdir().unwrap());
    let out = folder.path().join("out");
    let job = ["--budget", "20%", "--structures", "rank,base"];
    for more in [["--rank-groups", "layer"], ["--allocation", "uniform"]] {
        let refused = compress(&model, &out, &[&job[..], &more, &FEW].concat());
        refused
            .refused(2, &["shared bases go with choices of their own", "leave `base` out of --structures"]);
    }
    compress(&model, &out, &[&job[..], &["--calibrate", "none"]].concat())
        .refused(2, &["widths and shared bases are measured on"]);
    assert!(!out.exists());
}
