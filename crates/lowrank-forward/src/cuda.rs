//! A CUDA device as an engine.
//!
//! Weights travel as they are stored, one block at a time; hidden states come and go with each block, so that what lies on
//! the device is one block's weights and the states of all tokens, however deep the model is. Everything that the CPU
//! computes in f32 is f32 here, unless products of bf16 weights are asked to be faster than that
//! ([`WeightProducts::Bf16`]). The sums run in another order than the CPU's: equal to rounding, not to the bit.

use crate::attention::add_bias;
use crate::engine::{Engine, ExpertSum, Project, StoredAttention, StoredExpert, StoredRouter};
use crate::error::ForwardError;
use crate::hidden::Hidden;
use crate::norm::ResidualNorm;
use crate::observer::{ExpertBatch, Observer};
use crate::rope::Rope;
use crate::router::Routing;
use lowrank_compute::cuda::{
    Buffer, CudaDevice, CudaError, DeviceLinear, Lane, NoCuda, Scores, WeightProducts, available,
};
use lowrank_model::block::NormKind;
use lowrank_model::{ModelConfig, PivotOrder, PivotSide, StoredMatrix, Tensor};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tokens whose attention is computed at once, in whole sequences: bounds what lies beside the weights.
const ATTENTION_TOKENS: usize = 16_384;
/// Tokens of an expert that are gathered at once: bounds the [n, F] activations.
const EXPERT_TOKENS: usize = 8_192;

/// The device of this process.
#[derive(Debug)]
pub struct CudaEngine {
    device: Arc<CudaDevice>,
    lane: Mutex<Lane>,
    products: WeightProducts,
}

impl From<CudaError> for ForwardError {
    fn from(error: CudaError) -> Self {
        Self::Device { message: error.to_string() }
    }
}

impl CudaEngine {
    /// The device of this process, or why there is none. Products in f32.
    pub fn new() -> Result<Self, NoCuda> {
        Self::with_products(WeightProducts::F32)
    }

    /// The same with another kind of products.
    pub fn with_products(products: WeightProducts) -> Result<Self, NoCuda> {
        let device = available()?;
        let lane = device.lane().map_err(|error| NoCuda { why: error.to_string() })?;
        Ok(Self { device, lane: Mutex::new(lane), products })
    }

    /// A lane is used by one caller at a time, and a failed call leaves it usable.
    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dense(&self, lane: &Lane, tensor: &Tensor) -> Result<DeviceLinear, CudaError> {
        Ok(DeviceLinear::Dense(lane.matrix(tensor, self.products)?))
    }

    fn linear(&self, lane: &Lane, stored: &StoredMatrix) -> Result<DeviceLinear, CudaError> {
        let product = |u: &Tensor, v: &Tensor| -> Result<DeviceLinear, CudaError> {
            Ok(DeviceLinear::Factored {
                u: lane.matrix(u, self.products)?,
                v: lane.matrix(v, self.products)?,
            })
        };
        match stored {
            StoredMatrix::Dense(w) => self.dense(lane, w),
            StoredMatrix::OfBase { base, difference } => Ok(DeviceLinear::OfBase {
                base: lane.matrix(base, self.products)?,
                difference: Box::new(self.linear(lane, difference)?),
            }),
            StoredMatrix::Factored { u, v } => product(u, v),
            StoredMatrix::Pivoted { side, basis, coefficients, order } => {
                let spread = spread(*side, coefficients, order);
                match side {
                    PivotSide::Inputs => product(basis, &spread),
                    PivotSide::Outputs => product(&spread, basis),
                }
            }
        }
    }
}

