//! Spectrum and factors of one matrix, in any norm, by any route, in the precision that suffices.
//!
//! A norm ([`crate::metric`]) makes an eigenproblem of W: A = V Λ Vᵀ.
//!
//! 1. [`spectrum`]: √Λ, so the exact error of every rank: Σ_{i>r} λᵢ.
//! 2. [`factor`]: the factors of a rank from its first eigenvectors, and their error.
//!
//! [`whole::decompose`] does both by one decomposition. The norm decides what A is, the method how its
//! subspace is found, and [`crate::precision`] in which precision.

use crate::error::SvdError;
use crate::error_norm::{Basis, ErrorNorm, InPrecision, NormMatrix, Sketched};
use crate::factors::{BalancedFactors, Factors, balance};
use crate::options::SvdOptions;
use crate::precision::{Precision, condition, in_sufficient_precision, is_beyond_f32, projects_in_f32};
use crate::randomized::{Sketch, generator, random_signs};
use crate::reduction::Reduction;
use crate::stats::{Problem, weight_stats};
use lowrank_compute::{Backend, Eigen, Kernels, Real, Split};
use lowrank_model::recipe::MethodChoice;
use lowrank_model::{MatrixShape, Spectrum, Tensor};
use ndarray::{Array2, s};
use serde::{Deserialize, Serialize};
use std::fmt;

pub(crate) mod whole;

/// How factors were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Route {
    /// The matrix of the norm, all eigenvectors, projection.
    Exact {
        /// Of the eigenvectors.
        precision: Precision,
    },
    /// The matrix of the norm, a projector onto its upper side by products, projection.
    Projector {
        /// Computed in.
        precision: Precision,
    },
    /// Sketch with power iterations.
    Randomized {
        /// Computed in.
        precision: Precision,
        /// k
        sketch_columns: usize,
        /// q
        power_iterations: usize,
    },
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact { precision } => write!(f, "exact {precision}"),
            Self::Projector { precision } => write!(f, "projector {precision}"),
            Self::Randomized { precision, sketch_columns, power_iterations } => {
                write!(
                    f,
                    "randomized {precision}, {sketch_columns} columns, {power_iterations} power iterations"
                )
            }
        }
    }
}

/// Factors and their quality, before rounding to the stored dtype.
#[derive(Debug, Clone, PartialEq)]
pub struct Factored {
    /// u and v.
    pub factors: Factors,
    /// How they were made.
    pub route: Route,
    /// ‖W − u·v‖ / ‖W‖; 0 for a zero matrix.
    pub relative_error: f64,
    /// The error in the norm that the factors were made for, relative to that of Ŵ = 0; absent where that is
    /// [`crate::Metric::Weights`].
    pub metric_error: Option<f64>,
    /// The error in the norm over the least possible at this rank, − 1. Absent without a spectrum (a sketch alone bounds
    /// the optimum only from above), and where the optimum lies below the rounding of f32.
    pub excess_over_optimum: Option<f64>,
}

/// √λ of the matrix A of the norm, as many as W's short side: tail energies are the least errors of all ranks. And what
/// factors in the same norm can begin from, where that is worth keeping.
///
/// In f64 where that is cheap or needed; in f32 only if even the smallest is resolved.
///
/// # Errors
/// W is no finite matrix, the norm does not fit W, or the decomposition fails.
pub fn spectrum(
    backend: &dyn Backend,
    w: &Tensor,
    options: &SvdOptions<'_>,
) -> Result<(Spectrum, Option<Reduction>), SvdError> {
    Engine::new(backend, w, options, None)?.spectrum()
}

/// Factors W [m, n] at a rank, best in the norm.
///
/// # Errors
/// As [`spectrum`]; the rank is 0 or above the short side; the known spectrum has another length; singular values exceed
/// f32.
pub fn factor(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    options: &SvdOptions<'_>,
) -> Result<Factored, SvdError> {
    let engine = Engine::new(backend, w, options, Some(rank))?;
    Ok(engine.measured(engine.truncated(rank, rank)?, rank))
}

/// Everything but the precision.
struct Engine<'a> {
    problem: Problem<'a>,
    norm: Box<dyn ErrorNorm + 'a>,
    options: SvdOptions<'a>,
    /// Absent for the exact route.
    sketch: Option<Sketch>,
}

/// All √λ, and what is worth keeping of their decomposition.
type SingularValues = (Vec<f64>, Option<Reduction>);

