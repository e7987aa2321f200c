//! The norm of w1 (gate) and w3 (up): W [m, n] by the second moment C [n, n] of its inputs, and d `[m]` per output.
//!
//! With S Sᵀ = C̃ ([`crate::root`]) and G = WᵀDW, D = diag(d), the error is ‖D^½ (W − Ŵ) S‖², so V holds eigenvectors of
//! A = SᵀG S and Ŵ = W S V VᵀS⁺. That is an oblique projection W Y Xᵀ, XᵀY = I. X is made orthonormal before anything is
//! rounded: u·v then loses no more to rounding than the factors of a plain SVD do, however badly C̃ is conditioned.
//!
//! The sketch needs no root at all. For rows in the span of X the best factors are Y = C̃X (XᵀC̃X)⁻¹, and the span turns
//! towards the best one by X ← qr(G C̃ X), which is a power iteration of A in other coordinates.

use crate::error::SvdError;
use crate::error_norm::{Basis, ErrorNorm, InPrecision, NormMatrix, Sketched, SquaredErrors};
use crate::factors::{BalancedFactors, Factors};
use crate::linalg::{energy_of, norm_of_symmetric, product};
use crate::moment::UnitMoment;
use crate::precision::{Precision, of_measurements};
use crate::randomized::{Sketch, random_signs};
use crate::residual::for_each_residual;
use crate::root::Root;
use crate::stats::Problem;
use lowrank_compute::blocks::for_each_block;
use lowrank_compute::{Accumulate, Kernels, Real, Side, mirror_lower};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;
use std::borrow::Cow;

/// The norm on a scale of 1.
pub(crate) struct Inputs<'a> {
    /// C̃ over its mean eigenvalue; both triangles.
    pub(crate) second_moment: Array2<f64>,
    /// √(dᵢ / max d)
    row_roots: Vec<f64>,
    /// M
    map: Option<&'a Array2<f64>>,
    /// S; absent for a sketch.
    pub(crate) root: Option<Cow<'a, Root<f64>>>,
    /// What was divided out of an error.
    pub(crate) scale: f64,
}

impl<'a> Inputs<'a> {
    /// Without a root yet.
    pub(crate) fn new(
        moment: UnitMoment,
        shrinkage: f64,
        row_roots: Vec<f64>,
        map: Option<&'a Array2<f64>>,
    ) -> Self {
        let UnitMoment { matrix: mut second_moment, mean } = moment;
        second_moment *= 1.0 - shrinkage;
        second_moment.diag_mut().map_inplace(|value| *value += shrinkage);
        Self { second_moment, row_roots, map, root: None, scale: mean }
    }

    fn root(&self) -> &Root<f64> {
        self.root.as_ref().expect("made for everything but a sketch")
    }

    fn errors_in<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor, factors: &Factors) -> SquaredErrors {
        let size = self.second_moment.nrows();
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
        for (i, (row, moment)) in gram.rows().into_iter().zip(self.second_moment.rows()).enumerate() {
            let below: f64 = (0..i).map(|j| row[j].as_f64() * moment[j]).sum();
            error += 2.0 * below + row[i].as_f64() * moment[i];
        }
        SquaredErrors { weights: energy, norm: Some(error.max(0.0)) }
    }

    /// WᵀDW [n, n], both triangles.
    fn gram<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> Array2<T> {
        let size = self.second_moment.nrows();
        let mut gram = Array2::zeros((size, size));
        for_each_block::<T>(w, Side::Cols, |first, block| {
            let mut rows = block.to_owned();
            scale_rows(&mut rows, first, &self.row_roots, 1);
            kernels.gram_add(&mut gram, rows.view());
        });
        mirror_lower(&mut gram);
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

impl ErrorNorm for Inputs<'_> {
    fn side(&self) -> Side {
        Side::Cols
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn expected_condition(&self) -> Option<f64> {
        self.root.as_ref().map(|root| root.condition())
    }

    fn errors(
        &self,
        problem: &Problem<'_>,
        BalancedFactors { factors, .. }: &BalancedFactors,
        _: Option<ArrayView2<'_, f64>>,
    ) -> SquaredErrors {
        let Problem { backend, w, stats } = problem;
        // With a map there is no optimum to compare the error with.
        match self.map.map(|_| of_measurements(stats)) {
            Some(Precision::F32) => self.errors_in::<f32>(*backend, w, factors),
            _ => self.errors_in::<f64>(*backend, w, factors),
        }
    }
}

impl<T: Real> InPrecision<T> for Inputs<'_> {
    /// A is [k, k], k the rank of C̃.
    fn matrix(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> NormMatrix<T> {
        let root = self.root();
        let left = self.mapped(kernels, root.root());
        let gram = self.gram(kernels, w);
        let bound = norm_of_symmetric(kernels, &gram) * root.norm_squared();
        let image = product(kernels, gram.view(), left.view());
        drop(gram);
        NormMatrix { a: product(kernels, left.t(), image.view()), bound }
    }

    /// D^½ W S V.
    fn image(&self, kernels: &dyn Kernels<T>, w: &Tensor, vectors: ArrayView2<'_, T>) -> Option<Array2<T>> {
        let seen = self.mapped(kernels, product(kernels, self.root().root().view(), vectors));
        let mut image = Array2::zeros((w.shape()[0], seen.ncols()));
        for_each_block::<T>(w, Side::Cols, |first, block| {
            let mut rows = block.to_owned();
            scale_rows(&mut rows, first, &self.row_roots, 1);
            let place = image.slice_mut(ndarray::s![first..first + rows.nrows(), ..]);
            kernels.gemm(rows.view(), seen.view(), place, Accumulate::Replace);
        });
        Some(image)
    }

    fn basis(&self, kernels: &dyn Kernels<T>, vectors: Array2<T>) -> Result<Basis<T>, SvdError> {
        let x = product(kernels, self.root().inverse_transposed().view(), vectors.view());
        let y = product(kernels, self.root().root().view(), vectors.view());
        oblique(kernels, x, self.mapped(kernels, y))
    }

    fn sketch(
        &self,
        kernels: &dyn Kernels<T>,
        w: &Tensor,
        rank: usize,
        sketch: Sketch,
        rng: ChaCha8Rng,
    ) -> Result<Sketched<T>, SvdError> {
        let moment = self.second_moment.mapv(T::of_f64);
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
        Ok(Sketched { basis: oblique(kernels, near, far)?, image: None, eigenvalues: eigen.values })
    }
}

/// Row i times √d of row `first` + i, `times` over.
pub(crate) fn scale_rows<T: Real>(rows: &mut Array2<T>, first: usize, row_roots: &[f64], times: i32) {
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
