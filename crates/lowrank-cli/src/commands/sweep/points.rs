//! Which point of a sweep is which: every point is checked against the model and known by its resolved recipe.

use crate::exit::{Failure, Result};
use crate::grid::{Compress, Point, Sweep};
use lowrank_model::Recipe;
use lowrank_model::plan::{Sensitivity, Structures};
use lowrank_pipeline::calibration::tokens_hash;
use lowrank_pipeline::planning::{self, Subject};
use lowrank_pipeline::{CalibrationText, PipelineError};
use lowrank_reader::Checkpoint;
use lowrank_sweep::PointId;
use lowrank_text::{Passage, TextSource, windows};
use lowrank_verify::{VerifyError, VerifyOptions};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// Patterns and ranks against the model; many points share them.
pub(super) fn check_patterns(config: &Sweep, subject: &Subject) -> Result<()> {
    let mut seen = BTreeSet::new();
    for point in &config.points {
        let Recipe { plan, factor, .. } = &point.job.recipe;
        if !seen.insert(json!([plan.keep_dense, plan.fix_rank, factor.storage]).to_string()) {
            continue;
        }
        subject.choices(&point.job.recipe).map_err(|error| {
            let key = match &error {
                PipelineError::PatternMatchesNothing { key, .. } => key,
                PipelineError::DenseAndFixed { .. } => "keep-dense",
                _ => "fix-rank",
            };
            config.error(point, key, Failure::from(error))
        })?;
    }
    Ok(())
}

/// A point with all that names it.
pub(crate) struct Identified<'a> {
    pub(crate) point: &'a Point,
    pub(crate) id: PointId,
    /// Which of the texts.
    pub(super) text: Option<usize>,
    pub(super) sensitivity: Sensitivity,
}

impl Identified<'_> {
    /// What its plan may cut.
    pub(super) fn structures(&self) -> Structures {
        self.point.job.recipe.measured_structures()
    }

    /// Whether errors are measured on a text.
    pub(crate) fn is_calibrated(&self) -> bool {
        self.text.is_some()
    }

    /// Equal for points that are planned from the same errors: on the same text, compared alike, for the same structures.
    pub(crate) fn measured_like(&self) -> (Option<usize>, &'static str, Structures) {
        (self.text, self.sensitivity.into(), self.structures())
    }
}

/// Reads every calibration text once, and says which point is which.
pub(super) fn identify<'a>(
    config: &'a Sweep,
    checkpoint: &Checkpoint,
    subject: &Subject,
) -> Result<(Vec<CalibrationText>, Vec<Identified<'a>>)> {
    let (mut settings, mut texts) = (Vec::new(), Vec::new());
    let mut points: Vec<Identified<'a>> = Vec::new();
    let mut seen: BTreeMap<PointId, usize> = BTreeMap::new();
    for point in &config.points {
        let recipe = &point.job.recipe;
        let text = match recipe.calibration() {
            None => None,
            Some(wanted) => Some(match settings.iter().position(|known| *known == wanted) {
                Some(place) => place,
                None => {
                    let read = CalibrationText::read(checkpoint, recipe);
                    texts.extend(
                        read.map_err(|error| config.error(point, "calibrate", Failure::from(error)))?,
                    );
                    settings.push(wanted);
                    texts.len() - 1
                }
            }),
        };
        let sensitivity = recipe.sensitivity();
        if text.is_none() && sensitivity == Sensitivity::Measured {
            return Err(config.error(point, "sensitivity", Failure::from(PipelineError::NothingToMeasureOn)));
        }
        planning::refuse_structures(recipe)
            .map_err(|error| config.error(point, "structures", Failure::from(error)))?;
        let mut resolved = subject.resolve(recipe);
        // Decides no tensor.
        resolved.output = Default::default();
        let id = PointId::of(&planning::identity(&resolved, text.map(|place| &texts[place])));
        if let Some(first) = seen.insert(id.clone(), points.len()) {
            return Err(config.same(points[first].point, point));
        }
        points.push(Identified { point, id, text, sensitivity });
    }
    Ok((texts, points))
}

/// What compressed points are run on.
pub(super) struct Verification {
    pub(super) options: VerifyOptions,
    /// For the header; absent where nothing is compressed.
    pub(super) of: Option<serde_json::Value>,
}

impl Verification {
    /// Reads the text, so that one that cannot be used is refused before anything runs.
    pub(super) fn new(config: &Sweep, checkpoint: &Checkpoint) -> Result<Self> {
        let usual = VerifyOptions::default();
        let keys = &config.verify;
        let options = VerifyOptions {
            text: keys.text.clone().map_or(TextSource::Bundled(Passage::Verification), TextSource::File),
            window: keys.window.unwrap_or(usual.window),
            bos: keys.bos,
            max_tokens: keys.max_tokens,
            ..usual
        };
        if config.compress == Compress::None {
            return Ok(Self { options, of: None });
        }
        let windows = windows(checkpoint.dir(), &options.text_request()).map_err(VerifyError::Text)?;
        let of = json!({ "text": windows.info, "tokens_blake3": tokens_hash(&windows.sequences) });
        Ok(Self { options, of: Some(of) })
    }
}
