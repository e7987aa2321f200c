//! From second moments to the norm of a matrix's error.
//!
//! The error is that of the MoE block's output, squared, per token of the text: sums are divided by the number of tokens of
//! the text, not by an expert's routed tokens, so that an expert with few routed tokens has a small error.
//!
//! The norm is shrunk towards the data-free norm of the same trace: by [`CalibrationSettings::shrinkage`] for an expert with
//! many routed tokens, and by more the fewer there are. Pooling the moments of a layer's experts was worse
//! (`docs/research/calibration.md`). An expert without routed tokens gets the data-free norm.
//!
//! [`CalibrationSettings::shrinkage`]: lowrank_model::recipe::CalibrationSettings::shrinkage

use crate::{CalibrateError, Store};
use lowrank_model::recipe::CalibrationTarget;
use lowrank_model::{MatrixId, ModelConfig, Projection, SHARED_EXPERT};
use lowrank_svd::Metric;
use ndarray::Array2;

/// Routed tokens per hidden feature at which half of the norm is data-free.
const ROUTED_PER_FEATURE: f64 = 0.1;

/// The norm of one matrix's error, with the values that define it.
#[derive(Debug, Clone, PartialEq)]
pub enum Norm {
    /// ‖W − Ŵ‖²: there are no routed tokens.
    Weights,
    /// w1 or w3.
    Inputs {
        /// [H, H], lower triangle, per token.
        moment: Array2<f64>,
        /// \[F\]
        rows: Vec<f64>,
        /// Share that is data-free.
        shrinkage: f64,
    },
    /// w2.
    Outputs {
        /// [H, H], lower triangle, per token.
        moment: Array2<f64>,
        /// Share that is data-free.
        shrinkage: f64,
    },
}

impl Norm {
    /// As the factorisation takes it.
    pub fn metric(&self) -> Metric<'_> {
        match self {
            Self::Weights => Metric::Weights,
            Self::Inputs { moment, rows, shrinkage } => {
                let (map, root) = (None, None);
                Metric::Inputs { second_moment: moment, row_weights: rows, shrinkage: *shrinkage, map, root }
            }
            Self::Outputs { moment, shrinkage } => {
                Metric::Outputs { second_moment: moment, shrinkage: *shrinkage, map: None }
            }
        }
    }
}

/// The norms of all matrices of a model, read from the store one at a time.
#[derive(Debug)]
pub struct Norms {
    store: Store,
    target: CalibrationTarget,
    shrinkage: f64,
    tokens: usize,
    hidden_size: usize,
    tokens_per_expert: Vec<Vec<u64>>,
}

impl Norms {
    /// Takes a store that [`crate::collect()`] has filled from so many tokens.
    pub fn new(
        store: Store,
        config: &ModelConfig,
        target: CalibrationTarget,
        shrinkage: f64,
        tokens: usize,
    ) -> Result<Self, CalibrateError> {
        let of_layer =
            |layer| (0..config.experts_in(layer)).map(|expert| store.tokens(layer, expert)).collect();
        let tokens_per_expert = (0..config.num_hidden_layers).map(of_layer).collect::<Result<_, _>>()?;
        Ok(Self { store, target, shrinkage, tokens, hidden_size: config.hidden_size, tokens_per_expert })
    }

    /// Routed tokens by layer and expert.
    pub fn tokens_per_expert(&self) -> &[Vec<u64>] {
        &self.tokens_per_expert
    }

    /// Of the text.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that an expert takes: all of the text for a shared one.
    fn tokens_of(&self, layer: usize, expert: usize) -> u64 {
        if expert == SHARED_EXPERT { self.tokens as u64 } else { self.tokens_per_expert[layer][expert] }
    }

    /// Whether no token is routed to an expert.
    pub fn is_unrouted(&self, layer: usize, expert: usize) -> bool {
        self.tokens_of(layer, expert) == 0
    }

