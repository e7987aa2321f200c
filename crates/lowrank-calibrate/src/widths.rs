//! What plans with widths are made from: the order of every expert's channels and the errors of its widths.
//!
//! The second moment of an expert's activations, C = Σ g² h hᵀ [F, F], is summed while the text passes and never stored: the
//! order of the channels, the errors of all widths and those of the ranks of a narrowed down are taken from it at once.

use crate::half_width::{Change, Sampled, rank_reference};
use crate::layer_base::down_difference;
use crate::norm::shrinkage_of;
use crate::weights::dense;
use crate::{CalibrateError, Norm, Norms};
use lowrank_cache::{Arrays, Entry, Numbers};
use lowrank_compute::blocks::matrix_shape;
use lowrank_compute::{Algebra, Backend, Kernels, Real};
use lowrank_model::params::usual_multiple;
use lowrank_model::plan::Structures;
use lowrank_model::{MatrixId, MatrixShape, ModelConfig, Progress, Projection, Spectrum, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::{
    Channels, Factors, NarrowedErrors, Precision, SvdError, SvdOptions, decompose_narrowed, narrowed_outputs,
};
use ndarray::ArrayView2;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Widths, evenly spaced up to F, at which ranks are considered, too.
const GRID: usize = 16;
/// Added to the second moment, in mean diagonal elements: `docs/research/widths.md`.
pub const RIDGE: f64 = 0.03;

/// The widths below F at which ranks are considered, rising; multiples, as ranks are. `shape`: of gate, up or down.
pub fn width_grid(intermediate_size: usize, shape: MatrixShape) -> Vec<usize> {
    let multiple = usual_multiple(shape.short_side());
    let widths = (1..GRID).map(|step| intermediate_size * step / GRID / multiple * multiple);
    let mut widths: Vec<usize> = widths.filter(|&width| width > 0).collect();
    widths.dedup();
    widths
}

/// What one expert loses at every width.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertWidths {
    /// Channels by falling importance: an expert of width k keeps the first k.
    pub order: Vec<usize>,
    /// Squared error of its weighted outputs per token of the text, at width 0..=F.
    pub errors: Vec<f64>,
    /// Of the ranks of its narrowed matrices, likewise per token; empty where ranks were not asked for.
    pub grid: Vec<NarrowedErrors>,
}

/// Of every expert, by layer and expert. An expert without routed tokens is narrowed by its weights alone, and counts as a
/// whole like the least of its layer's others.
pub type WidthsByExpert = BTreeMap<(usize, usize), ExpertWidths>;

/// Of the singular values in an expert's file.
const DIFFERENCE: &str = "difference";
/// Of the narrowed errors in a matrix' file.
const NARROWED: &str = "narrowed";

/// Where orders and errors lie, and how they are made.
#[derive(Debug, Clone)]
pub struct WidthStore<'a> {
    /// The entry of the cache.
    pub entry: Entry,
    /// What computes.
    pub algebra: &'a Algebra,
    /// What plans may cut: what is measured.
    pub structures: Structures,
    /// The data-free share of a norm at many routed tokens.
    pub shrinkage: f64,
    /// The tokens of the text that sensitivities are measured with, by their places in it, rising.
    pub sample: Vec<usize>,
}

/// What is known of an expert once its tokens have passed.
pub(crate) struct Passed<'a> {
    pub(crate) w2: &'a Tensor,
    /// Of its activations [F, F], both triangles.
    pub(crate) moment: ArrayView2<'a, f64>,
    /// Its routed tokens.
    pub(crate) tokens: u64,
    /// Those that sensitivities are measured with.
    pub(crate) sampled: &'a Sampled,
    /// Of its layer's down matrices, where one may pay.
    pub(crate) base: Option<&'a Tensor>,
}

