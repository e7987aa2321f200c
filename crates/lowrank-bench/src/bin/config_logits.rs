//! Logits of many small checkpoints in one process, for `tests/conformance/check_configs.py`.
//!
//! `config_logits keys` prints every key that a config may have, and what it may say, as JSON. `config_logits run` reads
//! `{"folder": …, "ids": [[1, 2, 3], [4, 5]]}` from stdin, one a line. For each it prints one line of JSON: `{"config": …}`, the
//! `config.json` that a dense output would carry, with the logits of all positions in `FOLDER/logits.f32`; or
//! `{"refused": kind, "line": …}`.

use lowrank_forward::Forward;
use lowrank_model::rules::{Keys, Rule};
use lowrank_model::{Dtype, ErrorKind, failure, family};
use lowrank_reader::Checkpoint;
use lowrank_writer::{ConfigOf, StatedDtype};
use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut out = std::io::stdout().lock();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["keys"] => writeln!(out, "{}", listed())?,
        ["run"] => {
            for line in std::io::stdin().lock().lines() {
                let question: Question = serde_json::from_str(&line?)?;
                writeln!(out, "{}", answer(Path::new(&question.folder), &question.ids))?;
                out.flush()?;
            }
        }
        _ => return Err("usage: config_logits keys | config_logits run".into()),
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Question {
    folder: String,
    ids: Vec<Vec<u32>>,
}

fn listed() -> Value {
    let keys = |lists: Vec<Keys>| -> Vec<Value> {
        let one = |&(rule, names): &Keys| {
            let (rule, values) = match rule {
                Rule::Read => ("read", Value::Null),
                Rule::Harmless(kind) => ("harmless", format!("{kind:?}").into()),
                Rule::Only(neutral) => {
                    let parsed = neutral.iter().map(|it| serde_json::from_str::<Value>(&it.to_string()));
                    ("only", parsed.map(|value| value.expect("a neutral value is JSON")).collect())
                }
            };
            json!({"names": names, "rule": rule, "values": values})
        };
        lists.iter().map(one).collect()
    };
    let families = family::ALL.iter().map(|family| {
        let lists = json!({"config": keys(family.config_keys()), "params": keys(family.params_keys())});
        (family.model_type().to_owned(), lists)
    });
    Value::Object(families.collect())
}

fn answer(folder: &Path, sequences: &[Vec<u32>]) -> Value {
    let refused = |kind: ErrorKind, error: &dyn Error| json!({"refused": format!("{kind:?}"), "line": failure::chain(error)});
    let checkpoint = match Checkpoint::open(folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(error.kind(), &error),
    };
    let forward = Forward::new(&checkpoint);
    let logits = forward.run(sequences, &mut ()).and_then(|hidden| {
        let head = forward.head()?;
        (0..sequences.len()).map(|sequence| head.logits(&hidden, sequence)).collect::<Result<Vec<_>, _>>()
    });
    let bytes: Vec<u8> = match logits {
        Ok(logits) => logits.concat().iter().flat_map(|logit| logit.to_le_bytes()).collect(),
        Err(error) => return refused(error.kind(), &error),
    };
    if let Err(error) = std::fs::write(folder.join("logits.f32"), bytes) {
        return refused(ErrorKind::InputOutput, &error);
    }
    let of = ConfigOf::new(checkpoint.config_json(), StatedDtype::Asked(Dtype::F32));
    match lowrank_writer::config::dense(of, checkpoint.config()) {
        Ok(config) => json!({ "config": config }),
        Err(error) => refused(error.kind(), &error),
    }
}
