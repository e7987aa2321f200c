//! Plans with widths against every possible plan of a small model.

use super::*;
use crate::allocate::{ExpertCandidate, NarrowedErrors};
use lowrank_model::widths::expert_shape;

const F: usize = 6;
const H: usize = 4;

/// Errors of one expert, made up: they fall with the width, and with the rank.
struct Expert {
    spectra: [Spectrum; 3],
    errors: Vec<f64>,
    order: Vec<usize>,
    grid: Vec<NarrowedErrors>,
    measured: [f64; 3],
}

impl Expert {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut next = move || f64::from(rng.next_u32()) / f64::from(u32::MAX);
        let mut falling = |len: usize, by: f64| {
            let mut values: Vec<f64> = (0..len).map(|_| by * next()).collect();
            values.sort_by(|a, b| b.total_cmp(a));
            values
        };
        let spectra = [0, 1, 2].map(|_| Spectrum::new(falling(H, 1.0)).unwrap());
        let mut errors = falling(F, 2.0);
        errors.push(0.0);
        let narrowed = |spectrum: &Spectrum, share: f64| -> Vec<f64> {
            spectrum.tail_energies().iter().map(|error| share * error).collect()
        };
        let grid = [2, 4]
            .map(|width| NarrowedErrors {
                width,
                tails: [0, 1, 2].map(|m: usize| narrowed(&spectra[m], width as f64 / F as f64)),
            })
            .into();
        let order = (0..F).map(|i| (i * 5 + seed as usize) % F).collect();
        Self { spectra, errors, order, grid, measured: [1.0, 0.5, 2.0] }
    }

    fn shape(at: usize, width: usize) -> MatrixShape {
        expert_shape(Projection::ALL[at], width, H)
    }

    /// Every choice as (width, ranks, cost, error), from the definitions.
    fn choices(&self) -> Vec<(u64, f64)> {
        let mut found = Vec::new();
        for width in 1..=F {
            let tails: Option<[Vec<f64>; 3]> = match width {
                F => Some([0, 1, 2].map(|m: usize| self.spectra[m].tail_energies())),
                _ => self.grid.iter().find(|row| row.width == width).map(|row| row.tails.clone()),
            };
            let options = |m: usize| -> Vec<Option<usize>> {
                let ranks = 1..=rank_max_saving(Self::shape(m, width), COST.storage);
                let ranks = ranks.filter(|_| tails.is_some()).map(Some);
                ranks.chain([None]).collect()
            };
            for a in options(0) {
                for b in options(1) {
                    for c in options(2) {
                        let ranks = [a, b, c];
                        let cost = (0..3).map(|m| COST.cost(Self::shape(m, width), ranks[m])).sum();
                        let of_rank = |m: usize| {
                            ranks[m].map_or(0.0, |r| self.measured[m] * tails.as_ref().unwrap()[m][r])
                        };
                        let error = self.measured[1] * self.errors[width] + (0..3).map(of_rank).sum::<f64>();
                        found.push((cost, error));
                    }
                }
            }
        }
        found
    }
}

#[test]
fn no_plan_is_below_the_bound_and_the_plan_is_what_its_rows_say() {
    holds(RankGroups::Matrix);
}

#[test]
fn nor_is_one_that_gives_all_experts_of_a_layer_the_same() {
    holds(RankGroups::Layer);
}

