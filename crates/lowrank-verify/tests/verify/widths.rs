//! Lies about narrowed experts, one each.

use crate::checkpoints::{KEPT, NARROWED, Pair, matrix, module_name};
use crate::mutations::assert_caught;
use lowrank_model::KeptChannels;
use lowrank_model::Projection::{Down, Gate, Up};
use lowrank_verify::{Depth, FindingKind, Verdict};
use serde_json::json;

const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.1";

fn tensor(projection: lowrank_model::Projection) -> String {
    format!("{}.weight", module_name(matrix(NARROWED.0, NARROWED.1, projection)))
}

#[test]
fn a_true_narrowed_checkpoint_passes() {
    let report = Pair::narrowed().verify(Depth::Full);
    assert_eq!(report.verdict, Verdict::Passed, "{report}");
    let files = report.files.as_ref().unwrap();
    assert_eq!((files.factored.len(), files.dense_matrices), (16, 2));
    let row = files.factored.iter().find(|row| row.name.starts_with(EXPERT)).unwrap();
    assert_eq!((row.shape, row.rank), ([KEPT.len(), 8], None));
    assert!(report.outcome.unwrap().logits.unwrap().mean_kl > 0.0);
}

#[test]
fn a_width_edited_in_the_config() {
    let mut pair = Pair::narrowed();
    pair.compressed.config["lowrank_config"]["widths"][EXPERT] = json!(KEPT.len() + 1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, EXPERT);
}

#[test]
fn a_width_that_no_expert_has() {
    for width in [json!(0), json!(12), json!(-1), json!("5")] {
        let mut pair = Pair::narrowed();
        pair.compressed.config["lowrank_config"]["widths"][EXPERT] = width;
        assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, EXPERT);
    }
}

#[test]
fn a_width_edited_in_the_report() {
    let mut pair = Pair::narrowed();
    pair.compressed.report()["experts"][0]["width"] = json!(4);
    assert_caught(&pair.verify(Depth::Static), FindingKind::WidthDiffers, EXPERT);
}

#[test]
fn an_expert_taken_out_of_the_report() {
    let mut pair = Pair::narrowed();
    pair.compressed.report()["experts"] = json!([]);
    assert_caught(&pair.verify(Depth::Static), FindingKind::WidthDiffers, EXPERT);
}

#[test]
fn another_channel_in_the_list() {
    let mut pair = Pair::narrowed();
    let mut others = KEPT;
    others[1] = 1;
    pair.compressed.channels = Some(json!({ EXPERT: KeptChannels::new(&others, 12) }));
    let report = pair.verify(Depth::Static);
    assert_caught(&report, FindingKind::TensorDiffers, &tensor(Gate));
    assert_caught(&report, FindingKind::TensorDiffers, &tensor(Up));
    for projection in [Gate, Up, Down] {
        let name = module_name(matrix(NARROWED.0, NARROWED.1, projection));
        assert_caught(&report, FindingKind::ErrorDiffers, &name);
    }
}

#[test]
fn a_list_of_channels_that_is_absent_or_of_another_length() {
    let mut pair = Pair::narrowed();
    pair.compressed.channels = None;
    assert_caught(&pair.verify(Depth::Static), FindingKind::RecordUnusable, "lowrank_channels.json");
    pair.compressed.channels = Some(json!({ EXPERT: KeptChannels::new(&KEPT[1..], 12) }));
    assert_caught(&pair.verify(Depth::Static), FindingKind::RecordUnusable, EXPERT);
}

#[test]
fn two_rows_of_gate_exchanged() {
    let mut pair = Pair::narrowed();
    let gate = pair.compressed.tensors.get_mut(&tensor(Gate)).unwrap();
    let cols = gate.shape[1];
    (0..cols).for_each(|col| gate.values.swap(col, cols + col));
    let report = pair.verify(Depth::Static);
    assert_caught(&report, FindingKind::TensorDiffers, &tensor(Gate));
}

#[test]
fn down_with_its_columns_exchanged() {
    let mut pair = Pair::narrowed();
    let down = pair.compressed.tensors.get_mut(&tensor(Down)).unwrap();
    let cols = down.shape[1];
    (0..down.shape[0]).for_each(|row| down.values.swap(row * cols, row * cols + 1));
    let name = module_name(matrix(NARROWED.0, NARROWED.1, Down));
    assert_caught(&pair.verify(Depth::Static), FindingKind::ErrorDiffers, &name);
}

#[test]
fn a_checkpoint_with_widths_under_the_version_of_ranks() {
    let mut pair = Pair::narrowed();
    pair.compressed.config["lowrank_config"]["format_version"] = json!(1);
    assert_caught(&pair.verify(Depth::Static), FindingKind::Unreadable, "this program reads 2");
}
