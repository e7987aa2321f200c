//! Models, texts and words as people have them: what lies beside the weights, links, `~`, the wrong file for a flag.

use crate::support::{
    Outcome, compress, copy_of_model, edit_json, files, outcome, poison_all, run, tiny_mixtral, tool,
};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use tempfile::tempdir;

/// A job that looks at no text.
const PLAIN: [&str; 5] = ["--budget", "10 %", "--calibrate", "none", "--quiet"];

fn report(out: &Path) -> Value {
    serde_json::from_slice(&files(out)["lowrank_report.json"]).unwrap()
}

/// Words, of which some are paths.
fn words<'a>(words: &'a [&'a Path]) -> Outcome {
    run(words.iter().map(|word| word.as_os_str()))
}

#[test]
fn a_tokenizer_that_was_saved_for_batches_gives_the_same_calibration() {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    let plan = |name: &str, change: &dyn Fn(&mut Value)| {
        fs::copy(tiny_mixtral().join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
        edit_json(&model.join("tokenizer.json"), |tokenizer| change(tokenizer));
        let out = folder.path().join(name);
        let few =
            ["--calibration-tokens", "2048", "--sensitivity-tokens", "512", "--propagate", "none", "--quiet"];
        compress(&model, &out, &[&["--budget", "10%"], &few[..]].concat()).ok();
        report(&out)["calibration"].clone()
    };
    let plain = plan("plain", &|_| ());
    // Seven windows of the text, and one of the vocabulary.
    assert_eq!(plain["texts"][0]["tokens"], 1792);
    assert_eq!(plain["texts"][1]["tokens"], 256);
    let padding = json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 4096, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let truncation = json!({"direction": "Left", "max_length": 100, "strategy": "OnlyFirst", "stride": 10});
    let both = plan("both", &|tokenizer| {
        tokenizer["padding"] = padding.clone();
        tokenizer["truncation"] = truncation.clone();
    });
    assert_eq!(both, plain);
}

#[test]
fn a_text_shorter_than_asked_is_told() {
    let folder = tempdir().unwrap();
    let text = folder.path().join("Notes.MD");
    fs::write(
        &text,
        "\u{feff}# Whales\n\n".to_owned() + &"They swim, and they are many, and they sing.\n".repeat(60),
    )
    .unwrap();
    let job =
        ["plan", "--budget", "10%", "--sensitivity-tokens", "256", "--propagate", "none", "--cache", "none"];
    let plan = folder.path().join("plan.json");
    let rest = [
        "--calibrate".as_ref(),
        text.as_path(),
        "--model".as_ref(),
        &tiny_mixtral(),
        "--plan-out".as_ref(),
        &plan,
    ];
    let told = words(&[&job.map(Path::new)[..], &rest].concat()).ok();
    assert!(told.stderr.contains("Notes.MD: 1,024 of 57,344 tokens"), "{told:#?}");
    // The vocabulary keeps its share of what there is: one window beside the text's four.
    assert!(
        told.stderr.contains("calibrating on Notes.MD, the shuffled vocabulary: 1280 tokens"),
        "{told:#?}"
    );
}

#[test]
fn what_loaders_read_comes_along_and_nothing_else() {
    let folder = tempdir().unwrap();
    let (model, out) = (copy_of_model(&folder), folder.path().join("out"));
    fs::create_dir(model.join("additional_chat_templates")).unwrap();
    fs::write(model.join("additional_chat_templates/rag.jinja"), "{{ documents }}").unwrap();
    for name in ["train.log", "optimizer.pt", "adapter_config.json", "special_tokens_map.json", "data.jsonl"]
    {
        fs::write(model.join(name), "{}").unwrap();
    }
    symlink("/nowhere", model.join("imatrix.dat")).unwrap();
    let told = compress(&model, &out, &PLAIN[..4]).ok();
    let line = told.stderr.lines().find(|line| line.contains("not carried into the output")).expect("a note");
    for part in [
        "train.log",
        "optimizer.pt (training state)",
        "adapter_config.json (LoRA adapter)",
        "data.jsonl",
        "imatrix.dat",
    ] {
        assert!(line.contains(part), "{line}");
    }
    let names: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        names.contains(&"special_tokens_map.json".into()) && !names.contains(&"train.log".into()),
        "{names:?}"
    );
    assert_eq!(fs::read(out.join("additional_chat_templates/rag.jinja")).unwrap(), b"{{ documents }}");
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("`rag` (`additional_chat_templates/rag.jinja`)"), "{card}");

    let found = words(&["inspect".as_ref(), &model, "--json".as_ref()]).ok().json();
    let left_out = json!([
        {"name": "adapter_config.json", "what": "adapter"},
        {"name": "data.jsonl", "what": "read_by_no_loader"},
        {"name": "imatrix.dat", "what": "read_by_no_loader"},
        {"name": "optimizer.pt", "what": "training_state"},
        {"name": "train.log", "what": "read_by_no_loader"},
    ]);
    assert_eq!(found["left_out"], left_out);

    // What this tool or a person adds to the base later changes no output.
    for name in ["small.report.html", "small.verification.json", "plan.json", "quantised.gguf"] {
        fs::write(model.join(name), "x").unwrap();
    }
    let again = ["reproduce".as_ref(), out.as_path(), "--model".as_ref(), &model, "--quiet".as_ref()];
    words(&again).ok();

    // A template that is gone is a finding.
    fs::remove_file(out.join("additional_chat_templates/rag.jinja")).unwrap();
    let verify = ["verify", "--static-only", "--quiet", "--original"].map(Path::new);
    words(&[&verify[..], &[&model, "--compressed".as_ref(), &out]].concat()).refused(11, &["rag.jinja"]);
}