impl WidthStore<'_> {
    fn name(layer: usize, expert: usize) -> String {
        format!("widths-{layer:03}-{expert:03}")
    }

    /// Whether an expert's are there.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        let change = !self.structures.has_widths() || self.entry.has(&Self::change_name(layer, expert));
        change && self.entry.has(&Self::name(layer, expert))
    }

    /// Orders the channels of an expert and keeps the errors of its widths, and those of the ranks of its down matrix without
    /// the base.
    pub(crate) fn put(
        &self,
        (layer, expert): (usize, usize),
        passed: Passed<'_>,
    ) -> Result<(), CalibrateError> {
        let id = MatrixId { layer, expert, projection: Projection::Down };
        let Passed { w2, moment, tokens, sampled, base } = passed;
        let mut arrays = Arrays::default();
        let mut keep = |name: &str, values: Vec<f64>| {
            arrays.arrays.insert(name.into(), Numbers::F64(values));
        };
        if let Some(base) = base {
            let hidden_size = base.shape()[0];
            let shrinkage = (tokens > 0).then(|| shrinkage_of(self.shrinkage, tokens as f64, hidden_size));
            let spectrum = down_difference(self.algebra, id, w2, base, moment, shrinkage)?;
            keep(DIFFERENCE, spectrum.sigma().to_vec());
        }
        if self.structures.has_widths() {
            let failed = |source| CalibrateError::Svd { name: id, source };
            let (of_down, change) = match Precision::of_channels(w2, RIDGE).map_err(failed)? {
                Precision::F32 => self.narrow::<f32>(w2, moment, sampled, |backend| backend),
                Precision::F64 => self.narrow::<f64>(w2, moment, sampled, |backend| backend),
            }
            .map_err(failed)?;
            keep("order", of_down.order.into_iter().map(|channel| channel as f64).collect());
            keep("errors", of_down.errors);
            keep("down", of_down.down);
            self.put_half_width((layer, expert), change)?;
        }
        Ok(self.entry.put(&Self::name(layer, expert), &arrays)?)
    }

    /// Orders the channels of an expert and measures its widths, in one precision.
    fn narrow<T: Real>(
        &self,
        w2: &Tensor,
        moment: ArrayView2<'_, f64>,
        sampled: &Sampled,
        kernels: fn(&dyn Backend) -> &dyn Kernels<T>,
    ) -> Result<(OfDown, Change), SvdError> {
        let shape = matrix_shape(w2);
        let widths = width_grid(shape.cols, shape);
        let channels = Channels::<T>::new(w2, moment, RIDGE)?;
        let down = match self.structures.has_ranks() {
            true => {
                self.algebra.run(shape, |backend| narrowed_outputs(kernels(backend), &channels, &widths)).0?
            }
            false => Vec::new(),
        };
        let (order, errors) = (channels.order().to_vec(), channels.errors().to_vec());
        Ok((OfDown { order, errors, down: down.concat() }, sampled.change(&channels)))
    }

    fn change_name(layer: usize, expert: usize) -> String {
        format!("half-width-{layer:03}-{expert:03}")
    }

    /// Keeps what an expert at half its width changes.
    fn put_half_width(
        &self,
        (layer, expert): (usize, usize),
        Change { places, rows }: Change,
    ) -> Result<(), CalibrateError> {
        let places = places.into_iter().map(|place| place as f64).collect();
        let mut arrays = Arrays::default();
        arrays.arrays.insert("places".into(), Numbers::F64(places));
        arrays.arrays.insert("rows".into(), Numbers::F32(rows));
        Ok(self.entry.put(&Self::change_name(layer, expert), &arrays)?)
    }

    /// Adds what an expert at half its width changes to the outputs [N, H] of its MoE block on those tokens.
    pub(crate) fn add_half_width(
        &self,
        (layer, expert): (usize, usize),
        hidden_size: usize,
        outputs: &mut [f32],
    ) -> Result<(), CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let mut arrays = self.entry.get(&Self::change_name(layer, expert))?.ok_or_else(absent)?;
        let places = arrays.take_f64("places").ok_or_else(absent)?;
        let rows = arrays.take_f32("rows").ok_or_else(absent)?;
        for (place, row) in places.into_iter().zip(rows.chunks_exact(hidden_size)) {
            let output = outputs.get_mut(place as usize * hidden_size..).ok_or_else(absent)?;
            output.iter_mut().zip(row).for_each(|(output, change)| *output += change);
        }
        Ok(())
    }

    /// Singular values of W₂ − B₂, where a base may pay: see [`down_difference`].
    pub(crate) fn down_difference(
        &self,
        layer: usize,
        expert: usize,
    ) -> Result<Option<Vec<f64>>, CalibrateError> {
        let arrays = self.entry.get(&Self::name(layer, expert))?;
        let mut arrays = arrays.ok_or(CalibrateError::Absent { layer, expert })?;
        Ok(arrays.take_f64(DIFFERENCE))
    }

    /// Channels by falling importance.
    pub(crate) fn order(&self, layer: usize, expert: usize) -> Result<Vec<usize>, CalibrateError> {
        Ok(self.get(layer, expert)?.order)
    }

    /// Σ over the experts of a layer of their errors at a width, per token of the text.
    pub(crate) fn layer_error(
        &self,
        norms: &Norms,
        (layer, experts): (usize, usize),
        width: usize,
    ) -> Result<f64, CalibrateError> {
        let of_expert = |expert| {
            let errors = self.get(layer, expert)?.errors;
            Ok((norms.is_unrouted(layer, expert), [errors[0], errors[width]]))
        };
        let errors = (0..experts).map(of_expert).collect::<Result<Vec<_>, CalibrateError>>()?;
        let routed = errors.iter().filter(|(unrouted, _)| !unrouted);
        let least = routed.map(|(_, [energy, _])| *energy).fold(f64::INFINITY, f64::min);
        let scaled = errors.iter().map(|&(unrouted, [energy, error])| match unrouted {
            true => error * unrouted_scale(energy, least).unwrap_or(1.0),
            false => error,
        });
        Ok(scaled.sum::<f64>() / norms.tokens() as f64)
    }

    /// Order, errors and the narrowed errors of down, in sums over the text.
    fn get(&self, layer: usize, expert: usize) -> Result<OfDown, CalibrateError> {
        let absent = || CalibrateError::Absent { layer, expert };
        let mut arrays = self.entry.get(&Self::name(layer, expert))?.ok_or_else(absent)?;
        let order = arrays.take_f64("order").ok_or_else(absent)?;
        let errors = arrays.take_f64("errors").ok_or_else(absent)?;
        let down = arrays.take_f64("down").ok_or_else(absent)?;
        let order = order.into_iter().map(|channel| channel as usize).collect();
        Ok(OfDown { order, errors, down })
    }

    /// Of all experts, per token of the text; errors of gate and up are measured unless they are known.
    pub fn all(
        &self,
        checkpoint: &Checkpoint,
        norms: &Norms,
        progress: &dyn Progress,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<WidthsByExpert, CalibrateError> {
        if !self.structures.has_widths() {
            return Ok(WidthsByExpert::new());
        }
        let config = checkpoint.config();
        let experts: Vec<(usize, usize)> = (0..config.num_hidden_layers)
            .flat_map(|layer| (0..config.experts_in(layer)).map(move |expert| (layer, expert)))
            .collect();
        progress.start("errors of widths", experts.len() as u64, "experts");
        let found: Result<WidthsByExpert, CalibrateError> = experts
            .par_iter()
            .with_max_len(1)
            .map(|&(layer, expert)| {
                if stop() {
                    return Err(CalibrateError::Stopped);
                }
                let own = self.of_expert(checkpoint, config, norms, (layer, expert))?;
                progress.advance(1);
                Ok(((layer, expert), own))
            })
            .collect();
        progress.finish();
        let mut found = found?;
        scale_unrouted(norms, &mut found);
        Ok(found)
    }

    fn of_expert(
        &self,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        norms: &Norms,
        (layer, expert): (usize, usize),
    ) -> Result<ExpertWidths, CalibrateError> {
        let OfDown { order, errors, down } = self.get(layer, expert)?;
        let per_token = |errors: Vec<f64>| -> Vec<f64> {
            errors.into_iter().map(|error| error / norms.tokens() as f64).collect()
        };
        let (errors, down) = (per_token(errors), per_token(down));
        if !self.structures.has_ranks() {
            return Ok(ExpertWidths { order, errors, grid: Vec::new() });
        }
        let widths = width_grid(config.intermediate_size, config.full_shape(Projection::Down));
        let ranks = config.hidden_size + 1;
        let inputs = self.of_inputs(checkpoint, norms, (layer, expert), &order)?;
        let [gate, up] = inputs;
        let grid = widths
            .iter()
            .enumerate()
            .map(|(at, &width)| {
                let part = |all: &[f64]| all[at * ranks..(at + 1) * ranks].to_vec();
                NarrowedErrors { width, tails: [part(&gate), part(&down), part(&up)] }
            })
            .collect();
        Ok(ExpertWidths { order, errors, grid })
    }

    /// Narrowed errors of gate and up, each of all widths one after another.
    fn of_inputs(
        &self,
        checkpoint: &Checkpoint,
        norms: &Norms,
        (layer, expert): (usize, usize),
        order: &[usize],
    ) -> Result<[Vec<f64>; 2], CalibrateError> {
        let of = |projection| -> Result<Vec<f64>, CalibrateError> {
            let id = MatrixId { layer, expert, projection };
            if let Some(mut arrays) = self.entry.get(&narrowed_name(id))?
                && let Some(errors) = arrays.take_f64(NARROWED)
            {
                return Ok(errors);
            }
            let (w, norm) = (dense(checkpoint, id)?, norms.of(id)?);
            Ok(self.decomposed(id, &w, &norm, order)?.2)
        };
        Ok([of(Projection::Gate)?, of(Projection::Up)?])
    }

    /// Of gate or up: its spectrum, its factors at half its size, and the narrowed errors of all widths of the grid, one
    /// after another, which are kept. All numbers come from this one decomposition, so that they do not depend on what was
    /// kept before.
    pub(crate) fn decomposed(
        &self,
        id: MatrixId,
        w: &Tensor,
        norm: &Norm,
        order: &[usize],
    ) -> Result<(Spectrum, Factors, Vec<f64>), CalibrateError> {
        let shape = matrix_shape(w);
        let options = SvdOptions { metric: norm.metric(), ..SvdOptions::default() }.for_matrix(id);
        let (rank, grid) = (rank_reference(shape), width_grid(shape.rows, shape));
        let (found, _) =
            self.algebra.run(shape, |backend| decompose_narrowed(backend, w, rank, &options, order, &grid));
        let (spectrum, factors, errors) = found.map_err(|source| CalibrateError::Svd { name: id, source })?;
        let errors = errors.concat();
        let mut arrays = Arrays::default();
        arrays.arrays.insert(NARROWED.into(), Numbers::F64(errors.clone()));
        self.entry.put(&narrowed_name(id), &arrays)?;
        Ok((spectrum, factors, errors))
    }
}

