//! Everything else that is read: plans, rank maps, budgets, texts, tokenizers, and what our own runs leave behind.

use crate::outcome::{refused, sign};
use lowrank_cache::Arrays;
use lowrank_model::plan::Size;
use lowrank_model::recipe::Goal;
use lowrank_model::{ModelConfig, RankPlan, ranks};
use lowrank_text::readers::{
    Document, JsonContent, content_of_json, documents_of_jsonl, ids_of_words, text_of,
};
use lowrank_writer::journal::Finished;
use lowrank_writer::{CompressionReport, Manifest};
use serde_json::{Value, json};
use std::sync::LazyLock;

/// Of the seeds' plans.
static TINY: LazyLock<ModelConfig> = LazyLock::new(|| {
    ModelConfig::from_hf_json(&json!({
        "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 64,
    }))
    .expect("dimensions that can be")
});

/// `plan.json`: what holds against a model can be shown and counted.
pub(crate) fn plan(bytes: &[u8]) -> u64 {
    let plan = match RankPlan::from_json(bytes) {
        Err(error) => return refused(error),
        Ok(plan) => plan,
    };
    let again = serde_json::to_vec(&plan).expect("plain values serialise");
    assert_eq!(RankPlan::from_json(&again).as_ref(), Ok(&plan), "a plan reads back as it was");
    let before = Size { params: plan.before.params, bytes: plan.before.bytes };
    match plan.validate(&TINY, before) {
        Err(error) => refused(error).rotate_left(1),
        Ok(()) => {
            assert!(plan.removed_params() <= plan.before.params);
            assert!(plan.removed_bytes() <= plan.before.bytes);
            assert!(plan.ranks().len() <= plan.matrices.len());
            sign(&format!("{:?}", plan.overshoot().map(|most| most.min(1))))
        }
    }
}

/// `--ranks`.
pub(crate) fn rank_map(bytes: &[u8]) -> u64 {
    ranks::parse(bytes).map_or_else(refused, |ranks| sign("ranks") ^ ranks.len().min(4) as u64)
}

/// `--budget`, `--target-params`, `--target-size`.
pub(crate) fn budget(bytes: &[u8]) -> u64 {
    let Ok(text) = std::str::from_utf8(bytes) else { return 0 };
    let goals = [
        text.parse().map(Goal::Budget),
        text.parse().map(Goal::TargetParams),
        text.parse().map(Goal::TargetSize),
    ];
    let before = Size { params: 46_702_792_704, bytes: 93_405_585_408 };
    let mut signs = 0_u64;
    for goal in goals {
        let target = goal.and_then(|goal| goal.target(before).expect("a budget has a target"));
        signs = signs.rotate_left(7) ^ target.map_or_else(refused, |_| 1);
    }
    signs
}

/// Texts and token ids.
pub(crate) fn text(bytes: &[u8]) -> u64 {
    let text = match text_of(bytes.to_vec()) {
        Ok(text) => text,
        Err(error) => return refused(error),
    };
    let text = text.as_str();
    // Each id takes at least a digit and what parts it from the next.
    let few = |ids: usize| assert!(2 * ids <= text.len() + 1, "{ids} ids in {} bytes", text.len());
    let words = ids_of_words(text).map_or_else(refused, |ids| {
        few(ids.len());
        1
    });
    let short = |documents: &[Document]| {
        let characters = |document: &Document| match document {
            Document::Text(text) => text.len(),
            Document::Chat(messages) => messages.len(),
        };
        assert!(documents.iter().map(characters).sum::<usize>() <= text.len());
    };
    let json = content_of_json(text).map_or_else(refused, |content| {
        match content {
            JsonContent::Ids(streams) => few(streams.iter().map(Vec::len).sum()),
            JsonContent::Documents(documents) => short(&documents),
        }
        2
    });
    let documents = documents_of_jsonl(text).map_or_else(refused, |documents| {
        short(&documents);
        3
    });
    words ^ json.rotate_left(1) ^ documents.rotate_left(2)
}

/// `tokenizer.json`, on a short text.
pub(crate) fn tokenizer(bytes: &[u8]) -> u64 {
    let ids =
        lowrank_text::encode_with(bytes, "It was a dark and stormy night; the rain fell in torrents. ä 漢\n");
    ids.map_or_else(refused, |ids| sign("ids") ^ ids.len().min(64) as u64)
}

/// A file of the cache.
pub(crate) fn cache(bytes: &[u8]) -> u64 {
    Arrays::parse(bytes).map_or(0, |arrays| sign("arrays") ^ arrays.arrays.len().min(4) as u64)
}

/// A journal, as it lies, and with lines that hold.
pub(crate) fn journal(bytes: &[u8]) -> u64 {
    let raw = Finished::parse(bytes);
    let mut holding = Vec::new();
    for line in bytes.split(|&byte| byte == b'\n') {
        holding.extend_from_slice(blake3::hash(line).to_hex().as_bytes());
        holding.push(b' ');
        holding.extend_from_slice(line);
        holding.push(b'\n');
    }
    let finished = Finished::parse(&holding);
    assert!(raw.good_bytes() <= bytes.len() as u64 && finished.good_bytes() <= holding.len() as u64);
    sign("journal")
        ^ (holding.iter().take(finished.good_bytes() as usize).filter(|&&b| b == b'\n').count().min(8) as u64)
}

/// `lowrank_report.json` by both who decode it, and `lowrank_manifest.json`.
pub(crate) fn report(bytes: &[u8]) -> u64 {
    let ours = serde_json::from_slice::<CompressionReport>(bytes);
    let theirs = serde_json::from_slice::<lowrank_verify::record::Record>(bytes);
    if let Ok(report) = &ours {
        let again: Value = serde_json::to_value(report).expect("plain values serialise");
        let back: CompressionReport = serde_json::from_value(again.clone()).expect("a report reads back");
        assert_eq!(serde_json::to_value(&back).expect("plain values serialise"), again);
    }
    let manifest = serde_json::from_slice::<Manifest>(bytes);
    let kind = |failed: Option<serde_json::Error>| {
        failed.map_or(1, |error| {
            sign(&error.to_string().chars().filter(char::is_ascii_alphabetic).take(24).collect::<String>())
        })
    };
    kind(ours.err()) ^ kind(theirs.err()).rotate_left(1) ^ kind(manifest.err()).rotate_left(2)
}
