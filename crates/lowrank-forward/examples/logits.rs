//! Logits of a checkpoint at every position: `logits DIR ids.json OUT.safetensors`.
//!
//! `ids.json` holds sequences of token ids, `[[1, 2, 3], [4, 5]]`; OUT gets `logits.S` [T, V] in f32 for each.
//! `tests/golden/check_live.py` compares them with those of Hugging Face transformers.

use lowrank_forward::Forward;
use lowrank_reader::Checkpoint;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, ids, out] = arguments.as_slice() else {
        return Err("usage: logits DIR ids.json OUT.safetensors".into());
    };
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&std::fs::read_to_string(ids)?)?;
    let checkpoint = Checkpoint::open(Path::new(directory))?;
    let forward = Forward::new(&checkpoint);
    let hidden = forward.run(&sequences, &mut ())?;
    let head = forward.head()?;
    let mut tensors = BTreeMap::new();
    for (sequence, tokens) in sequences.iter().enumerate() {
        let bytes: Vec<u8> =
            head.logits(&hidden, sequence)?.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        tensors.insert(format!("logits.{sequence}"), (vec![tokens.len(), head.vocab_size()], bytes));
    }
    let views: BTreeMap<&String, TensorView<'_>> = tensors
        .iter()
        .map(|(name, (shape, bytes))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()?;
    serialize_to_file(views, None, Path::new(out))?;
    Ok(())
}
