//! Rotary position embedding (2104.09864), in the "half" convention of transformers: of the first R entries of a head, entry i
//! turns with entry i + R/2, by the angle position · θ^(−2i/R). R is D in most families.
//!
//! A sequence begins at position 0, so its length says whether it is one of the long texts for which some models have other angles.

use lowrank_model::{LongRope, ModelConfig, Rotation, Stretch, Yarn};

/// Which entries turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// i and i + R/2.
    HalfAHeadApart,
    /// 2i and 2i + 1, by the angles of the same i.
    SideBySide,
}

/// cos and sin of every position and pair.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    angles: Angles,
    /// Those of sequences with more than so many tokens, if there are other ones and such sequences.
    of_long: Option<(usize, Angles)>,
    half: usize,
    head_dim: usize,
}

/// cos and sin, [T, R/2] each.
#[derive(Debug, Clone, PartialEq)]
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Angles for sequences of at most `positions` tokens, in f64 and rounded once.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let plain = frequencies(config.rope_theta, config.rotary_dim());
        let half = plain.len();
        let (angles, of_long) = match &config.rotation {
            Rotation::Plain => (Angles::new(&plain, 1.0, positions), None),
            Rotation::Yarn(yarn) => {
                let blended = blend(*yarn, config.rope_theta, &plain);
                (Angles::new(&blended, yarn.amplitude(), positions), None)
            }
            Rotation::Long(LongRope { trained_positions, short, long }) => {
                let of = |stretch: &Stretch, positions: usize| {
                    let divided: Vec<f64> =
                        plain.iter().zip(&stretch.factors).map(|(f, by)| f / by).collect();
                    Angles::new(&divided, stretch.amplitude, positions)
                };
                let is_long = positions > *trained_positions;
                let of_long = is_long.then(|| (*trained_positions, of(long, positions)));
                (of(short, positions.min(*trained_positions)), of_long)
            }
        };
        Self { angles, of_long, half, head_dim: config.head_dim }
    }

    /// The angles of a sequence of so many tokens.
    fn angles_of(&self, tokens: usize) -> &Angles {
        match &self.of_long {
            Some((trained_positions, angles)) if tokens > *trained_positions => angles,
            _ => &self.angles,
        }
    }

    /// cos and sin, [T, R/2] each, the same for sequences of every length; `None` if they are not.
    #[cfg(feature = "cuda")]
    pub(crate) fn tables(&self) -> Option<(&[f32], &[f32])> {
        self.of_long.is_none().then_some((&self.angles.cos, &self.angles.sin))
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
        let Angles { cos, sin } = self.angles_of(x.len() / (heads * width));
        for (position, token) in x.chunks_exact_mut(heads * width).enumerate() {
            let cos = &cos[position * half..][..half];
            let sin = &sin[position * half..][..half];
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

impl Angles {
    fn new(frequencies: &[f64], amplitude: f64, positions: usize) -> Self {
        let (sin, cos) = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .map(|angle| {
                let (sin, cos) = angle.sin_cos();
                ((amplitude * sin) as f32, (amplitude * cos) as f32)
            })
            .unzip();
        Self { cos, sin }
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
        for turning in [8, 4] {
            let angles = Angles::new(&frequencies(1e4, turning), 1.0, 64);
            scores_depend_on_the_distance(&Rope { angles, of_long: None, half: turning / 2, head_dim: 8 });
        }
    }

    #[test]
    fn every_position_of_a_long_text_turns_by_the_angles_of_long_texts() {
        let config = ModelConfig::from_hf_json(&serde_json::json!({
            "model_type": "phimoe", "hidden_size": 128, "rope_theta": 100.0,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 5.0], "short_mscale": 1.5, "long_mscale": 2.0,
                "original_max_position_embeddings": 6
            },
        }))
        .unwrap();
        // The frequencies are 1 and 1/10.
        let turned = |longest: usize, tokens: usize, position: usize| {
            let mut x = [1.0, 1.0, 0.0, 0.0].repeat(tokens);
            Rope::new(&config, longest).turn(&mut x, 1);
            x[position * 4..][..4].to_vec()
        };
        let expected = |amplitude: f64, angles: [f64; 2]| {
            let [a, b] = angles;
            [a.cos(), b.cos(), a.sin(), b.sin()].map(|value| (amplitude * value) as f32)
        };
        for (longest, tokens, position, expected) in [
            (6, 6, 5, expected(1.5, [5.0, 0.25])),
            (7, 6, 5, expected(1.5, [5.0, 0.25])),
            (7, 7, 5, expected(2.0, [1.25, 0.1])),
            (7, 7, 6, expected(2.0, [1.5, 0.12])),
            (9, 8, 1, expected(2.0, [0.25, 0.02])),
        ] {
            let turned = turned(longest, tokens, position);
            let near = turned.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(near, "{longest} {tokens} {position}: {turned:?} {expected:?}");
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
