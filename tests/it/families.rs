//! Outputs of every family: what verify finds in them.

use crate::support::{compress, edit_json, run, tiny_mixtral, word};
use serde_json::{Value, json};
use tempfile::tempdir;

#[test]
fn a_changed_constant_is_found_in_an_output_of_every_family() {
    let cases: [(&str, &str, Value, &str); 7] = [
        ("qwen3-moe", "norm_topk_prob", json!(false), "router"),
        ("qwen2-moe", "rms_norm_eps", json!(1e-3), "rms_norm_eps"),
        ("olmoe", "clip_qkv", json!(3.0), "clip_qkv"),
        ("glm4-moe", "routed_scaling_factor", json!(1.0), "router"),
        ("deepseek-v3", "topk_group", json!(3), "router"),
        ("deepseek-v2", "topk_method", json!("greedy"), "router"),
        ("phimoe", "router_jitter_noise", json!(0.3), "router"),
    ];
    let folder = tempdir().unwrap();
    for (family, key, value, constant) in cases {
        let model = tiny_mixtral().with_file_name("golden").join(family);
        let out = folder.path().join(family);
        compress(&model, &out, &["--calibrate", "none", "--budget", "20%", "--quiet"]).ok();
        let words =
            ["verify", "--static-only", "--quiet", "--original", word(&model), "--compressed", word(&out)];
        run(words).ok();
        edit_json(&out.join("config.json"), |config| config[key] = value);
        run(words).refused(11, &["config differs", constant]);
    }
}
