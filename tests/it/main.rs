//! Drives `lowrank-compress` as a user does. One binary, a module per topic.

/// Running the tool, and copies of the bundled model to break.
mod support;

/// What factors are fitted to, experts that nobody asks, texts unlike each other.
mod calibration;
/// The main job: what is removed, what is written, that bytes repeat.
mod compress;
/// Odd numbers and absurd values on the default path.
mod hostile;
/// plan.json, rank maps, config files: other ways to say the same.
mod planning;
/// Every bad input: one line, its exit code, nothing at `--out`.
mod refusals;
/// The HTML page.
mod report;
/// Runs that end early and go on; outputs that are made again.
mod resume;
/// Sweeps: what is tried, what is refused, and that nothing is done twice.
mod sweep;
