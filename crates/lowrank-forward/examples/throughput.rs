//! Speed of the forward pass: `throughput DIR ids.json`, where `ids.json` holds sequences of token ids.
//!
//! Prints the time of the layers and of the logits, tokens per second, and the perplexity as a proof of work done.

use lowrank_forward::Forward;
use lowrank_forward::math::exp;
use lowrank_reader::Checkpoint;
use std::error::Error;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, ids] = arguments.as_slice() else { return Err("usage: throughput DIR ids.json".into()) };
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&std::fs::read_to_string(ids)?)?;
    let checkpoint = Checkpoint::open(Path::new(directory))?;
    let forward = Forward::new(&checkpoint);

    let start = Instant::now();
    let hidden = forward.run(&sequences, &mut ())?;
    let layers_s = start.elapsed().as_secs_f64();
    let head = forward.head()?;
    let (mut loss, mut predicted) = (0.0, 0_u32);
    let mut logits_s = 0.0;
    for (sequence, tokens) in sequences.iter().enumerate() {
        let start = Instant::now();
        let logits = head.logits(&hidden, sequence)?;
        logits_s += start.elapsed().as_secs_f64();
        for (row, &next) in logits.chunks_exact(head.vocab_size()).zip(&tokens[1..]) {
            let largest = row.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
            let total: f64 = row.iter().map(|&logit| f64::from(exp(logit - largest))).sum();
            loss += total.ln() + f64::from(largest) - f64::from(row[next as usize]);
            predicted += 1;
        }
    }
    let seconds = layers_s + logits_s;
    println!(
        "{} tokens: layers {layers_s:.3} s, logits {logits_s:.3} s, {:.0} tokens/s, perplexity {:.4}, {} threads",
        hidden.tokens(),
        hidden.tokens() as f64 / seconds,
        (loss / f64::from(predicted)).exp(),
        rayon::current_num_threads(),
    );
    Ok(())
}
