//! Is a compressed checkpoint what it claims to be, and how much did it lose?
//!
//! The last stage, and the only one that trusts nothing: it depends on neither the factoring nor the writing crates,
//! decodes their metadata with its own types, and recomputes what they say from the bytes of both checkpoints.
//!
//! | Module | Answers |
//! |---|---|
//! | [`claims`] | without running the model: tensors, bytes, counts, budget, ranks, errors |
//! | [`factors`] | ‖W − u·v‖ / ‖W‖ of one matrix, in f64 |
//! | [`record`] | what `lowrank_report.json` claims (an independent decoder) |
//! | [`outcome`] | running both models: layer errors, KL, top-1 agreement, perplexity |
//! | [`distribution`] | two logit rows compared |
//! | [`text`] | which tokens, cut into which windows |
//! | [`report`] | the result: findings, numbers, verdict; as JSON and as a table |
//! | [`options`] | text, window, thresholds |
//!
//! Non-finite anywhere means failed, never skipped. A claim that does not hold is a [`report::Finding`] with a kind
//! and the tensor's name, and the rest is still checked; only what keeps the verifier from working is a
//! [`VerifyError`].
//!
//! **Bundled text.** Without a text, the opening of *Jack Sheppard* by William Harrison Ainsworth (1839; public domain,
//! from Project Gutenberg) is used: `assets/passage.txt`, 61 kB from chapter I on. The bundled model was trained on other
//! novels. The report says when it was used.

pub mod claims;
pub mod distribution;
mod error;
pub mod factors;
pub mod options;
pub mod outcome;
pub mod record;
pub mod report;
pub mod text;
mod verify;

pub use error::VerifyError;
pub use options::{Depth, TextSource, Thresholds, VerifyOptions};
pub use report::{Finding, FindingKind, Report, Verdict};
pub use verify::{verify, verify_on};
