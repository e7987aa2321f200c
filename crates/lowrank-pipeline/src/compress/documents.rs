//! What stands beside the weights: config, report, card and the base's own files.

use super::tensors::Work;
use crate::{FactorSettings, PipelineError, base};
use lowrank_model::MatrixId;
use lowrank_writer::report::{BaseModel, InputFile, Outcome, Settings};
use lowrank_writer::{Card, ChatTemplate, Documents, Report};
use std::collections::BTreeMap;

impl Work<'_> {
    pub(super) fn base_model(&self, files: &[InputFile]) -> BaseModel {
        let named = base::named(self.checkpoint, self.request.model, files.to_vec());
        match self.request.provenance {
            Some(BaseModel { id, revision, .. }) => {
                BaseModel { id: id.clone(), revision: revision.clone(), ..named }
            }
            None => named,
        }
    }

    pub(super) fn documents(
        &self,
        outcomes: &BTreeMap<MatrixId, Outcome>,
        base_model: BaseModel,
    ) -> Result<Documents, PipelineError> {
        let checkpoint = self.checkpoint;
        let calibration = self.lens.report(self.plan.sensitivities.as_deref());
        let report = Report::new(self.plan, outcomes, base_model, self.settings(), calibration);
        let chat_template = ChatTemplate::find(|name| checkpoint.text(name));
        let own_card = checkpoint.text(lowrank_writer::documents::CARD_FILE).unwrap_or_default();
        let own_card = String::from_utf8_lossy(&own_card);
        let card = Card {
            base_model: report.base_model.id.as_deref(),
            license: lowrank_writer::card::license_of(&own_card),
            chat_template: chat_template.as_ref(),
        };
        let documents = Documents::factored(
            checkpoint.config_json(),
            &self.ranks,
            self.plan.cost.storage,
            self.factor_dtype(),
            &report,
            self.plan.spectra.as_ref(),
            &card,
        )?;
        Ok(documents.with_companions(checkpoint.dir(), &checkpoint.companions())?)
    }

    fn settings(&self) -> Settings {
        // The plan knows how it was made, so that a stored plan gives the same report as its budget did.
        let FactorSettings { method, seed, shard_bytes_max } = *self.request.factor;
        Settings {
            method: method.to_string(),
            precision: "auto".into(),
            seed,
            sensitivity: self.plan.optimality.map(|optimality| optimality.sensitivity).unwrap_or_default(),
            allocation: self.plan.allocation.as_str().into(),
            rank_multiple: self.plan.rank_multiple,
            rank_min: self.plan.rank_min,
            keep_dense: self.plan.keep_dense.clone(),
            fix_rank: self.plan.fix_rank.clone(),
            factor_dtype: self.factor_dtype(),
            shard_bytes_max,
            algebra: self.lens.algebra().identity(),
        }
    }
}