#[test]
fn adapters_are_recognised() {
    let folder = tempdir().unwrap();
    let (model, out) = (copy_of_model(&folder), folder.path().join("out"));
    fs::write(
        model.join("adapter_config.json"),
        r#"{"peft_type": "LORA", "base_model_name_or_path": "a/b"}"#,
    )
    .unwrap();
    fs::write(model.join("adapter_model.safetensors"), "").unwrap();
    compress(&model, &out, &PLAIN).refused(4, &["LoRA adapter beside", "merge"]);
    words(&["inspect".as_ref(), &model]).ok();
    for gone in ["config.json", "model.safetensors.index.json"] {
        fs::remove_file(model.join(gone)).unwrap();
    }
    words(&["inspect".as_ref(), &model]).refused(4, &["LoRA adapter of `a/b`", "merge"]);
}

#[test]
fn an_output_inside_its_own_base() {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    let before = files(&model);
    compress(&model, &model.join("small"), &PLAIN).refused(8, &["inside the model's folder"]);
    // By another way into the same folder.
    let link = folder.path().join("link");
    symlink(&model, &link).unwrap();
    compress(&model, &link.join("small"), &PLAIN).refused(8, &["inside the model's folder"]);
    let config = folder.path().join("sweep.toml");
    fs::write(&config, "calibrate = \"none\"\n[grid]\nbudget = [\"1%\"]\n").unwrap();
    let sweep = ["sweep".as_ref(), config.as_path(), "--model".as_ref(), &model, "--out".as_ref()];
    words(&[&sweep[..], &[&model.join("points")]].concat()).refused(8, &["inside the model's folder"]);
    let out = folder.path().join("out");
    compress(&model, &out, &PLAIN).ok();
    let densify = ["densify", "--quiet", "--model"].map(Path::new);
    let inside = out.join("dense");
    words(&[&densify[..], &[&out, "--out".as_ref(), &inside]].concat())
        .refused(8, &["inside the model's folder"]);
    assert_eq!(files(&model), before);
}

