//! The kernels that a matrix' time goes into, on one thread: `cargo bench -p lowrank-compute`. An item is one operation.

use divan::Bencher;
use divan::counter::ItemsCount;
use lowrank_compute::{Faer, Kernels, Real, Side};
use lowrank_model::{Dtype, Tensor};
use ndarray::Array2;

fn main() {
    divan::main();
}

/// Short sides; long sides are 3.5 times as long, as in an 8x7B model.
const SHORT: [usize; 2] = [512, 1024];

fn long(short: usize) -> usize {
    short * 7 / 2
}

/// Noise, whose Gram matrix has no eigenvalue that deflates away.
fn stored(short: usize) -> Tensor {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..long(short) * short).map(|_| next()).collect();
    Tensor::from_f32(vec![long(short), short], Dtype::Bf16, &values).expect("as many as there are")
}

fn gram_of<T: Real>(short: usize) -> Array2<T>
where
    Faer: Kernels<T>,
{
    let kernels: &dyn Kernels<T> = &Faer;
    kernels.gram(&stored(short), Side::Cols)
}

#[divan::bench(types = [f32, f64], args = SHORT, sample_count = 5)]
fn gram<T: Real>(bencher: Bencher<'_, '_>, short: usize)
where
    Faer: Kernels<T>,
{
    let (w, kernels): (Tensor, &dyn Kernels<T>) = (stored(short), &Faer);
    bencher
        .counter(ItemsCount::new(long(short) * short * short))
        .bench_local(|| kernels.gram(&w, Side::Cols));
}

#[divan::bench(types = [f32, f64], args = SHORT, sample_count = 5)]
fn reduce<T: Real>(bencher: Bencher<'_, '_>, short: usize)
where
    Faer: Kernels<T>,
{
    let kernels: &dyn Kernels<T> = &Faer;
    let count = ItemsCount::new(short * short * short * 4 / 3);
    bencher
        .counter(count)
        .with_inputs(|| gram_of::<T>(short))
        .bench_local_values(|gram| kernels.reduce(gram));
}

#[divan::bench(types = [f32, f64], args = SHORT, sample_count = 5)]
fn eigenvalues_of_reduced<T: Real>(bencher: Bencher<'_, '_>, short: usize)
where
    Faer: Kernels<T>,
{
    let kernels: &dyn Kernels<T> = &Faer;
    let reduced = kernels.reduce(gram_of(short)).expect("noise converges");
    bencher.bench_local(|| kernels.reduced_values(&reduced));
}

#[divan::bench(types = [f32, f64], args = SHORT, sample_count = 5)]
fn eigenvectors_of_reduced<T: Real>(bencher: Bencher<'_, '_>, short: usize)
where
    Faer: Kernels<T>,
{
    let kernels: &dyn Kernels<T> = &Faer;
    let reduced = kernels.reduce(gram_of(short)).expect("noise converges");
    bencher
        .with_inputs(|| reduced.clone())
        .bench_local_values(|reduced| kernels.reduced_vectors(reduced, short * 3 / 5));
}

#[divan::bench(types = [f32, f64], args = SHORT, sample_count = 5)]
fn project<T: Real>(bencher: Bencher<'_, '_>, short: usize)
where
    Faer: Kernels<T>,
{
    let (w, kernels): (Tensor, &dyn Kernels<T>) = (stored(short), &Faer);
    let rank = short * 3 / 5;
    let x = Array2::from_shape_fn((short, rank), |(i, j)| T::of_f32((i * 31 + j) as f32 % 7.0));
    let count = ItemsCount::new(2 * long(short) * short * rank);
    bencher.counter(count).bench_local(|| kernels.project(&w, Side::Cols, x.view()));
}

#[divan::bench(args = SHORT, sample_count = 5)]
fn pivoted_qr(bencher: Bencher<'_, '_>, short: usize) {
    let kernels: &dyn Kernels<f64> = &Faer;
    let rows = short / 4;
    bencher
        .with_inputs(|| gram_of::<f64>(short).slice_move(ndarray::s![short - rows.., ..]))
        .bench_local_values(|a| kernels.qr_pivoted(a));
}
