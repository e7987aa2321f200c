//! Widening and rounding of stored weights: `cargo bench -p lowrank-model`.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use lowrank_model::{Dtype, Tensor};

fn main() {
    divan::main();
}

/// A block of 1024 rows of 4096.
const ELEMENTS: usize = 1024 * 4096;

fn values() -> Vec<f32> {
    (0..ELEMENTS).map(|i| (i % 1013) as f32 / 1013.0 - 0.5).collect()
}

#[divan::bench(args = [Dtype::F32, Dtype::F16, Dtype::Bf16])]
fn widen(bencher: Bencher<'_, '_>, dtype: Dtype) {
    let tensor = Tensor::from_f32(vec![ELEMENTS], dtype, &values()).expect("as many as there are");
    let mut out = vec![0.0; ELEMENTS];
    let bytes = BytesCount::new(ELEMENTS as u64 * dtype.size_bytes());
    bencher.counter(bytes).bench_local(|| tensor.widen(0, black_box(&mut out)));
}

#[divan::bench(args = [Dtype::F32, Dtype::F16, Dtype::Bf16])]
fn round(bencher: Bencher<'_, '_>, dtype: Dtype) {
    let values = values();
    let bytes = BytesCount::new(ELEMENTS * 4);
    bencher.counter(bytes).bench_local(|| Tensor::from_f32(vec![ELEMENTS], dtype, black_box(&values)));
}

#[divan::bench]
fn look_for_what_is_not_finite(bencher: Bencher<'_, '_>) {
    let tensor = Tensor::from_f32(vec![ELEMENTS], Dtype::Bf16, &values()).expect("as many as there are");
    bencher.counter(BytesCount::new(ELEMENTS * 2)).bench_local(|| black_box(&tensor).first_non_finite());
}
