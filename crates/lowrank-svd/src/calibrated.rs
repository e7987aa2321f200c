//! Spectra and factors in a [`Metric`]: the same two steps as data-free, on the matrix A that the metric defines.
//!
//! 1. [`spectrum_in`]: √λ of A, so the exact error of every rank, in the metric.
//! 2. [`factor_in`]: the factors of a rank. The moment is decomposed in f64 always; A in f32 where the rule of
//!    [`crate::precision`] lets it, on what rounding is relative to: ‖S‖²‖G‖, not λ₁ of A.
//!
//! [`decompose_in`] does both for the price of the second.

use crate::factor::{Way, check_request, excess, factor_reduced, missed_energy, route};
use crate::factors::{Split, split};
use crate::metric::Norm;
use crate::precision::{Known, Precision, f32_saves, in_sufficient_precision};
use crate::projector::{Upper, upper};
use crate::randomized::{Sketch, generator};
use crate::reduction::Reduction;
use crate::root::Root;
use crate::spectrum::reduce;
use crate::survey::{Survey, survey};
use crate::{
    FactorOptions, Factored, Factors, MethodChoice, Metric, PrecisionChoice, Route, SvdError, factor,
    spectrum,
};
use lowrank_compute::{Backend, Kernels, Real, Side};
use lowrank_model::{Spectrum, Tensor};
use ndarray::{Array2, s};
use std::borrow::Cow;

/// From this missed share on a product of f32 numbers is good enough: it is off by 1e-14 of the energy times ‖Y‖², which in a
/// steep metric is some ten thousand.
const MISSED_SHARE_OF_F32: f64 = 1e-2;

/// A, and what its rounding errors are relative to where that is more than its own norm.
pub(crate) struct Whole<T> {
    pub(crate) a: Array2<T>,
    pub(crate) bound: f64,
}

/// Factors before they are rounded: Â = (A Y) Xᵀ, where A is W or Wᵀ and X has orthonormal columns. Y is X where absent.
pub(crate) struct Basis<T> {
    pub(crate) x: Array2<T>,
    pub(crate) y: Option<Array2<T>>,
}

/// √λ of the matrix A of the metric, as many as W's short side: tail energies are the errors in the metric.
pub fn spectrum_in(
    backend: &dyn Backend,
    w: &Tensor,
    metric: &Metric<'_>,
    precision: PrecisionChoice,
) -> Result<Spectrum, SvdError> {
    let survey = survey(w)?;
    let Some(norm) = metric.norm(&survey)? else { return spectrum(backend, w, precision) };
    let search = Search::new(backend, w, survey, norm, None)?;
    let known = search.known(None);
    let (sigma, _) = in_sufficient_precision(precision, &known, |precision| match precision {
        Precision::F32 => search.values::<f32>(backend),
        Precision::F64 => search.values::<f64>(backend),
    })?;
    Ok(search.spectrum(sigma))
}

/// As [`spectrum_in`], and what the factors of W can begin from; so far in the norm of the weights alone.
pub fn reduce_in(
    backend: &dyn Backend,
    w: &Tensor,
    metric: &Metric<'_>,
    precision: PrecisionChoice,
) -> Result<(Spectrum, Option<Reduction>), SvdError> {
    match metric {
        Metric::Weights => reduce(backend, w, precision),
        _ => Ok((spectrum_in(backend, w, metric, precision)?, None)),
    }
}

/// As [`factor_in`], beginning from what [`reduce_in`] left of the same W in the same metric; the same bits.
pub fn factor_reduced_in(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    metric: &Metric<'_>,
    options: &FactorOptions,
    spectrum: Option<&Spectrum>,
    reduction: Option<&Reduction>,
) -> Result<Factored, SvdError> {
    match (metric, reduction) {
        (Metric::Weights, reduction) => factor_reduced(backend, w, rank, options, spectrum, reduction),
        _ => factor_in(backend, w, rank, metric, options, spectrum),
    }
}

