//! Errors of widths by least squares on the activations themselves, without a second moment: QR of the kept channels.

use super::*;
use crate::randomized::generator;
use crate::test_support::{uniform, wide};
use lowrank_compute::{Faer, Kernels};
use lowrank_model::Dtype;
use std::collections::BTreeSet;

/// An expert's activations as columns of Z [F, n], each times its router weight.
struct Case {
    w2: Tensor,
    activations: Array2<f64>,
    ridge: f64,
}

impl Case {
    /// Activations that are correlated and of very different size.
    fn new((h, f): (usize, usize), tokens: usize, ridge: f64, seed: u64) -> Self {
        let mut rng = generator(seed, 6);
        let weights: Vec<f32> = uniform(h, f, &mut rng).iter().map(|&value| value as f32).collect();
        let turn = Array2::eye(f) + 0.3 * uniform(f, f, &mut rng);
        let mut activations = turn.dot(&uniform(f, tokens, &mut rng));
        for (i, mut row) in activations.rows_mut().into_iter().enumerate() {
            row *= 3.0 * 0.85_f64.powi((i * 7 % f) as i32);
        }
        Self { w2: Tensor::from_f32(vec![h, f], Dtype::F32, &weights).unwrap(), activations, ridge }
    }

    fn second_moment(&self) -> Array2<f64> {
        self.activations.dot(&self.activations.t())
    }

    fn channels(&self) -> Channels<f64> {
        Channels::<f64>::new(&self.w2, self.second_moment().view(), self.ridge).unwrap()
    }

    /// w2 fitted to some channels of the original, with the ridge of all of them.
    fn fitted(&self, kept: &[usize]) -> Array2<f64> {
        let z = self.activations.select(Axis(0), kept);
        let cross = wide(&self.w2).dot(&self.activations).dot(&z.t());
        let own = z.dot(&z.t());
        let columns = wide(&self.w2).select(Axis(1), kept);
        let mean = |moment: &Array2<f64>| moment.diag().sum() / moment.nrows() as f64;
        let size = self.activations.nrows();
        let ridge = self.ridge.max((size * size) as f64 * f64::EPSILON);
        let ridge = ridge * mean(&self.second_moment()) / mean(&own);
        fit_columns::<f64>(cross.view(), own.view(), columns.view(), ridge).unwrap()
    }

    /// Z with columns that have the ridge as their second moment.
    fn stacked(&self) -> Array2<f64> {
        let size = self.activations.nrows();
        let mean = self.activations.iter().map(|value| value * value).sum::<f64>() / size as f64;
        let floor = (size * size) as f64 * f64::EPSILON;
        let ridge = (self.ridge.max(floor) * mean).sqrt() * Array2::eye(size);
        ndarray::concatenate![Axis(1), self.activations, ridge]
    }

    /// min over W of ‖W₂ Z − W Z_S‖²: what is left of the rows of W₂ Z beside the span of the rows of Z_S.
    fn error(&self, kept: &[usize]) -> f64 {
        let stacked = self.stacked();
        let wanted = wide(&self.w2).dot(&stacked);
        if kept.is_empty() {
            return energy(&wanted);
        }
        let kernels: &dyn Kernels<f64> = &Faer;
        let basis = kernels.thin_qr(stacked.select(Axis(0), kept).t().to_owned()).unwrap();
        energy(&(&wanted - &wanted.dot(&basis).dot(&basis.t())))
    }
}

fn energy(matrix: &Array2<f64>) -> f64 {
    matrix.iter().map(|value| value * value).sum()
}

fn near(found: f64, expected: f64, scale: f64) {
    assert!((found - expected).abs() <= 1e-9 * scale, "{found} is not {expected}");
}

fn cases() -> Vec<Case> {
    vec![
        Case::new((6, 20), 200, 0.0, 1),
        Case::new((6, 20), 200, 0.03, 2),
        Case::new((24, 16), 60, 0.1, 3),
        Case::new((1, 5), 40, 0.01, 4),
        Case::new((7, 1), 9, 0.0, 5),
        // Fewer tokens than channels: the second moment is singular.
        Case::new((8, 24), 10, 0.05, 6),
    ]
}

#[test]
fn the_error_of_every_width_is_that_of_least_squares_on_the_activations() {
    for case in cases() {
        let channels = case.channels();
        let size = channels.order().len();
        assert_eq!(channels.errors().len(), size + 1);
        assert_eq!(channels.errors()[size], 0.0);
        for k in 0..=size {
            near(channels.errors()[k], case.error(&channels.order()[..k]), channels.errors()[0]);
        }
    }
}

