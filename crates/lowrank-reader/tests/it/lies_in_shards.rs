//! Missing, surplus and contradicting shards and tensors.

use crate::draft::{Draft, INDEX, Raw, SHARD_1, SHARD_2, W1, assert_refused, random_tensor, ranks};
use lowrank_model::{Dtype, Layout, MatrixId, StoredMatrix, Tensor};
use lowrank_reader::{Checkpoint, ReadError};
use serde_json::json;
use std::fs;

const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";

fn honest() -> Draft {
    Draft::of(Layout::HfPerExpert)
}

#[test]
fn a_folder_without_weights() {
    for (layout, expected) in
        [(Layout::HfPerExpert, "model.safetensors"), (Layout::Consolidated, "consolidated.safetensors")]
    {
        let mut draft = Draft::of(layout);
        draft.shards.clear();
        draft.index.clear();
        assert_refused!(draft, ReadError::NoWeights { .. }, expected);
    }
}

#[test]
fn a_missing_shard() {
    let mut draft = honest();
    draft.shards.remove(SHARD_2);
    assert_refused!(draft, ReadError::MissingShard { .. }, SHARD_2, INDEX);
}

#[test]
fn numbered_shards_without_their_index() {
    let mut draft = honest();
    draft.index.clear();
    assert_refused!(draft, ReadError::MissingShard { .. }, INDEX);
}

#[test]
fn a_shard_that_the_index_does_not_name() {
    for name in ["model-00003-of-00002.safetensors", "model-00001-of-00007.safetensors", "model.safetensors"]
    {
        let mut draft = honest();
        draft.shards.insert(name.into(), Vec::new());
        assert_refused!(draft, ReadError::ExtraShard { .. }, name, INDEX);
    }
}

#[test]
fn a_gap_in_the_numbers_of_consolidated_shards() {
    let mut draft = Draft::of(Layout::Consolidated);
    draft.index.clear();
    draft.shards.remove("consolidated-00001-of-00002.safetensors");
    assert_refused!(
        draft,
        ReadError::MissingShard { .. },
        "consolidated-00001-of-00002.safetensors",
        "there are 2"
    );
}

#[test]
fn consolidated_shards_of_two_exports() {
    for extra in [
        "consolidated-00001-of-00003.safetensors",
        "consolidated-00003-of-00002.safetensors",
        "consolidated-00000-of-00002.safetensors",
        "consolidated.safetensors",
    ] {
        let mut draft = Draft::of(Layout::Consolidated);
        draft.index.clear();
        draft.shards.insert(extra.into(), Vec::new());
        assert_refused!(draft, ReadError::ExtraShard { .. }, "consolidated");
    }
}

#[test]
fn a_truncated_shard() {
    let folder = honest().write();
    let path = folder.path().join(SHARD_2);
    let len = fs::metadata(&path).unwrap().len();
    fs::File::options().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    assert_refused!(in folder.path(), ReadError::TruncatedShard { .. }, SHARD_2, "model.norm.weight");
}

#[test]
fn a_shard_that_ends_inside_its_header() {
    for len in [0, 7, 8, 100] {
        let folder = honest().write();
        fs::File::options().write(true).open(folder.path().join(SHARD_2)).unwrap().set_len(len).unwrap();
        assert_refused!(in folder.path(), ReadError::TruncatedHeader { .. }, SHARD_2);
    }
}

#[test]
fn a_shard_that_goes_on_after_its_last_tensor() {
    let folder = honest().write();
    let mut bytes = fs::read(folder.path().join(SHARD_2)).unwrap();
    bytes.push(0);
    fs::write(folder.path().join(SHARD_2), bytes).unwrap();
    assert_refused!(in folder.path(), ReadError::TrailingBytes { bytes: 1, .. }, SHARD_2, "model.norm.weight");
}

#[test]
fn a_git_lfs_pointer_in_place_of_a_shard() {
    let folder = honest().write();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4892809584\n";
    fs::write(folder.path().join(SHARD_1), pointer).unwrap();
    assert_refused!(in folder.path(), ReadError::LfsPointer { .. }, SHARD_1, "git lfs pull");
}

