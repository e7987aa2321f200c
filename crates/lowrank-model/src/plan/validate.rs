//! Whether a plan that came from a file can be, and fits a model.

use super::{PlanError, PlannedExpert, RankPlan, Size, size_after};
use crate::display::clip;
use crate::{CostModel, MatrixId, ModelConfig, Projection, Target};

/// Nothing is further from a matrix than zero is, up to rounding.
const RELATIVE_ERROR_MAX: f64 = 1.0 + 1e-6;

impl RankPlan {
    /// Checks a plan that came from a file against the model it is to be used on.
    pub fn validate(&self, config: &ModelConfig, before: Size) -> Result<(), PlanError> {
        let known = self.version();
        if self.plan_version != known {
            return Err(PlanError::Version { found: self.plan_version, known });
        }
        self.check_settings()?;
        self.check_experts(config)?;
        self.check_bases(config)?;
        let narrowed = config.with_widths(self.widths());
        let mut rows = self.matrices.iter();
        for id in config.matrices() {
            let row = rows.next().ok_or(PlanError::MissingMatrix(id))?;
            if row.matrix != config.named(id) {
                return Err(PlanError::UnknownMatrix(clip(&row.matrix.name)));
            }
            let shape = config.matrix_shape(id);
            if row.shape != shape {
                return Err(PlanError::Shape { name: id, planned: row.shape, actual: shape });
            }
            if let Some(rank) = row.rank {
                let shape = narrowed.matrix_shape(id);
                let rank_max = crate::params::rank_max_saving(shape, self.cost.storage);
                if rank == 0 || rank > rank_max {
                    return Err(PlanError::Rank { name: id, shape, rank, rank_max });
                }
            }
            let is_size = |bytes| matches!(bytes, 2 | 4);
            if let Some(found) = row.element_bytes.filter(|own| !is_size(own.dense) || !is_size(own.factor)) {
                return Err(PlanError::ElementBytes { name: id, found });
            }
            if let Some(value) =
                row.relative_error.filter(|value| !(0.0..=RELATIVE_ERROR_MAX).contains(value))
            {
                return Err(PlanError::RelativeError { name: id, value: value.to_string() });
            }
        }
        if let Some(row) = rows.next() {
            return Err(PlanError::UnknownMatrix(clip(&row.matrix.name)));
        }
        let short_side = self.matrices.first().map_or(0, |row| row.shape.short_side());
        let routed = self.matrices.iter().filter(|row| !row.matrix.id.is_shared());
        let names: Vec<&str> = routed.map(|row| row.matrix.name.as_str()).collect();
        if self.spectra.as_ref().is_some_and(|curves| !curves.fits(names.into_iter(), short_side)) {
            return Err(PlanError::Spectra);
        }
        for (what, planned, actual) in
            [("parameters", self.before.params, before.params), ("bytes", self.before.bytes, before.bytes)]
        {
            if planned != actual {
                return Err(PlanError::OtherCheckpoint { what, planned, actual });
            }
        }
        let bases = &self.shared_base_layers;
        let after = size_after(&self.cost, before, &self.matrices, &narrowed.widths, bases)?;
        for (what, planned, actual) in
            [("parameters", self.after.params, after.params), ("bytes", self.after.bytes, after.bytes)]
        {
            if planned != actual {
                return Err(PlanError::Sum { what, planned, actual });
            }
        }
        if let Some(Target { unit, remove_at_least: asked }) = self.target {
            let removed = self.removed(unit);
            if removed < asked {
                return Err(PlanError::TargetMissed { asked, removed, unit });
            }
        }
        Ok(())
    }

    fn check_experts(&self, config: &ModelConfig) -> Result<(), PlanError> {
        let mut before = None;
        for row in &self.experts {
            let PlannedExpert { layer, expert, .. } = *row;
            let rises = before.replace((layer, expert)).is_none_or(|before| before < (layer, expert));
            let is_one = config.has(MatrixId { layer, expert, projection: Projection::Gate });
            let intermediate_size = config.intermediate_size;
            if !rises || !is_one || !row.channels.fits(intermediate_size) {
                return Err(PlanError::Channels { layer, expert, intermediate_size });
            }
            if let Some(value) =
                row.relative_error.filter(|value| !(0.0..=RELATIVE_ERROR_MAX).contains(value))
            {
                let name = MatrixId { layer, expert, projection: Projection::Down };
                return Err(PlanError::RelativeError { name, value: value.to_string() });
            }
        }
        Ok(())
    }

    fn check_bases(&self, config: &ModelConfig) -> Result<(), PlanError> {
        let mut before = None;
        for &layer in &self.shared_base_layers {
            let rises = before.replace(layer).is_none_or(|before| before < layer);
            let is_one = layer < config.num_hidden_layers && config.experts_in(layer) > 1;
            if !rises || !is_one || self.experts.iter().any(|row| row.layer == layer) {
                return Err(PlanError::SharedBase { layer });
            }
        }
        Ok(())
    }

    fn check_settings(&self) -> Result<(), PlanError> {
        let CostModel { dense_element_bytes, factor_element_bytes, .. } = self.cost;
        let (element, from_one) = ("2 or 4 bytes of an element", "1 or more");
        for (key, value, expected, holds) in [
            ("dense_element_bytes", dense_element_bytes, element, matches!(dense_element_bytes, 2 | 4)),
            ("factor_element_bytes", factor_element_bytes, element, matches!(factor_element_bytes, 2 | 4)),
            ("rank_multiple", self.rank_multiple as u64, from_one, self.rank_multiple > 0),
            ("rank_min", self.rank_min as u64, from_one, self.rank_min > 0),
        ] {
            if !holds {
                return Err(PlanError::Setting { key, value, expected });
            }
        }
        Ok(())
    }
}
