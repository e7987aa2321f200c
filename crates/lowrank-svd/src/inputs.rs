//! The metric of w1 and w3: W [m, n] by the moment C [n, n] of its inputs, and d `[m]` per output.
//!
//! With S Sᵀ = C̃ ([`crate::root`]) and G = WᵀDW, D = diag(d), the error is ‖D^½ (W − Ŵ) S‖², so V holds eigenvectors of
//! A = SᵀG S and Ŵ = W S V VᵀS⁺. That is an oblique projection W Y Xᵀ, XᵀY = I. X is made orthonormal before anything is
//! rounded: u·v then loses no more to rounding than the factors of a plain SVD do, however badly C̃ is conditioned.
//!
//! The sketch needs no root at all. For rows in the span of X the best factors are Y = C̃X (XᵀC̃X)⁻¹, and the span turns
//! towards the best one by X ← qr(G C̃ X), which is a power iteration of A in other coordinates.

use crate::calibrated::{Basis, Whole};
use crate::metric::mirror;
use crate::power::symmetric_norm;
use crate::precision::{Precision, of_measurements};
use crate::randomized::{Sketch, random_signs};
use crate::residual::{energy_of, for_each_residual};
use crate::root::{MomentRoot, Root};
use crate::survey::Survey;
use crate::{Factors, SvdError};
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Accumulate, Backend, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;
use std::borrow::Cow;

/// The metric, brought to a scale of 1.
pub(crate) struct Inputs<'a> {
    /// C̃ over its mean eigenvalue; both triangles.
    moment: Array2<f64>,
    /// √(dᵢ / max d)
    row_roots: Vec<f64>,
    /// M
    map: Option<ArrayView2<'a, f64>>,
    root: Option<&'a MomentRoot>,
    /// What was divided out of an error.
    pub(crate) scale: f64,
}

impl<'a> Inputs<'a> {
    /// From C over its mean eigenvalue, and d with its largest value.
    pub(crate) fn new(
        mut moment: Array2<f64>,
        mean: f64,
        rows: &[f64],
        largest: f64,
        blend: f64,
        map: Option<ArrayView2<'a, f64>>,
        root: Option<&'a MomentRoot>,
    ) -> Self {
        moment *= 1.0 - blend;
        moment.diag_mut().map_inplace(|value| *value += blend);
        let row_roots = rows.iter().map(|d| (d / largest).sqrt()).collect();
        Self { moment, row_roots, map, root, scale: mean * largest }
    }

