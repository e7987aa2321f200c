//! Elementwise functions and the row operations built on them.
//!
//! Written so that the compiler can vectorise them: no branches, sums over a fixed number of lanes.

/// Partial sums of a row; fixed, so that results do not depend on the machine's vector width.
const LANES: usize = 16;

/// eˣ to 2 units in the last place for x in [−87, 88]; 0 below, ∞ above, NaN for NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and eʳ by a polynomial (Cephes `expf`).
#[inline]
pub fn exp(x: f32) -> f32 {
    /// 1.5·2²³: adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two pieces, the first exact when multiplied by n.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons rather than min and max: those would swallow a NaN.
    let clamped = if x < -88.0 { -88.0 } else { x };
    let clamped = if clamped > 89.0 { 89.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let polynomial = ((((1.987_569_2e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r
        + 1.666_666_6e-1)
        * r
        + 0.5;
    let e_r = polynomial * r * r + r + 1.0;
    // 2ⁿ in two factors, since n = 128 has no f32 of its own.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |exponent: i32| f32::from_bits((exponent.wrapping_add(127) as u32) << 23);
    let value = e_r * power(half) * power(n.wrapping_sub(half));
    if x < -87.0 { 0.0 } else { value }
}

/// silu(x) = x / (1 + e⁻ˣ).
#[inline]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// σ(x) = 1 / (1 + e⁻ˣ).
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// gate ← silu(gate) ∘ up.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, &up) in gate.iter_mut().zip(up) {
        *gate = silu(*gate) * up;
    }
}

/// y += a·x.
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Σ aᵢ bᵢ, in a fixed number of partial sums.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        sums[i % LANES] += a * b;
    }
    sums.iter().sum()
}

/// Σ f(xᵢ) over [`LANES`] partial sums.
#[inline]
fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    let tail: f32 = rest.iter().map(|&value| f(value)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// out = x / √(mean(x²) + ε) ∘ weight, one token.
pub fn rms_norm(out: &mut [f32], x: &[f32], weight: &[f32], epsilon: f32) {
    let mean_square = lane_sum(x, |value| value * value) / x.len() as f32;
    let scale = 1.0 / (mean_square + epsilon).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = weight * (x * scale);
    }
}

/// out = (x − mean(x)) / √(variance(x) + ε) ∘ weight + bias, one token.
pub fn layer_norm(out: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], epsilon: f32) {
    let mean = lane_sum(x, |value| value) / x.len() as f32;
    let variance = lane_sum(x, |value| (value - mean) * (value - mean)) / x.len() as f32;
    let scale = 1.0 / (variance + epsilon).sqrt();
    for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = weight * ((x - mean) * scale) + bias;
    }
}

/// row ← softmax(row); a NaN anywhere makes every entry NaN.
pub fn softmax(row: &mut [f32]) {
    // Not `f32::max`, which swallows NaN; here a NaN stays unseen too, but then meets the sum.
    let largest = row.iter().fold(f32::NEG_INFINITY, |m, &value| if value > m { value } else { m });
    for value in row.iter_mut() {
        *value = exp(*value - largest);
    }
    let scale = 1.0 / lane_sum(row, |value| value);
    for value in row.iter_mut() {
        *value *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for step in -86_900..=88_700 {
            let x = step as f32 / 1000.0;
            let expected = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - expected) / expected).abs());
        }
        assert!(worst <= 2.0 * f64::from(f32::EPSILON), "{worst}");
    }

    #[test]
    fn exp_knows_the_ends_of_the_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn norms_and_softmax_equal_their_formulas() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![0.0; 37];
        rms_norm(&mut out, &x, &weight, 1e-5);
        let mean: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / 37.0;
        for i in 0..37 {
            let expected = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!((f64::from(out[i]) - expected).abs() < 1e-6);
        }
        let bias: Vec<f32> = (0..37).map(|i| 0.3 - i as f32 * 0.02).collect();
        layer_norm(&mut out, &x, &weight, &bias, 1e-5);
        let mean: f64 = x.iter().map(|&v| f64::from(v)).sum::<f64>() / 37.0;
        let variance: f64 = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 37.0;
        for i in 0..37 {
            let unit = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt();
            assert!((f64::from(out[i]) - unit * f64::from(weight[i]) - f64::from(bias[i])).abs() < 1e-6);
        }
        let mut row = x.clone();
        softmax(&mut row);
        let total: f64 = x.iter().map(|&v| f64::from(v).exp()).sum();
        for i in 0..37 {
            assert!((f64::from(row[i]) - f64::from(x[i]).exp() / total).abs() < 1e-7);
        }
    }

    #[test]
    fn a_nan_is_never_swallowed() {
        let mut row = [1.0, f32::NAN, 2.0];
        softmax(&mut row);
        assert!(row.iter().all(|value| value.is_nan()));
        assert!(silu(f32::NAN).is_nan());
        let mut out = [0.0; 3];
        rms_norm(&mut out, &[1.0, f32::NAN, 2.0], &[1.0; 3], 1e-5);
        assert!(out.iter().all(|value| value.is_nan()));
        layer_norm(&mut out, &[1.0, f32::NAN, 2.0], &[1.0; 3], &[0.0; 3], 1e-5);
        assert!(out.iter().all(|value| value.is_nan()));
    }
}
