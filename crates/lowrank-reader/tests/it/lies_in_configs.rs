//! config.json, params.json and rank maps that lie.

use crate::draft::{Draft, W1, assert_refused, ranks};
use lowrank_model::Layout;
use lowrank_model::config::ConfigError;
use lowrank_reader::ReadError;
use serde_json::json;

#[test]
fn a_folder_without_a_config() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.texts.clear();
    assert_refused!(draft, ReadError::NoConfig { .. }, "config.json", "params.json");
}

#[test]
fn a_config_that_is_not_json() {
    for text in ["", "{", "not json", "{}{}"] {
        let mut draft = Draft::of(Layout::HfPerExpert);
        draft.texts.insert("config.json".into(), text.into());
        assert_refused!(draft, ReadError::Json { .. }, "config.json");
    }
}

#[test]
fn a_config_that_is_not_an_object() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.texts.insert("config.json".into(), "[1]".into());
    assert_refused!(draft, ReadError::Config { source: ConfigError::NotJson(_), .. }, "config.json");
}

#[test]
fn a_byte_order_mark_that_loaders_refuse() {
    for name in ["config.json", "model.safetensors.index.json"] {
        let folder = Draft::of(Layout::HfPerExpert).write();
        let path = folder.path().join(name);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, format!("\u{feff}{text}")).unwrap();
        assert_refused!(in folder.path(), ReadError::ByteOrderMark { .. }, name, "byte order mark");
    }
}

#[test]
fn a_number_that_only_python_reads() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    let text = draft.texts["config.json"].replacen('{', "{\"router_jitter_noise\": NaN, ", 1);
    draft.texts.insert("config.json".into(), text);
    assert_refused!(draft, ReadError::PythonConstant { .. }, "config.json", "router_jitter_noise", "NaN");
}

#[test]
fn a_config_nested_a_hundred_thousand_deep() {
    for bracket in ["[", "{\"a\":"] {
        let mut draft = Draft::of(Layout::HfPerExpert);
        draft.texts.insert("config.json".into(), bracket.repeat(100_000));
        assert_refused!(draft, ReadError::Json { .. }, "config.json", "recursion limit");
    }
}

#[test]
fn a_config_of_five_megabytes() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.texts.insert("config.json".into(), " ".repeat(5 << 20));
    assert_refused!(draft, ReadError::FileTooLarge { .. }, "config.json");
}

#[test]
fn an_unknown_family() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.edit_config(|config| config["model_type"] = json!("gpt2"));
    assert_refused!(
        draft,
        ReadError::Config { source: ConfigError::UnknownFamily { .. }, .. },
        "config.json",
        "gpt2"
    );
}

#[test]
fn a_family_name_that_would_break_the_line() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.edit_config(|config| config["model_type"] = json!("a\nb\u{1b}[31m"));
    assert_refused!(draft, ReadError::Config { .. }, "a\\nb\\u{1b}[31m");
}

#[test]
fn a_config_that_says_quantised() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.edit_config(|config| config["quantization_config"] = json!({"quant_method": "awq"}));
    assert_refused!(draft, ReadError::Config { source: ConfigError::Quantised(_), .. }, "config.json", "awq");
}

#[test]
fn dimensions_too_large_to_be_true() {
    for (key, value) in [
        ("num_hidden_layers", json!(1 << 23)),
        ("num_local_experts", json!(1 << 23)),
        ("hidden_size", json!(u64::MAX)),
        ("vocab_size", json!(1e300)),
        ("head_dim", json!(1 << 24)),
    ] {
        let mut draft = Draft::of(Layout::HfFused);
        draft.edit_config(|config| {
            config["hidden_size"] = json!(1 << 20);
            config[key] = value;
        });
        assert_refused!(draft, ReadError::Config { source: ConfigError::Bad { .. }, .. }, "config.json");
    }
}

#[test]
fn params_that_describe_no_mixture() {
    let mut draft = Draft::of(Layout::Consolidated);
    draft.edit_config(|params| params["moe"] = json!(null));
    assert_refused!(draft, ReadError::Config { source: ConfigError::NoExperts, .. }, "params.json");
}