#[test]
fn an_index_that_is_no_index() {
    let folder = honest().write();
    fs::write(folder.path().join(INDEX), "{\"weight_map\": 3}").unwrap();
    assert_refused!(in folder.path(), ReadError::NoIndex { .. }, INDEX);
    fs::write(folder.path().join(INDEX), " ".repeat(33 << 20)).unwrap();
    assert_refused!(in folder.path(), ReadError::FileTooLarge { .. }, INDEX);
}

#[test]
fn an_index_that_names_paths() {
    for shard in ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."] {
        let mut draft = honest();
        draft.index[3].1 = shard.into();
        let tensor = draft.index[3].0.clone();
        assert_refused!(draft, ReadError::UnsafeShardName { .. }, INDEX, tensor, shard);
    }
}

#[test]
fn an_index_that_names_a_tensor_twice() {
    let mut draft = honest();
    draft.index.push((GATE.into(), SHARD_1.into()));
    assert_refused!(draft, ReadError::IndexNamesTwice { .. }, INDEX, GATE);
}

#[test]
fn an_index_naming_an_absent_tensor() {
    let mut draft = honest();
    draft.remove(GATE);
    draft.index.push((GATE.into(), SHARD_2.into()));
    assert_refused!(draft, ReadError::IndexedTensorAbsent { .. }, SHARD_2, GATE);
}

#[test]
fn a_tensor_in_another_shard_than_the_index_says() {
    let mut draft = honest();
    let raw = draft.remove(GATE);
    draft.shards.get_mut(SHARD_1).unwrap().push(raw);
    draft.index.push((GATE.into(), SHARD_2.into()));
    assert_refused!(draft, ReadError::TensorInOtherShard { .. }, SHARD_2, GATE, SHARD_1);
}

#[test]
fn a_tensor_that_the_index_does_not_name() {
    let mut draft = honest();
    draft.index.retain(|(tensor, _)| tensor != GATE);
    assert_refused!(draft, ReadError::TensorNotIndexed { .. }, SHARD_2, GATE);
}

#[test]
fn a_tensor_in_two_shards() {
    let mut draft = honest();
    let raw = draft.tensor(GATE).clone();
    draft.shards.get_mut(SHARD_1).unwrap().push(raw);
    assert_refused!(draft, ReadError::DuplicateInShards { .. }, SHARD_1, SHARD_2, GATE);
}

#[test]
fn a_missing_tensor_in_every_layout() {
    for (layout, name) in [
        (Layout::HfPerExpert, GATE),
        (Layout::HfFused, "model.layers.1.mlp.experts.down_proj"),
        (Layout::Consolidated, "layers.1.feed_forward.experts.2.w3.weight"),
        (Layout::LowRank, GATE),
        (Layout::Minixtral, GATE),
    ] {
        let mut draft = Draft::of(layout);
        draft.remove(name);
        assert_refused!(draft, ReadError::MissingTensor { .. }, draft.index_file, name);
    }
}

#[test]
fn a_factor_that_is_missing() {
    let (mut draft, ..) = Draft::factored(Layout::LowRank);
    let name = format!("{W1}.v.weight");
    draft.remove(&name);
    assert_refused!(draft, ReadError::MissingTensor { .. }, INDEX, name);
}

#[test]
fn a_rank_without_factors() {
    let mut draft = Draft::of(Layout::LowRank);
    draft.edit_config(|config| ranks(config)[W1] = json!(2));
    assert_refused!(draft, ReadError::MissingTensor { .. }, INDEX, W1, ".u.weight");
}

#[test]
fn factors_without_a_rank() {
    let (mut draft, ..) = Draft::factored(Layout::LowRank);
    draft.edit_config(|config| *ranks(config) = json!({}));
    assert_refused!(draft, ReadError::MissingTensor { .. }, INDEX, format!("{W1}.weight"));
}

#[test]
fn factors_of_another_rank_than_the_config_says() {
    let (mut draft, ..) = Draft::factored(Layout::LowRank);
    draft.edit_config(|config| ranks(config)[W1] = json!(4));
    assert_refused!(draft, ReadError::WrongShape { .. }, SHARD_1, W1, "[12, 3]", "[12, 4]");
}

#[test]
fn factors_of_two_dtypes() {
    let (mut draft, ..) = Draft::factored(Layout::LowRank);
    let name = format!("{W1}.u.weight");
    *draft.tensor(&name) = Raw::new(&name, &random_tensor(1, &[12, 3], Dtype::F32));
    assert_refused!(draft, ReadError::FactorDtypes { .. }, SHARD_1, name, "F32", "BF16");
}

