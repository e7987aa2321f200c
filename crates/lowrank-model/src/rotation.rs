//! Rotations of queries and keys that differ from the plain one, as data.

use serde_json::{Value, json};

/// YaRN (Peng et al., 2309.00071): slow angles are divided by a factor, fast ones are kept, and those in between are blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How much longer texts are than those that the model was first trained on; at least 1.
    pub factor: f64,
    /// How many positions it was first trained on.
    pub trained_positions: usize,
    /// Angles that turn at least so often within these positions are kept.
    pub beta_fast: f64,
    /// Angles that turn at most so often are divided.
    pub beta_slow: f64,
    /// With both of them cos and sin are multiplied with m(mscale) / m(mscale_all_dim), m(s) = 0.1·s·ln(factor) + 1; else with m(1).
    pub mscale: Option<f64>,
    /// Where latent attention has it, its scores are multiplied with m(mscale_all_dim)².
    pub mscale_all_dim: Option<f64>,
    /// What cos and sin are multiplied with in place of that.
    pub attention_factor: Option<f64>,
    /// Whether the ends of the blend are whole entries.
    pub truncate: bool,
}

impl Yarn {
    /// As transformers reads it, without the base of the angles.
    pub fn to_json(self) -> Value {
        let mut json = json!({
            "rope_type": "yarn",
            "type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.trained_positions,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        });
        let optional = [
            ("mscale", self.mscale),
            ("mscale_all_dim", self.mscale_all_dim),
            ("attention_factor", self.attention_factor),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                json[key] = value.into();
            }
        }
        json
    }

    /// What cos and sin are multiplied with.
    pub fn amplitude(self) -> f64 {
        let inferred = || match (self.mscale, self.mscale_all_dim) {
            (Some(mscale), Some(all)) => self.m(mscale) / self.m(all),
            _ => self.m(1.0),
        };
        self.attention_factor.unwrap_or_else(inferred)
    }

    /// What the scores of latent attention are multiplied with.
    pub fn score_scale(self) -> f64 {
        self.mscale_all_dim.map_or(1.0, |all| self.m(all).powi(2))
    }

    fn m(self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }
}
