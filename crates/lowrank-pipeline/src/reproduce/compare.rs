//! File against file, and where they differ, tensor against tensor: one pair of tensors in memory at a time.
//!
//! A difference is **rounding** if another kind of CPU explains it: a tensor of numbers that lies from the other, in the
//! Frobenius norm, no farther than rounding it to its dtype once more could move it (u·‖T‖, u the unit roundoff), or a text
//! that says the same but for decimals that agree to 0.5 %. Whole numbers agree: ranks, counts, shapes.

use crate::PipelineError;
use lowrank_model::{Dtype, Tensor, format};
use lowrank_reader::header::{self, Header, HeaderEntry};
use lowrank_writer::Manifest;
use regex::Regex;
use serde::Serialize;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Decimals in texts agree to this, relative to the larger. Most agree to 10⁻⁵; what rounding cost a matrix is itself up to
/// chance, and was seen to differ by 0.2 % (`docs/reliability.md`).
const TEXT_RELATIVE: f64 = 5e-3;
/// Below this a number in a text is rounding itself.
const TEXT_ABSOLUTE: f64 = 1e-9;
/// Longest text that is looked into; the longest of ours is the report, 30 MB for 65,536 experts.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Something that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Relative to the output, or a file of the base.
    pub file: String,
    /// Which tensor of it, if that can be said.
    pub tensor: Option<String>,
    /// How it differs, and how much.
    pub what: String,
    /// Whether another kind of CPU explains it.
    pub is_rounding: bool,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tensor {
            Some(tensor) => write!(f, "{}: tensor `{tensor}`: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

impl Difference {
    /// That no rounding explains.
    pub(super) fn of_file(file: &str, what: String) -> Self {
        Self { file: file.into(), tensor: None, what, is_rounding: false }
    }
}

/// How two values differ.
pub(super) struct Gap {
    pub(super) what: String,
    pub(super) is_rounding: bool,
}

impl Gap {
    pub(super) fn of_tensor(self, file: &str, tensor: &str) -> Difference {
        let Self { what, is_rounding } = self;
        Difference { file: file.into(), tensor: Some(tensor.into()), what, is_rounding }
    }
}

/// Every file of an output against those of a second run.
pub(super) fn compare(out: &Path, found: &Manifest, again: &Path) -> Result<Vec<Difference>, PipelineError> {
    let remade = Manifest::of(again)?;
    let mut differences = Vec::new();
    for file in &found.files {
        let name = &file.name;
        match remade.files.iter().find(|other| other.name == *name) {
            None => differences.push(Difference::of_file(name, "is not made by a second run".into())),
            Some(other) if other == file => {}
            Some(_) if name.ends_with(".safetensors") => {
                differences.extend(compare_shards(name, &out.join(name), &again.join(name))?);
            }
            Some(_) => differences.push(compare_texts(name, &out.join(name), &again.join(name))?),
        }
    }
    for other in &remade.files {
        if !found.files.iter().any(|file| file.name == other.name) {
            differences
                .push(Difference::of_file(&other.name, "is made by a second run and not there".into()));
        }
    }
    let name = format::MANIFEST_FILE;
    let manifests = [out, again].map(|dir| fs::read(dir.join(name)).unwrap_or_default());
    if manifests[0] != manifests[1] {
        let mut difference = compare_texts(name, &out.join(name), &again.join(name))?;
        // It holds the others' hashes.
        difference.is_rounding =
            !differences.is_empty() && differences.iter().all(|difference| difference.is_rounding);
        differences.push(difference);
    }
    Ok(differences)
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> PipelineError {
    move |source| PipelineError::Io { path: path.into(), source }
}

/// Where they part, and whether only numbers do.
fn compare_texts(name: &str, was: &Path, is: &Path) -> Result<Difference, PipelineError> {
    let what = first_difference(was, is)?;
    let text = |path: &Path| -> Option<String> {
        String::from_utf8(lowrank_reader::read_at_most(path, TEXT_BYTES_MAX).ok()?).ok()
    };
    let is_rounding = match (text(was), text(is)) {
        (Some(was), Some(is)) => says_the_same(&was, &is),
        _ => false,
    };
    Ok(Difference { file: name.into(), tensor: None, what, is_rounding })
}

/// Whether two texts are the same but for numbers that nearly are.
fn says_the_same(was: &str, is: &str) -> bool {
    let number = Regex::new(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?").expect("a fixed pattern");
    let is_whole = |text: &str| text.parse::<i64>().is_ok();
    let near = |a: &str, b: &str| match (a.parse::<f64>(), b.parse::<f64>()) {
        _ if is_whole(a) && is_whole(b) => false,
        (Ok(a), Ok(b)) => (a - b).abs() <= TEXT_ABSOLUTE + TEXT_RELATIVE * a.abs().max(b.abs()),
        _ => false,
    };
    let numbers_agree = number
        .find_iter(was)
        .map(Some)
        .chain(std::iter::repeat(None))
        .zip(number.find_iter(is).map(Some).chain(std::iter::repeat(None)))
        .take_while(|pair| *pair != (None, None))
        .all(|pair| matches!(pair, (Some(a), Some(b)) if a.as_str() == b.as_str() || near(a.as_str(), b.as_str())));
    numbers_agree && number.split(was).eq(number.split(is))
}

/// Where two files part.
fn first_difference(was: &Path, is: &Path) -> Result<String, PipelineError> {
    let open = |path: &Path| -> Result<_, PipelineError> {
        let file = File::open(path).map_err(unreadable(path))?;
        let bytes = file.metadata().map_err(unreadable(path))?.len();
        Ok((std::io::BufReader::with_capacity(1 << 16, file), bytes))
    };
    let ((was_file, was_bytes), (is_file, is_bytes)) = (open(was)?, open(is)?);
    let (mut at, mut line) = (0_u64, 1_u64);
    for (a, b) in was_file.bytes().zip(is_file.bytes()) {
        let (a, b) = (a.map_err(unreadable(was))?, b.map_err(unreadable(is))?);
        if a != b {
            break;
        }
        at += 1;
        line += u64::from(a == b'\n');
    }
    Ok(format!("differs from byte {at} on (line {line}); {was_bytes} bytes, a second run gives {is_bytes}"))
}

/// A shard, of which the header is in memory.
struct Shard {
    file: File,
    header: Header,
}

impl Shard {
    /// `None` if it is none.
    fn open(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let file_bytes = file.metadata().ok()?.len();
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).ok()?;
        let mut json = vec![0; header::json_len(path, length, file_bytes).ok()? as usize];
        file.read_exact_at(&mut json, header::LENGTH_BYTES).ok()?;
        Some(Self { header: header::parse(path, &json, file_bytes).ok()?, file })
    }

    fn read(&self, entry: &HeaderEntry) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; entry.len_bytes as usize];
        self.file.read_exact_at(&mut bytes, entry.begin)?;
        Ok(bytes)
    }
}

fn compare_shards(name: &str, was: &Path, is: &Path) -> Result<Vec<Difference>, PipelineError> {
    let (Some(was_shard), Some(is_shard)) = (Shard::open(was), Shard::open(is)) else {
        return Ok(vec![Difference::of_file(name, first_difference(was, is)?)]);
    };
    let mut differences = Vec::new();
    for (tensor, entry) in &was_shard.header {
        let gap = match is_shard.header.get(tensor) {
            None => Some(Gap { what: "is not made by a second run".into(), is_rounding: false }),
            Some(other) if (other.dtype, &other.shape) != (entry.dtype, &entry.shape) => {
                let what = format!(
                    "{} {:?}; a second run gives {} {:?}",
                    entry.dtype, entry.shape, other.dtype, other.shape
                );
                Some(Gap { what, is_rounding: false })
            }
            Some(other) => {
                let (was, is) = (
                    was_shard.read(entry).map_err(unreadable(was))?,
                    is_shard.read(other).map_err(unreadable(is))?,
                );
                gap_of(entry, was, is)
            }
        };
        differences.extend(gap.map(|gap| gap.of_tensor(name, tensor)));
    }
    for tensor in is_shard.header.keys().filter(|tensor| !was_shard.header.contains_key(*tensor)) {
        let gap = Gap { what: "is made by a second run and not there".into(), is_rounding: false };
        differences.push(gap.of_tensor(name, tensor));
    }
    if differences.is_empty() {
        differences.push(Difference::of_file(name, first_difference(was, is)?));
    }
    Ok(differences)
}

fn gap_of(entry: &HeaderEntry, was: Vec<u8>, is: Vec<u8>) -> Option<Gap> {
    if was == is {
        return None;
    }
    let shape: Vec<usize> = entry.shape.iter().map(|&dimension| dimension as usize).collect();
    let tensor = |bytes| -> Option<Tensor> {
        Tensor::new(shape.clone(), Dtype::parse(&entry.dtype.to_string().to_ascii_lowercase())?, bytes).ok()
    };
    match (tensor(was), tensor(is)) {
        (Some(was), Some(is)) => tensor_gap(&was, &is),
        // An index of pivots, which no rounding explains.
        _ => Some(Gap { what: format!("other {} numbers", entry.dtype), is_rounding: false }),
    }
}

/// How many numbers differ, and by how much; `None`: same bytes.
pub(super) fn tensor_gap(was: &Tensor, is: &Tensor) -> Option<Gap> {
    if was == is {
        return None;
    }
    let element = was.dtype().size_bytes() as usize;
    let numbers = was.bytes().chunks(element).zip(is.bytes().chunks(element)).filter(|(a, b)| a != b).count();
    let (mut largest, mut lost, mut energy) = (0.0_f64, 0.0, 0.0);
    for (a, b) in was.to_f32().iter().zip(&is.to_f32()) {
        let gap = (f64::from(*a) - f64::from(*b)).abs();
        largest = largest.max(gap);
        lost += gap * gap;
        energy += f64::from(*a).powi(2);
    }
    let relative = (lost / energy).sqrt();
    Some(Gap {
        what: format!(
            "{numbers} of {} numbers differ, by {largest:.3e} at most, {relative:.1e} of the tensor",
            was.elements()
        ),
        // Written so that a NaN on either side is no rounding.
        is_rounding: was.shape() == is.shape() && relative <= was.dtype().unit_roundoff(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(was: &[f32], is: &[f32]) -> Option<bool> {
        let tensor = |values: &[f32]| Tensor::from_f32(vec![values.len()], Dtype::Bf16, values).unwrap();
        tensor_gap(&tensor(was), &tensor(is)).map(|gap| gap.is_rounding)
    }

    #[test]
    fn a_last_bit_is_rounding_and_a_sign_or_a_nan_is_not() {
        // One unit in the last place of bf16 at 1 is 2⁻⁷.
        assert_eq!(gap(&[1.0, -3.0, 0.5], &[1.0, -3.0, 0.5]), None);
        assert_eq!(gap(&[1.0, -3.0, 0.5], &[1.007_812_5, -3.0, 0.5]), Some(true));
        assert_eq!(gap(&[1.0, -3.0, 0.5], &[1.015_625, -3.015_625, 0.5]), Some(false));
        assert_eq!(gap(&[1.0, -3.0, 0.5], &[1.0, 3.0, 0.5]), Some(false));
        assert_eq!(gap(&[1.0], &[f32::NAN]), Some(false));
        assert_eq!(gap(&[0.0], &[1e-30]), Some(false));
    }

    #[test]
    fn texts_say_the_same_if_only_the_ends_of_numbers_differ() {
        let was = r#"{"rank": 12, "error": 0.21926886494, "tiny": 1.2e-10, "name": "w1", "rows": 4096}"#;
        assert!(says_the_same(
            was,
            &was.replace("0.21926886494", "0.219268864").replace("1.2e-10", "-3e-11")
        ));
        for other in [
            was.replace("12,", "13,"),
            was.replace("4096", "4097"),
            was.replace("0.2192", "0.2208"),
            was.replace("w1", "w2"),
            was.replace("\"name\"", "\"title\""),
            format!("{was} 7"),
        ] {
            assert!(!says_the_same(was, &other), "{other}");
        }
    }
}