/// What is wanted beside the subspace of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum All {
    /// Nothing: eigenvalues beyond the rank are those of f32.
    None,
    /// All eigenvalues as Rayleigh quotients, which takes all eigenvectors.
    Vectors,
    /// Also the image of W in the norm, where it has one.
    VectorsAndImage,
}

/// The subspace of a rank.
struct Subspace<T> {
    basis: Basis<T>,
    /// A Y in f32, if the search made it on its way.
    image: Option<Array2<f32>>,
    /// √λ, as many as W's short side; zeros where there are no more.
    sigma: Vec<f64>,
    by_products: bool,
}

enum SomeSubspace {
    F32(Subspace<f32>),
    F64(Subspace<f64>),
}

/// Factors before their errors are known, when precision no longer matters.
struct Truncated {
    balanced: BalancedFactors,
    sigma: Vec<f64>,
    /// Y, if the norm reads it.
    y: Option<Array2<f64>>,
    route: Route,
}

impl<'a> Engine<'a> {
    fn new(
        backend: &'a dyn Backend,
        w: &'a Tensor,
        options: &SvdOptions<'a>,
        rank: Option<usize>,
    ) -> Result<Self, SvdError> {
        let problem = Problem { backend, w, stats: weight_stats(w)? };
        let shape = problem.stats.shape;
        if let Some(rank) = rank {
            check_request(shape, rank, options.spectrum)?;
        }
        let sketch = rank.and_then(|rank| options.sketch(shape, rank));
        let norm = options.metric.prepared(&problem, sketch.is_some())?;
        Ok(Self { problem, norm, options: *options, sketch })
    }

    fn shape(&self) -> MatrixShape {
        self.problem.stats.shape
    }

    fn spectrum(&self) -> Result<(Spectrum, Option<Reduction>), SvdError> {
        let Problem { backend, stats, .. } = &self.problem;
        let (norm, expected) = (&*self.norm, self.norm.expected_condition());
        let ((sigma, reduction), _) =
            in_sufficient_precision(self.options.precision, stats, expected, |precision| match precision {
                Precision::F32 => self.singular_values::<f32>(*backend, norm),
                Precision::F64 => self.singular_values::<f64>(*backend, norm),
            })?;
        Ok((self.scaled(sigma)?, reduction))
    }

