//! Where the linear algebra of a job runs: one choice for all of its matrices, made by whoever starts the job and never by
//! what a machine happens to have (`docs/decisions/0007-algebra-is-chosen.md`).
//!
//! A matrix is computed by one processor from end to end. What the device cannot do, because the matrix does not fit its
//! memory or a library refuses, the CPU does again from the beginning, so that the bits are always those of one of the two.

use crate::{Backend, Faer};
use lowrank_model::{AlgebraChoice, MatrixShape};
use std::fmt;

/// Why what was asked for cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct NoDevice {
    /// One line.
    pub why: String,
}

/// What computed a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// faer.
    Cpu,
    /// The CUDA device.
    Cuda,
}

impl Processor {
    /// The CPU if either is.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if self == other { self } else { Self::Cpu }
    }
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// Work that the CPU did in place of the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Substituted {
    /// How often.
    pub times: usize,
    /// Why the first time.
    pub first: Option<String>,
}

/// A backend for whole matrices, several threads at once.
#[derive(Debug)]
pub struct Algebra {
    #[cfg(feature = "cuda")]
    device: Option<device::Device>,
}

impl Algebra {
    /// faer on the CPU.
    pub fn cpu() -> Self {
        Self {
            #[cfg(feature = "cuda")]
            device: None,
        }
    }

    /// What was asked for, or why there is none.
    #[cfg(feature = "cuda")]
    pub fn open(choice: AlgebraChoice) -> Result<Self, NoDevice> {
        match choice {
            AlgebraChoice::Cpu => Ok(Self::cpu()),
            AlgebraChoice::Cuda => match device::Device::open() {
                Ok(device) => Ok(Self { device: Some(device) }),
                Err(why) => Err(NoDevice { why }),
            },
        }
    }

    /// What was asked for, or why there is none.
    #[cfg(not(feature = "cuda"))]
    pub fn open(choice: AlgebraChoice) -> Result<Self, NoDevice> {
        match choice {
            AlgebraChoice::Cpu => Ok(Self::cpu()),
            AlgebraChoice::Cuda => Err(NoDevice { why: "this program was built without CUDA".into() }),
        }
    }

    /// `cpu`, or the device's name and compute capability: what the bits depend on.
    pub fn identity(&self) -> String {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            return device.identity();
        }
        Processor::Cpu.to_string()
    }

    /// Does the work of one matrix. On a device it waits until there is room for the matrix; it is done a second time, by
    /// the CPU, if the device could not do all of it.
    pub fn run<R>(&self, shape: MatrixShape, work: impl Fn(&dyn Backend) -> R) -> (R, Processor) {
        #[cfg(feature = "cuda")]
        if let Some(done) = self.device.as_ref().and_then(|device| device.run(shape, |cuda| work(cuda))) {
            return (done, Processor::Cuda);
        }
        let _ = shape;
        (work(&Faer), Processor::Cpu)
    }

    /// What the CPU had to do so far in place of the device.
    pub fn substituted(&self) -> Substituted {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            return device.substituted();
        }
        Substituted::default()
    }
}

#[cfg(feature = "cuda")]
mod device {
    //! A CUDA device with room for so many matrices.

    use super::Substituted;
    use crate::cuda::Cuda;
    use lowrank_model::MatrixShape;
    use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

    #[derive(Debug)]
    pub(super) struct Device {
        cuda: Cuda,
        room: Room,
        substituted: Mutex<Substituted>,
    }

    impl Device {
        pub(super) fn open() -> Result<Self, String> {
            let cuda = Cuda::new().map_err(|why| why.to_string())?;
            let free = cuda.device().free_bytes().map_err(|error| error.to_string())?;
            // A tenth for the libraries' own workspaces.
            Ok(Self { cuda, room: Room::new(free / 10 * 9), substituted: Mutex::default() })
        }

        pub(super) fn identity(&self) -> String {
            self.cuda.device().identity()
        }

        pub(super) fn substituted(&self) -> Substituted {
            locked(&self.substituted).clone()
        }

        pub(super) fn run<R>(&self, shape: MatrixShape, work: impl FnOnce(&Cuda) -> R) -> Option<R> {
            let needed = device_bytes(shape);
            let Some(_room) = self.room.enter(needed) else {
                self.substitute(format!(
                    "a matrix needs {needed} bytes on the device and {} are free",
                    self.room.all_bytes
                ));
                return None;
            };
            let session = self.cuda.session();
            let done = work(&session);
            match session.fallbacks().first {
                None => Some(done),
                Some(why) => {
                    self.substitute(why.to_string());
                    None
                }
            }
        }

