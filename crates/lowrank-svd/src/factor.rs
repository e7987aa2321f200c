//! The factors of one matrix at a rank, by the exact or the randomized route, and what they miss.
//!
//! Exact: G = AᵀA on the short side, G = X Λ Xᵀ, Ŵ = (A X_r) X_rᵀ. A quarter of the work of a thin SVD at 14336×4096,
//! equally good where [`crate::precision`] lets it run in f32.

use crate::factors::{Split, split};
use crate::precision::{Known, condition, f32_saves, in_sufficient_precision};
use crate::projector::{Upper, upper};
use crate::randomized::{Sketch, Subspace, generator, subspace};
use crate::reduction::Reduction;
use crate::spectrum::sigma_from_eigenvalues;
use crate::survey::{Survey, survey};
use crate::{Factors, Precision, PrecisionChoice, SvdError};
use lowrank_compute::{Backend, Kernels, Real, Reduced, Side};
use lowrank_model::recipe::MethodChoice;
use lowrank_model::{MatrixId, MatrixShape, Projection, Spectrum, Tensor};
use ndarray::Array2;
use serde::{Deserialize, Serialize};
use std::fmt;

pub use crate::residual::residual_energy;

/// `auto` sketches only matrices whose short side is at least this.
const SKETCH_SHORT_SIDE_MIN: usize = 2048;
/// `auto` sketches only ranks up to short side / this. Measured at 14336×4096 with the default options: at 1/64 eleven
/// times faster than exact with an excess of 0.13 %, at 1/20 three times and 0.33 %, at 1/10 no faster and 0.46 %.
const SKETCH_SHORT_SIDE_PER_RANK: usize = 20;
/// Below this share of the energy, what is missed is no longer the difference of two sums but computed. What is kept is
/// summed over f32 numbers, so it may be off by f32's 6e-8 of itself where they are few: here 3e-6 of what is missed.
const MISSED_SHARE_BY_DIFFERENCE: f64 = 2e-2;
/// A product of f32 numbers is off by about 1e-14 of the energy: of this share that is missed, an excess error of 1e-10.
const MISSED_SHARE_OF_F32: f64 = 1e-4;

/// How to factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactorOptions {
    /// Route.
    pub method: MethodChoice,
    /// Precision of either route.
    pub precision: PrecisionChoice,
    /// Seed of the run; only the randomized route draws.
    pub seed: u64,
    /// Tells matrices of one run apart; see [`FactorOptions::for_matrix`].
    pub stream: u64,
    /// Power iterations of the randomized route.
    pub power_iterations: usize,
    /// Sketch columns beyond the rank, as a share of it in percent; at least 16 columns.
    pub oversampling_percent: usize,
}

impl Default for FactorOptions {
    fn default() -> Self {
        Self {
            method: MethodChoice::Auto,
            precision: PrecisionChoice::Auto,
            seed: 0,
            stream: 0,
            power_iterations: 4,
            oversampling_percent: 50,
        }
    }
}

impl FactorOptions {
    /// The same options with the random stream of one matrix.
    #[must_use]
    pub fn for_matrix(self, id: MatrixId) -> Self {
        let projection = match id.projection {
            Projection::W1 => 0,
            Projection::W2 => 1,
            Projection::W3 => 2,
        };
        Self { stream: (id.layer as u64) << 32 | (id.expert as u64) << 2 | projection, ..self }
    }

    pub(crate) fn sketch(&self, shape: MatrixShape, rank: usize) -> Option<Sketch> {
        let short = shape.short_side();
        let sketched = match self.method {
            MethodChoice::Exact | MethodChoice::Projector => false,
            MethodChoice::Randomized => true,
            MethodChoice::Auto => {
                short >= SKETCH_SHORT_SIDE_MIN && rank * SKETCH_SHORT_SIDE_PER_RANK <= short
            }
        };
        let columns = rank + (rank * self.oversampling_percent / 100).max(16);
        sketched.then(|| Sketch { columns: columns.min(short), power_iterations: self.power_iterations })
    }
}