fn holds(rank_groups: RankGroups) {
    for seed in 0..12 {
        let experts = [Expert::new(2 * seed), Expert::new(2 * seed + 1)];
        let matrices: Vec<Candidate<'_>> = (0..6)
            .map(|k| Candidate {
                name: MatrixId { layer: 0, expert: k / 3, projection: Projection::ALL[k % 3] },
                shape: Expert::shape(k % 3, F),
                spectrum: &experts[k / 3].spectra[k % 3],
                measured: experts[k / 3].measured[k % 3],
                choices: Choices::Any,
                element_bytes: None,
            })
            .collect();
        let candidates: Vec<ExpertCandidate<'_>> = experts
            .iter()
            .enumerate()
            .map(|(expert, own)| ExpertCandidate {
                layer: 0,
                expert,
                order: &own.order,
                errors: &own.errors,
                measured: own.measured[1],
                grid: &own.grid,
                ranks: true,
            })
            .collect();
        let dense = 2 * 3 * (F * H) as u64;
        for removed in [10, 33, 50, 80, 110] {
            let request = AllocationRequest {
                family: family(),
                matrices: &matrices,
                experts: &candidates,
                shared_bases: &[],
                target: Target { unit: Unit::Params, remove_at_least: removed },
                cost: COST,
                rank_multiple: 1,
                rank_min: 1,
                sensitivity: Sensitivity::Measured,
                rank_groups,
                before: Size { params: dense + 100, bytes: 2 * (dense + 100) },
            };
            let plan = plans(&request, &[(removed, Allocation::Global)]).unwrap().remove(0).unwrap();
            assert!(plan.removed_params() >= removed, "{removed}: {}", plan.removed_params());
            let optimality = plan.optimality.unwrap();
            let (first, second) = (experts[0].choices(), experts[1].choices());
            let sum = |a: &(u64, f64), b: &(u64, f64)| (a.0 + b.0, a.1 + b.1);
            let all: Vec<(u64, f64)> = match rank_groups {
                RankGroups::Matrix => {
                    first.iter().flat_map(|a| second.iter().map(move |b| sum(a, b))).collect()
                }
                RankGroups::Layer => first.iter().zip(&second).map(|(a, b)| sum(a, b)).collect(),
            };
            let best = all
                .iter()
                .filter(|(cost, _)| dense - cost >= removed)
                .fold(f64::INFINITY, |best, (_, error)| best.min(*error));
            let slack = 1e-12 * best;
            assert!(optimality.lower_bound <= best + slack, "seed {seed}, {removed}");
            assert!(optimality.objective >= best - slack, "seed {seed}, {removed}");

            if rank_groups == RankGroups::Layer {
                let of = |expert: usize| {
                    let rows = plan.matrices.iter().filter(move |row| row.matrix.id.expert == expert);
                    (plan.widths().of(0, expert), rows.map(|row| row.rank).collect::<Vec<_>>())
                };
                assert_eq!(of(0), of(1));
            }
            for row in &plan.matrices {
                let tails =
                    experts[row.matrix.id.expert].spectra[row.matrix.id.projection.index()].tail_energies();
                // A share of the whole's at every width of the grid.
                let expected = row.rank.map_or(0.0, |rank| (tails[rank] / tails[0]).sqrt());
                assert!((row.relative_error.unwrap() - expected).abs() < 1e-12, "{row:?}");
            }

            // The objective and the sizes, from the rows alone.
            let widths = plan.widths();
            let (mut error, mut params) = (0.0, 0);
            for (k, row) in plan.matrices.iter().enumerate() {
                let own = &experts[k / 3];
                let width = widths.of(0, k / 3).unwrap_or(F);
                params += COST.cost(Expert::shape(k % 3, width), row.rank);
                let tails = match width {
                    F => own.spectra[k % 3].tail_energies(),
                    _ => own
                        .grid
                        .iter()
                        .find(|narrowed| narrowed.width == width)
                        .map_or(vec![0.0; H + 1], |narrowed| narrowed.tails[k % 3].clone()),
                };
                error += row.rank.map_or(0.0, |r| own.measured[k % 3] * tails[r]);
                if k % 3 == 0 {
                    error += own.measured[1] * own.errors[width];
                    if let Some(planned) = plan.experts.iter().find(|planned| planned.expert == k / 3) {
                        let mut kept = own.order[..width].to_vec();
                        kept.sort_unstable();
                        assert_eq!(planned.channels.iter().collect::<Vec<_>>(), kept);
                    }
                }
            }
            assert_eq!(dense - params, plan.removed_params());
            assert!((error - optimality.objective).abs() < 1e-9, "{error} {}", optimality.objective);
        }
    }
}