#[test]
fn a_tilde_in_quotes_and_in_configs_is_the_home_folder() {
    let folder = tempdir().unwrap();
    let (home, here) = (folder.path().join("home"), folder.path().join("here"));
    fs::create_dir_all(&home).unwrap();
    fs::create_dir_all(&here).unwrap();
    symlink(fs::canonicalize(tiny_mixtral()).unwrap(), home.join("tiny")).unwrap();
    fs::write(
        here.join("job.toml"),
        "model = \"~/tiny\"\nplan-out = \"~/plan.json\"\ncalibrate = [\"none\"]\n",
    )
    .unwrap();
    let at_home = |words: &[&str]| {
        let mut tool = tool();
        outcome(tool.args(words).env("HOME", &home).current_dir(&here))
    };
    at_home(&["plan", "--config", "~/../here/job.toml", "--budget", "10%", "--cache=~/cache", "--quiet"])
        .ok();
    assert!(home.join("plan.json").is_file() && home.join("cache").is_dir());
    at_home(&["inspect", "~/tiny", "--quiet"]).ok();
    at_home(&["inspect", "~nobody/tiny"]).refused(2, &["~nobody/tiny", "full path"]);
    let names: Vec<_> = fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["job.toml"], "no folder named ~");
}

#[test]
fn the_wrong_file_for_a_flag() {
    let folder = tempdir().unwrap();
    let (model, out, file) = (tiny_mixtral(), folder.path().join("out"), folder.path().join("file.json"));
    let refused = |flag: &str, parts: &[&str]| {
        compress(&model, &out, &[flag, file.to_str().unwrap()]).refused(2, parts);
    };
    compress(&model, &out, &[&["--dry-run", "--plan-out", file.to_str().unwrap()], &PLAIN[..]].concat()).ok();
    refused("--ranks", &["file.json", "is a plan", "--plan"]);
    let ranks = r#"{"model.layers.0.block_sparse_moe.experts.0.w1": 5}"#;
    fs::write(&file, ranks).unwrap();
    refused("--plan", &["file.json", "is a rank map", "--ranks"]);
    fs::write(&file, "{}").unwrap();
    refused("--ranks", &["names no matrix"]);
    fs::write(&file, format!("\u{feff}{ranks}")).unwrap();
    compress(&model, &out, &["--ranks", file.to_str().unwrap(), "--calibrate", "none", "--quiet"]).ok();
}

#[test]
fn a_verification_that_cannot_mean_what_was_typed() {
    let folder = tempdir().unwrap();
    let (model, out) = (tiny_mixtral(), folder.path().join("out"));
    compress(&model, &out, &PLAIN).ok();
    let verify = |original: &Path, compressed: &Path, rest: &[&str]| {
        let pair = ["verify".as_ref(), "--original".as_ref(), original, "--compressed".as_ref(), compressed];
        let rest: Vec<&Path> = rest.iter().map(Path::new).collect();
        words(&[&pair[..], &rest].concat())
    };
    verify(&out, &model, &["--static-only"]).refused(2, &["the original holds factors", "exchanged"]);
    verify(&model, &model, &["--static-only"]).refused(2, &["nothing in it is factored"]);
    // A threshold that no run measures would always be kept.
    let told = verify(&model, &out, &["--static-only", "--max-kl", "0.1"]);
    assert!(told.code == 2 && told.stderr.contains("--static-only"), "{told:#?}");
    for (flag, value, parts) in [
        ("--max-perplexity-increase", "5", ["5%", "500%"]),
        ("--max-layer-error", "10", ["10%", "1000%"]),
        ("--min-top1", "90", ["90%", "at most 1"]),
    ] {
        let told = verify(&model, &out, &[flag, value]);
        assert!(told.code == 2 && parts.iter().all(|part| told.stderr.contains(part)), "{told:#?}");
    }
}