/// How factors were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Route {
    /// Gram matrix, all eigenvectors, projection.
    Exact {
        /// Computed in.
        precision: Precision,
    },
    /// Gram matrix, a projector onto its upper side by products, projection.
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
    /// The same in the metric that the factors were made for, and relative to what the metric makes of Ŵ = 0; absent
    /// where that is [`crate::Metric::Weights`].
    pub metric_error: Option<f64>,
    /// The error in the metric over the least possible at this rank, − 1. Absent without a spectrum (a sketch alone bounds the optimum
    /// only from above), and where the optimum lies below the rounding of f32.
    pub excess_over_optimum: Option<f64>,
}

/// Factors W [m, n] at a rank. A spectrum of W, if at hand, saves a trial in f32 and gives the excess error.
pub fn factor(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    options: &FactorOptions,
    spectrum: Option<&Spectrum>,
) -> Result<Factored, SvdError> {
    factor_reduced(backend, w, rank, options, spectrum, None)
}

/// As [`factor`], beginning from what the spectrum of the same W left behind, where that helps; the same bits.
pub(crate) fn factor_reduced(
    backend: &dyn Backend,
    w: &Tensor,
    rank: usize,
    options: &FactorOptions,
    spectrum: Option<&Spectrum>,
    reduction: Option<&Reduction>,
) -> Result<Factored, SvdError> {
    let survey = survey(w)?;
    let Survey { shape, energy, largest_weight } = survey;
    check_request(shape, rank, spectrum)?;
    let side = Side::short(shape);
    let sketch = options.sketch(shape, rank);
    let known = Known {
        shape,
        largest_weight,
        condition: spectrum.map(|spectrum| condition(spectrum.sigma()[0], spectrum.sigma()[rank - 1])),
    };
    let task = Task { w, side, rank, sketch, options, spectrum };
    let (ready, precision) =
        in_sufficient_precision(options.precision, &known, |precision| match precision {
            Precision::F32 => task
                .find::<f32>(backend, kept(reduction, backend, precision))
                .map(|(found, condition)| (Ready::F32(found), condition)),
            Precision::F64 => task
                .find::<f64>(backend, kept(reduction, backend, precision))
                .map(|(found, condition)| (Ready::F64(found), condition)),
        })?;
    let way = match &ready {
        Ready::F32(found) => found.way,
        Ready::F64(found) => found.way,
    };
    let Split { factors, kept_energy, .. } = match ready {
        Ready::F32(found) => task.split::<f32>(backend, shape, found),
        Ready::F64(found)
            if found.missed_share >= MISSED_SHARE_OF_F32 && f32_saves(shape, largest_weight) =>
        {
            // For half the price: factors are f32 anyway.
            let Found { x, image, way, missed_share } = found;
            task.split::<f32>(backend, shape, Found { x: x.mapv(Real::as_f32), image, way, missed_share })
        }
        Ready::F64(found) => task.split::<f64>(backend, shape, found),
    };
    if !kept_energy.is_finite() {
        return Err(SvdError::Overflow { largest_weight });
    }
    let missed = missed_energy(backend, w, energy, kept_energy, &factors);
    let relative_error = if energy == 0.0 { 0.0 } else { (missed / energy).sqrt() };
    let excess_over_optimum = excess(Some(relative_error), spectrum, rank);
    Ok(Factored {
        factors,
        route: route(sketch, way, precision),
        relative_error,
        metric_error: None,
        excess_over_optimum,
    })
}

/// What is at hand for a search in this precision.
fn kept<T: Real>(
    reduction: Option<&Reduction>,
    backend: &dyn Backend,
    precision: Precision,
) -> Option<Reduced<T>> {
    reduction.filter(|reduction| reduction.precision() == precision)?.reduced(backend)
}

/// Everything about the search except its precision.
struct Task<'a> {
    w: &'a Tensor,
    side: Side,
    rank: usize,
    sketch: Option<Sketch>,
    options: &'a FactorOptions,
    spectrum: Option<&'a Spectrum>,
}

/// The subspace found, with its image if the search made one on its way.
struct Found<T> {
    x: Array2<T>,
    image: Option<Array2<f32>>,
    way: Way,
    /// Of ‖W‖²; 0 where that is not known.
    missed_share: f64,
}

/// Σ σ² from `rank` on, of all of it; 0 where the values that are known end there.
fn missed_share(sigma: &[f64], rank: usize) -> f64 {
    let energy = |sigma: &[f64]| sigma.iter().map(|sigma| sigma * sigma).sum::<f64>();
    let missed = energy(&sigma[rank..]);
    if missed == 0.0 { 0.0 } else { missed / energy(sigma) }
}

