//! fp8 weights as DeepSeek stores them: E4M3 (a sign, 4 bits of exponent, 3 of mantissa, no infinity), and beside each matrix a scale for
//! every block of it. They are widened to bf16 while they are read, a few rows at a time: value · scale in f32, rounded once.

use lowrank_model::{Dtype, Tensor};

/// What the name of a matrix ends in where its scales are stored.
pub(crate) const SCALES: &str = "_scale_inv";

/// The scales of a matrix, and how they are laid over it.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Rows and columns of a block; those at the far ends may be smaller.
    pub(crate) sides: [usize; 2],
    /// Row-major.
    pub(crate) scales: Vec<f32>,
}

/// Shape of the scales of a matrix.
pub(crate) fn scales_shape([rows, cols]: [usize; 2], [block_rows, block_cols]: [usize; 2]) -> [usize; 2] {
    [rows.div_ceil(block_rows), cols.div_ceil(block_cols)]
}

impl Blocks {
    /// Whole rows of `cols` elements, from row `first` on, as bf16 in little-endian bytes.
    pub(crate) fn widen(&self, first: usize, cols: usize, elements: &[u8]) -> Vec<u8> {
        let [block_rows, block_cols] = self.sides;
        let values: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8));
        let across = cols.div_ceil(block_cols);
        let mut wide = Vec::with_capacity(elements.len());
        for (row, elements) in elements.chunks_exact(cols).enumerate() {
            let scales = &self.scales[(first + row) / block_rows * across..][..across];
            for (elements, scale) in elements.chunks(block_cols).zip(scales) {
                wide.extend(elements.iter().map(|&code| values[usize::from(code)] * scale));
            }
        }
        let rows = Tensor::from_f32(vec![wide.len()], Dtype::Bf16, &wide);
        rows.expect("as many as the shape says").into_bytes()
    }
}

/// The number that a code stands for.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_format() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xb8, -1.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!(e4m3(0x80).to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn each_block_has_its_scale_and_rows_may_be_read_in_pieces() {
        // 3 × 5 in blocks of 2 × 2: two rows and three columns of scales.
        let blocks = Blocks { sides: [2, 2], scales: vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0] };
        let ones = [0x38; 15];
        let numbers = |bytes: Vec<u8>| -> Vec<f32> {
            Tensor::new(vec![bytes.len() / 2], Dtype::Bf16, bytes).unwrap().to_f32()
        };
        let whole = numbers(blocks.widen(0, 5, &ones));
        assert_eq!(whole[..5], [1.0, 1.0, 2.0, 2.0, 4.0]);
        assert_eq!(whole[10..], [8.0, 8.0, 16.0, 16.0, 32.0]);
        assert_eq!(numbers(blocks.widen(2, 5, &ones[..5])), whole[10..]);
    }
}
