//! The main job: plan, then factor every chosen matrix and copy everything else, then publish.

use crate::workers::{self, Resources};
use crate::{FactorSettings, PipelineError, PlanSettings, base, planning, round::round};
use lowrank_compute::Faer;
use lowrank_model::names::{Role, TensorSpec, factor_names, pivoted_names};
use lowrank_model::pivots::factor_shapes;
use lowrank_model::{Budget, Dtype, ElementType, MatrixId, Progress, RankPlan, Spectrum, Storage, Tensor};
use lowrank_reader::{Checkpoint, StoredMatrix};
use lowrank_svd::{FactorOptions, Factored, Factors};
use lowrank_writer::report::{Outcome, Settings};
use lowrank_writer::{
    Card, ChatTemplate, CheckpointWriter, Documents, OutputTensor, Published, Report, ShardLayout, check_out,
    check_space,
};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// What to compress, how, and where to.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The model as it was named by the user; only a public name gets into the output.
    pub model: &'a str,
    /// Where the result appears; must not exist.
    pub out: &'a Path,
    /// How ranks are chosen.
    pub plan: &'a PlanSettings,
    /// How factors are computed and written.
    pub factor: &'a FactorSettings,
    /// Threads and memory.
    pub resources: Resources,
}

/// What was done.
#[derive(Debug)]
pub struct Compressed {
    /// The ranks.
    pub plan: RankPlan,
    /// What lies at the output now.
    pub published: Published,
}

/// Compresses a checkpoint.
pub fn compress(
    checkpoint: &Checkpoint,
    request: Request<'_>,
    progress: &dyn Progress,
) -> Result<Compressed, PipelineError> {
    // Everything that can be refused is refused before an hour is spent.
    check_out(request.out)?;
    let parent =
        request.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    check_space(parent, bytes_at_most(checkpoint, request.plan)?)?;
    let pool = workers::pool(checkpoint.config(), request.resources)?;
    let planned = planning::plan(checkpoint, request.plan, request.resources, progress)?;
    let plan = planned.plan;
    let base_model = base::identify(checkpoint, request.model, &pool, progress)?;

    let work = Work {
        checkpoint,
        plan: &plan,
        ranks: plan.ranks(),
        optimum: plan.matrices.iter().map(|row| (row.name, row.relative_error)).collect(),
        spectra: &planned.spectra,
        request,
    };
    let writer = CheckpointWriter::create(request.out, work.layout()?)?;
    let outcomes = work.write_tensors(&writer, &pool, progress)?;

    let report = Report::new(&plan, &outcomes, base_model, work.settings());
    let chat_template = ChatTemplate::find(checkpoint.dir());
    let own_card = std::fs::read_to_string(checkpoint.dir().join("README.md")).unwrap_or_default();
    let card = Card {
        base_model: report.base_model.id.as_deref(),
        license: lowrank_writer::card::license_of(&own_card),
        chat_template: chat_template.as_ref(),
    };
    let documents = Documents::factored(
        checkpoint.config_json(),
        &work.ranks,
        plan.cost.storage,
        work.factor_dtype(),
        &report,
        &card,
    )?
    .with_companions(checkpoint.dir(), &checkpoint.companions())?;
    progress.start("publish", 1, "directory");
    let published = writer.finish(documents)?;
    progress.finish();
    Ok(Compressed { plan, published })
}

/// An upper bound of the output's weights, known before any spectrum is.
fn bytes_at_most(checkpoint: &Checkpoint, settings: &PlanSettings) -> Result<u64, PipelineError> {
    let before = checkpoint.size();
    let removed = match &settings.goal {
        crate::Goal::Budget(budget) => match budget {
            Budget::TargetBytes(target) => before.bytes.saturating_sub(*target),
            budget => {
                let target = budget.resolve(before.params, before.bytes)?;
                // Two bytes is the least that a removed parameter can have taken.
                target.remove_at_least.saturating_mul(2).min(before.bytes)
            }
        },
        crate::Goal::Plan(plan) => before.bytes.saturating_sub(plan.after.bytes),
        crate::Goal::Ranks(_) => 0,
    };
    Ok(before.bytes - removed)
}

