//! How the errors of a job are counted: by the weights alone, or by what a text shows the experts.
//!
//! Everything measured goes through the cache, under a key that names all it depends on: model, tokens, settings, engine,
//! version. So a second budget, a sweep or a resumed run measures nothing again.

pub(crate) mod pieces;

use crate::base::InputHashes;
use crate::{Interrupt, JobContext, PipelineError};
use lowrank_cache::{Arrays, Cache, Entry, Numbers};
use lowrank_calibrate::{
    CalibrateError, DifferenceSpectra, Norm, Norms, Sensitivities, Store, WidthStore, WidthsByExpert,
    collect, measure, states::parts_of,
};
use lowrank_compute::{Algebra, Substituted};
use lowrank_forward::{Engine, Forward};
use lowrank_model::names::{Role, Spelling};
use lowrank_model::plan::{LayerSensitivity, Structures, WidthSensitivity};
use lowrank_model::recipe::{
    CalibrationSettings, MomentSettings, PropagationScope, PropagationSettings, TextChoice,
};
use lowrank_model::tensors::TensorSpec;
use lowrank_model::{MatrixId, Progress, Recipe, Spectrum};
use lowrank_reader::Checkpoint;
use lowrank_text::{
    Passage, Pick, TextError, TextInfo, TextRequest, TextSource, vocabulary_info, vocabulary_windows, windows,
};
use lowrank_writer::report::CalibrationReport;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Version of what is cached: raised when the same settings give other numbers.
const CACHE_VERSION: u32 = 7;

/// A text to calibrate on, encoded.
#[derive(Debug, Clone)]
pub struct CalibrationText {
    settings: CalibrationSettings,
    propagation: PropagationSettings,
    infos: Vec<TextInfo>,
    /// Those of the texts first, then those of the vocabulary.
    sequences: Vec<Vec<u32>>,
    /// How many are of the texts.
    of_texts: usize,
    notes: Vec<String>,
    blake3: String,
}

/// Windows that a calibration has at least, unless fewer tokens were asked for.
const WINDOWS_MIN: usize = 2;

