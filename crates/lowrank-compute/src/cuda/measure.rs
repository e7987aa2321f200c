//! How fast a device is: its peaks, and every step of a factorisation by itself. For benchmarks.

use super::error::{CudaError, During};
use super::lane::{Buffer, Lane};
use super::products::{Element, Input, Operand, Outer};
use super::solver::Wanted;
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use lowrank_model::{Dtype, Tensor};
use std::time::Instant;

/// Timed runs of each step, after one that is not timed.
const RUNS: usize = 5;

/// One measured step.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What.
    pub name: String,
    /// Median over the runs.
    pub milliseconds: f64,
    /// Arithmetic of one run; 0 where it is not the point.
    pub flops: f64,
    /// Bytes moved by one run; 0 where they are not the point.
    pub bytes: f64,
}

impl Figure {
    /// 10¹² operations per second.
    pub fn tflops(&self) -> f64 {
        self.flops / self.milliseconds / 1e9
    }

    /// 10⁹ bytes per second.
    pub fn gb_per_s(&self) -> f64 {
        self.bytes / self.milliseconds / 1e6
    }
}

/// Time of `run`, from an idle device to an idle device.
fn timed(
    lane: &Lane,
    name: impl Into<String>,
    (flops, bytes): (f64, f64),
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<Figure, CudaError> {
    let mut milliseconds = Vec::with_capacity(RUNS);
    for attempt in 0..=RUNS {
        lane.wait()?;
        let start = Instant::now();
        run()?;
        lane.wait()?;
        if attempt > 0 {
            milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    milliseconds.sort_by(f64::total_cmp);
    Ok(Figure { name: name.into(), milliseconds: milliseconds[RUNS / 2], flops, bytes })
}

impl Lane {
    fn copied<T: DeviceRepr + ValidAsZeroBits>(&self, from: &Buffer<T>) -> Result<Buffer<T>, CudaError> {
        let mut to = self.zeros(from.len())?;
        self.copy_into(from, &mut to)?;
        Ok(to)
    }

    /// Copies between buffers of one length.
    fn copy_into<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        from: &Buffer<T>,
        to: &mut Buffer<T>,
    ) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len());
        let (source, target) = self.slices(from, to);
        self.stream.memcpy_dtod(source, target).during("copying on the device")
    }
}

/// Bits of bf16 numbers in [-1, 1) without a pattern: on zeros a device draws less power and runs faster.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..len)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            ((value.to_bits() >> 16) as u16).to_le_bytes()
        })
        .collect()
}

/// What the device reaches on products of `size` and on copies: the measure that routes are held against.
pub fn peaks(lane: &Lane, size: usize) -> Result<Vec<Figure>, CudaError> {
    let values = Tensor::new(vec![size, size], Dtype::Bf16, noise(size * size)).expect("size² numbers");
    let narrow = lane.upload_bf16(&values)?;
    let (single, double) = (lane.upload_widened::<f32>(&values)?, lane.upload_widened::<f64>(&values)?);
    let mut figures = vec![
        peak(lane, "product, bf16 in, f32 sums", &narrow, size)?,
        peak(lane, "product, f32", &single, size)?,
        peak(lane, "product, f64", &double, size)?,
    ];
    let bytes = values.bytes();
    let len = bytes.len() as f64;
    figures.push(timed(lane, "copy to the device", (0.0, len), || lane.upload(bytes).map(drop))?);
    figures.push(timed(lane, "copy from the device", (0.0, 2.0 * len), || {
        lane.download(&single, 0, single.len()).map(drop)
    })?);
    let mut to = lane.zeros::<f64>(double.len())?;
    // Read and written.
    figures.push(timed(lane, "copy on the device", (0.0, 8.0 * len), || lane.copy_into(&double, &mut to))?);
    Ok(figures)
}

fn peak<I: Input>(lane: &Lane, name: &str, x: &Buffer<I>, size: usize) -> Result<Figure, CudaError> {
    let mut out = lane.zeros::<I::Sum>(size * size)?;
    let flops = 2.0 * (size as f64).powi(3);
    timed(lane, name, (flops, 0.0), || {
        let (at, to) = (Operand::rows(size), Operand::rows(size));
        lane.product((size, size, size), (x, at), (x, at), (&mut out, to), 1)
    })
}

/// Every step from a stored bf16 matrix [m, n], m ≥ n, to its projection on `rank` eigenvectors.
pub fn steps(lane: &Lane, w: &Tensor, rank: usize) -> Result<Vec<Figure>, CudaError> {
    let &[m, n] = w.shape() else { panic!("{:?} is not the shape of a matrix", w.shape()) };
    assert!(m >= n && rank <= n);
    let mut figures = vec![
        timed(lane, "upload, bf16", (0.0, w.bytes().len() as f64), || lane.upload(w.bytes()).map(drop))?,
        timed(lane, "upload and widen to f32", (0.0, w.bytes().len() as f64), || {
            lane.upload_widened::<f32>(w).map(drop)
        })?,
    ];
    // Both triangles: cuBLAS has no triangular product for bf16.
    let narrow = lane.upload_bf16(w)?;
    let mut gram = lane.zeros::<f32>(n * n)?;
    let flops = 2.0 * m as f64 * (n as f64).powi(2);
    figures.push(timed(lane, "Gram matrix, bf16 in, f32 sums", (flops, 0.0), || {
        let (left, right) = (Operand::transposed(n), Operand::rows(n));
        lane.product((n, n, m), (&narrow, left), (&narrow, right), (&mut gram, Operand::rows(n)), 1)
    })?);
    drop((narrow, gram));
    steps_in::<f32>(lane, "f32", w, (m, n, rank), &mut figures)?;
    steps_in::<f64>(lane, "f64", w, (m, n, rank), &mut figures)?;
    Ok(figures)
}

fn steps_in<T: Element>(
    lane: &Lane,
    kind: &str,
    w: &Tensor,
    (m, n, rank): (usize, usize, usize),
    figures: &mut Vec<Figure>,
) -> Result<(), CudaError> {
    let wide = lane.upload_widened::<T>(w)?;
    let square = m as f64 * (n as f64).powi(2);
    figures.push(timed(lane, format!("Gram matrix, {kind}"), (square, 0.0), || {
        lane.gram(&wide, (m, n), Outer::Cols).map(drop)
    })?);
    let gram = lane.gram(&wide, (m, n), Outer::Cols)?;
    let cube = (n as f64).powi(3);
    // Tridiagonal form, and the way back for the vectors; the iteration in between is not counted.
    for (wanted, name, flops) in
        [(Wanted::Values, "eigenvalues", 4.0 / 3.0), (Wanted::Vectors, "eigenvectors", 10.0 / 3.0)]
    {
        figures.push(timed(lane, format!("{name}, {kind}"), (flops * cube, 0.0), || {
            lane.symmetric_eigen(&mut lane.copied(&gram)?, n, wanted).map(drop)
        })?);
    }
    let mut vectors = gram;
    lane.symmetric_eigen(&mut vectors, n, Wanted::Vectors)?;
    let mut out = lane.zeros::<T>(m * rank)?;
    let flops = 2.0 * m as f64 * n as f64 * rank as f64;
    figures.push(timed(lane, format!("projection on rank {rank}, {kind}"), (flops, 0.0), || {
        // One eigenvector after another: rows of Vᵀ.
        let right = Operand { first: (n - rank) * n, ..Operand::transposed(n) };
        lane.product(
            (m, rank, n),
            (&wide, Operand::rows(n)),
            (&vectors, right),
            (&mut out, Operand::rows(rank)),
            1,
        )
    })?);
    Ok(())
}
