//! Expert pruning, the alternative to low-rank factors, for `cargo xtask bench fidelity`: drops whole experts.
//!
//! `prune_experts MODEL OUT SHARE CALIBRATION TOKENS EVALUATION_TOKENS TEXT...`: in every layer the share of experts (to the
//! nearest whole number) with the smallest mean g·‖y‖ goes, the criterion of REAP (Lasby et al., 2510.13999), g the router's
//! weight and y the expert's output for the tokens routed to it. OUT becomes an ordinary checkpoint of fewer experts, whose
//! router's softmax is over those that are left. Prints what it lost on each text, by the functions of `verify`.
//! CALIBRATION is a file or `bundled`.

use lowrank_forward::{Cpu, ExpertBatch, Forward, Observer};
use lowrank_model::names::Role;
use lowrank_model::progress::Silent;
use lowrank_model::recipe::Bos;
use lowrank_model::{Dtype, MatrixId, Tensor, format};
use lowrank_reader::Checkpoint;
use lowrank_text::{Passage, Pick, TextRequest, TextSource, windows};
use lowrank_verify::{options::WINDOW_TOKENS, outcome};
use safetensors::tensor::{TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, share, calibration, tokens, evaluation_tokens, texts @ ..] = arguments.as_slice() else {
        return Err(
            "usage: prune_experts MODEL OUT SHARE CALIBRATION TOKENS EVALUATION_TOKENS TEXT...".into()
        );
    };
    let original = Checkpoint::open(Path::new(model))?;
    let read = |source: &TextSource, max_tokens: &str, pick| {
        let max_tokens = Some(max_tokens.parse()?);
        let request = TextRequest { source, window: WINDOW_TOKENS, bos: Bos::Auto, max_tokens, pick };
        Ok::<_, Box<dyn Error>>(windows(original.dir(), &request)?)
    };
    let source = match calibration.as_str() {
        "bundled" => TextSource::Bundled(Passage::Calibration),
        file => TextSource::File(file.into()),
    };
    let config = original.config();
    let experts = config.num_local_experts;
    let mut scores = Scores(vec![vec![(0.0, 0); experts]; config.num_hidden_layers]);
    Forward::new(&original).run(&read(&source, tokens, Pick::Spread)?.sequences, &mut scores)?;
    let dropped = (share.parse::<f64>()? * experts as f64).round() as usize;
    let count = experts.saturating_sub(dropped).max(config.num_experts_per_tok);
    let kept: Vec<Vec<usize>> = scores.0.iter().map(|layer| best(layer, count)).collect();

    let out = Path::new(out);
    write(&original, &kept, out)?;
    let pruned = Checkpoint::open(out)?;
    let mut logits = Vec::new();
    for text in texts {
        let windows = read(&TextSource::File(text.into()), evaluation_tokens, Pick::First)?;
        let (outcome, findings) = outcome::run(&original, &pruned, &windows, &Cpu, &Silent)?;
        if let Some(finding) = findings.first() {
            return Err(finding.to_string().into());
        }
        logits.push(outcome.logits);
    }
    let removed_params = original.size().params - pruned.size().params;
    println!("{}", serde_json::json!({ "removed_params": removed_params, "kept": kept, "logits": logits }));
    Ok(())
}

/// By layer and expert: Σ g·‖y‖, and the number of routed tokens.
struct Scores(Vec<Vec<(f64, usize)>>);

impl Observer for Scores {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let (sum, routed_tokens) = &mut self.0[batch.layer][batch.expert];
        let hidden_size = batch.y.len() / batch.tokens.len();
        for (g, y) in batch.weights.iter().zip(batch.y.chunks_exact(hidden_size)) {
            *sum += f64::from(*g) * y.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>().sqrt();
        }
        *routed_tokens += batch.tokens.len();
    }
}

/// The experts with the largest mean, in rising order.
fn best(layer: &[(f64, usize)], count: usize) -> Vec<usize> {
    let mean = |expert: usize| layer[expert].0 / layer[expert].1.max(1) as f64;
    let mut order: Vec<usize> = (0..layer.len()).collect();
    order.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// The model without the experts that are not kept; the others are numbered anew.
fn write(original: &Checkpoint, kept: &[Vec<usize>], out: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(out)?;
    let mut config = original.config_json().clone();
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if let Some(count) = config.get_mut(key) {
            *count = kept[0].len().into();
        }
    }
    std::fs::write(out.join(format::CONFIG_FILE), serde_json::to_string_pretty(&config)?)?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for spec in original.specs() {
        let tensor = original.read_tensor(spec)?;
        if let Role::Expert(id) = spec.role {
            if let Some(expert) = kept[id.layer].iter().position(|&kept| kept == id.expert) {
                tensors
                    .insert(original.config().tensor(Role::Expert(MatrixId { expert, ..id })).name, tensor);
            }
            continue;
        }
        let tensor = match spec.role {
            Role::Router { layer } | Role::RouterBias { layer } => rows(&tensor, &kept[layer])?,
            _ => tensor,
        };
        tensors.insert(spec.name.clone(), tensor);
    }
    let views: BTreeMap<&String, TensorView<'_>> = tensors
        .iter()
        .map(|(name, tensor)| {
            let dtype = match tensor.dtype() {
                Dtype::F32 => safetensors::Dtype::F32,
                Dtype::F16 => safetensors::Dtype::F16,
                Dtype::Bf16 => safetensors::Dtype::BF16,
            };
            Ok((name, TensorView::new(dtype, tensor.shape().to_vec(), tensor.bytes())?))
        })
        .collect::<Result<_, safetensors::SafeTensorError>>()?;
    Ok(serialize_to_file(views, None, &out.join("model.safetensors"))?)
}

/// Some rows of a matrix, or some entries of a vector.
fn rows(matrix: &Tensor, kept: &[usize]) -> Result<Tensor, Box<dyn Error>> {
    let row_bytes = matrix.bytes().len() / matrix.shape()[0];
    let row = |&row: &usize| &matrix.bytes()[row * row_bytes..][..row_bytes];
    let bytes = kept.iter().flat_map(row).copied().collect();
    let shape = std::iter::once(kept.len()).chain(matrix.shape()[1..].iter().copied()).collect();
    Ok(Tensor::new(shape, matrix.dtype(), bytes)?)
}
