//! Sums over the routed tokens of an expert, which define the norms of its matrices' errors.
//!
//! With router weight g (through [`GateWeight`](lowrank_model::recipe::GateWeight)), input x \[H\], a = w1 x, b = w3 x, z = silu(a) ∘ b \[F\], y = w2 z \[H\] and
//! cᵢ = ‖w2's column i‖²:
//!
//! | Sum | [`CalibrationTarget::Expert`] | [`CalibrationTarget::Matrix`] |
//! |---|---|---|
//! | `rows.gate` \[F\] | Σ g² (silu′(aᵢ) bᵢ)² cᵢ | 1 |
//! | `rows.up` \[F\] | Σ g² silu(aᵢ)² cᵢ | 1 |
//! | `inputs` [H, H] | Σ ω x xᵀ, ω the sum over i of both of the token's terms above | Σ g² x xᵀ |
//! | `outputs` [H, H] | Σ g² y yᵀ | Σ g² y yᵀ |
//!
//! So an error ΔW of w1 changes the expert's output by about tr(ΔWᵀ diag(rows.gate) ΔW · inputs) / (all rows' sum): the
//! diagonal of Gauss–Newton on one side, a Kronecker factor on the other (Martens and Grosse, 2015). Projecting w2's
//! outputs needs only their own moment (the projector form of whitening). No matrix has a side of F.
//!
//! Sums are f64; work is cut into strips of fixed size, so the bits do not depend on the number of threads.

use lowrank_compute::{Accumulate, Faer, Kernels, Real};
use lowrank_forward::ExpertBatch;
use lowrank_forward::math::exp;
use lowrank_model::recipe::{CalibrationTarget, MomentSettings};
use ndarray::{Array2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Columns of a moment that one task sums.
const STRIP: usize = 256;
/// Features of a token that are turned into columns together: as many pages as stay at hand.
const COLUMNS: usize = 64;
/// Features of the intermediate layer that one task sums.
const FEATURES: usize = 512;

/// How much an error in each output of an expert's w1 and w3 counts.
#[derive(Debug, Clone, PartialEq)]
pub struct RowWeights {
    /// Of w1, \[F\].
    pub gate: Vec<f64>,
    /// Of w3, \[F\].
    pub up: Vec<f64>,
}

/// Sums of one expert.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertMoments {
    /// Visits.
    pub tokens: u64,
    /// Of w1 and w3.
    pub rows: RowWeights,
    /// Of the inputs of w1 and w3, [H, H], lower triangle.
    pub inputs: Array2<f64>,
    /// Of the outputs of w2, [H, H], lower triangle.
    pub outputs: Array2<f64>,
}

impl ExpertMoments {
    /// Sums over no tokens.
    pub fn new(hidden_size: usize, intermediate_size: usize, settings: MomentSettings) -> Self {
        Self {
            tokens: 0,
            rows: RowWeights::new(intermediate_size, settings.calibration_target),
            inputs: Array2::zeros((hidden_size, hidden_size)),
            outputs: Array2::zeros((hidden_size, hidden_size)),
        }
    }

    /// Adds tokens. `column_energies` \[F\] are w2's ‖column‖².
    pub fn add(&mut self, batch: &ExpertBatch<'_>, column_energies: &[f64], settings: MomentSettings) {
        let hidden_size = self.inputs.nrows();
        self.tokens += batch.tokens.len() as u64;
        let counted = self.rows.add(batch, column_energies, settings);
        add_moment(&mut self.inputs, batch.x, &counted, hidden_size);
        add_moment(&mut self.outputs, batch.y, &settings.gate_weight.of_all(batch.weights), hidden_size);
    }

    /// Whether every sum is finite.
    pub fn is_finite(&self) -> bool {
        let rows = self.rows.gate.iter().chain(&self.rows.up);
        rows.chain(&self.inputs).chain(&self.outputs).all(|value| value.is_finite())
    }
}

impl RowWeights {
    /// Sums over no tokens.
    pub fn new(intermediate_size: usize, target: CalibrationTarget) -> Self {
        let row = match target {
            CalibrationTarget::Matrix => 1.0,
            CalibrationTarget::Expert => 0.0,
        };
        Self { gate: vec![row; intermediate_size], up: vec![row; intermediate_size] }
    }

    /// Adds tokens, of which the outputs y need not be known; → what each counts in `inputs`.
    pub fn add(
        &mut self,
        batch: &ExpertBatch<'_>,
        column_energies: &[f64],
        settings: MomentSettings,
    ) -> Vec<f64> {
        let shares = settings.gate_weight.of_all(batch.weights);
        match settings.calibration_target {
            CalibrationTarget::Matrix => shares,
            CalibrationTarget::Expert => self.add_slopes(batch, column_energies, &shares),
        }
    }