#[test]
fn a_width_has_w2_fitted_to_its_channels() {
    for case in cases() {
        let channels = case.channels();
        for k in 1..=channels.order().len() {
            let expected = case.fitted(&channels.order()[..k]);
            let scale = energy(&expected).sqrt();
            let difference = energy(&(&channels.fitted(k) - &expected)).sqrt();
            assert!(difference <= 1e-7 * scale, "{k}: {difference} of {scale}");
        }
    }
}

#[test]
fn in_f32_the_errors_are_those_in_f64_where_there_is_a_ridge() {
    for case in cases().into_iter().filter(|case| case.ridge >= 0.01) {
        let (wide, moment) = (case.channels(), case.second_moment());
        let narrow = Channels::<f32>::new(&case.w2, moment.view(), case.ridge).unwrap();
        for k in 1..=wide.order().len() {
            let expected = case.error(&narrow.order()[..k]);
            assert!((narrow.errors()[k] - expected).abs() <= 1e-5 * wide.errors()[0], "{k}");
            let fitted = case.fitted(&narrow.order()[..k]);
            let difference = &narrow.fitted(k).mapv(f64::from) - &fitted;
            assert!(energy(&difference) <= 1e-8 * energy(&fitted), "{k}");
            // Which of two channels that cost the same goes first may differ, not what it costs.
            assert!((narrow.errors()[k] - wide.errors()[k]).abs() <= 1e-4 * wide.errors()[0], "{k}");
        }
    }
}

#[test]
fn a_singular_second_moment_without_ridge_has_the_errors_of_least_squares() {
    let case = Case::new((8, 24), 10, 0.0, 6);
    let channels = case.channels();
    // The floor of the ridge is far below what is compared.
    for k in 0..=24 {
        let found = channels.errors()[k];
        assert!((found - case.error(&channels.order()[..k])).abs() <= 1e-6 * channels.errors()[0]);
    }
    assert!(channels.errors()[12] < 1e-6 * channels.errors()[0], "ten tokens need ten channels");
}

#[test]
fn the_order_starts_from_what_deleting_each_channel_costs() {
    for case in cases() {
        let size = case.activations.nrows();
        let channels = case.channels();
        let all: BTreeSet<usize> = channels.order().iter().copied().collect();
        assert_eq!(all, (0..size).collect(), "a permutation");
        let without = |i: usize| {
            let kept: Vec<usize> = (0..size).filter(|&j| j != i).collect();
            case.error(&kept)
        };
        let costs: Vec<f64> = (0..size).map(without).collect();
        // The first stage drops half, the dearest of them first.
        let dropped = &channels.order()[size / 2..];
        let scale = channels.errors()[0];
        for pair in dropped.windows(2) {
            assert!(costs[pair[0]] >= costs[pair[1]] - 1e-9 * scale, "{pair:?}");
        }
        for &kept in &channels.order()[..size / 2] {
            assert!(costs[kept] >= costs[dropped[0]] - 1e-9 * scale, "{kept}");
        }
    }
}

#[test]
fn later_stages_compare_what_is_left() {
    // Channels 0 and 1 are twins, so either costs nothing to drop at first; one of them must stay before the small ones.
    let (h, f, tokens) = (4, 8, 100);
    let mut rng = generator(9, 6);
    let weights: Vec<f32> = uniform(h, f, &mut rng).iter().map(|&value| value as f32).collect();
    let mut activations = 0.2 * uniform(f, tokens, &mut rng);
    let twin = 5.0 * uniform(1, tokens, &mut rng);
    activations.row_mut(0).assign(&twin.row(0));
    activations.row_mut(1).assign(&twin.row(0));
    let w2 = Tensor::from_f32(vec![h, f], Dtype::F32, &weights).unwrap();
    let case = Case { w2, activations, ridge: 1e-3 };
    let channels = case.channels();
    let best_without_twins = case.error(&[2, 3, 4, 5, 6, 7]);
    assert!(best_without_twins > 100.0 * channels.errors()[7]);
}

