//! How fast a device is: its peaks, and every step of a factorisation by itself. For benchmarks.

use super::error::{CudaError, During};
use super::lane::{Buffer, Lane};
use super::products::{Input, Operand, Outer};
use super::solver::{Qr, Wanted};
use crate::{Real, Split};
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use lowrank_model::{Dtype, Tensor};
use std::time::Instant;

/// Timed runs of each step, after one that is not timed.
const RUNS: usize = 5;

/// What bounds a step: the peak that it is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Products, bf16 in, f32 sums.
    Bf16,
    /// Products in f32.
    F32,
    /// Products in f64.
    F64,
    /// Copies to the device.
    ToDevice,
    /// Copies from the device.
    FromDevice,
    /// Copies on the device.
    OnDevice,
}

/// One measured step.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// What.
    pub name: String,
    /// What it is held against.
    pub bound: Bound,
    /// Median over the runs.
    pub milliseconds: f64,
    /// Arithmetic of one run; 0 where it is not the point.
    pub flops: f64,
    /// Bytes moved by one run; 0 where they are not the point.
    pub bytes: f64,
}

impl Measurement {
    /// Its speed as a share of the peak that bounds it, where that was measured.
    pub fn share_of(&self, peaks: &[Measurement]) -> Option<f64> {
        let peak = peaks.iter().find(|peak| peak.bound == self.bound)?;
        Some((self.tflops() + self.gb_per_s()) / (peak.tflops() + peak.gb_per_s()))
    }

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
    bound: Bound,
    (flops, bytes): (f64, f64),
    mut run: impl FnMut() -> Result<(), CudaError>,
) -> Result<Measurement, CudaError> {
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
    Ok(Measurement { name: name.into(), bound, milliseconds: milliseconds[RUNS / 2], flops, bytes })
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
pub fn peaks(lane: &Lane, size: usize) -> Result<Vec<Measurement>, CudaError> {
    let values = Tensor::new(vec![size, size], Dtype::Bf16, noise(size * size)).expect("size² numbers");
    let narrow = lane.upload_bf16(&values)?;
    let (single, double) = (lane.upload_widened::<f32>(&values)?, lane.upload_widened::<f64>(&values)?);
    let mut figures = vec![
        peak(lane, "product, bf16 in, f32 sums", Bound::Bf16, &narrow, size)?,
        peak(lane, "product, f32", Bound::F32, &single, size)?,
        peak(lane, "product, f64", Bound::F64, &double, size)?,
    ];
    let bytes = values.bytes();
    let len = bytes.len() as f64;
    figures.push(timed(lane, "copy to the device", Bound::ToDevice, (0.0, len), || {
        lane.upload(bytes).map(drop)
    })?);
    figures.push(timed(
        lane,
        "copy to the device, memory that is not pinned",
        Bound::ToDevice,
        (0.0, len),
        || lane.stream.clone_htod(bytes).during("copying to the device").map(drop),
    )?);
    figures.push(timed(lane, "copy from the device", Bound::FromDevice, (0.0, 2.0 * len), || {
        lane.download(&single, 0, single.len()).map(drop)
    })?);
    let mut to = lane.zeros::<f64>(double.len())?;
    // Read and written.
    let moved = (0.0, 8.0 * len);
    figures.push(timed(lane, "copy on the device", Bound::OnDevice, moved, || {
        lane.copy_into(&double, &mut to)
    })?);
    Ok(figures)
}

fn peak<I: Input>(
    lane: &Lane,
    name: &str,
    bound: Bound,
    x: &Buffer<I>,
    size: usize,
) -> Result<Measurement, CudaError> {
    let mut out = lane.zeros::<I::Sum>(size * size)?;
    let flops = 2.0 * (size as f64).powi(3);
    timed(lane, name, bound, (flops, 0.0), || {
        let (at, to) = (Operand::rows(size), Operand::rows(size));
        lane.product((size, size, size), (x, at), (x, at), (&mut out, to), 1)
    })
}

/// Every step from a stored bf16 matrix [m, n], m ≥ n, to its projection on the subspace of a rank, up to where `eigenvalues`
/// of its Gram matrix are split. `done` gets each figure as it is measured.
pub fn steps(
    lane: &Lane,
    w: &Tensor,
    split: &Split,
    done: &mut dyn FnMut(Measurement),
) -> Result<(), CudaError> {
    let &[m, n] = w.shape() else { panic!("{:?} is not the shape of a matrix", w.shape()) };
    assert!(m >= n && split.above < n);
    let stored = (0.0, w.bytes().len() as f64);
    done(timed(lane, "upload, bf16", Bound::ToDevice, stored, || lane.upload(w.bytes()).map(drop))?);
    done(timed(lane, "upload and widen to f32", Bound::ToDevice, stored, || {
        lane.upload_widened::<f32>(w).map(drop)
    })?);
    // Both triangles: cuBLAS has no triangular product for bf16.
    let narrow = lane.upload_bf16(w)?;
    let mut gram = lane.zeros::<f32>(n * n)?;
    let flops = 2.0 * m as f64 * (n as f64).powi(2);
    done(timed(lane, "Gram matrix, bf16 in, f32 sums", Bound::Bf16, (flops, 0.0), || {
        let (left, right) = (Operand::transposed(n), Operand::rows(n));
        lane.product((n, n, m), (&narrow, left), (&narrow, right), (&mut gram, Operand::rows(n)), 1)
    })?);
    drop((narrow, gram));
    steps_in::<f32>(lane, ("f32", Bound::F32), w, (m, n), split, done)?;
    steps_in::<f64>(lane, ("f64", Bound::F64), w, (m, n), split, done)
}

fn steps_in<T: Qr + Real>(
    lane: &Lane,
    (kind, bound): (&str, Bound),
    w: &Tensor,
    (m, n): (usize, usize),
    split: &Split,
    done: &mut dyn FnMut(Measurement),
) -> Result<(), CudaError> {
    let rank = split.above;
    let wide = lane.upload_widened::<T>(w)?;
    let square = m as f64 * (n as f64).powi(2);
    done(timed(lane, format!("Gram matrix, {kind}"), bound, (square, 0.0), || {
        lane.gram(&wide, (m, n), Outer::Cols).map(drop)
    })?);
    let gram = lane.gram(&wide, (m, n), Outer::Cols)?;
    let cube = (n as f64).powi(3);
    // Tridiagonal form, and the way back for the vectors; the iteration in between is not counted.
    for (wanted, name, flops) in
        [(Wanted::Values, "eigenvalues", 4.0 / 3.0), (Wanted::Vectors, "eigenvectors", 10.0 / 3.0)]
    {
        done(timed(lane, format!("{name}, {kind}"), bound, (flops * cube, 0.0), || {
            lane.symmetric_eigen(&mut lane.copied(&gram)?, n, wanted).map(drop)
        })?);
    }
    let omega = Tensor::new(vec![n, rank], Dtype::Bf16, noise(n * rank)).expect("n · rank numbers");
    let omega = lane.upload_widened::<T>(&omega)?;
    let mut products = None;
    let whole = timed(lane, String::new(), bound, (0.0, 0.0), || {
        let found = lane.upper_subspace(lane.copied(&gram)?, n, split, &omega)?;
        products = found.map(|(_, products)| products);
        Ok(())
    })?;
    drop(gram);
    let (d, r) = (n as f64, rank as f64);
    // Reflectors, and Q of them.
    let by_reflectors = 4.0 * d * r * r - 4.0 / 3.0 * r.powi(3);
    // A gap that rounding closes gives no subspace, and no figure.
    if let Some(products) = products {
        let name = format!("upper subspace by {products} products and 2 QRs, {kind}");
        let flops = 2.0 * (products as f64 * cube + 2.0 * d * d * r + by_reflectors);
        done(Measurement { name, flops, ..whole });
    }
    done(timed(lane, format!("QR [{n}, {rank}], {kind}"), bound, (by_reflectors, 0.0), || {
        lane.thin_q(&mut lane.copied(&omega)?, (n, rank))
    })?);
    let mut out = lane.zeros::<T>(m * rank)?;
    let flops = 2.0 * m as f64 * d * r;
    done(timed(lane, format!("projection on rank {rank}, {kind}"), bound, (flops, 0.0), || {
        // As a subspace lies there: one column after another.
        let (left, right) = ((&wide, Operand::rows(n)), (&omega, Operand::transposed(n)));
        lane.product((m, rank, n), left, right, (&mut out, Operand::rows(rank)), 1)
    })?);
    Ok(())
}
