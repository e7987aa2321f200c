//! Which files hold the weights, opened, with their headers.
//!
//! The index names the shards. A glob would also pick up the second copy that many repositories carry, and read every
//! tensor twice. Only Mistral's numbered files come without an index; there the numbers say whether all are present.

use crate::error::ReadError;
use crate::folder::Folder;
use crate::header::{self, Header};
use crate::index::{INDEX_BYTES_MAX, Index};
use crate::others;
use lowrank_model::format::{INDEX_FILE, SINGLE_FILE};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Which naming scheme the weights follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `model*.safetensors`
    HuggingFace,
    /// `consolidated*.safetensors`
    Consolidated,
}

/// A shard, open for as long as the checkpoint lives.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) len_bytes: u64,
    file: File,
}

/// Shards, their headers in the same order, and the index if there is one.
#[derive(Debug)]
pub(crate) struct Shards {
    pub(crate) shards: Vec<Shard>,
    pub(crate) headers: Vec<Header>,
    pub(crate) index: Option<Index>,
    /// The index or the only shard: where a missing tensor was looked for.
    pub(crate) listing: PathBuf,
}

impl Shard {
    /// Reads exactly `buffer` from `offset` on; `tensor` serves the messages.
    pub(crate) fn read_exact(&self, offset: u64, buffer: &mut [u8], tensor: &str) -> Result<(), ReadError> {
        let (path, tensor) = (|| self.path.clone(), || tensor.to_owned());
        self.file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => ReadError::Shrank { path: path(), tensor: tensor() },
            _ => ReadError::TensorIo { path: path(), tensor: tensor(), source },
        })
    }
}

/// Finds the shards, opens them and reads their headers.
pub(crate) fn open(folder: &Folder, naming: Naming) -> Result<Shards, ReadError> {
    let (names, index, listing) = find(folder, naming)?;
    let present = folder.names()?;
    let mut shards = Vec::with_capacity(names.len());
    let mut headers = Vec::with_capacity(names.len());
    for (at, (name, named_by)) in names.iter().enumerate() {
        others::refuse_unfinished(folder, &present, name)?;
        let Some(file) = folder.open_file(name)? else {
            let absent = names[at + 1..].iter().filter(|(other, _)| !present.contains(other));
            let others = absent.map(|(other, _)| other.clone()).collect();
            let (path, named_by) = (folder.path(name), named_by.clone());
            return Err(ReadError::MissingShard { path, named_by, others });
        };
        let name = name.clone();
        let path = folder.path(&name);
        let metadata = file.metadata().map_err(|source| ReadError::Io { path: path.clone(), source })?;
        let shard = Shard { name, path, len_bytes: metadata.len(), file };
        headers.push(read_header(&shard)?);
        shards.push(shard);
    }
    Ok(Shards { shards, headers, index, listing })
}

fn read_header(shard: &Shard) -> Result<Header, ReadError> {
    let path = &shard.path;
    let actual_bytes = shard.len_bytes;
    if actual_bytes < header::LENGTH_BYTES {
        let expected_bytes = header::LENGTH_BYTES;
        return Err(ReadError::TruncatedHeader { path: path.clone(), expected_bytes, actual_bytes });
    }
    let mut length_field = [0; 8];
    shard.read_exact(0, &mut length_field, "the header")?;
    let json_bytes = match header::json_len(path, length_field, actual_bytes) {
        Err(too_large @ ReadError::HeaderTooLarge { .. }) => {
            others::refuse_magic(path, length_field)?;
            return Err(too_large);
        }
        other => other?,
    };
    let mut json = vec![0; json_bytes as usize];
    shard.read_exact(header::LENGTH_BYTES, &mut json, "the header")?;
    header::parse(path, &json, actual_bytes)
}

/// Names of the shards with the reason why each is expected, the index, and where tensors are listed.
type Found = (Vec<(String, String)>, Option<Index>, PathBuf);

fn find(folder: &Folder, naming: Naming) -> Result<Found, ReadError> {
    let (index_file, single_file) = match naming {
        Naming::HuggingFace => (INDEX_FILE, SINGLE_FILE),
        Naming::Consolidated => ("consolidated.safetensors.index.json", "consolidated.safetensors"),
    };
    let present = folder.names()?;
    if let Some(json) = folder.read(index_file, INDEX_BYTES_MAX)? {
        let listing = folder.path(index_file);
        let index = Index::parse(&listing, &json)?;
        let named = index.shards();
        for shard in &named {
            others::refuse_format(folder, shard)?;
        }
        // A loader that prefers the single file, or an index from another export, would read other weights.
        if let Some(extra) = present.iter().find(|name| {
            !named.contains(name.as_str()) && (*name == single_file || shard_number(naming, name).is_some())
        }) {
            let why = format!("the shard is not named by {index_file}");
            return Err(ReadError::ExtraShard { path: folder.path(extra), why });
        }
        let reason = |shard: &&str| ((*shard).to_owned(), format!("{index_file} names it"));
        let names = named.iter().map(reason).collect();
        return Ok((names, Some(index), listing));
    }

    let numbered: Vec<(&String, (u32, u32))> =
        present.iter().filter_map(|name| Some((name, shard_number(naming, name)?))).collect();
    if present.iter().any(|name| name == single_file) {
        if let Some((extra, _)) = numbered.first() {
            let why = format!("there are both {single_file} and numbered shards, and no {index_file}");
            return Err(ReadError::ExtraShard { path: folder.path(extra), why });
        }
        let names = vec![(single_file.to_owned(), String::new())];
        return Ok((names, None, folder.path(single_file)));
    }
    match (naming, numbered.first()) {
        (Naming::HuggingFace, Some(_)) => {
            let named_by = "there are numbered shards, which need their index".to_owned();
            Err(ReadError::MissingShard { path: folder.path(index_file), named_by, others: Vec::new() })
        }
        (Naming::HuggingFace, None) => {
            let expected = "model.safetensors.index.json or model.safetensors";
            Err(others::instead_of_weights(folder, &present, expected))
        }
        (Naming::Consolidated, None) => {
            let expected =
                "consolidated.safetensors or consolidated-00001-of-….safetensors beside params.json";
            Err(others::instead_of_weights(folder, &present, expected))
        }
        (Naming::Consolidated, Some(&(first, (_, total)))) => {
            if let Some((extra, (k, n))) =
                numbered.iter().find(|(_, (k, n))| *n != total || *k == 0 || *k > total)
            {
                let why = format!("number {k} of {n} does not fit {first}");
                return Err(ReadError::ExtraShard { path: folder.path(extra), why });
            }
            // The listing is complete or names the first gap: never more names than files.
            let mut names = Vec::with_capacity(numbered.len());
            for k in 1..=total {
                let name = format!("consolidated-{k:05}-of-{total:05}.safetensors");
                if !numbered.iter().any(|(present, _)| **present == name) {
                    let named_by = format!("{first} says that there are {total}");
                    let others = Vec::new();
                    return Err(ReadError::MissingShard { path: folder.path(&name), named_by, others });
                }
                names.push((name, String::new()));
            }
            Ok((names, None, folder.path(first)))
        }
    }
}

/// `(k, n)` of `model-0000k-of-0000n.safetensors`.
fn shard_number(naming: Naming, name: &str) -> Option<(u32, u32)> {
    let stem = match naming {
        Naming::HuggingFace => "model-",
        Naming::Consolidated => "consolidated-",
    };
    let (k, n) = name.strip_prefix(stem)?.strip_suffix(".safetensors")?.split_once("-of-")?;
    let number = |text: &str| {
        (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
    };
    Some((number(k)?, number(n)?))
}
