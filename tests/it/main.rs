//! Runs `lowrank-compress` as a user does. One test binary, one module per topic.

/// Running the tool, and copies of the bundled model to break.
mod support;

/// What factors are fitted to, experts without routed tokens, different texts.
mod calibration;
/// The main job: what it removes, what it writes, and repeatable bytes.
mod compress;
/// Weights of several dtypes, and of none that is supported.
mod dtypes;
mod families;
/// Unusual numbers and absurd values on the default path.
mod hostile;
/// Models, texts and words as people have them.
mod inputs;
/// plan.json, rank maps and config files.
mod planning;
/// Every bad input: one line, its exit code, nothing at `--out`.
mod refusals;
/// The HTML page.
mod report;
/// Runs that end early and are resumed; outputs that are reproduced.
mod resume;
mod shared_bases;
mod shared_experts;
/// Sweeps: which points run, what is refused, and that no point runs twice.
mod sweep;
/// Widths of experts, and plain models with narrower ones.
mod widths;
