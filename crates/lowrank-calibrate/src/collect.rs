//! The pass that takes moments: layer by layer, and within a layer one expert's sums in memory at a time.

use crate::activations::ActivationMoment;
use crate::layer_base::down_base;
use crate::moments::column_energies;
use crate::widths::{Passed, WidthStore};
use crate::{CalibrateError, ExpertMoments, Store};
use lowrank_forward::{ExpertBatch, Forward, Observer};
use lowrank_model::recipe::MomentSettings;
use lowrank_model::{ModelConfig, Progress, StoredMatrix, Tensor};
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
    let is_there =
        |layer, expert| store.has(layer, expert) && widths.is_none_or(|widths| widths.has(layer, expert));
    let there = |layer: usize| (0..config.experts_in(layer)).all(|expert| is_there(layer, expert));
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
            let base = match widths.filter(|widths| widths.structures.has_bases()) {
                Some(_) => down_base(forward.checkpoint(), layer)?,
                None => None,
            };
            let new = || Sums::new(config, settings, widths.is_some());
            let sums = RefCell::new(new());
            let keep = |expert: usize| -> Result<(), CalibrateError> {
                let Sums { moments, activations, w2, .. } = sums.replace(new());
                let is_finite = activations.as_ref().is_none_or(ActivationMoment::is_finite);
                if !moments.is_finite() || !is_finite {
                    return Err(CalibrateError::NotFinite { layer, expert });
                }
                if let (Some(widths), Some(activations), Some(w2)) = (widths, activations, w2) {
                    let tokens = moments.tokens;
                    let passed = Passed { w2: &w2, moment: &activations, tokens, base: base.as_ref() };
                    widths.put((layer, expert), passed)?;
                }
                store.put(layer, expert, &moments)
            };
            // Experts come one after another: when the next is asked for, the one before is done.
            let expert_of = |expert: usize| -> Result<_, CalibrateError> {
                if let Some(before) = expert.checked_sub(1) {
                    keep(before)?;
                }
                let weights = forward.expert(layer, expert)?;
                if let StoredMatrix::Dense(w2) = &weights.down {
                    let mut sums = sums.borrow_mut();
                    sums.column_energies = column_energies(w2);
                    sums.w2 = widths.map(|_| w2.clone());
                }
                Ok(weights)
            };
            let output = forward.moe_of(layer, &[&input], &mut Watch(&sums), expert_of)?.remove(0);
            keep(config.num_local_experts - 1)?;
            output
        };
        forward.add(&mut hidden, &output);
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// Of the expert that is under way.
struct Sums {
    settings: MomentSettings,
    /// ‖column‖² of its w2, \[F\].
    column_energies: Vec<f64>,
    moments: ExpertMoments,
    /// Of the activations, where widths are wanted.
    activations: Option<ActivationMoment>,
    /// Likewise.
    w2: Option<Tensor>,
}

impl Sums {
    fn new(config: &ModelConfig, settings: MomentSettings, widths: bool) -> Self {
        Self {
            settings,
            column_energies: Vec::new(),
            moments: ExpertMoments::new(config.hidden_size, config.intermediate_size, settings),
            activations: widths.then(|| ActivationMoment::new(config.intermediate_size)),
            w2: None,
        }
    }
}

struct Watch<'a>(&'a RefCell<Sums>);

impl Observer for Watch<'_> {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let Sums { settings, column_energies, moments, activations, .. } = &mut *self.0.borrow_mut();
        moments.add(batch, column_energies, *settings);
        if let Some(activations) = activations {
            activations.add(batch.activations, &settings.gate_weight.of_all(batch.weights));
        }
    }
}
