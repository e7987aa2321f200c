//! One lie each, and the verifier must say which tensor it is about.

use crate::checkpoints::{Pair, RANK, Values, factor_names, matrix, module_name};
use half::bf16;
use lowrank_model::Projection::{Down, Gate, Up};
use lowrank_verify::{Depth, FindingKind, Thresholds, Verdict, Verification, VerifyOptions};
use serde_json::json;

/// The report failed with a finding of this kind that names this.
pub(crate) fn assert_caught(report: &Verification, kind: FindingKind, name: &str) {
    assert_eq!(report.verdict, Verdict::Failed, "{report}");
    let caught =
        report.findings.iter().any(|finding| finding.kind == kind && finding.to_string().contains(name));
    assert!(caught, "no finding `{kind}` names {name}:\n{report}");
}

#[test]
fn a_true_checkpoint_passes() {
    let report = Pair::new().verify(Depth::Full);
    assert_eq!(report.verdict, Verdict::Passed, "{report}");
    let files = report.files.as_ref().unwrap();
    assert_eq!((files.factored.len(), files.dense_matrices), (16, 2));
    assert_eq!(files.original.params - files.compressed.params, files.budget.unwrap().removed);
    let outcome = report.outcome.as_ref().unwrap();
    assert_eq!((outcome.text.sequences, outcome.text.tokens), (6, 72));
    let logits = outcome.logits.unwrap();
    // Something was lost, so nothing was compared with itself.
    assert!(logits.mean_kl > 0.0 && logits.max_kl >= logits.mean_kl && logits.perplexity_ratio != 1.0);
    assert!(logits.mean_kl_error.is_some() && logits.perplexity_ratio_error.is_some());
    assert!(outcome.layers.iter().all(|row| row.local.unwrap() > 0.0 && row.propagated.unwrap() > 0.0));
    let json: Verification = serde_json::from_str(&report.to_json()).unwrap();
    assert_eq!((json.verdict, json.findings.len()), (report.verdict, 0));
    assert_eq!(json.files.unwrap().factored.len(), 16);
}

#[test]
fn the_original_against_itself_loses_nothing() {
    let mut pair = Pair::new();
    pair.compressed = pair.original.clone();
    let report = pair.verify(Depth::Full);
    assert_eq!(report.verdict, Verdict::Passed, "{report}");
    let logits = report.outcome.unwrap().logits.unwrap();
    assert_eq!((logits.mean_kl, logits.top1_agreement, logits.perplexity_ratio), (0.0, 1.0, 1.0));
}

#[test]
fn a_rank_edited_in_the_config() {
    let mut pair = Pair::new();
    let name = module_name(matrix(1, 0, Down));
    pair.compressed.config["lowrank_config"]["ranks"][&name] = json!(RANK + 1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, &name);
}

#[test]
fn a_rank_edited_in_the_report() {
    let mut pair = Pair::new();
    let id = matrix(0, 2, Gate);
    pair.compressed.row(id)["rank"] = json!(RANK - 1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::RankDiffers, &module_name(id));
}

#[test]
fn a_rank_taken_out_of_the_report() {
    let mut pair = Pair::new();
    let id = matrix(0, 2, Gate);
    pair.compressed.row(id)["rank"] = json!(null);
    assert_caught(&pair.verify(Depth::Static), FindingKind::RankDiffers, &module_name(id));
}

fn transposed(factor: &Values) -> Vec<bf16> {
    let (rows, cols) = (factor.shape[0], factor.shape[1]);
    (0..rows * cols).map(|e| factor.values[e % rows * cols + e / rows]).collect()
}

#[test]
fn a_factor_transposed() {
    let mut pair = Pair::new();
    let (u, _) = factor_names(matrix(0, 1, Gate));
    let factor = pair.compressed.tensors.get_mut(&u).unwrap();
    factor.values = transposed(factor);
    factor.shape.reverse();
    assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, &u);
}

#[test]
fn a_factor_transposed_under_its_old_shape() {
    let mut pair = Pair::new();
    let id = matrix(0, 1, Gate);
    let factor = pair.compressed.tensors.get_mut(&factor_names(id).1).unwrap();
    factor.values = transposed(factor);
    assert_caught(&pair.verify(Depth::Static), FindingKind::ErrorDiffers, &module_name(id));
}

#[test]
fn a_factored_expert_swapped_with_another() {
    let mut pair = Pair::new();
    for projection in [Gate, Down] {
        let (a, b) = (factor_names(matrix(1, 0, projection)), factor_names(matrix(1, 1, projection)));
        pair.compressed.swap(&a.0, &b.0);
        pair.compressed.swap(&a.1, &b.1);
    }
    let report = pair.verify(Depth::Static);
    for expert in [0, 1] {
        for projection in [Gate, Down] {
            let name = module_name(matrix(1, expert, projection));
            assert_caught(&report, FindingKind::ErrorDiffers, &name);
        }
    }
    assert_eq!(report.findings.len(), 4, "{report}");
}

#[test]
fn a_dense_expert_swapped_with_another() {
    let mut pair = Pair::new();
    let name = |layer| format!("{}.weight", module_name(matrix(layer, 2, Up)));
    pair.compressed.swap(&name(0), &name(1));
    assert_caught(&pair.verify(Depth::Static), FindingKind::TensorDiffers, &name(0));
}

#[test]
fn a_flipped_bit_in_an_untouched_tensor() {
    let mut pair = Pair::new();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let value = &mut pair.compressed.tensors.get_mut(name).unwrap().values[11];
    *value = bf16::from_bits(value.to_bits() ^ 1);
    let report = pair.verify(Depth::Static);
    assert_caught(&report, FindingKind::TensorDiffers, name);
    assert!(report.findings[0].detail.contains("first 11"), "{report}");
}

