//! The safetensors header: 8 bytes of length, JSON, then the data that it divides among tensors.
//!
//! A pure function from bytes to [`Header`]. The format's own crate keeps the last of two equal names, does not name the
//! tensor in most of its errors and sees the whole file as one slice; so the JSON is read here, strictly, with that
//! crate's dtypes, and its parser is the reference in the tests: what is accepted here is accepted there.

use crate::error::{ReadError, clip};
use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// Bytes of the length field at the start of a file.
pub const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The most tensors accepted in a checkpoint; the largest models of today have a quarter of it.
pub const TENSORS_MAX: usize = 1 << 19;
/// The largest number of dimensions accepted.
const DIMENSIONS_MAX: usize = 8;
/// The longest name accepted.
const NAME_BYTES_MAX: usize = 1024;

/// One tensor of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Any dtype the format knows.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub begin: u64,
    /// Length in bytes: that of `dtype` and `shape`.
    pub len_bytes: u64,
}

/// All tensors of a shard by name. They cover the file from the header to its last byte, without overlap.
pub type Header = BTreeMap<String, HeaderEntry>;

/// Bytes of JSON that the length field promises, checked against the format's limit and the file.
pub fn json_len(path: &Path, length_field: [u8; 8], file_bytes: u64) -> Result<u64, ReadError> {
    let bytes = u64::from_le_bytes(length_field);
    if bytes > HEADER_BYTES_MAX {
        let limit_bytes = HEADER_BYTES_MAX;
        return Err(ReadError::HeaderTooLarge { path: path.into(), bytes, limit_bytes });
    }
    let expected_bytes = LENGTH_BYTES + bytes;
    if expected_bytes > file_bytes {
        let path = path.into();
        return Err(ReadError::TruncatedHeader { path, expected_bytes, actual_bytes: file_bytes });
    }
    Ok(bytes)
}

/// Reads and checks the JSON of a header. `file_bytes` is the length of the whole file; `path` serves the messages.
pub fn parse(path: &Path, json: &[u8], file_bytes: u64) -> Result<Header, ReadError> {
    let RawHeader(mut raw) =
        serde_json::from_slice(json).map_err(|source| ReadError::HeaderJson { path: path.into(), source })?;
    if raw.len() > TENSORS_MAX {
        return Err(ReadError::TooManyTensors { path: path.into(), limit: TENSORS_MAX });
    }
    if let Some((name, _)) = raw.iter().find(|(name, _)| !is_printable(name)) {
        return Err(ReadError::BadTensorName { path: path.into(), tensor: clip(name) });
    }
    // By offset, as they lie; by name among equals, so that the message is the same in every run.
    raw.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));

    let data_begin = LENGTH_BYTES + json.len() as u64;
    let mut header = Header::new();
    let mut cursor = 0_u64;
    let mut previous: Option<String> = None;
    for (tensor, raw) in raw {
        let (dtype, len_bytes) = raw.check_alone(path, &tensor)?;
        let (begin, end) = raw.data_offsets;
        let path = || path.to_path_buf();
        if header.contains_key(&tensor) {
            return Err(ReadError::DuplicateInHeader { path: path(), tensor });
        }
        if begin > cursor {
            return Err(ReadError::Hole { path: path(), tensor, bytes: begin - cursor });
        }
        if let (true, Some(other)) = (begin < cursor, &previous) {
            return Err(ReadError::Overlap { path: path(), tensor, other: other.clone() });
        }
        let Some(end_bytes) = data_begin.checked_add(end) else {
            return Err(ReadError::Overflow { path: path(), tensor });
        };
        if end_bytes > file_bytes {
            return Err(ReadError::TruncatedShard {
                path: path(),
                tensor,
                end_bytes,
                actual_bytes: file_bytes,
            });
        }
        cursor = end;
        let shape = raw.shape.0.unwrap_or_default();
        header.insert(tensor.clone(), HeaderEntry { dtype, shape, begin: data_begin + begin, len_bytes });
        previous = Some(tensor);
    }
    match file_bytes.checked_sub(data_begin + cursor) {
        Some(0) => Ok(header),
        Some(bytes) => Err(ReadError::TrailingBytes { path: path.into(), tensor: previous, bytes }),
        None => Err(ReadError::TruncatedHeader {
            path: path.into(),
            expected_bytes: data_begin,
            actual_bytes: file_bytes,
        }),
    }
}

/// Whether a foreign name can stand in a one-line message.
pub(crate) fn is_printable(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX && !name.chars().any(char::is_control)
}

impl RawTensor {
    /// What can be said without the neighbours: the dtype, and the bytes that dtype and shape take.
    fn check_alone(&self, path: &Path, tensor: &str) -> Result<(Dtype, u64), ReadError> {
        let (path, tensor) = (|| path.to_path_buf(), || tensor.to_owned());
        let Some(dtype) = parse_dtype(&self.dtype) else {
            let dtype = clip(&self.dtype);
            return Err(ReadError::UnknownDtype { path: path(), tensor: tensor(), dtype });
        };
        let Some(shape) = &self.shape.0 else {
            let limit = DIMENSIONS_MAX;
            return Err(ReadError::TooManyDimensions { path: path(), tensor: tensor(), limit });
        };
        let (begin, end) = self.data_offsets;
        if end < begin {
            return Err(ReadError::ReversedOffsets { path: path(), tensor: tensor(), begin, end });
        }
        let bits = shape
            .iter()
            .try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))
            .and_then(|elements| elements.checked_mul(dtype.bitsize() as u64));
        let Some(bits) = bits else {
            return Err(ReadError::Overflow { path: path(), tensor: tensor() });
        };
        let (expected_bytes, actual_bytes) = (bits.div_ceil(8), end - begin);
        if expected_bytes != actual_bytes || !bits.is_multiple_of(8) {
            return Err(ReadError::WrongByteSize {
                path: path(),
                tensor: tensor(),
                dtype: dtype.to_string(),
                shape: shape.clone(),
                expected_bytes,
                actual_bytes,
            });
        }
        Ok((dtype, expected_bytes))
    }
}

fn parse_dtype(name: &str) -> Option<Dtype> {
    let deserializer: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
        name.into_deserializer();
    Dtype::deserialize(deserializer).ok()
}

/// Names and tensors in the order of the text, equal names included; at most one more than [`TENSORS_MAX`].
struct RawHeader(Vec<(String, RawTensor)>);

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// `None`: too many dimensions. A list of a million must not become memory.
struct Shape(Option<Vec<u64>>);

/// `__metadata__`: text to text, of no meaning here.
struct Metadata;

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(serde::de::Error::duplicate_field("__metadata__"));
                        }
                        map.next_value::<Metadata>()?;
                        continue;
                    }
                    if tensors.len() > TENSORS_MAX {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let tensor = map.next_value().map_err(|error| {
                        serde::de::Error::custom(format_args!("tensor `{}`: {error}", clip(&name)))
                    })?;
                    tensors.push((name, tensor));
                }
                Ok(RawHeader(tensors))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = list.next_element()? {
                    if shape.len() == DIMENSIONS_MAX {
                        while list.next_element::<IgnoredAny>()?.is_some() {}
                        return Ok(Shape(None));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(Some(shape)))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from text to text")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                while map.next_entry::<String, String>()?.is_some() {}
                Ok(Metadata)
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<Metadata, E> {
                Ok(Metadata)
            }
        }
        deserializer.deserialize_any(MetadataVisitor)
    }
}