    /// With their condition.
    fn singular_values<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        norm: &dyn InPrecision<T>,
    ) -> Result<(SingularValues, f64), SvdError> {
        let NormMatrix { a, bound } = norm.matrix(kernels, self.problem.w);
        let reduced = kernels.reduce(a)?;
        let values = kernels.reduced_values(&reduced)?;
        // What rounding in f32 does to the eigenvalues of a Gram matrix is mostly one common shift (measured:
        // −1.05·10⁻⁸ λ₁ on all of 2048, give or take a tenth), so the trace corrects them all.
        let shift = self.norm.trace().map_or(0.0, |trace| {
            let sum: f64 = values.iter().rev().map(|value| value.as_f64()).sum();
            (trace - sum) / values.len() as f64
        });
        let sigma = self.sigma(&values, shift)?;
        let condition = condition(bound, &sigma, sigma.len());
        let keep = self.norm.keeps_decomposition();
        let reduction = if keep { Reduction::of(self.problem.backend, reduced) } else { None };
        Ok(((sigma, reduction), condition))
    }

    /// Factors of a rank, in a precision that resolves eigenvalue number `last`.
    fn truncated(&self, rank: usize, last: usize) -> Result<Truncated, SvdError> {
        let Problem { backend, stats, .. } = &self.problem;
        let known = self.options.spectrum.map(|known| condition(0.0, known.sigma(), rank));
        let expected = known.or_else(|| self.sketch.map_or(self.norm.expected_condition(), |_| None));
        let leaves_enough = |sigma: &[f64]| projects_in_f32(stats, sigma, rank);
        if is_beyond_f32(expected)
            && self.options.spectrum.is_none_or(|known| leaves_enough(known.sigma()))
            && let Some((found, _)) = self.in_f32(rank, All::None)?
            && leaves_enough(&found.sigma)
        {
            return self.projected_from_f64(found, rank, Precision::F32);
        }
        let norm = &*self.norm;
        let (subspace, precision) =
            in_sufficient_precision(self.options.precision, stats, expected, |precision| match precision {
                Precision::F32 => {
                    let (found, condition) = self.subspace::<f32>(*backend, norm, rank, last)?;
                    Ok((SomeSubspace::F32(found), condition))
                }
                Precision::F64 => {
                    let (found, condition) = self.subspace::<f64>(*backend, norm, rank, last)?;
                    Ok((SomeSubspace::F64(found), condition))
                }
            })?;
        match subspace {
            SomeSubspace::F32(found) => self.finite(self.projected::<f32>(*backend, found, rank, precision)),
            SomeSubspace::F64(found) => self.projected_from_f64(found, rank, Precision::F64),
        }
    }

    /// Factors of a subspace in f64, whose eigenvectors were found in a precision.
    fn projected_from_f64(
        &self,
        found: Subspace<f64>,
        rank: usize,
        precision: Precision,
    ) -> Result<Truncated, SvdError> {
        let Problem { backend, stats, .. } = &self.problem;
        self.finite(match found {
            Subspace { basis: Basis { x, y }, image: None, sigma, by_products }
                if projects_in_f32(stats, &sigma, rank) =>
            {
                // For half the price: factors are f32 anyway.
                let narrow = |columns: Array2<f64>| columns.mapv(Real::as_f32);
                let basis = Basis { x: narrow(x), y: y.map(narrow) };
                let found = Subspace { basis, image: None, sigma, by_products };
                self.projected::<f32>(*backend, found, rank, precision)
            }
            found => self.projected::<f64>(*backend, found, rank, precision),
        })
    }

    /// Refuses factors that overflowed.
    fn finite(&self, truncated: Truncated) -> Result<Truncated, SvdError> {
        match truncated.balanced.kept_energy.is_finite() {
            true => Ok(truncated),
            false => Err(SvdError::Overflow { largest_weight: self.problem.stats.largest_weight }),
        }
    }

    /// The subspace of a rank, and the condition of A up to eigenvalue number `last`.
    fn subspace<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        norm: &dyn InPrecision<T>,
        rank: usize,
        last: usize,
    ) -> Result<(Subspace<T>, f64), SvdError> {
        let (w, SvdOptions { seed, stream, .. }) = (self.problem.w, self.options);
        let (sketched, bound, by_products) = if let Some(sketch) = self.sketch {
            (norm.sketch(kernels, w, rank, sketch, generator(seed, stream))?, 0.0, false)
        } else {
            let reduced = self.options.reduction.filter(|_| self.norm.keeps_decomposition());
            let reduced = reduced.filter(|_| self.options.method != MethodChoice::Projector);
            let (eigen, bound, by_products) =
                match reduced.and_then(|reduction| reduction.reduced(self.problem.backend)) {
                    Some(reduced) => (kernels.reduced_vectors(reduced, rank)?, 0.0, false),
                    None => {
                        let NormMatrix { a, bound } = norm.matrix(kernels, w);
                        // A singular second moment may leave fewer rows than the rank.
                        let count = rank.min(a.nrows());
                        match self.by_products(kernels, &a, count)? {
                            Some(eigen) => (eigen, bound, true),
                            None => (kernels.eigh(a, count)?, bound, false),
                        }
                    }
                };
            let basis = norm.basis(kernels, eigen.vectors)?;
            (Sketched { basis, image: None, eigenvalues: eigen.values }, bound, by_products)
        };
        let Sketched { basis: Basis { x, y }, image, eigenvalues } = sketched;
        let sigma = self.sigma(&eigenvalues, 0.0)?;
        let condition = condition(bound, &sigma, last);
        let basis = Basis { x: padded(x, rank), y: y.map(|y| padded(y, rank)) };
        Ok((Subspace { basis, image, sigma, by_products }, condition))
    }

    /// Orthonormal columns that span the first eigenvectors of A, and all eigenvalues, by
    /// [`lowrank_compute::projector`]. `None` where another method is wanted, where two eigenvalues on either side of
    /// `count` are equal to rounding, and where there is no other side: eigenvectors are needed then.
    fn by_products<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        a: &Array2<T>,
        count: usize,
    ) -> Result<Option<Eigen<T>>, SvdError> {
        let SvdOptions { method, seed, stream, spectrum, .. } = self.options;
        if method != MethodChoice::Projector {
            return Ok(None);
        }
        // The threshold lies between two eigenvalues, so they must be known. A has as many as it has rows, and a spectrum
        // as many as W's short side.
        let values: Vec<T> = match spectrum.filter(|known| known.sigma().len() == a.nrows()) {
            Some(known) => {
                known.sigma().iter().map(|sigma| T::of_f64(sigma * sigma / self.norm.scale())).collect()
            }
            None => kernels.eigvalsh(a.clone())?,
        };
        let wide: Vec<f64> = values.iter().map(|value| value.as_f64()).collect();
        let Some(split) = Split::after(count, &wide) else { return Ok(None) };
        let omega = random_signs(a.nrows(), count, generator(seed, stream));
        let vectors = kernels.upper_subspace(a.clone(), &split, omega)?;
        Ok(vectors.map(|vectors| Eigen { values, vectors }))
    }

    fn projected<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        found: Subspace<T>,
        rank: usize,
        precision: Precision,
    ) -> Truncated {
        let Subspace { basis: Basis { x, y }, image, sigma, by_products } = found;
        debug_assert_eq!(x.ncols(), rank);
        let y = y.as_ref().unwrap_or(&x);
        let side = self.norm.side();
        let image = image.unwrap_or_else(|| kernels.project(self.problem.w, side, y.view()));
        let balanced = balance(self.shape(), side, &x, image);
        let y = self.norm.errors_read_y().then(|| y.mapv(Real::as_f64));
        let route = match self.sketch {
            None if by_products => Route::Projector { precision },
            None => Route::Exact { precision },
            Some(Sketch { columns, power_iterations }) => {
                Route::Randomized { precision, sketch_columns: columns, power_iterations }
            }
        };
        Truncated { balanced, sigma, y, route }
    }

    /// The factors with their errors.
    fn measured(&self, truncated: Truncated, rank: usize) -> Factored {
        let Truncated { balanced, sigma, y, route } = truncated;
        let errors = self.norm.errors(&self.problem, &balanced, y.as_ref().map(|y| y.view()));
        let energy = self.problem.stats.energy;
        let relative_error = if energy == 0.0 { 0.0 } else { (errors.weights / energy).sqrt() };
        let metric_error = errors.norm.map(|error| {
            // What is kept and what is truncated are orthogonal in the norm.
            let kept: f64 = sigma[..rank].iter().map(|sigma| sigma * sigma).sum();
            if error == 0.0 { 0.0 } else { (error / (error + kept)).sqrt() }
        });
        let error = metric_error.unwrap_or(relative_error);
        let excess_over_optimum = self.options.spectrum.and_then(|spectrum| {
            let optimum = spectrum.relative_error(rank);
            (optimum > f64::from(f32::EPSILON)).then(|| (error / optimum - 1.0).max(0.0))
        });
        Factored { factors: balanced.factors, route, relative_error, metric_error, excess_over_optimum }
    }

    /// √(λ + shift), as many as W's short side. Eigenvalues beyond those are rounding.
    ///
    /// A Gram matrix has none far below zero: rounding moves λ by up to about ε·d·λ₁. A second moment that was summed in
    /// f32 may have some; what lies below zero counts as zero there. (Nor can its trace correct anything: on a falling
    /// spectrum the first eigenvalue holds most of the error of the sum.)
    fn sigma<T: Real>(&self, eigenvalues: &[T], shift: f64) -> Result<Vec<f64>, SvdError> {
        let values = || eigenvalues.iter().map(|value| value.as_f64());
        let largest = values().map(f64::abs).fold(0.0, f64::max);
        let tolerance = match self.norm.trace() {
            Some(_) => T::EPSILON.as_f64() * eigenvalues.len() as f64 * largest,
            None => f64::INFINITY,
        };
        let short = self.shape().short_side();
        let mut sigma = Vec::with_capacity(short);
        for value in values().take(short).map(|value| value + shift) {
            if !value.is_finite() || value < -tolerance {
                return Err(SvdError::Negative { value, tolerance });
            }
            sigma.push(value.max(0.0).sqrt());
        }
        sigma.resize(short, 0.0);
        Ok(sigma)
    }

    /// On the norm's own scale.
    fn scaled(&self, sigma: Vec<f64>) -> Result<Spectrum, SvdError> {
        let scale = self.norm.scale().sqrt();
        let sigma = sigma.into_iter().map(|value| value * scale).collect();
        Ok(Spectrum::new(sigma)?)
    }
}

/// Refuses a rank that does not exist, and a spectrum of another matrix.
fn check_request(shape: MatrixShape, rank: usize, spectrum: Option<&Spectrum>) -> Result<(), SvdError> {
    let rank_max = shape.short_side();
    if rank == 0 || rank > rank_max {
        return Err(SvdError::Rank { rank, rank_max, shape });
    }
    match spectrum {
        Some(spectrum) if spectrum.sigma().len() != rank_max => {
            Err(SvdError::OtherSpectrum { values: spectrum.sigma().len(), shape })
        }
        _ => Ok(()),
    }
}

/// With zero columns up to a rank that a singular second moment does not reach.
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
