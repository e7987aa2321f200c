//! One factored matrix as it is stored: which tensors, of which shape, and how they are made from the matrix.
//!
//! A function of its arguments alone, so that a second run, or a sample of one, makes the same bytes.

use crate::narrow::Stored;
use crate::{FactorSettings, PipelineError, round::round};
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{Algebra, Backend, Processor};
use lowrank_model::names::Role;
use lowrank_model::pivots::factor_shapes;
use lowrank_model::{
    Dtype, ElementType, MatrixId, MatrixShape, ModelConfig, PivotOrder, PivotSide, Spectrum, Storage,
    StoredMatrix, Tensor,
};
use lowrank_svd::residual::relative_error;
use lowrank_svd::{Factored, Factors, Metric, Reduction, SvdError, SvdOptions, expanded};
use lowrank_writer::report::MatrixOutcome;
use lowrank_writer::{CheckpointWriter, Content, OutputTensor};

/// One tensor of a factored matrix.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece {
    /// A factor.
    Weights(Tensor),
    /// The index of a pivoted matrix.
    Order(PivotOrder),
}

impl Piece {
    pub(crate) fn content(&self) -> Content<'_> {
        match self {
            Self::Weights(tensor) => Content::Weights(tensor),
            Self::Order(order) => Content::Order(order),
        }
    }
}

/// A factored matrix, and how it came about.
pub(crate) struct FactoredMatrix {
    /// By name, in the order of [`FactorFormat::output_tensors`].
    pub(crate) pieces: Vec<(String, Piece)>,
    /// Without the excess over the optimum, which depends on the spectrum.
    pub(crate) outcome: MatrixOutcome,
}

/// A matrix' pieces as a reader would find them.
pub(crate) fn stored(pieces: &[(String, Piece)], shape: MatrixShape) -> StoredMatrix {
    let pieces: Vec<&Piece> = pieces.iter().map(|(_, piece)| piece).collect();
    match pieces.as_slice() {
        [Piece::Weights(w)] => StoredMatrix::Dense(w.clone()),
        [Piece::Weights(u), Piece::Weights(v)] => StoredMatrix::Factored { u: u.clone(), v: v.clone() },
        [Piece::Weights(basis), Piece::Weights(coefficients), Piece::Order(order)] => StoredMatrix::Pivoted {
            side: PivotSide::of(shape),
            basis: basis.clone(),
            coefficients: coefficients.clone(),
            order: order.clone(),
        },
        _ => unreachable!("there are two ways to store factors"),
    }
}

/// How factored matrices are stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FactorFormat<'a> {
    /// The model of the matrices.
    pub(crate) config: &'a ModelConfig,
    pub(crate) storage: Storage,
    /// Of factors.
    pub(crate) dtype: Dtype,
    /// Of a matrix that is stored dense.
    pub(crate) dense_dtype: Dtype,
}

