//! The experts of each token, and the weights of their outputs, by the family's rule.

use crate::math::softmax;
use lowrank_model::block::Router;
use lowrank_model::names::Role;
use lowrank_reader::{Checkpoint, ReadError};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The choice of every token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// [N, k], best first.
    pub experts: Vec<usize>,
    /// [N, k]
    pub weights: Vec<f32>,
    /// k.
    pub experts_per_token: usize,
}

impl Routing {
    /// From router logits [N, E]. Of equal probabilities the lower index wins.
    pub fn new(mut logits: Vec<f32>, experts: usize, rule: Router, experts_per_token: usize) -> Self {
        let Router::SoftmaxTopK { renormalise } = rule;
        let slots = logits.len() / experts * experts_per_token;
        let mut routing = Self { experts: vec![0; slots], weights: vec![0.0; slots], experts_per_token };
        let tokens = logits.par_chunks_exact_mut(experts);
        let chosen = routing.experts.par_chunks_exact_mut(experts_per_token);
        let weights = routing.weights.par_chunks_exact_mut(experts_per_token);
        tokens.zip(chosen).zip(weights).for_each(|((probabilities, chosen), weights)| {
            softmax(probabilities);
            for (slot, weight) in weights.iter_mut().enumerate() {
                let (before, rest) = chosen.split_at_mut(slot);
                rest[0] = (0..experts)
                    .filter(|expert| !before.contains(expert))
                    .reduce(
                        |best, expert| {
                            if probabilities[expert] > probabilities[best] { expert } else { best }
                        },
                    )
                    .expect("a token is routed to at most as many experts as there are");
                *weight = probabilities[rest[0]];
            }
            if renormalise {
                let total: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= total);
            }
        });
        routing
    }

    /// Tokens that are routed to an expert, rising, and their weights.
    pub fn routed_tokens(&self, expert: usize) -> (Vec<usize>, Vec<f32>) {
        let slots = self.experts.iter().zip(&self.weights).enumerate();
        slots
            .filter(|(_, (chosen, _))| **chosen == expert)
            .map(|(slot, (_, &weight))| (slot / self.experts_per_token, weight))
            .unzip()
    }
}

/// Says, in one line, which routers cannot tell some of their experts apart, as rows of their weights are equal. Equal
/// probabilities decide nothing: here the lower index wins, `torch.topk` may choose another, on each device its own.
/// `None` if every router can.
pub fn indistinct(checkpoint: &Checkpoint) -> Result<Option<String>, ReadError> {
    const LAYERS_SHOWN: usize = 4;
    let mut layers = Vec::new();
    for spec in checkpoint.specs() {
        let Role::Router { layer } = spec.role else { continue };
        let weights = checkpoint.read_tensor(spec)?;
        let mut rows: BTreeMap<&[u8], Vec<usize>> = BTreeMap::new();
        let row_bytes = weights.bytes().len() / spec.shape[0].max(1);
        for (expert, row) in weights.bytes().chunks_exact(row_bytes.max(1)).enumerate() {
            rows.entry(row).or_default().push(expert);
        }
        let mut alike: Vec<_> = rows.into_values().filter(|experts| experts.len() > 1).collect();
        alike.sort();
        if !alike.is_empty() {
            let groups: Vec<_> = alike
                .iter()
                .map(|experts| experts.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
                .collect();
            layers.push(format!(
                "the router of layer {layer} cannot tell experts {} apart",
                groups.join(" nor ")
            ));
        }
    }
    if layers.len() > LAYERS_SHOWN {
        let more = layers.len() - LAYERS_SHOWN;
        layers.truncate(LAYERS_SHOWN);
        layers.push(format!("nor can the routers of {more} more layers"));
    }
    Ok((!layers.is_empty()).then(|| {
        format!(
            "{}: their rows are equal, so which of them a token goes to is arbitrary and another program may choose others",
            layers.join("; ")
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RENORMALISED: Router = Router::SoftmaxTopK { renormalise: true };

    #[test]
    fn ties_go_to_the_lower_index() {
        let routing = Routing::new(vec![1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0], 4, RENORMALISED, 2);
        assert_eq!(routing.experts, [1, 2, 0, 1]);
        assert_eq!(routing.weights, [0.5; 4]);
        assert_eq!(routing.routed_tokens(1), (vec![0, 1], vec![0.5, 0.5]));
        assert_eq!(routing.routed_tokens(3).0, Vec::<usize>::new());
    }

    #[test]
    fn weights_are_the_softmax_over_the_chosen() {
        let routing = Routing::new(vec![0.0, 1.0, -1.0, 2.5], 4, RENORMALISED, 2);
        assert_eq!(routing.experts, [3, 1]);
        let expected = 1.0 / (1.0 + (-1.5_f32).exp());
        assert!((routing.weights[0] - expected).abs() < 1e-6);
        assert!((routing.weights[0] + routing.weights[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn without_renormalisation_weights_are_the_softmax_over_all() {
        let logits = vec![0.0_f32, 1.0, -1.0, 2.5];
        let routing = Routing::new(logits.clone(), 4, Router::SoftmaxTopK { renormalise: false }, 2);
        assert_eq!(routing.experts, [3, 1]);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        for (weight, expert) in routing.weights.iter().zip([3, 1]) {
            assert!((weight - logits[expert].exp() / total).abs() < 1e-6);
        }
    }
}