/// [I T] Π [r, n] or Πᵀ [I; T] [m, r], written out: the device then has nothing to learn about pivots, and 0 and 1 are
/// exact in every dtype.
fn spread(side: PivotSide, coefficients: &Tensor, order: &PivotOrder) -> Tensor {
    let (rank, len) = (order.rank(), order.pivots().len() + order.others().len());
    let dtype = coefficients.dtype();
    let size = dtype.size_bytes() as usize;
    let one = Tensor::from_f32(vec![1], dtype, &[1.0]).expect("one number").into_bytes();
    let stored = coefficients.bytes();
    let mut bytes = vec![0; rank * len * size];
    let shape = match side {
        PivotSide::Inputs => [rank, len],
        PivotSide::Outputs => [len, rank],
    };
    let mut put = |row: usize, col: usize, value: &[u8]| {
        bytes[(row * shape[1] + col) * size..][..size].copy_from_slice(value);
    };
    let number = |index: usize| &stored[index * size..][..size];
    for (i, pivot) in order.pivots().enumerate() {
        match side {
            PivotSide::Inputs => put(i, pivot, &one),
            PivotSide::Outputs => put(pivot, i, &one),
        }
    }
    for (j, other) in order.others().enumerate() {
        for i in 0..rank {
            match side {
                // T [r, n − r]
                PivotSide::Inputs => put(i, other, number(i * (len - rank) + j)),
                // T [m − r, r]
                PivotSide::Outputs => put(other, i, number(j * rank + i)),
            }
        }
    }
    Tensor::new(shape.to_vec(), dtype, bytes).expect("as many bytes as the shape says")
}

/// Router logits are computed in f32 whatever the other products are. The choice is the host's: a family's rule exists
/// once, and its result is needed here anyway.
fn route(
    lane: &Lane,
    input: &Buffer<f32>,
    gate: &DeviceLinear,
    router: &StoredRouter,
) -> Result<Routing, ForwardError> {
    let logits = lane.linear(input, gate)?; // [N, E]
    let logits = lane.download(&logits, 0, logits.len())?;
    Ok(router.choose(logits))
}

fn router_on(lane: &Lane, router: &StoredRouter) -> Result<DeviceLinear, CudaError> {
    Ok(DeviceLinear::Dense(lane.matrix(&router.weights, WeightProducts::F32)?))
}

/// norm(x) [N, H] on the device. LayerNorm has no kernel, so the host computes it.
fn normed(lane: &Lane, x: &[f32], norm: &ResidualNorm) -> Result<Buffer<f32>, CudaError> {
    match norm.kind {
        NormKind::RootMeanSquare => {
            lane.rms_norm(&lane.upload(x)?, &lane.upload(&norm.weight)?, norm.epsilon)
        }
        NormKind::MeanAndVariance => lane.upload(&norm.apply_to_all(x)),
    }
}

impl Engine for CudaEngine {
    fn describe(&self) -> String {
        let products = match self.products {
            WeightProducts::F32 => "f32",
            WeightProducts::Bf16 => "bf16 products with f32 sums",
        };
        format!("CUDA, {products}: {}", self.device.describe())
    }