    /// Of one matrix.
    pub fn of(&self, id: MatrixId) -> Result<Norm, CalibrateError> {
        let MatrixId { layer, expert, projection } = id;
        let routed = self.tokens_of(layer, expert);
        if routed == 0 {
            return Ok(Norm::Weights);
        }
        let shrinkage = self.shrinkage_of(routed as f64);
        let per_token = 1.0 / self.tokens as f64;
        if projection == Projection::Down {
            let moment = self.store.outputs(layer, expert)? * per_token;
            return Ok(if is_zero(&moment) { Norm::Weights } else { Norm::Outputs { moment, shrinkage } });
        }
        let moments = self.store.inputs(layer, expert)?;
        let total: f64 = match self.target {
            CalibrationTarget::Matrix => 1.0,
            CalibrationTarget::Expert => moments.gate_rows.iter().chain(&moments.up_rows).sum(),
        };
        if total == 0.0 || is_zero(&moments.inputs) {
            return Ok(Norm::Weights);
        }
        let mut rows = if projection == Projection::Gate { moments.gate_rows } else { moments.up_rows };
        rows.iter_mut().for_each(|row| *row /= total);
        Ok(Norm::Inputs { moment: moments.inputs * per_token, rows, shrinkage })
    }

    /// The data-free share at so many routed tokens: 1 at none, the chosen shrinkage at many.
    pub fn shrinkage_of(&self, routed: f64) -> f64 {
        shrinkage_of(self.shrinkage, routed, self.hidden_size)
    }
}

/// See [`Norms::shrinkage_of`].
pub(crate) fn shrinkage_of(chosen: f64, routed: f64, hidden_size: usize) -> f64 {
    let weight_of_none = ROUTED_PER_FEATURE * hidden_size as f64;
    (chosen * routed + weight_of_none) / (routed + weight_of_none)
}

/// No trace, no moment.
fn is_zero(moment: &Array2<f64>) -> bool {
    moment.diag().iter().all(|&value| value == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExpertMoments, RowWeights};
    use lowrank_cache::Cache;
    use lowrank_model::ModelConfig;
    use lowrank_model::recipe::MomentSettings;

    fn config() -> ModelConfig {
        ModelConfig::from_hf_json(&serde_json::json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 8, "hidden_size": 2,
            "intermediate_size": 3, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "head_dim": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 8, "tie_word_embeddings": false
        }))
        .unwrap()
    }

    #[test]
    fn rare_experts_lean_on_the_weights_and_unseen_ones_know_nothing_else() {
        let cache = Cache::temporary().unwrap();
        let store = Store::new(cache.entry(&serde_json::json!(0)), 2);
        let empty = ExpertMoments::new(2, 3, MomentSettings::default());
        let seen = ExpertMoments {
            tokens: 20,
            rows: RowWeights { gate: vec![1.0, 2.0, 0.0], up: vec![0.0, 0.0, 5.0] },
            inputs: Array2::eye(2) * 40.0,
            outputs: Array2::eye(2) * 10.0,
        };
        store.put(0, 0, &seen).unwrap();
        store.put(0, 1, &empty).unwrap();
        let norms = Norms::new(store, &config(), CalibrationTarget::Expert, 0.1, 10).unwrap();
        assert_eq!(norms.tokens_per_expert(), [[20, 0]]);
        assert!(norms.is_unrouted(0, 1) && !norms.is_unrouted(0, 0));
        let id = |expert, projection| MatrixId { layer: 0, expert, projection };
        // 0.2 routed' worth of nothing beside 20 of something.
        let shrinkage = (0.1 * 20.0 + 0.2) / 20.2;
        let moment = Array2::eye(2) * 4.0;
        assert_eq!(
            norms.of(id(0, Projection::Gate)).unwrap(),
            Norm::Inputs { moment: moment.clone(), rows: vec![0.125, 0.25, 0.0], shrinkage }
        );
        let rows = vec![0.0, 0.0, 0.625];
        assert_eq!(norms.of(id(0, Projection::Up)).unwrap(), Norm::Inputs { moment, rows, shrinkage });
        assert_eq!(
            norms.of(id(0, Projection::Down)).unwrap(),
            Norm::Outputs { moment: Array2::eye(2), shrinkage }
        );
        assert_eq!(norms.of(id(1, Projection::Up)).unwrap(), Norm::Weights);
        assert!((norms.shrinkage_of(1e-9) - 1.0).abs() < 1e-6 && norms.shrinkage_of(1e9) - 0.1 < 1e-6);
    }
}
