//! The operations of a forward pass, each on buffers of one lane.
//!
//! Sizes are asserted here, so that a wrong call panics on the host and does not write elsewhere on the device.

use super::error::CudaError;
use super::lane::{Arg, Buffer, Lane, Work};
use super::products::{Element, Operand};
use lowrank_model::{Dtype, Tensor};

/// How products with weights are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightProducts {
    /// Weights widened to f32, f32 throughout (no TF32): as the CPU computes.
    #[default]
    F32,
    /// Where weights are stored in bf16: their inputs rounded to bf16, sums in f32. Faster, and less exact.
    Bf16,
}

/// A weight on the device, row-major.
#[derive(Debug)]
pub struct DeviceMatrix {
    rows: usize,
    cols: usize,
    values: Values,
}

#[derive(Debug)]
enum Values {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
}

/// A linear map on the device.
#[derive(Debug)]
pub enum DeviceLinear {
    /// W [m, n].
    Dense(DeviceMatrix),
    /// W = u v.
    Factored {
        /// [m, r]
        u: DeviceMatrix,
        /// [r, n]
        v: DeviceMatrix,
    },
    /// W = B + difference.
    OfBase {
        /// B [m, n]
        base: DeviceMatrix,
        /// Of the same shape.
        difference: Box<DeviceLinear>,
    },
}

/// Dimensions of grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scores {
    /// A, query heads.
    pub heads: usize,
    /// G, key and value heads; A is a multiple.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// A query sees this many keys, itself among them.
    pub window: Option<usize>,
}

/// Scores that are held at once: queries are taken in blocks, so that this bounds them.
const SCORE_BYTES_MAX: usize = 256 << 20;

fn int(value: usize) -> Arg {
    Arg::Int(value as i64)
}

impl DeviceLinear {
    /// m, output features.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.rows,
            Self::Factored { u, .. } => u.rows,
            Self::OfBase { base, .. } => base.rows,
        }
    }

    /// n, input features.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Dense(w) => w.cols,
            Self::Factored { v, .. } => v.cols,
            Self::OfBase { base, .. } => base.cols,
        }
    }
}

impl Lane {
    /// A stored [m, n] tensor.
    ///
    /// # Panics
    /// If the tensor has not two dimensions.
    pub fn matrix(&self, tensor: &Tensor, products: WeightProducts) -> Result<DeviceMatrix, CudaError> {
        let &[rows, cols] = tensor.shape() else {
            panic!("{:?} is not the shape of a matrix", tensor.shape())
        };
        let values = match (products, tensor.dtype()) {
            (WeightProducts::Bf16, Dtype::Bf16) => Values::Bf16(self.upload_bf16(tensor)?),
            _ => Values::F32(self.upload_widened(tensor)?),
        };
        Ok(DeviceMatrix { rows, cols, values })
    }

    /// Y [N, m] = X [N, n] Wᵀ.
    fn times(&self, x: &Buffer<f32>, w: &DeviceMatrix) -> Result<Buffer<f32>, CudaError> {
        assert_eq!(x.len() % w.cols, 0, "rows of {} numbers", w.cols);
        let (tokens, to) = (x.len() / w.cols, Operand::rows(w.rows));
        let (from, weight) = (Operand::rows(w.cols), Operand::transposed(w.cols));
        let size = (tokens, w.rows, w.cols);
        let mut y = self.zeros(tokens * w.rows)?;
        match &w.values {
            Values::F32(values) => self.product(size, (x, from), (values, weight), (&mut y, to), 1)?,
            Values::Bf16(values) => {
                let mut narrow = self.zeros::<u16>(x.len())?;
                let args = [self.write(&mut narrow), self.read(x), int(x.len())];
                // SAFETY: narrow_f32_bf16(u16* out, const float* in, i64 elements); both hold x.len() numbers.
                unsafe {
                    self.launch(&self.device.functions.narrow_f32_bf16, Work::Elements(x.len()), &args)
                }?;
                self.product(size, (&narrow, from), (values, weight), (&mut y, to), 1)?;
            }
        }
        Ok(y)
    }

    /// Y [N, m] = X [N, n] Wᵀ; factored: (X vᵀ) uᵀ; with a base: X Bᵀ added.
    pub fn linear(&self, x: &Buffer<f32>, linear: &DeviceLinear) -> Result<Buffer<f32>, CudaError> {
        match linear {
            DeviceLinear::Dense(w) => self.times(x, w),
            DeviceLinear::Factored { u, v } => self.times(&self.times(x, v)?, u),
            DeviceLinear::OfBase { base, difference } => {
                let mut y = self.linear(x, difference)?;
                self.add(&mut y, &self.times(x, base)?)?;
                Ok(y)
            }
        }
    }

