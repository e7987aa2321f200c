//! Layers with and without a shared base, against every set of layers.

use super::*;
use crate::allocate::{BaseCandidate, plans};
use lowrank_model::RankPlan;
use std::collections::BTreeSet;

const LAYERS: usize = 3;
const EXPERTS: usize = 3;

/// A model of three layers whose differences from a base are some share of the matrices.
struct Model {
    matrices: Vec<(MatrixId, Spectrum)>,
    differences: Vec<BTreeMap<MatrixId, Spectrum>>,
}

const SHAPE: MatrixShape = MatrixShape { rows: 12, cols: 9 };

impl Model {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut spectrum = |scale: f64| {
            let mut sigma: Vec<f64> =
                (0..9).map(|_| scale * f64::from(rng.next_u32()) / f64::from(u32::MAX)).collect();
            sigma.sort_by(|a, b| b.total_cmp(a));
            Spectrum::new(sigma).unwrap()
        };
        let ids = || {
            (0..LAYERS * EXPERTS * 3).map(|k| MatrixId {
                layer: k / (3 * EXPERTS),
                expert: k / 3 % EXPERTS,
                projection: Projection::ALL[k % 3],
            })
        };
        let matrices = ids().map(|id| (id, spectrum(1.0))).collect();
        let mut differences = vec![BTreeMap::new(); LAYERS];
        for id in ids() {
            // From layer to layer the experts are less alike.
            differences[id.layer].insert(id, spectrum([0.3, 0.7, 0.9][id.layer]));
        }
        Self { matrices, differences }
    }

    fn plan(&self, removed: u64, bases: &[BaseCandidate<'_>], of_base: &BTreeSet<usize>) -> Option<RankPlan> {
        let spectrum = |id: &MatrixId, own| match of_base.contains(&id.layer) {
            true => &self.differences[id.layer][id],
            false => own,
        };
        let candidates: Vec<Candidate<'_>> = self
            .matrices
            .iter()
            .map(|(id, own)| Candidate {
                name: *id,
                shape: SHAPE,
                spectrum: spectrum(id, own),
                measured: 1.0 + id.layer as f64,
                choices: Choices::Any,
                element_bytes: None,
            })
            .collect();
        let dense = self.matrices.len() as u64 * 108;
        let request = AllocationRequest {
            family: family(),
            matrices: &candidates,
            experts: &[],
            shared_bases: bases,
            target: Target { unit: Unit::Params, remove_at_least: removed },
            cost: COST,
            rank_multiple: 1,
            rank_min: 1,
            sensitivity: Sensitivity::Measured,
            rank_groups: RankGroups::Matrix,
            before: Size { params: dense, bytes: 2 * dense },
        };
        plans(&request, &[(removed, Allocation::Global)]).unwrap().remove(0).ok()
    }
}

#[test]
fn no_set_of_layers_is_below_the_bound_and_few_are_better_than_the_plan() {
    let objective = |plan: &RankPlan| plan.optimality.unwrap().objective;
    let (mut with_some, mut with_none) = (0, 0);
    for seed in 0..20 {
        let model = Model::new(seed);
        let bases: Vec<BaseCandidate<'_>> = (0..LAYERS)
            .map(|layer| BaseCandidate { layer, differences: &model.differences[layer] })
            .collect();
        let dense = model.matrices.len() as u64 * 108;
        for percent in [5, 20, 35, 50, 60] {
            let removed = dense * percent / 100;
            let plan = model.plan(removed, &bases, &BTreeSet::new()).unwrap();
            assert!(plan.removed_params() >= removed && plan.target.unwrap().remove_at_least == removed);
            // Every set of layers, with what their bases cost removed elsewhere.
            let sets = (0_usize..1 << LAYERS)
                .map(|set| (0..LAYERS).filter(|layer| set >> layer & 1 == 1).collect::<BTreeSet<usize>>());
            let best = sets
                .filter_map(|set| model.plan(removed + 3 * 108 * set.len() as u64, &[], &set))
                .map(|plan| objective(&plan))
                .fold(f64::INFINITY, f64::min);
            let proof = plan.optimality.unwrap();
            assert!(proof.lower_bound <= best * (1.0 + 1e-12), "seed {seed}, {percent} %: {proof:?} {best}");
            assert!(proof.objective >= best * (1.0 - 1e-12), "seed {seed}, {percent} %: {proof:?} {best}");
            assert!(proof.objective <= best * 1.1 + 1e-12, "seed {seed}, {percent} %: {proof:?} {best}");
            let alone = model.plan(removed, &[], &BTreeSet::new()).unwrap();
            assert!(proof.objective <= objective(&alone));
            match plan.shared_base_layers.is_empty() {
                true => with_none += 1,
                false => with_some += 1,
            }
            // Errors are of W.
            for row in &plan.matrices {
                let MatrixId { layer, .. } = row.matrix.id;
                let own = &model.matrices.iter().find(|(id, _)| *id == row.matrix.id).unwrap().1;
                let of = match plan.shared_base_layers.contains(&layer) {
                    true => &model.differences[layer][&row.matrix.id],
                    false => own,
                };
                let lost = row.rank.map_or(0.0, |rank| of.tail_energies()[rank]);
                let expected = (lost / own.energy()).sqrt().min(1.0);
                assert!((row.relative_error.unwrap() - expected).abs() < 1e-12, "{row:?}");
            }
        }
    }
    assert!(with_some > 20 && with_none > 10, "{with_some} {with_none}");
}
