//! Measures one matrix from the checkpoint to factors on disk, stage by stage, as the tool computes it: spectrum, factors from
//! the reduction that the spectrum computed, rounding, writing.

use anyhow::{Context, Result, bail};
use lowrank_bench::meter::{Meter, Took, peak_resident_bytes, timed};
use lowrank_compute::{Accumulate, Backend, Faer, Kernels, Real};
use lowrank_model::{Dtype, MatrixId, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::residual::residual_energy;
use lowrank_svd::{MethodChoice, PrecisionChoice, SvdOptions, factor, interpolative, spectrum};
use ndarray::Array2;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// Settings of the measurement.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Matrix {
    model: PathBuf,
    /// Module name.
    matrix: String,
    rank: usize,
    precision: PrecisionChoice,
    backend: BackendName,
    /// Pivoted storage instead of u·v.
    #[serde(default)]
    pivoted: bool,
    /// File for the factors; removed afterwards.
    out: PathBuf,
    /// Whether to compare with the optimum, which takes another decomposition in f64.
    #[serde(default)]
    compare: bool,
}

/// The linear-algebra backend.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum BackendName {
    Faer,
    Lapack,
}

impl BackendName {
    fn open(self) -> Result<&'static dyn Backend> {
        match self {
            Self::Faer => Ok(&Faer),
            #[cfg(feature = "lapack")]
            Self::Lapack => Ok(&lowrank_compute::Lapack),
            #[cfg(not(feature = "lapack"))]
            Self::Lapack => bail!("this was built without its feature `lapack`"),
        }
    }
}

impl Matrix {
    pub(crate) fn run(&self) -> Result<Value> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let id = MatrixId::parse(&self.matrix).context("not the name of an expert matrix")?;
        let backend = self.backend.open()?;
        let options =
            SvdOptions { method: MethodChoice::Exact, precision: self.precision, ..SvdOptions::default() };
        let mut stages: Vec<(&str, Took)> = Vec::new();
        let meter = Meter::start()?;

        let read = || -> Result<Tensor> {
            let StoredMatrix::Dense(w) = checkpoint.read_matrix(id)? else {
                bail!("{id} is factored already")
            };
            checkpoint.check_matrix_finite(id, &w)?;
            Ok(w)
        };
        let (w, took) = timed(read)?;
        stages.push(("read", took));
        let (reduced, took) = timed(|| Ok(spectrum(backend, &w, &options)?))?;
        stages.push(("spectrum", took));
        let (sigma, reduction) = reduced;
        // The second pass of a run reads the matrix again.
        drop(w);
        let (w, took) = timed(read)?;
        stages.push(("read again", took));
        let (factored, took) = timed(|| {
            let options = SvdOptions { spectrum: Some(&sigma), reduction: reduction.as_ref(), ..options };
            Ok(factor(backend, &w, self.rank, &options)?)
        })?;
        stages.push(("factors", took));
        let factors = &factored.factors;
        let (m, n, r) = (factors.shape.rows, factors.shape.cols, self.rank);
        let stored = if self.pivoted {
            let (pivoted, took) = timed(|| Ok(interpolative(backend, factors)?))?;
            stages.push(("pivots", took));
            let [basis, table] = lowrank_model::pivots::factor_shapes(factors.shape, r).map(Vec::from);
            let round = || {
                Ok((
                    Tensor::from_f32(basis, Dtype::Bf16, &pivoted.basis)?,
                    Tensor::from_f32(table, Dtype::Bf16, &pivoted.coefficients)?,
                ))
            };
            let (stored, took) = timed(round)?;
            stages.push(("round", took));
            let (_, took) = timed(|| Ok(pivoted.round_trip_error(backend, factors, &stored.0, &stored.1)))?;
            stages.push(("error of rounding", took));
            stored
        } else {
            let round = || {
                Ok((
                    Tensor::from_f32(vec![m, r], Dtype::Bf16, &factors.u)?,
                    Tensor::from_f32(vec![r, n], Dtype::Bf16, &factors.v)?,
                ))
            };
            let (stored, took) = timed(round)?;
            stages.push(("round", took));
            stored
        };
        let (_, took) = timed(|| {
            let mut file = File::create(&self.out).with_context(|| self.out.display().to_string())?;
            file.write_all(stored.0.bytes())?;
            file.write_all(stored.1.bytes())?;
            Ok(file.sync_all()?)
        })?;
        stages.push(("write", took));
        let total = meter.took()?;
        let peak = peak_resident_bytes()?;
        std::fs::remove_file(&self.out)?;

        let excess = if self.compare {
            let options = SvdOptions { precision: PrecisionChoice::F64, ..options };
            let (optimum, _) = spectrum(backend, &w, &options)?;
            let error = (residual_energy(backend, &w, factors) / optimum.energy()).sqrt();
            Some(error / optimum.relative_error(r) - 1.0)
        } else {
            None
        };
        // Gram matrix, reduction, back-transformation of vectors, projection. The tridiagonal problem is not counted, because
        // its operations depend on the numbers.
        let (long, short, r) = (m.max(n) as f64, m.min(n) as f64, r as f64);
        let operations = long * short * short
            + 4.0 / 3.0 * short.powi(3)
            + 2.0 * short * short * r
            + 2.0 * long * short * r;
        let named: Vec<Value> =
            stages.iter().map(|(name, took)| json!({ "stage": name, "took": took })).collect();
        Ok(json!({
            "total": total, "stages": named, "peak_resident_bytes": peak, "route": factored.route.to_string(),
            "excess": excess, "operations": operations,
        }))
    }
}

/// The peak rate of a matrix product on one thread, to which the shares of the GEMM peak refer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gemm {
    /// Side of the square matrices.
    size: usize,
}

impl Gemm {
    pub(crate) fn run(&self) -> Result<Value> {
        Ok(json!({ "f32": self.rate::<f32>(&Faer)?, "f64": self.rate::<f64>(&Faer)? }))
    }

    /// Operations per second, the best of five runs.
    fn rate<T: Real>(&self, kernels: &dyn Kernels<T>) -> Result<f64> {
        let size = self.size;
        let of = |step: usize| {
            Array2::from_shape_fn((size, size), |(i, j)| T::of_f32(((i * 7 + j * step) % 19) as f32))
        };
        let (a, b, mut c) = (of(3), of(5), Array2::zeros((size, size)));
        let mut best = 0.0_f64;
        for _ in 0..5 {
            let (_, took) = timed(|| {
                kernels.gemm(a.view(), b.view(), c.view_mut(), Accumulate::Replace);
                Ok(())
            })?;
            best = best.max(2.0 * (size as f64).powi(3) / took.wall_s);
        }
        Ok(best)
    }
}
