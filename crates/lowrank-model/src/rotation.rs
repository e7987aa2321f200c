//! Rotations of queries and keys that differ from the plain one, as data.

use serde_json::{Value, json};

/// By which angles queries and keys turn, and how long they become, beside the base of the angles.
#[derive(Debug, Clone, PartialEq)]
pub enum Rotation {
    /// By those of RoFormer, and no longer than they were.
    Plain,
    /// With slow angles divided.
    Yarn(Yarn),
    /// With every angle divided, by other factors in long texts.
    Long(LongRope),
}

impl Rotation {
    /// As transformers reads it, without the base of the angles.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Plain => json!({ "rope_type": "default" }),
            Self::Yarn(yarn) => yarn.to_json(),
            Self::Long(long) => long.to_json(),
        }
    }

    /// What the scores of latent attention are multiplied with.
    pub fn score_scale(&self) -> f64 {
        match self {
            Self::Plain | Self::Long(_) => 1.0,
            Self::Yarn(yarn) => yarn.score_scale(),
        }
    }
}

/// LongRoPE (Ding et al., 2402.13753) as Phi-3.5-MoE has it. Which factors hold depends on the length of the whole text: all
/// positions of a long one turn by other angles.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// How many positions the model was first trained on: texts of so many tokens are short.
    pub trained_positions: usize,
    /// In short texts.
    pub short: Stretch,
    /// In longer ones.
    pub long: Stretch,
}

/// Angles and amplitudes for texts up to some length.
#[derive(Debug, Clone, PartialEq)]
pub struct Stretch {
    /// What the angle of each pair of entries is divided by.
    pub factors: Vec<f64>,
    /// What cos and sin are multiplied with.
    pub amplitude: f64,
}

impl LongRope {
    fn to_json(&self) -> Value {
        json!({
            "rope_type": "longrope",
            "type": "longrope",
            "original_max_position_embeddings": self.trained_positions,
            "short_factor": self.short.factors,
            "short_mscale": self.short.amplitude,
            "long_factor": self.long.factors,
            "long_mscale": self.long.amplitude,
        })
    }
}

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
    fn to_json(self) -> Value {
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
