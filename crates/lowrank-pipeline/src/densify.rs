//! `densify`: factors multiplied back, u·v or [I T] on its basis, under the base's names and shapes.
//!
//! For runtimes that know no factors. In a layer with a shared base that is added. Channels that narrowed experts lack become zeros. The result is as large as the base and loses what the factors lost.

use crate::inspect::tell_left_out;
use crate::memory::Demand;
use crate::narrow::kept_of;
use crate::planning::Subject;
use crate::{PipelineError, base::check_place, round::round, workers};
use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_model::names::Role;
use lowrank_model::{
    Dtype, ElementType, MatrixId, PivotSide, Progress, Projection, StoredMatrix, Tensor, Widths,
};
use lowrank_reader::Checkpoint;
use lowrank_writer::{
    Card, ChatTemplate, CheckpointWriter, Documents, OutputTensor, Published, ShardLayout, StatedDtype,
};
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;
use std::path::Path;

/// What `densify` is told.
#[derive(Debug, Clone)]
pub struct DensifySettings {
    /// Dtype of the products; `None`: that of the factors.
    pub dtype: Option<Dtype>,
    /// Longest shard.
    pub shard_bytes_max: u64,
    /// Threads and memory.
    pub resources: workers::Resources,
}

/// Writes the dense checkpoint to `out`.
pub fn densify(
    checkpoint: &Checkpoint,
    out: &Path,
    settings: DensifySettings,
    progress: &dyn Progress,
) -> Result<Published, PipelineError> {
    if !checkpoint.is_compressed() {
        return Err(PipelineError::NotFactored(checkpoint.layout()));
    }
    check_place(checkpoint, out)?;
    tell_left_out(checkpoint, progress);
    let config = &checkpoint.config().with_widths(Widths::default()).with_shared_bases([]);
    let kept = kept_of(checkpoint)?;
    let pool = workers::pool(
        &Demand::densify(config, workers::widest(checkpoint, settings.dtype)),
        &settings.resources,
    )?;
    let specs = config.tensors();
    let is_narrowed = |id: MatrixId| kept.contains_key(&(id.layer, id.expert));
    let output = specs
        .iter()
        .map(|spec| OutputTensor {
            name: spec.name.clone(),
            dtype: ElementType::from(match spec.role {
                Role::Expert(id) if checkpoint.rank(id).is_some() || is_narrowed(id) => {
                    settings.dtype.unwrap_or_else(|| checkpoint.matrix_dtype(id))
                }
                Role::Expert(id) => checkpoint.matrix_dtype(id),
                _ => checkpoint.dtype(&spec.name).expect("validated when opened"),
            }),
            shape: spec.shape.clone(),
        })
        .collect::<Vec<_>>();
    let stated = match settings.dtype {
        Some(asked) => StatedDtype::Asked(asked),
        None => StatedDtype::OfBase(Subject::of(checkpoint).common_dtype()),
    };
    let writer = CheckpointWriter::create(out, ShardLayout::new(output, settings.shard_bytes_max)?)?;
    progress.start("multiply", specs.len() as u64, "tensors");
    pool.install(|| {
        specs.par_iter().try_for_each(|spec| {
            let tensor = match spec.role {
                Role::Expert(id) => {
                    let matrix = dense_matrix(checkpoint, id, settings.dtype)?;
                    match kept.get(&(id.layer, id.expert)) {
                        Some(channels) => {
                            spread(&matrix, id, channels, config.intermediate_size, settings.dtype)?
                        }
                        None => matrix,
                    }
                }
                _ => checkpoint.read_tensor(spec)?,
            };
            writer.write(&spec.name, &tensor)?;
            progress.advance(1);
            Ok::<(), PipelineError>(())
        })
    })?;
    progress.finish();
    let chat_templates = ChatTemplate::find(checkpoint.companions(), |name| checkpoint.text(name));
    let card = Card { chat_templates: &chat_templates, ..Card::default() };
    let documents = Documents::dense(checkpoint.config_json(), stated, &card)?
        .with_companions(checkpoint.dir(), checkpoint.companions())?;
    Ok(pool.install(|| writer.finish(documents))?)
}