impl FactorFormat<'_> {
    /// The tensors of a matrix of rank `rank`, or of one that is stored dense.
    pub(crate) fn output_tensors(
        self,
        id: MatrixId,
        shape: MatrixShape,
        rank: Option<usize>,
    ) -> Vec<OutputTensor> {
        let dtype = ElementType::from(self.dtype);
        let Some(r) = rank else {
            let name = self.config.tensor(Role::Expert(id)).name;
            let dtype = self.dense_dtype.into();
            return vec![OutputTensor { name, dtype, shape: vec![shape.rows, shape.cols] }];
        };
        match self.storage {
            Storage::Uv => {
                let (u, v) = self.config.factor_names(id);
                vec![
                    OutputTensor { name: u, dtype, shape: vec![shape.rows, r] },
                    OutputTensor { name: v, dtype, shape: vec![r, shape.cols] },
                ]
            }
            Storage::Pivoted => {
                let (basis, coefficients, order) = self.config.pivoted_names(id);
                let [basis_shape, coefficients_shape] = factor_shapes(shape, r).map(Vec::from);
                vec![
                    OutputTensor { name: basis, dtype, shape: basis_shape },
                    OutputTensor { name: coefficients, dtype, shape: coefficients_shape },
                    OutputTensor { name: order, dtype: ElementType::Index, shape: vec![shape.short_side()] },
                ]
            }
        }
    }

    /// The matrix as an earlier run wrote it.
    pub(crate) fn written(
        self,
        writer: &CheckpointWriter,
        id: MatrixId,
        shape: MatrixShape,
        rank: Option<usize>,
    ) -> Result<StoredMatrix, PipelineError> {
        let read = |OutputTensor { name, shape: dimensions, dtype }: OutputTensor| {
            let bytes = writer.read(&name)?;
            let damaged = |source: &dyn std::fmt::Display| PipelineError::Record {
                path: writer.staging().to_owned(),
                what: format!("{name}: {source}; run the same command again to start over"),
            };
            let piece = match dtype {
                ElementType::Index => {
                    PivotOrder::from_le_bytes(&bytes, rank.unwrap_or(0), shape.short_side())
                        .map(Piece::Order)
                        .map_err(|source| damaged(&source))?
                }
                _ => {
                    Tensor::new(dimensions, if rank.is_some() { self.dtype } else { self.dense_dtype }, bytes)
                        .map(Piece::Weights)
                        .map_err(|source| damaged(&source))?
                }
            };
            Ok((name, piece))
        };
        let pieces: Result<Vec<_>, PipelineError> =
            self.output_tensors(id, shape, rank).into_iter().map(read).collect();
        Ok(stored(&pieces?, shape))
    }

    /// Factors one matrix, with the options of [`svd_options`].
    pub(crate) fn factor(
        self,
        algebra: &Algebra,
        matrix: Tensor,
        id: MatrixId,
        rank: usize,
        options: SvdOptions<'_>,
    ) -> Result<FactoredMatrix, PipelineError> {
        let options = options.for_matrix(id);
        let failed = |source| PipelineError::Svd { name: id, source };
        let shape = matrix_shape(&matrix);
        let (factored, mut processor) =
            algebra.run(shape, |backend| lowrank_svd::factor(backend, &matrix, rank, &options));
        let Factored { factors, route, relative_error, metric_error: calibrated_error, .. } =
            factored.map_err(failed)?;
        // Fitted factors do not meet their residual at a right angle, so what rounding does to them is measured, not added.
        let matrix = calibrated_error.map(|_| matrix);
        let planned = self.output_tensors(id, shape, Some(rank));
        let rounded = |at: usize, values: &[f32]| -> Result<Tensor, PipelineError> {
            round(&planned[at].name, planned[at].shape.clone(), self.dtype, values)
        };
        let (pieces, largest_coefficient, round_trip_error) = match self.storage {
            Storage::Uv => {
                let pieces = [rounded(0, &factors.u)?, rounded(1, &factors.v)?];
                (pieces.map(Piece::Weights).into_iter().collect::<Vec<_>>(), None, None)
            }
            Storage::Pivoted => {
                let (pivoted, pivoted_by) =
                    algebra.run(shape, |backend| lowrank_svd::interpolative(backend, &factors));
                let pivoted = pivoted.map_err(failed)?;
                processor = processor.and(pivoted_by);
                let (basis, coefficients) = (rounded(0, &pivoted.basis)?, rounded(1, &pivoted.coefficients)?);
                let (error, _) = algebra
                    .run(shape, |backend| pivoted.round_trip_error(backend, &factors, &basis, &coefficients));
                let order = Piece::Order(pivoted.order);
                let pieces = vec![Piece::Weights(basis), Piece::Weights(coefficients), order];
                (pieces, Some(pivoted.largest_coefficient), Some(error))
            }
        };
        let relative_error = match matrix {
            Some(matrix) => algebra
                .run(shape, |backend| stored_error(backend, &matrix, shape, &pieces))
                .0
                .map_err(failed)?,
            None => relative_error,
        };
        let names = planned.into_iter().map(|tensor| tensor.name);
        let pieces = names.zip(pieces).collect();
        let outcome = MatrixOutcome {
            relative_error,
            calibrated_error,
            excess_over_optimum: None,
            route: match processor {
                Processor::Cpu => route.to_string(),
                Processor::Cuda => format!("{route}, {processor}"),
            },
            largest_coefficient,
            round_trip_error,
        };
        Ok(FactoredMatrix { pieces, outcome })
    }
}

