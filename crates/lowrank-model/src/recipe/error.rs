//! A setting that cannot be.

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}, expected {expected}")]
pub struct RecipeError {
    /// As in documents and TOML files.
    pub key: &'static str,
    /// What it is.
    pub value: String,
    /// What it may be.
    pub expected: &'static str,
}

/// A share, from 0 to 1.
pub(super) fn validate_share(key: &'static str, share: f64) -> Result<(), RecipeError> {
    if (0.0..=1.0).contains(&share) {
        return Ok(());
    }
    Err(RecipeError { key, value: share.to_string(), expected: "a share from 0 to 1" })
}

/// A count with a least value.
pub(super) fn validate_least(
    key: &'static str,
    count: usize,
    least: usize,
    expected: &'static str,
) -> Result<(), RecipeError> {
    if count >= least {
        return Ok(());
    }
    Err(RecipeError { key, value: count.to_string(), expected })
}