#[test]
fn a_router_that_cannot_tell_experts_apart_is_told() {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    // All rows are zeros.
    poison_all(&model, "model.layers.2.block_sparse_moe.gate.weight", 0);
    let few = [
        "--calibration-tokens",
        "512",
        "--sensitivity-tokens",
        "256",
        "--propagate",
        "none",
        "--cache",
        "none",
    ];
    let told = compress(&model, &folder.path().join("out"), &[&["--budget", "5%"], &few[..]].concat()).ok();
    let part = "the router of layer 2 cannot tell experts 0, 1, 2, 3, 4, 5, 6, 7 apart";
    assert!(told.stderr.contains(part), "{told:#?}");
}

#[test]
fn a_revision_in_the_cache_is_recorded_and_is_no_part_of_the_name() {
    let folder = tempdir().unwrap();
    let repository = folder.path().join("models--org--tiny");
    let commit = "c".repeat(40);
    fs::create_dir_all(repository.join("snapshots")).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    symlink(fs::canonicalize(tiny_mixtral()).unwrap(), repository.join("snapshots").join(&commit)).unwrap();
    fs::write(repository.join("refs/v0.1"), &commit).unwrap();
    let out = folder.path().join("out");
    let mut tool = tool();
    tool.args(PLAIN)
        .args(["--model", "org/tiny@v0.1", "--out"])
        .arg(&out)
        .env("HUGGINGFACE_HUB_CACHE", folder.path());
    outcome(&mut tool).ok();
    let base = &report(&out)["base_model"];
    assert_eq!((&base["id"], &base["revision"]), (&json!("org/tiny"), &json!(commit)));
}

/// `inspect` of a copy of the bundled model that `change` broke.
fn inspected(change: impl FnOnce(&Path)) -> Outcome {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    change(&model);
    words(&["inspect".as_ref(), &model, "--quiet".as_ref()])
}

#[test]
fn keys_that_change_the_forward_pass_are_refused_by_name_and_never_dropped() {
    let edited = |key: &str, value: Value| {
        inspected(|model| edit_json(&model.join("config.json"), |config| config[key] = value))
    };
    // Beside `rope_parameters`, which the bundled model has.
    edited("rope_scaling", json!({"type": "linear", "factor": 4.0}))
        .refused(4, &["`rope_scaling`", "linear"]);
    edited("rope_theta", json!(1e4)).refused(4, &["`rope_theta`", "10000", "1000000"]);
    edited("attention_bias", json!(true)).refused(4, &["`attention_bias` is true"]);
    edited("is_causal", json!(false)).refused(4, &["`is_causal`"]);
    edited("num_experts", json!(16)).refused(4, &["`num_experts` is 16", "num_local_experts"]);
    edited("residual_scale", json!(0.5)).refused(4, &["config.json", "`residual_scale`"]);
    edited("hidden_act", json!("gelu")).refused(4, &["`hidden_act`", "gelu"]);
    edited("tie_word_embeddings", json!("yes")).refused(5, &["`tie_word_embeddings`"]);
    for (key, value) in [
        ("hidden_act", json!("swish")),
        ("rope_scaling", json!(null)),
        ("attention_bias", json!(false)),
        ("num_experts", json!(8)),
        ("id2label", json!({"0": "LABEL_0", "1": "LABEL_1"})),
        ("repetition_penalty", json!(1.1)),
        ("unsloth_fixed", json!(true)),
        ("nothing_said", json!(null)),
    ] {
        edited(key, value).ok();
    }
}

#[test]
fn defaults_of_transformers_stand_for_keys_that_are_absent() {
    inspected(|model| {
        edit_json(&model.join("config.json"), |config| {
            let keys = config.as_object_mut().unwrap();
            for key in ["num_local_experts", "num_experts_per_tok", "rms_norm_eps", "hidden_act", "head_dim"]
            {
                keys.remove(key);
            }
        });
    })
    .ok();
    // Four layers of weights, and a default of 32.
    let removed = |model: &Path| {
        edit_json(&model.join("config.json"), |config| {
            config.as_object_mut().unwrap().remove("num_hidden_layers");
        });
    };
    inspected(removed).refused(5, &["model.layers.4."]);
}

