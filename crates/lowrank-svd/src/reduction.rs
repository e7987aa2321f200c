//! What a spectrum leaves for the factors of the same matrix in the same norm: the decomposition that both need, done
//! once.
//!
//! A Gram matrix and its reduction to tridiagonal form are most of the work of either. Half a matrix of the short side is
//! worth keeping between the two passes of a run; the factors have the same bits with it and without it.

use lowrank_compute::{Backend, Real, Reduced};
use std::any::Any;

/// A reduced Gram matrix of one W, on its short side.
#[derive(Debug, Clone, PartialEq)]
pub struct Reduction {
    backend: &'static str,
    size: usize,
    numbers: ReductionNumbers,
}

/// The numbers of a [`Reduction`], to be stored and brought back.
#[derive(Debug, Clone, PartialEq)]
pub enum ReductionNumbers {
    /// Computed in f32.
    F32(Vec<f32>),
    /// Computed in f64.
    F64(Vec<f64>),
}

impl Reduction {
    /// `None` where a backend keeps the matrix as it is: making it again costs less than keeping it.
    pub(crate) fn of<T: Real>(backend: &dyn Backend, reduced: Reduced<T>) -> Option<Self> {
        let Reduced::Packed { size, numbers } = reduced else { return None };
        let numbers = match (Box::new(numbers) as Box<dyn Any>).downcast() {
            Ok(values) => ReductionNumbers::F32(*values),
            Err(values) => ReductionNumbers::F64(*values.downcast().expect("there are two precisions")),
        };
        Some(Self { backend: backend.name(), size, numbers })
    }

    /// Takes the numbers out, to be stored; the rest says to what they belong.
    pub fn take_numbers(&mut self) -> ReductionNumbers {
        match &mut self.numbers {
            ReductionNumbers::F32(values) => ReductionNumbers::F32(std::mem::take(values)),
            ReductionNumbers::F64(values) => ReductionNumbers::F64(std::mem::take(values)),
        }
    }

    /// Puts numbers back that were taken out of this.
    pub fn put_numbers(&mut self, numbers: ReductionNumbers) {
        self.numbers = numbers;
    }

    /// The reduced matrix, if this backend made it in this precision.
    pub(crate) fn reduced<T: Real>(&self, backend: &dyn Backend) -> Option<Reduced<T>> {
        if self.backend != backend.name() {
            return None;
        }
        let any: &dyn Any = match &self.numbers {
            ReductionNumbers::F32(values) => values,
            ReductionNumbers::F64(values) => values,
        };
        let numbers = any.downcast_ref::<Vec<T>>()?.clone();
        Some(Reduced::Packed { size: self.size, numbers })
    }
}