#[test]
fn factors_of_another_program() {
    for (format, found) in [(json!("other"), "other"), (json!(null), "null"), (json!(1), "1")] {
        let (mut draft, ..) = Draft::factored(Layout::LowRank);
        draft.edit_config(|config| config["lowrank_config"]["format"] = format);
        assert_refused!(draft, ReadError::ForeignFormat { .. }, "config.json", found);
    }
    let (mut draft, ..) = Draft::factored(Layout::LowRank);
    draft.edit_config(|config| config["lowrank_config"] = json!(null));
    assert_refused!(draft, ReadError::ForeignFormat { .. }, "config.json", "missing");
}

#[test]
fn factors_of_a_later_version() {
    for version in [json!(2), json!("1"), json!(null), json!(1.5)] {
        let (mut draft, ..) = Draft::factored(Layout::LowRank);
        draft.edit_config(|config| config["lowrank_config"]["format_version"] = version);
        assert_refused!(draft, ReadError::FormatVersion { .. }, "config.json", "this program reads 1");
    }
}

#[test]
fn a_rank_map_that_is_no_map() {
    for (layout, key) in [(Layout::LowRank, "lowrank_config.ranks"), (Layout::Minixtral, "ranks")] {
        let (mut draft, ..) = Draft::factored(layout);
        draft.edit_config(|config| *ranks(config) = json!([1, 2]));
        assert_refused!(draft, ReadError::NoRankMap { .. }, "config.json", key);
    }
}

#[test]
fn a_rank_for_a_matrix_that_the_model_does_not_have() {
    for module in [
        "model.layers.2.block_sparse_moe.experts.0.w1",
        "model.layers.0.block_sparse_moe.experts.3.w1",
        "model.layers.0.block_sparse_moe.experts.00.w1",
        "model.layers.0.self_attn.q_proj",
    ] {
        let (mut draft, ..) = Draft::factored(Layout::LowRank);
        draft.edit_config(|config| ranks(config)[module] = json!(1));
        assert_refused!(draft, ReadError::RankOfUnknownMatrix { .. }, "config.json", module);
    }
}

#[test]
fn a_rank_that_cannot_be() {
    for rank in [json!(0), json!(9), json!(-1), json!(1.5), json!("3"), json!(null), json!(u64::MAX)] {
        let (mut draft, ..) = Draft::factored(Layout::LowRank);
        draft.edit_config(|config| ranks(config)[W1] = rank);
        assert_refused!(draft, ReadError::BadRank { .. }, "config.json", W1, "from 1 to 8");
    }
}

#[test]
fn an_unknown_storage() {
    for storage in [json!("unheard-of"), json!(null), json!(1)] {
        let (mut draft, _, _) = Draft::factored(Layout::LowRank);
        draft.edit_config(|config| config["lowrank_config"]["storage"] = storage);
        assert_refused!(draft, ReadError::UnknownStorage { .. }, "config.json", "storage");
    }
}

#[test]
fn a_pivoted_matrix_of_full_rank() {
    let (mut draft, _, _) = Draft::pivoted([1, 4, 7, 0, 2, 3, 5, 6]);
    draft.edit_config(|config| ranks(config)[W1] = json!(8));
    assert_refused!(draft, ReadError::BadRank { .. }, W1, "from 1 to 7");
}

#[test]
fn an_index_of_pivots_that_is_none() {
    for (order, words) in [
        ([1, 4, 8, 0, 2, 3, 5, 6], "beyond"),
        ([1, 4, -1, 0, 2, 3, 5, 6], "beyond"),
        ([1, 4, 4, 0, 2, 3, 5, 6], "twice"),
        ([1, 7, 4, 0, 2, 3, 5, 6], "not above"),
        ([1, 4, 7, 0, 3, 2, 5, 6], "not above"),
    ] {
        let (draft, _, _) = Draft::pivoted(order);
        assert_refused!(draft, ReadError::BadPivots { .. }, &format!("{W1}.order"), words);
    }
    let name = format!("{W1}.order");
    let (mut draft, _, _) = Draft::pivoted([1, 4, 7, 0, 2, 3, 5, 6]);
    draft.tensor(&name).dtype = "F64".into();
    assert_refused!(draft, ReadError::NotAnIndex { .. }, &name, "I64 [8]");
    let (mut draft, _, _) = Draft::pivoted([1, 4, 7, 0, 2, 3, 5, 6]);
    draft.remove(&name);
    assert_refused!(draft, ReadError::MissingTensor { .. }, &name);
}
