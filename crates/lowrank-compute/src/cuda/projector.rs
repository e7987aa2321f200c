//! [`crate::projector`] with everything on the device: only diagonals come back while it runs.

use super::error::CudaError;
use super::lane::{Arg, Buffer, Lane, Work};
use super::products::{Element, Operand};
use super::solver::Qr;
use crate::Real;
use crate::projector::{Split, is_last, missing, splits};

impl Lane {
    /// Qᵀ [k, d] of the first k eigenvectors' span of a symmetric matrix [d, d], of which the lower triangle is read, from
    /// random columns [d, k]; and how many products of d × d matrices it took. `None` if rounding closes the gap.
    pub(super) fn upper_subspace<T: Qr + Real>(
        &self,
        gram: Buffer<T>,
        size: usize,
        split: &Split,
        omega: &Buffer<T>,
    ) -> Result<Option<(Buffer<T>, usize)>, CudaError> {
        let k = split.above;
        assert!(gram.len() == size * size && omega.len() == size * k);
        let epsilon = <T as Real>::EPSILON.as_f64();
        let Some(steps) = split.schedule(epsilon) else { return Ok(None) };
        let (mut x, mut square) = (gram, self.zeros(size * size)?);
        let mut next = self.zeros(size * size)?;
        let args = [self.write(&mut x), Arg::Int(size as i64)];
        // SAFETY: mirror_lower_*(T* a, i64 size); a is [size, size].
        unsafe { self.launch(T::mirror_lower(&self.device.functions), Work::Elements(size * size), &args) }?;
        self.affine(&mut x, size, split.scale().recip(), -split.threshold / split.scale())?;
        let (whole, dims) = (Operand::rows(size), (size, size, size));
        let (mut ended, mut products) = (false, 0);
        for alpha in steps {
            self.product(dims, (&x, whole), (&x, whole), (&mut square, whole), 1)?;
            ended = is_last(missing(self.diagonal(&square, size)?.into_iter()), epsilon);
            let alpha = if ended { 1.0 } else { alpha };
            self.affine(&mut square, size, -0.5 * alpha.powi(3), 1.5 * alpha)?;
            self.product(dims, (&x, whole), (&square, whole), (&mut next, whole), 1)?;
            std::mem::swap(&mut x, &mut next);
            products += 2;
            if ended {
                break;
            }
        }
        let trace: f64 = self.diagonal(&x, size)?.into_iter().map(Real::as_f64).sum();
        if !ended || !splits(trace, size, k) {
            return Ok(None);
        }
        drop((square, next));
        self.affine(&mut x, size, 0.5, 0.5)?;
        // Yᵀ = Ωᵀ P, row after row, is Y column after column, which is how its QR is taken.
        let (mut q, mut image) = (self.zeros(k * size)?, self.zeros(k * size)?);
        self.product((k, size, size), (omega, Operand::transposed(k)), (&x, whole), (&mut q, whole), 1)?;
        self.thin_q(&mut q, (size, k))?;
        self.product((k, size, size), (&q, whole), (&x, whole), (&mut image, whole), 1)?;
        self.thin_q(&mut image, (size, k))?;
        Ok(Some((image, products)))
    }

    /// A ← scale·A + shift·I, A [size, size].
    fn affine<T: Element>(
        &self,
        a: &mut Buffer<T>,
        size: usize,
        scale: f64,
        shift: f64,
    ) -> Result<(), CudaError> {
        assert_eq!(a.len(), size * size);
        let args = [self.write(a), Arg::Int(size as i64), T::argument(scale), T::argument(shift)];
        // SAFETY: affine_*(T* a, i64 size, T scale, T shift); a is [size, size].
        unsafe { self.launch(T::affine(&self.device.functions), Work::Elements(size * size), &args) }
    }

    /// The diagonal of A [size, size], on the host.
    fn diagonal<T: Element>(&self, a: &Buffer<T>, size: usize) -> Result<Vec<T>, CudaError> {
        assert_eq!(a.len(), size * size);
        let mut out = self.zeros(size)?;
        let args = [self.write(&mut out), self.read(a), Arg::Int(size as i64)];
        // SAFETY: diagonal_*(T* out, const T* a, i64 size); out holds size numbers, a is [size, size].
        unsafe { self.launch(T::diagonal(&self.device.functions), Work::Elements(size), &args) }?;
        self.download(&out, 0, size)
    }
}
