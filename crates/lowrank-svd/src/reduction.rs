//! What a spectrum leaves behind for the factors of the same matrix: the decomposition that both need, done once.
//!
//! A Gram matrix and its reduction to tridiagonal form are most of the work of either. Half a matrix of the short side is
//! worth keeping between the two passes of a run; the factors have the same bits with it and without it.

use crate::Precision;
use lowrank_compute::{Backend, Real, Reduced};

/// A reduced Gram matrix of one W, on its short side.
#[derive(Debug, Clone, PartialEq)]
pub struct Reduction {
    backend: &'static str,
    size: usize,
    numbers: Numbers,
}

/// Of a [`Reduction`], to be stored and brought back.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Computed in f32.
    F32(Vec<f32>),
    /// Computed in f64.
    F64(Vec<f64>),
}

impl Reduction {
    pub(crate) fn of_f32(backend: &dyn Backend, reduced: Reduced<f32>) -> Option<Self> {
        Self::of(backend, reduced, Numbers::F32)
    }

    pub(crate) fn of_f64(backend: &dyn Backend, reduced: Reduced<f64>) -> Option<Self> {
        Self::of(backend, reduced, Numbers::F64)
    }

    /// `None` where a backend keeps the matrix as it is: making it again costs less than keeping it.
    fn of<T>(backend: &dyn Backend, reduced: Reduced<T>, numbers: fn(Vec<T>) -> Numbers) -> Option<Self> {
        match reduced {
            Reduced::Whole(_) => None,
            Reduced::Packed { size, numbers: values } => {
                Some(Self { backend: backend.name(), size, numbers: numbers(values) })
            }
        }
    }

    /// What it was computed in.
    pub fn precision(&self) -> Precision {
        match self.numbers {
            Numbers::F32(_) => Precision::F32,
            Numbers::F64(_) => Precision::F64,
        }
    }

    /// Takes the numbers out, to be stored; the rest says to what they belong.
    pub fn take_numbers(&mut self) -> Numbers {
        match &mut self.numbers {
            Numbers::F32(values) => Numbers::F32(std::mem::take(values)),
            Numbers::F64(values) => Numbers::F64(std::mem::take(values)),
        }
    }

    /// Puts numbers back that were taken out of this.
    pub fn put_numbers(&mut self, numbers: Numbers) {
        self.numbers = numbers;
    }

    /// The reduced matrix, if this backend made it in this precision.
    pub(crate) fn reduced<T: Real>(&self, backend: &dyn Backend) -> Option<Reduced<T>> {
        if self.backend != backend.name() {
            return None;
        }
        let any: &dyn std::any::Any = match &self.numbers {
            Numbers::F32(values) => values,
            Numbers::F64(values) => values,
        };
        let numbers = any.downcast_ref::<Vec<T>>()?.clone();
        Some(Reduced::Packed { size: self.size, numbers })
    }
}
