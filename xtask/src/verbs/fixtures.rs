//! `cargo xtask fixtures` makes `tests/fixtures/golden` again with Hugging Face transformers.

use crate::python::{Transformers, python};
use crate::shell::run as sh;
use anyhow::Result;

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    sh(python(Transformers::V5)?.arg("tests/golden/make_fixtures.py"))
}
