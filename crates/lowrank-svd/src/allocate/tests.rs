//! Properties of every plan, and the true shape of an 8x7B model.

use super::*;
use lowrank_model::plan::{RankGroups, Sensitivity};
use lowrank_model::{MatrixShape, Projection, Spectrum, Storage, Target, Unit};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::time::Instant;

const COST: CostModel =
    CostModel { storage: Storage::Uv, unit: Unit::Params, dense_element_bytes: 2, factor_element_bytes: 2 };

fn family() -> &'static dyn lowrank_model::Family {
    tiny_config().family
}

fn id(k: usize) -> MatrixId {
    MatrixId { layer: k / 6, expert: k / 3 % 2, projection: Projection::ALL[k % 3] }
}

/// A small instance that owns its spectra.
#[derive(Debug, Clone)]
struct Instance {
    matrices: Vec<(MatrixShape, Spectrum, f64, Choices, Option<ElementBytes>)>,
    cost: CostModel,
    rank_multiple: usize,
    rank_min: usize,
    sensitivity: Sensitivity,
    removal_permille: u64,
}

impl Instance {
    fn candidates(&self) -> Vec<Candidate<'_>> {
        let rows = self.matrices.iter().enumerate();
        rows.map(|(k, (shape, spectrum, measured, choices, element_bytes))| Candidate {
            name: id(k),
            shape: *shape,
            spectrum,
            measured: *measured,
            choices: *choices,
            element_bytes: *element_bytes,
        })
        .collect()
    }

    fn dense_cost(&self, unit: Unit) -> u64 {
        let cost = CostModel { unit, ..self.cost };
        self.matrices.iter().map(|(shape, _, _, _, own)| cost.with(*own).cost(*shape, None)).sum()
    }

    fn request<'a>(&self, matrices: &'a [Candidate<'a>]) -> AllocationRequest<'a> {
        let remove_at_least = self.dense_cost(self.cost.unit) * self.removal_permille / 1000;
        AllocationRequest {
            family: family(),
            matrices,
            experts: &[],
            shared_bases: &[],
            target: Target { unit: self.cost.unit, remove_at_least },
            cost: self.cost,
            rank_multiple: self.rank_multiple,
            rank_min: self.rank_min,
            sensitivity: self.sensitivity,
            rank_groups: RankGroups::Matrix,
            before: Size {
                params: self.dense_cost(Unit::Params) + 1000,
                bytes: self.dense_cost(Unit::Bytes) + 4000,
            },
        }
    }

    /// Every permitted choice of a matrix as (rank, cost, error), spelled out again from the definitions.
    fn choices(&self, k: usize) -> Vec<(Option<usize>, u64, f64)> {
        let (shape, spectrum, measured, permitted, own) = &self.matrices[k];
        let model = self.cost.with(*own);
        let weight = match self.sensitivity {
            Sensitivity::Absolute => 1.0,
            Sensitivity::Relative => {
                if spectrum.energy() > 0.0 {
                    1.0 / spectrum.energy()
                } else {
                    0.0
                }
            }
            Sensitivity::Measured => *measured,
        };
        let dense = model.cost(*shape, None);
        let mut choices = Vec::new();
        if !matches!(permitted, Choices::Rank(_)) {
            choices.push((None, dense, 0.0));
        }
        for rank in 1..=rank_max_saving(*shape, self.cost.storage) {
            let cost = model.cost(*shape, Some(rank));
            let permitted = match *permitted {
                Choices::Any => rank >= self.rank_min && rank % self.rank_multiple == 0 && cost < dense,
                Choices::Dense => false,
                Choices::Rank(given) => rank == given,
            };
            if permitted {
                let tail: f64 = spectrum.sigma()[rank..].iter().map(|sigma| sigma * sigma).sum();
                choices.push((Some(rank), cost, weight * tail));
            }
        }
        choices
    }
}

