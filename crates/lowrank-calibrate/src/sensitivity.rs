//! What an error of each (layer, projection) does to the logits: measured, not guessed.
//!
//! Each of the 3·L groups is approximated alone, all its experts at the rank where factors are half the matrix; where experts
//! may be narrowed, a fourth group of each layer has all its experts at half their width. The KL of the logits, over the errors
//! that caused it, says what a unit of calibrated error of this group costs:
//!
//! s = max(KL, 10⁻⁷) / Σ err, in nats per unit, so s·err adds up over all matrices and widths.
//!
//! One pass for all groups: a group's hidden states part from the model's own at its layer, and from there on all walk
//! together, so each layer's weights are read once per handful of groups. The same decomposition gives the spectra.
//!
//! [`apart`] does the same in pieces that several processes share.

pub mod apart;

use crate::half_width::{half_width, rank_reference};
use crate::weights::dense;
use crate::widths::WidthStore;
use crate::{CalibrateError, Norms, Spoilt};
use lowrank_compute::{Algebra, Backend};
use lowrank_forward::distribution::compare;
use lowrank_forward::{Forward, Head, Hidden};
use lowrank_model::plan::{LayerSensitivity, WidthSensitivity};
use lowrank_model::spectrum::SpectrumError;
use lowrank_model::{Dtype, MatrixId, ModelConfig, Progress, Projection, Spectrum, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::{SvdOptions, decompose};
use rayon::prelude::*;
use std::collections::{BTreeMap, VecDeque};

/// Below this a divergence is rounding.
const KL_LEAST: f64 = 1e-7;
/// Bytes of inputs and outputs that pass through an MoE block together.
pub const WALKING_BYTES: usize = 1 << 30;

/// Spectra in the calibrated norm, and what their errors cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivities {
    /// Of every expert matrix: tail energies are the errors of every rank.
    pub spectra: BTreeMap<MatrixId, Spectrum>,
    /// By layer.
    pub layers: Vec<LayerSensitivity>,
}

