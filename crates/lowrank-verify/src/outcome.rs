//! Both models on the same tokens, layer by layer, side by side.
//!
//! One layer of each is in memory at a time. The compressed MoE block runs twice: on the original's inputs (how wrong is
//! this layer alone) and on its own (how wrong has it all become); each expert is read once for both.

use crate::error::VerifyError;
use crate::report::{Finding, FindingKind, LayerError, Logits, ModelComparison};
use lowrank_forward::distribution::{Position, compare, mean_and_error};
use lowrank_forward::{Engine, Forward, Hidden};
use lowrank_model::Progress;
use lowrank_reader::Checkpoint;
use lowrank_text::Windows;
use rayon::prelude::*;

/// Runs both models.
pub fn run(
    original: &Checkpoint,
    compressed: &Checkpoint,
    windows: &Windows,
    engine: &dyn Engine,
    progress: &dyn Progress,
) -> Result<(ModelComparison, Vec<Finding>), VerifyError> {
    let mut outcome = ModelComparison {
        text: windows.info.clone(),
        engine: engine.describe(),
        tokens_per_expert: Vec::new(),
        routing_distance: None,
        layers: Vec::new(),
        logits: None,
    };
    let mut findings = Vec::new();
    let (ours, theirs) = (Forward::on(original, engine), Forward::on(compressed, engine));
    let (mut h_ours, mut h_theirs) = (ours.embed(&windows.sequences)?, theirs.embed(&windows.sequences)?);
    let layers = ours.config().num_hidden_layers;
    progress.start("running both models", layers as u64, "layers");
    for layer in 0..layers {
        let (row, routed) = run_layer(layer, (&ours, &mut h_ours), (&theirs, &mut h_theirs))?;
        outcome.layers.push(row);
        outcome.tokens_per_expert.push(routed);
        progress.advance(1);
        let broken = [("original", &h_ours), ("compressed", &h_theirs)]
            .into_iter()
            .find(|(_, hidden)| hidden.states().iter().any(|value| !value.is_finite()));
        if let Some((model, _)) = broken {
            let detail = format!("the hidden state of the {model} model is NaN or infinite after this layer");
            findings.push(Finding {
                kind: FindingKind::NonFinite,
                name: Some(format!("layer {layer}")),
                detail,
            });
            progress.finish();
            return Ok((outcome, findings));
        }
        if row.local.is_none() || row.propagated.is_none() {
            let detail = "the error of the MoE block or of the hidden state is not finite".to_owned();
            findings.push(Finding {
                kind: FindingKind::NonFinite,
                name: Some(format!("layer {layer}")),
                detail,
            });
        }
    }
    progress.finish();
    match compare_logits((&ours, &h_ours), (&theirs, &h_theirs), windows, progress)? {
        Ok(logits) => outcome.logits = Some(logits),
        Err(finding) => findings.push(finding),
    }
    Ok((outcome, findings))
}

