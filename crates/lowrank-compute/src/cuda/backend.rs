//! [`Cuda`]: the linear algebra of this crate on a device.
//!
//! A stored matrix travels as its bytes and is widened on the device. f32 is computed in f32, never in TF32. Whoever calls
//! from several threads gets as many lanes, so that eigenproblems overlap. What the device cannot do, because its memory
//! is full or a library refuses, the CPU does, matrix by matrix; [`Cuda::fallbacks`] says how often and why.

use super::error::CudaError;
use super::lane::{Buffer, Lane};
use super::operations::narrowed;
use super::products::{Element, Operand, Outer};
use super::solver::{Qr, Wanted};
use super::{CudaDevice, NoCuda};
use crate::blocks::matrix_shape;
use crate::{Accumulate, Backend, ComputeError, Eigen, Faer, Kernels, PivotedQr, Real, Side, Split};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2, ShapeBuilder, s};
use std::sync::{Arc, Mutex, PoisonError};

/// A CUDA device, and the CPU for what does not fit it.
#[derive(Debug)]
pub struct Cuda {
    device: Arc<CudaDevice>,
    /// Lanes that nobody uses at the moment.
    idle: Arc<Mutex<Vec<Lane>>>,
    fallbacks: Mutex<Fallbacks>,
    cpu: Faer,
}

/// What the CPU did in place of the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fallbacks {
    /// How many operations.
    pub operations: usize,
    /// Why the first of them.
    pub first: Option<CudaError>,
}

impl Cuda {
    /// The device of this process, or why there is none.
    pub fn new() -> Result<Self, NoCuda> {
        let device = super::available()?;
        Ok(Self { device, idle: Arc::default(), fallbacks: Mutex::default(), cpu: Faer })
    }

    /// The same device and lanes with a count of its own.
    pub(crate) fn session(&self) -> Self {
        let (device, idle) = (self.device.clone(), self.idle.clone());
        Self { device, idle, fallbacks: Mutex::default(), cpu: Faer }
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// What the CPU had to do so far.
    pub fn fallbacks(&self) -> Fallbacks {
        self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tries on the device; `None` when the CPU must.
    pub(crate) fn try_on_device<R>(&self, run: impl FnOnce(&Lane) -> Result<R, CudaError>) -> Option<R> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let lane = idle.map_or_else(|| self.device.lane(), Ok);
        let result = lane.and_then(|lane| {
            let result = run(&lane);
            if result.is_ok() {
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
            }
            result
        });
        result
            .map_err(|error| {
                let mut fallbacks = self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner);
                fallbacks.operations += 1;
                fallbacks.first.get_or_insert(error);
            })
            .ok()
    }
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }
}

