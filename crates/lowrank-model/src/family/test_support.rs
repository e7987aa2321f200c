//! What the tests of families share.

use crate::config::ConfigError;
use crate::{ErrorKind, ModelConfig};
use serde_json::Value;

/// An object with some keys changed.
pub(super) fn changed(mut object: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else { panic!("changes are an object: {changes}") };
    object.as_object_mut().unwrap().extend(changes);
    object
}

/// Reads a config with some keys changed.
pub(super) fn read(config: Value, changes: Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_hf_json(&changed(config, changes))
}

/// Shape of the tensor of this name, if the model has one.
pub(super) fn shape(config: &ModelConfig, name: &str) -> Option<Vec<usize>> {
    config.tensors().into_iter().find(|spec| spec.name == name).map(|spec| spec.shape)
}

/// Fails unless a config was refused for this reason, and the error names the key.
pub(super) fn refused_by_name(read: Result<ModelConfig, ConfigError>, kind: ErrorKind, key: &str) {
    let error = read.expect_err(key);
    assert_eq!(error.kind(), kind, "{key}: {error}");
    assert!(error.to_string().contains(key), "{error}");
}