#[test]
fn a_tensor_that_the_model_does_not_have() {
    for name in ["model.layers.2.block_sparse_moe.gate.weight", "model.layers.0.self_attn.q_proj.bias", "x"] {
        let mut draft = honest();
        draft.add(SHARD_2, Raw::new(name, &random_tensor(1, &[2], Dtype::Bf16)));
        assert_refused!(draft, ReadError::ExtraTensor { .. }, SHARD_2, name);
    }
}

#[test]
fn a_wrong_shape() {
    let mut draft = honest();
    draft.tensor(GATE).shape = vec![8, 3];
    assert_refused!(draft, ReadError::WrongShape { .. }, SHARD_2, GATE, "[8, 3]", "[3, 8]");
    let mut draft = Draft::of(Layout::HfFused);
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    draft.tensor(name).shape = vec![3, 8, 24];
    assert_refused!(draft, ReadError::WrongShape { .. }, name, "[3, 8, 24]", "[3, 24, 8]");
}

#[test]
fn a_foreign_dtype() {
    for (dtype, size) in [("F64", 8), ("I32", 4), ("F8_E4M3", 1), ("U8", 1), ("BOOL", 1)] {
        let mut draft = honest();
        let raw = draft.tensor(GATE);
        (raw.dtype, raw.bytes) = (dtype.into(), vec![0; 24 * size]);
        assert_refused!(draft, ReadError::WrongDtype { .. }, SHARD_2, GATE, dtype);
    }
}

#[test]
fn quantised_weights_under_an_innocent_config() {
    // In place of a weight (GPTQ), and beside it (fp8).
    for (name, replaces) in [
        (format!("{W1}.qweight"), true),
        (format!("{W1}.weight_scale_inv"), false),
        (format!("{W1}.scales"), true),
    ] {
        let mut draft = honest();
        if replaces {
            draft.remove(&format!("{W1}.weight"));
        }
        draft.add(SHARD_1, Raw::new(&name, &random_tensor(1, &[2], Dtype::F16)));
        assert_refused!(draft, ReadError::Quantised { .. }, SHARD_1, name);
    }
}

#[test]
fn a_tied_head_that_differs_from_the_embedding() {
    for (layout, key, name) in [
        (Layout::HfPerExpert, "tie_word_embeddings", "lm_head.weight"),
        (Layout::Consolidated, "tied_embeddings", "output.weight"),
    ] {
        let mut draft = Draft::of(layout);
        draft.edit_config(|config| config[key] = json!(true));
        assert_refused!(draft, ReadError::TiedHeadDiffers { .. }, name);
    }
}

#[test]
fn a_nan_or_an_infinity_in_a_weight() {
    let damaged = |value: f32| {
        let mut draft = honest();
        let mut values = vec![0.5; 12 * 8];
        values[37] = value;
        let name = format!("{W1}.weight");
        *draft.tensor(&name) = Raw::new(&name, &Tensor::from_f32(vec![12, 8], Dtype::Bf16, &values).unwrap());
        let folder = draft.write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let StoredMatrix::Dense(tensor) = checkpoint.read_matrix(MatrixId::parse(W1).unwrap()).unwrap()
        else {
            panic!("the matrix is dense");
        };
        checkpoint.check_finite(&name, &tensor)
    };
    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let error = damaged(value).unwrap_err();
        assert!(matches!(error, ReadError::NotFinite { element: 37, .. }), "{error:?}");
        let message = error.to_string();
        for part in [SHARD_1, W1, text, "37"] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
    for innocent in [0.0, -0.0, f32::MIN_POSITIVE / 4.0, 3e38] {
        damaged(innocent).unwrap();
    }
}

#[test]
fn a_nan_in_a_factor_names_the_factor() {
    let (draft, ..) = Draft::factored(Layout::Minixtral);
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let bad = Tensor::from_f32(vec![1], Dtype::F32, &[f32::NAN]).unwrap();
    for (name, shard) in
        [("1.weight", SHARD_1), ("0.weight", SHARD_2), ("u.weight", SHARD_1), ("v.weight", SHARD_2)]
    {
        let message = checkpoint.check_finite(&format!("{W1}.{name}"), &bad).unwrap_err().to_string();
        assert!(message.contains(shard) && message.contains(name), "{message}");
    }
}
