//! Generated singular values that look like those of trained experts.

use lowrank_model::Spectrum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

/// σ from 1 down to 0.3, as a Marchenko-Pastur floor falls, and a head that falls by a power.
pub fn trained_like(short: usize, rng: &mut ChaCha8Rng) -> Spectrum {
    let mut uniform = || f64::from(rng.next_u32()) / f64::from(u32::MAX);
    let (scale, head, fall) = (0.5 + uniform(), 4.0 + 8.0 * uniform(), 0.4 + 0.3 * uniform());
    let mut sigma: Vec<f64> = (0..short)
        .map(|i| {
            let floor = 1.0 - 0.7 * i as f64 / short as f64 + 1e-4 * uniform();
            scale * floor.hypot(head * (1.0 + i as f64).powf(-fall))
        })
        .collect();
    sigma.sort_unstable_by(|a, b| b.total_cmp(a));
    Spectrum::new(sigma).expect("it falls")
}