/// Brings the errors of experts without routed tokens, which are those of weights, to the scale of their layer.
fn scale_unrouted(norms: &Norms, found: &mut WidthsByExpert) {
    let is_unrouted = |&(layer, expert): &(usize, usize)| norms.is_unrouted(layer, expert);
    let unrouted: Vec<(usize, usize)> = found.keys().copied().filter(is_unrouted).collect();
    for place in unrouted {
        let routed = found.iter().filter(|(other, _)| other.0 == place.0 && !is_unrouted(other));
        let least = routed.map(|(_, own)| own.errors[0]).fold(f64::INFINITY, f64::min);
        let own = found.get_mut(&place).expect("one of them");
        if let Some(scale) = unrouted_scale(own.errors[0], least) {
            own.errors.iter_mut().for_each(|error| *error *= scale);
            // The narrowed errors of its matrices are on three other scales: its channels alone are weighed.
            own.grid.clear();
        }
    }
}

/// What brings an expert without routed tokens, whose outputs have this energy, to the least of its layer's others.
fn unrouted_scale(energy: f64, least: f64) -> Option<f64> {
    (energy > 0.0 && least.is_finite()).then(|| least / energy)
}

fn narrowed_name(id: MatrixId) -> String {
    let MatrixId { layer, expert, projection } = id;
    format!("narrowed-{layer:03}-{expert:03}-{}", projection.as_str())
}

struct OfDown {
    order: Vec<usize>,
    errors: Vec<f64>,
    down: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_has_the_multiples_of_ranks() {
        let grid = |cols| width_grid(cols, MatrixShape { rows: 4096.min(2 * cols), cols });
        assert_eq!(grid(32), (1..16).map(|step| 2 * step).collect::<Vec<_>>());
        assert!(grid(14_336).iter().all(|width| width % 128 == 0));
        assert_eq!(grid(14_336).len(), 15);
        assert!(grid(768).iter().all(|width| width % 32 == 0));
        assert_eq!(grid(3), [1, 2]);
        assert!(grid(1).is_empty());
    }
}
