//! The experts of each token, and the weights of their outputs, by the family's rule.

use crate::math::softmax;
use lowrank_model::block::Router;

/// The choice of every token.
#[derive(Debug, Clone, PartialEq)]
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
        let tokens = logits.len() / experts;
        let mut routing = Self {
            experts: Vec::with_capacity(tokens * experts_per_token),
            weights: Vec::with_capacity(tokens * experts_per_token),
            experts_per_token,
        };
        for probabilities in logits.chunks_exact_mut(experts) {
            softmax(probabilities);
            let first = routing.experts.len();
            for _ in 0..experts_per_token {
                let chosen = &routing.experts[first..];
                let best = (0..experts)
                    .filter(|expert| !chosen.contains(expert))
                    .reduce(
                        |best, expert| {
                            if probabilities[expert] > probabilities[best] { expert } else { best }
                        },
                    )
                    .expect("a token is routed to at most as many experts as there are");
                routing.experts.push(best);
            }
            let chosen = routing.experts[first..].iter().map(|&expert| probabilities[expert]);
            let total: f32 = if renormalise { chosen.clone().sum() } else { 1.0 };
            routing.weights.extend(chosen.map(|probability| probability / total));
        }
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
