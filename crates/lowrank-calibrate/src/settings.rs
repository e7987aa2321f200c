//! What can be chosen, and the defaults, which are what won (`docs/fidelity.md`).

use lowrank_text::TextSource;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How to calibrate.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationSettings {
    /// Texts; each gives an equal share of the tokens.
    pub texts: Vec<TextSource>,
    /// Tokens to take moments of.
    pub tokens: usize,
    /// Tokens of a window; windows do not see each other.
    pub window: usize,
    /// Tokens to measure sensitivities with, out of those; `None`: see [`CalibrationSettings::sensitivity_tokens`].
    pub sensitivity_tokens: Option<usize>,
    /// What is summed.
    pub moments: MomentSettings,
    /// Share of the data-free norm that is mixed into the measured one.
    pub blend: f64,
    /// What the factors are fitted to.
    pub propagation: Propagation,
}

/// Whose activations the factors of a matrix are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Propagation {
    /// How much of the compression before a matrix it sees.
    pub reach: Reach,
    /// Share of what the compressed model makes itself in what is wanted of it: at 0 a matrix is to give what the original
    /// gave, at 1 what the original matrix would give for the changed inputs.
    pub own_share: f64,
}

/// How much of the compression before a matrix it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// Nothing: its inputs are the original's.
    None,
    /// That of its expert: w2 is fitted to what the factors of w1 and w3 give it.
    Experts,
    /// That of everything before: inputs are those of the compressed model.
    Layers,
}

/// What is summed over the tokens of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MomentSettings {
    /// How much a token counts by the router's weight g.
    pub gate_weight: GateWeight,
    /// Whose output should stay what it was.
    pub target: Target,
}

/// How much a token counts by the router's weight g.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GateWeight {
    /// 1: every visit alike.
    None,
    /// g
    Linear,
    /// g²: an error of g·y counts as it does in the block's output.
    #[default]
    Squared,
}

/// Whose output should stay what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// That of each matrix: ‖(W − Ŵ) x‖², as whitening (SVD-LLM) does.
    Matrix,
    /// That of the expert, to first order: errors of w1 and w3 count by what silu, the other one and w2 make of them
    /// (the diagonal of Gauss–Newton on the outputs, its Kronecker factor on the inputs).
    #[default]
    Expert,
}

/// Tokens to take moments of, unless told otherwise.
pub const CALIBRATION_TOKENS: usize = 65_536;
/// Tokens of a window.
pub const WINDOW_TOKENS: usize = 256;
/// Share of the data-free norm: measured on two models, on texts like and unlike the calibration text.
pub const BLEND: f64 = 0.1;
/// Every layer makes good what the layers before it lose. Within experts alone it is nearly as good, at a third of the price.
pub const PROPAGATION: Propagation = Propagation { reach: Reach::Layers, own_share: 0.0 };
/// Tokens that sensitivities of a small model are measured with.
const SENSITIVITY_TOKENS_SMALL: usize = 8192;
/// And those of a large one, whose passes cost.
const SENSITIVITY_TOKENS_LARGE: usize = 2048;
/// From this hidden size on a model is large.
const LARGE: usize = 1024;

impl CalibrationSettings {
    /// The defaults on these texts.
    pub fn on(texts: Vec<TextSource>) -> Self {
        Self {
            texts,
            tokens: CALIBRATION_TOKENS,
            window: WINDOW_TOKENS,
            sensitivity_tokens: None,
            moments: MomentSettings::default(),
            blend: BLEND,
            propagation: PROPAGATION,
        }
    }

    /// Tokens that sensitivities are measured with.
    pub fn sensitivity_tokens(&self, hidden_size: usize) -> usize {
        let usual = if hidden_size < LARGE { SENSITIVITY_TOKENS_SMALL } else { SENSITIVITY_TOKENS_LARGE };
        self.sensitivity_tokens.unwrap_or(usual)
    }
}

impl GateWeight {
    /// What a token of router weight g counts.
    pub fn of(self, g: f32) -> f64 {
        let g = f64::from(g);
        match self {
            Self::None => 1.0,
            Self::Linear => g,
            Self::Squared => g * g,
        }
    }

    /// Of many tokens.
    pub fn of_all(self, weights: &[f32]) -> Vec<f64> {
        weights.iter().map(|&g| self.of(g)).collect()
    }

    /// Reads a flag.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::None, Self::Linear, Self::Squared].into_iter().find(|weight| weight.to_string() == text)
    }
}

impl fmt::Display for GateWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Linear => "linear",
            Self::Squared => "squared",
        })
    }
}

impl Target {
    /// Reads a flag.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Matrix, Self::Expert].into_iter().find(|target| target.to_string() == text)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Matrix => "matrix",
            Self::Expert => "expert",
        })
    }
}

impl Reach {
    /// Reads a flag.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::None, Self::Experts, Self::Layers].into_iter().find(|reach| reach.to_string() == text)
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Experts => "experts",
            Self::Layers => "layers",
        })
    }
}
