//! Products of matrices by cuBLAS.
//!
//! cuBLAS reads columns: a row-major X [r, c] is Xᵀ to it. So C = A B is asked for as Cᵀ = Bᵀ Aᵀ, with the operands
//! swapped and their flags kept. f32 is computed in f32, never in TF32.

use super::device::Functions;
use super::error::{CudaError, During};
use super::lane::{Arg, Buffer, Lane, Work};
use cudarc::cublas::result;
use cudarc::cublas::sys::{
    self, cublasComputeType_t, cublasFillMode_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use cudarc::cusolver::sys as solver;
use cudarc::driver::{CudaFunction, DeviceRepr, ValidAsZeroBits};
use lowrank_model::{Dtype, Tensor};

/// A number that is computed in.
pub(super) trait Element:
    DeviceRepr + ValidAsZeroBits + Default + Clone + Input<Sum = Self> + std::fmt::Debug
{
    /// Its type to cuSOLVER.
    const SOLVER: solver::cudaDataType;

    fn widen(functions: &Functions, from: Dtype) -> &CudaFunction;
    fn mirror_lower(functions: &Functions) -> &CudaFunction;
    fn affine(functions: &Functions) -> &CudaFunction;
    fn diagonal(functions: &Functions) -> &CudaFunction;
    fn to_f32(functions: &Functions) -> &CudaFunction;
    /// To nearest, as an argument of a kernel.
    fn argument(value: f64) -> Arg;
    /// C += A Aᵀ or AᵀA in columns, one triangle.
    ///
    /// # Safety
    /// As `cublasSsyrk`.
    unsafe fn syrk(
        handle: sys::cublasHandle_t,
        uplo: cublasFillMode_t,
        trans: cublasOperation_t,
        sizes: (i32, i32),
        a: (*const Self, i32),
        c: (*mut Self, i32),
    ) -> sys::cublasStatus_t;
}

/// A number that products take in.
pub(super) trait Input: DeviceRepr {
    /// What products of it are summed in.
    type Sum: Element;
    /// Its type to cuBLAS.
    const TYPE: cudaDataType_t;
    /// How cuBLAS computes with it.
    const COMPUTE: cublasComputeType_t;
    /// 1 and 0 of the sums.
    const SCALES: [Self::Sum; 2];
}

macro_rules! inputs {
    ($($real:ty, $sum:ty, $kind:ident, $compute:ident;)*) => {$(
        impl Input for $real {
            type Sum = $sum;
            const TYPE: cudaDataType_t = cudaDataType_t::$kind;
            const COMPUTE: cublasComputeType_t = cublasComputeType_t::$compute;
            const SCALES: [$sum; 2] = [1.0, 0.0];
        }
    )*};
}

inputs! {
    f32, f32, CUDA_R_32F, CUBLAS_COMPUTE_32F;
    f64, f64, CUDA_R_64F, CUBLAS_COMPUTE_64F;
    // The bits of a bf16.
    u16, f32, CUDA_R_16BF, CUBLAS_COMPUTE_32F;
}

macro_rules! elements {
    ($($real:ty, $kind:ident, $argument:ident, $syrk:ident, $f32:ident, $f16:ident, $bf16:ident, $mirror:ident,
       $affine:ident, $diagonal:ident, $to_f32:ident;)*) => {$(
        impl Element for $real {
            const SOLVER: solver::cudaDataType = solver::cudaDataType_t::$kind;

            fn widen(functions: &Functions, from: Dtype) -> &CudaFunction {
                match from {
                    Dtype::F32 => &functions.$f32,
                    Dtype::F16 => &functions.$f16,
                    Dtype::Bf16 => &functions.$bf16,
                }
            }

            fn mirror_lower(functions: &Functions) -> &CudaFunction {
                &functions.$mirror
            }

            fn affine(functions: &Functions) -> &CudaFunction {
                &functions.$affine
            }

            fn diagonal(functions: &Functions) -> &CudaFunction {
                &functions.$diagonal
            }

            fn argument(value: f64) -> Arg {
                Arg::$argument(value as $real)
            }

            fn to_f32(functions: &Functions) -> &CudaFunction {
                &functions.$to_f32
            }

            unsafe fn syrk(
                handle: sys::cublasHandle_t,
                uplo: cublasFillMode_t,
                trans: cublasOperation_t,
                (n, k): (i32, i32),
                (a, lda): (*const Self, i32),
                (c, ldc): (*mut Self, i32),
            ) -> sys::cublasStatus_t {
                let [one, _] = Self::SCALES;
                // SAFETY: the caller's promise.
                unsafe { sys::$syrk(handle, uplo, trans, n, k, &one, a, lda, &one, c, ldc) }
            }
        }
    )*};
}

elements! {
    f32, CUDA_R_32F, Float, cublasSsyrk_v2, widen_f32_f32, widen_f16_f32, widen_bf16_f32, mirror_lower_f32,
        affine_f32, diagonal_f32, widen_f32_f32;
    f64, CUDA_R_64F, Double, cublasDsyrk_v2, widen_f32_f64, widen_f16_f64, widen_bf16_f64, mirror_lower_f64,
        affine_f64, diagonal_f64, narrow_f64_f32;
}

/// Where a row-major matrix lies in its buffer, and how it enters a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operand {
    /// Index of its first element.
    pub(super) first: usize,
    /// Elements from one stored row to the next.
    pub(super) leading: usize,
    /// Whether the product takes its transpose.
    pub(super) transposed: bool,
    /// Elements from one matrix of a batch to the next.
    pub(super) stride: usize,
}

impl Operand {
    /// Rows of `cols` numbers from the start of a buffer.
    pub(super) fn rows(cols: usize) -> Self {
        Self { first: 0, leading: cols, transposed: false, stride: 0 }
    }

