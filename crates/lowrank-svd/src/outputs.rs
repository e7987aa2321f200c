//! The norm of w2 (down): W [m, n] by the second moment O [m, m] of its outputs, as an orthogonal projection of them.
//!
//! Ŵ = U UᵀW, so an output y becomes U Uᵀy, and Σ ‖y − U Uᵀy‖² = tr (I − U Uᵀ) O: U holds eigenvectors of A = Õ. The
//! second moment of the inputs [n, n], n the intermediate size, is never needed. With a map T the outputs that are wanted
//! are T y, A = T Õ Tᵀ and Ŵ = U UᵀT W.

use crate::error::SvdError;
use crate::error_norm::{Basis, ErrorNorm, InPrecision, NormMatrix, Sketched, SquaredErrors};
use crate::factors::BalancedFactors;
use crate::linalg::product;
use crate::moment::UnitMoment;
use crate::randomized::{Sketch, random_signs};
use crate::residual::{truncation_energy, wide};
use crate::stats::Problem;
use lowrank_compute::{Accumulate, Kernels, Real, Side, mirror_lower};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;

/// The norm on a scale of 1.
pub(crate) struct Outputs<'a> {
    /// (1 − b) O over the mean eigenvalue of O; both triangles.
    second_moment: Array2<f64>,
    /// Of W Wᵀ beside it.
    gram_weight: f64,
    /// T
    map: Option<&'a Array2<f64>>,
    /// What was divided out of an error.
    scale: f64,
}

impl<'a> Outputs<'a> {
    /// For W of this energy ‖W‖².
    pub(crate) fn new(moment: UnitMoment, shrinkage: f64, map: Option<&'a Array2<f64>>, energy: f64) -> Self {
        let UnitMoment { matrix: mut second_moment, mean } = moment;
        let gram_weight = shrinkage * second_moment.nrows() as f64 / energy;
        second_moment *= 1.0 - shrinkage;
        Self { second_moment, gram_weight, map, scale: mean }
    }
}

impl ErrorNorm for Outputs<'_> {
    fn side(&self) -> Side {
        Side::Rows
    }

    fn scale(&self) -> f64 {
        self.scale
    }

    fn expected_condition(&self) -> Option<f64> {
        Some(f64::INFINITY)
    }

    fn errors_read_y(&self) -> bool {
        true
    }

    /// u is X times `scales` and v is Yᵀ W over `scales`.
    ///
    /// What rounding did to u is in both errors, and what it did to v in neither, except where the error of the weights
    /// comes from the residual: a second moment of outputs cannot tell how an error of v meets the inputs.
    fn errors(
        &self,
        problem: &Problem<'_>,
        factors: &BalancedFactors,
        y: Option<ArrayView2<'_, f64>>,
    ) -> SquaredErrors {
        let kernels: &dyn Kernels<f64> = problem.backend;
        let y = y.expect("asked for by `errors_read_y`");
        // E = I − u·diag(1/scale)·Yᵀ, so that W − Ŵ = E W.
        let (mut u, _) = wide::<f64>(&factors.factors);
        for (mut column, &scale) in u.columns_mut().into_iter().zip(&factors.scales) {
            column *= if scale == 0.0 { 0.0 } else { -scale.recip() };
        }
        let mut change = Array2::eye(self.second_moment.nrows());
        kernels.gemm(u.view(), y.t(), change.view_mut(), Accumulate::Add);
        drop(u);
        let Some(map) = self.map else {
            let weights = truncation_energy(problem, factors);
            let of_gram = if self.gram_weight == 0.0 { 0.0 } else { self.gram_weight * weights };
            let norm = energy_in(kernels, &change, &self.second_moment).max(0.0) + of_gram;
            return SquaredErrors { weights, norm: Some(norm) };
        };
        let mut gram = kernels.gram(problem.w, Side::Rows);
        mirror_lower(&mut gram);
        let weights = energy_in(kernels, &change, &gram).max(0.0);
        // T − u·diag(1/scale)·Yᵀ, so that T W − Ŵ is that times W.
        change += map;
        change.diag_mut().map_inplace(|value| *value -= 1.0);
        gram *= self.gram_weight;
        gram += &self.second_moment;
        SquaredErrors { weights, norm: Some(energy_in(kernels, &change, &gram).max(0.0)) }
    }
}

impl<T: Real> InPrecision<T> for Outputs<'_> {
    fn matrix(&self, kernels: &dyn Kernels<T>, w: &Tensor) -> NormMatrix<T> {
        let mut a = if self.gram_weight == 0.0 {
            self.second_moment.mapv(T::of_f64)
        } else {
            let mut gram = kernels.gram(w, Side::Rows);
            for i in 0..gram.nrows() {
                for j in 0..=i {
                    let value = gram[[i, j]].as_f64() * self.gram_weight + self.second_moment[[i, j]];
                    gram[[i, j]] = T::of_f64(value);
                }
            }
            mirror_lower(&mut gram);
            gram
        };
        if let Some(map) = self.map {
            let map = map.mapv(T::of_f64);
            let image = product(kernels, map.view(), a.view());
            a = product(kernels, image.view(), map.t());
        }
        NormMatrix { a, bound: 0.0 }
    }

    /// X is U, Y is TᵀU.
    fn basis(&self, kernels: &dyn Kernels<T>, x: Array2<T>) -> Result<Basis<T>, SvdError> {
        let y = self.map.map(|map| product(kernels, map.mapv(T::of_f64).t(), x.view()));
        Ok(Basis { x, y })
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
        let map = self.map.map(|map| map.mapv(T::of_f64));
        let times = |x: ArrayView2<'_, T>| {
            let back = map.as_ref().map(|map| product(kernels, map.t(), x));
            let x = back.as_ref().map_or(x, |back| back.view());
            let mut out = product(kernels, moment.view(), x);
            if self.gram_weight > 0.0 {
                let mut image = kernels.apply(w, Side::Rows, x);
                image *= T::of_f64(self.gram_weight);
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
        Ok(Sketched { basis: self.basis(kernels, best)?, image: None, eigenvalues: eigen.values })
    }
}

/// tr E C Eᵀ.
fn energy_in(kernels: &dyn Kernels<f64>, e: &Array2<f64>, c: &Array2<f64>) -> f64 {
    let image = product(kernels, e.view(), c.view());
    e.iter().zip(&image).map(|(a, b)| a * b).sum()
}
