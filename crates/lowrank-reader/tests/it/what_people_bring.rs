//! What is recognised and is no model that this program reads, and harmless things that stop nothing.

use crate::draft::{Draft, INDEX, Raw, SHARD_1, SHARD_2, W1, assert_refused, random_tensor};
use lowrank_model::config::ConfigError;
use lowrank_model::{Dtype, ErrorKind, Layout};
use lowrank_reader::{Checkpoint, ReadError};
use serde_json::json;
use std::fs;

fn honest() -> Draft {
    Draft::of(Layout::HfPerExpert)
}

/// The model without its weights.
fn bare(layout: Layout) -> Draft {
    let mut draft = Draft::of(layout);
    draft.shards.clear();
    draft.index.clear();
    draft
}

fn some(name: &str) -> Raw {
    Raw::new(name, &random_tensor(1, &[2], Dtype::F32))
}

#[test]
fn weights_of_other_formats_are_named_before_what_is_missing() {
    for (layout, name) in [
        (Layout::HfPerExpert, "pytorch_model.bin"),
        (Layout::HfPerExpert, "pytorch_model-00001-of-00019.bin"),
        (Layout::HfPerExpert, "pytorch_model.bin.index.json"),
        (Layout::HfPerExpert, "model.gguf"),
        (Layout::HfPerExpert, "tf_model.h5"),
        (Layout::HfPerExpert, "mp_rank_00_model_states.pt"),
        (Layout::Consolidated, "consolidated.00.pth"),
    ] {
        let folder = bare(layout).write();
        fs::write(folder.path().join(name), "x").unwrap();
        assert_refused!(in folder.path(), ReadError::OtherFormat { .. }, name, "safetensors");
    }
    // Without a config, too; training state is no weights.
    let mut nothing = bare(Layout::HfPerExpert);
    nothing.texts.clear();
    let folder = nothing.write();
    fs::write(folder.path().join("optimizer.pt"), "x").unwrap();
    assert_refused!(in folder.path(), ReadError::NoConfig { .. }, "config.json");
    fs::write(folder.path().join("mixtral.Q4_K_M.gguf"), "x").unwrap();
    assert_refused!(in folder.path(), ReadError::OtherFormat { .. }, "Q4_K_M.gguf", "llama.cpp");
}

#[test]
fn an_index_that_names_pickles() {
    let mut draft = bare(Layout::HfPerExpert);
    draft.index.push(("lm_head.weight".into(), "pytorch_model-00001-of-00001.bin".into()));
    assert_refused!(
        draft,
        ReadError::OtherFormat { .. },
        "pytorch_model-00001-of-00001.bin",
        "save_pretrained"
    );
}

#[test]
fn what_lies_under_the_name_of_a_shard() {
    for (bytes, word) in [
        (&b"PK\x03\x04\x00\x00\x08\x08\x00\x00"[..], "pickle"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "llama.cpp"),
        (b"<!DOCTYPE html>", "web page"),
        (b"{\"error\":\"Entry not found\"}", "server"),
    ] {
        let folder = honest().write();
        fs::write(folder.path().join(SHARD_1), bytes).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(SHARD_1) && text.contains(word), "{text}");
    }
}

#[test]
fn where_the_weights_and_the_config_lie_instead() {
    let folder = bare(Layout::HfPerExpert).write();
    fs::write(folder.path().join("mixtral.safetensors"), "x").unwrap();
    assert_refused!(in folder.path(), ReadError::NoWeights { .. }, "`mixtral.safetensors`", "rename");

    let folder = tempfile::tempdir().unwrap();
    for inner in ["checkpoint-500", "checkpoint-1500"] {
        fs::create_dir(folder.path().join(inner)).unwrap();
        honest().write_to(&folder.path().join(inner));
    }
    assert_refused!(in folder.path(), ReadError::NoConfig { .. }, "`checkpoint-1500`");
    fs::write(folder.path().join("config.json"), &honest().texts["config.json"]).unwrap();
    assert_refused!(in folder.path(), ReadError::NoWeights { .. }, "`checkpoint-1500`");
    fs::remove_file(folder.path().join("config.json")).unwrap();
    fs::write(folder.path().join("model.safetensors"), "x").unwrap();
    assert_refused!(in folder.path(), ReadError::NoConfig { .. }, "there are weights");
}

#[test]
fn every_absent_shard_is_named_or_counted() {
    let mut draft = honest();
    for number in 3..6 {
        draft.index.push((format!("x{number}"), format!("model-{number:05}-of-00005.safetensors")));
    }
    draft.shards.remove(SHARD_2);
    assert_refused!(
        draft,
        ReadError::MissingShard { .. },
        SHARD_2,
        "3 others",
        "model-00005-of-00005.safetensors"
    );
}

#[test]
fn a_download_that_is_not_finished() {
    for ending in [".aria2", ".incomplete", ".part"] {
        let folder = honest().write();
        fs::write(folder.path().join(format!("{SHARD_2}{ending}")), "").unwrap();
        assert_refused!(in folder.path(), ReadError::Unfinished { .. }, SHARD_2, ending);
    }
}

#[test]
fn heads_and_adapters_that_no_language_model_has() {
    for (name, word) in [
        ("v_head.summary.weight", "value or reward head"),
        ("score.weight", "value or reward head"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "merge"),
        ("mtp.fc.weight", "further tokens"),
        ("vision_tower.patch_embed.weight", "images"),
    ] {
        let mut draft = honest();
        draft.add(SHARD_1, some(name));
        assert_refused!(draft, ReadError::OtherTensor { .. }, SHARD_1, name, word);
        // In place of the language model's own head.
        draft.remove("lm_head.weight");
        assert_refused!(draft, ReadError::OtherTensor { .. }, SHARD_1, name, word);
    }
}

