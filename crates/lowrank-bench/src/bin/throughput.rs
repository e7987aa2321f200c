//! Speed of the forward pass: `throughput DIR ids.json`, where `ids.json` holds sequences of token ids.
//!
//! Prints one JSON document: tokens, wall and CPU seconds, of them those of the layers, threads, what a product of square f32
//! matrices reaches per CPU second, and the perplexity as a proof of work done. `cargo xtask bench forward` calls it.

use lowrank_bench::meter::Meter;
use lowrank_compute::{Accumulate, Faer, Kernels};
use lowrank_forward::Forward;
use lowrank_forward::math::exp;
use lowrank_reader::Checkpoint;
use ndarray::Array2;
use serde_json::json;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, ids] = arguments.as_slice() else { return Err("usage: throughput DIR ids.json".into()) };
    let sequences: Vec<Vec<u32>> = serde_json::from_str(&std::fs::read_to_string(ids)?)?;
    let checkpoint = Checkpoint::open(Path::new(directory))?;
    let forward = Forward::new(&checkpoint);

    let meter = Meter::start()?;
    let hidden = forward.run(&sequences, &mut ())?;
    let layers_s = meter.took()?.wall_s;
    let head = forward.head()?;
    let (mut loss, mut predicted) = (0.0, 0_u32);
    for (sequence, tokens) in sequences.iter().enumerate() {
        let logits = head.logits(&hidden, sequence)?;
        for (row, &next) in logits.chunks_exact(head.vocab_size()).zip(&tokens[1..]) {
            let largest = row.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
            let total: f64 = row.iter().map(|&logit| f64::from(exp(logit - largest))).sum();
            loss += total.ln() + f64::from(largest) - f64::from(row[next as usize]);
            predicted += 1;
        }
    }
    let took = meter.took()?;
    println!(
        "{}",
        json!({
            "tokens": hidden.tokens(),
            "wall_s": took.wall_s,
            "cpu_s": took.cpu_s,
            "layers_s": layers_s,
            "threads": rayon::current_num_threads(),
            "perplexity": (loss / f64::from(predicted)).exp(),
            "product_gflops": product_gflops()?,
        })
    );
    Ok(())
}

/// 10⁹ operations per CPU second, which another process on the machine does not spoil as it spoils wall time.
fn product_gflops() -> Result<f64, Box<dyn Error>> {
    const SIZE: usize = 2048;
    const RUNS: usize = 8;
    let a = Array2::from_shape_fn((SIZE, SIZE), |(i, j)| ((i * 31 + j * 17) % 97) as f32 / 97.0);
    let mut c = Array2::zeros((SIZE, SIZE));
    let meter = Meter::start()?;
    for _ in 0..RUNS {
        Faer.gemm(a.view(), a.view(), c.view_mut(), Accumulate::Replace);
    }
    Ok(2e-9 * RUNS as f64 * (SIZE as f64).powi(3) / meter.took()?.cpu_s)
}
