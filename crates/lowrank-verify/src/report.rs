//! The result: a value that is printed, stored as `verification.json` and turned into an exit code.

use crate::options::Thresholds;
use lowrank_model::display::grouped;
use lowrank_model::plan::Size;
use lowrank_text::TextInfo;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Version of the document.
pub const VERIFICATION_VERSION: u32 = 1;

/// What became of a verification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// [`VERIFICATION_VERSION`].
    pub verification_version: u32,
    /// The one word.
    pub verdict: Verdict,
    /// Everything that is wrong, in the order in which it was found.
    pub findings: Vec<Finding>,
    /// What the files say; absent when the compressed checkpoint cannot be opened.
    pub files: Option<Files>,
    /// What the models do; absent when they were not, or could not be, run.
    pub outcome: Option<ModelComparison>,
    /// The limits that were held against it.
    pub thresholds: Thresholds,
}

/// The one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every claim holds and every limit is kept.
    Passed,
    /// Every claim holds, but a limit is missed.
    ThresholdMissed,
    /// A claim does not hold, or something is not finite.
    Failed,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// The tensor or matrix, by its canonical name, or the place.
    pub name: Option<String>,
    /// One line: what was found and what was expected.
    pub detail: String,
}

/// Kinds of wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// The compressed checkpoint does not open; the detail names the tensor or key.
    Unreadable,
    /// A dimension or constant of the model differs.
    ConfigDiffers,
    /// A tensor that the model does not have.
    ExtraTensor,
    /// A tensor that should be untouched has other bytes or another dtype.
    TensorDiffers,
    /// A file that should be copied differs.
    FileDiffers,
    /// `lowrank_report.json` is absent or unusable.
    RecordUnusable,
    /// The record is about another original.
    OtherOriginal,
    /// A count in the metadata is not what the headers add up to.
    CountDiffers,
    /// Less was removed than was asked.
    BudgetMissed,
    /// A rank in the record is not that of the factors.
    RankDiffers,
    /// A width in the record is not that of the file.
    WidthDiffers,
    /// Layers with a shared base are others than the record says, or a base is not the mean of the original's matrices.
    SharedBaseDiffers,
    /// A recomputed error is not the recorded one.
    ErrorDiffers,
    /// NaN or infinity.
    NonFinite,
    /// A limit is missed.
    Threshold,
}

/// What the files say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Files {
    /// Counted from the original's headers.
    pub original: Size,
    /// Counted from the compressed checkpoint's headers.
    pub compressed: Size,
    /// What was asked, as recorded.
    pub budget: Option<BudgetCheck>,
    /// Tensors of the model that must be, and were compared, byte for byte.
    pub untouched_tensors: usize,
    /// One row per matrix that is factored or of a narrowed expert, in stored order.
    pub factored: Vec<FactoredMatrix>,
    /// Expert matrices that are dense on both sides.
    pub dense_matrices: usize,
}

/// The budget against the headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetCheck {
    /// What is counted.
    pub unit: lowrank_model::Unit,
    /// Remove at least this.
    pub asked: u64,
    /// Counted from the headers of both checkpoints.
    pub removed: u64,
}

/// One factored matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FactoredMatrix {
    /// Canonical module name.
    pub name: String,
    /// [m, n] of what is stored: of a narrowed expert the channels that stay.
    pub shape: [usize; 2],
    /// Of the factors in the file; absent for all of what stays of a narrowed expert's matrix.
    pub rank: Option<usize>,
    /// ‖W − u·v‖ / ‖W‖, recomputed, with zeros for channels that went; absent when not finite.
    pub relative_error: Option<f64>,
    /// As recorded, before the factors were rounded.
    pub recorded_error: Option<f64>,
}

