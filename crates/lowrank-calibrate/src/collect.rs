//! The pass that takes moments: layer by layer, and within a layer one expert's sums in memory at a time. Or some experts of one
//! layer alone, from hidden states that were kept ([`crate::states`]).

use crate::activations::ActivationMoment;
use crate::half_width::Sampled;
use crate::layer_base::down_base;
use crate::moments::column_energies;
use crate::widths::{Passed, WidthStore};
use crate::{CalibrateError, ExpertMoments, Store};
use lowrank_forward::{ExpertBatch, Forward, Hidden, Observer, StoredExpert};
use lowrank_model::recipe::MomentSettings;
use lowrank_model::{MatrixId, ModelConfig, Progress, Projection, SHARED_EXPERT, StoredMatrix, Tensor};
use std::cell::RefCell;

/// Runs the windows through the model and puts every expert's moments into the store. Experts that are there already
/// are not summed again, and the pass ends with the last one that is not. `widths`: where the orders of channels and the
/// errors of widths go, if they are wanted.
pub fn collect(
    forward: &Forward<'_>,
    windows: &[Vec<u32>],
    settings: MomentSettings,
    store: &Store,
    widths: Option<&WidthStore<'_>>,
    progress: &dyn Progress,
    stop: &dyn Fn() -> bool,
) -> Result<(), CalibrateError> {
    let config = forward.config();
    let there = |layer: usize| {
        config.compressed_experts(layer).all(|expert| is_there(store, widths, (layer, expert)))
    };
    let Some(last) = (0..config.num_hidden_layers).rev().find(|&layer| !there(layer)) else { return Ok(()) };
    progress.start("calibrate", last as u64 + 1, "layers");
    let mut hidden = forward.embed(windows)?;
    for layer in 0..=last {
        if stop() {
            return Err(CalibrateError::Stopped);
        }
        forward.attention(layer, &mut hidden)?;
        let input = forward.moe_input(layer, &hidden)?; // [N, H]
        let output = if there(layer) {
            forward.moe(layer, &[&input], &mut ())?.remove(0)
        } else {
            let layer = LayerMoments::new(forward, layer, settings, store, widths)?;
            // Experts come one after another: when the next is asked for, the one before is done.
            let expert_of = |expert: usize| -> Result<_, CalibrateError> {
                layer.keep()?;
                layer.begin(expert)
            };
            let mut watch = Watch(&layer.sums);
            let output = forward.moe_of(layer.layer, &[&input], &mut watch, expert_of)?.remove(0);
            layer.keep()?;
            output
        };
        forward.add(&mut hidden, &output);
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// As [`collect`], for some experts of one layer, from the hidden states before its MoE block.
pub fn collect_experts(
    forward: &Forward<'_>,
    hidden: &Hidden,
    (layer, experts): (usize, &[usize]),
    settings: MomentSettings,
    store: &Store,
    widths: Option<&WidthStore<'_>>,
    stop: &dyn Fn() -> bool,
) -> Result<(), CalibrateError> {
    let input = forward.moe_input(layer, hidden)?; // [N, H]
    let moments = LayerMoments::new(forward, layer, settings, store, widths)?;
    for &expert in experts.iter().filter(|&&expert| !is_there(store, widths, (layer, expert))) {
        if stop() {
            return Err(CalibrateError::Stopped);
        }
        let weights = moments.begin(expert)?;
        forward.watch_expert((layer, expert), &input, weights, &mut Watch(&moments.sums))?;
        moments.keep()?;
    }
    Ok(())
}

fn is_there(store: &Store, widths: Option<&WidthStore<'_>>, (layer, expert): (usize, usize)) -> bool {
    let widths = widths.filter(|_| expert != SHARED_EXPERT);
    store.has(layer, expert) && widths.is_none_or(|widths| widths.has(layer, expert))
}

/// Takes the moments of a layer's experts, one after another.
struct LayerMoments<'a> {
    forward: &'a Forward<'a>,
    layer: usize,
    settings: MomentSettings,
    store: &'a Store,
    widths: Option<&'a WidthStore<'a>>,
    /// Of the layer's down matrices, where one may pay.
    base: Option<Tensor>,
    /// Of the expert that is under way.
    sums: RefCell<Option<Sums<'a>>>,
}

impl<'a> LayerMoments<'a> {
    fn new(
        forward: &'a Forward<'a>,
        layer: usize,
        settings: MomentSettings,
        store: &'a Store,
        widths: Option<&'a WidthStore<'a>>,
    ) -> Result<Self, CalibrateError> {
        let base = match widths.filter(|widths| widths.structures.has_bases()) {
            Some(_) => down_base(forward.checkpoint(), layer)?,
            None => None,
        };
        Ok(Self { forward, layer, settings, store, widths, base, sums: RefCell::new(None) })
    }

    /// The weights of an expert, whose tokens come next.
    fn begin(&self, expert: usize) -> Result<StoredExpert, CalibrateError> {
        let weights = self.forward.expert(self.layer, expert)?;
        let mut sums = Sums::new(self.forward.config(), (self.layer, expert), self.settings, self.widths);
        if let StoredMatrix::Dense(w2) = &weights.down {
            sums.column_energies = column_energies(w2);
            sums.w2 = sums.activations.as_ref().map(|_| w2.clone());
        }
        self.sums.replace(Some(sums));
        Ok(weights)
    }

    /// Keeps what was summed of the expert that is under way, if one is: all its tokens have passed.
    fn keep(&self) -> Result<(), CalibrateError> {
        let Self { layer, widths, .. } = *self;
        let Some(sums) = self.sums.take() else { return Ok(()) };
        let Sums { expert, moments, mut activations, sampled, w2, .. } = sums;
        let is_finite = activations.as_ref().is_none_or(ActivationMoment::is_finite);
        if !moments.is_finite() || !is_finite {
            return Err(CalibrateError::NotFinite { layer, expert });
        }
        if let (Some(widths), Some(activations), Some(w2)) = (widths, &mut activations, w2) {
            let tokens = moments.tokens;
            let (moment, sampled, base) = (activations.symmetric(), &sampled, self.base.as_ref());
            widths.put((layer, expert), Passed { w2: &w2, moment, tokens, sampled, base })?;
        }
        self.store.put(layer, expert, &moments)
    }
}

/// Of one expert.
struct Sums<'a> {
    expert: usize,
    settings: MomentSettings,
    /// ‖column‖² of its w2, \[F\].
    column_energies: Vec<f64>,
    moments: ExpertMoments,
    /// Of the activations, where widths are wanted.
    activations: Option<ActivationMoment>,
    /// The tokens that sensitivities are measured with.
    sample: &'a [usize],
    sampled: Sampled,
    /// Where widths are wanted.
    w2: Option<Tensor>,
}

