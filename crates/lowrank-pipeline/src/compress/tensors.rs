//! Writes the tensors of the output: factors of the chosen matrices, everything else as it is.

use super::request::Request;
use crate::calibration::Calibrated;
use crate::narrow::{self, Kept};
use crate::planning::Planned;
use crate::propagate::Propagation;
use crate::scratch::Scratch;
use crate::shared_base::SharedBases;
use crate::stored::{FactorFormat, FactoredMatrix, svd_options};
use crate::{CalibrationContext, PipelineError};
use lowrank_model::names::Role;
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{
    Dtype, ElementType, MatrixId, ModelConfig, Progress, Projection, RankPlan, Spectrum, StoredMatrix, Tensor,
};
use lowrank_reader::{Checkpoint, Fp8Scales};
use lowrank_svd::Metric;
use lowrank_writer::report::MatrixOutcome;
use lowrank_writer::{CheckpointWriter, Content, OutputTensor, ShardLayout};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// One compression under way.
pub(super) struct Work<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) plan: &'a RankPlan,
    pub(super) ranks: BTreeMap<MatrixId, usize>,
    /// Channels of the experts that keep some.
    pub(super) kept: Kept,
    /// The model of the output.
    pub(super) config: ModelConfig,
    /// Error of the best factors of the planned rank, where spectra are known.
    pub(super) optimum: BTreeMap<MatrixId, Option<f64>>,
    pub(super) spectra: &'a BTreeMap<MatrixId, Spectrum>,
    pub(super) scratch: Option<&'a Scratch>,
    pub(super) calibration: &'a CalibrationContext<'a>,
    pub(super) request: Request<'a>,
    /// What decides the bytes of the tensors.
    pub(super) job: &'a Value,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        planned: &'a Planned,
        scratch: Option<&'a Scratch>,
        calibration: &'a CalibrationContext<'a>,
        (request, job): (Request<'a>, &'a Value),
    ) -> Self {
        let plan = &planned.plan;
        Self {
            checkpoint,
            plan,
            ranks: plan.ranks(),
            kept: narrow::kept(plan),
            config: plan.stored_config(checkpoint.config()),
            optimum: plan.matrices.iter().map(|row| (row.matrix.id, row.relative_error)).collect(),
            spectra: &planned.spectra,
            scratch,
            calibration,
            request,
            job,
        }
    }
}