    fn attention(
        &self,
        config: &ModelConfig,
        weights: StoredAttention,
        hidden: &mut Hidden,
    ) -> Result<(), ForwardError> {
        // Latents, norms, biases, clipping, heads that turn in part and angles that depend on the length of a sequence have no
        // kernels: such attention runs on the CPU.
        let turns_whole = config.rotary_dim() == config.head_dim;
        let rope = Rope::new(config, hidden.longest());
        let (weights, (cos, sin)) = match (weights, rope.tables()) {
            (StoredAttention::Grouped(weights), Some(tables))
                if weights.is_plain() && turns_whole && config.clip_qkv.is_none() =>
            {
                (weights, tables)
            }
            (other, _) => return crate::Cpu.attention(config, other, hidden),
        };
        let (heads, kv_heads, d) = (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let width = config.hidden_size;
        let lane = &*self.lane();
        let norm = lane.upload(&weights.norm.weight)?;
        let query = self.dense(lane, &weights.query)?;
        let key = self.dense(lane, &weights.key)?;
        let value = self.dense(lane, &weights.value)?;
        let output = self.dense(lane, &weights.output)?;
        let (cos, sin) = (lane.upload(cos)?, lane.upload(sin)?);
        let scores = Scores { heads, kv_heads, head_dim: d, window: config.sliding_window };

        for sequences in runs(&hidden.offsets) {
            // [start, end) of every sequence, counted from the first token of the run.
            let first = sequences[0];
            let range = first * width..sequences[sequences.len() - 1] * width;
            let places: Vec<(usize, usize)> =
                sequences.windows(2).map(|pair| (pair[0] - first, pair[1] - pair[0])).collect();
            let positions: Vec<usize> = places.iter().flat_map(|&(_, tokens)| 0..tokens).collect();
            let positions = lane.positions(&positions)?;

            let mut h = lane.upload(&hidden.states[range.clone()])?; // [N, H]
            let x = lane.rms_norm(&h, &norm, weights.norm.epsilon)?; // [N, H]
            let mut q = lane.linear(&x, &query)?; // [N, A·D]
            let mut k = lane.linear(&x, &key)?; // [N, G·D]
            let v = lane.linear(&x, &value)?; // [N, G·D]
            drop(x);
            lane.rope(&mut q, (&cos, &sin), &positions, (heads, d / 2))?;
            lane.rope(&mut k, (&cos, &sin), &positions, (kv_heads, d / 2))?;
            let mut mixed = lane.zeros(q.len())?; // [N, A·D]
            for place in places {
                lane.attention((&q, &k, &v), &mut mixed, place, scores)?;
            }
            lane.add(&mut h, &lane.linear(&mixed, &output)?)?;
            let states = lane.download(&h, 0, h.len())?;
            hidden.states[range].copy_from_slice(&states);
        }
        Ok(())
    }

    fn norm(&self, states: &[f32], norm: &ResidualNorm) -> Result<Vec<f32>, ForwardError> {
        match norm.kind {
            NormKind::RootMeanSquare => {
                let lane = &*self.lane();
                let out = normed(lane, states, norm)?;
                Ok(lane.download(&out, 0, out.len())?)
            }
            NormKind::MeanAndVariance => crate::Cpu.norm(states, norm),
        }
    }

    fn route(&self, input: &[f32], router: &StoredRouter) -> Result<Routing, ForwardError> {
        let lane = &*self.lane();
        route(lane, &lane.upload(input)?, &router_on(lane, router)?, router)
    }

    fn moe<'a>(
        &'a self,
        inputs: &[&'a [f32]],
        router: &StoredRouter,
    ) -> Result<Box<dyn ExpertSum + 'a>, ForwardError> {
        let lane = &*self.lane();
        let gate = router_on(lane, router)?;
        let mut streams = Vec::with_capacity(inputs.len());
        for input in inputs {
            let input = lane.upload(input)?;
            let routing = route(lane, &input, &gate, router)?;
            let output = lane.zeros(input.len())?;
            streams.push(Stream { input, routing, output });
        }
        Ok(Box::new(CudaExpertSum { engine: self, streams, width: gate.inputs() }))
    }

    fn head(
        &self,
        norm: ResidualNorm,
        output: Tensor,
        bias: Vec<f32>,
    ) -> Result<Box<dyn Project + '_>, ForwardError> {
        let output = self.dense(&self.lane(), &output)?;
        Ok(Box::new(CudaHead { engine: self, norm, output, bias }))
    }
}

/// Runs of whole sequences with at most [`ATTENTION_TOKENS`] tokens, or one longer sequence: the borders of each run.
fn runs(offsets: &[usize]) -> Vec<&[usize]> {
    let mut runs = Vec::new();
    let mut first = 0;
    while first + 1 < offsets.len() {
        let fits = offsets[first + 1..].partition_point(|&end| end - offsets[first] <= ATTENTION_TOKENS);
        let last = first + fits.max(1);
        runs.push(&offsets[first..=last]);
        first = last;
    }
    runs
}

/// One input on its way through the experts.
struct Stream {
    input: Buffer<f32>, // [N, H]
    routing: Routing,
    output: Buffer<f32>, // [N, H]
}

struct CudaExpertSum<'a> {
    engine: &'a CudaEngine,
    streams: Vec<Stream>,
    width: usize, // H
}