/// Measures on windows of tokens. `widths`: of experts that may be narrowed, measured on the same tokens; the errors of
/// their ranks are put there.
pub fn measure(
    forward: &Forward<'_>,
    norms: &Norms,
    algebra: &Algebra,
    windows: &[Vec<u32>],
    widths: Option<&WidthStore<'_>>,
    progress: &dyn Progress,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Sensitivities, CalibrateError> {
    let (config, checkpoint) = (forward.config(), forward.checkpoint());
    progress.start("spectra and sensitivities", config.num_hidden_layers as u64, "layers");
    let mut measured = Measured::default();
    // The model's own states first, then those of each group so far.
    let mut states = vec![forward.embed(windows)?];
    for layer in 0..config.num_hidden_layers {
        let halves = Halves { checkpoint, norms, algebra, widths, config, layer, stop };
        let mut halved = Vec::new();
        let halve = |own: &[f32]| -> Result<Parting, CalibrateError> {
            let outputs;
            (outputs, halved) = halve(forward, own, &halves)?;
            Ok(Parting { outputs, change: halves.change(own.len())? })
        };
        states = walk(forward, layer, states, halve)?;
        progress.advance(1);
        measured.add(norms, widths, config, layer, halved)?;
    }
    progress.finish();
    let kls = divergences(forward, &states, &measured.spoilt(widths.is_some()), progress)?;
    Ok(measured.sensitivities(config, &kls, widths.is_some()))
}

/// What is known of the layers before the logits are.
#[derive(Default)]
struct Measured {
    spectra: BTreeMap<MatrixId, Spectrum>,
    /// Errors of every group at half its size, by layer.
    errors: Vec<(usize, Vec<f64>)>,
}

impl Measured {
    fn add(
        &mut self,
        norms: &Norms,
        widths: Option<&WidthStore<'_>>,
        config: &ModelConfig,
        layer: usize,
        mut halved: Vec<Half>,
    ) -> Result<(), CalibrateError> {
        if halved.is_empty() {
            return Ok(());
        }
        scale_unrouted(norms, layer, &mut halved)?;
        let of_group = |projection| {
            let group = halved.iter().filter(|half| half.id.projection == projection);
            group.map(|half| half.spectrum.tail_energies()[half.rank]).sum()
        };
        let mut of_groups: Vec<f64> = Projection::ALL.into_iter().map(of_group).collect();
        if let Some(widths) = widths {
            let place = (layer, config.experts_in(layer));
            of_groups.push(widths.layer_error(norms, place, half_width(config.intermediate_size))?);
        }
        self.errors.push((layer, of_groups));
        self.spectra.extend(halved.into_iter().map(|half| (half.id, half.spectrum)));
        Ok(())
    }

    /// What is halved in a group.
    fn spoilt(&self, with_widths: bool) -> impl Fn(usize) -> Spoilt {
        Self::spoilt_in(self.errors.iter().map(|&(layer, _)| layer).collect(), with_widths)
    }

    /// What is halved in a group, where these layers have experts.
    fn spoilt_in(layers: Vec<usize>, with_widths: bool) -> impl Fn(usize) -> Spoilt {
        let groups = groups(with_widths);
        move |group| Spoilt {
            layer: layers[group / groups],
            half: Projection::ALL.get(group % groups).map_or("the width", |projection| projection.as_str()),
        }
    }

    /// Given the divergence of every group.
    fn sensitivities(self, config: &ModelConfig, kls: &[f64], with_widths: bool) -> Sensitivities {
        // A layer without experts has nothing to lose: its entry keeps the others at their places.
        let width = with_widths.then_some(WidthSensitivity { kl: 0.0, sensitivity: 0.0 });
        let nothing = LayerSensitivity { kl: [0.0; 3], sensitivity: [0.0; 3], width };
        let mut layers = vec![nothing; config.num_hidden_layers];
        for ((layer, errors), kls) in self.errors.into_iter().zip(kls.chunks_exact(groups(with_widths))) {
            let of = |group: usize| kls[group].max(KL_LEAST) / errors[group];
            let width = with_widths.then(|| WidthSensitivity { kl: kls[3], sensitivity: of(3) });
            layers[layer] =
                LayerSensitivity { kl: [kls[0], kls[1], kls[2]], sensitivity: [0, 1, 2].map(of), width };
        }
        Sensitivities { spectra: self.spectra, layers: finite(layers) }
    }
}

/// Groups of a layer with experts.
fn groups(with_widths: bool) -> usize {
    Projection::ALL.len() + usize::from(with_widths)
}

/// A group without error at half its size is exact from there on; what less would cost was not measured, so it counts
/// like the dearest.
fn finite(mut layers: Vec<LayerSensitivity>) -> Vec<LayerSensitivity> {
    let mut all: Vec<&mut f64> = Vec::new();
    for LayerSensitivity { sensitivity, width, .. } in &mut layers {
        all.extend(sensitivity);
        all.extend(width.as_mut().map(|width| &mut width.sensitivity));
    }
    let dearest = all.iter().map(|s| **s).filter(|s| s.is_finite()).fold(0.0, f64::max);
    let dearest = if dearest > 0.0 { dearest } else { 1.0 };
    all.into_iter().filter(|s| !s.is_finite()).for_each(|s| *s = dearest);
    layers
}

/// One matrix at half its size.
struct Half {
    id: MatrixId,
    rank: usize,
    spectrum: Spectrum,
}

/// The matrices of a layer at half their size.
struct Halves<'a> {
    checkpoint: &'a Checkpoint,
    norms: &'a Norms,
    algebra: &'a Algebra,
    widths: Option<&'a WidthStore<'a>>,
    config: &'a ModelConfig,
    layer: usize,
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl Halves<'_> {
    /// All matrices of the layer that are compressed: w1 of every expert, then w2, then w3.
    fn ids(&self) -> Vec<MatrixId> {
        let layer = self.layer;
        let of = |projection| {
            self.config.compressed_experts(layer).map(move |expert| MatrixId { layer, expert, projection })
        };
        Projection::ALL.into_iter().flat_map(of).collect()
    }

    /// Decomposes several at once.
    fn make(&self, ids: &[MatrixId]) -> Result<Vec<(Half, StoredMatrix)>, CalibrateError> {
        ids.par_iter().with_max_len(1).map(|&id| self.one(id)).collect()
    }

    fn one(&self, id: MatrixId) -> Result<(Half, StoredMatrix), CalibrateError> {
        if (self.stop)() {
            return Err(CalibrateError::Stopped);
        }
        let w = dense(self.checkpoint, id)?;
        let shape = self.config.matrix_shape(id);
        let rank = rank_reference(shape);
        let norm = self.norms.of(id)?;
        let options = SvdOptions { metric: norm.metric(), ..SvdOptions::default() }.for_matrix(id);
        let (spectrum, factors) = match self.widths {
            Some(widths) if id.projection != Projection::Down && !id.is_shared() => {
                let order = widths.order(id.layer, id.expert)?;
                let (spectrum, factors, _) = widths.decomposed(id, &w, &norm, &order)?;
                (spectrum, factors)
            }
            _ => {
                let run = |backend: &dyn Backend| decompose(backend, &w, rank, &options);
                let (decomposed, _) = self.algebra.run(shape, run);
                decomposed.map_err(|source| CalibrateError::Svd { name: id, source })?
            }
        };
        let f32s = |shape: [usize; 2], values: &[f32]| {
            Tensor::from_f32(shape.to_vec(), Dtype::F32, values).expect("factors have their shapes")
        };
        let u = f32s([shape.rows, rank], &factors.u);
        let v = f32s([rank, shape.cols], &factors.v);
        Ok((Half { id, rank, spectrum }, StoredMatrix::Factored { u, v }))
    }
}