fn sigma(short: usize) -> impl Strategy<Value = Spectrum> {
    // Zeros and repeated values are common.
    prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..4.0_f64], short).prop_map(|mut sigma| {
        sigma.sort_unstable_by(|a, b| b.total_cmp(a));
        Spectrum::new(sigma).unwrap()
    })
}

fn matrix() -> impl Strategy<Value = (MatrixShape, Spectrum, f64, Choices, Option<ElementBytes>)> {
    (1..14_usize, 1..14_usize).prop_flat_map(|(rows, cols)| {
        let shape = MatrixShape { rows, cols };
        // A rank that saves something in every unit and element size that is tried here.
        let given = (1..14_usize).prop_map(move |rank| {
            if 2 * rank * (rows + cols) + 4 * rows.min(cols) < rows * cols {
                Choices::Rank(rank)
            } else {
                Choices::Any
            }
        });
        let choices = prop_oneof![8 => Just(Choices::Any), 1 => Just(Choices::Dense), 2 => given];
        let measured = prop_oneof![Just(0.0), Just(1.0), 1e-6..1e6_f64];
        let bytes = || prop_oneof![Just(2_u64), Just(4)];
        let own = prop_oneof![
            2 => Just(None),
            1 => (bytes(), bytes()).prop_map(|(dense, factor)| Some(ElementBytes { dense, factor })),
        ];
        (Just(shape), sigma(rows.min(cols)), measured, choices, own)
    })
}

fn instance(matrices: usize) -> impl Strategy<Value = Instance> {
    (
        prop::collection::vec(matrix(), 1..=matrices),
        prop_oneof![Just(Storage::Uv), Just(Storage::Pivoted)],
        prop_oneof![Just((Unit::Params, 2, 2)), Just((Unit::Bytes, 4, 2)), Just((Unit::Bytes, 2, 4))],
        1..4_usize,
        1..4_usize,
        prop_oneof![Just(Sensitivity::Absolute), Just(Sensitivity::Relative), Just(Sensitivity::Measured)],
        1..950_u64,
    )
        .prop_map(
            |(matrices, storage, (unit, dense, factor), rank_multiple, rank_min, sensitivity, removal)| {
                Instance {
                    matrices,
                    cost: CostModel {
                        storage,
                        unit,
                        dense_element_bytes: dense,
                        factor_element_bytes: factor,
                    },
                    rank_multiple,
                    rank_min,
                    sensitivity,
                    removal_permille: removal,
                }
            },
        )
}

fn removed(plan: &RankPlan) -> u64 {
    match plan.target.unwrap().unit {
        Unit::Params => plan.removed_params(),
        Unit::Bytes => plan.removed_bytes(),
    }
}

fn check_plan(instance: &Instance, plan: &RankPlan) -> Result<(), TestCaseError> {
    let target = plan.target.unwrap().remove_at_least;
    prop_assert!(removed(plan) >= target);
    let slack = removed(plan) - target;
    prop_assert_eq!(plan.overshoot(), Some(slack));
    let mut objective = 0.0;
    for (k, row) in plan.matrices.iter().enumerate() {
        prop_assert_eq!(row.matrix.id, id(k));
        let choices = instance.choices(k);
        let chosen = choices.iter().find(|(rank, _, _)| *rank == row.rank);
        prop_assert!(chosen.is_some(), "{:?} is not permitted", row);
        let &(_, cost, error) = chosen.unwrap();
        objective += error;
        // No dearer choice of any matrix fits.
        for (rank, dearer, _) in choices.iter().filter(|(_, other, _)| *other > cost) {
            prop_assert!(dearer - cost > slack, "{}: {rank:?} still fits", row.matrix.id);
        }
    }
    let proof = plan.optimality.unwrap();
    prop_assert!((proof.objective - objective).abs() <= 1e-9 * (1.0 + objective));
    prop_assert!(proof.lower_bound <= proof.objective);
    prop_assert!(proof.duality_gap.is_some_and(|gap| gap >= 0.0 && gap.is_finite()));
    Ok(())
}

