//! Rotary position embedding (2104.09864), in the "half" convention of transformers: of the first R entries of a head, entry i
//! turns with entry i + R/2, by the angle position · θ^(−2i/R). R is D in most families.

use lowrank_model::{ModelConfig, Yarn};

/// Which entries turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// i and i + R/2.
    HalfAHeadApart,
    /// 2i and 2i + 1, by the angles of the same i.
    SideBySide,
}

/// cos and sin of every position and pair, [T, R/2] each.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    head_dim: usize,
}

impl Rope {
    /// Angles for `positions` positions, in f64 and rounded once.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let turning = config.rotary_dim();
        let plain = frequencies(config.rope_theta, turning);
        match config.yarn {
            None => Self::of(&plain, 1.0, config.head_dim, positions),
            Some(yarn) => {
                let blended = blend(yarn, config.rope_theta, &plain);
                Self::of(&blended, yarn.amplitude(), config.head_dim, positions)
            }
        }
    }

    fn of(frequencies: &[f64], amplitude: f64, head_dim: usize, positions: usize) -> Self {
        let (sin, cos) = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .map(|angle| {
                let (sin, cos) = angle.sin_cos();
                ((amplitude * sin) as f32, (amplitude * cos) as f32)
            })
            .unzip();
        Self { cos, sin, half: frequencies.len(), head_dim }
    }

    /// cos and sin, [T, R/2] each.
    #[cfg(feature = "cuda")]
    pub(crate) fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Turns the beginning of every head of x [T, heads · D] by its position.
    pub fn turn(&self, x: &mut [f32], heads: usize) {
        self.turn_from(0, x, (heads, self.head_dim), Pairs::HalfAHeadApart);
    }

    /// Turns the end of every head of x [T, heads · width] by its position.
    pub fn turn_ends(&self, x: &mut [f32], (heads, width): (usize, usize), pairs: Pairs) {
        self.turn_from(width - 2 * self.half, x, (heads, width), pairs);
    }

    fn turn_from(&self, first: usize, x: &mut [f32], (heads, width): (usize, usize), pairs: Pairs) {
        let half = self.half;
        for (position, token) in x.chunks_exact_mut(heads * width).enumerate() {
            let cos = &self.cos[position * half..][..half];
            let sin = &self.sin[position * half..][..half];
            for head in token.chunks_exact_mut(width) {
                let turning = &mut head[first..first + 2 * half];
                for i in 0..half {
                    let (one, other) = match pairs {
                        Pairs::HalfAHeadApart => (i, i + half),
                        Pairs::SideBySide => (2 * i, 2 * i + 1),
                    };
                    let (a, b) = (turning[one], turning[other]);
                    turning[one] = a * cos[i] - b * sin[i];
                    turning[other] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

/// θ^(−2i/R) for every pair.
fn frequencies(theta: f64, turning: usize) -> Vec<f64> {
    (0..turning / 2).map(|i| theta.powf(-2.0 * i as f64 / turning as f64)).collect()
}

/// YaRN: frequencies that turn less than `beta_slow` times within the trained positions are divided by the factor, those that
/// turn more than `beta_fast` times are kept, and between the two pairs a ramp leads from one to the other.
fn blend(yarn: Yarn, theta: f64, plain: &[f64]) -> Vec<f64> {
    let turning = 2.0 * plain.len() as f64;
    // The pair that turns so often.
    let pair_of = |rotations: f64| {
        let positions = yarn.trained_positions as f64;
        turning * (positions / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(turning - 1.0));
    if low == high {
        high += 0.001; // as transformers does
    }
    let one = |(i, frequency): (usize, &f64)| {
        let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        frequency * (divided / yarn.factor + (1.0 - divided))
    };
    plain.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_the_distance_only() {
        for rope in [8, 4].map(|turning| Rope::of(&frequencies(1e4, turning), 1.0, 8, 64)) {
            scores_depend_on_the_distance(&rope);
        }
    }

    fn scores_depend_on_the_distance(rope: &Rope) {
        let dot_at = |i: usize, j: usize| {
            let mut q = vec![0.0; 64 * 8];
            let mut k = vec![0.0; 64 * 8];
            q[i * 8..][..8].copy_from_slice(&[1.0, 2.0, -1.0, 0.5, 0.3, -0.7, 1.1, 0.2]);
            k[j * 8..][..8].copy_from_slice(&[0.4, -1.0, 2.0, 0.1, 0.9, 0.6, -0.3, 1.5]);
            rope.turn(&mut q, 1);
            rope.turn(&mut k, 1);
            (0..8).map(|d| q[i * 8 + d] * k[j * 8 + d]).sum::<f32>()
        };
        assert!((dot_at(5, 2) - dot_at(63, 60)).abs() < 1e-5);
        assert!((dot_at(5, 2) - dot_at(5, 3)).abs() > 1e-2);
    }
}
