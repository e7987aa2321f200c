//! All files except shards and index: config, code, report, card, and files copied unchanged from the base.

use crate::config::{self, ConfigOf, StatedDtype};
use crate::figures::{self, Figure};
use crate::{Card, CompressionReport, WriteError, code, staging::StagingDir};
use lowrank_model::plan::{PlannedExpert, Size};
use lowrank_model::{ModelConfig, RankPlan, format};
use serde::Serialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

/// The model card.
pub const CARD_FILE: &str = "README.md";

/// The files of a checkpoint except shards and index.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    files: BTreeMap<PathBuf, Vec<u8>>,
    companions: BTreeMap<PathBuf, PathBuf>,
    pub(crate) promised: Option<Size>,
}

impl Documents {
    /// The files of a factored checkpoint: config with ranks, widths and layers with a base, the channels that stay, the family's Python files,
    /// report, card with its figures, and a selection of the singular values if they are known. [`crate::CheckpointWriter::finish`] fails if the written headers
    /// differ from the sizes in the report.
    pub fn factored(
        of: ConfigOf<'_>,
        plan: &RankPlan,
        report: &CompressionReport,
        card: &Card<'_>,
    ) -> Result<Self, WriteError> {
        let model = ModelConfig::from_hf_json(of.base)?;
        let is_own = model.block.shared_experts.has_width_of_its_own();
        if let Some(width) = plan.plain_width().filter(|_| is_own) {
            return Self::narrow(of, &model, plan, width, report, card);
        }
        let RankPlan { spectra: curves, experts, cost, .. } = plan;
        let curves = curves.as_ref();
        let stored = plan.stored_config(&model);
        let config = config::factored(of, &stored, &plan.ranks(), cost.storage)?;
        let figures = figures::all(&model, report, curves);
        let mut documents = Self::default();
        if let Some(curves) = curves {
            documents = documents.with_file(format::SPECTRA_FILE, compact(curves))?;
        }
        if !experts.is_empty() {
            documents = documents.with_file(format::CHANNELS_FILE, channels_of(&model, experts))?;
        }
        let text = card.factored(&model, report, &figures);
        for Figure { file, svg, .. } in figures {
            documents = documents.with_file(file, svg)?;
        }
        for (name, text) in code::files(model.family) {
            documents = documents.with_file(name, text)?;
        }
        documents
            .with_file(format::CONFIG_FILE, pretty(&config))?
            .with_file(format::REPORT_FILE, pretty(report))?
            .with_file(CARD_FILE, text)
            .map(|documents| documents.promising(report.after))
    }

    /// The files of an ordinary model with narrower experts: its family's own config, the channels that stay, report and card.
    fn narrow(
        of: ConfigOf<'_>,
        model: &ModelConfig,
        plan: &RankPlan,
        width: usize,
        report: &CompressionReport,
        card: &Card<'_>,
    ) -> Result<Self, WriteError> {
        let config = config::narrow(of, model, width)?;
        Self::default()
            .with_file(format::CONFIG_FILE, pretty(&config))?
            .with_file(format::CHANNELS_FILE, channels_of(model, &plan.experts))?
            .with_file(format::REPORT_FILE, pretty(report))?
            .with_file(CARD_FILE, card.narrow(model, width, report))
            .map(|documents| documents.promising(report.after))
    }

    /// The files of a dense checkpoint made from factors: the family's own config, and a card that names the base.
    pub fn dense(base_config: &Value, dtype: StatedDtype, card: &Card<'_>) -> Result<Self, WriteError> {
        let model = ModelConfig::from_hf_json(base_config)?;
        Self::default()
            .with_file(
                format::CONFIG_FILE,
                pretty(&config::dense(ConfigOf::new(base_config, dtype), &model)?),
            )?
            .with_file(CARD_FILE, card.dense(&model))
    }

    /// Adds a file.
    pub fn with_file(
        mut self,
        name: impl Into<PathBuf>,
        content: impl Into<Vec<u8>>,
    ) -> Result<Self, WriteError> {
        let name = name.into();
        if self.companions.contains_key(&name) || self.files.contains_key(&name) {
            return Err(WriteError::DuplicateFile { name });
        }
        self.files.insert(name, content.into());
        Ok(self)
    }

    /// Copies files unchanged from `dir`, under the same relative names.
    pub fn with_companions(mut self, dir: &Path, names: &[PathBuf]) -> Result<Self, WriteError> {
        for name in names {
            if self.files.contains_key(name) || self.companions.contains_key(name) {
                return Err(WriteError::DuplicateFile { name: name.clone() });
            }
            self.companions.insert(name.clone(), dir.join(name));
        }
        Ok(self)
    }

    /// Sets the size that the written headers must add up to.
    pub fn promising(mut self, size: Size) -> Self {
        self.promised = Some(size);
        self
    }

    pub(crate) fn write(&self, staging: &StagingDir) -> Result<(), WriteError> {
        for (name, content) in &self.files {
            staging.write_file(name, &mut content.as_slice())?;
        }
        for (name, source) in &self.companions {
            let mut file = File::open(source).map_err(WriteError::io(source, "open"))?;
            staging.write_file(name, &mut file)?;
        }
        Ok(())
    }
}

/// `lowrank_channels.json`.
fn channels_of(model: &ModelConfig, experts: &[PlannedExpert]) -> Vec<u8> {
    let spelling = model.family.spelling();
    let rows = experts.iter().map(|row| (spelling.expert(row.layer, row.expert), &row.channels));
    pretty(&rows.collect::<BTreeMap<String, _>>())
}

/// Indented JSON with a final newline.
pub(crate) fn pretty(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("string keys and finite depth always serialise");
    text.push(b'\n');
    text
}

/// JSON on one line, with a final newline.
fn compact(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec(value).expect("string keys and finite depth always serialise");
    text.push(b'\n');
    text
}
