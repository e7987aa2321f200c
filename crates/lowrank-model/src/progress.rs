//! How long work tells that it moves, without knowing what a terminal is. The CLI draws bars; tests use [`Silent`].

/// Told about one stage at a time. Called from several threads.
pub trait Progress: Sync {
    /// A stage begins: `total` units of `unit` (`"matrices"`, `"tokens"`, `"bytes"`).
    fn start(&self, stage: &str, total: u64, unit: &'static str);
    /// Units done since the last call.
    fn advance(&self, units: u64);
    /// The stage is over.
    fn finish(&self);
    /// Something a person should know; not an error.
    fn note(&self, text: &str);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _stage: &str, _total: u64, _unit: &'static str) {}
    fn advance(&self, _units: u64) {}
    fn finish(&self) {}
    fn note(&self, _text: &str) {}
}