impl<T: Real + Qr> Kernels<T> for Cuda
where
    Faer: Kernels<T>,
{
    fn gemm(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        mut c: ArrayViewMut2<'_, T>,
        accumulate: Accumulate,
    ) {
        let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
        let product = self.try_on_device(|lane| {
            let ((a, at), (b, bt)) = (upload(lane, a)?, upload(lane, b)?);
            let mut out = lane.zeros::<T>(m * n)?;
            lane.product((m, n, k), (&a, at), (&b, bt), (&mut out, Operand::rows(n)), 1)?;
            array(lane, &out, (m, n))
        });
        match (product, accumulate) {
            (Some(product), Accumulate::Replace) => c.assign(&product),
            (Some(product), Accumulate::Add) => c += &product,
            (None, accumulate) => self.cpu.gemm(a, b, c, accumulate),
        }
    }

    fn gram_add(&self, gram: &mut Array2<T>, block: ArrayView2<'_, T>) {
        let block = block.as_standard_layout();
        let size = block.ncols();
        let product = self.try_on_device(|lane| {
            let x = lane.upload(block.as_slice().expect("standard layout"))?;
            let triangle = lane.gram(&x, block.dim(), Outer::Cols)?;
            array(lane, &triangle, (size, size))
        });
        match product {
            Some(product) => {
                for i in 0..size {
                    let mut row = gram.slice_mut(s![i, ..=i]);
                    row += &product.slice(s![i, ..=i]);
                }
            }
            None => self.cpu.gram_add(gram, block.view()),
        }
    }

    fn eigh(&self, gram: Array2<T>, count: usize) -> Result<Eigen<T>, ComputeError> {
        let size = gram.nrows();
        let done = self.try_on_device(|lane| {
            let mut a = lane.upload(gram.as_standard_layout().as_slice().expect("standard layout"))?;
            let values = lane.symmetric_eigen(&mut a, size, Wanted::Vectors)?;
            let values: Vec<T> = lane.download(&values, 0, size)?;
            // They rise: the wanted ones are the last, backwards.
            let rising: Vec<T> = lane.download(&a, (size - count) * size, count * size)?;
            Ok((values, rising))
        });
        let Some((values, rising)) = done else { return self.cpu.eigh(gram, count) };
        let mut vectors = Vec::with_capacity(rising.len());
        rising.rchunks_exact(size.max(1)).for_each(|vector| vectors.extend_from_slice(vector));
        let vectors = Array2::from_shape_vec((size, count).f(), vectors).expect("count vectors were read");
        Ok(Eigen { values: values.into_iter().rev().collect(), vectors })
    }

    fn eigvalsh(&self, gram: Array2<T>) -> Result<Vec<T>, ComputeError> {
        let size = gram.nrows();
        let values = self.try_on_device(|lane| {
            let mut a = lane.upload(gram.as_standard_layout().as_slice().expect("standard layout"))?;
            let values = lane.symmetric_eigen(&mut a, size, Wanted::Values)?;
            lane.download(&values, 0, size)
        });
        match values {
            Some(values) => Ok(values.into_iter().rev().collect()),
            None => self.cpu.eigvalsh(gram),
        }
    }

    fn upper_subspace(
        &self,
        gram: Array2<T>,
        split: &Split,
        omega: Array2<T>,
    ) -> Result<Option<Array2<T>>, ComputeError> {
        let size = gram.nrows();
        let found = self.try_on_device(|lane| {
            let on_device = |array: &Array2<T>| {
                lane.upload(array.as_standard_layout().as_slice().expect("standard layout"))
            };
            match lane.upper_subspace(on_device(&gram)?, size, split, &on_device(&omega)?)? {
                Some((q, _)) => lane.download(&q, 0, q.len()).map(Some),
                None => Ok(None),
            }
        });
        match found {
            Some(found) => Ok(found.map(|q| {
                Array2::from_shape_vec((size, split.above).f(), q).expect("as many as there are columns")
            })),
            None => self.cpu.upper_subspace(gram, split, omega),
        }
    }

    /// On the CPU: a reference, which must not share its errors with what it checks.
    fn singular_values(&self, a: Array2<T>) -> Result<Vec<T>, ComputeError> {
        self.cpu.singular_values(a)
    }

    // cuSOLVER has no QR with column pivoting.
    fn qr_pivoted(&self, a: Array2<T>) -> Result<PivotedQr<T>, ComputeError> {
        self.cpu.qr_pivoted(a)
    }

    fn thin_qr(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError> {
        let (rows, cols) = y.dim();
        assert!(rows >= cols, "thin QR of a wide matrix");
        let q = self.try_on_device(|lane| {
            // Row-major Yᵀ is Y column after column.
            let columns = y.t();
            let mut q = lane.upload(columns.as_standard_layout().as_slice().expect("standard layout"))?;
            lane.thin_q(&mut q, (rows, cols))?;
            lane.download(&q, 0, rows * cols)
        });
        match q {
            Some(q) => Ok(Array2::from_shape_vec((rows, cols).f(), q).expect("as many as were sent")),
            None => self.cpu.thin_qr(y),
        }
    }

    fn gram(&self, w: &Tensor, side: Side) -> Array2<T> {
        let shape = matrix_shape(w);
        let (_, size) = side.dims(shape);
        let outer = match side {
            Side::Rows => Outer::Rows,
            Side::Cols => Outer::Cols,
        };
        let gram = self.try_on_device(|lane| {
            let wide = lane.upload_widened::<T>(w)?;
            let gram = lane.gram(&wide, (shape.rows, shape.cols), outer)?;
            array(lane, &gram, (size, size))
        });
        gram.unwrap_or_else(|| self.cpu.gram(w, side))
    }

    fn apply(&self, w: &Tensor, side: Side, x: ArrayView2<'_, T>) -> Array2<T> {
        let product = self.try_on_device(|lane| {
            let (out, dims) = stored_product(lane, w, side, Direction::Forward, x)?;
            array(lane, &out, dims)
        });
        product.unwrap_or_else(|| self.cpu.apply(w, side, x))
    }

    fn project(&self, w: &Tensor, side: Side, x: ArrayView2<'_, T>) -> Array2<f32> {
        let product = self.try_on_device(|lane| {
            let (out, dims) = stored_product(lane, w, side, Direction::Forward, x)?;
            array(lane, &narrowed(lane, out)?, dims)
        });
        product.unwrap_or_else(|| self.cpu.project(w, side, x))
    }

    fn apply_transposed(&self, w: &Tensor, side: Side, y: ArrayView2<'_, T>) -> Array2<T> {
        let product = self.try_on_device(|lane| {
            let (out, dims) = stored_product(lane, w, side, Direction::Back, y)?;
            array(lane, &out, dims)
        });
        product.unwrap_or_else(|| self.cpu.apply_transposed(w, side, y))
    }
}

/// A X or AᵀY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Back,
}