/// Factors W [m, n] at a rank, best in the metric. A spectrum of W *in this metric*, if at hand, lets f32 be used where it
/// suffices, and gives the excess error.
pub fn factor_in(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    metric: &Metric<'_>,
    options: &FactorOptions,
    spectrum: Option<&Spectrum>,
) -> Result<Factored, SvdError> {
    let survey = survey(w)?;
    let Some(norm) = metric.norm(&survey)? else { return factor(backend, w, rank, options, spectrum) };
    check_request(survey.shape, rank, spectrum)?;
    let search = Search::new(backend, w, survey, norm, options.sketch(survey.shape, rank))?;
    let (_, cut) = search.cut_at(backend, rank, rank, options, spectrum)?;
    Ok(search.measured(backend, cut, rank, spectrum))
}

/// The spectrum in the metric and the factors of a rank, by one decomposition; always the exact route. In the norm of the
/// weights it is [`spectrum()`] and then [`factor()`]. Measures no error: in f64 that costs as much as half of it.
pub fn decompose_in(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    metric: &Metric<'_>,
    options: &FactorOptions,
) -> Result<(Spectrum, Factors), SvdError> {
    let survey = survey(w)?;
    let options = &FactorOptions { method: crate::MethodChoice::Exact, ..*options };
    let Some(norm) = metric.norm(&survey)? else {
        let (spectrum, reduction) = reduce(backend, w, options.precision)?;
        let factored = factor_reduced(backend, w, rank, options, Some(&spectrum), reduction.as_ref())?;
        return Ok((spectrum, factored.factors));
    };
    check_request(survey.shape, rank, None)?;
    let search = Search::new(backend, w, survey, norm, None)?;
    let (sigma, cut) = search.cut_at(backend, rank, survey.shape.short_side(), options, None)?;
    Ok((search.spectrum(sigma), cut.split.factors))
}

/// A subspace, and √λ of A over the scale of the metric: as many as W's short side, zeros where there are no more.
struct Found<T> {
    basis: Basis<T>,
    sigma: Vec<f64>,
    way: Way,
}

enum Ready {
    F32(Found<f32>),
    F64(Found<f64>),
}

/// What is left of a search when its precision no longer matters.
struct Cut {
    split: Split,
    /// Of A, what the rank keeps.
    kept: f64,
    /// Y in the form of outputs.
    y: Option<Array2<f64>>,
    route: Route,
}

/// Everything about a search except its precision.
struct Search<'w, 'm> {
    w: &'w Tensor,
    survey: Survey,
    norm: Norm<'m>,
    /// Of the moment of inputs; a sketch needs none.
    root: Option<Cow<'m, Root<f64>>>,
    sketch: Option<Sketch>,
}

impl<'w, 'm> Search<'w, 'm> {
    fn new(
        backend: &dyn Backend,
        w: &'w Tensor,
        survey: Survey,
        norm: Norm<'m>,
        sketch: Option<Sketch>,
    ) -> Result<Self, SvdError> {
        let root = match &norm {
            Norm::Inputs(inputs) if sketch.is_none() => Some(inputs.root(backend)?),
            _ => None,
        };
        Ok(Self { w, survey, norm, root, sketch })
    }

    fn side(&self) -> Side {
        match self.norm {
            Norm::Inputs(_) => Side::Cols,
            Norm::Outputs(_) => Side::Rows,
        }
    }

    fn scale(&self) -> f64 {
        match &self.norm {
            Norm::Inputs(inputs) => inputs.scale,
            Norm::Outputs(outputs) => outputs.scale,
        }
    }

    fn root(&self) -> &Root<f64> {
        self.root.as_ref().expect("made for every search that is not a sketch")
    }

    /// What is known before anything is tried. A metric spreads the eigenvalues, so without a hint a whole decomposition
    /// in f32 is not worth a try.
    fn known(&self, condition: Option<f64>) -> Known {
        let hint = condition.or(self.root.as_ref().map(|root| root.condition()));
        let untried = self.sketch.is_none().then_some(f64::INFINITY);
        Known {
            shape: self.survey.shape,
            largest_weight: self.survey.largest_weight,
            condition: hint.or(untried),
        }
    }

    fn whole<T: Real>(&self, kernels: &dyn Kernels<T>) -> Whole<T> {
        match &self.norm {
            Norm::Inputs(inputs) => inputs.whole(kernels, self.w, self.root()),
            Norm::Outputs(outputs) => outputs.whole(kernels, self.w),
        }
    }

    /// All √λ, and their condition.
    fn values<T: Real>(&self, kernels: &dyn Kernels<T>) -> Result<(Vec<f64>, f64), SvdError> {
        let Whole { a, bound } = self.whole(kernels);
        let sigma = self.sigma(&kernels.eigvalsh(a)?)?;
        let condition = condition(bound, &sigma, sigma.len());
        Ok((sigma, condition))
    }