    /// → ω of every token.
    fn add_slopes(&mut self, batch: &ExpertBatch<'_>, column_energies: &[f64], shares: &[f64]) -> Vec<f64> {
        let features = column_energies.len();
        let parts: Vec<Vec<f64>> = (
            self.gate.par_chunks_mut(FEATURES),
            self.up.par_chunks_mut(FEATURES),
            column_energies.par_chunks(FEATURES),
        )
            .into_par_iter()
            .enumerate()
            .map(|(chunk, (gate_rows, up_rows, energies))| {
                let first = chunk * FEATURES;
                let sum_of_token = |(token, &share): (usize, &f64)| {
                    let at = token * features + first;
                    let gate = &batch.gate[at..at + energies.len()];
                    let up = &batch.up[at..at + energies.len()];
                    let mut omega = 0.0;
                    for i in 0..energies.len() {
                        let (by_gate, by_up) = slopes(gate[i], up[i]);
                        let scale = share * energies[i];
                        let (by_gate, by_up) = (scale * by_gate * by_gate, scale * by_up * by_up);
                        gate_rows[i] += by_gate;
                        up_rows[i] += by_up;
                        omega += by_gate + by_up;
                    }
                    omega
                };
                shares.iter().enumerate().map(sum_of_token).collect()
            })
            .collect();
        (0..shares.len()).map(|token| parts.iter().map(|part| part[token]).sum()).collect()
    }
}

/// ∂z/∂a = silu′(a)·b and ∂z/∂b = silu(a).
fn slopes(a: f32, b: f32) -> (f64, f64) {
    let sigmoid = f64::from(1.0 / (1.0 + exp(-a)));
    let (a, b) = (f64::from(a), f64::from(b));
    (sigmoid * (1.0 + a * (1.0 - sigmoid)) * b, a * sigmoid)
}

/// moment += Σ weight · x xᵀ, lower triangle, for the rows x of `rows` [n, H].
pub(crate) fn add_moment(moment: &mut Array2<f64>, rows: &[f32], weights: &[f64], hidden_size: usize) {
    let scaled = scaled::<f64>(rows, weights, hidden_size);
    let strips: Vec<ArrayViewMut2<'_, f64>> = moment.axis_chunks_iter_mut(Axis(1), STRIP).collect();
    strips.into_par_iter().enumerate().for_each(|(strip, mut out)| {
        let first = strip * STRIP;
        let (left, right) = (scaled.slice(s![first.., ..]), scaled.slice(s![first..first + out.ncols(), ..]));
        let below = out.slice_mut(s![first.., ..]);
        Faer.gemm(left, right.reversed_axes(), below, Accumulate::Add);
    });
}

/// moment += Σ weight · left rightᵀ, all of it, for the rows of `left` [n, l] and `right` [n, r] and a moment [l, r].
pub(crate) fn add_cross(moment: &mut Array2<f64>, left: &[f32], right: &[f32], weights: &[f64]) {
    let left = scaled::<f64>(left, weights, moment.nrows());
    let right = scaled::<f64>(right, weights, moment.ncols());
    let strips: Vec<ArrayViewMut2<'_, f64>> = moment.axis_chunks_iter_mut(Axis(1), STRIP).collect();
    strips.into_par_iter().enumerate().for_each(|(strip, out)| {
        let right = right.slice(s![strip * STRIP..strip * STRIP + out.ncols(), ..]);
        Faer.gemm(left.view(), right.reversed_axes(), out, Accumulate::Add);
    });
}

/// Rows [n, H] times the roots of their weights, as columns [H, n]: what is multiplied then lies together, and no product copies
/// it.
pub(crate) fn scaled<T: Real>(rows: &[f32], weights: &[f64], hidden_size: usize) -> Array2<T> {
    let roots: Vec<T> = weights.iter().map(|weight| T::of_f64(weight.sqrt())).collect();
    let mut columns = Array2::<T>::zeros((hidden_size, weights.len()));
    let chunks: Vec<ArrayViewMut2<'_, T>> = columns.axis_chunks_iter_mut(Axis(0), COLUMNS).collect();
    chunks.into_par_iter().enumerate().for_each(|(chunk, mut out)| {
        for (token, (row, &root)) in rows.chunks_exact(hidden_size).zip(&roots).enumerate() {
            let row = &row[chunk * COLUMNS..];
            out.column_mut(token).iter_mut().zip(row).for_each(|(out, &x)| *out = root * T::of_f32(x));
        }
    });
    columns
}