    /// x / √(mean(x²) + ε) ∘ weight for every row of x `[N, width]`, weight `[width]`.
    pub fn rms_norm(
        &self,
        x: &Buffer<f32>,
        weight: &Buffer<f32>,
        epsilon: f32,
    ) -> Result<Buffer<f32>, CudaError> {
        let width = weight.len();
        assert_eq!(x.len() % width, 0, "rows of {width} numbers");
        let mut out = self.zeros(x.len())?;
        let args = [self.write(&mut out), self.read(x), self.read(weight), int(width), Arg::Float(epsilon)];
        // SAFETY: rms_norm(float* out, const float* x, const float* weight, i64 width, float epsilon), a block per row.
        unsafe { self.launch(&self.device.functions.rms_norm, Work::Rows(x.len() / width), &args) }?;
        Ok(out)
    }

    /// Turns every head of x [N, heads · 2 half] by the angle of its row's position; cos and sin are [P, half], and
    /// every position is below P.
    pub fn rope(
        &self,
        x: &mut Buffer<f32>,
        (cos, sin): (&Buffer<f32>, &Buffer<f32>),
        positions: &Positions,
        (heads, half): (usize, usize),
    ) -> Result<(), CudaError> {
        let rows = positions.rows.len();
        assert_eq!(x.len(), rows * heads * 2 * half);
        assert!(cos.len() == sin.len() && positions.end * half <= cos.len());
        let args = [
            self.write(x),
            self.read(cos),
            self.read(sin),
            self.read(&positions.rows),
            int(rows),
            int(heads),
            int(half),
        ];
        // SAFETY: rope(float* x, const float* cos, const float* sin, const int* position, i64 rows, i64 heads, i64 half);
        // the sizes were asserted, and positions are below `end`.
        unsafe { self.launch(&self.device.functions.rope, Work::Elements(rows * heads * half), &args) }
    }

    /// The position of every row.
    pub fn positions(&self, positions: &[usize]) -> Result<Positions, CudaError> {
        let end = positions.iter().max().map_or(0, |last| last + 1);
        Ok(Positions { rows: self.upload(&indices(positions))?, end })
    }

    /// Attention of the sequence in rows first..first + tokens of q [N, A·D], k and v [N, G·D] into the same rows of
    /// out [N, A·D]: softmax(q kᵀ / √D) v per head; query i sees the keys i − window < j ≤ i.
    pub fn attention(
        &self,
        (q, k, v): (&Buffer<f32>, &Buffer<f32>, &Buffer<f32>),
        out: &mut Buffer<f32>,
        (first, tokens): (usize, usize),
        scores: Scores,
    ) -> Result<(), CudaError> {
        let Scores { heads, kv_heads, head_dim: d, window } = scores;
        assert_eq!(heads % kv_heads, 0, "every key/value head serves as many query heads");
        assert!(window != Some(0), "a query sees itself");
        let group = heads / kv_heads;
        let (wide, narrow) = (heads * d, kv_heads * d);
        let block = (SCORE_BYTES_MAX / (4 * heads * tokens.max(1))).clamp(16, 1024).min(tokens.max(1));
        let scale = (1.0 / (d as f64).sqrt()) as f32;
        for first_query in (0..tokens).step_by(block) {
            let queries = block.min(tokens - first_query);
            // No query of this block sees a key outside first_key..end_key.
            let first_key = window.map_or(0, |window| (first_query + 1).saturating_sub(window));
            let keys = first_query + queries - first_key;
            let mut probabilities = self.zeros::<f32>(heads * queries * keys)?;
            // A/G query heads share one key/value head: a batch with stride 0 for the latter.
            let of_query = |head: usize| Operand {
                first: (first + first_query) * wide + head * d,
                leading: wide,
                transposed: false,
                stride: d,
            };
            let of_key = |head: usize, transposed: bool| Operand {
                first: (first + first_key) * narrow + head * d,
                leading: narrow,
                transposed,
                stride: 0,
            };
            let of_score = |head: usize| Operand {
                first: head * queries * keys,
                leading: keys,
                transposed: false,
                stride: queries * keys,
            };
            for kv_head in 0..kv_heads {
                let head = kv_head * group;
                self.product(
                    (queries, keys, d),
                    (q, of_query(head)),
                    (k, of_key(kv_head, true)),
                    (&mut probabilities, of_score(head)),
                    group,
                )?;
            }
            let args = [
                self.write(&mut probabilities),
                int(queries),
                int(keys),
                int(first_query),
                int(first_key),
                int(window.unwrap_or(0)),
                Arg::Float(scale),
            ];
            // SAFETY: attention_softmax(float* scores, i64 queries, i64 keys, i64 first_query, i64 first_key, i64 window,
            // float scale), a block per row; scores holds heads · queries rows of keys.
            unsafe {
                self.launch(&self.device.functions.attention_softmax, Work::Rows(heads * queries), &args)
            }?;
            for kv_head in 0..kv_heads {
                let head = kv_head * group;
                self.product(
                    (queries, d, keys),
                    (&probabilities, of_score(head)),
                    (v, of_key(kv_head, false)),
                    (out, of_query(head)),
                    group,
                )?;
            }
        }
        Ok(())
    }

