//! One stream of work on a device, and the memory it works on.

use super::device::CudaDevice;
use super::error::{CudaError, During};
use super::kernels::THREADS;
use super::staging::Staging;
use cudarc::cublas::CudaBlas;
use cudarc::cusolver::DnHandle;
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, ValidAsZeroBits,
};
use lowrank_model::{Dtype, Tensor};
use std::sync::Arc;

/// A stream with its own cuBLAS and cuSOLVER handles: what is asked of it happens in order. Used by one thread at a time.
#[derive(Debug)]
pub struct Lane {
    pub(super) device: Arc<CudaDevice>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) blas: CudaBlas,
    pub(super) solver: DnHandle,
    staging: Staging,
    /// cuBLAS's handle must not be used by two threads at once.
    _one_thread: std::marker::PhantomData<std::cell::Cell<()>>,
}

/// Numbers on a device, of the lane that made them.
#[derive(Debug)]
pub struct Buffer<T> {
    slice: CudaSlice<T>,
    len: usize,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Pointer(u64),
    Int(i64),
    Float(f32),
    Double(f64),
}

/// How much work a kernel has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    /// A thread per element, or fewer.
    Elements(usize),
    /// A block per row.
    Rows(usize),
}

/// Blocks of a kernel over elements, at most: each thread then takes several.
const ELEMENT_BLOCKS_MAX: usize = 1 << 16;

impl CudaDevice {
    /// A stream with its own cuBLAS and cuSOLVER handles.
    pub fn lane(self: &Arc<Self>) -> Result<Lane, CudaError> {
        Lane::new(self)
    }
}

impl Lane {
    fn new(device: &Arc<CudaDevice>) -> Result<Self, CudaError> {
        // An explicit stream: Xsyevd has a bug on the per-thread default stream.
        let stream = device.context.new_stream().during("making a stream")?;
        let blas = CudaBlas::new(stream.clone()).during("starting cuBLAS")?;
        let solver = DnHandle::new(stream.clone()).during("starting cuSOLVER")?;
        let staging = Staging::new(&stream)?;
        Ok(Self {
            device: device.clone(),
            stream,
            blas,
            solver,
            staging,
            _one_thread: std::marker::PhantomData,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    /// `len` zeros.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        // An allocation of nothing is an error to CUDA.
        let slice = self.stream.alloc_zeros(len.max(1)).during("allocating")?;
        Ok(Buffer { slice, len })
    }

    /// `len` numbers that are to be written before they are read.
    fn unwritten<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        // SAFETY: any bits of the device's memory are a T, as those of `zeros` are; nothing reads them on the host.
        let slice = unsafe { self.stream.alloc(len.max(1)) }.during("allocating")?;
        Ok(Buffer { slice, len })
    }

    /// Copies to the device.
    pub fn upload<T: DeviceRepr + ValidAsZeroBits>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let buffer = self.unwritten(values.len())?;
        // SAFETY: the buffer is of this lane's stream and holds as many numbers.
        unsafe { self.staging.upload(values, self.pointer(&buffer)) }?;
        Ok(buffer)
    }

    /// Copies `len` numbers from `first` on to the host, when everything before is done.
    pub fn download<T: DeviceRepr + ValidAsZeroBits + Default + Clone>(
        &self,
        buffer: &Buffer<T>,
        first: usize,
        len: usize,
    ) -> Result<Vec<T>, CudaError> {
        assert!(first + len <= buffer.len, "{first} + {len} of {} numbers", buffer.len);
        let mut values = vec![T::default(); len];
        let from = self.pointer(buffer) + (first * size_of::<T>()) as u64;
        // SAFETY: the buffer is of this lane's stream and holds `len` numbers from `first` on, whose bits are those of the
        // numbers that kernels and libraries wrote there.
        unsafe { self.staging.download(from, &mut values) }?;
        Ok(values)
    }

    /// Waits until everything that was asked for is done.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.stream.synchronize().during("waiting for the device")
    }

    /// The bit patterns of a stored bf16 tensor.
    pub(super) fn upload_bf16(&self, tensor: &Tensor) -> Result<Buffer<u16>, CudaError> {
        assert_eq!(tensor.dtype(), Dtype::Bf16);
        let bytes = self.upload(tensor.bytes())?;
        let len = bytes.len / 2;
        let pointer = bytes.slice.leak();
        // SAFETY: the pointer was just taken from its owner, lies on this stream and holds 2 · len bytes (or one, for no
        // numbers, of which none is then read); any bits are a u16.
        let slice = unsafe { self.stream.upgrade_device_ptr(pointer, len) };
        Ok(Buffer { slice, len })
    }

    /// Makes the device current on the calling thread, which calls to cuBLAS and cuSOLVER take for granted.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.stream.context().bind_to_thread().during("choosing the device")
    }

    pub(super) fn read<T>(&self, buffer: &Buffer<T>) -> Arg {
        Arg::Pointer(self.pointer(buffer))
    }

    pub(super) fn write<T>(&self, buffer: &mut Buffer<T>) -> Arg {
        Arg::Pointer(self.pointer(buffer))
    }

    /// What lies behind two buffers of this lane.
    pub(super) fn slices<'a, T>(
        &self,
        from: &'a Buffer<T>,
        to: &'a mut Buffer<T>,
    ) -> (&'a CudaSlice<T>, &'a mut CudaSlice<T>) {
        self.assert_own(&from.slice);
        self.assert_own(&to.slice);
        (&from.slice, &mut to.slice)
    }

    /// The address of a buffer of this lane.
    pub(super) fn pointer<T>(&self, buffer: &Buffer<T>) -> u64 {
        self.assert_own(&buffer.slice);
        let (pointer, guard) = buffer.slice.device_ptr(&self.stream);
        // With event tracking off it has nothing to record.
        drop(guard);
        pointer
    }

    fn assert_own<T>(&self, slice: &CudaSlice<T>) {
        assert!(slice.stream() == &self.stream, "a buffer is used on the lane that made it");
    }

    /// Starts a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and type, and what they point to is large enough.
    pub(super) unsafe fn launch(
        &self,
        function: &CudaFunction,
        work: Work,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let blocks = match work {
            Work::Elements(elements) => elements.div_ceil(THREADS as usize).min(ELEMENT_BLOCKS_MAX),
            Work::Rows(rows) => rows,
        };
        if blocks == 0 {
            return Ok(());
        }
        let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks <= i32::MAX as u32);
        let blocks = blocks.expect("a grid has fewer than 2³¹ blocks");
        let mut launch = self.stream.launch_builder(function);
        for arg in args {
            match arg {
                Arg::Pointer(value) => launch.arg(value),
                Arg::Int(value) => launch.arg(value),
                Arg::Float(value) => launch.arg(value),
                Arg::Double(value) => launch.arg(value),
            };
        }
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.during("starting a kernel")?;
        Ok(())
    }
}

impl<T> Buffer<T> {
    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
