//! Spectrum and factors of one matrix by one decomposition, and eigenvectors in f32 for norms that f32 alone does not resolve.
//!
//! A is then computed in f64, its eigenvectors V in f32, X and Y of V in f64. Rounding A to f32 moves eigenvalues by about ε·λ₁,
//! which would drown the small ones. It turns eigenvectors only a little, and their Rayleigh quotients vᵀA v are off by the
//! square of that, about (d·ε)² of the energy for a matrix of size d, 10⁻⁷ for d = 4096. Only what lies below ε·λ₁ is mixed up.
//! A itself is not computed in f32, whose rounding errors are relative to ‖S‖²‖G‖, which may be a thousand times λ₁.

use super::{All, Engine, Subspace, padded};
use crate::error::SvdError;
use crate::error_norm::{Basis, InPrecision, NormMatrix};
use crate::factors::Factors;
use crate::linalg::product;
use crate::narrowed::{narrowed_inputs, tails_of_inputs};
use crate::options::SvdOptions;
use crate::precision::{Precision, eigenvectors_in_f32};
use lowrank_compute::{Backend, Eigen, Kernels, Real, mirror_lower};
use lowrank_model::recipe::MethodChoice;
use lowrank_model::{Spectrum, Tensor};
use ndarray::{Array2, ArrayView2, Zip, s};

/// [`crate::spectrum()`] and the factors of a rank by one decomposition, always by the exact route; what the options know is
/// not used. Measures no error: in f64 that costs half as much again.
///
/// # Errors
/// As [`crate::factor`].
pub fn decompose(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    options: &SvdOptions<'_>,
) -> Result<(Spectrum, Factors), SvdError> {
    let options = SvdOptions { method: MethodChoice::Exact, spectrum: None, reduction: None, ..*options };
    let engine = Engine::new(backend, w, &options, Some(rank))?;
    if engine.norm.keeps_decomposition() {
        let (spectrum, reduction) = engine.spectrum()?;
        let known = SvdOptions { spectrum: Some(&spectrum), reduction: reduction.as_ref(), ..options };
        let factors = super::factor(backend, w, rank, &known)?.factors;
        return Ok((spectrum, factors));
    }
    if let Some((found, _)) = engine.in_f32(rank, All::Vectors)? {
        return engine.finished(found, rank);
    }
    let truncated = engine.truncated(rank, engine.shape().short_side())?;
    Ok((engine.scaled(truncated.sigma)?, truncated.balanced.factors))
}

/// [`decompose`] of gate or up [F, H], and by the same decomposition for each width, which rise, the squared errors of rank
/// 0..=H of its first channels in their order. The norm has no map.
///
/// # Errors
/// As [`crate::factor`].
pub fn decompose_narrowed(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    options: &SvdOptions<'_>,
    order: &[usize],
    widths: &[usize],
) -> Result<(Spectrum, Factors, Vec<Vec<f64>>), SvdError> {
    let exact = SvdOptions { method: MethodChoice::Exact, spectrum: None, reduction: None, ..*options };
    let engine = Engine::new(backend, w, &exact, Some(rank))?;
    let (scale, shape) = (engine.norm.scale(), engine.shape());
    let (found, tails) = match engine.in_f32(rank, All::VectorsAndImage)? {
        Some((found, Some(image))) => (found, tails_of_inputs(&image, scale, shape, order, widths)),
        _ => {
            let (kernels, norm): (&dyn Kernels<f64>, &dyn InPrecision<f64>) = (backend, &*engine.norm);
            let NormMatrix { a, .. } = norm.matrix(kernels, w);
            let size = a.nrows();
            let Eigen { values, vectors } = kernels.eigh(a, size)?;
            let Some(image) = norm.image(kernels, w, vectors.view()) else {
                // The norm of the weights, of an expert without routed tokens.
                let (spectrum, factors) = decompose(backend, w, rank, options)?;
                let tails = narrowed_inputs(backend, w, &options.metric, order, widths)?;
                return Ok((spectrum, factors, tails));
            };
            let tails = tails_of_inputs(&image, scale, shape, order, widths);
            drop(image);
            (engine.of_eigenvectors(vectors, &values, rank)?, tails)
        }
    };
    let (spectrum, factors) = engine.finished(found, rank)?;
    Ok((spectrum, factors, tails))
}