/// Where the states of a layer's groups part from the model's own.
#[derive(Default)]
struct Parting {
    /// Of the MoE block with one projection halved, each [N, H]; none in a layer without experts.
    outputs: Vec<Vec<f32>>,
    /// Of its outputs with every expert at half its width, [N, H].
    change: Option<Vec<f32>>,
}

impl Halves<'_> {
    /// Of the outputs with every expert at half its width, of so many numbers.
    fn change(&self, len: usize) -> Result<Option<Vec<f32>>, CalibrateError> {
        let experts = self.config.experts_in(self.layer);
        let Some(widths) = self.widths.filter(|_| experts > 0) else { return Ok(None) };
        let mut change = vec![0.0; len];
        for expert in 0..experts {
            widths.add_half_width((self.layer, expert), self.config.hidden_size, &mut change)?;
        }
        Ok(Some(change))
    }
}

/// The outputs of a MoE block for its own input [N, H] with one projection halved, for each projection, and the spectra of the
/// layer. Factors are made for as many matrices at once as there are workers, and dropped when they were used.
fn halve(
    forward: &Forward<'_>,
    own: &[f32],
    halves: &Halves<'_>,
) -> Result<(Vec<Vec<f32>>, Vec<Half>), CalibrateError> {
    let layer = halves.layer;
    let (ids, mut halved, mut outputs) = (halves.ids(), Vec::new(), Vec::new());
    let mut groups = ids.chunks(rayon::current_num_threads());
    let mut ready = VecDeque::new();
    let projections = if ids.is_empty() { &[][..] } else { &Projection::ALL };
    for &projection in projections {
        let expert_of = |expert| -> Result<_, CalibrateError> {
            if ready.is_empty() {
                ready.extend(halves.make(groups.next().expect("a group for every matrix"))?);
            }
            let (half, factors): (Half, StoredMatrix) = ready.pop_front().expect("no group is empty");
            debug_assert_eq!(half.id, MatrixId { layer, expert, projection });
            halved.push(half);
            let mut weights = forward.expert(layer, expert)?;
            match projection {
                Projection::Gate => weights.gate = factors,
                Projection::Down => weights.down = factors,
                Projection::Up => weights.up = factors,
            }
            Ok(weights)
        };
        outputs.extend(forward.moe_of(layer, &[own], &mut (), expert_of)?);
    }
    Ok((outputs, halved))
}

/// All states through a layer, and three or four new ones that part there from the model's own, the first. `part` is given the
/// input of its MoE block.
fn walk(
    forward: &Forward<'_>,
    layer: usize,
    mut states: Vec<Hidden>,
    part: impl FnOnce(&[f32]) -> Result<Parting, CalibrateError>,
) -> Result<Vec<Hidden>, CalibrateError> {
    for state in &mut states {
        forward.attention(layer, state)?;
    }
    let own = forward.moe_input(layer, &states[0])?; // [N, H]
    let Parting { outputs, change } = part(&own)?;
    let parted = |own: &Hidden, output: &[f32]| {
        let mut state = own.clone();
        forward.add(&mut state, output);
        state
    };
    let mut new: Vec<Hidden> = outputs.iter().map(|output| parted(&states[0], output)).collect();
    let together = (WALKING_BYTES / (2 * size_of_val(own.as_slice())).max(1)).max(1);
    for states in states.chunks_mut(together) {
        let inputs =
            states.iter().map(|state| forward.moe_input(layer, state)).collect::<Result<Vec<_>, _>>()?;
        let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let outputs = forward.moe(layer, &inputs, &mut ())?;
        for (state, output) in states.iter_mut().zip(&outputs) {
            forward.add(state, output);
        }
    }
    // The first has gone through the layer by now.
    new.extend(change.map(|change| parted(&states[0], &change)));
    states.extend(new);
    Ok(states)
}