/// What the models do on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelComparison {
    /// The tokens.
    pub text: TextInfo,
    /// What the models ran on, in words.
    pub engine: String,
    /// Visits of the original model's experts on this text, by layer and expert.
    #[serde(default)]
    pub tokens_per_expert: Vec<Vec<u64>>,
    /// How unlike this text is to the one that was calibrated on: the share of routed tokens that go to other experts, ½ Σ |p − q|
    /// over the experts of a layer, p and q their shares of the routed tokens on either text, mean over layers. 0: asked alike; 1:
    /// no expert is asked on both. Absent without calibration.
    #[serde(default)]
    pub routing_distance: Option<f64>,
    /// One row per layer.
    pub layers: Vec<LayerError>,
    /// The logits; absent when something before them was not finite.
    pub logits: Option<Logits>,
}

/// How far one layer is off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LayerError {
    /// Decoder layer.
    pub layer: usize,
    /// ‖MoE_compressed(x) − MoE_original(x)‖ / ‖MoE_original(x)‖ on the original's inputs x.
    pub local: Option<f64>,
    /// ‖h_compressed − h_original‖ / ‖h_original‖ after the layer.
    pub propagated: Option<f64>,
}

/// The logits compared. Standard errors are over sequences; absent for a single one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Logits {
    /// Mean KL(original ‖ compressed) over all positions, in nats.
    pub mean_kl: f64,
    /// Its standard error.
    pub mean_kl_error: Option<f64>,
    /// Largest KL of any position.
    pub max_kl: f64,
    /// Share of positions where both rank the same token first.
    pub top1_agreement: f64,
    /// Its standard error.
    pub top1_error: Option<f64>,
    /// exp(mean loss) of the original.
    pub perplexity_original: f64,
    /// exp(mean loss) of the compressed.
    pub perplexity_compressed: f64,
    /// compressed / original.
    pub perplexity_ratio: f64,
    /// Its standard error, from the sequences' differences of mean loss.
    pub perplexity_ratio_error: Option<f64>,
}

impl Verification {
    /// Joins the parts; the verdict follows from the findings.
    pub fn new(
        findings: Vec<Finding>,
        files: Option<Files>,
        outcome: Option<ModelComparison>,
        thresholds: Thresholds,
    ) -> Self {
        let verdict = if findings.iter().any(|finding| finding.kind != FindingKind::Threshold) {
            Verdict::Failed
        } else if findings.is_empty() {
            Verdict::Passed
        } else {
            Verdict::ThresholdMissed
        };
        Self { verification_version: VERIFICATION_VERSION, verdict, findings, files, outcome, thresholds }
    }

    /// `verification.json`.
    pub fn to_json(&self) -> String {
        let mut text =
            serde_json::to_string_pretty(self).expect("a report holds only finite numbers and strings");
        text.push('\n');
        text
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::ThresholdMissed => "threshold missed",
            Self::Failed => "failed",
        })
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreadable => "unreadable",
            Self::ConfigDiffers => "config differs",
            Self::ExtraTensor => "extra tensor",
            Self::TensorDiffers => "tensor differs",
            Self::FileDiffers => "file differs",
            Self::RecordUnusable => "record unusable",
            Self::OtherOriginal => "other original",
            Self::CountDiffers => "count differs",
            Self::BudgetMissed => "budget missed",
            Self::RankDiffers => "rank differs",
            Self::WidthDiffers => "width differs",
            Self::SharedBaseDiffers => "shared base differs",
            Self::ErrorDiffers => "error differs",
            Self::NonFinite => "not finite",
            Self::Threshold => "threshold missed",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{}: {name}: {}", self.kind, self.detail),
            None => write!(f, "{}: {}", self.kind, self.detail),
        }
    }
}

