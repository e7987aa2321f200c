//! A calibration in pieces that several processes share by the cache: states of parts of the text, moments of some experts,
//! halves of a layer, divergences of a part of the sample.

use super::{
    Calibrated, CalibrationContext, CalibrationText, Measuring, SPECTRA, arrays_of, explained, tokens_hash,
};
use crate::base::InputHashes;
use crate::{JobContext, PipelineError};
use lowrank_cache::Entry;
use lowrank_calibrate::{Apart, CalibrateError, States, collect_experts};
use lowrank_compute::Algebra;
use lowrank_forward::{Engine, Forward};
use lowrank_model::plan::Structures;
use lowrank_reader::Checkpoint;
use serde_json::{Value, json};

/// A text before its moments are taken.
pub(crate) struct Pieces<'a> {
    context: CalibrationContext<'a>,
    measuring: Measuring,
}

impl<'a> Pieces<'a> {
    /// `None` without a text.
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        inputs: &'a InputHashes<'a>,
        text: Option<CalibrationText>,
        structures: Structures,
        algebra: Algebra,
        context: JobContext<'_>,
    ) -> Result<Option<Self>, PipelineError> {
        let (context, measuring) =
            CalibrationContext::begin(checkpoint, inputs, text, structures, algebra, context)?;
        Ok(measuring.map(|measuring| Self { context, measuring }))
    }

    /// Runs parts of the text through the model.
    pub(crate) fn run_text(&self, parts: &[usize], context: JobContext<'_>) -> Result<(), PipelineError> {
        let Measuring { text, engine, .. } = &self.measuring;
        self.run(text, &**engine, &text.sequences, parts, context)
    }

    /// Runs parts of the windows that sensitivities are measured with through the model.
    pub(crate) fn run_sample(&self, parts: &[usize], context: JobContext<'_>) -> Result<(), PipelineError> {
        let Measuring { text, engine, .. } = &self.measuring;
        let sample = text.for_sensitivities(self.context.checkpoint.config().hidden_size).windows;
        self.run(text, &**engine, &sample, parts, context)
    }

    fn run(
        &self,
        text: &CalibrationText,
        engine: &dyn Engine,
        windows: &[Vec<u32>],
        parts: &[usize],
        context: JobContext<'_>,
    ) -> Result<(), PipelineError> {
        let JobContext { pool, interrupt, .. } = context;
        let (checkpoint, stop) = (self.context.checkpoint, || interrupt.check().is_err());
        let states = self.context.states(text, engine, windows)?;
        let forward = Forward::on(checkpoint, engine);
        pool.install(|| states.run(&forward, parts, &stop))
            .map_err(|error| explained(error, checkpoint, context))
    }

    /// Takes the moments of some experts of a layer.
    pub(crate) fn moments(
        &self,
        layer: usize,
        experts: &[usize],
        context: JobContext<'_>,
    ) -> Result<(), PipelineError> {
        let Measuring { text, engine, store } = &self.measuring;
        let JobContext { pool, interrupt, .. } = context;
        let (checkpoint, stop) = (self.context.checkpoint, || interrupt.check().is_err());
        let widths = self.context.width_store(text, &**engine)?;
        let states = self.context.states(text, &**engine, &text.sequences)?;
        let (forward, moments) = (Forward::on(checkpoint, &**engine), text.settings.moments);
        let work = || {
            let hidden = states.of_layer(layer)?;
            collect_experts(&forward, &hidden, (layer, experts), moments, store, widths.as_ref(), &stop)
        };
        pool.install(work).map_err(|error| explained(error, checkpoint, context))
    }

    /// When all moments are taken.
    pub(crate) fn measured(self) -> Result<CalibrationContext<'a>, PipelineError> {
        let Self { mut context, measuring } = self;
        context.calibrated = Some(measuring.finished(context.checkpoint)?);
        Ok(context)
    }
}

impl CalibrationContext<'_> {
    /// States of windows of a text before every MoE block.
    fn states<'w>(
        &self,
        text: &CalibrationText,
        engine: &dyn Engine,
        windows: &'w [Vec<u32>],
    ) -> Result<States<'w>, PipelineError> {
        let key = json!({
            "what": "states", "model": self.model()?, "tokens": tokens_hash(windows), "of": text.blake3,
            "engine": engine.describe(),
        });
        Ok(States::new(self.cache.entry(&key), windows, self.checkpoint.config().hidden_size))
    }

    /// States of the whole text.
    pub(crate) fn states_of_text(&self) -> Result<States<'_>, PipelineError> {
        let Calibrated { text, engine, .. } = self.calibrated().ok_or(PipelineError::NothingToMeasureOn)?;
        self.states(text, &**engine, &text.sequences)
    }

    /// The place of what a job leaves for its later units.
    pub(crate) fn entry_of_job(&self, what: &str, job: &Value) -> Result<Entry, PipelineError> {
        Ok(self.cache.entry(&json!({ "what": what, "model": self.model()?, "job": job })))
    }

    /// States of the compressed model.
    pub(crate) fn compressed_states(&self, job: &Value) -> Result<States<'_>, PipelineError> {
        let Calibrated { text, .. } = self.calibrated().ok_or(PipelineError::NothingToMeasureOn)?;
        let entry = self.entry_of_job("compressed states", job)?;
        Ok(States::new(entry, &text.sequences, self.checkpoint.config().hidden_size))
    }

    /// Works on a piece of the sensitivities.
    pub(crate) fn piece_of_sensitivities<R: Send>(
        &self,
        act: impl FnOnce(&Apart<'_>) -> Result<R, CalibrateError> + Send,
        context: JobContext<'_>,
    ) -> Result<R, PipelineError> {
        let JobContext { pool, interrupt, .. } = context;
        let Calibrated { text, norms, engine } =
            self.calibrated().ok_or(PipelineError::NothingToMeasureOn)?;
        let windows = text.for_sensitivities(self.checkpoint.config().hidden_size).windows;
        let (sample, entry) = (self.states(text, &**engine, &windows)?, self.entry_of_sensitivities()?);
        let widths = self.width_store(text, &**engine)?.filter(|_| self.structures.has_widths());
        let (forward, stop) = (Forward::on(self.checkpoint, &**engine), || interrupt.check().is_err());
        let apart = Apart {
            forward: &forward,
            norms,
            algebra: &self.algebra,
            sample: &sample,
            widths: widths.as_ref(),
            entry: &entry,
            stop: &stop,
        };
        pool.install(|| act(&apart)).map_err(|error| explained(error, self.checkpoint, context))
    }

    /// Leaves sensitivities of which all pieces are done where a run looks for them.
    pub(crate) fn put_sensitivities_together(&self, context: JobContext<'_>) -> Result<(), PipelineError> {
        if self.entry_of_sensitivities()?.has(SPECTRA) {
            return Ok(());
        }
        let measured = self.piece_of_sensitivities(|apart| apart.together(), context)?;
        let note = serde_json::to_string(&measured.layers).expect("finite numbers serialise");
        let arrays = arrays_of(&measured.spectra, note);
        Ok(self.entry_of_sensitivities()?.put(SPECTRA, &arrays).map_err(CalibrateError::from)?)
    }
}
