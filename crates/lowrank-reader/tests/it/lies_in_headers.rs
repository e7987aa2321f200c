//! Headers that lie, and the format's own parser as a second opinion.

use crate::draft::{Raw, random_tensor, shard_bytes, with_header};
use lowrank_model::Dtype;
use lowrank_reader::{ReadError, header};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::path::Path;

const FILE: &str = "shard.safetensors";

/// What the reader does with the first bytes of a file.
fn read(file: &[u8]) -> Result<header::Header, ReadError> {
    let bytes = file.len() as u64;
    let Some(length_field) = file.first_chunk() else {
        return Err(ReadError::TruncatedHeader { path: FILE.into(), expected_bytes: 8, actual_bytes: bytes });
    };
    let json = header::json_len(Path::new(FILE), *length_field, bytes)? as usize;
    header::parse(Path::new(FILE), &file[8..8 + json], bytes)
}

macro_rules! assert_lie {
    ($json:expr, $data_bytes:expr, $variant:pat, $($part:expr),*) => {{
        let error = read(&with_header($json, &[0; 64][..$data_bytes])).expect_err("the lie was believed");
        let message = lowrank_model::failure::chain(&error);
        assert!(matches!(error, $variant), "{error:?}");
        for part in [FILE, $($part),*] {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
        assert!(!message.contains('\n'), "{message}");
        assert!(message.len() < 1000, "{message}");
    }};
}

#[test]
fn a_header_longer_than_the_format_allows() {
    for length in [header::HEADER_BYTES_MAX + 1, u64::MAX, u64::MAX - 7] {
        let error = read(&length.to_le_bytes()).unwrap_err();
        assert!(matches!(error, ReadError::HeaderTooLarge { .. }), "{error:?}");
    }
}

#[test]
fn a_header_longer_than_the_file() {
    let error = read(&99_999_999_u64.to_le_bytes()).unwrap_err();
    assert!(matches!(error, ReadError::TruncatedHeader { actual_bytes: 8, .. }), "{error:?}");
}

#[test]
fn a_header_that_is_not_the_json_of_the_format() {
    for json in [
        "",
        "[]",
        "1",
        "{",
        "{\"a\":1}",
        "{\"a\":{}}",
        "{} x",
        "\u{feff}{}",
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        r#"{"__metadata__":{"a":1}}"#,
        r#"{"__metadata__":{},"__metadata__":{}}"#,
    ] {
        assert_lie!(json, 0, ReadError::HeaderJson { .. },);
    }
    assert_lie!(r#"{"w":{"dtype":"F32"}}"#, 0, ReadError::HeaderJson { .. }, "`w`", "shape");
    assert_lie!(&"[".repeat(1_000_000), 0, ReadError::HeaderJson { .. },);
    assert_lie!(&format!(r#"{{"w":{}}}"#, "[".repeat(1_000_000)), 0, ReadError::HeaderJson { .. }, "w");
    let not_text = [&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
    assert!(matches!(read(&not_text), Err(ReadError::HeaderJson { .. })));
}

#[test]
fn two_tensors_of_one_name() {
    let json = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                   "w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    assert_lie!(json, 8, ReadError::DuplicateInHeader { .. }, "`w`");
    let same = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                   "w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert_lie!(same, 4, ReadError::DuplicateInHeader { .. }, "`w`");
}

#[test]
fn tensors_that_overlap() {
    let json = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                   "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert_lie!(json, 12, ReadError::Overlap { .. }, "`b`", "`a`");
}

#[test]
fn a_hole_between_tensors() {
    let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                   "b":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}}"#;
    assert_lie!(json, 10, ReadError::Hole { bytes: 2, .. }, "`b`");
    let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    assert_lie!(json, 8, ReadError::Hole { bytes: 4, .. }, "`a`");
}

#[test]
fn a_tensor_out_of_range() {
    let json = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_lie!(json, 7, ReadError::TruncatedShard { .. }, "`a`", "truncated");
    // Eight times 2^61 − 1 elements: fits 64 bits, and no file.
    let json =
        r#"{"a":{"dtype":"U8","shape":[18446744073709551608],"data_offsets":[0,18446744073709551608]}}"#;
    assert_lie!(json, 8, ReadError::Overflow { .. }, "`a`");
    let json = r#"{"a":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}"#;
    assert_lie!(json, 8, ReadError::TruncatedShard { .. }, "`a`");
}

#[test]
fn a_size_that_overflows() {
    for shape in ["[4294967296,4294967296]", "[9223372036854775807,2]", "[2305843009213693952]"] {
        let json = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        assert_lie!(&json, 0, ReadError::Overflow { .. }, "`a`");
    }
}

#[test]
fn offsets_in_reverse() {
    let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#;
    assert_lie!(json, 4, ReadError::ReversedOffsets { begin: 4, end: 0, .. }, "`a`");
}

#[test]
fn bytes_that_do_not_fit_dtype_and_shape() {
    let json = r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#;
    assert_lie!(
        json,
        8,
        ReadError::WrongByteSize { expected_bytes: 12, actual_bytes: 8, .. },
        "`a`",
        "F32",
        "[3]"
    );
    // Three elements of four bits are no whole number of bytes.
    let json = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#;
    assert_lie!(json, 2, ReadError::WrongByteSize { .. }, "`a`");
}

#[test]
fn bytes_that_belong_to_no_tensor() {
    let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert_lie!(json, 6, ReadError::TrailingBytes { bytes: 2, .. }, "`a`");
    assert_lie!("{}", 1, ReadError::TrailingBytes { bytes: 1, tensor: None, .. },);
}

#[test]
fn a_dtype_that_the_format_does_not_know() {
    let json = r#"{"a":{"dtype":"Q4_K\n","shape":[1],"data_offsets":[0,4]}}"#;
    assert_lie!(json, 4, ReadError::UnknownDtype { .. }, "`a`", "Q4_K\\n");
}

#[test]
fn a_shape_of_a_million_dimensions() {
    let shape = vec!["1"; 1_000_000].join(",");
    let json = format!(r#"{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}"#);
    assert_lie!(&json, 4, ReadError::TooManyDimensions { .. }, "`a`");
}

#[test]
fn a_header_of_a_million_tensors() {
    let tensor = |at| format!(r#""{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let json = format!("{{{}}}", (0..1_000_000).map(tensor).collect::<Vec<_>>().join(","));
    assert_lie!(&json, 0, ReadError::TooManyTensors { .. }, "524288");
}

#[test]
fn names_that_would_break_the_line() {
    for name in ["a\\nb", "\\u001b[31m", &"x".repeat(100_000)] {
        let json = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        assert_lie!(&json, 4, ReadError::BadTensorName { .. },);
    }
}

#[test]
fn order_in_the_text_padding_and_empty_tensors_are_honest() {
    let json = r#"  {"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
                     "none":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]},
                     "scalar":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}      "#;
    let header = read(&with_header(json, &[0; 8])).unwrap();
    assert_eq!(header.len(), 3);
    assert_eq!(header["b"].begin, 8 + json.len() as u64 + 4);
    assert_eq!((header["none"].len_bytes, header["scalar"].len_bytes), (0, 4));
}

/// What is believed here must be believed by the format's own parser, and mean the same.
fn agrees_with_the_reference(file: &[u8]) -> Result<(), TestCaseError> {
    let Ok(header) = read(file) else { return Ok(()) };
    let reference = SafeTensors::deserialize(file);
    prop_assert!(reference.is_ok(), "accepted here, refused there: {:?}", reference.err());
    let reference = reference.unwrap();
    prop_assert_eq!(header.len(), reference.len());
    for (name, view) in reference.iter() {
        let entry = &header[name];
        prop_assert_eq!(entry.dtype, view.dtype());
        prop_assert!(entry.shape.iter().map(|&d| d as usize).eq(view.shape().iter().copied()));
        let bytes = &file[entry.begin as usize..(entry.begin + entry.len_bytes) as usize];
        prop_assert_eq!(bytes, view.data());
    }
    Ok(())
}

fn honest_shard(shapes: &[Vec<usize>]) -> Vec<u8> {
    let tensor = |(at, shape): (usize, &Vec<usize>)| {
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][at % 3];
        Raw::new(&format!("t{at}"), &random_tensor(at as u64, shape, dtype))
    };
    shard_bytes(&shapes.iter().enumerate().map(tensor).collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn honest_shards_are_believed(shapes in prop::collection::vec(prop::collection::vec(0..5_usize, 0..4), 0..6)) {
        let file = honest_shard(&shapes);
        prop_assert!(read(&file).is_ok());
        agrees_with_the_reference(&file)?;
    }

    #[test]
    fn no_damaged_header_is_believed_beyond_the_reference(
        shapes in prop::collection::vec(prop::collection::vec(0..5_usize, 0..4), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            prop::sample::select(&b"0123456789,:[]{}\"-e. "[..]), any::<u8>()
        ]), 1..4),
    ) {
        let mut file = honest_shard(&shapes);
        for (at, byte) in damage {
            let at = at.index(file.len());
            file[at] = byte;
        }
        agrees_with_the_reference(&file)?;
    }

    #[test]
    fn no_digits_in_offsets_and_shapes_are_believed_beyond_the_reference(
        numbers in prop::collection::vec(prop_oneof![0..17_u64, any::<u64>()], 8),
    ) {
        let [a, b, c, d, e, f, g, h] = numbers[..] else { unreachable!("eight were asked for") };
        let json = format!(
            r#"{{"x":{{"dtype":"F32","shape":[{a},{b}],"data_offsets":[{c},{d}]}},
                "y":{{"dtype":"BF16","shape":[{e},{f}],"data_offsets":[{g},{h}]}}}}"#
        );
        for data_bytes in [0, 8, 16, d.min(64) as usize, h.min(64) as usize] {
            agrees_with_the_reference(&with_header(&json, &vec![0; data_bytes]))?;
        }
    }
}