    pub(crate) fn root(&self, backend: &dyn Backend) -> Result<Cow<'a, Root<f64>>, SvdError> {
        if let Some(MomentRoot(root)) = self.root {
            return Ok(Cow::Borrowed(root));
        }
        let kernels: &dyn Kernels<f64> = backend;
        Ok(Cow::Owned(Root::of(kernels, self.moment.clone())?))
    }

    /// A [k, k], lower triangle.
    pub(crate) fn whole<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor, root: &Root<f64>) -> Whole<T> {
        let left = self.mapped(kernels, root.root());
        let gram = self.gram(kernels, w);
        let bound = symmetric_norm(kernels, &gram) * root.norm_squared();
        let image = product(kernels, gram.view(), left.view());
        drop(gram);
        Whole { a: product(kernels, left.t(), image.view()), bound }
    }

    /// X and Y of eigenvectors V [k, r] of A.
    pub(crate) fn basis<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        root: &Root<f64>,
        vectors: ArrayView2<'_, T>,
    ) -> Result<Basis<T>, SvdError> {
        let x = product(kernels, root.inverse_transposed().view(), vectors);
        let y = product(kernels, root.root().view(), vectors);
        oblique(kernels, x, self.mapped(kernels, y))
    }

    /// A subspace by sketching, and the eigenvalues of A along it.
    pub(crate) fn sketch<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        w: &Tensor,
        rank: usize,
        sketch: Sketch,
        rng: ChaCha8Rng,
    ) -> Result<(Basis<T>, Vec<T>), SvdError> {
        let moment = self.moment.mapv(T::of_f64);
        let mut x = kernels.thin_qr(random_signs(moment.nrows(), sketch.columns, rng))?;
        for _ in 0..sketch.power_iterations {
            let seen = self.mapped(kernels, product(kernels, moment.view(), x.view()));
            let mut image = kernels.apply(w, Side::Cols, seen.view());
            scale_rows(&mut image, 0, &self.row_roots, 2);
            let back = kernels.apply_transposed(w, Side::Cols, image.view());
            x = kernels.thin_qr(match self.map {
                Some(map) => product(kernels, map.mapv(T::of_f64).t(), back.view()),
                None => back,
            })?;
        }
        // XᵀC̃X = N⁺ᵀN⁺, so the columns of SᵀX N are orthonormal, and A restricted to them is FᵀF.
        let seen = product(kernels, moment.view(), x.view());
        drop(moment);
        let small: Root<T> = Root::of(kernels, product(kernels, x.t(), seen.view()))?;
        let inverse = small.inverse_transposed::<T>();
        let seen = product(kernels, self.mapped(kernels, seen).view(), inverse.view());
        let mut image = kernels.apply(w, Side::Cols, seen.view());
        scale_rows(&mut image, 0, &self.row_roots, 1);
        let mut ritz = Array2::zeros((seen.ncols(), seen.ncols()));
        kernels.gram_add(&mut ritz, image.view());
        drop(image);
        let eigen = kernels.eigh(ritz, rank.min(seen.ncols()))?;
        let near = product(kernels, x.view(), product(kernels, inverse.view(), eigen.vectors.view()).view());
        let far = product(kernels, seen.view(), eigen.vectors.view());
        Ok((oblique(kernels, near, far)?, eigen.values))
    }

    /// ‖W − u·v‖², and the error in the metric over its scale.
    pub(crate) fn errors(
        &self,
        backend: &dyn Backend,
        w: &Tensor,
        survey: &Survey,
        factors: &Factors,
    ) -> (f64, f64) {
        // With a map there is no spectrum to hold the error against.
        match self.map.map(|_| of_measurements(survey)) {
            Some(Precision::F32) => self.errors_in::<f32>(backend, w, factors),
            _ => self.errors_in::<f64>(backend, w, factors),
        }
    }

    fn errors_in<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor, factors: &Factors) -> (f64, f64) {
        let size = self.moment.nrows();
        let change = self.map.map(|map| {
            let mut change = map.to_owned();
            change.diag_mut().map_inplace(|value| *value -= 1.0);
            change.mapv(T::of_f64)
        });
        let mut energy = 0.0;
        let mut gram = Array2::zeros((size, size));
        for_each_residual(kernels, w, Side::Cols, factors, |first, block, residual| {
            energy += energy_of(residual);
            if let Some(change) = &change {
                kernels.gemm(block, change.view(), residual.view_mut(), Accumulate::Add);
            }
            scale_rows(residual, first, &self.row_roots, 1);
            kernels.gram_add(&mut gram, residual.view());
        });
        let mut error = 0.0;
        for (i, (row, moment)) in gram.rows().into_iter().zip(self.moment.rows()).enumerate() {
            let below: f64 = (0..i).map(|j| row[j].as_f64() * moment[j]).sum();
            error += 2.0 * below + row[i].as_f64() * moment[i];
        }
        (energy, error.max(0.0))
    }

    /// WᵀDW [n, n], both triangles.
    fn gram<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> Array2<T> {
        let size = self.moment.nrows();
        let mut gram = Array2::zeros((size, size));
        for_each_block::<T>(w, Side::Cols, |first, block| {
            let mut rows = block.to_owned();
            scale_rows(&mut rows, first, &self.row_roots, 1);
            kernels.gram_add(&mut gram, rows.view());
        });
        mirror(&mut gram);
        gram
    }

    /// M times a matrix of columns.
    fn mapped<T: Real>(&self, kernels: &dyn Kernels<T>, columns: Array2<T>) -> Array2<T> {
        match self.map {
            Some(map) => product(kernels, map.mapv(T::of_f64).view(), columns.view()),
            None => columns,
        }
    }
}

/// Row i times √d of row `first` + i, `times` over.
fn scale_rows<T: Real>(rows: &mut Array2<T>, first: usize, row_roots: &[f64], times: i32) {
    for (mut row, root) in rows.rows_mut().into_iter().zip(&row_roots[first..]) {
        row *= T::of_f64(root.powi(times));
    }
}

/// The same product Z X₀ᵀ, as Y Xᵀ with orthonormal X.
fn oblique<T: Real>(kernels: &dyn Kernels<T>, near: Array2<T>, far: Array2<T>) -> Result<Basis<T>, SvdError> {
    if near.ncols() == 0 {
        return Ok(Basis { x: near, y: Some(far) });
    }
    let x = kernels.thin_qr(near.clone())?;
    let coefficients = product(kernels, near.t(), x.view());
    let y = product(kernels, far.view(), coefficients.view());
    Ok(Basis { x, y: Some(y) })
}

/// A B.
pub(crate) fn product<T: Real>(
    kernels: &dyn Kernels<T>,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
) -> Array2<T> {
    let mut out = Array2::zeros((a.nrows(), b.ncols()));
    kernels.gemm(a, b, out.view_mut(), Accumulate::Replace);
    out
}