/// The subspace of a rank, and the image of W if it was wanted.
type Found = (Subspace<f64>, Option<Array2<f32>>);

impl Engine<'_> {
    /// The subspace of a rank from eigenvectors in f32. `None` where f32 saves nothing.
    pub(super) fn in_f32(&self, rank: usize, all: All) -> Result<Option<Found>, SvdError> {
        let saves = eigenvectors_in_f32(self.options.precision, &self.problem.stats);
        let is_exact = self.sketch.is_none() && self.options.method != MethodChoice::Projector;
        match saves && is_exact && !self.norm.keeps_decomposition() {
            true => self.eigenvectors_in_f32(rank, all).map(Some),
            false => Ok(None),
        }
    }

    pub(super) fn eigenvectors_in_f32(&self, rank: usize, all: All) -> Result<Found, SvdError> {
        let w = self.problem.w;
        let mut a = {
            let norm: &dyn InPrecision<f64> = &*self.norm;
            norm.matrix(self.problem.backend, w).a.mapv(Real::as_f32)
        };
        let (kernels, norm): (&dyn Kernels<f32>, &dyn InPrecision<f32>) = (self.problem.backend, &*self.norm);
        let size = a.nrows();
        let count = if all == All::None { rank.min(size) } else { size };
        let Eigen { values, vectors } = kernels.eigh(a.clone(), count)?;
        let image = match all {
            All::VectorsAndImage => norm.image(kernels, w, vectors.view()),
            _ => None,
        };
        let mut eigenvalues = match &image {
            Some(image) => quotients(image.view(), image.view(), vectors.view()),
            None => {
                mirror_lower(&mut a);
                quotients(product(kernels, a.view(), vectors.view()).view(), vectors.view(), vectors.view())
            }
        };
        eigenvalues.extend(values[count..].iter().map(|value| value.as_f64()));
        // They stand in this order up to rounding.
        eigenvalues.sort_by(|a, b| b.total_cmp(a));
        Ok((self.of_eigenvectors(vectors, &eigenvalues, rank)?, image))
    }

    /// From eigenvectors of A, at least as many as the rank, and all eigenvalues.
    fn of_eigenvectors<T: Real>(
        &self,
        vectors: Array2<T>,
        eigenvalues: &[f64],
        rank: usize,
    ) -> Result<Subspace<f64>, SvdError> {
        let first = vectors.slice(s![.., ..rank.min(vectors.ncols())]).mapv(Real::as_f64);
        drop(vectors);
        let norm: &dyn InPrecision<f64> = &*self.norm;
        let Basis { x, y } = norm.basis(self.problem.backend, first)?;
        let basis = Basis { x: padded(x, rank), y: y.map(|y| padded(y, rank)) };
        Ok(Subspace { basis, image: None, sigma: self.sigma(eigenvalues, 0.0)?, by_products: false })
    }

    pub(super) fn finished(
        &self,
        found: Subspace<f64>,
        rank: usize,
    ) -> Result<(Spectrum, Factors), SvdError> {
        let truncated = self.projected_from_f64(found, rank, Precision::F64)?;
        Ok((self.scaled(truncated.sigma)?, truncated.balanced.factors))
    }
}

/// aᵀb / vᵀv of the columns.
fn quotients(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, v: ArrayView2<'_, f32>) -> Vec<f64> {
    let dots = |a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>| {
        let mut dots = vec![0.0_f64; a.ncols()];
        Zip::from(a.rows()).and(b.rows()).for_each(|a, b| {
            for ((dot, &a), &b) in dots.iter_mut().zip(a).zip(b) {
                *dot += f64::from(a) * f64::from(b);
            }
        });
        dots
    };
    dots(a, b).into_iter().zip(dots(v, v)).map(|(image, length)| image / length).collect()
}
