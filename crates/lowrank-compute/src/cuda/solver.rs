//! Eigenvectors and QR by cuSOLVER, which reads columns.

use super::error::{CudaError, During};
use super::lane::{Arg, Buffer, Lane, Work};
use super::products::Element;
use cudarc::cusolver::sys::{self, cublasFillMode_t, cusolverEigMode_t};
use cudarc::cusolver::{CusolverError, result};

/// What is wanted of an eigenproblem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Values,
    Vectors,
}

impl Lane {
    /// Eigenvalues of a symmetric matrix [size, size], of which the lower triangle is read, rising; → on the device.
    /// If wanted, `a` becomes the eigenvectors, one after another, in the same order.
    pub(super) fn symmetric_eigen<T: Element>(
        &self,
        a: &mut Buffer<T>,
        size: usize,
        wanted: Wanted,
    ) -> Result<Buffer<T>, CudaError> {
        assert_eq!(a.len(), size * size);
        let args = [self.write(a), Arg::Int(size as i64)];
        // SAFETY: mirror_lower_*(T* a, i64 size); a is [size, size].
        unsafe { self.launch(T::mirror_lower(&self.device.functions), Work::Elements(size * size), &args) }?;
        let values = self.zeros::<T>(size)?;
        let info = self.zeros::<i32>(1)?;
        let mode = match wanted {
            Wanted::Values => cusolverEigMode_t::CUSOLVER_EIG_MODE_NOVECTOR,
            Wanted::Vectors => cusolverEigMode_t::CUSOLVER_EIG_MODE_VECTOR,
        };
        // The matrix is symmetric now, so that either triangle does.
        let triangle = cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
        self.bind()?;
        let params = Params::new()?;
        let (handle, n) = (self.solver.cu(), size as i64);
        let (matrix, target) =
            (self.pointer(a) as *mut std::ffi::c_void, self.pointer(&values) as *mut std::ffi::c_void);
        let (mut device_bytes, mut host_bytes) = (0_usize, 0_usize);
        // SAFETY: matrix and values are buffers of this lane of n × n and n numbers of type T.
        unsafe {
            sys::cusolverDnXsyevd_bufferSize(
                handle,
                params.0,
                mode,
                triangle,
                n,
                T::SOLVER,
                matrix,
                n,
                T::SOLVER,
                target,
                T::SOLVER,
                &mut device_bytes,
                &mut host_bytes,
            )
        }
        .result()
        .during("sizing an eigenproblem")?;
        let on_device = self.zeros::<u8>(device_bytes)?;
        let mut on_host = vec![0_u64; host_bytes.div_ceil(8)];
        // SAFETY: as above, and both workspaces have the sizes that were asked for; they and `params` live until the
        // stream has been waited for, below.
        let started = unsafe {
            sys::cusolverDnXsyevd(
                handle,
                params.0,
                mode,
                triangle,
                n,
                T::SOLVER,
                matrix,
                n,
                T::SOLVER,
                target,
                T::SOLVER,
                self.pointer(&on_device) as *mut std::ffi::c_void,
                device_bytes,
                on_host.as_mut_ptr().cast(),
                host_bytes,
                self.pointer(&info) as *mut i32,
            )
        }
        .result();
        let code = self.download(&info, 0, 1)?[0];
        started.during("an eigenproblem")?;
        match code {
            0 => Ok(values),
            info => Err(CudaError::NoConvergence { context: "an eigenproblem", info }),
        }
    }

