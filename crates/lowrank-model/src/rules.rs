//! What a key of a model's description may say: the words in which a family lists its keys.

use serde_json::Value;
use std::fmt;

/// What the value of a known key may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The family reads or checks it.
    Read,
    /// No logit of an inference pass depends on it. Null is as good as absent.
    Harmless(ValueKind),
    /// It would change the forward pass, except with one of these values.
    Only(&'static [Neutral]),
}

/// The type of a harmless value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    /// True or false.
    Flag,
    /// A number.
    Number,
    /// A text.
    Text,
    /// A token id, or a list of them.
    TokenIds,
    /// Anything.
    Any,
}

/// A value with which a key changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neutral {
    /// `null`
    Null,
    /// `false`
    False,
    /// `true`
    True,
    /// This number.
    Number(u8),
    /// This text.
    Text(&'static str),
    /// `[]`
    EmptyList,
    /// `{}`
    EmptyObject,
}

/// Keys with the same rule.
pub type Keys = (Rule, &'static [&'static str]);

impl ValueKind {
    /// Whether a value is of this kind.
    pub fn fits(self, value: &Value) -> bool {
        let is_id = |value: &Value| value.is_i64() || value.is_u64();
        match self {
            Self::Flag => value.is_boolean(),
            Self::Number => value.is_number(),
            Self::Text => value.is_string(),
            Self::TokenIds => is_id(value) || value.as_array().is_some_and(|ids| ids.iter().all(is_id)),
            Self::Any => true,
        }
    }

    /// The kind, for a message.
    pub const fn expected(self) -> &'static str {
        match self {
            Self::Flag => "`true` or `false`",
            Self::Number => "a number",
            Self::Text => "a text",
            Self::TokenIds => "a token id or a list of them",
            Self::Any => "anything",
        }
    }
}

impl Neutral {
    /// Whether a value is this one.
    pub fn is(self, value: &Value) -> bool {
        match self {
            Self::Null => value.is_null(),
            Self::False => value == &Value::Bool(false),
            Self::True => value == &Value::Bool(true),
            Self::Number(number) => value.as_f64() == Some(number.into()),
            Self::Text(text) => value.as_str() == Some(text),
            Self::EmptyList => value.as_array().is_some_and(Vec::is_empty),
            Self::EmptyObject => value.as_object().is_some_and(serde_json::Map::is_empty),
        }
    }
}

impl fmt::Display for Neutral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::False => f.write_str("false"),
            Self::True => f.write_str("true"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "\"{text}\""),
            Self::EmptyList => f.write_str("[]"),
            Self::EmptyObject => f.write_str("{}"),
        }
    }
}