impl Work<'_> {
    pub(super) fn format(&self, id: MatrixId) -> FactorFormat<'_> {
        let own = || self.checkpoint.matrix_dtype(id);
        FactorFormat {
            config: &self.config,
            storage: self.plan.cost.storage,
            dtype: self.request.recipe.factor.dtype.unwrap_or_else(own),
            dense_dtype: own(),
        }
    }

    /// The matrix of a tensor that is stored otherwise than the original's.
    fn made(&self, spec: &TensorSpec) -> Option<MatrixId> {
        match spec.role {
            Role::Expert(id) => Some(id).filter(|&id| self.is_made(id)),
            _ => None,
        }
    }

    /// Whether a matrix is stored otherwise than the original's.
    pub(super) fn is_made(&self, id: MatrixId) -> bool {
        self.ranks.contains_key(&id) || self.kept.contains_key(&(id.layer, id.expert))
    }

    /// What factors are fitted to. Experts that keep some channels or share a base need it, whatever the scope.
    pub(super) fn fitted(&self) -> Result<Option<&Calibrated>, PipelineError> {
        let needs_it = !self.kept.is_empty() || !self.config.shared_bases.is_empty();
        match (self.calibration.propagating(), self.calibration.calibrated()) {
            (None, None) if needs_it => Err(PipelineError::StructuresNotMeasured),
            (None, calibrated) if needs_it => Ok(calibrated),
            (propagating, _) => Ok(propagating),
        }
    }

    pub(super) fn bases(&self) -> SharedBases<'_> {
        let dtype = self.request.recipe.factor.dtype;
        SharedBases { checkpoint: self.checkpoint, config: &self.config, dtype }
    }

    /// The scales of a tensor that stays fp8.
    fn kept_fp8(&self, spec: &TensorSpec) -> Option<Fp8Scales> {
        match spec.role {
            Role::SharedBase { .. } => None,
            _ => self.checkpoint.kept_fp8(spec),
        }
    }

    fn stored_dtype(&self, spec: &TensorSpec) -> Dtype {
        match spec.role {
            Role::SharedBase { layer, projection } => self.bases().dtype(layer, projection),
            Role::Expert(id) => self.checkpoint.matrix_dtype(id),
            _ => self.checkpoint.dtype(&spec.name).expect("validated when opened"),
        }
    }

    /// Every tensor of the output, in stored order.
    pub(super) fn layout(&self) -> Result<ShardLayout, PipelineError> {
        let mut output = Vec::new();
        for spec in &self.config.tensors() {
            match self.made(spec) {
                Some(id) => {
                    let (shape, rank) = (self.config.matrix_shape(id), self.ranks.get(&id).copied());
                    output.extend(self.format(id).output_tensors(id, shape, rank));
                }
                None => {
                    let (name, shape) = (spec.name.clone(), spec.shape.clone());
                    let scales = self.kept_fp8(spec);
                    let dtype = scales.as_ref().map_or(self.stored_dtype(spec).into(), |_| ElementType::Fp8);
                    output.push(OutputTensor { name, dtype, shape });
                    output.extend(scales.map(|Fp8Scales { name, dtype, shape }| OutputTensor {
                        name,
                        dtype: ElementType::Scale(dtype),
                        shape,
                    }));
                }
            }
        }
        Ok(ShardLayout::new(output, self.request.recipe.output.max_shard_size.0)?)
    }

    pub(super) fn write_tensors(
        &self,
        writer: &CheckpointWriter,
        pool: &rayon::ThreadPool,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixId, MatrixOutcome>, PipelineError> {
        let fitted = self.fitted()?;
        let specs = self.config.tensors();
        // Factors that are fitted to others come after, layer by layer.
        let (later, now): (Vec<&TensorSpec>, Vec<&TensorSpec>) =
            specs.iter().partition(|spec| fitted.is_some() && self.made(spec).is_some());
        progress.start("factor and write", (now.len() + later.len()) as u64, "tensors");
        let outcomes: Result<Vec<Option<(MatrixId, MatrixOutcome)>>, PipelineError> = pool.install(|| {
            now.par_iter()
                .with_max_len(1)
                .map(|spec| {
                    self.request.interrupt.check()?;
                    let outcome = match self.made(spec) {
                        None => self.copy(writer, spec).map(|()| None)?,
                        Some(id) => match writer.finished(&spec.name)? {
                            Some(note) => Some((id, outcome_of(note, id)?)),
                            None => Some((id, self.factor(writer, spec, id, self.ranks[&id])?)),
                        },
                    };
                    progress.advance(1);
                    Ok(outcome)
                })
                .collect()
        });
        let mut outcomes: BTreeMap<MatrixId, MatrixOutcome> = outcomes?.into_iter().flatten().collect();
        if let Some(calibrated) = fitted {
            outcomes.extend(self.fit_and_write(writer, calibrated, &later, pool, progress)?);
        }
        progress.finish();
        Ok(outcomes)
    }

    /// The factors that are fitted to what others make of the activations.
    fn fit_and_write(
        &self,
        writer: &CheckpointWriter,
        calibrated: &Calibrated,
        specs: &[&TensorSpec],
        pool: &rayon::ThreadPool,
        progress: &dyn Progress,
    ) -> Result<BTreeMap<MatrixId, MatrixOutcome>, PipelineError> {
        let (mut finished, mut units) = (BTreeMap::new(), BTreeMap::new());
        for spec in specs {
            let Some(id) = self.made(spec) else { continue };
            match writer.finished(&spec.name)? {
                Some(note) => {
                    finished.insert(id, outcome_of(note, id)?);
                    progress.advance(1);
                }
                None => drop(units.insert(id, spec.name.as_str())),
            }
        }
        let elsewhere = self.kept_factors()?;
        for (id, unit) in std::mem::take(&mut units) {
            match elsewhere.get(self, id)? {
                Some((factored, is_alone)) => {
                    let optimum = self.optimum[&id].filter(|_| is_alone);
                    finished.insert(id, self.keep(writer, unit, factored, optimum)?);
                    progress.advance(1);
                }
                None => drop(units.insert(id, unit)),
            }
        }
        let outcomes = Mutex::new(finished);
        let written = |id: MatrixId| {
            let (shape, rank) = (self.config.matrix_shape(id), self.ranks.get(&id).copied());
            self.format(id).written(writer, id, shape, rank)
        };
        let propagation = Propagation {
            checkpoint: self.checkpoint,
            algebra: self.calibration.algebra(),
            ranks: &self.ranks,
            kept: &self.kept,
            // They are written by now: nobody averages a layer twice.
            bases: &|layer| {
                self.bases().of_layer(layer, &|projection| self.written_base(writer, layer, projection))
            },
            wanted: &|id| units.contains_key(&id),
            finished: &|id| match units.contains_key(&id) {
                true => Ok(None),
                false => written(id).map(Some),
            },
            make: &|id, matrix, metric, is_alone| self.fit(id, matrix, metric, is_alone),
            take: &|id, factored, is_alone| {
                let optimum = self.optimum[&id].filter(|_| is_alone);
                let outcome = self.keep(writer, units[&id], factored, optimum)?;
                outcomes.lock().expect("nobody panics").insert(id, outcome);
                progress.advance(1);
                Ok(())
            },
            interrupt: self.request.interrupt,
        };
        pool.install(|| propagation.run(calibrated))?;
        Ok(outcomes.into_inner().expect("nobody panics"))
    }

    /// A matrix that is stored otherwise than the original's, best in a metric, which may be that of its spectrum.
    pub(super) fn fit(
        &self,
        id: MatrixId,
        matrix: Tensor,
        metric: &Metric<'_>,
        is_alone: bool,
    ) -> Result<FactoredMatrix, PipelineError> {
        let Some(&rank) = self.ranks.get(&id) else { return self.format(id).dense(&matrix, id) };
        let spectrum = self.spectra.get(&id).filter(|_| is_alone);
        let options = svd_options(&self.request.recipe.factor, metric, spectrum, None);
        self.format(id).factor(self.calibration.algebra(), matrix, id, rank, options)
    }

    /// A base as it was written.
    fn written_base(
        &self,
        writer: &CheckpointWriter,
        layer: usize,
        projection: Projection,
    ) -> Result<Tensor, PipelineError> {
        let spec = self.config.tensor(Role::SharedBase { layer, projection });
        let bytes = writer.read(&spec.name)?;
        let dtype = self.bases().dtype(layer, projection);
        Ok(Tensor::new(spec.shape, dtype, bytes).expect("written with this shape and dtype"))
    }

    /// Writes what no matrix is made of: as it is, or the mean that a layer's experts share.
    fn copy(&self, writer: &CheckpointWriter, spec: &TensorSpec) -> Result<(), PipelineError> {
        if let Role::SharedBase { layer, projection } = spec.role {
            return Ok(writer.write(&spec.name, &self.bases().tensor(layer, projection)?)?);
        }
        if let Some(Fp8Scales { name, dtype, shape }) = self.kept_fp8(spec) {
            let mut copied = writer.begin(&spec.name, ElementType::Fp8, &spec.shape)?;
            let scales = self
                .checkpoint
                .read_fp8_in_blocks(spec, &mut |block| Ok::<_, PipelineError>(copied.write(block)?))?;
            copied.finish()?;
            let mut copied = writer.begin(&name, ElementType::Scale(dtype), &shape)?;
            copied.write(scales.bytes())?;
            return Ok(copied.finish()?);
        }
        let mut copied = writer.begin(&spec.name, self.stored_dtype(spec).into(), &spec.shape)?;
        self.checkpoint.read_in_blocks(spec, &mut |block| Ok::<_, PipelineError>(copied.write(block)?))?;
        Ok(copied.finish()?)
    }

    fn factor(
        &self,
        writer: &CheckpointWriter,
        spec: &TensorSpec,
        id: MatrixId,
        rank: usize,
    ) -> Result<MatrixOutcome, PipelineError> {
        let StoredMatrix::Dense(matrix) = self.checkpoint.read_matrix(id)? else {
            return Err(PipelineError::AlreadyFactored(self.checkpoint.layout()));
        };
        self.checkpoint.check_finite(&spec.name, &matrix)?;
        let norm = self.calibration.norm(id)?;
        let metric = norm.metric();
        let spectrum = self.spectra.get(&id);
        let algebra = self.calibration.algebra();
        let kept = self.scratch.and_then(|scratch| scratch.take(id));
        let options = svd_options(&self.request.recipe.factor, &metric, spectrum, kept.as_ref());
        let factored = self.format(id).factor(algebra, matrix, id, rank, options)?;
        self.keep(writer, &spec.name, factored, self.optimum[&id])
    }

    /// Writes a factored matrix; `optimum` is the error of the best of its rank in the norm that it was fitted to.
    fn keep(
        &self,
        writer: &CheckpointWriter,
        unit: &str,
        factored: FactoredMatrix,
        optimum: Option<f64>,
    ) -> Result<MatrixOutcome, PipelineError> {
        let FactoredMatrix { pieces, mut outcome } = factored;
        let error = outcome.calibrated_error.unwrap_or(outcome.relative_error);
        outcome.excess_over_optimum = excess(error, optimum);
        let contents: Vec<(&str, Content<'_>)> =
            pieces.iter().map(|(name, piece)| (name.as_str(), piece.content())).collect();
        let note = serde_json::to_string(&outcome).expect("plain numbers and text serialise");
        writer.write_unit(unit, &contents, note)?;
        Ok(outcome)
    }
}

/// How far factors are from the best of their rank. Below f32's resolution both errors are rounding.
fn excess(relative_error: f64, optimum: Option<f64>) -> Option<f64> {
    let optimum = optimum.filter(|&optimum| optimum > f64::from(f32::EPSILON))?;
    Some((relative_error / optimum - 1.0).max(0.0))
}

/// What an earlier run found. Its journal's lines are hashed, so only another version could have written another form.
fn outcome_of(note: &str, id: MatrixId) -> Result<MatrixOutcome, PipelineError> {
    serde_json::from_str(note).map_err(|error| PipelineError::Record {
        path: "journal".into(),
        what: format!("{id}: {error}; run the same command again to start over"),
    })
}