#[test]
fn names_of_a_model_that_was_saved_inside_another() {
    for (before, word) in [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("base_model.model.", "peft"),
        ("model.", "`model.`"),
        ("language_model.", "`language_model.`"),
    ] {
        let mut draft = honest();
        for raw in draft.shards.values_mut().flatten() {
            raw.name = format!("{before}{}", raw.name);
        }
        for (tensor, _) in &mut draft.index {
            *tensor = format!("{before}{tensor}");
        }
        assert_refused!(draft, ReadError::OtherTensor { .. }, before, word, "save_pretrained");
    }
    let mut body = honest();
    body.remove("lm_head.weight");
    body.index.clear();
    for raw in body.shards.values_mut().flatten() {
        raw.name = raw.name.replacen("model.", "", 1);
    }
    let all = std::mem::take(&mut body.shards).into_values().flatten().collect();
    body.shards.insert("model.safetensors".into(), all);
    assert_refused!(body, ReadError::OtherTensor { .. }, "embed_tokens.weight", "without its head");
}

#[test]
fn a_description_of_the_other_spelling() {
    let mut draft = Draft::of(Layout::Consolidated);
    draft.texts = honest().texts;
    let all = std::mem::take(&mut draft.shards).into_values().flatten().collect();
    draft.shards.insert("model.safetensors".into(), all);
    draft.index.clear();
    assert_refused!(draft, ReadError::OtherTensor { .. }, "tok_embeddings.weight", "params.json");
}

#[test]
fn buffers_are_ignored_wherever_index_and_shards_put_them() {
    let buffers = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.masked_bias",
        "model.position_ids",
    ];
    for (in_index, in_shard) in [(true, true), (true, false), (false, true)] {
        let mut draft = honest();
        for name in buffers {
            draft.add(SHARD_2, some(name));
            if !in_shard {
                draft.shards.get_mut(SHARD_2).unwrap().pop();
            }
            if !in_index {
                draft.index.pop();
            }
        }
        let folder = draft.write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let mut ignored: Vec<&str> = checkpoint.ignored().iter().map(|it| it.tensor.as_str()).collect();
        ignored.sort_unstable();
        let mut expected = buffers.to_vec();
        expected.sort_unstable();
        assert_eq!(ignored, expected);
        let counted: u64 = checkpoint.specs().iter().map(|spec| spec.elements()).sum();
        assert_eq!(checkpoint.size().params, counted);
    }
    // In another shard than the index says.
    let mut draft = honest();
    draft.add(SHARD_2, some(buffers[0]));
    draft.index.last_mut().unwrap().1 = SHARD_1.into();
    Checkpoint::open(draft.write().path()).unwrap();
    // Of a weight, index and shards must agree.
    for (name, stale) in [(format!("{W1}.weight"), false), ("mtp.fc.weight".into(), true)] {
        let mut draft = honest();
        draft.index.retain(|(tensor, _)| *tensor != name);
        if stale {
            draft.index.push((name, SHARD_2.into()));
        }
        assert_eq!(Checkpoint::open(draft.write().path()).unwrap_err().kind(), ErrorKind::BrokenCheckpoint);
    }
}

#[test]
fn an_index_that_names_no_shard() {
    for text in ["{}", r#"{"metadata": {}}"#, r#"{"weight_map": null}"#, r#"{"weight_map": {}}"#] {
        let folder = honest().write();
        fs::write(folder.path().join(INDEX), text).unwrap();
        assert_refused!(in folder.path(), ReadError::EmptyIndex { .. }, INDEX, "weight_map");
    }
}

#[test]
fn an_index_as_windows_and_others_write_it() {
    let folder = honest().write();
    let path = folder.path().join(INDEX);
    let index: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let text = serde_json::to_string_pretty(&json!({"weight_map": index["weight_map"]})).unwrap();
    fs::write(&path, text.replace('\n', "\r\n")).unwrap();
    Checkpoint::open(folder.path()).unwrap();
    fs::write(&path, json!({"metadata": null, "weight_map": index["weight_map"]}).to_string()).unwrap();
    Checkpoint::open(folder.path()).unwrap();
}

#[test]
fn other_models_are_named_by_their_class() {
    for (model_type, class) in [
        (json!("mistral"), "MistralForCausalLM"),
        (json!("minimax_m2"), "MiniMaxM2ForCausalLM"),
        (json!("mixtral"), "MixtralForSequenceClassification"),
        (json!("mixtral"), "MixtralModel"),
    ] {
        let mut draft = honest();
        draft.edit_config(|config| {
            config["model_type"] = model_type;
            config["architectures"] = json!([class]);
        });
        let folder = draft.write();
        let error = Checkpoint::open(folder.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{class}");
        assert_refused!(in folder.path(), ReadError::Config { .. }, "config.json", class);
    }
}

#[test]
fn a_key_that_nobody_read_about_is_named() {
    let mut draft = honest();
    draft.edit_config(|config| config["router_scale"] = json!(2.0));
    assert_refused!(
        draft,
        ReadError::Config { source: ConfigError::UnknownKeys(_), .. },
        "config.json",
        "`router_scale`"
    );
}
