//! Each operation of a forward pass against a plain reference in f64, where there is a device; and what can be checked
//! without one.

use super::device::FUNCTION_NAMES;
use super::{Buffer, Cuda, DeviceLinear, Lane, Scores, WeightProducts, available, kernels};
use crate::{Backend, Faer, Kernels, Side};
use lowrank_model::{Dtype, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

#[test]
fn every_kernel_of_the_source_is_loaded_and_no_other() {
    let mut written = kernels::names();
    let mut loaded = FUNCTION_NAMES.to_vec();
    written.sort_unstable();
    loaded.sort_unstable();
    assert_eq!(written, loaded);
}

/// A lane of the device, which every test that uses it needs.
fn lane() -> Lane {
    available().unwrap().lane().unwrap()
}

/// Uniform in [-2, 2).
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 22) as f32 - 2.0).collect()
}

fn stored(shape: [usize; 2], dtype: Dtype, seed: u64) -> Tensor {
    Tensor::from_f32(shape.to_vec(), dtype, &random(shape[0] * shape[1], seed)).unwrap()
}

fn host(lane: &Lane, buffer: &Buffer<f32>) -> Vec<f32> {
    lane.download(buffer, 0, buffer.len()).unwrap()
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let difference = (f64::from(actual) - expected).abs();
        assert!(difference <= tolerance * (1.0 + expected.abs()), "{i}: {actual} for {expected}");
    }
}