impl<'a> Sums<'a> {
    fn new(
        config: &ModelConfig,
        (layer, expert): (usize, usize),
        settings: MomentSettings,
        widths: Option<&'a WidthStore<'_>>,
    ) -> Self {
        // Shared experts keep all channels, and share no base.
        let widths = widths.filter(|_| expert != SHARED_EXPERT);
        let width = config.matrix_shape(MatrixId { layer, expert, projection: Projection::Gate }).rows;
        Self {
            expert,
            settings,
            column_energies: Vec::new(),
            moments: ExpertMoments::new(config.hidden_size, width, settings),
            activations: widths.map(|_| ActivationMoment::new(width)),
            sample: match widths {
                Some(widths) if widths.structures.has_widths() => &widths.sample,
                _ => &[],
            },
            sampled: Sampled::default(),
            w2: None,
        }
    }
}

struct Watch<'a, 'b>(&'a RefCell<Option<Sums<'b>>>);

impl Observer for Watch<'_, '_> {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let mut sums = self.0.borrow_mut();
        let Some(sums) = &mut *sums else { return };
        let Sums { settings, column_energies, moments, activations, sample, sampled, .. } = sums;
        moments.add(batch, column_energies, *settings);
        if let Some(activations) = activations {
            activations.add(batch.activations, &settings.gate_weight.of_all(batch.weights));
            sampled.add(batch, sample);
        }
    }
}