/// The least total error within the capacity, by trying everything.
fn brute_force(instance: &Instance, k: usize, capacity: u64) -> Option<f64> {
    if k == instance.matrices.len() {
        return Some(0.0);
    }
    let fitting = instance.choices(k).into_iter().filter(|(_, cost, _)| *cost <= capacity);
    fitting
        .filter_map(|(_, cost, error)| Some(error + brute_force(instance, k + 1, capacity - cost)?))
        .min_by(f64::total_cmp)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_budget_is_met_and_not_overspent_by_a_step(instance in instance(9)) {
        let candidates = instance.candidates();
        let request = instance.request(&candidates);
        match allocate(&request) {
            Ok(plan) => check_plan(&instance, &plan)?,
            Err(AllocateError::Infeasible { asked, most, .. }) => {
                prop_assert!(asked > most);
                if most > 0 {
                    let target = Target { remove_at_least: most, ..request.target };
                    let plan = allocate(&AllocationRequest { target, ..request }).unwrap();
                    prop_assert_eq!(removed(&plan), most);
                }
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn the_true_optimum_lies_between_bound_and_plan(instance in instance(4)) {
        let candidates = instance.candidates();
        let request = instance.request(&candidates);
        let capacity = instance.dense_cost(instance.cost.unit) - request.target.remove_at_least;
        let optimum = brute_force(&instance, 0, capacity);
        match allocate(&request) {
            Ok(plan) => {
                let (proof, optimum) = (plan.optimality.unwrap(), optimum.unwrap());
                let rounding = 1e-12 * (1.0 + optimum);
                prop_assert!(proof.lower_bound <= optimum + rounding, "{proof:?} {optimum}");
                prop_assert!(optimum <= proof.objective + rounding, "{proof:?} {optimum}");
            }
            Err(_) => prop_assert_eq!(optimum, None),
        }
    }

    #[test]
    fn the_order_of_the_input_changes_nothing(instance in instance(9), rotation in 0..9_usize) {
        let mut candidates = instance.candidates();
        let straight = allocate(&instance.request(&candidates));
        let by = rotation % candidates.len();
        candidates.rotate_left(by);
        candidates.reverse();
        prop_assert_eq!(straight, allocate(&instance.request(&candidates)));
    }

    #[test]
    fn a_larger_removal_never_has_a_lower_bound_or_beats_the_smaller_one(instance in instance(9), more in 1..300_u64) {
        let larger = Instance { removal_permille: instance.removal_permille + more, ..instance.clone() };
        let candidates = instance.candidates();
        if let (Ok(less), Ok(more)) = (
            allocate(&instance.request(&candidates)),
            allocate(&larger.request(&candidates)),
        ) {
            let (less, more) = (less.optimality.unwrap(), more.optimality.unwrap());
            let rounding = 1e-12 * (1.0 + more.objective);
            prop_assert!(less.lower_bound <= more.lower_bound + rounding);
            prop_assert!(less.lower_bound <= more.objective + rounding);
        }
    }

    #[test]
    fn a_uniform_plan_meets_the_budget_and_obeys_the_same_bound(instance in instance(9)) {
        let candidates = instance.candidates();
        let request = instance.request(&candidates);
        let (best, uniform) = (allocate(&request), uniform_plan(&request));
        prop_assert_eq!(best.is_ok(), uniform.is_ok());
        if let Ok(uniform) = uniform {
            prop_assert!(removed(&uniform) >= request.target.remove_at_least);
            let bound = best.unwrap().optimality.unwrap().lower_bound;
            prop_assert!(uniform.optimality.unwrap().objective >= bound * (1.0 - 1e-12));
        }
    }

    #[test]
    fn plans_made_in_one_walk_are_those_made_alone(
        instance in instance(9),
        permilles in prop::collection::vec((0..1000_u64, any::<bool>()), 0..6),
    ) {
        let candidates = instance.candidates();
        let request = instance.request(&candidates);
        let dense = instance.dense_cost(instance.cost.unit);
        let wish = |&(permille, uniform): &(u64, bool)| {
            (dense * permille / 1000, if uniform { Allocation::Uniform } else { Allocation::Global })
        };
        let wishes: Vec<_> = permilles.iter().map(wish).collect();
        let together = Allocator::new(&request).unwrap().plans(&wishes);
        let alone = wishes.iter().map(|&(remove_at_least, allocation)| {
            let target = Target { remove_at_least, ..request.target };
            let request = AllocationRequest { target, ..request };
            if allocation == Allocation::Uniform { uniform_plan(&request) } else { allocate(&request) }
        });
        prop_assert_eq!(together, alone.collect::<Vec<_>>());
    }
}

#[test]
fn a_given_rank_is_kept_and_one_that_saves_nothing_is_refused() {
    let (shape, spectrum) =
        (MatrixShape { rows: 6, cols: 4 }, Spectrum::new(vec![4.0, 3.0, 2.0, 1.0]).unwrap());
    let of = |k, choices| Candidate {
        name: id(k),
        shape,
        spectrum: &spectrum,
        measured: 1.0,
        choices,
        element_bytes: None,
    };
    let request = |matrices: &[Candidate<'_>], remove_at_least| {
        let size = |element| 100 + element * matrices.len() as u64 * 24;
        allocate(&AllocationRequest {
            family: family(),
            matrices,
            experts: &[],
            shared_bases: &[],
            target: Target { unit: Unit::Params, remove_at_least },
            cost: COST,
            rank_multiple: 2,
            rank_min: 1,
            sensitivity: Sensitivity::Absolute,
            rank_groups: RankGroups::Matrix,
            before: Size { params: size(1), bytes: size(2) },
        })
    };
    // u·v of rank 1 costs 10 of 24; nothing else has to go.
    let plan = request(&[of(0, Choices::Rank(1)), of(1, Choices::Any)], 3).unwrap();
    assert_eq!(plan.matrices.iter().map(|row| row.rank).collect::<Vec<_>>(), [Some(1), None]);
    assert_eq!(plan.optimality.unwrap().objective, 9.0 + 4.0 + 1.0);
    for rank in [0, 3] {
        let refused = request(&[of(0, Choices::Rank(rank))], 3).unwrap_err();
        assert!(matches!(refused, AllocateError::Plan(PlanError::Rank { rank_max: 2, .. })), "{refused}");
    }
    let refused = request(&[of(0, Choices::Rank(1)), of(1, Choices::Dense)], 15).unwrap_err().to_string();
    assert!(
        refused.contains("1 of 2 matrices kept dense and 1 at a given rank") && refused.contains("is 14;"),
        "{refused}"
    );
}

/// σ of a trained expert in shape: a Marchenko-Pastur-like floor from 1 down to 0.3 and a power-law head.
fn trained_like(short: usize, rng: &mut ChaCha8Rng) -> Spectrum {
    let uniform = |rng: &mut ChaCha8Rng| f64::from(rng.next_u32()) / f64::from(u32::MAX);
    let (scale, head, fall) = (0.5 + uniform(rng), 4.0 + 8.0 * uniform(rng), 0.4 + 0.3 * uniform(rng));
    let mut sigma: Vec<f64> = (0..short)
        .map(|i| {
            let floor = 1.0 - 0.7 * i as f64 / short as f64 + 1e-4 * uniform(rng);
            scale * (floor * floor + (head * (1.0 + i as f64).powf(-fall)).powi(2)).sqrt()
        })
        .collect();
    sigma.sort_unstable_by(|a, b| b.total_cmp(a));
    Spectrum::new(sigma).unwrap()
}

fn mixtral() -> Vec<(MatrixId, MatrixShape, Spectrum)> {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let mut matrices = Vec::new();
    for layer in 0..32 {
        for expert in 0..8 {
            for projection in Projection::ALL {
                let shape = match projection {
                    Projection::Down => MatrixShape { rows: 4096, cols: 14336 },
                    _ => MatrixShape { rows: 14336, cols: 4096 },
                };
                let name = MatrixId { layer, expert, projection };
                matrices.push((name, shape, trained_like(4096, &mut rng)));
            }
        }
    }
    matrices
}

const MIXTRAL_PARAMS: u64 = 46_702_792_704;

fn mixtral_request<'a>(matrices: &'a [Candidate<'a>]) -> AllocationRequest<'a> {
    AllocationRequest {
        family: family(),
        matrices,
        experts: &[],
        shared_bases: &[],
        target: Target { unit: Unit::Params, remove_at_least: 10_000_000_000 },
        cost: COST,
        rank_multiple: 1,
        rank_min: 1,
        sensitivity: Sensitivity::Absolute,
        rank_groups: RankGroups::Matrix,
        before: Size { params: MIXTRAL_PARAMS, bytes: 2 * MIXTRAL_PARAMS },
    }
}

fn candidates(matrices: &[(MatrixId, MatrixShape, Spectrum)]) -> Vec<Candidate<'_>> {
    matrices
        .iter()
        .map(|(name, shape, spectrum)| Candidate {
            name: *name,
            shape: *shape,
            spectrum,
            measured: 0.0,
            choices: Choices::Any,
            element_bytes: None,
        })
        .collect()
}

#[test]
fn ten_billion_parameters_of_mixtral_are_planned_within_one_step() {
    let matrices = mixtral();
    let candidates = candidates(&matrices);
    let request = mixtral_request(&candidates);
    for (storage, rank_multiple) in [(Storage::Uv, 1), (Storage::Uv, 8), (Storage::Pivoted, 1)] {
        let request = AllocationRequest { cost: CostModel { storage, ..COST }, rank_multiple, ..request };
        let start = Instant::now();
        let plan = allocate(&request).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        let step = 18_432 * rank_multiple as u64;
        assert_eq!(plan.before.params, MIXTRAL_PARAMS);
        assert_eq!(plan.after.params, MIXTRAL_PARAMS - plan.removed_params());
        assert!(plan.removed_params() >= 10_000_000_000);
        assert!(plan.overshoot().unwrap() < step, "{:?}", plan.overshoot());
        let proof = plan.optimality.unwrap();
        assert!(proof.duality_gap.is_some_and(|gap| (0.0..1e-4).contains(&gap)), "{proof:?}");
        let uniform = uniform_plan(&request).unwrap();
        assert!(proof.objective < uniform.optimality.unwrap().objective);
        let ranks: Vec<usize> = uniform.ranks().into_values().collect();
        match (storage, rank_multiple) {
            (Storage::Uv, 1) => assert_eq!(ranks, [2479; 768]),
            (Storage::Uv, _) => assert_eq!(ranks, [2472; 768]),
            (Storage::Pivoted, _) => assert_eq!(ranks, [2952; 768]),
        }
        println!(
            "{storage:?} multiple {rank_multiple}: {seconds:.3} s, overshoot {:?}, {proof:?}",
            plan.overshoot()
        );
    }
}

fn single(sigma: &[f64], rows: usize, cols: usize, remove: u64) -> Result<RankPlan, AllocateError> {
    let spectrum = Spectrum::new(sigma.to_vec()).unwrap();
    let shape = MatrixShape { rows, cols };
    let matrices = [Candidate {
        name: id(0),
        shape,
        spectrum: &spectrum,
        measured: 1.0,
        choices: Choices::Any,
        element_bytes: None,
    }];
    allocate(&AllocationRequest {
        family: family(),
        matrices: &matrices,
        experts: &[],
        shared_bases: &[],
        target: Target { unit: Unit::Params, remove_at_least: remove },
        before: Size { params: 1000, bytes: 2000 },
        ..mixtral_request(&matrices)
    })
}

#[test]
fn an_impossible_budget_says_exactly_what_is_possible() {
    // Rank 1 of 6×4 costs 10 of 24.
    let sigma = [4.0, 3.0, 2.0, 1.0];
    assert_eq!(single(&sigma, 6, 4, 14).unwrap().ranks().get(&id(0)), Some(&1));
    let error = single(&sigma, 6, 4, 15).unwrap_err();
    assert_eq!(
        error,
        AllocateError::Infeasible {
            asked: 15,
            most: 14,
            unit: Unit::Params,
            rank_floor: 1,
            kept_dense: 0,
            fixed: 0,
            matrices: 1
        }
    );
    assert!(error.to_string().contains("the most that can be removed is 14;"));
    assert!(matches!(single(&sigma, 6, 4, 25), Err(AllocateError::Infeasible { most: 14, .. })));
}

#[test]
fn a_zero_matrix_gives_way_before_any_other() {
    let (zero, flat) = (Spectrum::new(vec![0.0; 8]).unwrap(), Spectrum::new(vec![1.0; 8]).unwrap());
    let shape = MatrixShape { rows: 24, cols: 8 };
    let matrices = [(id(0), &flat), (id(1), &zero), (id(2), &flat)].map(|(name, spectrum)| Candidate {
        name,
        shape,
        spectrum,
        measured: 1.0,
        choices: Choices::Any,
        element_bytes: None,
    });
    for sensitivity in [Sensitivity::Absolute, Sensitivity::Relative, Sensitivity::Measured] {
        let plan = allocate(&AllocationRequest {
            target: Target { unit: Unit::Params, remove_at_least: 100 },
            sensitivity,
            before: Size { params: 576, bytes: 1152 },
            ..mixtral_request(&matrices)
        })
        .unwrap();
        assert_eq!(plan.ranks(), BTreeMap::from([(id(1), 2)]));
        let proof = plan.optimality.unwrap();
        assert_eq!((proof.objective, proof.lower_bound, proof.duality_gap), (0.0, 0.0, Some(0.0)));
    }
}

/// Plans of twelve matrices of one shape and like spectra with the given sensitivities, half of them removed.
fn measured_plan(measured: &[f64]) -> RankPlan {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let shape = MatrixShape { rows: 48, cols: 32 };
    let spectra: Vec<Spectrum> = measured.iter().map(|_| trained_like(32, &mut rng)).collect();
    let matrices: Vec<Candidate<'_>> = spectra
        .iter()
        .zip(measured)
        .enumerate()
        .map(|(k, (spectrum, &measured))| Candidate {
            name: id(k),
            shape,
            spectrum,
            measured,
            choices: Choices::Any,
            element_bytes: None,
        })
        .collect();
    let params = (shape.rows * shape.cols * measured.len()) as u64;
    allocate(&AllocationRequest {
        target: Target { unit: Unit::Params, remove_at_least: params / 2 },
        sensitivity: Sensitivity::Measured,
        before: Size { params, bytes: 2 * params },
        cost: CostModel { storage: Storage::Pivoted, ..COST },
        ..mixtral_request(&matrices)
    })
    .unwrap()
}

/// Ranks in the order of the matrices; dense is the short side.
fn plan_ranks(plan: &RankPlan) -> Vec<usize> {
    plan.matrices.iter().map(|row| row.rank.unwrap_or(32)).collect()
}

#[test]
fn only_the_ratio_of_measured_sensitivities_counts() {
    let measured: Vec<f64> = (0..12).map(|k| 1.0 + f64::from(k % 5)).collect();
    let plan = measured_plan(&measured);
    // A power of two changes no bit of any comparison.
    let scaled = measured_plan(&measured.iter().map(|s| s * 1024.0).collect::<Vec<_>>());
    assert_eq!(plan_ranks(&plan), plan_ranks(&scaled));
    let (proof, scaled) = (plan.optimality.unwrap(), scaled.optimality.unwrap());
    assert_eq!((proof.objective * 1024.0, proof.duality_gap), (scaled.objective, scaled.duality_gap));
    let absolute = measured_plan(&[1.0; 12]);
    assert_ne!(plan_ranks(&plan), plan_ranks(&absolute));
}

#[test]
fn a_matrix_that_matters_more_gets_a_higher_rank_from_the_others() {
    let mut measured = [1.0; 12];
    let before = plan_ranks(&measured_plan(&measured));
    measured[7] = 20.0;
    let after = plan_ranks(&measured_plan(&measured));
    assert!(after[7] > before[7] + 3, "{after:?} for {before:?}");
    let others = |ranks: &[usize]| ranks.iter().sum::<usize>() - ranks[7];
    assert!(others(&after) < others(&before));
}

#[test]
fn matrices_that_do_not_matter_get_the_least_rank_while_others_can_use_more() {
    let mut measured = [1.0; 12];
    measured[2] = 0.0;
    measured[9] = 0.0;
    let ranks = plan_ranks(&measured_plan(&measured));
    assert_eq!((ranks[2], ranks[9]), (1, 1));
    assert!(ranks.iter().enumerate().all(|(k, &rank)| rank > 1 || k == 2 || k == 9), "{ranks:?}");
    // Where nothing matters every plan is as good, and one is made.
    assert_eq!(measured_plan(&[0.0; 12]).optimality.unwrap().objective, 0.0);
}

#[test]
fn what_cannot_be_planned_is_named() {
    let spectrum = Spectrum::new(vec![1.0; 4]).unwrap();
    let shape = MatrixShape { rows: 6, cols: 4 };
    let matrix = Candidate {
        name: id(3),
        shape,
        spectrum: &spectrum,
        measured: 1.0,
        choices: Choices::Any,
        element_bytes: None,
    };
    let twice = [matrix, matrix];
    assert_eq!(allocate(&mixtral_request(&twice)), Err(AllocateError::Duplicate(id(3))));
    let wrong = [Candidate { shape: MatrixShape { rows: 6, cols: 5 }, ..matrix }];
    assert!(matches!(allocate(&mixtral_request(&wrong)), Err(AllocateError::Spectrum { values: 4, .. })));
    let request = AllocationRequest { rank_multiple: 0, ..mixtral_request(&twice[..1]) };
    assert_eq!(allocate(&request), Err(AllocateError::RankMultiple));
    for measured in [-1.0, f64::NAN, f64::INFINITY] {
        let one = [Candidate { measured, ..matrix }];
        let request = AllocationRequest { sensitivity: Sensitivity::Measured, ..mixtral_request(&one) };
        assert!(matches!(allocate(&request), Err(AllocateError::Measured { .. })), "{measured}");
    }
}

fn tiny_config() -> ModelConfig {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny-mixtral/config.json");
    let json = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    ModelConfig::from_hf_json(&json).unwrap()
}

#[test]
fn given_ranks_become_a_plan_or_are_refused_by_name() {
    let config = tiny_config();
    let before = Size { params: 10_000_000, bytes: 20_000_000 };
    let plan =
        plan_from_ranks(&config, &BTreeMap::from([(id(1), 99)]), COST, &BTreeMap::new(), before).unwrap();
    assert_eq!(plan.matrices.len(), 96);
    assert_eq!(plan.removed_params(), 448 * 128 - 99 * 576);
    for (name, rank, expected) in [
        (id(1), 100, "layers.0.experts.0.down [128, 448]: rank 100 is outside 1..=99"),
        (id(1), 0, "rank 0 is outside 1..=99"),
        (MatrixId { layer: 4, ..id(0) }, 5, "layers.4"),
    ] {
        let error = plan_from_ranks(&config, &BTreeMap::from([(name, rank)]), COST, &BTreeMap::new(), before)
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

mod bases;
mod experts;
