//! Hashing and writing of tensors: `cargo bench -p lowrank-writer`. Written into the system's folder for temporary files.

use divan::Bencher;
use divan::counter::BytesCount;
use lowrank_model::{Dtype, Tensor};
use lowrank_writer::{CheckpointWriter, Content, OutputTensor, ShardLayout};

fn main() {
    divan::main();
}

/// A factor of 1024 × 4096 in bf16.
const ELEMENTS: usize = 1024 * 4096;

fn tensor() -> Tensor {
    let bytes = (0..ELEMENTS * 2).map(|i| (i * 7 % 251) as u8).collect();
    Tensor::new(vec![ELEMENTS], Dtype::Bf16, bytes).expect("two bytes for each element")
}

#[divan::bench]
fn blake3(bencher: Bencher<'_, '_>) {
    let tensor = tensor();
    bencher.counter(BytesCount::of_slice(tensor.bytes())).bench_local(|| blake3::hash(tensor.bytes()));
}

/// Into the page cache: hashed for the journal, and written to its place.
#[divan::bench(sample_count = 20)]
fn write_unit(bencher: Bencher<'_, '_>) {
    let tensor = tensor();
    let folder = std::env::temp_dir().join(format!("lowrank-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    let planned = OutputTensor { name: "t".into(), dtype: Dtype::Bf16.into(), shape: vec![ELEMENTS] };
    bencher
        .counter(BytesCount::of_slice(tensor.bytes()))
        .with_inputs(|| {
            let layout = ShardLayout::new(vec![planned.clone()], 1 << 30).expect("one tensor has a place");
            CheckpointWriter::create(&folder.join("out"), layout).expect("the folder is empty")
        })
        .bench_local_refs(|writer| {
            writer
                .write_unit("t", &[("t", Content::Weights(&tensor))], String::new())
                .expect("there is room");
        });
    let _ = std::fs::remove_dir_all(&folder);
}