/// ‖column‖² of a stored matrix W [m, n], \[n\].
pub fn column_energies(w: &lowrank_model::Tensor) -> Vec<f64> {
    let cols = w.shape()[1];
    let mut energies = vec![0.0; cols];
    let mut row = vec![0.0_f32; cols];
    for first in (0..w.elements()).step_by(cols) {
        w.widen(first, &mut row);
        energies.iter_mut().zip(&row).for_each(|(energy, &value)| *energy += f64::from(value).powi(2));
    }
    energies
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::some;
    use lowrank_model::recipe::GateWeight;
    use lowrank_model::{Dtype, Tensor};

    const H: usize = 5;
    const F: usize = 7;
    const N: usize = 9;

    /// y = w2 (silu(w1 x) ∘ w3 x) of one token, in f64.
    fn expert(w1: &[f64], w2: &[f64], w3: &[f64], x: &[f64]) -> Vec<f64> {
        let times = |w: &[f64], x: &[f64]| -> Vec<f64> {
            w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
        };
        let (a, b) = (times(w1, x), times(w3, x));
        let z: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a / (1.0 + (-a).exp()) * b).collect();
        times(w2, &z)
    }

    /// One token with equal |x| makes the Kronecker form exact up to the sum over outputs, so the predicted change of the
    /// output can be held against a change that is computed.
    #[test]
    fn the_rows_predict_what_an_error_of_one_row_does_to_the_expert() {
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
        let (w1, w2, w3) = (wide(some(F * H, 1)), wide(some(H * F, 2)), wide(some(F * H, 3)));
        let x32 = some(H, 4);
        let x = wide(x32.clone());
        let dot = |w: &[f64], row: usize| w[row * H..][..H].iter().zip(&x).map(|(w, x)| w * x).sum::<f64>();
        let gate: Vec<f32> = (0..F).map(|i| dot(&w1, i) as f32).collect();
        let up: Vec<f32> = (0..F).map(|i| dot(&w3, i) as f32).collect();
        let energies: Vec<f64> = (0..F).map(|i| (0..H).map(|o| w2[o * F + i].powi(2)).sum()).collect();
        let y: Vec<f32> = expert(&w1, &w2, &w3, &x).into_iter().map(|v| v as f32).collect();
        let settings = MomentSettings {
            gate_weight: GateWeight::Squared,
            calibration_target: CalibrationTarget::Expert,
        };
        let mut moments = ExpertMoments::new(H, F, settings);
        let batch = ExpertBatch {
            layer: 0,
            expert: 0,
            tokens: &[0],
            weights: &[0.5],
            x: &x32,
            gate: &gate,
            up: &up,
            activations: &[],
            y: &y,
        };
        moments.add(&batch, &energies, settings);
        let total: f64 = moments.rows.gate.iter().chain(&moments.rows.up).sum();
        for row in 0..F {
            for (which, rows) in [(0, &moments.rows.gate), (1, &moments.rows.up)] {
                // ΔW has one entry: row `row`, column 2.
                let delta = 1e-5;
                let predicted = rows[row] / total * delta * delta * moments.inputs[[2, 2]];
                let (mut w1, mut w3) = (w1.clone(), w3.clone());
                (if which == 0 { &mut w1 } else { &mut w3 })[row * H + 2] += delta;
                let spoilt = expert(&w1, &w2, &w3, &x);
                let exact = expert(&wide(some(F * H, 1)), &w2, &wide(some(F * H, 3)), &x);
                let change: f64 = spoilt.iter().zip(&exact).map(|(a, b)| (0.5 * (a - b)).powi(2)).sum();
                assert!((predicted / change - 1.0).abs() < 1e-3, "row {row}: {predicted} {change}");
            }
        }
    }

    #[test]
    fn moments_equal_plain_sums_for_any_number_of_threads_and_batches() {
        const WIDE: usize = 300; // more than one strip
        let (x, y) = (some(N * WIDE, 5), some(N * WIDE, 6));
        let weights: Vec<f32> = some(N, 7).iter().map(|w| w.abs()).collect();
        let tokens: Vec<usize> = (0..N).collect();
        let settings =
            MomentSettings { gate_weight: GateWeight::Linear, calibration_target: CalibrationTarget::Matrix };
        let run = |threads: usize, cut: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut moments = ExpertMoments::new(WIDE, F, settings);
                for range in [0..cut, cut..N] {
                    let rows = range.start * WIDE..range.end * WIDE;
                    moments.add(
                        &ExpertBatch {
                            layer: 0,
                            expert: 0,
                            tokens: &tokens[range.clone()],
                            weights: &weights[range],
                            x: &x[rows.clone()],
                            gate: &[],
                            up: &[],
                            activations: &[],
                            y: &y[rows],
                        },
                        &[],
                        settings,
                    );
                }
                moments
            })
        };
        let moments = run(1, 4);
        assert_eq!(moments, run(3, 4));
        assert_eq!(moments.tokens, N as u64);
        assert!(moments.rows.gate.iter().all(|&row| row == 1.0));
        for (i, j) in [(0, 0), (299, 1), (270, 260), (100, 99)] {
            for (rows, moment) in [(&x, &moments.inputs), (&y, &moments.outputs)] {
                let sum: f64 = (0..N)
                    .map(|t| {
                        f64::from(weights[t]) * f64::from(rows[t * WIDE + i]) * f64::from(rows[t * WIDE + j])
                    })
                    .sum();
                assert!((moment[[i, j]] - sum).abs() < 1e-12, "{i} {j}");
            }
        }
    }

    #[test]
    fn column_energies_are_sums_of_squares() {
        let w = Tensor::from_f32(vec![2, 3], Dtype::Bf16, &[1.0, 2.0, 0.0, -3.0, 0.5, 0.0]).unwrap();
        assert_eq!(column_energies(&w), [10.0, 4.25, 0.0]);
    }
}
