//! JSON as loaders read it. transformers refuses a byte order mark, so it is refused here; Python alone reads `NaN` and
//! `Infinity`, so the key that has one is named.

use crate::error::{ReadError, clip};
use serde_json::Value;
use std::path::Path;

/// Parses a whole file; `path` serves the messages.
pub(crate) fn parse(path: &Path, json: &[u8]) -> Result<Value, ReadError> {
    refuse_mark(path, json)?;
    serde_json::from_slice(json).map_err(|source| match constant_of_python(json) {
        Some((key, constant)) => ReadError::PythonConstant { path: path.into(), key, constant },
        None => ReadError::Json { path: path.into(), source },
    })
}

/// Refuses UTF-8's byte order mark, and UTF-16 by its own.
pub(crate) fn refuse_mark(path: &Path, json: &[u8]) -> Result<(), ReadError> {
    let marks: [&[u8]; 3] = ["\u{feff}".as_bytes(), b"\xff\xfe", b"\xfe\xff"];
    if marks.iter().any(|mark| json.starts_with(mark)) {
        return Err(ReadError::ByteOrderMark { path: path.into() });
    }
    Ok(())
}

/// The first `NaN`, `Infinity` or `-Infinity` outside of strings, and the last string before it: its key.
fn constant_of_python(json: &[u8]) -> Option<(String, &'static str)> {
    const CONSTANTS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let (mut at, mut key) = (0, String::new());
    while let Some(&byte) = json.get(at) {
        let rest = &json[at..];
        if byte == b'"' {
            let mut end = 1;
            while rest.get(end).is_some_and(|&byte| byte != b'"') {
                end += if rest[end] == b'\\' { 2 } else { 1 };
            }
            key = clip(&String::from_utf8_lossy(rest.get(1..end).unwrap_or_default()));
            at += end;
        } else if let Some(constant) = CONSTANTS.iter().find(|constant| rest.starts_with(constant.as_bytes()))
        {
            return Some((key, constant));
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_constant_that_only_python_reads() {
        for (json, key, constant) in [
            (r#"{"a": 1, "noise": NaN}"#, "noise", "NaN"),
            (r#"{"NaN": "Infinity", "b\"c": -Infinity}"#, "b\\\\\"c", "-Infinity"),
            (r#"{"rope": {"theta": [1, Infinity]}}"#, "theta", "Infinity"),
        ] {
            assert_eq!(constant_of_python(json.as_bytes()), Some((key.into(), constant)), "{json}");
        }
        for json in [r#"{"a": "NaN"}"#, r#"{"a": "#, "\"", r#"{"a\"#, ""] {
            assert_eq!(constant_of_python(json.as_bytes()), None, "{json}");
        }
    }

    #[test]
    fn other_encodings_are_named() {
        for json in [&b"\xef\xbb\xbf{}"[..], b"\xff\xfe{\0}\0", b"\xfe\xff\0{\0}"] {
            let error = parse(Path::new("config.json"), json).unwrap_err();
            assert!(error.to_string().contains("byte order mark"), "{error}");
        }
    }
}
