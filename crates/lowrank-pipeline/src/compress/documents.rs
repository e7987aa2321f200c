//! What stands beside the weights: config, report, card and the base's own files.

use super::tensors::Work;
use crate::planning::{self, Subject};
use crate::{PipelineError, base};
use lowrank_model::MatrixId;
use lowrank_writer::report::{BaseModel, InputFile, MatrixOutcome};
use lowrank_writer::{Card, ChatTemplate, CompressionReport, ConfigOf, Documents, StatedDtype};
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

    /// What the config of the output states: the base's dtype, unless factors were converted to another one.
    fn stated_dtype(&self) -> StatedDtype {
        let subject = Subject::of(self.checkpoint);
        match self.request.recipe.factor.dtype {
            Some(asked) if subject.dtypes.values().any(|&own| own != asked) => StatedDtype::Asked(asked),
            _ => StatedDtype::OfBase(subject.common_dtype()),
        }
    }

    pub(super) fn documents(
        &self,
        outcomes: &BTreeMap<MatrixId, MatrixOutcome>,
        base_model: BaseModel,
    ) -> Result<Documents, PipelineError> {
        let checkpoint = self.checkpoint;
        let calibration = self.calibration.report(self.plan.sensitivities.as_deref());
        let recipe = planning::recorded(self.request.recipe, self.plan)?;
        let algebra = self.calibration.algebra().identity();
        let report = CompressionReport::new(self.plan, outcomes, base_model, recipe, algebra, calibration);
        let chat_templates = ChatTemplate::find(checkpoint.companions(), |name| checkpoint.text(name));
        let own_card = checkpoint.text(lowrank_writer::documents::CARD_FILE).unwrap_or_default();
        let own_card = String::from_utf8_lossy(&own_card);
        let card = Card {
            base_model: report.base_model.id.as_deref(),
            license: lowrank_writer::card::license_of(&own_card),
            chat_templates: &chat_templates,
        };
        let fp8 = checkpoint.modules_without_fp8();
        let config = ConfigOf { base: checkpoint.config_json(), dtype: self.stated_dtype(), fp8 };
        let documents = Documents::factored(config, self.plan, &report, &card)?;
        Ok(documents.with_companions(checkpoint.dir(), checkpoint.companions())?)
    }
}
