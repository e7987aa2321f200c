//! Row order of rotary projections.
//!
//! Mistral rotates neighbouring rows (2j, 2j + 1) of a head of width d; Hugging Face rotates rows (j, j + d/2). So
//! canonical row p·d/2 + j of a head is stored row 2j + p, for p in {0, 1}: the view(heads, d/2, 2, in).transpose(1, 2)
//! of transformers' conversion script.

/// Brings interleaved rows into canonical order. `row_bytes` · rows = the length of `stored`.
pub(crate) fn deinterleave(stored: &[u8], heads: usize, row_bytes: usize) -> Vec<u8> {
    let half = stored.len() / row_bytes / heads / 2;
    let mut canonical = Vec::with_capacity(stored.len());
    for head in stored.chunks_exact(2 * half * row_bytes) {
        for p in 0..2 {
            for j in 0..half {
                let at = (2 * j + p) * row_bytes;
                canonical.extend_from_slice(&head[at..at + row_bytes]);
            }
        }
    }
    canonical
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_heads_of_width_six_are_deinterleaved() {
        // What numpy says of arange(12).reshape(2, 3, 2).transpose(0, 2, 1).
        let stored: Vec<u8> = (0..12).collect();
        assert_eq!(deinterleave(&stored, 2, 1), [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn rows_stay_whole() {
        let stored = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3];
        assert_eq!(deinterleave(&stored, 1, 3), [0, 0, 0, 2, 2, 2, 1, 1, 1, 3, 3, 3]);
    }
}