/// How a subspace that is no sketch was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Eigenvectors,
    Products,
}

enum Ready {
    F32(Found<f32>),
    F64(Found<f64>),
}

impl Task<'_> {
    /// The subspace and σ₁/σᵣ.
    fn find<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        kept: Option<Reduced<T>>,
    ) -> Result<(Found<T>, f64), SvdError> {
        let (found, sigma) = match self.sketch {
            None => {
                let (x, values, way) = self.exact(kernels, kept)?;
                let sigma = sigma_from_eigenvalues(&values, 0.0)?;
                let missed_share = missed_share(&sigma, self.rank);
                (Found { x, image: None, way, missed_share }, sigma)
            }
            Some(sketch) => {
                let rng = generator(self.options.seed, self.options.stream);
                let Subspace { x, image, sigma } =
                    subspace(kernels, self.w, self.side, self.rank, sketch, rng)?;
                (Found { x, image: Some(image), way: Way::Eigenvectors, missed_share: 0.0 }, sigma)
            }
        };
        Ok((found, condition(sigma[0], sigma[self.rank - 1])))
    }

    /// The subspace [d, r] and all eigenvalues.
    fn exact<T: Real>(
        &self,
        kernels: &dyn Kernels<T>,
        kept: Option<Reduced<T>>,
    ) -> Result<(Array2<T>, Vec<T>, Way), SvdError> {
        let projector = self.options.method == MethodChoice::Projector;
        if let Some(reduced) = kept.filter(|_| !projector) {
            let eigen = kernels.reduced_vectors(reduced, self.rank)?;
            return Ok((eigen.vectors, eigen.values, Way::Eigenvectors));
        }
        let gram = kernels.gram(self.w, self.side);
        if projector {
            let squares = |spectrum: &Spectrum| spectrum.sigma().iter().map(|sigma| sigma * sigma).collect();
            let rng = generator(self.options.seed, self.options.stream);
            let upper = upper(kernels, &gram, self.rank, self.spectrum.map(squares), rng)?;
            if let Some(Upper { basis, values }) = upper {
                return Ok((basis, values, Way::Products));
            }
        }
        let eigen = kernels.eigh(gram, self.rank)?;
        Ok((eigen.vectors, eigen.values, Way::Eigenvectors))
    }

    fn split<T: Real>(&self, kernels: &dyn Kernels<T>, shape: MatrixShape, found: Found<T>) -> Split {
        let Found { x, image, .. } = found;
        let image = image.unwrap_or_else(|| kernels.project(self.w, self.side, x.view()));
        split(shape, self.side, &x, image)
    }
}

/// ‖W − u·v‖², from the energy that the factors keep where that is exact enough.
pub(crate) fn missed_energy(
    backend: &dyn Backend,
    w: &Tensor,
    energy: f64,
    kept_energy: f64,
    factors: &Factors,
) -> f64 {
    let by_difference = energy - kept_energy;
    if by_difference >= MISSED_SHARE_BY_DIFFERENCE * energy {
        by_difference
    } else {
        residual_energy(backend, w, factors)
    }
}

