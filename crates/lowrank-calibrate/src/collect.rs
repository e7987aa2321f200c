//! The pass that takes moments: layer by layer, and within a layer one expert's sums in memory at a time.

use crate::moments::column_energies;
use crate::{CalibrateError, ExpertMoments, Store};
use lowrank_forward::{ExpertBatch, Forward, Observer};
use lowrank_model::Progress;
use lowrank_model::StoredMatrix;
use lowrank_model::recipe::MomentSettings;
use std::cell::RefCell;

/// Runs the windows through the model and puts every expert's moments into the store. Experts that are there already
/// are not summed again, and the pass ends with the last one that is not.
pub fn collect(
    forward: &Forward<'_>,
    windows: &[Vec<u32>],
    settings: MomentSettings,
    store: &Store,
    progress: &dyn Progress,
    stop: &dyn Fn() -> bool,
) -> Result<(), CalibrateError> {
    let config = forward.config();
    let there = |layer: usize| (0..config.experts_in(layer)).all(|expert| store.has(layer, expert));
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
            let new = || ExpertMoments::new(config.hidden_size, config.intermediate_size, settings);
            let sums = RefCell::new(Sums { settings, column_energies: Vec::new(), moments: new() });
            let keep = |expert: usize| -> Result<(), CalibrateError> {
                let moments =
                    sums.replace(Sums { settings, column_energies: Vec::new(), moments: new() }).moments;
                if !moments.is_finite() {
                    return Err(CalibrateError::NotFinite { layer, expert });
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
                    sums.borrow_mut().column_energies = column_energies(w2);
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
}

struct Watch<'a>(&'a RefCell<Sums>);

impl Observer for Watch<'_> {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let Sums { settings, column_energies, moments } = &mut *self.0.borrow_mut();
        moments.add(batch, column_energies, *settings);
    }
}
