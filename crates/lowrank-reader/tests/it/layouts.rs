//! Every layout gives the same canonical bytes.

use crate::draft::{Draft, Raw, SHARD_2, W1, Weights, random_tensor, tiny_config};
use lowrank_model::{
    Dtype, Layout, MatrixId, ModelConfig, PivotOrder, PivotSide, Storage, StoredMatrix, Tensor,
};
use lowrank_reader::Checkpoint;
use proptest::prelude::*;

const DENSE_LAYOUTS: [Layout; 3] = [Layout::HfPerExpert, Layout::HfFused, Layout::Consolidated];

fn assert_reads_back(weights: &Weights, draft: &Draft, layout: Layout) {
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.layout(), layout);
    assert_eq!(checkpoint.config(), &weights.config);
    assert_eq!(checkpoint.specs().len(), weights.tensors.len());
    for spec in checkpoint.specs() {
        let expected = &weights.tensors[&spec.name];
        assert_eq!(&checkpoint.read_tensor(spec).unwrap(), expected, "{layout}: {}", spec.name);
        assert_eq!(checkpoint.dtype(&spec.name), Some(weights.dtype));
    }
    for id in checkpoint.config().matrices() {
        let expected = &weights.tensors[&format!("{}.weight", checkpoint.config().module_name(id))];
        assert_eq!(checkpoint.read_matrix(id).unwrap(), StoredMatrix::Dense(expected.clone()));
    }
    let params: usize = weights.tensors.values().map(Tensor::elements).sum();
    let bytes: usize = weights.tensors.values().map(|tensor| tensor.bytes().len()).sum();
    assert_eq!((checkpoint.size().params, checkpoint.size().bytes), (params as u64, bytes as u64));
}

fn any_config() -> impl Strategy<Value = ModelConfig> {
    (1..5_usize, 1..9_usize, 1..3_usize, 1..4_usize, 1..3_usize, 1..3_usize, 1..4_usize, 1..9_usize).prop_map(
        |(hidden, inner, layers, experts, groups, kv_heads, half_head, vocab)| ModelConfig {
            hidden_size: 2 * hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_local_experts: experts,
            num_experts_per_tok: 1,
            num_attention_heads: groups * kv_heads,
            num_key_value_heads: kv_heads,
            head_dim: 2 * half_head,
            vocab_size: vocab,
            ..tiny_config()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_same_weights_read_back_the_same_from_every_layout(
        config in any_config(),
        seed: u64,
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)],
    ) {
        let weights = Weights::random(config, dtype, seed);
        for layout in DENSE_LAYOUTS {
            assert_reads_back(&weights, &Draft::from_weights(&weights, layout), layout);
        }
    }
}

#[test]
fn a_single_file_needs_no_index() {
    let weights = Weights::random(tiny_config(), Dtype::F16, 3);
    for (layout, name) in [
        (Layout::HfPerExpert, "model.safetensors"),
        (Layout::HfFused, "model.safetensors"),
        (Layout::Consolidated, "consolidated.safetensors"),
    ] {
        let mut draft = Draft::from_weights(&weights, layout);
        let all: Vec<Raw> = draft.shards.values().flatten().cloned().collect();
        draft.shards = [(name.to_owned(), all)].into();
        draft.index.clear();
        assert_reads_back(&weights, &draft, layout);
    }
}

#[test]
fn numbered_consolidated_files_need_no_index() {
    let weights = Weights::random(tiny_config(), Dtype::Bf16, 4);
    let mut draft = Draft::from_weights(&weights, Layout::Consolidated);
    draft.index.clear();
    assert_reads_back(&weights, &draft, Layout::Consolidated);
}

#[test]
fn a_consolidated_checkpoint_gets_a_config() {
    let folder = Draft::of(Layout::Consolidated).write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.config_json()["model_type"], "mixtral");
    assert_eq!(checkpoint.config_json()["dtype"], "bfloat16");
    assert_eq!(&ModelConfig::from_hf_json(checkpoint.config_json()).unwrap(), checkpoint.config());
}

#[test]
fn where_both_copies_lie_hugging_faces_wins() {
    let weights = Weights::random(tiny_config(), Dtype::Bf16, 5);
    let folder = Draft::from_weights(&weights, Layout::HfPerExpert).write();
    Draft::of(Layout::Consolidated).write_to(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.layout(), Layout::HfPerExpert);
    let spec = &checkpoint.specs()[0];
    assert_eq!(checkpoint.read_tensor(spec).unwrap(), weights.tensors[&spec.name]);
}