#[test]
fn no_other_columns_of_w2_are_better_than_the_fitted_ones() {
    let mut rng = generator(7, 6);
    for case in cases() {
        let channels = case.channels();
        let (stacked, w2) = (case.stacked(), wide(&case.w2));
        let wanted = w2.dot(&stacked);
        for k in 1..=channels.order().len() {
            let given = stacked.select(Axis(0), &channels.order()[..k]);
            let fitted = case.fitted(&channels.order()[..k]);
            assert_eq!(fitted.dim(), (w2.nrows(), k));
            let least = energy(&(&wanted - &fitted.dot(&given)));
            near(least, channels.errors()[k], channels.errors()[0]);
            for size in [1e-3, 1.0] {
                let other = &fitted + &(size * uniform(w2.nrows(), k, &mut rng));
                assert!(energy(&(&wanted - &other.dot(&given))) > least);
            }
        }
    }
}

#[test]
fn the_outputs_of_a_width_and_what_it_misses_add_up() {
    let case = Case::new((6, 20), 200, 0.03, 2);
    let channels = case.channels();
    let outputs = wide(&case.w2).dot(&case.stacked());
    let moment = outputs.dot(&outputs.t());
    let (outputs, scale) = channels.outputs();
    let found = outputs.dot(&outputs.t()) * scale;
    assert!(energy(&(&found - &moment)) < 1e-18 * energy(&moment));
    for k in 1..20 {
        let left = scale * energy(&outputs.slice(s![.., ..k]).to_owned());
        near(left + channels.errors()[k], moment.diag().sum(), moment.diag().sum());
    }
}

#[test]
fn channels_that_never_fire_go_first_and_cost_nothing() {
    let mut case = Case::new((6, 20), 200, 0.0, 8);
    for i in [3, 11] {
        case.activations.row_mut(i).fill(0.0);
    }
    let channels = case.channels();
    let last: BTreeSet<usize> = channels.order()[18..].iter().copied().collect();
    assert_eq!(last, BTreeSet::from([3, 11]));
    assert!(channels.errors()[18] <= 1e-9 * channels.errors()[0]);
}

#[test]
fn without_tokens_channels_are_ordered_by_their_weights() {
    let case = Case::new((6, 20), 200, 0.03, 2);
    let nothing = Array2::zeros((20, 20));
    let channels = Channels::<f64>::new(&case.w2, nothing.view(), 0.03).unwrap();
    let w2 = wide(&case.w2);
    let size = |&i: &usize| w2.column(i).dot(&w2.column(i));
    let sizes: Vec<f64> = channels.order().iter().map(size).collect();
    assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1]));
    let columns = w2.select(Axis(1), &channels.order()[..5]);
    let zeros = Array2::zeros((5, 5));
    assert_eq!(fit_columns::<f64>(columns.view(), zeros.view(), columns.view(), 0.03).unwrap(), columns);
}

#[test]
fn a_larger_scale_of_the_text_changes_only_the_scale_of_the_errors() {
    let case = Case::new((6, 20), 200, 0.03, 2);
    let (one, many) = (case.channels(), {
        let moment = case.second_moment() * 2.0_f64.powi(40);
        Channels::<f64>::new(&case.w2, moment.view(), 0.03).unwrap()
    });
    assert_eq!(one.order(), many.order());
    for (a, b) in one.errors().iter().zip(many.errors()) {
        near(*b, a * 2.0_f64.powi(40), many.errors()[0]);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let case = Case::new((6, 20), 200, 0.03, 2);
    let moment = case.second_moment();
    let of = |moment: &Array2<f64>, ridge| Channels::<f64>::new(&case.w2, moment.view(), ridge).unwrap_err();
    for ridge in [-1e-9, f64::NAN, f64::INFINITY] {
        assert!(matches!(of(&moment, ridge), SvdError::Ridge { .. }), "{ridge}");
    }
    assert!(matches!(of(&Array2::zeros((6, 6)), 0.03), SvdError::MetricShape { .. }));
    let mut spoilt = moment.clone();
    spoilt[[5, 2]] = f64::NAN;
    assert!(matches!(of(&spoilt, 0.03), SvdError::MetricNotFinite { row: 5, col: 2, .. }));
    let mut indefinite = moment.clone();
    indefinite[[4, 4]] = -indefinite.diag().sum() / 3.0;
    assert!(matches!(of(&indefinite, 0.03), SvdError::Indefinite { .. }));
    let columns = wide(&case.w2);
    let cross = Array2::zeros((6, 19));
    let other = fit_columns::<f64>(cross.view(), moment.view(), columns.view(), 0.03).unwrap_err();
    assert!(matches!(other, SvdError::MetricShape { what: "cross moment", .. }));
}