        fn substitute(&self, why: String) {
            let mut substituted = locked(&self.substituted);
            substituted.times += 1;
            substituted.first.get_or_insert(why);
        }
    }

    /// What one matrix [m, n] needs at worst, in f64: stored, widened and multiplied, beside its Gram matrix with
    /// eigenvectors and workspace.
    pub(super) fn device_bytes(shape: MatrixShape) -> u64 {
        let (stored, short) = (shape.rows as u64 * shape.cols as u64, shape.short_side() as u64);
        stored * (4 + 8 + 8) + short * short * 8 * 8
    }

    /// Memory that matrices enter and leave.
    #[derive(Debug)]
    pub(super) struct Room {
        all_bytes: u64,
        free_bytes: Mutex<u64>,
        left: Condvar,
    }

    impl Room {
        pub(super) fn new(all_bytes: u64) -> Self {
            Self { all_bytes, free_bytes: Mutex::new(all_bytes), left: Condvar::new() }
        }

        /// Waits for room; `None` if there will never be enough.
        pub(super) fn enter(&self, bytes: u64) -> Option<Inside<'_>> {
            if bytes > self.all_bytes {
                return None;
            }
            let mut free = locked(&self.free_bytes);
            while *free < bytes {
                free = self.left.wait(free).unwrap_or_else(PoisonError::into_inner);
            }
            *free -= bytes;
            Some(Inside { room: self, bytes })
        }
    }

    /// Leaves when dropped.
    #[derive(Debug)]
    pub(super) struct Inside<'a> {
        room: &'a Room,
        bytes: u64,
    }

    impl Drop for Inside<'_> {
        fn drop(&mut self) {
            *locked(&self.room.free_bytes) += self.bytes;
            self.room.left.notify_all();
        }
    }

    fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::algebra::{Algebra, Processor};
        use crate::cuda::CudaError;
        use crate::{Backend, Faer, Side};
        use lowrank_model::AlgebraChoice;
        use lowrank_model::{Dtype, Tensor};
        use ndarray::Array2;
        use std::sync::atomic::{AtomicU64, Ordering};

        #[test]
        fn no_more_is_inside_than_there_is_room_for() {
            let room = Room::new(10);
            assert!(room.enter(11).is_none());
            let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for thread in 0..8 {
                    let (room, now, most) = (&room, &now, &most);
                    scope.spawn(move || {
                        for _ in 0..50 {
                            let bytes = 2 + thread % 4;
                            let _inside = room.enter(bytes).unwrap();
                            most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                            std::thread::yield_now();
                            now.fetch_sub(bytes, Ordering::SeqCst);
                        }
                    });
                }
            });
            assert!((2..=10).contains(&most.into_inner()));
            assert_eq!(*room.free_bytes.lock().unwrap(), 10);
        }

        #[test]
        #[ignore = "needs a CUDA device: --include-ignored"]
        fn what_the_device_cannot_do_whole_is_left_to_the_cpu_and_counted() {
            let mut algebra = Algebra::open(AlgebraChoice::Cuda).unwrap();
            let values: Vec<f32> = (0..60 * 40).map(|i| (i * 37 % 101) as f32 / 64.0).collect();
            let w = Tensor::from_f32(vec![60, 40], Dtype::Bf16, &values).unwrap();
            let shape = MatrixShape { rows: 60, cols: 40 };
            let gram = |backend: &dyn Backend| -> Array2<f32> { backend.gram(&w, Side::Cols) };
            let (_, processor) = algebra.run(shape, gram);
            assert_eq!((processor, algebra.substituted().times), (Processor::Cuda, 0));

            // One operation of many fails: nothing of what the device did is kept.
            let device = algebra.device.as_ref().unwrap();
            let done = device.run(shape, |cuda| {
                let product = gram(cuda);
                let full = CudaError::OutOfMemory { context: "a test" };
                assert_eq!(cuda.try_on_device(|_| Err::<(), _>(full)), None);
                product
            });
            assert_eq!((done, algebra.substituted().times), (None, 1));

            // A matrix that can never fit is not tried.
            algebra.device.as_mut().unwrap().room = Room::new(device_bytes(shape) - 1);
            let (product, processor) = algebra.run(shape, gram);
            assert_eq!((processor, product), (Processor::Cpu, gram(&Faer)));
            let Substituted { times, first } = algebra.substituted();
            assert_eq!(times, 2);
            assert!(first.unwrap().contains("too little free memory"));
        }
    }
}