/// One compression under way.
struct Work<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a RankPlan,
    ranks: BTreeMap<MatrixId, usize>,
    /// Error of the best factors of the planned rank, where spectra are known.
    optimum: BTreeMap<MatrixId, Option<f64>>,
    spectra: &'a BTreeMap<MatrixId, Spectrum>,
    request: Request<'a>,
}

impl Work<'_> {
    fn factor_dtype(&self) -> Dtype {
        let first = self.plan.matrices[0].name;
        self.request.plan.factor_dtype.unwrap_or_else(|| self.checkpoint.matrix_dtype(first))
    }

    fn rank_of(&self, spec: &TensorSpec) -> Option<(MatrixId, usize)> {
        match spec.role {
            Role::Expert(id) => Some((id, *self.ranks.get(&id)?)),
            _ => None,
        }
    }

    fn stored_dtype(&self, spec: &TensorSpec) -> Dtype {
        match spec.role {
            Role::Expert(id) => self.checkpoint.matrix_dtype(id),
            _ => self.checkpoint.dtype(&spec.name).expect("validated when opened"),
        }
    }

    /// Every tensor of the output, in stored order.
    fn layout(&self) -> Result<ShardLayout, PipelineError> {
        let mut output = Vec::new();
        for spec in self.checkpoint.specs() {
            match self.rank_of(spec) {
                Some((id, r)) => {
                    let shape = self.checkpoint.config().matrix_shape(id.projection);
                    let dtype = ElementType::from(self.factor_dtype());
                    match self.plan.cost.storage {
                        Storage::Uv => {
                            let (u, v) = factor_names(id);
                            output.push(OutputTensor { name: u, dtype, shape: vec![shape.rows, r] });
                            output.push(OutputTensor { name: v, dtype, shape: vec![r, shape.cols] });
                        }
                        Storage::Pivoted => {
                            let (basis, coefficients, order) = pivoted_names(id);
                            let shapes = factor_shapes(shape, r).map(Vec::from);
                            for (name, shape) in [basis, coefficients].into_iter().zip(shapes) {
                                output.push(OutputTensor { name, dtype, shape });
                            }
                            let (dtype, shape) = (ElementType::Index, vec![shape.short_side()]);
                            output.push(OutputTensor { name: order, dtype, shape });
                        }
                    }
                }
                None => output.push(OutputTensor {
                    name: spec.name.clone(),
                    dtype: self.stored_dtype(spec).into(),
                    shape: spec.shape.clone(),
                }),
            }
        }
        Ok(ShardLayout::new(output, self.request.factor.shard_bytes_max)?)
    }

    fn write_tensors(
        &self,
        writer: &CheckpointWriter,
        pool: &rayon::ThreadPool,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixId, Outcome>, PipelineError> {
        let specs = self.checkpoint.specs();
        progress.start("factor and write", specs.len() as u64, "tensors");
        let outcomes: Result<Vec<Option<(MatrixId, Outcome)>>, PipelineError> = pool.install(|| {
            specs
                .par_iter()
                .with_max_len(1)
                .map(|spec| {
                    let outcome = match self.rank_of(spec) {
                        Some((id, rank)) => Some((id, self.factor(writer, id, rank)?)),
                        None => self.copy(writer, spec).map(|()| None)?,
                    };
                    progress.advance(1);
                    Ok(outcome)
                })
                .collect()
        });
        progress.finish();
        Ok(outcomes?.into_iter().flatten().collect())
    }

    fn copy(&self, writer: &CheckpointWriter, spec: &TensorSpec) -> Result<(), PipelineError> {
        let tensor = self.checkpoint.read_tensor(spec)?;
        self.checkpoint.check_finite(&spec.name, &tensor)?;
        Ok(writer.write(&spec.name, &tensor)?)
    }

    fn factor(&self, writer: &CheckpointWriter, id: MatrixId, rank: usize) -> Result<Outcome, PipelineError> {
        let StoredMatrix::Dense(matrix) = self.checkpoint.read_matrix(id)? else {
            return Err(PipelineError::AlreadyFactored(self.checkpoint.layout()));
        };
        self.checkpoint.check_finite(&format!("{id}.weight"), &matrix)?;
        let FactorSettings { method, seed, .. } = *self.request.factor;
        let options = FactorOptions { method, seed, ..FactorOptions::default() }.for_matrix(id);
        let Factored { factors, route, relative_error, .. } =
            lowrank_svd::factor(&Faer, &matrix, rank, &options, self.spectra.get(&id))
                .map_err(|source| PipelineError::Svd { name: id, source })?;
        drop(matrix);
        let (largest_coefficient, round_trip_error) = match self.plan.cost.storage {
            Storage::Uv => {
                self.write_factors(writer, id, &factors)?;
                (None, None)
            }
            Storage::Pivoted => {
                let (largest, error) = self.write_pivoted(writer, id, &factors)?;
                (Some(largest), Some(error))
            }
        };
        Ok(Outcome {
            relative_error,
            excess_over_optimum: excess(relative_error, self.optimum[&id]),
            route: route.to_string(),
            largest_coefficient,
            round_trip_error,
        })
    }

    fn write_factors(
        &self,
        writer: &CheckpointWriter,
        id: MatrixId,
        factors: &Factors,
    ) -> Result<(), PipelineError> {
        let Factors { shape, rank, u, v } = factors;
        let (u_name, v_name) = factor_names(id);
        let dtype = self.factor_dtype();
        writer.write(&u_name, &round(&u_name, vec![shape.rows, *rank], dtype, u)?)?;
        writer.write(&v_name, &round(&v_name, vec![*rank, shape.cols], dtype, v)?)?;
        Ok(())
    }

    /// Stores u·v by its pivots. → largest coefficient, error of the rounding.
    fn write_pivoted(
        &self,
        writer: &CheckpointWriter,
        id: MatrixId,
        factors: &Factors,
    ) -> Result<(f64, f64), PipelineError> {
        let pivoted =
            lowrank_svd::pivot(&Faer, factors).map_err(|source| PipelineError::Svd { name: id, source })?;
        let (basis_name, coefficients_name, order_name) = pivoted_names(id);
        let [basis_shape, coefficients_shape] = factor_shapes(factors.shape, factors.rank);
        let rounded = |name: &str, shape: [usize; 2], values: &[f32]| -> Result<Tensor, PipelineError> {
            round(name, shape.to_vec(), self.factor_dtype(), values)
        };
        let basis = rounded(&basis_name, basis_shape, &pivoted.basis)?;
        let coefficients = rounded(&coefficients_name, coefficients_shape, &pivoted.coefficients)?;
        writer.write(&basis_name, &basis)?;
        writer.write(&coefficients_name, &coefficients)?;
        writer.write_order(&order_name, &pivoted.order)?;
        let error = pivoted.round_trip_error(&Faer, factors, &basis, &coefficients);
        Ok((pivoted.largest_coefficient, error))
    }

    fn settings(&self) -> Settings {
        // The plan knows how it was made, so that a stored plan gives the same report as its budget did.
        let FactorSettings { method, seed, shard_bytes_max } = *self.request.factor;
        Settings {
            method: method.to_string(),
            precision: "auto".into(),
            seed,
            sensitivity: self.plan.optimality.map(|optimality| optimality.sensitivity).unwrap_or_default(),
            rank_multiple: self.plan.rank_multiple,
            rank_min: self.plan.rank_min,
            keep_dense: self.plan.keep_dense.clone(),
            factor_dtype: self.factor_dtype(),
            shard_bytes_max,
        }
    }
}

/// How far factors are from the best of their rank. Below f32's resolution both errors are rounding.
fn excess(relative_error: f64, optimum: Option<f64>) -> Option<f64> {
    let optimum = optimum.filter(|&optimum| optimum > f64::from(f32::EPSILON))?;
    Some((relative_error / optimum - 1.0).max(0.0))
}
