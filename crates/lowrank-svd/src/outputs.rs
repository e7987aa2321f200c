//! The metric of w2: W [m, n] by the moment O [m, m] of its outputs, in projector form.
//!
//! Ŵ = U UᵀW, so an output y becomes U Uᵀy, and Σ ‖y − U Uᵀy‖² = tr (I − U Uᵀ) O: U holds eigenvectors of A = Õ. The
//! moment of the inputs [n, n], n the intermediate size, is never needed. With a map T the outputs that are wanted are
//! T y, A = T Õ Tᵀ and Ŵ = U UᵀT W.

use crate::calibrated::{Basis, Whole};
use crate::inputs::product;
use crate::metric::mirror;
use crate::randomized::{Sketch, random_signs};
use crate::residual::wide;
use crate::{Factors, SvdError};
use lowrank_compute::{Accumulate, Backend, Kernels, Real, Side};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;

/// The metric, brought to a scale of 1.
pub(crate) struct Outputs<'a> {
    /// (1 − b) O over the mean eigenvalue of O; both triangles.
    moment: Array2<f64>,
    /// Of W Wᵀ beside it.
    weight: f64,
    /// T
    map: Option<ArrayView2<'a, f64>>,
    /// What was divided out of an error.
    pub(crate) scale: f64,
}

impl<'a> Outputs<'a> {
    /// From O over its mean eigenvalue, and ‖W‖².
    pub(crate) fn new(
        mut moment: Array2<f64>,
        mean: f64,
        blend: f64,
        map: Option<ArrayView2<'a, f64>>,
        energy: f64,
    ) -> Self {
        let weight = blend * moment.nrows() as f64 / energy;
        moment *= 1.0 - blend;
        Self { moment, weight, map, scale: mean }
    }

    /// A [m, m], lower triangle.
    pub(crate) fn whole<T: Real>(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> Whole<T> {
        let mut a = if self.weight == 0.0 {
            self.moment.mapv(T::of_f64)
        } else {
            let mut gram = kernels.gram(w, Side::Rows);
            for i in 0..gram.nrows() {
                for j in 0..=i {
                    let value = gram[[i, j]].as_f64() * self.weight + self.moment[[i, j]];
                    gram[[i, j]] = T::of_f64(value);
                }
            }
            mirror(&mut gram);
            gram
        };
        if let Some(map) = self.map {
            let map = map.mapv(T::of_f64);
            let image = product(kernels, map.view(), a.view());
            a = product(kernels, image.view(), map.t());
        }
        Whole { a, bound: 0.0 }
    }

    /// X and Y of eigenvectors U [m, r] of A: X is U, Y is TᵀU.
    pub(crate) fn basis<T: Real>(&self, kernels: &dyn Kernels<T>, x: Array2<T>) -> Basis<T> {
        let y = self.map.map(|map| product(kernels, map.mapv(T::of_f64).t(), x.view()));
        Basis { x, y }
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
        let map = self.map.map(|map| map.mapv(T::of_f64));
        let times = |x: ArrayView2<'_, T>| {
            let back = map.as_ref().map(|map| product(kernels, map.t(), x));
            let x = back.as_ref().map_or(x, |back| back.view());
            let mut out = product(kernels, moment.view(), x);
            if self.weight > 0.0 {
                let mut image = kernels.apply(w, Side::Rows, x);
                image *= T::of_f64(self.weight);
                out += &kernels.apply_transposed(w, Side::Rows, image.view());
            }
            match &map {
                Some(map) => product(kernels, map.view(), out.view()),
                None => out,
            }
        };
        let mut x = kernels.thin_qr(random_signs(moment.nrows(), sketch.columns, rng))?;
        for _ in 0..sketch.power_iterations {
            x = kernels.thin_qr(times(x.view()))?;
        }
        let ritz = product(kernels, x.t(), times(x.view()).view());
        let eigen = kernels.eigh(ritz, rank)?;
        let best = product(kernels, x.view(), eigen.vectors.view());
        Ok((self.basis(kernels, best), eigen.values))
    }

    /// ‖W − u·v‖², and the error in the metric over its scale, of factors whose u is X times `sizes` and whose v is Yᵀ W over
    /// `sizes`. `missed` is asked for the first where it is not a by-product of the second.
    ///
    /// What rounding did to u is in both, and what it did to v in neither, but as far as `missed` saw it: a moment of outputs
    /// cannot tell how an error of v meets the inputs.
    pub(crate) fn errors(
        &self,
        backend: &dyn Backend,
        w: &Tensor,
        factors: &Factors,
        sizes: &[f64],
        y: ArrayView2<'_, f64>,
        missed: impl FnOnce() -> f64,
    ) -> (f64, f64) {
        let kernels: &dyn Kernels<f64> = backend;
        // E = I − u·diag(1/size)·Yᵀ, so that W − Ŵ = E W.
        let (mut u, _) = wide::<f64>(factors);
        for (mut column, &size) in u.columns_mut().into_iter().zip(sizes) {
            column *= if size == 0.0 { 0.0 } else { -size.recip() };
        }
        let mut change = Array2::eye(self.moment.nrows());
        kernels.gemm(u.view(), y.t(), change.view_mut(), Accumulate::Add);
        drop(u);
        let Some(map) = self.map else {
            let missed = missed();
            let unseen = if self.weight == 0.0 { 0.0 } else { self.weight * missed };
            return (missed, energy_in(kernels, &change, &self.moment).max(0.0) + unseen);
        };
        let mut gram = kernels.gram(w, Side::Rows);
        mirror(&mut gram);
        let missed = energy_in(kernels, &change, &gram).max(0.0);
        // T − u·diag(1/size)·Yᵀ, so that T W − Ŵ is that times W.
        change += &map;
        change.diag_mut().map_inplace(|value| *value -= 1.0);
        gram *= self.weight;
        gram += &self.moment;
        (missed, energy_in(kernels, &change, &gram).max(0.0))
    }
}

/// tr E C Eᵀ.
fn energy_in(kernels: &dyn Kernels<f64>, e: &Array2<f64>, c: &Array2<f64>) -> f64 {
    let image = product(kernels, e.view(), c.view());
    e.iter().zip(&image).map(|(a, b)| a * b).sum()
}