/// What stays of a narrowed expert's matrix, with zeros for the channels that went.
fn spread(
    matrix: &Tensor,
    id: MatrixId,
    channels: &[usize],
    intermediate_size: usize,
    dtype: Option<Dtype>,
) -> Result<Tensor, PipelineError> {
    let matrix = match dtype.filter(|&asked| asked != matrix.dtype()) {
        Some(asked) => &round(&id.to_string(), matrix.shape().to_vec(), asked, &matrix.to_f32())?,
        None => matrix,
    };
    let (rows, cols) = (matrix.shape()[0], matrix.shape()[1]);
    let size = matrix.dtype().size_bytes() as usize;
    let (shape, mut bytes);
    match id.projection {
        Projection::Gate | Projection::Up => {
            shape = vec![intermediate_size, cols];
            bytes = vec![0; intermediate_size * cols * size];
            for (row, &channel) in matrix.bytes().chunks_exact(cols * size).zip(channels) {
                bytes[channel * cols * size..][..cols * size].copy_from_slice(row);
            }
        }
        Projection::Down => {
            shape = vec![rows, intermediate_size];
            bytes = vec![0; rows * intermediate_size * size];
            let into = bytes.chunks_exact_mut(intermediate_size * size);
            for (row, into) in matrix.bytes().chunks_exact(cols * size).zip(into) {
                for (value, &channel) in row.chunks_exact(size).zip(channels) {
                    into[channel * size..][..size].copy_from_slice(value);
                }
            }
        }
    }
    Ok(Tensor::new(shape, matrix.dtype(), bytes).expect("as many bytes as the shape says"))
}

fn dense_matrix(
    checkpoint: &Checkpoint,
    id: MatrixId,
    dtype: Option<Dtype>,
) -> Result<Tensor, PipelineError> {
    multiplied(checkpoint, id, checkpoint.read_matrix(id)?, dtype)
}

fn multiplied(
    checkpoint: &Checkpoint,
    id: MatrixId,
    stored: StoredMatrix,
    dtype: Option<Dtype>,
) -> Result<Tensor, PipelineError> {
    match stored {
        StoredMatrix::Dense(tensor) => Ok(tensor),
        StoredMatrix::OfBase { base, difference } => {
            let difference = multiplied(checkpoint, id, *difference, Some(Dtype::F32))?;
            let sum = base.to_f32().into_iter().zip(difference.to_f32()).map(|(base, own)| base + own);
            let name = checkpoint.config().tensor(Role::Expert(id)).name;
            let dtype = dtype.unwrap_or(base.dtype());
            round(&name, base.shape().to_vec(), dtype, &sum.collect::<Vec<f32>>())
        }
        StoredMatrix::Pivoted { side, basis, coefficients, order } => {
            let (stored_basis, stored_table) = (basis.to_f32(), coefficients.to_f32());
            let wide = |tensor: &Tensor, values| {
                ArrayView2::from_shape((tensor.shape()[0], tensor.shape()[1]), values)
                    .expect("a tensor's own shape")
            };
            let (basis_f32, table) = (wide(&basis, &stored_basis), wide(&coefficients, &stored_table));
            let shape = checkpoint.config().matrix_shape(id);
            let mut w = Array2::<f32>::zeros((shape.rows, shape.cols));
            // From the side of the pivots everything is columns.
            let (basis_f32, table, mut columns): (_, _, ArrayViewMut2<'_, f32>) = match side {
                PivotSide::Inputs => (basis_f32, table, w.view_mut()),
                PivotSide::Outputs => {
                    (basis_f32.reversed_axes(), table.reversed_axes(), w.view_mut().reversed_axes())
                }
            };
            let mut others = Array2::<f32>::zeros((basis_f32.nrows(), table.ncols()));
            Faer.gemm(basis_f32, table, others.view_mut(), Accumulate::Replace);
            for (source, places) in
                [(basis_f32, order.pivots().collect::<Vec<_>>()), (others.view(), order.others().collect())]
            {
                for (column, place) in source.columns().into_iter().zip(places) {
                    columns.column_mut(place).assign(&column);
                }
            }
            let name = checkpoint.config().tensor(Role::Expert(id)).name;
            let dtype = dtype.unwrap_or(basis.dtype());
            round(&name, vec![shape.rows, shape.cols], dtype, w.as_slice().expect("made in standard order"))
        }
        StoredMatrix::Factored { u, v } => {
            let (m, r, n) = (u.shape()[0], u.shape()[1], v.shape()[1]);
            let (wide_u, wide_v) = (u.to_f32(), v.to_f32());
            let view = |rows, cols, values| {
                ArrayView2::from_shape((rows, cols), values).expect("a tensor's own shape")
            };
            let mut w = Array2::<f32>::zeros((m, n));
            Faer.gemm(view(m, r, &wide_u), view(r, n, &wide_v), w.view_mut(), Accumulate::Replace);
            let name = checkpoint.config().tensor(Role::Expert(id)).name;
            round(
                &name,
                vec![m, n],
                dtype.unwrap_or(u.dtype()),
                w.as_slice().expect("made in standard order"),
            )
        }
    }
}