#[test]
fn a_parameter_count_off_by_one() {
    let mut pair = Pair::new();
    let params = pair.compressed.report()["after"]["params"].as_u64().unwrap();
    pair.compressed.report()["after"]["params"] = json!(params + 1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::CountDiffers, "after.params");

    let mut pair = Pair::new();
    pair.compressed.total_parameters -= 1;
    assert_caught(&pair.verify(Depth::Static), FindingKind::CountDiffers, "total_parameters");
}

#[test]
fn a_nan_in_a_factor() {
    let mut pair = Pair::new();
    let (u, _) = factor_names(matrix(0, 0, Down));
    pair.compressed.tensors.get_mut(&u).unwrap().values[4] = bf16::NAN;
    let report = pair.verify(Depth::Full);
    assert_caught(&report, FindingKind::NonFinite, &u);
    // The models were run as well, and that ended in a finding, not in a skipped window.
    assert_caught(&report, FindingKind::NonFinite, "layer 0");
    assert!(report.outcome.as_ref().unwrap().logits.is_none());
    serde_json::from_str::<Verification>(&report.to_json()).unwrap();
}

#[test]
fn a_nan_in_both_checkpoints() {
    let mut pair = Pair::new();
    let name = "lm_head.weight";
    for folder in [&mut pair.original, &mut pair.compressed] {
        folder.tensors.get_mut(name).unwrap().values[0] = bf16::NAN;
    }
    let report = pair.verify(Depth::Full);
    assert_caught(&report, FindingKind::NonFinite, name);
    assert_caught(&report, FindingKind::NonFinite, "window 0, position 0");
}

#[test]
fn an_error_edited_in_the_report() {
    let mut pair = Pair::new();
    let id = matrix(1, 1, Up);
    let error = pair.compressed.row(id)["relative_error"].as_f64().unwrap();
    pair.compressed.row(id)["relative_error"] = json!(error * 0.999);
    assert_caught(&pair.verify(Depth::Static), FindingKind::ErrorDiffers, &module_name(id));
}

#[test]
fn a_budget_that_was_not_met() {
    let mut pair = Pair::new();
    let removed = pair.compressed.report()["budget"]["removed"].as_u64().unwrap();
    pair.compressed.report()["budget"]["asked"] = json!(removed + 1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::BudgetMissed, &removed.to_string());
}

#[test]
fn an_original_that_is_not_the_one_that_was_compressed() {
    let mut pair = Pair::new();
    let name = "model.layers.0.input_layernorm.weight";
    let value = &mut pair.original.tensors.get_mut(name).unwrap().values[0];
    *value = bf16::from_bits(value.to_bits() ^ 1);
    let report = pair.verify(Depth::Static);
    assert_caught(&report, FindingKind::OtherOriginal, "model-00001-of-00001.safetensors");
    assert_caught(&report, FindingKind::TensorDiffers, name);
}

#[test]
fn a_missing_report_and_a_changed_constant() {
    let mut pair = Pair::new();
    pair.compressed.report = None;
    pair.compressed.config["rope_theta"] = json!(2e4);
    let report = pair.verify(Depth::Static);
    assert_caught(&report, FindingKind::RecordUnusable, "lowrank_report.json");
    assert_caught(&report, FindingKind::ConfigDiffers, "rope_theta");
}

#[test]
fn a_tensor_too_many_or_too_few() {
    let mut pair = Pair::new();
    let extra = pair.compressed.tensors["model.norm.weight"].clone();
    pair.compressed.tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), extra);
    assert_caught(
        &pair.verify(Depth::Static),
        FindingKind::Unreadable,
        "model.layers.0.self_attn.q_proj.bias",
    );

    let mut pair = Pair::new();
    pair.compressed.tensors.remove("model.norm.weight");
    assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, "model.norm.weight");
}

#[test]
fn limits_that_are_missed_are_no_failure_of_the_checkpoint() {
    let pair = Pair::new();
    let base = pair.verify(Depth::Full);
    let outcome = base.outcome.unwrap();
    let (logits, local) = (outcome.logits.unwrap(), outcome.layers[1].local.unwrap());
    let options = |thresholds| VerifyOptions {
        text: lowrank_verify::TextSource::File(pair.path("ids.json")),
        window: 12,
        thresholds,
        ..VerifyOptions::default()
    };
    let none = Thresholds::default();
    for (missed, kept) in [
        (
            Thresholds { max_kl: Some(logits.mean_kl * 0.99), ..none },
            Thresholds { max_kl: Some(logits.mean_kl * 1.01), ..none },
        ),
        (
            Thresholds { min_top1: Some(logits.top1_agreement + 0.01), ..none },
            Thresholds { min_top1: Some(logits.top1_agreement), ..none },
        ),
        (
            Thresholds { max_perplexity_increase: Some(logits.perplexity_ratio - 1.01), ..none },
            Thresholds { max_perplexity_increase: Some(logits.perplexity_ratio - 0.99), ..none },
        ),
        (
            Thresholds { max_layer_error: Some(local * 0.99), ..none },
            Thresholds { max_layer_error: Some(2.0), ..none },
        ),
    ] {
        let report = pair.verify_with(&options(missed));
        assert_eq!(report.verdict, Verdict::ThresholdMissed, "{report}");
        assert_eq!(pair.verify_with(&options(kept)).verdict, Verdict::Passed);
    }
}
