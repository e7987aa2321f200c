//! What errors are measured on, and how. The defaults are what won (`docs/fidelity.md`).

use super::error::{RecipeError, validate_least, validate_share};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Calibration: the model runs on a text, and the second moments of every expert's inputs and outputs weigh its errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct CalibrationSettings {
    /// Texts; each gives an equal share of the tokens. `none` alone: no calibration.
    pub calibrate: Vec<TextChoice>,
    /// Tokens to sum second moments over.
    pub calibration_tokens: usize,
    /// Tokens of a window; attention does not cross windows. `None`: see [`CalibrationSettings::window`].
    pub calibration_window: Option<usize>,
    /// Whether a window starts with the token that begins a text.
    pub bos: Bos,
    /// Share of the tokens that are not of the texts but of the whole vocabulary, shuffled, 0 to 1. Sensitivities are measured
    /// on the texts alone.
    pub vocabulary_share: f64,
    /// What is summed.
    #[serde(flatten)]
    pub moments: MomentSettings,
    /// Share of the identity in the norm (Ledoit–Wolf shrinkage), 0 to 1.
    pub shrinkage: f64,
    /// Tokens to measure sensitivities with, out of those; `None`: see [`CalibrationSettings::sensitivity_tokens`].
    pub sensitivity_tokens: Option<usize>,
}

/// What is summed over the tokens that are routed to an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MomentSettings {
    /// How much each token counts, by the router's weight g.
    pub gate_weight: GateWeight,
    /// Whose output error is minimised.
    pub calibration_target: CalibrationTarget,
}

/// Whether a window of a text starts with the tokenizer's beginning-of-sequence token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Bos {
    /// Where the tokenizer adds one by itself, as runtimes do
    #[default]
    Auto,
    /// The text alone
    Never,
}

/// How much each routed token counts, by the router's weight g.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum GateWeight {
    /// Every token counts the same
    None,
    /// By the router's weight g
    Linear,
    /// By g², so that an error counts as it does in the output of the MoE block
    #[default]
    Squared,
}

/// Whose output error is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum CalibrationTarget {
    /// Each matrix' own output: ‖(W − Ŵ) x‖², as whitening (SVD-LLM) does
    Matrix,
    /// The expert's output, to first order: Gauss–Newton, diagonal on the outputs and Kronecker-factored on the inputs
    #[default]
    Expert,
}

/// A text to calibrate on. Serialises as `none`, `bundled`, or the path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TextChoice {
    /// No text: errors are weighed by the weights alone.
    None,
    /// The passage in the binary.
    Bundled,
    /// A file.
    File(PathBuf),
}

/// Tokens that sensitivities of a small model are measured with.
const SENSITIVITY_TOKENS_SMALL: usize = 8192;
/// And those of a large one, whose passes cost.
const SENSITIVITY_TOKENS_LARGE: usize = 2048;
/// From this hidden size on a model is large.
const LARGE: usize = 1024;
/// Tokens of a window of a small model, and the most of one that sensitivities are measured with: many short windows say
/// more than a long one.
const WINDOW_SMALL: usize = 256;
/// Of a large model, which is used with long texts.
const WINDOW_LARGE: usize = 2048;
/// A calibration has at least so many windows, unless they would be shorter than those of a small model.
const WINDOWS: usize = 8;

impl Default for CalibrationSettings {
    fn default() -> Self {
        Self {
            calibrate: vec![TextChoice::Bundled],
            calibration_tokens: 65_536,
            calibration_window: None,
            bos: Bos::Auto,
            vocabulary_share: 0.125,
            moments: MomentSettings::default(),
            shrinkage: 0.1,
            sensitivity_tokens: None,
        }
    }
}

impl CalibrationSettings {
    /// No calibration.
    pub fn off() -> Self {
        Self { calibrate: vec![TextChoice::None], ..Self::default() }
    }

    /// Whether there is no text.
    pub fn is_off(&self) -> bool {
        self.calibrate == [TextChoice::None]
    }

    /// Tokens that sensitivities are measured with.
    pub fn sensitivity_tokens(&self, hidden_size: usize) -> usize {
        let usual = if hidden_size < LARGE { SENSITIVITY_TOKENS_SMALL } else { SENSITIVITY_TOKENS_LARGE };
        self.sensitivity_tokens.unwrap_or(usual)
    }

    /// Tokens of a window, for a model of so many positions.
    pub fn window(&self, hidden_size: usize, positions: usize) -> usize {
        let usual = match hidden_size < LARGE {
            true => WINDOW_SMALL,
            false => WINDOW_LARGE.min(self.calibration_tokens / WINDOWS).max(WINDOW_SMALL),
        };
        self.calibration_window.unwrap_or(usual.min(positions))
    }

    /// Tokens of a window that sensitivities are measured with: the first ones of a window of the text.
    pub fn sensitivity_window(window: usize) -> usize {
        window.min(WINDOW_SMALL)
    }

    pub(super) fn validate(&self) -> Result<(), RecipeError> {
        let several = || self.calibrate.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if self.calibrate.is_empty() || self.calibrate.contains(&TextChoice::None) && !self.is_off() {
            let expected = "texts, or `none` alone";
            return Err(RecipeError { key: "calibrate", value: several(), expected });
        }
        validate_least("calibration-tokens", self.calibration_tokens, 2, "at least 2")?;
        validate_least("calibration-window", self.calibration_window.unwrap_or(2), 2, "at least 2")?;
        validate_least("sensitivity-tokens", self.sensitivity_tokens.unwrap_or(2), 2, "at least 2")?;
        validate_share("vocabulary-share", self.vocabulary_share)?;
        validate_share("shrinkage", self.shrinkage)
    }
}

impl GateWeight {
    /// How much a token of router weight g counts.
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
}

impl From<&str> for TextChoice {
    fn from(text: &str) -> Self {
        match text {
            "none" => Self::None,
            "bundled" => Self::Bundled,
            path => Self::File(path.into()),
        }
    }
}

impl From<String> for TextChoice {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl FromStr for TextChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.into())
    }
}

impl fmt::Display for TextChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Bundled => f.write_str("bundled"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl From<TextChoice> for String {
    fn from(text: TextChoice) -> Self {
        text.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_long_where_the_model_is_large_and_the_text_long_enough() {
        let of = |calibration_tokens, calibration_window, hidden_size, positions| {
            let settings = CalibrationSettings {
                calibration_tokens,
                calibration_window,
                ..CalibrationSettings::default()
            };
            settings.window(hidden_size, positions)
        };
        assert_eq!(of(65_536, None, 4096, 32_768), 2048);
        assert_eq!(of(65_536, None, 4096, 1024), 1024);
        assert_eq!(of(65_536, None, 128, 32_768), 256);
        assert_eq!(of(8192, None, 4096, 32_768), 1024);
        assert_eq!(of(512, None, 4096, 32_768), 256);
        // What is said is refused elsewhere if the model cannot take it.
        assert_eq!(of(512, Some(4096), 128, 1024), 4096);
        assert_eq!([64, 256, 2048].map(CalibrationSettings::sensitivity_window), [64, 256, 256]);
    }
}
