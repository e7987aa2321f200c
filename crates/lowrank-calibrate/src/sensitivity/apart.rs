//! [`measure`](super::measure) in pieces, each by whichever process: the matrices of a layer, then the windows of a part of the
//! sample through the whole model, then the sums. The numbers are those of one process.
//!
//! The sample's own states are kept before ([`States`]), as those of the whole text are.

use super::{Half, Halves, Measured, Parting, Sensitivities, divergences_of_window, groups, halve, walk};
use crate::half_width::rank_reference;
use crate::layer_base::of_sigma;
use crate::widths::WidthStore;
use crate::{CalibrateError, Norms, States};
use lowrank_cache::{Arrays, Entry, Numbers};
use lowrank_compute::Algebra;
use lowrank_forward::Forward;
use lowrank_model::MatrixId;

/// A measurement in pieces.
#[derive(Clone, Copy)]
pub struct Apart<'a> {
    /// The model.
    pub forward: &'a Forward<'a>,
    /// In which errors are counted.
    pub norms: &'a Norms,
    /// What decomposes matrices.
    pub algebra: &'a Algebra,
    /// States of the windows that sensitivities are measured with.
    pub sample: &'a States<'a>,
    /// Of experts that may be narrowed.
    pub widths: Option<&'a WidthStore<'a>>,
    /// Where the pieces lie.
    pub entry: &'a Entry,
    /// Asked before each matrix and each layer.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

/// The array of a part's divergences.
const DIVERGENCES: &str = "divergences";

impl Apart<'_> {
    fn name_of_layer(layer: usize) -> String {
        format!("halves-{layer:03}")
    }

    fn name_of_part(part: usize) -> String {
        format!("divergences-{part:03}")
    }

    fn halves(&self, layer: usize) -> Halves<'_> {
        let Self { norms, algebra, widths, stop, .. } = *self;
        let (checkpoint, config) = (self.forward.checkpoint(), self.forward.config());
        Halves { checkpoint, norms, algebra, widths, config, layer, stop }
    }

    fn layers_with_experts(&self) -> impl Iterator<Item = usize> {
        let config = self.forward.config();
        (0..config.num_hidden_layers).filter(|&layer| config.experts_in(layer) > 0)
    }

    /// The spectra of a layer's matrices, and its outputs for the sample with each projection halved.
    ///
    /// # Errors
    /// The states of the sample are not all there.
    pub fn layer(&self, layer: usize) -> Result<(), CalibrateError> {
        if self.forward.config().experts_in(layer) == 0 || self.entry.has(&Self::name_of_layer(layer)) {
            return Ok(());
        }
        let own = self.forward.moe_input(layer, &self.sample.of_layer(layer)?)?;
        let (outputs, halved) = halve(self.forward, &own, &self.halves(layer))?;
        let mut arrays = Arrays::default();
        for Half { id, spectrum, .. } in halved {
            arrays.arrays.insert(id.to_string(), Numbers::F64(spectrum.sigma().to_vec()));
        }
        for (projection, output) in outputs.into_iter().enumerate() {
            arrays.arrays.insert(projection.to_string(), Numbers::F32(output));
        }
        Ok(self.entry.put(&Self::name_of_layer(layer), &arrays)?)
    }

    fn read(&self, name: &str) -> Result<Arrays, CalibrateError> {
        let absent = || CalibrateError::NoPiece { name: name.to_owned() };
        self.entry.get(name)?.ok_or_else(absent)
    }

    /// The windows of a part of the sample through the whole model, of which all layers are done.
    ///
    /// # Errors
    /// A layer is not done.
    pub fn part(&self, part: usize) -> Result<(), CalibrateError> {
        let name = Self::name_of_part(part);
        if self.entry.has(&name) {
            return Ok(());
        }
        let (config, forward) = (self.forward.config(), self.forward);
        let rows = self.sample.rows_of(part);
        let (of_part, of_all) = (
            rows.start * config.hidden_size..rows.end * config.hidden_size,
            self.sample.tokens() * config.hidden_size,
        );
        let mut states = vec![forward.embed(self.sample.windows_of(part))?];
        for layer in 0..config.num_hidden_layers {
            if (self.stop)() {
                return Err(CalibrateError::Stopped);
            }
            let halved = |_: &[f32]| {
                if config.experts_in(layer) == 0 {
                    return Ok(Parting::default());
                }
                let name = Self::name_of_layer(layer);
                let absent = || CalibrateError::NoPiece { name: name.clone() };
                let mut arrays = self.read(&name)?;
                let mut output = |projection: usize| -> Result<Vec<f32>, CalibrateError> {
                    let all = arrays.take_f32(&projection.to_string()).ok_or_else(absent)?;
                    Ok(all.get(of_part.clone()).ok_or_else(absent)?.to_vec())
                };
                let outputs = [output(0)?, output(1)?, output(2)?].into();
                let change = self.halves(layer).change(of_all)?;
                Ok(Parting { outputs, change: change.map(|change| change[of_part.clone()].to_vec()) })
            };
            states = walk(forward, layer, states, halved)?;
        }
        let head = forward.head()?;
        let mut divergences = Vec::new();
        let spoilt = Measured::spoilt_in(self.layers_with_experts().collect(), self.widths.is_some());
        for sequence in 0..states[0].sequences() {
            divergences.extend(divergences_of_window(&head, &states, sequence, &spoilt)?);
        }
        let mut arrays = Arrays::default();
        arrays.arrays.insert(DIVERGENCES.into(), Numbers::F64(divergences));
        Ok(self.entry.put(&name, &arrays)?)
    }

    /// What [`measure`](super::measure) gives, of pieces that are all done.
    ///
    /// # Errors
    /// One is not.
    pub fn together(&self) -> Result<Sensitivities, CalibrateError> {
        let config = self.forward.config();
        let mut measured = Measured::default();
        for layer in self.layers_with_experts() {
            let name = Self::name_of_layer(layer);
            let mut arrays = self.read(&name)?;
            let half = |id: MatrixId| {
                let sigma = arrays.take_f64(&id.to_string());
                let sigma = sigma.ok_or_else(|| CalibrateError::NoPiece { name: name.clone() })?;
                let rank = rank_reference(config.matrix_shape(id));
                Ok(Half { id, rank, spectrum: of_sigma(id, sigma)? })
            };
            let halved: Result<Vec<Half>, CalibrateError> =
                self.halves(layer).ids().into_iter().map(half).collect();
            measured.add(self.norms, self.widths, config, layer, halved?)?;
        }
        let all = groups(self.widths.is_some()) * measured.errors.len();
        let mut kls = vec![0.0_f64; all];
        for part in 0..self.sample.parts() {
            let name = Self::name_of_part(part);
            let windows = self.read(&name)?.take_f64(DIVERGENCES);
            let windows = windows.ok_or(CalibrateError::NoPiece { name })?;
            for window in windows.chunks_exact(all) {
                kls.iter_mut().zip(window).for_each(|(sum, kl)| *sum += kl);
            }
        }
        kls.iter_mut().for_each(|kl| *kl /= self.sample.tokens() as f64);
        Ok(measured.sensitivities(config, &kls, self.widths.is_some()))
    }
}