/// The table for people.
impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(files) = &self.files {
            write!(f, "{files}")?;
        }
        if let Some(outcome) = &self.outcome {
            write!(f, "{outcome}")?;
        }
        for finding in &self.findings {
            writeln!(f, "  ! {finding}")?;
        }
        writeln!(f, "verdict: {}", self.verdict)
    }
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<24}{:>18}{:>18}", "", "original", "compressed")?;
        let (before, after) = (self.original, self.compressed);
        writeln!(f, "{:<24}{:>18}{:>18}", "parameters", grouped(before.params), grouped(after.params))?;
        writeln!(f, "{:<24}{:>18}{:>18}", "bytes of weights", grouped(before.bytes), grouped(after.bytes))?;
        if let Some(budget) = &self.budget {
            let (asked, removed) = (grouped(budget.asked), grouped(budget.removed));
            writeln!(f, "budget: {asked} {} asked, {removed} removed", budget.unit)?;
        }
        writeln!(f, "untouched, byte for byte: {} tensors", self.untouched_tensors)?;
        let errors: Vec<f64> = self.factored.iter().filter_map(|matrix| matrix.relative_error).collect();
        write!(
            f,
            "expert matrices: {} factored or narrowed, {} as they were",
            self.factored.len(),
            self.dense_matrices
        )?;
        if !errors.is_empty() {
            let mean = errors.iter().sum::<f64>() / errors.len() as f64;
            let largest = errors.iter().fold(0.0_f64, |largest, &error| largest.max(error));
            write!(f, "; relative error mean {mean:.4}, largest {largest:.4}")?;
        }
        writeln!(f)
    }
}

impl fmt::Display for ModelComparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TextInfo { source, sequences, tokens, .. } = &self.text;
        writeln!(f, "\ntext: {source}, {} tokens in {sequences} windows", grouped(*tokens as u64))?;
        writeln!(f, "run on: {}", self.engine)?;
        if let Some(distance) = self.routing_distance {
            let percent = 100.0 * distance;
            writeln!(
                f,
                "unlike the calibration text: {percent:.1} % of the routed tokens go to other experts"
            )?;
        }
        writeln!(f, "{:>6}{:>18}{:>18}", "layer", "MoE block, local", "hidden, so far")?;
        let number = |value: Option<f64>| value.map_or("not finite".into(), |value| format!("{value:.5}"));
        for row in &self.layers {
            writeln!(f, "{:>6}{:>18}{:>18}", row.layer, number(row.local), number(row.propagated))?;
        }
        let Some(logits) = &self.logits else { return Ok(()) };
        let margin = |error: Option<f64>, decimals: usize| {
            error.map_or(String::new(), |error| format!(" ± {error:.decimals$}"))
        };
        writeln!(f)?;
        writeln!(f, "{:<24}{:>14.4}", "perplexity, original", logits.perplexity_original)?;
        writeln!(f, "{:<24}{:>14.4}", "perplexity, compressed", logits.perplexity_compressed)?;
        let ratio = margin(logits.perplexity_ratio_error, 4);
        writeln!(f, "{:<24}{:>14.4}{ratio}", "ratio", logits.perplexity_ratio)?;
        let kl = margin(logits.mean_kl_error, 5);
        writeln!(f, "{:<24}{:>14.5}{kl}", "mean KL, nats", logits.mean_kl)?;
        writeln!(f, "{:<24}{:>14.5}", "max KL, nats", logits.max_kl)?;
        let top1 = margin(logits.top1_error.map(|error| error * 100.0), 2);
        writeln!(f, "{:<24}{:>14.2}{top1}", "top-1 agreement, %", logits.top1_agreement * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_follows_from_the_findings() {
        let finding = |kind| Finding { kind, name: None, detail: String::new() };
        let verdict = |findings| Verification::new(findings, None, None, Thresholds::default()).verdict;
        assert_eq!(verdict(vec![]), Verdict::Passed);
        assert_eq!(verdict(vec![finding(FindingKind::Threshold)]), Verdict::ThresholdMissed);
        let both = vec![finding(FindingKind::Threshold), finding(FindingKind::NonFinite)];
        assert_eq!(verdict(both), Verdict::Failed);
    }
}