/// X Wᵀ: [N, n] × [m, n] → [N, m].
fn times(x: &[f64], w: &[f32], n: usize) -> Vec<f64> {
    x.chunks(n)
        .flat_map(|x| w.chunks(n).map(move |w| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum()))
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

const EPSILON: f64 = f32::EPSILON as f64;

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn stored_numbers_are_widened_exactly() {
    let lane = lane();
    // Every bit pattern of the 16-bit formats that is not NaN, subnormal numbers and infinities among them.
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let tensor = Tensor::new(vec![256, 256], dtype, bits).unwrap();
        let on_device = host(&lane, &lane.upload_widened::<f32>(&tensor).unwrap());
        let doubled = lane.upload_widened::<f64>(&tensor).unwrap();
        let doubled = lane.download(&doubled, 0, doubled.len()).unwrap();
        for ((value, double), expected) in on_device.into_iter().zip(doubled).zip(tensor.to_f32()) {
            let equal =
                value.to_bits() == expected.to_bits() && double.to_bits() == f64::from(expected).to_bits();
            assert!(
                equal || (value.is_nan() && double.is_nan() && expected.is_nan()),
                "{value} for {expected}"
            );
        }
    }
    let tensor = stored([3, 5], Dtype::F32, 1);
    assert_eq!(host(&lane, &lane.upload_widened::<f32>(&tensor).unwrap()), tensor.to_f32());
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn copies_in_many_pieces_carry_the_numbers_of_their_time() {
    let lane = lane();
    // Longer than both pinned pieces together, and not a multiple of one.
    for len in [0, 1, 255, 256, 257, 5 * 256 + 3] {
        let first = random(len, 21);
        let mut values = first.clone();
        let uploaded = lane.upload(&values).unwrap();
        // What happens to the source afterwards is of no account, however late the device copies.
        values.fill(f32::NAN);
        let second = random(len, 22);
        let other = lane.upload(&second).unwrap();
        drop(values);
        assert_eq!((host(&lane, &uploaded), host(&lane, &other)), (first.clone(), second));
        if len > 256 {
            assert_eq!(lane.download(&uploaded, 200, 57).unwrap(), first[200..257]);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn linear_maps_equal_plain_sums_dense_factored_and_beside_a_base() {
    let lane = lane();
    let (n, m, r) = (70, 33, 9);
    for tokens in [1, 5, 130] {
        let x = random(tokens * n, 2);
        let on_device = lane.upload(&x).unwrap();
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let (w, u, v) = (stored([m, n], dtype, 3), stored([m, r], dtype, 4), stored([r, n], dtype, 5));
            let products = WeightProducts::F32;
            let dense = DeviceLinear::Dense(lane.matrix(&w, products).unwrap());
            let factored = DeviceLinear::Factored {
                u: lane.matrix(&u, products).unwrap(),
                v: lane.matrix(&v, products).unwrap(),
            };
            assert_eq!((dense.outputs(), dense.inputs()), (m, n));
            assert_eq!((factored.outputs(), factored.inputs()), (m, n));
            let expected = times(&wide(&x), &w.to_f32(), n);
            let tolerance = 16.0 * EPSILON * (n as f64).sqrt();
            assert_close(&host(&lane, &lane.linear(&on_device, &dense).unwrap()), &expected, tolerance);
            let inner = times(&wide(&x), &v.to_f32(), n);
            let expected = times(&inner, &u.to_f32(), r);
            let got = host(&lane, &lane.linear(&on_device, &factored).unwrap());
            assert_close(&got, &expected, 16.0 * tolerance);
            let base = lane.matrix(&w, products).unwrap();
            let beside = DeviceLinear::OfBase { base, difference: Box::new(factored) };
            assert_eq!((beside.outputs(), beside.inputs()), (m, n));
            let of_base = times(&wide(&x), &w.to_f32(), n);
            let expected: Vec<f64> = of_base.iter().zip(&expected).map(|(base, own)| base + own).collect();
            let got = host(&lane, &lane.linear(&on_device, &beside).unwrap());
            assert_close(&got, &expected, 32.0 * tolerance);
        }
        // bf16: equal to the definition on inputs rounded to bf16.
        let w = stored([m, n], Dtype::Bf16, 6);
        let rounded = Tensor::from_f32(vec![tokens, n], Dtype::Bf16, &x).unwrap().to_f32();
        let narrow = DeviceLinear::Dense(lane.matrix(&w, WeightProducts::Bf16).unwrap());
        let got = host(&lane, &lane.linear(&on_device, &narrow).unwrap());
        assert_close(&got, &times(&wide(&rounded), &w.to_f32(), n), 64.0 * EPSILON * (n as f64).sqrt());
    }
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn rms_norm_equals_its_definition() {
    let lane = lane();
    for (rows, width) in [(1, 1), (3, 100), (2, 256), (5, 1000)] {
        let (x, weight) = (random(rows * width, 7), random(width, 8));
        let expected: Vec<f64> = x
            .chunks(width)
            .flat_map(|row| {
                let square: f64 =
                    row.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / width as f64;
                let scale = 1.0 / (square + 1e-5).sqrt();
                row.iter()
                    .zip(&weight)
                    .map(move |(&v, &w)| f64::from(v) * scale * f64::from(w))
                    .collect::<Vec<_>>()
            })
            .collect();
        let out = lane.rms_norm(&lane.upload(&x).unwrap(), &lane.upload(&weight).unwrap(), 1e-5).unwrap();
        assert_close(&host(&lane, &out), &expected, 16.0 * EPSILON);
    }
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn heads_turn_by_the_angle_of_their_position() {
    let lane = lane();
    let (heads, half) = (3, 4);
    let positions = [0, 1, 2, 0, 1, 6];
    let angle = |position: usize, i: usize| position as f64 * 100_f64.powf(-(i as f64) / half as f64);
    let table = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..7 * half).map(|at| f(angle(at / half, at % half)) as f32).collect()
    };
    let x = random(positions.len() * heads * 2 * half, 9);
    let mut expected = wide(&x);
    for (head, values) in expected.chunks_mut(2 * half).enumerate() {
        for i in 0..half {
            let (sin, cos) = angle(positions[head / heads], i).sin_cos();
            let (a, b) = (values[i], values[half + i]);
            (values[i], values[half + i]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
    let mut on_device = lane.upload(&x).unwrap();
    let (cos, sin) = (lane.upload(&table(f64::cos)).unwrap(), lane.upload(&table(f64::sin)).unwrap());
    let positions = lane.positions(&positions).unwrap();
    lane.rope(&mut on_device, (&cos, &sin), &positions, (heads, half)).unwrap();
    assert_close(&host(&lane, &on_device), &expected, 16.0 * EPSILON);
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn attention_of_each_sequence_equals_its_definition() {
    let lane = lane();
    let (heads, kv_heads, d) = (6, 2, 5);
    // The second sequence is longer than a block of queries.
    let lengths = [3, 1100, 1];
    let total: usize = lengths.iter().sum();
    let (q, k, v) =
        (random(total * heads * d, 10), random(total * kv_heads * d, 11), random(total * kv_heads * d, 12));
    for window in [None, Some(1), Some(7), Some(1050), Some(5000)] {
        let mut expected = vec![0.0; total * heads * d];
        let mut first = 0;
        for length in lengths {
            for i in 0..length {
                for head in 0..heads {
                    let key = |j: usize| ((first + j) * kv_heads + head / (heads / kv_heads)) * d;
                    let seen = (0..=i).filter(|j| window.is_none_or(|window| i - j < window));
                    let at = ((first + i) * heads + head) * d;
                    let scores: Vec<(usize, f64)> = seen
                        .map(|j| {
                            let dot: f64 =
                                (0..d).map(|c| f64::from(q[at + c]) * f64::from(k[key(j) + c])).sum();
                            (j, (dot / (d as f64).sqrt()).exp())
                        })
                        .collect();
                    let sum: f64 = scores.iter().map(|(_, score)| score).sum();
                    for (j, score) in scores {
                        for c in 0..d {
                            expected[at + c] += score / sum * f64::from(v[key(j) + c]);
                        }
                    }
                }
            }
            first += length;
        }
        let upload = |values: &[f32]| lane.upload(values).unwrap();
        let (q, k, v) = (upload(&q), upload(&k), upload(&v));
        let mut out = lane.zeros(total * heads * d).unwrap();
        let mut first = 0;
        for length in lengths {
            let scores = Scores { heads, kv_heads, head_dim: d, window };
            lane.attention((&q, &k, &v), &mut out, (first, length), scores).unwrap();
            first += length;
        }
        assert_close(&host(&lane, &out), &expected, 64.0 * EPSILON);
    }
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn rows_are_gathered_weighted_and_scattered() {
    let lane = lane();
    let (total, width) = (50, 37);
    let (x, out) = (random(total * width, 14), random(total * width, 15));
    let on_device = lane.upload(&x).unwrap();
    for rows in [vec![], vec![0], vec![49], (0..total).filter(|row| row % 3 == 1).collect::<Vec<_>>()] {
        let weights = random(rows.len(), 16);
        let places = lane.rows(&rows, total).unwrap();
        let gathered = lane.gather(&on_device, &places, width).unwrap();
        let expected: Vec<f32> = rows.iter().flat_map(|&row| &x[row * width..][..width]).copied().collect();
        assert_eq!(host(&lane, &gathered), expected);
        let mut sum = lane.upload(&out).unwrap();
        lane.scatter_add(&mut sum, &gathered, &places, &weights).unwrap();
        let mut expected = wide(&out);
        for (&row, &weight) in rows.iter().zip(&weights) {
            for c in row * width..(row + 1) * width {
                expected[c] += f64::from(weight) * f64::from(x[c]);
            }
        }
        assert_close(&host(&lane, &sum), &expected, 4.0 * EPSILON);
    }
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn elementwise_functions_equal_their_definitions() {
    let lane = lane();
    // Far into both tails of the exponential.
    let gate: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.4).collect();
    let up = random(1000, 17);
    let mut on_device = lane.upload(&gate).unwrap();
    let up_on_device = lane.upload(&up).unwrap();
    lane.swiglu(&mut on_device, &up_on_device).unwrap();
    let expected: Vec<f64> =
        wide(&gate).iter().zip(wide(&up)).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
    let activations = host(&lane, &on_device);
    assert_close(&activations, &expected, 8.0 * EPSILON);
    lane.add(&mut on_device, &up_on_device).unwrap();
    let expected: Vec<f64> = wide(&activations).iter().zip(wide(&up)).map(|(a, b)| a + b).collect();
    assert_close(&host(&lane, &on_device), &expected, EPSILON);
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn what_does_not_fit_the_device_is_computed_by_the_cpu() {
    let cuda = Cuda::new().unwrap();
    let w = stored([40, 30], Dtype::Bf16, 18);
    let on_cpu: ndarray::Array2<f64> = Faer.gram(&w, Side::Cols);
    let full = |_: &Lane| -> Result<(), super::CudaError> {
        Err(super::CudaError::OutOfMemory { context: "a test" })
    };
    assert_eq!(cuda.try_on_device(full), None);
    assert_eq!(cuda.fallbacks().operations, 1);
    let after: ndarray::Array2<f64> = cuda.gram(&w, Side::Cols);
    assert_eq!(cuda.fallbacks().operations, 1, "the device goes on");
    let worst = on_cpu.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-10);
    assert_eq!(cuda.name(), "cuda");
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn bits_are_the_same_in_every_run_and_on_every_lane() {
    let cuda = Cuda::new().unwrap();
    let w = stored([200, 120], Dtype::Bf16, 19);
    let run = || -> Vec<u32> {
        let gram: ndarray::Array2<f32> = cuda.gram(&w, Side::Cols);
        let eigen = cuda.eigh(gram, 20).unwrap();
        cuda.project(&w, Side::Cols, eigen.vectors.view()).iter().map(|value| value.to_bits()).collect()
    };
    let first = run();
    let others = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(others.iter().all(|other| *other == first));
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn every_step_can_be_measured() {
    let lane = lane();
    let peaks = super::measure::peaks(&lane, 40).unwrap();
    let w = stored([60, 40], Dtype::Bf16, 20);
    let kernels: &dyn Kernels<f64> = &Faer;
    let values = kernels.eigvalsh(kernels.gram(&w, Side::Cols)).unwrap();
    let mut steps = Vec::new();
    let split = crate::Split::after(7, &values).unwrap();
    super::measure::steps(&lane, &w, &split, &mut |figure| steps.push(figure)).unwrap();
    assert_eq!((peaks.len(), steps.len()), (7, 15));
    for figure in peaks.iter().chain(&steps) {
        assert!(figure.milliseconds > 0.0 && (figure.flops > 0.0) != (figure.bytes > 0.0), "{figure:?}");
        assert!(figure.share_of(&peaks).unwrap() > 0.0, "{figure:?}");
    }
}