/// Refuses a rank that is none, and a spectrum of another matrix.
pub(crate) fn check_request(
    shape: MatrixShape,
    rank: usize,
    spectrum: Option<&Spectrum>,
) -> Result<(), SvdError> {
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

pub(crate) fn route(sketch: Option<Sketch>, way: Way, precision: Precision) -> Route {
    match sketch {
        None if way == Way::Products => Route::Projector { precision },
        None => Route::Exact { precision },
        Some(Sketch { columns, power_iterations }) => {
            Route::Randomized { precision, sketch_columns: columns, power_iterations }
        }
    }
}

/// An error over the optimum of its rank, − 1.
pub(crate) fn excess(error: Option<f64>, spectrum: Option<&Spectrum>, rank: usize) -> Option<f64> {
    let (error, optimum) = (error?, spectrum?.relative_error(rank));
    (optimum > f64::from(f32::EPSILON)).then(|| (error / optimum - 1.0).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spectrum;
    use lowrank_compute::Faer;
    use lowrank_model::Dtype;
    use rand_chacha::rand_core::RngCore;
    use rayon::prelude::*;

    /// Σ over k of decay^k · aₖ bₖᵀ + noise, entries of a, b and noise uniform.
    fn matrix(rows: usize, cols: usize, decay: f64, noise: f64, seed: u64) -> Tensor {
        let mut rng = generator(seed, 0);
        let mut uniform = |rows, cols| {
            Array2::from_shape_simple_fn((rows, cols), || f64::from(rng.next_u32()) / 2.0_f64.powi(31) - 1.0)
        };
        let terms = rows.min(cols);
        let (mut a, b) = (uniform(rows, terms), uniform(terms, cols));
        for (k, mut column) in a.columns_mut().into_iter().enumerate() {
            column *= decay.powi(k as i32);
        }
        let values = a.dot(&b) + noise * uniform(rows, cols);
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        Tensor::from_f32(vec![rows, cols], Dtype::F32, &values).unwrap()
    }

    /// The optimum at every rank by a direct SVD, as a share of ‖W‖.
    fn optimum(w: &Tensor) -> Spectrum {
        let shape = (w.shape()[0], w.shape()[1]);
        let wide = Array2::from_shape_vec(shape, w.to_f32()).unwrap().mapv(f64::from);
        let kernels: &dyn Kernels<f64> = &Faer;
        Spectrum::new(kernels.singular_values(wide).unwrap()).unwrap()
    }

    fn true_error(w: &Tensor, factors: &Factors) -> f64 {
        let energy: f64 = w.to_f32().iter().map(|&value| f64::from(value).powi(2)).sum();
        (residual_energy(&Faer, w, factors) / energy).sqrt()
    }

    #[test]
    fn factors_reach_the_optimum_and_know_their_error() {
        for (rows, cols) in [(60, 24), (24, 60), (30, 30), (1, 12), (12, 1), (1, 1), (1200, 40), (40, 1200)] {
            for (decay, noise) in [(0.9, 0.01), (1.0, 0.0), (0.5, 1e-5)] {
                let w = matrix(rows, cols, decay, noise, 3);
                let (reference, known) = (optimum(&w), spectrum(&Faer, &w, PrecisionChoice::Auto).unwrap());
                let short = rows.min(cols);
                for rank in [1, short.div_ceil(2), short] {
                    for known in [None, Some(&known)] {
                        let options = FactorOptions { method: MethodChoice::Exact, ..Default::default() };
                        let factored = factor(&Faer, &w, rank, &options, known).unwrap();
                        let optimum = reference.relative_error(rank);
                        let actual = true_error(&w, &factored.factors);
                        let what = format!("{rows}x{cols} decay {decay} rank {rank}");
                        assert_eq!(factored.route, Route::Exact { precision: Precision::F64 });
                        // Factors are f32: their rounding adds about ε·‖W‖ in quadrature.
                        assert!(actual <= optimum * (1.0 + 1e-6) + 2e-7, "{what}: {actual} for {optimum}");
                        assert!(
                            (factored.relative_error - actual).abs() <= 1e-6 * actual,
                            "{what}: {factored:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn f32_is_as_good_where_the_spectrum_is_mild() {
        let w = matrix(300, 120, 0.99, 0.1, 5);
        let options = FactorOptions {
            method: MethodChoice::Exact,
            precision: PrecisionChoice::F32,
            ..Default::default()
        };
        let reference = optimum(&w);
        for rank in [10, 60, 100] {
            let factored = factor(&Faer, &w, rank, &options, None).unwrap();
            let actual = true_error(&w, &factored.factors);
            assert!(actual / reference.relative_error(rank) - 1.0 < 1e-5);
            assert!((factored.relative_error / actual - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn zero_and_rank_deficient_matrices_have_finite_factors() {
        let zero = Tensor::from_f32(vec![6, 9], Dtype::Bf16, &[0.0; 54]).unwrap();
        let ones = Tensor::from_f32(vec![9, 6], Dtype::Bf16, &[1.0; 54]).unwrap();
        for method in [MethodChoice::Exact, MethodChoice::Randomized] {
            for precision in [PrecisionChoice::F32, PrecisionChoice::F64] {
                let options = FactorOptions { method, precision, ..Default::default() };
                let factored = factor(&Faer, &zero, 4, &options, None).unwrap();
                assert_eq!(factored.relative_error, 0.0);
                assert!(factored.factors.u.iter().chain(&factored.factors.v).all(|&value| value == 0.0));
                let factored = factor(&Faer, &ones, 4, &options, None).unwrap();
                assert!(factored.relative_error < 1e-6, "{factored:?}");
                assert!(factored.factors.u.iter().chain(&factored.factors.v).all(|value| value.is_finite()));
            }
        }
    }

    #[test]
    fn both_factors_carry_the_root_of_each_singular_value() {
        let w = matrix(50, 20, 0.8, 0.0, 6);
        let Factors { u, v, rank, .. } =
            factor(&Faer, &w, 5, &FactorOptions::default(), None).unwrap().factors;
        let sigma = optimum(&w);
        for j in 0..rank {
            let size =
                |values: &mut dyn Iterator<Item = &f32>| values.map(|&x| f64::from(x).powi(2)).sum::<f64>();
            for norm in [size(&mut u.iter().skip(j).step_by(rank)), size(&mut v[j * 20..(j + 1) * 20].iter())]
            {
                assert!((norm / sigma.sigma()[j] - 1.0).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn the_sketch_finds_a_falling_spectrum_and_reports_what_it_misses_of_a_flat_one() {
        let options = FactorOptions { method: MethodChoice::Randomized, ..Default::default() };
        for (rows, cols) in [(400, 150), (150, 400)] {
            let w = matrix(rows, cols, 0.8, 1e-3, 7);
            let known = spectrum(&Faer, &w, PrecisionChoice::Auto).unwrap();
            let factored = factor(&Faer, &w, 10, &options, Some(&known)).unwrap();
            assert!(factored.excess_over_optimum.unwrap() < 1e-4, "{factored:?}");
            let flat = matrix(rows, cols, 1.0, 1.0, 8);
            let known = spectrum(&Faer, &flat, PrecisionChoice::Auto).unwrap();
            let options = FactorOptions { power_iterations: 0, ..options };
            let factored = factor(&Faer, &flat, 10, &options, Some(&known)).unwrap();
            let actual = true_error(&flat, &factored.factors);
            let excess = actual / known.relative_error(10) - 1.0;
            assert!(excess > 1e-3);
            assert!((factored.excess_over_optimum.unwrap() / excess - 1.0).abs() < 1e-3);
            assert!((factored.relative_error / actual - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn auto_sketches_only_small_ranks_of_large_matrices() {
        let options = FactorOptions::default();
        let mixtral = MatrixShape { rows: 14336, cols: 4096 };
        assert_eq!(options.sketch(mixtral, 2479), None);
        assert_eq!(options.sketch(mixtral, 64).map(|sketch| sketch.columns), Some(96));
        assert_eq!(options.sketch(MatrixShape { rows: 448, cols: 128 }, 1), None);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_workers() {
        let weights: Vec<Tensor> = (0..4).map(|seed| matrix(200, 90, 0.95, 0.01, seed)).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let work = weights.par_iter().enumerate().flat_map(|(stream, w)| {
                    [MethodChoice::Exact, MethodChoice::Randomized].into_par_iter().map(move |method| {
                        let options = FactorOptions { method, stream: stream as u64, ..Default::default() };
                        let spectrum = spectrum(&Faer, w, PrecisionChoice::Auto).unwrap();
                        let factored = factor(&Faer, w, 20, &options, None).unwrap();
                        (spectrum, factored)
                    })
                });
                work.collect::<Vec<_>>()
            })
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn ranks_and_spectra_that_do_not_fit_are_refused() {
        let w = matrix(4, 6, 1.0, 0.0, 1);
        let try_rank = |rank| factor(&Faer, &w, rank, &FactorOptions::default(), None).unwrap_err();
        let shape = MatrixShape { rows: 4, cols: 6 };
        assert_eq!(try_rank(0), SvdError::Rank { rank: 0, rank_max: 4, shape });
        assert_eq!(try_rank(5), SvdError::Rank { rank: 5, rank_max: 4, shape });
        let other = Spectrum::new(vec![1.0; 5]).unwrap();
        let error = factor(&Faer, &w, 1, &FactorOptions::default(), Some(&other)).unwrap_err();
        assert_eq!(error, SvdError::OtherSpectrum { values: 5, shape });
    }
}