#[test]
fn factors_are_read_as_u_and_v() {
    for layout in [Layout::LowRank, Layout::Minixtral] {
        let (draft, u, v) = Draft::factored(layout);
        let folder = draft.write();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.layout(), layout);
        let id = MatrixId::parse(W1).unwrap();
        assert_eq!(checkpoint.rank(id), Some(3));
        assert_eq!(checkpoint.ranks().len(), 1);
        assert_eq!(checkpoint.read_matrix(id).unwrap(), StoredMatrix::Factored { u, v });
        assert_eq!(checkpoint.matrix_dtype(id), Dtype::Bf16);
        assert_eq!(checkpoint.dtype(&format!("{W1}.weight")), Some(Dtype::Bf16));
        let spec = checkpoint.specs().iter().find(|spec| spec.name == format!("{W1}.weight")).unwrap();
        let error = checkpoint.read_tensor(spec).unwrap_err();
        assert!(matches!(error, lowrank_reader::ReadError::IsFactored { .. }), "{error}");

        let dense_folder = Draft::of(Layout::HfPerExpert).write();
        let dense = Checkpoint::open(dense_folder.path()).unwrap();
        assert_eq!(checkpoint.size().params, dense.size().params - 12 * 8 + 3 * (12 + 8));
        assert_eq!(checkpoint.size().bytes, 2 * checkpoint.size().params);
    }
}

#[test]
fn pivots_are_read_with_their_order() {
    let (draft, basis, coefficients) = Draft::pivoted([1, 4, 7, 0, 2, 3, 5, 6]);
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.storage(), Storage::Pivoted);
    let order = PivotOrder::of_pivots(&[1, 4, 7], 8);
    let expected = StoredMatrix::Pivoted { side: PivotSide::Inputs, basis, coefficients, order };
    assert_eq!(checkpoint.read_matrix(MatrixId::parse(W1).unwrap()).unwrap(), expected);
    let dense_folder = Draft::of(Layout::HfPerExpert).write();
    let dense = Checkpoint::open(dense_folder.path()).unwrap();
    assert_eq!(checkpoint.size().params, dense.size().params - 12 * 8 + 3 * (12 + 8 - 3));
    // The index is bytes and no parameters.
    assert_eq!(checkpoint.size().bytes, 2 * checkpoint.size().params + 8 * 8);
}

#[test]
fn minixtrals_own_model_type_is_accepted() {
    let (mut draft, ..) = Draft::factored(Layout::Minixtral);
    draft.edit_config(|config| {
        config["model_type"] = "minixtral".into();
        config["architectures"] = serde_json::json!(["MinixtralForCausalLM"]);
        config["auto_map"] = serde_json::json!({"AutoModelForCausalLM": "modeling.MinixtralForCausalLM"});
    });
    let folder = draft.write();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().layout(), Layout::Minixtral);
}

#[test]
fn dtypes_may_differ_between_tensors() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    let router = "model.layers.1.block_sparse_moe.gate.weight";
    *draft.tensor(router) = Raw::new(router, &random_tensor(9, &[3, 8], Dtype::F32));
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.dtype(router), Some(Dtype::F32));
    assert_eq!(checkpoint.size().bytes, 2 * checkpoint.size().params + 2 * 3 * 8);
}

#[test]
fn a_tied_model_has_no_head() {
    let weights = Weights::random(ModelConfig { tie_word_embeddings: true, ..tiny_config() }, Dtype::Bf16, 6);
    assert_reads_back(&weights, &Draft::from_weights(&weights, Layout::HfPerExpert), Layout::HfPerExpert);
}

#[test]
fn a_head_that_copies_its_tied_embedding_is_listed_and_not_counted() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    draft.edit_config(|config| config["tie_word_embeddings"] = true.into());
    let embedding = draft.tensor("model.embed_tokens.weight").bytes.clone();
    draft.tensor("lm_head.weight").bytes = embedding;
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let [ignored] = checkpoint.ignored() else { panic!("{:?}", checkpoint.ignored()) };
    assert_eq!(ignored.tensor, "lm_head.weight");
    let counted: u64 = checkpoint.specs().iter().map(|spec| spec.elements()).sum();
    assert_eq!(checkpoint.size().params, counted);
}

#[test]
fn rotary_buffers_of_old_exports_are_listed_and_not_counted() {
    let mut draft = Draft::of(Layout::HfPerExpert);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    draft.add(SHARD_2, Raw::new(name, &random_tensor(9, &[2], Dtype::F32)));
    let folder = draft.write();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let [ignored] = checkpoint.ignored() else { panic!("{:?}", checkpoint.ignored()) };
    assert_eq!((ignored.tensor.as_str(), ignored.shard.as_str()), (name, SHARD_2));
}
