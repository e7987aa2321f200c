//! `cargo xtask bench forward` compares our forward pass with transformers', in f32, on the same tokens and the same number of
//! threads, alternately in one run. Writes the rows for `docs/benchmarks.md` to target/bench/forward.md.

use crate::python::{Transformers, python};
use crate::shell::{command, output, program, root, target};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::process::Command;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of tokens, in windows of 256
    #[arg(long, default_value_t = 65_536)]
    tokens: usize,
    /// Runs of each program; the median counts
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Threads of each program
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

const WINDOW: usize = 256;

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.runs == 0 || args.tokens < WINDOW {
        bail!("--runs starts at 1 and --tokens at {WINDOW}");
    }
    let model = root().join("tests/fixtures/tiny-mixtral");
    let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json"))?)?;
    let folder = target().join("bench");
    std::fs::create_dir_all(&folder)?;
    let ids = folder.join("forward-ids.json");
    let vocab = config["vocab_size"].as_u64().context("config.json has no vocab_size")?;
    std::fs::write(&ids, windows(args.tokens / WINDOW, vocab))?;
    let throughput = program("throughput", &[])?;

    let threads = args.threads.to_string();
    let ours = || -> Result<Command> {
        let mut program = command(&throughput);
        program.arg(&model).arg(&ids).env("RAYON_NUM_THREADS", &threads);
        Ok(program)
    };
    let theirs = |experts: &str| -> Result<Command> {
        let mut script = python(Transformers::V5)?;
        script.arg("tests/bench/forward.py").arg(&model).arg(&ids);
        script.args(["--threads", &threads, "--experts", experts]);
        Ok(script)
    };
    let (mut own, mut default, mut eager) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=args.runs {
        eprintln!("run {run} of {}", args.runs);
        own.push(measured(&mut ours()?)?);
        default.push(measured(&mut theirs("default")?)?);
        eager.push(measured(&mut theirs("eager")?)?);
    }
    let per_token = flops_per_token(&config)?;
    let mut text = String::from(
        "| What | wall s | CPU s | tokens/s | times ours | GFLOP per CPU second | share of its product's peak |\n|---|---|---|---|---|---|---|\n",
    );
    let ours_s = median(&own, "wall_s")?;
    for (name, runs) in [
        ("lowrank-forward", &own),
        ("transformers, experts by default", &default),
        ("transformers, experts `eager`", &eager),
    ] {
        let (wall, cpu) = (median(runs, "wall_s")?, median(runs, "cpu_s")?);
        let tokens = median(runs, "tokens")?;
        let speed = per_token * tokens / cpu / 1e9;
        let share = speed / median(runs, "product_gflops")?;
        text.push_str(&format!(
            "| {name} | {wall:.1} | {cpu:.1} | {:.0} | {:.1} | {speed:.0} | {:.0} % |\n",
            tokens / wall,
            wall / ours_s,
            100.0 * share
        ));
    }
    let version = default[0]["version"].as_str().unwrap_or_default();
    let perplexities = [&own, &default, &eager].map(|runs| median(runs, "perplexity"));
    let [ours, default, eager] = perplexities.map(|value| value.unwrap_or(f64::NAN));
    text.push_str(&format!(
        "\n{} tokens in windows of {WINDOW}, {} threads, medians of {} runs in turns; {version}. Perplexity of the same (random) tokens: {ours:.4}, {default:.4}, {eager:.4}.\n",
        args.tokens / WINDOW * WINDOW,
        args.threads,
        args.runs
    ));
    std::fs::write(folder.join("forward.md"), &text)?;
    println!("{text}");
    if [default, eager].iter().any(|theirs| (ours / theirs - 1.0).abs() > 1e-4) {
        bail!("the two did not compute the same: perplexities {ours}, {default}, {eager}");
    }
    Ok(())
}

/// Windows of pseudo-random token ids; the amount of work does not depend on the ids.
fn windows(count: usize, vocab: u64) -> String {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut id = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) % vocab
    };
    let windows: Vec<Vec<u64>> = (0..count).map(|_| (0..WINDOW).map(|_| id()).collect()).collect();
    Value::from(windows.into_iter().map(Value::from).collect::<Vec<_>>()).to_string()
}

/// The last line that a program prints, as JSON.
fn measured(program: &mut Command) -> Result<Value> {
    let text = output(program)?;
    let line = text.lines().next_back().context("nothing was printed")?;
    serde_json::from_str(line).with_context(|| line.to_owned())
}

fn median(runs: &[Value], key: &str) -> Result<f64> {
    let mut values: Vec<f64> = runs.iter().filter_map(|run| run[key].as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().with_context(|| format!("no {key} was measured"))
}

/// Operations per token, from the config: projections, attention over half a window, k experts, router, logits.
fn flops_per_token(config: &Value) -> Result<f64> {
    let number = |key: &str| config[key].as_f64().with_context(|| format!("config.json has no {key}"));
    let (h, f, layers) = (number("hidden_size")?, number("intermediate_size")?, number("num_hidden_layers")?);
    let heads = number("num_attention_heads")?;
    let d = config["head_dim"].as_f64().unwrap_or(h / heads);
    let (q, kv) = (heads * d, number("num_key_value_heads")? * d);
    let attention = 2.0 * h * (q + 2.0 * kv) + 2.0 * q * h + 4.0 * q * WINDOW as f64 / 2.0;
    let mixture = 2.0 * h * number("num_local_experts")? + number("num_experts_per_tok")? * 6.0 * h * f;
    Ok(layers * (attention + mixture) + 2.0 * h * number("vocab_size")?)
}
