//! plan.json, rank maps and config files: other ways to describe a job.

use crate::support::{brief, compress, files, run, tiny_mixtral};
use std::path::Path;
use tempfile::tempdir;

fn plan(out: &Path, words: &[&str]) -> crate::support::Outcome {
    let model = tiny_mixtral();
    let start =
        ["plan".as_ref(), "--model".as_ref(), model.as_os_str(), "--plan-out".as_ref(), out.as_os_str()];
    run(start.into_iter().chain(brief(words).into_iter().map(AsRef::as_ref)))
}

#[test]
fn a_stored_plan_reproduces_the_bytes_of_its_budget() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("plan.json");
    let printed = plan(&file, &["--budget", "20%"]).ok();
    assert!(printed.stdout.contains("duality gap"), "{printed:?}");
    let (direct, planned) = (folder.path().join("direct"), folder.path().join("planned"));
    compress(&tiny_mixtral(), &direct, &["--budget", "20%", "--quiet"]).ok();
    compress(&tiny_mixtral(), &planned, &["--plan", file.to_str().unwrap(), "--quiet"]).ok();
    assert!(files(&direct) == files(&planned));
}

#[test]
fn dry_run_is_plan_and_leaves_nothing_at_out() {
    let folder = tempdir().unwrap();
    let (file, out) = (folder.path().join("plan.json"), folder.path().join("out"));
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--dry-run", "--plan-out", file.to_str().unwrap()])
        .ok();
    assert!(!out.exists() && file.exists());
    // The checkpoint's place is not the plan's.
    let (model, elsewhere) = (tiny_mixtral(), folder.path().join("elsewhere.json"));
    let words =
        ["plan", "--budget", "20%", "--model", model.to_str().unwrap(), "--out", elsewhere.to_str().unwrap()];
    run(words.to_vec()).refused(2, &["`plan` writes no checkpoint", "--plan-out FILE"]);
    let again = folder.path().join("again.json");
    plan(&again, &["--budget", "20%"]).ok();
    assert_eq!(std::fs::read(file).unwrap(), std::fs::read(again).unwrap());
}

#[test]
fn a_flat_rank_map_is_obeyed_and_the_rest_stays_dense() {
    let folder = tempdir().unwrap();
    let (map, out) = (folder.path().join("ranks.json"), folder.path().join("out"));
    let name = "model.layers.2.block_sparse_moe.experts.5.w3";
    std::fs::write(&map, format!("{{\"{name}\": 40}}")).unwrap();
    compress(&tiny_mixtral(), &out, &["--ranks", map.to_str().unwrap(), "--quiet"]).ok();
    let config: serde_json::Value = serde_json::from_slice(&files(&out)["config.json"]).unwrap();
    assert_eq!(config["lowrank_config"]["ranks"], serde_json::json!({ name: 40 }));
}

#[test]
fn targets_in_parameters_and_bytes_are_met() {
    let folder = tempdir().unwrap();
    for (flag, value, key, most) in [
        ("--target-params", "5M", "params", 5_000_000_u64),
        ("--target-size", "10MB", "bytes", 10_000_000),
        ("--target-size", "9MiB", "bytes", 9 << 20),
    ] {
        let printed = plan(&folder.path().join("plan.json"), &[flag, value, "--json"]).ok().json();
        let after = printed["after"][key].as_u64().unwrap();
        assert!(after <= most && most - after < 2 * 576, "{flag} {value}: {after}");
    }
}

#[test]
fn kept_matrices_stay_dense_and_ranks_are_multiples() {
    let folder = tempdir().unwrap();
    let words = [
        "--budget",
        "15%",
        "--keep-dense",
        r"layers\.0\.",
        "--keep-dense",
        r"\.w2$",
        "--rank-multiple",
        "8",
        "--json",
    ];
    let printed = plan(&folder.path().join("plan.json"), &words).ok().json();
    for row in printed["matrices"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        if let Some(rank) = row["rank"].as_u64() {
            assert_eq!(rank % 8, 0);
            assert!(!name.contains("layers.0.") && !name.ends_with(".w2"), "{name}");
        }
    }
}

#[test]
fn flags_win_over_the_config_file() {
    let folder = tempdir().unwrap();
    let config = folder.path().join("job.toml");
    std::fs::write(&config, "budget = \"30%\"\nrank-multiple = 4\nsensitivity = \"relative\"\n").unwrap();
    let config = config.to_str().unwrap().to_owned();
    let file = folder.path().join("plan.json");
    let printed = plan(&file, &["--config", &config, "--budget", "10%", "--json"]).ok().json();
    assert_eq!(printed["rank_multiple"], 4);
    assert_eq!(printed["optimality"]["sensitivity"], "relative");
    assert_eq!(printed["target"]["remove_at_least"], 596_903);
}

#[test]
fn the_shipped_configs_are_read() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with("sweep") {
            continue;
        }
        let folder = tempdir().unwrap();
        let words = ["--config", path.to_str().unwrap(), "--budget", "10%", "--rank-multiple", "1"];
        plan(&folder.path().join("plan.json"), &words).ok();
    }
}

#[test]
fn a_budget_of_a_few_parameters_is_noted() {
    let folder = tempdir().unwrap();
    let plan = folder.path().join("plan.json");
    let said = |budget: &str| {
        let model = tiny_mixtral();
        let words = [
            "plan",
            "--calibrate",
            "none",
            "--budget",
            budget,
            "--plan-out",
            plan.to_str().unwrap(),
            "--model",
        ];
        run(words.into_iter().chain([model.to_str().unwrap()])).ok().stderr
    };
    assert!(said("5").contains("less than a millionth; a share is written `20%`"), "{}", said("5"));
    assert!(!said("5%").contains("millionth"));
}
