//! The pass that takes moments: layer by layer, and within a layer one expert's sums in memory at a time.

use crate::activations::ActivationMoment;
use crate::half_width::Sampled;
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
            let new = || Sums::new(config, settings, widths);
            let sums = RefCell::new(new());
            let keep = |expert: usize| -> Result<(), CalibrateError> {
                let Sums { moments, mut activations, sampled, w2, .. } = sums.replace(new());
                let is_finite = activations.as_ref().is_none_or(ActivationMoment::is_finite);
                if !moments.is_finite() || !is_finite {
                    return Err(CalibrateError::NotFinite { layer, expert });
                }
                if let (Some(widths), Some(activations), Some(w2)) = (widths, &mut activations, w2) {
                    let tokens = moments.tokens;
                    let (moment, sampled, base) = (activations.symmetric(), &sampled, base.as_ref());
                    widths.put((layer, expert), Passed { w2: &w2, moment, tokens, sampled, base })?;
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
struct Sums<'a> {
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
    fn new(config: &ModelConfig, settings: MomentSettings, widths: Option<&'a WidthStore<'_>>) -> Self {
        Self {
            settings,
            column_energies: Vec::new(),
            moments: ExpertMoments::new(config.hidden_size, config.intermediate_size, settings),
            activations: widths.map(|_| ActivationMoment::new(config.intermediate_size)),
            sample: match widths {
                Some(widths) if widths.structures.has_widths() => &widths.sample,
                _ => &[],
            },
            sampled: Sampled::default(),
            w2: None,
        }
    }
}

struct Watch<'a, 'b>(&'a RefCell<Sums<'b>>);

impl Observer for Watch<'_, '_> {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let Sums { settings, column_energies, moments, activations, sample, sampled, .. } =
            &mut *self.0.borrow_mut();
        moments.add(batch, column_energies, *settings);
        if let Some(activations) = activations {
            activations.add(batch.activations, &settings.gate_weight.of_all(batch.weights));
            sampled.add(batch, sample);
        }
    }
}
