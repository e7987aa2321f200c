//! Rotary position embedding (2104.09864), in the "half" convention of transformers: of the first R entries of a head, entry i
//! turns with entry i + R/2, by the angle position · θ^(−2i/R). R is D in most families.

use lowrank_model::ModelConfig;

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
        Self::of(config.rope_theta, config.rotary_dim(), config.head_dim, positions)
    }

    fn of(theta: f64, turning: usize, head_dim: usize, positions: usize) -> Self {
        let half = turning / 2;
        let (sin, cos) = (0..positions)
            .flat_map(|position| (0..half).map(move |i| (position, i)))
            .map(|(position, i)| {
                let angle = position as f64 * theta.powf(-2.0 * i as f64 / turning as f64);
                let (sin, cos) = angle.sin_cos();
                (sin as f32, cos as f32)
            })
            .unzip();
        Self { cos, sin, half, head_dim }
    }

    /// cos and sin, [T, R/2] each.
    #[cfg(feature = "cuda")]
    pub(crate) fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Turns every head of x [T, heads · D] by its position.
    pub fn turn(&self, x: &mut [f32], heads: usize) {
        let half = self.half;
        for (position, token) in x.chunks_exact_mut(heads * self.head_dim).enumerate() {
            let cos = &self.cos[position * half..][..half];
            let sin = &self.sin[position * half..][..half];
            for head in token.chunks_exact_mut(self.head_dim) {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_the_distance_only() {
        for rope in [Rope::of(1e4, 8, 8, 64), Rope::of(1e4, 4, 8, 64)] {
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