impl CalibrationText {
    /// Reads and encodes the texts of a recipe; each gives an equal share of the tokens. `None` where it has none. A text may
    /// be shorter than asked, which is a note; one of less than two windows says nothing about a model and is refused,
    /// unless no more was asked for.
    pub fn read(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Option<Self>, PipelineError> {
        let Some(settings) = recipe.calibration() else { return Ok(None) };
        check_window(checkpoint, recipe)?;
        let window = window_of(checkpoint, settings);
        let vocabulary =
            (settings.vocabulary_share * settings.calibration_tokens as f64 / window as f64).round() as usize;
        let wanted = settings.calibration_tokens.saturating_sub(vocabulary * window);
        let (mut infos, mut sequences, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for text in &settings.calibrate {
            let source = match text {
                TextChoice::File(path) => TextSource::File(path.clone()),
                _ => TextSource::Bundled(Passage::Calibration),
            };
            let request = TextRequest {
                source: &source,
                window,
                bos: settings.bos,
                max_tokens: Some((wanted / settings.calibrate.len()).max(2)),
                pick: Pick::Spread,
            };
            let windows = windows(checkpoint.dir(), &request).map_err(CalibrateError::from)?;
            infos.push(windows.info);
            sequences.extend(windows.sequences);
            notes.extend(windows.notes);
        }
        let tokens = sequences.iter().map(Vec::len).sum();
        let least = WINDOWS_MIN * window;
        if tokens < least.min(wanted / window * window) {
            return Err(CalibrateError::from(TextError::TooFew { tokens, wanted, least }).into());
        }
        let of_texts = sequences.len();
        // A share of what there is: a short text is not drowned in the vocabulary.
        let texts = wanted / window;
        let vocabulary = if of_texts < texts { (vocabulary * of_texts).div_ceil(texts) } else { vocabulary };
        if vocabulary > 0 {
            let prefix = infos.first().map_or(&[][..], |info| &info.prefix).to_vec();
            let more = vocabulary_windows(checkpoint.config().vocab_size, &prefix, window, vocabulary);
            infos.push(vocabulary_info(&more, window, &prefix));
            sequences.extend(more);
        }
        let blake3 = tokens_hash(&sequences);
        let (mut settings, propagation) = (settings.clone(), recipe.propagation);
        settings.calibration_window = Some(window);
        Ok(Some(Self { settings, propagation, infos, sequences, of_texts, notes, blake3 }))
    }

    /// What decides the numbers that are measured on it. The tokens stand for the names of the texts.
    fn key(&self) -> Value {
        let mut key = json!(self.settings);
        key["calibrate"] = json!(self.blake3);
        key
    }

    /// Of all token ids.
    pub fn blake3(&self) -> &str {
        &self.blake3
    }

    fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// Parts that it is cut into where several processes work on it.
    pub(crate) fn parts(&self) -> usize {
        parts_of(self.sequences.len())
    }

    /// Likewise of the windows that sensitivities are measured with.
    pub(crate) fn parts_of_sample(&self, hidden_size: usize) -> usize {
        parts_of(self.for_sensitivities(hidden_size).windows.len())
    }

    /// Windows to measure sensitivities with, evenly out of those of the texts.
    fn for_sensitivities(&self, hidden_size: usize) -> Sample {
        let texts = &self.sequences[..self.of_texts];
        let longest = texts.iter().map(Vec::len).max().unwrap_or(1).max(1);
        let window = CalibrationSettings::sensitivity_window(longest);
        let count = self.settings.sensitivity_tokens(hidden_size).div_ceil(window).clamp(1, texts.len());
        let chosen: Vec<usize> = (0..count).map(|i| i * texts.len() / count).collect();
        let windows = chosen.iter().map(|&text| texts[text][..window.min(texts[text].len())].to_vec());
        let begin = |text: usize| texts[..text].iter().map(Vec::len).sum::<usize>();
        let places = chosen.iter().flat_map(|&text| {
            let begin = begin(text);
            begin..begin + window.min(texts[text].len())
        });
        Sample { windows: windows.collect(), places: places.collect() }
    }
}

/// The beginnings of some windows.
struct Sample {
    windows: Vec<Vec<u32>>,
    /// Of their tokens in the whole text, rising.
    places: Vec<usize>,
}

/// Tokens of a window for this model.
fn window_of(checkpoint: &Checkpoint, settings: &CalibrationSettings) -> usize {
    let config = checkpoint.config();
    settings.window(config.hidden_size, config.max_position_embeddings)
}

/// Refuses windows that have more tokens than the model has positions.
pub(crate) fn check_window(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<(), PipelineError> {
    let positions = checkpoint.config().max_position_embeddings;
    match recipe.calibration().map(|settings| window_of(checkpoint, settings)) {
        Some(window) if window > positions => Err(PipelineError::WindowTooLong { window, positions }),
        _ => Ok(()),
    }
}

/// Of all token ids and where windows end.
pub fn tokens_hash(sequences: &[Vec<u32>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for sequence in sequences {
        hasher.update(&(sequence.len() as u64).to_le_bytes());
        for token in sequence {
            hasher.update(&token.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// How errors are counted.
pub struct CalibrationContext<'a> {
    checkpoint: &'a Checkpoint,
    inputs: &'a InputHashes<'a>,
    cache: Cache,
    algebra: Algebra,
    structures: Structures,
    calibrated: Option<Calibrated>,
}

#[derive(Debug)]
pub(crate) struct Calibrated {
    text: CalibrationText,
    pub(crate) norms: Norms,
    pub(crate) engine: Box<dyn Engine>,
}

/// A text whose moments are taken or to be taken.
struct Measuring {
    text: CalibrationText,
    engine: Box<dyn Engine>,
    store: Store,
}

impl Measuring {
    /// When all moments are taken.
    fn finished(self, checkpoint: &Checkpoint) -> Result<Calibrated, PipelineError> {
        let Self { text, engine, store } = self;
        let CalibrationSettings { shrinkage, moments, .. } = text.settings;
        let target = moments.calibration_target;
        let norms = Norms::new(store, checkpoint.config(), target, shrinkage, text.tokens())?;
        Ok(Calibrated { text, norms, engine })
    }
}

impl Calibrated {
    /// Token ids of the text.
    pub(crate) fn sequences(&self) -> &[Vec<u32>] {
        &self.text.sequences
    }

    /// What is summed.
    pub(crate) fn moments(&self) -> MomentSettings {
        self.text.settings.moments
    }

    /// What factors are fitted to.
    pub(crate) fn propagation(&self) -> PropagationSettings {
        self.text.propagation
    }

    /// Names of the experts that saw nothing.
    fn unrouted(&self, spelling: &Spelling) -> Vec<String> {
        let layers = self.norms.tokens_per_expert().iter().enumerate();
        let unrouted = layers.flat_map(|(layer, experts)| {
            let none = experts.iter().enumerate().filter(|(_, tokens)| **tokens == 0);
            none.map(move |(expert, _)| spelling.expert(layer, expert))
        });
        unrouted.collect()
    }
}

impl<'a> CalibrationContext<'a> {
    /// Takes moments on the text, and what plans with such structures are made from, if there is a text and they are not in the
    /// cache.
    pub fn new(
        checkpoint: &'a Checkpoint,
        inputs: &'a InputHashes<'a>,
        text: Option<CalibrationText>,
        structures: Structures,
        algebra: Algebra,
        context: JobContext<'_>,
    ) -> Result<Self, PipelineError> {
        let JobContext { pool, progress, interrupt, .. } = context;
        let (mut calibration, measuring) =
            Self::begin(checkpoint, inputs, text, structures, algebra, context)?;
        let Some(measuring) = measuring else { return Ok(calibration) };
        {
            let stop = || interrupt.check().is_err();
            let Measuring { text, engine, store } = &measuring;
            let forward = Forward::on(checkpoint, &**engine);
            let widths = calibration.width_store(text, &**engine)?;
            let (sequences, moments) = (&text.sequences, text.settings.moments);
            pool.install(|| collect(&forward, sequences, moments, store, widths.as_ref(), progress, &stop))
                .map_err(|error| explained(error, checkpoint, context))?;
        }
        let calibrated = measuring.finished(checkpoint)?;
        let unrouted = calibrated.unrouted(checkpoint.config().family.spelling());
        if !unrouted.is_empty() {
            progress.note(&format!(
                "no token of the calibration text is routed to {}: compressed without data",
                unrouted.join(", ")
            ));
        }
        calibration.calibrated = Some(calibrated);
        Ok(calibration)
    }

    /// Where moments lie, and what takes them, before any is taken.
    fn begin(
        checkpoint: &'a Checkpoint,
        inputs: &'a InputHashes<'a>,
        text: Option<CalibrationText>,
        structures: Structures,
        algebra: Algebra,
        context: JobContext<'_>,
    ) -> Result<(Self, Option<Measuring>), PipelineError> {
        let JobContext { resources, progress, .. } = context;
        let cache = resources.cache()?;
        let calibration = Self { checkpoint, inputs, cache, algebra, structures, calibrated: None };
        let Some(text) = text else { return Ok((calibration, None)) };
        let chosen = lowrank_forward::choose(resources.device).map_err(CalibrateError::from)?;
        if let Some(why) = chosen.fallback {
            progress.note(&format!("calibrating on the CPU: {why}"));
        }
        let sources: Vec<&str> = text.infos.iter().map(|info| info.source.as_str()).collect();
        progress.note(&format!("calibrating on {}: {} tokens", sources.join(", "), text.tokens()));
        text.notes.iter().for_each(|note| progress.note(note));
        if let Some(line) = lowrank_forward::router::indistinct(checkpoint).map_err(CalibrateError::from)? {
            progress.note(&line);
        }
        let engine = chosen.engine;
        let moments = text.settings.moments;
        let key = json!({
            "what": "moments", "model": calibration.model()?, "tokens": text.blake3, "moments": moments,
            "engine": engine.describe(),
        });
        let store = Store::new(calibration.cache.entry(&key), checkpoint.config().hidden_size);
        Ok((calibration, Some(Measuring { text, engine, store })))
    }

    /// Where orders of channels and errors of widths lie; `None` where none are asked for.
    fn width_store(
        &self,
        text: &CalibrationText,
        engine: &dyn Engine,
    ) -> Result<Option<WidthStore<'_>>, PipelineError> {
        if !self.structures.need_activations() {
            return Ok(None);
        }
        let key = json!({
            "what": "widths", "model": self.model()?, "text": text.key(), "engine": engine.describe(),
            "algebra": self.algebra.identity(), "structures": self.structures, "ridge": lowrank_calibrate::widths::RIDGE,
        });
        let (entry, algebra) = (self.cache.entry(&key), &self.algebra);
        let (structures, shrinkage) = (self.structures, text.settings.shrinkage);
        let sample = text.for_sensitivities(self.checkpoint.config().hidden_size).places;
        Ok(Some(WidthStore { entry, algebra, structures, shrinkage, sample }))
    }

    /// Errors of ranks in the layers whose experts may share a base, if the recipe allows any. `own`: those of the matrices
    /// themselves.
    pub fn differences(
        &self,
        own: &BTreeMap<MatrixId, Spectrum>,
        context: JobContext<'_>,
    ) -> Result<DifferenceSpectra, PipelineError> {
        let JobContext { pool, progress, interrupt, .. } = context;
        let none = || Ok(DifferenceSpectra::new());
        let Some(Calibrated { text, norms, engine }) = &self.calibrated else { return none() };
        if !self.structures.has_bases() {
            return none();
        }
        let Some(store) = self.width_store(text, &**engine)? else { return none() };
        let stop = || interrupt.check().is_err();
        let (checkpoint, tokens) = (self.checkpoint, text.tokens());
        pool.install(|| store.differences(checkpoint, norms, tokens, own, progress, &stop))
            .map_err(|error| explained(error, checkpoint, context))
    }

    /// Errors of all widths, if the recipe allows any.
    pub fn widths(&self, context: JobContext<'_>) -> Result<WidthsByExpert, PipelineError> {
        let JobContext { pool, progress, interrupt, .. } = context;
        let Some(Calibrated { text, norms, engine }) = &self.calibrated else { return Ok(BTreeMap::new()) };
        let Some(store) = self.width_store(text, &**engine)? else { return Ok(BTreeMap::new()) };
        let stop = || interrupt.check().is_err();
        let checkpoint = self.checkpoint;
        pool.install(|| store.all(checkpoint, norms, progress, &stop))
            .map_err(|error| explained(error, checkpoint, context))
    }

    /// What all cached numbers of this model depend on.
    fn model(&self) -> Result<Value, PipelineError> {
        Ok(json!({
            "cache_version": CACHE_VERSION,
            "architecture": std::env::consts::ARCH,
            "files": self.inputs.files()?,
            "config": self.checkpoint.config_json(),
        }))
    }

    /// What decomposes the matrices.
    pub fn algebra(&self) -> &Algebra {
        &self.algebra
    }

    /// Notes how much the device left to the CPU.
    pub(crate) fn note_substituted(&self, progress: &dyn Progress) {
        let Substituted { times, first } = self.algebra.substituted();
        if let Some(first) = first {
            progress.note(&format!(
                "{times} decompositions were done by the CPU in place of the device, the first because: {first}"
            ));
        }
    }

    /// The text, if there is one.
    pub(crate) fn calibrated(&self) -> Option<&Calibrated> {
        self.calibrated.as_ref()
    }

    /// The text, if factors are fitted to what other factors make of it.
    pub(crate) fn propagating(&self) -> Option<&Calibrated> {
        self.calibrated
            .as_ref()
            .filter(|calibrated| calibrated.propagation().propagate != PropagationScope::None)
    }

    /// In which norm the error of a matrix is counted.
    pub fn norm(&self, id: MatrixId) -> Result<Norm, PipelineError> {
        Ok(self.calibrated.as_ref().map_or(Ok(Norm::Weights), |calibrated| calibrated.norms.of(id))?)
    }

    /// The place of what is measured about this model, seen so.
    fn entry(&self, what: &str) -> Result<Entry, PipelineError> {
        let calibration = self.calibrated.as_ref().map(
            |calibrated| json!({ "text": calibrated.text.key(), "engine": calibrated.engine.describe() }),
        );
        let algebra = self.algebra.identity();
        let model = self.model()?;
        let mut key = json!({ "what": what, "model": model, "calibration": calibration, "algebra": algebra });
        if self.checkpoint.config().compresses_shared_experts {
            key["shared_experts"] = "compressed".into();
        }
        Ok(self.cache.entry(&key))
    }

    /// Spectra of an earlier run.
    pub(crate) fn known_spectra(&self) -> Result<Option<BTreeMap<MatrixId, Spectrum>>, PipelineError> {
        let found = self.entry("spectra")?.get(SPECTRA).map_err(CalibrateError::from)?;
        Ok(found.and_then(spectra_of))
    }

    /// Keeps spectra for a later run.
    pub(crate) fn remember_spectra(
        &self,
        spectra: &BTreeMap<MatrixId, Spectrum>,
    ) -> Result<(), PipelineError> {
        let arrays = arrays_of(spectra, String::new());
        Ok(self.entry("spectra")?.put(SPECTRA, &arrays).map_err(CalibrateError::from)?)
    }

    fn entry_of_sensitivities(&self) -> Result<Entry, PipelineError> {
        let with_widths = self.structures.has_widths();
        self.entry(if with_widths { "sensitivities, of widths too" } else { "sensitivities" })
    }

    /// Spectra in the calibrated norm and what their errors and those of widths cost, measured unless they are known; `None`
    /// without a text.
    pub fn sensitivities(
        &self,
        checkpoint: &Checkpoint,
        context: JobContext<'_>,
    ) -> Result<Option<Sensitivities>, PipelineError> {
        let JobContext { pool, progress, interrupt, .. } = context;
        let Some(Calibrated { text, norms, engine }) = &self.calibrated else { return Ok(None) };
        let (has_widths, entry) = (self.structures.has_widths(), self.entry_of_sensitivities()?);
        if let Some(arrays) = entry.get(SPECTRA).map_err(CalibrateError::from)?
            && let Ok(layers) = serde_json::from_str::<Vec<LayerSensitivity>>(&arrays.note)
            && let Some(spectra) = spectra_of(arrays)
        {
            return Ok(Some(Sensitivities { spectra, layers }));
        }
        let windows = text.for_sensitivities(checkpoint.config().hidden_size).windows;
        let widths = self.width_store(text, &**engine)?.filter(|_| has_widths);
        let stop = || interrupt.check().is_err();
        let forward = Forward::on(checkpoint, &**engine);
        let measured = pool
            .install(|| measure(&forward, norms, &self.algebra, &windows, widths.as_ref(), progress, &stop))
            .map_err(|error| explained(error, checkpoint, context))?;
        let note = serde_json::to_string(&measured.layers).expect("finite numbers serialise");
        entry.put(SPECTRA, &arrays_of(&measured.spectra, note)).map_err(CalibrateError::from)?;
        Ok(Some(measured))
    }

    /// For `lowrank_report.json`.
    pub(crate) fn report(&self, layers: Option<&[LayerSensitivity]>) -> Option<CalibrationReport> {
        let calibrated = self.calibrated.as_ref()?;
        let Calibrated { text, norms, engine } = calibrated;
        Some(CalibrationReport {
            texts: text.infos.iter().map(|info| serde_json::to_value(info).expect("plain values")).collect(),
            tokens_blake3: text.blake3.clone(),
            engine: engine.describe(),
            tokens_per_expert: norms.tokens_per_expert().to_vec(),
            unrouted_experts: calibrated.unrouted(self.checkpoint.config().family.spelling()),
            kl_at_half: layers.map(|layers| layers.iter().map(|layer| layer.kl).collect()),
            sensitivity: layers.map(|layers| layers.iter().map(|layer| layer.sensitivity).collect()),
            width_kl_at_half: of_widths(layers, |width| width.kl),
            width_sensitivity: of_widths(layers, |width| width.sensitivity),
        })
    }
}

/// By layer, where that was measured.
fn of_widths(
    layers: Option<&[LayerSensitivity]>,
    value: impl Fn(WidthSensitivity) -> f64,
) -> Option<Vec<f64>> {
    layers?.iter().map(|layer| layer.width.map(&value)).collect()
}

/// The file of an entry that holds spectra.
const SPECTRA: &str = "spectra";

fn arrays_of(spectra: &BTreeMap<MatrixId, Spectrum>, note: String) -> Arrays {
    let named =
        |(id, spectrum): (&MatrixId, &Spectrum)| (id.to_string(), Numbers::F64(spectrum.sigma().to_vec()));
    Arrays { arrays: spectra.iter().map(named).collect(), note }
}

fn spectra_of(arrays: Arrays) -> Option<BTreeMap<MatrixId, Spectrum>> {
    let spectrum = |(name, numbers): (String, Numbers)| match numbers {
        Numbers::F64(sigma) => Some((MatrixId::parse(&name)?, Spectrum::new(sigma).ok()?)),
        Numbers::F32(_) | Numbers::Bytes(_) => None,
    };
    arrays.arrays.into_iter().map(spectrum).collect()
}

/// A pass that was asked to stop does not know why, and one that met a value that is not finite does not know from which
/// weight it comes.
fn explained(error: CalibrateError, checkpoint: &Checkpoint, context: JobContext<'_>) -> PipelineError {
    let JobContext { pool, progress, interrupt, .. } = context;
    match error {
        CalibrateError::Stopped => interrupt.check().err().unwrap_or(error.into()),
        CalibrateError::NotFinite { .. } | CalibrateError::LogitsNotFinite { .. } => {
            let suspects = suspects(checkpoint, &error);
            pool.install(|| first_not_finite(checkpoint, &suspects, progress, interrupt))
                .unwrap_or(error.into())
        }
        error => error.into(),
    }
}

/// The tensors that such an error may come from. Every layer's sums are checked before the next layer runs, so that is the
/// layer of the error; with the embedding, if it is the first, or what comes after the last layer, if it is the logits.
fn suspects<'a>(checkpoint: &'a Checkpoint, error: &CalibrateError) -> Vec<&'a TensorSpec> {
    let wanted = match error {
        CalibrateError::NotFinite { layer, .. } => Some(*layer),
        _ => None,
    };
    let is_suspect = |spec: &&TensorSpec| match (spec.role, layer_of(spec)) {
        (Role::Embedding, _) => wanted == Some(0) || wanted.is_none(),
        (_, layer) => layer == wanted,
    };
    checkpoint.specs().iter().filter(is_suspect).collect()
}

/// The decoder layer of a tensor, if it belongs to one.
fn layer_of(spec: &TensorSpec) -> Option<usize> {
    match spec.role {
        Role::Expert(id) => Some(id.layer),
        _ => spec.name.split('.').skip_while(|&part| part != "layers").nth(1)?.parse().ok(),
    }
}

/// The first of these weights that is NaN or infinite, if that is what is wrong; or why the search ended.
fn first_not_finite(
    checkpoint: &Checkpoint,
    suspects: &[&TensorSpec],
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Option<PipelineError> {
    progress.start("search for NaN and infinite weights", suspects.len() as u64, "tensors");
    let found = suspects.par_iter().with_max_len(1).find_map_first(|spec| {
        let checked = interrupt
            .check()
            .and_then(|()| checkpoint.read_in_blocks(spec, &mut |_| Ok::<_, PipelineError>(())));
        progress.advance(1);
        checked.err()
    });
    progress.finish();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::progress::Silent;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    /// A copy of the bundled model in which one weight of each of these tensors is NaN.
    fn with_nan(names: &[&str]) -> (tempfile::TempDir, Checkpoint) {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-mixtral");
        let folder = tempfile::tempdir().unwrap();
        for file in
            std::fs::read_dir(&model).unwrap().map(Result::unwrap).filter(|file| file.path().is_file())
        {
            std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        for file in std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
            if file.path().extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            let bytes = std::fs::read(file.path()).unwrap();
            let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let header: Value = serde_json::from_slice(&bytes[8..8 + header_len as usize]).unwrap();
            let shard = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
            for tensor in names.iter().filter_map(|name| header.get(*name)) {
                let begin = tensor["data_offsets"][0].as_u64().unwrap();
                // All ones are NaN in bf16.
                shard.write_all_at(&[0xff; 2], 8 + header_len + begin).unwrap();
            }
        }
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        (folder, checkpoint)
    }

    fn search(checkpoint: &Checkpoint, error: &CalibrateError) -> (Vec<String>, Option<PipelineError>) {
        let suspects = suspects(checkpoint, error);
        let found = first_not_finite(checkpoint, &suspects, &Silent, &Interrupt::default());
        (suspects.into_iter().map(|spec| spec.name.clone()).collect(), found)
    }

    #[test]
    fn a_weight_that_is_not_finite_is_searched_in_the_layer_of_the_error_alone_and_named() {
        let (key, head) = ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight");
        let (_folder, checkpoint) = with_nan(&[key, head]);
        let (read, found) = search(&checkpoint, &CalibrateError::NotFinite { layer: 1, expert: 0 });
        assert!(read.iter().all(|name| name.starts_with("model.layers.1.")), "{read:?}");
        assert!(found.unwrap().to_string().contains(key));
        let (read, found) = search(&checkpoint, &CalibrateError::NotFinite { layer: 0, expert: 3 });
        assert!(read.iter().any(|name| name == "model.embed_tokens.weight"), "{read:?}");
        assert!(!read.iter().any(|name| name.contains("layers.1") || name == head), "{read:?}");
        assert!(found.is_none(), "finite weights can overflow, too");
        let (read, found) = search(&checkpoint, &CalibrateError::LogitsNotFinite { spoilt: None });
        assert!(!read.iter().any(|name| name.contains("layers")), "{read:?}");
        assert!(found.unwrap().to_string().contains(head));
    }
}