impl FactorFormat<'_> {
    /// A narrowed matrix that is stored as it is: the error is for the caller to say.
    pub(crate) fn dense(self, matrix: &Tensor, id: MatrixId) -> Result<FactoredMatrix, PipelineError> {
        let OutputTensor { name, shape, .. } = self.output_tensors(id, matrix_shape(matrix), None).remove(0);
        let rounded = match matrix.dtype() == self.dense_dtype {
            true => matrix.clone(),
            false => round(&name, shape, self.dense_dtype, &matrix.to_f32())?,
        };
        let outcome = MatrixOutcome::dense();
        Ok(FactoredMatrix { pieces: vec![(name, Piece::Weights(rounded))], outcome })
    }
}

/// What is stored of a narrowed matrix, to compare with the original.
pub(crate) fn stored_of(pieces: &[(String, Piece)], shape: MatrixShape) -> Stored<'_> {
    let pieces: Vec<&Piece> = pieces.iter().map(|(_, piece)| piece).collect();
    match pieces.as_slice() {
        [Piece::Weights(w)] => Stored::Dense(w),
        others => Stored::Factors(multiplied(others, shape)),
    }
}

/// The factors that pieces stand for.
fn multiplied(pieces: &[&Piece], shape: MatrixShape) -> Factors {
    match pieces {
        [Piece::Weights(u), Piece::Weights(v)] => {
            Factors { shape, rank: u.shape()[1], u: u.to_f32(), v: v.to_f32() }
        }
        [Piece::Weights(basis), Piece::Weights(coefficients), Piece::Order(order)] => {
            expanded(shape, order, &basis.to_f32(), &coefficients.to_f32())
        }
        _ => unreachable!("there are two ways to store factors"),
    }
}

/// What the engine is told of one matrix: the method of the recipe, the norm, and what an earlier pass found in that norm.
pub(crate) fn svd_options<'a>(
    settings: &FactorSettings,
    metric: &Metric<'a>,
    spectrum: Option<&'a Spectrum>,
    reduction: Option<&'a Reduction>,
) -> SvdOptions<'a> {
    let FactorSettings { method, seed, .. } = *settings;
    SvdOptions { metric: *metric, method, seed, spectrum, reduction, ..SvdOptions::default() }
}

/// ‖W − Ŵ‖ / ‖W‖ of what is stored.
fn stored_error(
    backend: &dyn Backend,
    matrix: &Tensor,
    shape: MatrixShape,
    pieces: &[Piece],
) -> Result<f64, SvdError> {
    let stored = multiplied(&pieces.iter().collect::<Vec<_>>(), shape);
    relative_error(backend, matrix, &stored)
}

/// The pieces of a matrix that was read, under the names and in the order of [`FactorFormat::output_tensors`].
pub(crate) fn pieces_of(config: &ModelConfig, id: MatrixId, matrix: StoredMatrix) -> Vec<(String, Piece)> {
    match matrix {
        StoredMatrix::Dense(w) => vec![(config.tensor(Role::Expert(id)).name, Piece::Weights(w))],
        StoredMatrix::OfBase { difference, .. } => pieces_of(config, id, *difference),
        StoredMatrix::Factored { u, v } => {
            let names = config.factor_names(id);
            vec![(names.0, Piece::Weights(u)), (names.1, Piece::Weights(v))]
        }
        StoredMatrix::Pivoted { basis, coefficients, order, .. } => {
            let names = config.pivoted_names(id);
            vec![
                (names.0, Piece::Weights(basis)),
                (names.1, Piece::Weights(coefficients)),
                (names.2, Piece::Order(order)),
            ]
        }
    }
}