    /// gate ← silu(gate) ∘ up.
    pub fn swiglu(&self, gate: &mut Buffer<f32>, up: &Buffer<f32>) -> Result<(), CudaError> {
        assert_eq!(gate.len(), up.len());
        let args = [self.write(gate), self.read(up), int(up.len())];
        // SAFETY: swiglu(float* gate, const float* up, i64 elements).
        unsafe { self.launch(&self.device.functions.swiglu, Work::Elements(up.len()), &args) }
    }

    /// Rows of x, where they are to be gathered from and scattered to. All are below `rows_of_x` and none comes twice.
    pub fn rows(&self, rows: &[usize], rows_of_x: usize) -> Result<Rows, CudaError> {
        assert!(rows.is_sorted_by(|a, b| a < b), "rows rise");
        assert!(rows.last().is_none_or(|&last| last < rows_of_x));
        Ok(Rows { rows: self.upload(&indices(rows))?, end: rows_of_x })
    }

    /// The rows [n, width] of x [N, width].
    pub fn gather(&self, x: &Buffer<f32>, rows: &Rows, width: usize) -> Result<Buffer<f32>, CudaError> {
        assert_eq!(x.len(), rows.end * width);
        let count = rows.rows.len();
        let mut out = self.zeros(count * width)?;
        let args = [self.write(&mut out), self.read(x), self.read(&rows.rows), int(count), int(width)];
        // SAFETY: gather_rows(float* out, const float* in, const int* rows, i64 count, i64 width); rows are below `end`.
        unsafe { self.launch(&self.device.functions.gather_rows, Work::Elements(count * width), &args) }?;
        Ok(out)
    }

    /// `out[rows[r]] += weights[r] · y[r]`: y `[n, width]`, out `[N, width]`.
    pub fn scatter_add(
        &self,
        out: &mut Buffer<f32>,
        y: &Buffer<f32>,
        rows: &Rows,
        weights: &[f32],
    ) -> Result<(), CudaError> {
        let count = rows.rows.len();
        assert_eq!(weights.len(), count);
        if count == 0 {
            return Ok(());
        }
        let width = y.len() / count;
        assert!(y.len() == count * width && out.len() == rows.end * width);
        let weights = self.upload(weights)?;
        let args = [
            self.write(out),
            self.read(y),
            self.read(&rows.rows),
            self.read(&weights),
            int(count),
            int(width),
        ];
        // SAFETY: scatter_add_rows(float* out, const float* y, const int* rows, const float* weights, i64 count, i64
        // width); rows are below `end` and distinct.
        unsafe { self.launch(&self.device.functions.scatter_add_rows, Work::Elements(y.len()), &args) }
    }

    /// y += x.
    pub fn add(&self, y: &mut Buffer<f32>, x: &Buffer<f32>) -> Result<(), CudaError> {
        assert_eq!(y.len(), x.len());
        let args = [self.write(y), self.read(x), int(x.len())];
        // SAFETY: add(float* y, const float* x, i64 elements).
        unsafe { self.launch(&self.device.functions.add, Work::Elements(x.len()), &args) }
    }
}

/// Positions of rows, on the device.
#[derive(Debug)]
pub struct Positions {
    rows: Buffer<i32>,
    /// One more than the largest.
    end: usize,
}

/// Distinct rows of a matrix, on the device.
#[derive(Debug)]
pub struct Rows {
    rows: Buffer<i32>,
    /// Rows of the matrix.
    end: usize,
}

fn indices(values: &[usize]) -> Vec<i32> {
    values.iter().map(|&value| i32::try_from(value).expect("indices are below 2³¹")).collect()
}

/// Each number rounded to f32.
pub(super) fn narrowed<T: Element>(lane: &Lane, wide: Buffer<T>) -> Result<Buffer<f32>, CudaError> {
    let elements = wide.len();
    let mut out = lane.zeros(elements)?;
    let args = [lane.write(&mut out), lane.read(&wide), int(elements)];
    // SAFETY: narrow_f64_f32(float* out, const double* in, i64 elements) or widen_f32_f32(float* out, const float* in, i64
    // elements), as T is.
    unsafe { lane.launch(T::to_f32(&lane.device.functions), Work::Elements(elements), &args) }?;
    Ok(out)
}
