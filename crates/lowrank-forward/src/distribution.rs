//! Two rows of logits over the vocabulary, compared.
//!
//! p = softmax(original), q = softmax(compressed): KL(p ‖ q) = Σ p (log p − log q), in nats. Exponentials are f32 to
//! 2 ulp; differences and sums are f64.

use crate::math::exp;

/// One position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Position {
    /// KL(p ‖ q).
    pub kl: f64,
    /// Both rank the same token first; of equal logits the lower token is first.
    pub same_top1: bool,
    /// −log p and −log q of the token that followed; absent at the end of a window.
    pub losses: Option<(f64, f64)>,
}

/// Compares original and compressed logits `[V]` of one position. Not finite if any logit is not.
pub fn compare(original: &[f32], compressed: &[f32], next: Option<u32>) -> Position {
    let (top_p, top_q) = (first_largest(original), first_largest(compressed));
    let (max_p, max_q) = (original[top_p], compressed[top_q]);
    let (mut total_p, mut total_q, mut weighted) = (0.0_f64, 0.0_f64, 0.0_f64);
    for (&p, &q) in original.iter().zip(compressed) {
        let e = f64::from(exp(p - max_p));
        total_p += e;
        weighted += e * (f64::from(p) - f64::from(q));
        total_q += f64::from(exp(q - max_q));
    }
    let log_p = f64::from(max_p) + total_p.ln();
    let log_q = f64::from(max_q) + total_q.ln();
    let losses = next.map(|token| {
        let token = token as usize;
        (log_p - f64::from(original[token]), log_q - f64::from(compressed[token]))
    });
    // Rounding leaves a few 1e-17 of either sign where the rows are equal.
    let kl = weighted / total_p - log_p + log_q;
    let kl = if kl < 0.0 { 0.0 } else { kl };
    Position { kl, same_top1: top_p == top_q, losses }
}

fn first_largest(row: &[f32]) -> usize {
    let mut best = 0;
    for (index, &value) in row.iter().enumerate() {
        if value > row[best] {
            best = index;
        }
    }
    best
}

/// Mean of per-sequence values and its standard error; no error for a single sequence.
pub fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let error = (values.len() > 1).then(|| {
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (variance / n).sqrt()
    });
    (mean, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_equals_the_definition() {
        let p_logits = [1.5_f32, -2.0, 0.25, 7.0, 6.9];
        let q_logits = [1.0_f32, -1.0, 0.5, 6.0, 6.5];
        let softmax = |logits: &[f32]| -> Vec<f64> {
            let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            logits.iter().map(|&l| f64::from(l).exp() / total).collect()
        };
        let (p, q) = (softmax(&p_logits), softmax(&q_logits));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let position = compare(&p_logits, &q_logits, Some(2));
        assert!((position.kl - kl).abs() < 1e-6, "{} {kl}", position.kl);
        assert!(!position.same_top1);
        let (loss_p, loss_q) = position.losses.unwrap();
        assert!((loss_p + p[2].ln()).abs() < 1e-6 && (loss_q + q[2].ln()).abs() < 1e-6);
    }

    #[test]
    fn equal_rows_have_no_divergence_and_large_logits_do_not_overflow() {
        let row = [500.0_f32, -300.0, 499.0];
        let position = compare(&row, &row, None);
        assert_eq!((position.kl, position.same_top1, position.losses), (0.0, true, None));
    }

    #[test]
    fn a_nan_reaches_the_result() {
        let good = [1.0_f32, 2.0];
        for bad in [[f32::NAN, 1.0], [1.0, f32::INFINITY]] {
            assert!(!compare(&good, &bad, None).kl.is_finite());
            assert!(!compare(&bad, &good, None).kl.is_finite());
        }
    }

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        assert_eq!(mean_and_error(&[3.0]), (3.0, None));
        let (mean, error) = mean_and_error(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(mean, 2.5);
        assert!((error.unwrap() - (5.0_f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
    }
}
