//! Windows of all tokens of the vocabulary in random order.
//!
//! A calibration text lacks tokens that other texts use, and what only they use looks free to whoever measures on it
//! (`docs/research/widths.md`).

use crate::TextInfo;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// `count` windows of `window` tokens, each after `prefix`: the whole vocabulary as often as fits, every time in another
/// order. The same arguments give the same tokens on every machine.
pub fn vocabulary_windows(vocab_size: usize, prefix: &[u32], window: usize, count: usize) -> Vec<Vec<u32>> {
    let room = window.saturating_sub(prefix.len());
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut tokens = Vec::with_capacity(room * count + vocab_size);
    while tokens.len() < room * count && vocab_size > 0 {
        let first = tokens.len();
        tokens.extend(0..vocab_size as u32);
        tokens[first..].shuffle(&mut rng);
    }
    let rows = tokens.chunks_exact(room.max(1)).take(count);
    rows.map(|row| [prefix, row].concat()).collect()
}

/// What they are, for the report.
pub fn vocabulary_info(windows: &[Vec<u32>], window: usize, prefix: &[u32]) -> TextInfo {
    TextInfo {
        source: "the shuffled vocabulary".into(),
        bundled: true,
        sequences: windows.len(),
        tokens: windows.iter().map(Vec::len).sum(),
        window,
        prefix: prefix.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_comes_as_often_as_any_other() {
        let windows = vocabulary_windows(100, &[7], 26, 8);
        assert_eq!(windows.len(), 8);
        assert!(windows.iter().all(|window| window.len() == 26 && window[0] == 7));
        let mut counts = [0; 100];
        windows.iter().flat_map(|window| &window[1..]).for_each(|&token| counts[token as usize] += 1);
        assert_eq!(counts, [2; 100]);
        assert_ne!(windows[0], windows[4], "another order each time");
        assert_eq!(windows, vocabulary_windows(100, &[7], 26, 8));
    }

    #[test]
    fn a_vocabulary_larger_than_the_windows_is_sampled() {
        let windows = vocabulary_windows(32_000, &[], 16, 4);
        let distinct: std::collections::BTreeSet<u32> = windows.iter().flatten().copied().collect();
        assert_eq!(distinct.len(), 64);
        assert!(vocabulary_windows(10, &[], 16, 0).is_empty());
    }
}