    /// The transpose of such rows.
    pub(super) fn transposed(cols: usize) -> Self {
        Self { transposed: true, ..Self::rows(cols) }
    }

    fn flag(self) -> cublasOperation_t {
        if self.transposed { cublasOperation_t::CUBLAS_OP_T } else { cublasOperation_t::CUBLAS_OP_N }
    }

    /// Asserts that [rows, cols] of every matrix of a batch lies within `len` numbers.
    fn assert_within(self, (rows, cols): (usize, usize), batch: usize, len: usize) {
        let (rows, cols) = if self.transposed { (cols, rows) } else { (rows, cols) };
        assert!(cols <= self.leading, "rows of {cols} numbers every {}", self.leading);
        let end = self.first + (batch - 1) * self.stride + (rows - 1) * self.leading + cols;
        assert!(end <= len, "a matrix reaches to {end} of {len} numbers");
    }
}

fn int(value: usize) -> i32 {
    i32::try_from(value).expect("dimensions of a product are below 2³¹")
}

impl Lane {
    /// A stored tensor, widened on the device: its bytes travel as they are stored.
    pub(super) fn upload_widened<T: Element>(&self, tensor: &Tensor) -> Result<Buffer<T>, CudaError> {
        let stored = self.upload(tensor.bytes())?;
        let mut wide = self.zeros(tensor.elements())?;
        let function = T::widen(&self.device.functions, tensor.dtype());
        let elements = tensor.elements();
        let args = [self.write(&mut wide), self.read(&stored), Arg::Int(elements as i64)];
        // SAFETY: widen_*(T* out, const stored* in, i64 elements); both hold `elements` numbers of their types.
        unsafe { self.launch(function, Work::Elements(elements), &args) }?;
        Ok(wide)
    }

    /// C = A B for each of a batch: [m, k] × [k, n] → [m, n]. C replaces what was there.
    pub(super) fn product<I: Input>(
        &self,
        (m, n, k): (usize, usize, usize),
        (a, at): (&Buffer<I>, Operand),
        (b, bt): (&Buffer<I>, Operand),
        (c, ct): (&mut Buffer<I::Sum>, Operand),
        batch: usize,
    ) -> Result<(), CudaError> {
        if m == 0 || n == 0 || batch == 0 {
            return Ok(());
        }
        assert!(k > 0 && !ct.transposed);
        assert!(
            batch == 1 || apart(ct, (m, n)) || interleaved(ct, n, batch),
            "the results of a batch overlap"
        );
        at.assert_within((m, k), batch, a.len());
        bt.assert_within((k, n), batch, b.len());
        ct.assert_within((m, n), batch, c.len());
        self.bind()?;
        let pointer = |base: u64, operand: Operand, size: usize| {
            (base + (operand.first * size) as u64) as *mut std::ffi::c_void
        };
        let (size_in, size_out) = (size_of::<I>(), size_of::<I::Sum>());
        let [one, zero] = I::SCALES;
        // SAFETY: the three matrices lie within their buffers, as was just asserted, in the types that are named; the
        // handle and the buffers are of this lane's stream, and the scales are read before the call returns.
        unsafe {
            result::gemm_strided_batched_ex(
                *self.blas.handle(),
                bt.flag(),
                at.flag(),
                int(n),
                int(m),
                int(k),
                (&raw const one).cast(),
                pointer(self.pointer(b), bt, size_in),
                I::TYPE,
                int(bt.leading),
                bt.stride as i64,
                pointer(self.pointer(a), at, size_in),
                I::TYPE,
                int(at.leading),
                at.stride as i64,
                (&raw const zero).cast(),
                pointer(self.pointer(c), ct, size_out),
                I::Sum::TYPE,
                int(ct.leading),
                ct.stride as i64,
                int(batch),
                I::COMPUTE,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .during("a product")
    }

    /// The lower triangle of XᵀX for X [rows, cols], or of X Xᵀ; zero above.
    pub(super) fn gram<T: Element>(
        &self,
        x: &Buffer<T>,
        (rows, cols): (usize, usize),
        outer: Outer,
    ) -> Result<Buffer<T>, CudaError> {
        assert_eq!(x.len(), rows * cols);
        // To cuBLAS X is Y = Xᵀ [cols, rows]: XᵀX = Y Yᵀ, X Xᵀ = Yᵀ Y, and our lower triangle is its upper one.
        let (size, summed, flag) = match outer {
            Outer::Cols => (cols, rows, cublasOperation_t::CUBLAS_OP_N),
            Outer::Rows => (rows, cols, cublasOperation_t::CUBLAS_OP_T),
        };
        let mut gram = self.zeros::<T>(size * size)?;
        self.bind()?;
        let Arg::Pointer(target) = self.write(&mut gram) else { unreachable!("a buffer is a pointer") };
        // SAFETY: x holds cols × rows numbers in columns of `cols`, the result size × size; both are of this lane.
        unsafe {
            T::syrk(
                *self.blas.handle(),
                cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                flag,
                (int(size), int(summed)),
                (self.pointer(x) as *const T, int(cols)),
                (target as *mut T, int(size)),
            )
        }
        .result()
        .during("a Gram matrix")?;
        Ok(gram)
    }
}

/// Which side of a matrix keeps its dimension in a Gram matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outer {
    /// X Xᵀ.
    Rows,
    /// XᵀX.
    Cols,
}

/// Whether each matrix of a batch begins where the one before has ended.
fn apart(c: Operand, (m, n): (usize, usize)) -> bool {
    c.stride >= (m - 1) * c.leading + n
}

/// Whether the matrices of a batch lie side by side in the same rows.
fn interleaved(c: Operand, n: usize, batch: usize) -> bool {
    c.stride >= n && (batch - 1) * c.stride + n <= c.leading
}