/// The product of a stored matrix or its transpose with x; → on the device, and its dimensions.
fn stored_product<T: Element>(
    lane: &Lane,
    w: &Tensor,
    side: Side,
    direction: Direction,
    x: ArrayView2<'_, T>,
) -> Result<(Buffer<T>, (usize, usize)), CudaError> {
    let shape = matrix_shape(w);
    // A is W for `Cols` and Wᵀ for `Rows`; going back transposes once more.
    let transposed = (side == Side::Rows) != (direction == Direction::Back);
    let (m, k) = if transposed { (shape.cols, shape.rows) } else { (shape.rows, shape.cols) };
    assert_eq!(x.nrows(), k);
    let n = x.ncols();
    let wide = lane.upload_widened::<T>(w)?;
    let (x, xt) = upload(lane, x)?;
    let mut out = lane.zeros::<T>(m * n)?;
    let operand = Operand { transposed, ..Operand::rows(shape.cols) };
    lane.product((m, n, k), (&wide, operand), (&x, xt), (&mut out, Operand::rows(n)), 1)?;
    Ok((out, (m, n)))
}

/// An array on the device; columns without gaps are sent as they are and transposed in the product.
fn upload<T: Element>(lane: &Lane, array: ArrayView2<'_, T>) -> Result<(Buffer<T>, Operand), CudaError> {
    let (rows, cols) = array.dim();
    if !array.is_standard_layout() && array.t().is_standard_layout() {
        let values = array.as_slice_memory_order().expect("columns without gaps");
        return Ok((lane.upload(values)?, Operand::transposed(rows)));
    }
    let array: CowArray<'_, T, Ix2> = array.as_standard_layout();
    Ok((lane.upload(array.as_slice().expect("standard layout"))?, Operand::rows(cols)))
}

/// A row-major buffer on the host.
fn array<T: Element>(lane: &Lane, buffer: &Buffer<T>, dims: (usize, usize)) -> Result<Array2<T>, CudaError> {
    let values = lane.download(buffer, 0, buffer.len())?;
    Ok(Array2::from_shape_vec(dims, values).expect("the buffer was made for these dimensions"))
}