    /// The subspace of a rank, and the condition of A up to eigenvalue number `last`.
    fn find<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        rank: usize,
        last: usize,
        options: &FactorOptions,
        spectrum: Option<&Spectrum>,
    ) -> Result<(Found<T>, f64), SvdError> {
        let (basis, sigma, bound, way) = if let Some(sketch) = self.sketch {
            let rng = generator(options.seed, options.stream);
            let (basis, values) = match &self.norm {
                Norm::Inputs(inputs) => inputs.sketch(kernels, self.w, rank, sketch, rng)?,
                Norm::Outputs(outputs) => outputs.sketch(kernels, self.w, rank, sketch, rng)?,
            };
            (basis, self.sigma(&values)?, 0.0, Way::Eigenvectors)
        } else {
            let Whole { a, bound } = self.whole(kernels);
            let count = rank.min(a.nrows());
            let (vectors, values, way) = self.exact(kernels, a, count, options, spectrum)?;
            let basis = match &self.norm {
                Norm::Inputs(inputs) => inputs.basis(kernels, self.root(), vectors.view())?,
                Norm::Outputs(outputs) => outputs.basis(kernels, vectors),
            };
            (basis, self.sigma(&values)?, bound, way)
        };
        let condition = condition(bound, &sigma, last);
        let Basis { x, y } = basis;
        let basis = Basis { x: padded(x, rank), y: y.map(|y| padded(y, rank)) };
        Ok((Found { basis, sigma, way }, condition))
    }

    /// Orthonormal columns that span the first eigenvectors of A, and all eigenvalues.
    fn exact<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        a: Array2<T>,
        count: usize,
        options: &FactorOptions,
        spectrum: Option<&Spectrum>,
    ) -> Result<(Array2<T>, Vec<T>, Way), SvdError> {
        if options.method == MethodChoice::Projector {
            // A has as many eigenvalues as it has rows, and a spectrum as many as W's short side.
            let known = spectrum.filter(|spectrum| spectrum.sigma().len() == a.nrows());
            let values = |spectrum: &Spectrum| {
                spectrum.sigma().iter().map(|sigma| sigma * sigma / self.scale()).collect()
            };
            let rng = generator(options.seed, options.stream);
            if let Some(Upper { basis, values }) = upper(kernels, &a, count, known.map(values), rng)? {
                return Ok((basis, values, Way::Products));
            }
        }
        let eigen = kernels.eigh(a, count)?;
        Ok((eigen.vectors, eigen.values, Way::Eigenvectors))
    }

    fn cut<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        rank: usize,
        route: Route,
        found: Found<T>,
    ) -> (Vec<f64>, Cut) {
        let Found { basis: Basis { x, y }, sigma, .. } = found;
        let y = y.as_ref().unwrap_or(&x);
        let image = kernels.project(self.w, self.side(), y.view());
        let split = split(self.survey.shape, self.side(), &x, image);
        let y = matches!(self.norm, Norm::Outputs(_)).then(|| y.mapv(Real::as_f64));
        let kept = sigma[..rank].iter().map(|sigma| sigma * sigma).sum();
        (sigma, Cut { split, kept, y, route })
    }

    /// Factors of a rank, in a precision that resolves eigenvalue number `last`; and all √λ after an exact search.
    fn cut_at(
        &self,
        backend: &dyn Backend,
        rank: usize,
        last: usize,
        options: &FactorOptions,
        spectrum: Option<&Spectrum>,
    ) -> Result<(Vec<f64>, Cut), SvdError> {
        let hint =
            spectrum.map(|known| crate::precision::condition(known.sigma()[0], known.sigma()[rank - 1]));
        let (ready, precision) =
            in_sufficient_precision(options.precision, &self.known(hint), |precision| match precision {
                Precision::F32 => {
                    let (found, condition) = self.find::<f32>(backend, rank, last, options, spectrum)?;
                    Ok((Ready::F32(found), condition))
                }
                Precision::F64 => {
                    let (found, condition) = self.find::<f64>(backend, rank, last, options, spectrum)?;
                    Ok((Ready::F64(found), condition))
                }
            })?;
        let way = match &ready {
            Ready::F32(found) => found.way,
            Ready::F64(found) => found.way,
        };
        let route = route(self.sketch, way, precision);
        let (sigma, cut) = match ready {
            Ready::F32(found) => self.cut::<f32>(backend, rank, route, found),
            Ready::F64(found) if self.projects_in_f32(&found.sigma, rank) => {
                // For half the price: factors are f32 anyway.
                let Found { basis: Basis { x, y }, sigma, way } = found;
                let narrow = |columns: Array2<f64>| columns.mapv(Real::as_f32);
                let basis = Basis { x: narrow(x), y: y.map(narrow) };
                self.cut::<f32>(backend, rank, route, Found { basis, sigma, way })
            }
            Ready::F64(found) => self.cut::<f64>(backend, rank, route, found),
        };
        if !cut.split.kept_energy.is_finite() {
            return Err(SvdError::Overflow { largest_weight: self.survey.largest_weight });
        }
        Ok((sigma, cut))
    }

    /// Whether enough is missed, and the matrix large.
    fn projects_in_f32(&self, sigma: &[f64], rank: usize) -> bool {
        let energy = |sigma: &[f64]| sigma.iter().map(|sigma| sigma * sigma).sum::<f64>();
        let missed_share = energy(&sigma[rank..]) / energy(sigma);
        missed_share >= MISSED_SHARE_OF_F32 && f32_saves(self.survey.shape, self.survey.largest_weight)
    }

    /// The factors with their errors.
    fn measured(
        &self,
        backend: &dyn Backend,
        cut: Cut,
        rank: usize,
        spectrum: Option<&Spectrum>,
    ) -> Factored {
        let Cut { split: Split { factors, kept_energy, sizes }, kept, y, route } = cut;
        let energy = self.survey.energy;
        let (missed, error) = match &self.norm {
            Norm::Inputs(inputs) => inputs.errors(backend, self.w, &self.survey, &factors),
            Norm::Outputs(outputs) => {
                let y = y.expect("kept for outputs");
                let missed = || missed_energy(backend, self.w, energy, kept_energy, &factors);
                outputs.errors(backend, self.w, &factors, &sizes, y.view(), missed)
            }
        };
        // What is kept and what is missed are orthogonal in the metric.
        let metric_error = Some(if error == 0.0 { 0.0 } else { (error / (error + kept)).sqrt() });
        Factored {
            factors,
            route,
            relative_error: if energy == 0.0 { 0.0 } else { (missed / energy).sqrt() },
            metric_error,
            excess_over_optimum: excess(metric_error, spectrum, rank),
        }
    }

    /// √λ of eigenvalues of A. Those beyond W's short side are rounding, and so is everything below zero: a moment that
    /// was summed in f32 is positive semidefinite only up to that. Their sum corrects nothing here: on a falling spectrum
    /// the first of them holds most of its error.
    fn sigma<T: Real>(&self, values: &[T]) -> Result<Vec<f64>, SvdError> {
        let short = self.survey.shape.short_side();
        let mut sigma = Vec::with_capacity(short);
        for value in values.iter().take(short).map(|value| value.as_f64()) {
            if !value.is_finite() {
                return Err(SvdError::Negative { value, tolerance: 0.0 });
            }
            sigma.push(value.max(0.0).sqrt());
        }
        sigma.resize(short, 0.0);
        Ok(sigma)
    }

    /// On the metric's own scale.
    fn spectrum(&self, sigma: Vec<f64>) -> Spectrum {
        let scale = self.scale().sqrt();
        let sigma = sigma.into_iter().map(|value| value * scale).collect();
        Spectrum::new(sigma).expect("roots of falling eigenvalues fall")
    }
}

/// √(bound/λ), bound at least λ₁.
fn condition(bound: f64, sigma: &[f64], last: usize) -> f64 {
    crate::precision::condition(sigma[0].max(bound.sqrt()), sigma[last - 1])
}

/// With zero columns up to a rank that a singular moment does not reach.
fn padded<T: Real>(columns: Array2<T>, rank: usize) -> Array2<T> {
    if columns.ncols() >= rank {
        return columns;
    }
    let mut out = Array2::zeros((columns.nrows(), rank));
    out.slice_mut(s![.., ..columns.ncols()]).assign(&columns);
    out
}

#[cfg(test)]
mod tests;
