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
//! | [`report`] | the result: findings, numbers, verdict; as JSON and as a table |
//! | [`options`] | text, window, thresholds |
//!
//! Non-finite anywhere means failed, never skipped. A claim that does not hold is a [`report::Finding`] with a kind
//! and the tensor's name, and the rest is still checked; only what keeps the verifier from working is a
//! [`VerifyError`].
//!
//! Without a text, a bundled passage is used ([`lowrank_text::Passage`]); the report says so.

mod bases;
pub mod claims;
mod error;
pub mod factors;
pub mod options;
pub mod outcome;
pub mod record;
pub mod report;
mod verify;

pub use error::VerifyError;
pub use lowrank_text::TextSource;
pub use options::{Depth, Thresholds, VerifyOptions};
pub use report::{Finding, FindingKind, Verdict, Verification};
pub use verify::{verify, verify_on};
