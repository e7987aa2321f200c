//! The bundled model, opened as a user would.

use lowrank_model::names::Role;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{Dtype, Layout, StoredMatrix};
use lowrank_reader::{Checkpoint, ReadError};
use std::path::{Path, PathBuf};

fn bundled() -> Checkpoint {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
    Checkpoint::open(&dir).unwrap()
}

#[test]
fn its_size_is_that_of_its_readme() {
    let checkpoint = bundled();
    assert_eq!(checkpoint.layout(), Layout::HfPerExpert);
    assert_eq!((checkpoint.size().params, checkpoint.size().bytes), (5_969_024, 11_938_048));
    let is_expert = |spec: &&TensorSpec| matches!(spec.role, Role::Expert(_));
    let experts: u64 = checkpoint.specs().iter().filter(is_expert).map(TensorSpec::elements).sum();
    assert_eq!(experts, 5_505_024);
    assert_eq!(checkpoint.shards().len(), 4);
    assert!(checkpoint.ignored().is_empty());
}

#[test]
fn every_tensor_reads_finite_and_in_its_shape() {
    let checkpoint = bundled();
    for spec in checkpoint.specs() {
        let tensor = checkpoint.read_tensor(spec).unwrap();
        assert_eq!((tensor.shape(), tensor.dtype()), (&spec.shape[..], Dtype::Bf16), "{}", spec.name);
        checkpoint.check_finite(&spec.name, &tensor).unwrap();
        if let Role::Expert(id) = spec.role {
            assert_eq!(checkpoint.read_matrix(id).unwrap(), StoredMatrix::Dense(tensor));
            assert_eq!(checkpoint.matrix_dtype(id), Dtype::Bf16);
            assert_eq!(checkpoint.rank(id), None);
        }
    }
}

#[test]
fn its_companions_are_the_tokenizer_and_what_belongs_to_it() {
    let expected =
        ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(bundled().companions(), expected.map(PathBuf::from));
}

#[test]
fn the_hash_of_a_shard_is_that_of_its_bytes() {
    use sha2::{Digest, Sha256};
    let checkpoint = bundled();
    let shard = &checkpoint.shards()[3];
    let mut seen = 0;
    let mut count = |bytes| -> Result<(), ReadError> {
        seen += bytes;
        Ok(())
    };
    let hash = checkpoint.shard_sha256(&shard.name, &mut count).unwrap();
    let whole = Sha256::digest(std::fs::read(checkpoint.dir().join(&shard.name)).unwrap());
    assert_eq!(hash, whole.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    assert_eq!(seen, shard.len_bytes);
}

#[test]
fn any_thread_may_read() {
    let checkpoint = bundled();
    let id = checkpoint.config().matrices().nth(5).unwrap();
    let alone = checkpoint.read_matrix(id).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(checkpoint.read_matrix(id).unwrap(), alone));
        }
    });
}