/// An expert that saw nothing has a spectrum of its weights, on another scale than its neighbours': as a whole it counts
/// like the least of those that saw something.
fn scale_unrouted(norms: &Norms, layer: usize, halved: &mut [Half]) -> Result<(), CalibrateError> {
    for projection in Projection::ALL {
        let errors = halved.iter().filter(|half| {
            half.id.projection == projection
                && !half.id.is_shared()
                && !norms.is_unrouted(layer, half.id.expert)
        });
        let least = errors.map(|half| half.spectrum.energy()).fold(f64::INFINITY, f64::min);
        let unseen = halved
            .iter_mut()
            .filter(|half| half.id.projection == projection && norms.is_unrouted(layer, half.id.expert));
        for half in unseen {
            let energy = half.spectrum.energy();
            if energy > 0.0 && least.is_finite() {
                let scale = (least / energy).sqrt();
                let sigma = half.spectrum.sigma().iter().map(|sigma| sigma * scale).collect();
                let failed =
                    |source: SpectrumError| CalibrateError::Svd { name: half.id, source: source.into() };
                half.spectrum = Spectrum::new(sigma).map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// Mean KL(own ‖ group) of the logits of every group. `spoilt`: what is halved in a group.
fn divergences(
    forward: &Forward<'_>,
    states: &[Hidden],
    spoilt: &dyn Fn(usize) -> Spoilt,
    progress: &dyn Progress,
) -> Result<Vec<f64>, CalibrateError> {
    let head = forward.head()?;
    progress.start("divergences", states[0].sequences() as u64, "windows");
    let mut sums = vec![0.0_f64; states.len() - 1];
    for sequence in 0..states[0].sequences() {
        let of_window = divergences_of_window(&head, states, sequence, spoilt)?;
        sums.iter_mut().zip(of_window).for_each(|(sum, kl)| *sum += kl);
        progress.advance(1);
    }
    progress.finish();
    Ok(sums.iter().map(|sum| sum / states[0].tokens() as f64).collect())
}

/// Σ KL(own ‖ group) over the tokens of one window, for every group.
fn divergences_of_window(
    head: &Head<'_>,
    states: &[Hidden],
    sequence: usize,
    spoilt: &dyn Fn(usize) -> Spoilt,
) -> Result<Vec<f64>, CalibrateError> {
    let (own, groups) = states.split_first().expect("the model's own states come first");
    let v = head.vocab_size();
    let p = head.logits(own, sequence)?; // [T, V]
    if p.iter().any(|logit| !logit.is_finite()) {
        return Err(CalibrateError::LogitsNotFinite { spoilt: None });
    }
    let of_group = |(group, state): (usize, &Hidden)| {
        let q = head.logits(state, sequence)?;
        let tokens = p.par_chunks_exact(v).zip(q.par_chunks_exact(v));
        let kls: Vec<f64> = tokens.map(|(p, q)| compare(p, q, None).kl).collect();
        let sum: f64 = kls.iter().sum();
        match sum.is_finite() {
            true => Ok(sum),
            false => Err(CalibrateError::LogitsNotFinite { spoilt: Some(spoilt(group)) }),
        }
    };
    groups.iter().enumerate().map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_counts_like_the_dearest() {
        let width = Some(WidthSensitivity { kl: 0.2, sensitivity: f64::INFINITY });
        let layer = |sensitivity| LayerSensitivity { kl: [0.1; 3], sensitivity, width };
        let layers = finite(vec![layer([1.0, f64::INFINITY, 5.0]), layer([2.0, 3.0, f64::INFINITY])]);
        assert_eq!(layers[0].sensitivity, [1.0, 5.0, 5.0]);
        assert_eq!(layers[1].sensitivity, [2.0, 3.0, 5.0]);
        assert_eq!(layers[1].width.unwrap().sensitivity, 5.0);
        assert_eq!(finite(vec![layer([f64::INFINITY; 3])])[0].sensitivity, [1.0; 3]);
    }
}