impl ExpertSum for CudaExpertSum<'_> {
    fn expert(
        &mut self,
        (layer, expert): (usize, usize),
        weights: StoredExpert,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let engine = self.engine;
        let lane = &*engine.lane();
        let w1 = engine.linear(lane, &weights.gate)?; // [F, H]
        let w2 = engine.linear(lane, &weights.down)?; // [H, F]
        let w3 = engine.linear(lane, &weights.up)?; // [F, H]
        drop(weights);
        for Stream { input, routing, output } in &mut self.streams {
            let (tokens, shares) = routing.routed_tokens(expert);
            for (tokens, shares) in tokens.chunks(EXPERT_TOKENS).zip(shares.chunks(EXPERT_TOKENS)) {
                let rows = lane.rows(tokens, input.len() / self.width)?;
                let x = lane.gather(input, &rows, self.width)?; // [n, H]
                let host = |buffer: &Buffer<f32>| lane.download(buffer, 0, buffer.len());
                let mut gate = lane.linear(&x, &w1)?; // [n, F], then the activations
                let gate_on_host = observer.sees_experts().then(|| host(&gate)).transpose()?;
                let up = lane.linear(&x, &w3)?; // [n, F]
                lane.swiglu(&mut gate, &up)?;
                let y = lane.linear(&gate, &w2)?; // [n, H]
                lane.scatter_add(output, &y, &rows, shares)?;
                if let Some(gate_on_host) = gate_on_host {
                    observer.expert(&ExpertBatch {
                        layer,
                        expert,
                        tokens,
                        weights: shares,
                        x: &host(&x)?,
                        gate: &gate_on_host,
                        up: &host(&up)?,
                        activations: &host(&gate)?,
                        y: &host(&y)?,
                    });
                }
            }
        }
        Ok(())
    }

    fn outputs(self: Box<Self>) -> Result<Vec<Vec<f32>>, ForwardError> {
        let lane = &*self.engine.lane();
        let outputs = self.streams.iter().map(|stream| lane.download(&stream.output, 0, stream.output.len()));
        Ok(outputs.collect::<Result<_, _>>()?)
    }
}

#[derive(Debug)]
struct CudaHead<'a> {
    engine: &'a CudaEngine,
    norm: ResidualNorm,
    output: DeviceLinear, // [V, H]
    bias: Vec<f32>,       // [V], or empty
}

impl Project for CudaHead<'_> {
    fn logits(&self, h: &[f32]) -> Result<Vec<f32>, ForwardError> {
        let lane = &*self.engine.lane();
        let x = normed(lane, h, &self.norm)?; // [T, H]
        let logits = lane.linear(&x, &self.output)?; // [T, V]
        let mut logits = lane.download(&logits, 0, logits.len())?;
        add_bias(&mut logits, &self.bias);
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::Linear;
    use lowrank_model::Dtype;

    #[test]
    fn a_pivoted_matrix_written_out_acts_like_itself() {
        let tensor = |shape: [usize; 2], values: &[f32]| {
            Tensor::from_f32(shape.to_vec(), Dtype::Bf16, values).unwrap()
        };
        let x: Vec<f32> = (0..24).map(|i| (i * 7 % 11) as f32 - 4.0).collect();
        for (side, basis, coefficients) in
            [(PivotSide::Inputs, [3, 2], [2, 4]), (PivotSide::Outputs, [2, 3], [4, 2])]
        {
            let basis = tensor(basis, &[1.0, 2.0, -1.0, 0.5, 3.0, -2.0]);
            let coefficients = tensor(coefficients, &[1.0, 0.0, -2.0, 0.25, 4.0, 1.0, 2.0, -1.0]);
            let order = PivotOrder::of_pivots(&[1, 4], 6);
            let spread = spread(side, &coefficients, &order);
            let written = match side {
                PivotSide::Inputs => StoredMatrix::Factored { u: basis.clone(), v: spread },
                PivotSide::Outputs => StoredMatrix::Factored { u: spread, v: basis.clone() },
            };
            let pivoted = StoredMatrix::Pivoted { side, basis, coefficients, order };
            let run = |stored: &StoredMatrix| {
                let linear = Linear::from(stored);
                let mut y = vec![f32::NAN; x.len() / linear.inputs() * linear.outputs()];
                linear.apply(&x, &mut y);
                y
            };
            assert_eq!(run(&pivoted), run(&written));
        }
    }

    #[test]
    fn runs_hold_whole_sequences_and_each_sequence_once() {
        let t = ATTENTION_TOKENS;
        let offsets = [0, 10, t, t + 5, 3 * t, 3 * t + 1];
        let expected: [&[usize]; 4] = [&[0, 10, t], &[t, t + 5], &[t + 5, 3 * t], &[3 * t, 3 * t + 1]];
        assert_eq!(runs(&offsets), expected);
        assert_eq!(runs(&[0]), Vec::<&[usize]>::new());
    }
}
