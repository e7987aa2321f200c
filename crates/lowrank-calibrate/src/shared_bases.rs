//! What plans with shared bases are made from: the base of a layer's experts, and the errors of every rank of what
//! distinguishes each matrix from it.
//!
//! W ≈ B + u·v with one B per layer and projection, the mean of the experts' matrices. It costs one dense matrix of E, so it
//! pays where the experts are alike: those of a model that was made from a dense one and trained little.

use crate::layer_base::{base_tensor, mean_of_layer, of_sigma, spectrum};
use crate::weights::dense;
use crate::{CalibrateError, Norms, WidthStore};
use lowrank_cache::{Arrays, Numbers};
use lowrank_model::{MatrixId, Progress, Projection, Spectrum, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::difference;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Spectra of W − B in the calibrated norm, of all matrices of the layers that may have a base.
pub type DifferenceSpectra = BTreeMap<usize, BTreeMap<MatrixId, Spectrum>>;

impl WidthStore<'_> {
    /// Of the layers whose experts may share a base. `own`: the spectra of the matrices themselves, in the same norms.
    pub fn differences(
        &self,
        checkpoint: &Checkpoint,
        norms: &Norms,
        tokens: usize,
        own: &BTreeMap<MatrixId, Spectrum>,
        progress: &dyn Progress,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<DifferenceSpectra, CalibrateError> {
        let layers = checkpoint.config().num_hidden_layers;
        progress.start("errors of shared bases", layers as u64, "layers");
        let mut found = DifferenceSpectra::new();
        for layer in 0..layers {
            if let Some(spectra) = self.differences_of_layer(checkpoint, norms, tokens, own, layer, stop)? {
                found.insert(layer, spectra);
            }
            progress.advance(1);
        }
        progress.finish();
        Ok(found)
    }

    fn differences_of_layer(
        &self,
        checkpoint: &Checkpoint,
        norms: &Norms,
        tokens: usize,
        own: &BTreeMap<MatrixId, Spectrum>,
        layer: usize,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<BTreeMap<MatrixId, Spectrum>>, CalibrateError> {
        let config = checkpoint.config();
        let mut spectra = BTreeMap::new();
        for expert in 0..config.experts_in(layer) {
            let id = MatrixId { layer, expert, projection: Projection::Down };
            let Some(sums) = self.down_difference(layer, expert)? else { return Ok(None) };
            let scale = if norms.is_unrouted(layer, expert) { 1.0 } else { (tokens as f64).sqrt() };
            let sigma = sums.into_iter().map(|sigma| sigma / scale).collect();
            spectra.insert(id, of_sigma(id, sigma)?);
        }
        if spectra.is_empty() {
            return Ok(None);
        }
        let name = format!("differences-{layer:03}");
        let known = self.entry.get(&name)?;
        let mut arrays = Arrays::default();
        for projection in [Projection::Gate, Projection::Up] {
            let ids: Vec<MatrixId> =
                (0..config.experts_in(layer)).map(|expert| MatrixId { layer, expert, projection }).collect();
            let found: Vec<(MatrixId, Vec<f64>)> = match &known {
                Some(arrays) => known_of(arrays, &ids).ok_or(CalibrateError::Absent { layer, expert: 0 })?,
                None => {
                    let mean = mean_of_layer(checkpoint, layer, projection)?;
                    let base = base_tensor(&mean, config.full_shape(projection));
                    drop(mean);
                    let one = |&id: &MatrixId| {
                        if stop() {
                            return Err(CalibrateError::Stopped);
                        }
                        let w = difference(&dense(checkpoint, id)?, &base);
                        let norm = norms.of(id)?;
                        Ok((id, spectrum(self.algebra, id, &w, norm.metric())?.sigma().to_vec()))
                    };
                    ids.par_iter().with_max_len(1).map(one).collect::<Result<_, _>>()?
                }
            };
            for (id, sigma) in found {
                arrays.arrays.insert(id.to_string(), Numbers::F64(sigma.clone()));
                spectra.insert(id, of_sigma(id, sigma)?);
            }
        }
        if known.is_none() {
            self.entry.put(&name, &arrays)?;
        }
        let unrouted = spectra.iter_mut().filter(|(id, _)| norms.is_unrouted(layer, id.expert));
        for (&id, spectrum) in unrouted {
            *spectrum = on_the_scale_of(&own[&id], &dense(checkpoint, id)?, id, spectrum)?;
        }
        Ok(Some(spectra))
    }
}

/// A spectrum of weights of an expert without routed tokens, on the scale that was given to the matrix' own.
fn on_the_scale_of(
    own: &Spectrum,
    w: &Tensor,
    id: MatrixId,
    found: &Spectrum,
) -> Result<Spectrum, CalibrateError> {
    let energy: f64 = w.to_f32().into_iter().map(|value| f64::from(value).powi(2)).sum();
    let scale = if energy > 0.0 { (own.energy() / energy).sqrt() } else { 1.0 };
    of_sigma(id, found.sigma().iter().map(|sigma| sigma * scale).collect())
}

fn known_of(arrays: &Arrays, ids: &[MatrixId]) -> Option<Vec<(MatrixId, Vec<f64>)>> {
    let one = |&id: &MatrixId| match arrays.arrays.get(&id.to_string()) {
        Some(Numbers::F64(sigma)) => Some((id, sigma.clone())),
        _ => None,
    };
    ids.iter().map(one).collect()
}