#[test]
fn what_is_recognised_and_not_supported_is_named() {
    let lone = |name: &'static str| {
        move |model: &Path| {
            for entry in fs::read_dir(model).unwrap() {
                let path = entry.unwrap().path();
                if path.to_string_lossy().contains("safetensors") {
                    fs::remove_file(path).unwrap();
                }
            }
            fs::write(model.join(name), "x").unwrap();
        }
    };
    for (name, word) in
        [("pytorch_model.bin", "pickle"), ("consolidated.00.pth", "pickle"), ("m.gguf", "llama.cpp")]
    {
        inspected(lone(name)).refused(4, &[name, word, "only safetensors"]);
    }
    let edited = |edit: fn(&mut Value)| inspected(|model| edit_json(&model.join("config.json"), edit));
    edited(|config| config["architectures"] = json!(["MixtralForTokenClassification"]))
        .refused(4, &["MixtralForTokenClassification", "MixtralForCausalLM"]);
    edited(|config| {
        config["model_type"] = json!("gpt_oss");
        config["architectures"] = json!(["GptOssForCausalLM"]);
    })
    .refused(4, &["`gpt_oss`", "`GptOssForCausalLM`"]);
    edited(|config| config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_own.Own"}))
        .refused(4, &["auto_map", "modeling_own.Own"]);
}

#[test]
fn what_is_broken_says_where_and_what_to_do() {
    let index = "model.safetensors.index.json";
    let write = |name: &'static str, text: &'static str| {
        inspected(move |model| fs::write(model.join(name), text).unwrap())
    };
    write(index, r#"{"metadata": {}, "weight_map": null}"#).refused(5, &[index, "weight_map", "again"]);
    write("config.json", "\u{feff}{}").refused(5, &["config.json", "byte order mark"]);
    write("config.json", r#"{"model_type": "mixtral", "attention_dropout": NaN}"#)
        .refused(5, &["`attention_dropout` is NaN"]);
    write("model-00003-of-00004.safetensors.aria2", "").refused(5, &["not finished", ".aria2"]);
    inspected(|model| {
        for number in 2..5 {
            fs::remove_file(model.join(format!("model-{number:05}-of-00004.safetensors"))).unwrap();
        }
    })
    .refused(5, &["model-00002-of-00004.safetensors", "2 others", "model-00004-of-00004.safetensors"]);
    inspected(|model| fs::rename(model, model.with_extension("moved")).unwrap()).refused(3, &["model"]);
}

#[test]
fn chats_are_rendered_by_the_models_template_and_counted() {
    let (model, folder) = (tiny_mixtral(), tempdir().unwrap());
    let (chats, out) = (folder.path().join("chats.jsonl"), folder.path().join("out"));
    let answer = "It is the number of singular values above zero. ".repeat(40);
    let turns = serde_json::json!([{"role": "user", "content": "What is a rank?"}, {"role": "assistant", "content": answer}]);
    let rows = |messages: &serde_json::Value| {
        format!("{}\n", serde_json::json!({ "messages": messages })).repeat(12)
    };
    std::fs::write(&chats, rows(&turns)).unwrap();
    let words = ["--budget", "10%", "--calibrate", chats.to_str().unwrap(), "--calibration-tokens", "2048"];
    let said = compress(&model, &out, &words).ok();
    assert!(
        said.stderr.contains("calibrating on chats.jsonl, the shuffled vocabulary: 2048 tokens"),
        "{said:?}"
    );
    // What the template refuses is refused with its row.
    let wrong = serde_json::json!([{"role": "user"}]);
    std::fs::write(&chats, format!("{}{}", rows(&turns), rows(&wrong))).unwrap();
    let out = folder.path().join("again");
    compress(&model, &out, &words).refused(2, &["chats.jsonl", "row 13", "chat template"]);
}