    /// Y [rows, cols], stored column after column, becomes the Q of its thin QR, stored likewise. rows ≥ cols.
    pub(super) fn thin_q<T: Qr>(
        &self,
        y: &mut Buffer<T>,
        (rows, cols): (usize, usize),
    ) -> Result<(), CudaError> {
        assert!(y.len() == rows * cols && rows >= cols);
        let int = |value: usize| i32::try_from(value).expect("dimensions of a QR are below 2³¹");
        let (m, n, handle) = (int(rows), int(cols), self.solver.cu());
        self.bind()?;
        let tau = self.zeros::<T>(cols)?;
        let info = self.zeros::<i32>(2)?;
        let (a, t) = (self.pointer(y) as *mut T, self.pointer(&tau) as *mut T);
        let (mut factor, mut apply) = (0, 0);
        // SAFETY: a and t are buffers of this lane of m × n and n numbers of type T; the sizes are written.
        unsafe {
            T::geqrf_size(handle, (m, n), a, &mut factor).result().during("sizing a QR")?;
            T::orgqr_size(handle, (m, n), a, t, &mut apply).result().during("sizing a Q")?;
        }
        let work_len = factor.max(apply).max(1);
        let work = self.zeros::<T>(work_len as usize)?;
        let (w, codes) = (self.pointer(&work) as *mut T, self.pointer(&info) as *mut i32);
        // SAFETY: as above; the workspace has the larger of the sizes that were asked for, and `info` two numbers. All live
        // until the stream has been waited for, below.
        let started = unsafe {
            T::geqrf(handle, (m, n), a, t, w, work_len, codes)
                .result()
                .and_then(|()| T::orgqr(handle, (m, n), a, t, w, work_len, codes.add(1)).result())
        };
        let codes = self.download(&info, 0, 2)?;
        started.during("a QR")?;
        match codes.iter().find(|code| **code != 0) {
            None => Ok(()),
            Some(&info) => Err(CudaError::NoConvergence { context: "a QR", info }),
        }
    }
}

/// cuSOLVER's parameters, destroyed when dropped.
struct Params(sys::cusolverDnParams_t);

impl Params {
    fn new() -> Result<Self, CudaError> {
        result::dn_create_params().map(Self).during("starting cuSOLVER")
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. A failure leaks a few bytes.
        let _: Result<(), CusolverError> = unsafe { result::dn_destroy_params(self.0) };
    }
}

type Handle = sys::cusolverDnHandle_t;
type Status = sys::cusolverStatus_t;

/// The two QR routines of each precision.
///
/// # Safety
/// As cuSOLVER's functions of these names.
pub(super) trait Qr: Element {
    unsafe fn geqrf_size(handle: Handle, shape: (i32, i32), a: *mut Self, size: &mut i32) -> Status;
    unsafe fn orgqr_size(
        handle: Handle,
        shape: (i32, i32),
        a: *const Self,
        tau: *const Self,
        size: &mut i32,
    ) -> Status;
    unsafe fn geqrf(
        handle: Handle,
        shape: (i32, i32),
        a: *mut Self,
        tau: *mut Self,
        work: *mut Self,
        size: i32,
        info: *mut i32,
    ) -> Status;
    unsafe fn orgqr(
        handle: Handle,
        shape: (i32, i32),
        a: *mut Self,
        tau: *const Self,
        work: *mut Self,
        size: i32,
        info: *mut i32,
    ) -> Status;
}

macro_rules! qr {
    ($($real:ty, $geqrf:ident, $geqrf_size:ident, $orgqr:ident, $orgqr_size:ident;)*) => {$(
        impl Qr for $real {
            unsafe fn geqrf_size(handle: Handle, (m, n): (i32, i32), a: *mut Self, size: &mut i32) -> Status {
                // SAFETY: the caller's promise.
                unsafe { sys::$geqrf_size(handle, m, n, a, m, size) }
            }
            unsafe fn orgqr_size(
                handle: Handle, (m, n): (i32, i32), a: *const Self, tau: *const Self, size: &mut i32,
            ) -> Status {
                // SAFETY: the caller's promise.
                unsafe { sys::$orgqr_size(handle, m, n, n, a, m, tau, size) }
            }
            unsafe fn geqrf(
                handle: Handle, (m, n): (i32, i32), a: *mut Self, tau: *mut Self, work: *mut Self, size: i32, info: *mut i32,
            ) -> Status {
                // SAFETY: the caller's promise.
                unsafe { sys::$geqrf(handle, m, n, a, m, tau, work, size, info) }
            }
            unsafe fn orgqr(
                handle: Handle, (m, n): (i32, i32), a: *mut Self, tau: *const Self, work: *mut Self, size: i32,
                info: *mut i32,
            ) -> Status {
                // SAFETY: the caller's promise.
                unsafe { sys::$orgqr(handle, m, n, n, a, m, tau, work, size, info) }
            }
        }
    )*};
}

qr! {
    f32, cusolverDnSgeqrf, cusolverDnSgeqrf_bufferSize, cusolverDnSorgqr, cusolverDnSorgqr_bufferSize;
    f64, cusolverDnDgeqrf, cusolverDnDgeqrf_bufferSize, cusolverDnDorgqr, cusolverDnDorgqr_bufferSize;
}
