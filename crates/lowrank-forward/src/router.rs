//! The experts of each token, and the weights of their outputs, by the family's rule.

use crate::math::{sigmoid, softmax};
use lowrank_model::block::{ExpertGroups, Router, Score};
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

/// How logits become a choice.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The family's rule.
    pub rule: Router,
    /// `[E]`, or empty if the rule has none.
    pub bias: Vec<f32>,
    /// k
    pub experts_per_token: usize,
}

impl Routing {
    /// From router logits [N, E]. Of equal scores the lower index wins.
    pub fn new(mut logits: Vec<f32>, experts: usize, choice: &Choice) -> Self {
        let experts_per_token = choice.experts_per_token;
        let slots = logits.len() / experts * experts_per_token;
        let mut routing = Self { experts: vec![0; slots], weights: vec![0.0; slots], experts_per_token };
        let tokens = logits.par_chunks_exact_mut(experts);
        let chosen = routing.experts.par_chunks_exact_mut(experts_per_token);
        let weights = routing.weights.par_chunks_exact_mut(experts_per_token);
        let Router { score, groups, renormalise, scale } = choice.rule;
        tokens.zip(chosen).zip(weights).for_each(|((scores, chosen), weights)| {
            match score {
                Score::Softmax => softmax(scores),
                Score::SigmoidAndBias => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
                Score::SparseMixer { jitter } => return mix_sparsely(scores, jitter, chosen, weights),
            }
            let mut ranked = scores.to_vec();
            choice.bias.iter().zip(&mut ranked).for_each(|(bias, score)| *score += bias);
            keep_best_groups(&mut ranked, groups);
            choose(&ranked, chosen);
            take(scores, chosen, weights, renormalise);
            weights.iter_mut().for_each(|weight| *weight *= scale as f32);
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

/// The places of the largest scores, best first.
fn choose(scores: &[f32], chosen: &mut [usize]) {
    for slot in 0..chosen.len() {
        let (before, rest) = chosen.split_at_mut(slot);
        rest[0] = (0..scores.len())
            .filter(|place| !before.contains(place))
            .reduce(|best, place| if scores[place] > scores[best] { place } else { best })
            .expect("no more are chosen than there are");
    }
}

/// The weights of the chosen; divided by their sum, to which transformers adds 10⁻²⁰, less than a bit of any sum here.
fn take(all: &[f32], chosen: &[usize], weights: &mut [f32], renormalise: bool) {
    for (weight, &expert) in weights.iter_mut().zip(chosen) {
        *weight = all[expert];
    }
    if renormalise {
        let total: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= total);
    }
}

/// The experts one after another, each with its share in a softmax over the logits that are left and near it. How near a logit
/// is, is measured in the larger of its size and the best: what lies between them changes the share by a jump.
fn mix_sparsely(logits: &[f32], jitter: f64, chosen: &mut [usize], weights: &mut [f32]) {
    let nearness = (2.0 * jitter) as f32;
    let mut left = logits.to_vec();
    let mut near = vec![0.0; logits.len()];
    for (expert, weight) in chosen.iter_mut().zip(weights) {
        choose(&left, std::slice::from_mut(expert));
        let best = left[*expert];
        for (near, &left) in near.iter_mut().zip(&left) {
            let far = (best - left) / left.abs().max(best) > nearness;
            *near = if far { f32::NEG_INFINITY } else { left };
        }
        softmax(&mut near);
        *weight = near[*expert];
        left[*expert] = f32::NEG_INFINITY;
    }
}

/// Puts experts outside the best groups out of reach.
fn keep_best_groups(scores: &mut [f32], groups: ExpertGroups) {
    if groups.chosen == groups.count {
        return;
    }
    let size = scores.len() / groups.count;
    let of_group = |group: &[f32]| {
        let mut best = vec![0; groups.scored_by];
        choose(group, &mut best);
        best.iter().map(|&place| group[place]).sum()
    };
    let sums: Vec<f32> = scores.chunks_exact(size).map(of_group).collect();
    let mut kept = vec![0; groups.chosen];
    choose(&sums, &mut kept);
    for (group, scores) in scores.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            scores.fill(f32::NEG_INFINITY);
        }
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
        let config = checkpoint.config();
        let has_bias = config.block.router.has_bias();
        let bias = has_bias.then(|| checkpoint.read_tensor(&config.tensor(Role::RouterBias { layer })));
        let bias = bias.transpose()?.map_or_else(|| vec![0.0; spec.shape[0]], |bias| bias.to_f32());
        let mut rows: BTreeMap<(&[u8], u32), Vec<usize>> = BTreeMap::new();
        let row_bytes = weights.bytes().len() / spec.shape[0].max(1);
        for ((expert, row), bias) in weights.bytes().chunks_exact(row_bytes.max(1)).enumerate().zip(bias) {
            rows.entry((row, bias.to_bits())).or_default().push(expert);
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

    fn softmax_top_2(logits: Vec<f32>, renormalise: bool) -> Routing {
        let rule = Router::softmax(renormalise);
        Routing::new(logits, 4, &Choice { rule, bias: Vec::new(), experts_per_token: 2 })
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let routing = softmax_top_2(vec![1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0], true);
        assert_eq!(routing.experts, [1, 2, 0, 1]);
        assert_eq!(routing.weights, [0.5; 4]);
        assert_eq!(routing.routed_tokens(1), (vec![0, 1], vec![0.5, 0.5]));
        assert_eq!(routing.routed_tokens(3).0, Vec::<usize>::new());
    }

    #[test]
    fn weights_are_the_softmax_over_the_chosen() {
        let routing = softmax_top_2(vec![0.0, 1.0, -1.0, 2.5], true);
        assert_eq!(routing.experts, [3, 1]);
        let expected = 1.0 / (1.0 + (-1.5_f32).exp());
        assert!((routing.weights[0] - expected).abs() < 1e-6);
        assert!((routing.weights[0] + routing.weights[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn without_renormalisation_weights_are_the_softmax_over_all() {
        let logits = vec![0.0_f32, 1.0, -1.0, 2.5];
        let routing = softmax_top_2(logits.clone(), false);
        assert_eq!(routing.experts, [3, 1]);
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        for (weight, expert) in routing.weights.iter().zip([3, 1]) {
            assert!((weight - logits[expert].exp() / total).abs() < 1e-6);
        }
    }

    #[test]
    fn a_bias_chooses_and_weighs_nothing() {
        let groups = ExpertGroups { count: 2, chosen: 1, scored_by: 2 };
        let rule = Router { score: Score::SigmoidAndBias, groups, renormalise: true, scale: 2.5 };
        let score = |logit: f32| 1.0 / (1.0 + (-logit).exp());
        // The best expert is in the other group, whose two best together are less.
        let logits = vec![3.0, -4.0, -4.0, 1.0, 0.0, 0.5];
        let choice = Choice { rule, bias: vec![0.0, 0.0, 0.0, 0.0, 0.4, 0.0], experts_per_token: 2 };
        let routing = Routing::new(logits.clone(), 6, &choice);
        assert_eq!(routing.experts, [4, 3]);
        let total = score(0.0) + score(1.0);
        for (weight, expert) in routing.weights.iter().zip([4, 3]) {
            assert!((weight - 2.5 * score(logits[expert]) / total).abs() < 1e-6);
        }
    }

    fn sparse_mixer(logits: &[f32], jitter: f64) -> Routing {
        let rule = Router { score: Score::SparseMixer { jitter }, ..Router::softmax(false) };
        Routing::new(logits.to_vec(), logits.len(), &Choice { rule, bias: Vec::new(), experts_per_token: 2 })
    }

    #[test]
    fn each_choice_of_a_sparse_mixer_has_a_softmax_over_what_is_left_and_near() {
        // 0.99 is within 2 % of 1; 0.97 is within that neither of 1 nor of 0.99.
        let routing = sparse_mixer(&[0.97, -3.0, 1.0, 0.99], 0.01);
        assert_eq!(routing.experts, [2, 3]);
        let share = |others: &[f32]| 1.0 / (1.0 + others.iter().map(|other| other.exp()).sum::<f32>());
        assert!((routing.weights[0] - share(&[-0.01])).abs() < 1e-6);
        assert_eq!(routing.weights[1], 1.0);
        let wide = sparse_mixer(&[0.97, -3.0, 1.0, 0.99], 0.02);
        assert!((wide.weights[0] - share(&[-0.03, -0.01])).abs() < 1e-6);
        assert!((wide.weights[1] - share(&[-0.02])).abs() < 1e-6);
    }

    #[test]
    fn nearness_to_a_negative_logit_is_measured_by_the_other() {
        // (−1 + 1.02) / 1.02 < 0.02 < (−1 + 1.03) / 1.03
        let routing = sparse_mixer(&[-1.02, -1.0, -1.03, -9.0], 0.01);
        assert_eq!(routing.experts, [1, 0]);
        assert!((routing.weights[0] - 1.0 / (1.0 + (-0.02_f32).exp())).abs() < 1e-6);
        assert!((routing.weights[1] - 1.0 / (1.0 + (-0.01_f32).exp())).abs() < 1e-6);
    }

    #[test]
    fn equal_logits_of_a_sparse_mixer_share_and_a_nan_stays() {
        let routing = sparse_mixer(&[0.0, 0.0, -1.0], 0.0);
        assert_eq!((&routing.experts[..], &routing.weights[..]), (&[0, 1][..], &[0.5, 1.0][..]));
        assert!(sparse_mixer(&[f32::NAN; 3], 0.01).weights.iter().all(|weight| weight.is_nan()));
    }

    #[test]
    fn a_group_may_score_by_its_best_expert_alone() {
        let logits = vec![3.0_f32, -4.0, -4.0, 2.2, 2.6, 2.0];
        let chosen = |scored_by| {
            let groups = ExpertGroups { count: 2, chosen: 1, scored_by };
            let rule = Router { groups, scale: 16.0, ..Router::softmax(false) };
            Routing::new(logits.clone(), 6, &Choice { rule, bias: Vec::new(), experts_per_token: 2 })
        };
        assert_eq!(chosen(2).experts, [4, 3]);
        let routing = chosen(1);
        assert_eq!(routing.experts, [0, 1]);
        // Experts out of reach take their part of the softmax.
        let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
        assert!((routing.weights[0] - 16.0 * logits[0].exp() / total).abs() < 1e-5);
    }
}