fn run_layer(
    layer: usize,
    (ours, h_ours): (&Forward<'_>, &mut Hidden),
    (theirs, h_theirs): (&Forward<'_>, &mut Hidden),
) -> Result<(LayerError, Vec<u64>), VerifyError> {
    ours.attention(layer, h_ours)?;
    let input = ours.moe_input(layer, h_ours)?; // [N, H]
    let mut routed = vec![0; ours.config().experts_in(layer)];
    ours.route(layer, &input)?.experts.iter().for_each(|&expert| routed[expert] += 1);
    let output = ours.moe(layer, &[&input], &mut ())?.remove(0); // [N, H]

    theirs.attention(layer, h_theirs)?;
    let own_input = theirs.moe_input(layer, h_theirs)?;
    let mut outputs = theirs.moe(layer, &[&input, &own_input], &mut ())?;
    let own_output = outputs.remove(1);
    let local = distance(&output, &outputs[0]);

    ours.add(h_ours, &output);
    theirs.add(h_theirs, &own_output);
    let propagated = distance(h_ours.states(), h_theirs.states());
    Ok((LayerError { layer, local, propagated }, routed))
}

/// See [`ModelComparison::routing_distance`]. Absent if the numbers of experts differ, or no token is routed.
pub fn routing_distance(here: &[Vec<u64>], there: &[Vec<u64>]) -> Option<f64> {
    let shares = |routed: &[u64]| -> Option<Vec<f64>> {
        let total: u64 = routed.iter().sum();
        (total > 0).then(|| routed.iter().map(|&routed| routed as f64 / total as f64).collect())
    };
    if here.is_empty() || here.len() != there.len() {
        return None;
    }
    let (mut sum, mut layers) = (0.0, 0);
    // A layer without experts routes nothing.
    for (here, there) in here.iter().zip(there).filter(|(here, there)| !(here.is_empty() && there.is_empty()))
    {
        let (p, q) = (shares(here)?, shares(there)?);
        if p.len() != q.len() {
            return None;
        }
        sum += p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
        layers += 1;
    }
    (layers > 0).then(|| sum / f64::from(layers))
}

/// ‖y − x‖ / ‖x‖ in f64; 0 for equal vectors, absent when not finite.
fn distance(x: &[f32], y: &[f32]) -> Option<f64> {
    /// Elements that one task sums, so that the result does not depend on the number of threads.
    const RUN: usize = 1 << 16;
    let parts: Vec<(f64, f64)> = x
        .par_chunks(RUN)
        .zip(y.par_chunks(RUN))
        .map(|(x, y)| {
            x.iter().zip(y).fold((0.0, 0.0), |(lost, energy), (&x, &y)| {
                let (x, y) = (f64::from(x), f64::from(y));
                (lost + (x - y) * (x - y), energy + x * x)
            })
        })
        .collect();
    let (lost, energy) = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    let ratio = if lost == 0.0 { 0.0 } else { (lost / energy).sqrt() };
    Some(ratio).filter(|ratio| ratio.is_finite())
}

/// Sums of one sequence.
struct SequenceSums {
    positions: f64,
    kl: f64,
    max_kl: f64,
    same_top1: f64,
    predicted: f64,
    losses: (f64, f64),
}

fn compare_logits(
    (ours, h_ours): (&Forward<'_>, &Hidden),
    (theirs, h_theirs): (&Forward<'_>, &Hidden),
    windows: &Windows,
    progress: &dyn Progress,
) -> Result<Result<Logits, Finding>, VerifyError> {
    let (head_ours, head_theirs) = (ours.head()?, theirs.head()?);
    let v = head_ours.vocab_size();
    progress.start("comparing logits", windows.sequences.len() as u64, "windows");
    let mut sequences = Vec::with_capacity(windows.sequences.len());
    for (sequence, tokens) in windows.sequences.iter().enumerate() {
        let (p, q) = (head_ours.logits(h_ours, sequence)?, head_theirs.logits(h_theirs, sequence)?); // [T, V]
        let positions: Vec<Position> = p
            .par_chunks_exact(v)
            .zip(q.par_chunks_exact(v))
            .enumerate()
            .map(|(t, (p, q))| compare(p, q, tokens.get(t + 1).copied()))
            .collect();
        let finite = |position: &Position| {
            position.kl.is_finite() && position.losses.is_none_or(|(p, q)| p.is_finite() && q.is_finite())
        };
        if let Some(t) = positions.iter().position(|position| !finite(position)) {
            progress.finish();
            let detail =
                "the logits of a model are NaN or infinite, or give a token no probability".to_owned();
            let name = Some(format!("window {sequence}, position {t}"));
            return Ok(Err(Finding { kind: FindingKind::NonFinite, name, detail }));
        }
        sequences.push(sums(&positions));
        progress.advance(1);
    }
    progress.finish();
    Ok(Ok(summary(&sequences)))
}

fn sums(positions: &[Position]) -> SequenceSums {
    let losses = positions.iter().filter_map(|position| position.losses);
    SequenceSums {
        positions: positions.len() as f64,
        kl: positions.iter().map(|position| position.kl).sum(),
        max_kl: positions.iter().fold(0.0, |largest, position| position.kl.max(largest)),
        same_top1: positions.iter().filter(|position| position.same_top1).count() as f64,
        predicted: losses.clone().count() as f64,
        losses: losses.fold((0.0, 0.0), |sum, loss| (sum.0 + loss.0, sum.1 + loss.1)),
    }
}

fn summary(sequences: &[SequenceSums]) -> Logits {
    let total = |f: &dyn Fn(&SequenceSums) -> f64| sequences.iter().map(f).sum::<f64>();
    let error =
        |f: &dyn Fn(&SequenceSums) -> f64| mean_and_error(&sequences.iter().map(f).collect::<Vec<_>>()).1;
    let (positions, predicted) = (total(&|s| s.positions), total(&|s| s.predicted));
    let (loss_ours, loss_theirs) = (total(&|s| s.losses.0) / predicted, total(&|s| s.losses.1) / predicted);
    let perplexity_ratio = (loss_theirs - loss_ours).exp();
    // d exp(x) = exp(x) dx.
    let loss_error = error(&|s| (s.losses.1 - s.losses.0) / s.predicted);
    Logits {
        mean_kl: total(&|s| s.kl) / positions,
        mean_kl_error: error(&|s| s.kl / s.positions),
        max_kl: sequences.iter().fold(0.0, |largest, s| s.max_kl.max(largest)),
        top1_agreement: total(&|s| s.same_top1) / positions,
        top1_error: error(&|s| s.same_top1 / s.positions),
        perplexity_original: loss_ours.exp(),
        perplexity_compressed: loss_theirs.exp(),
        perplexity_ratio,
        perplexity_ratio_error: loss_error.map(|error| perplexity_ratio * error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_the_share_of_tokens_routed_elsewhere() {
        let here = [vec![3, 1, 0], vec![0, 0, 8]];
        assert_eq!(routing_distance(&here, &here), Some(0.0));
        // A quarter of the first layer's routed, all of the second's.
        let there = [vec![50, 50, 0], vec![1, 1, 0]];
        assert_eq!(routing_distance(&here, &there), Some((0.25 + 1.0) / 2.0));
        assert_eq!(routing_distance(&here, &here[..1]), None);
        assert_eq!(routing_distance(&here, &[vec![1, 1], vec![1, 1]]), None);
        assert_eq!(routing_distance(&here, &[vec![0; 3], vec![1; 3]]), None);
        assert_eq!(routing_distance(&[], &[]), None);
    }
}
