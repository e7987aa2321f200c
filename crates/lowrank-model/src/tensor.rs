//! A tensor as it lies in a file: little-endian bytes, a dtype and a shape; widened only where it is computed with.

use crate::Dtype;
use half::{bf16, f16};

/// Stored weights, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

/// Bytes that do not fit the shape.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{bytes} bytes cannot be {dtype} {shape:?}")]
pub struct TensorError {
    /// Wanted shape.
    pub shape: Vec<usize>,
    /// Wanted dtype.
    pub dtype: Dtype,
    /// Bytes given.
    pub bytes: usize,
}

impl Tensor {
    /// Takes little-endian bytes.
    pub fn new(shape: Vec<usize>, dtype: Dtype, bytes: Vec<u8>) -> Result<Self, TensorError> {
        let elements = shape.iter().try_fold(1_usize, |product, &dimension| product.checked_mul(dimension));
        match elements.and_then(|elements| elements.checked_mul(dtype.size_bytes() as usize)) {
            Some(expected) if expected == bytes.len() => Ok(Self { shape, dtype, bytes }),
            _ => Err(TensorError { shape, dtype, bytes: bytes.len() }),
        }
    }

    /// Rounds f32 values to a dtype, to nearest even. Values beyond the dtype's range become infinite:
    /// see [`Tensor::first_non_finite`].
    pub fn from_f32(shape: Vec<usize>, dtype: Dtype, values: &[f32]) -> Result<Self, TensorError> {
        // Written into place, which becomes a loop over vectors; collecting an iterator of byte arrays does not.
        let mut bytes = vec![0; values.len() * dtype.size_bytes() as usize];
        match dtype {
            Dtype::F32 => narrow(values, &mut bytes, f32::to_le_bytes),
            Dtype::F16 => narrow(values, &mut bytes, |value| f16::from_f32(value).to_le_bytes()),
            Dtype::Bf16 => narrow(values, &mut bytes, |value| bf16::from_f32(value).to_le_bytes()),
        }
        Self::new(shape, dtype, bytes)
    }

    /// Dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Little-endian bytes, without a copy.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.bytes.len() / self.dtype.size_bytes() as usize
    }

    /// Widens `out.len()` elements from `first` on. Exact: every stored value is an f32.
    ///
    /// # Panics
    /// If the run leaves the tensor.
    pub fn widen(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size_bytes() as usize;
        let bytes = &self.bytes[first * size..(first + out.len()) * size];
        match self.dtype {
            Dtype::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
            Dtype::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
            Dtype::Bf16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*raw)) << 16);
                }
            }
        }
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.widen(0, &mut out);
        out
    }

    /// Index of the first NaN or infinity.
    pub fn first_non_finite(&self) -> Option<usize> {
        first_non_finite(self.dtype, &self.bytes)
    }
}

/// Index of the first NaN or infinity among elements in little-endian bytes: its exponent is all ones.
pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    let short = |exponent: u16| {
        first(bytes.as_chunks().0, |raw: &[u8; 2]| u16::from_le_bytes(*raw) & exponent == exponent)
    };
    match dtype {
        Dtype::F32 => {
            first(bytes.as_chunks().0, |raw: &[u8; 4]| u32::from_le_bytes(*raw) & 0x7f80_0000 == 0x7f80_0000)
        }
        Dtype::F16 => short(0x7c00),
        Dtype::Bf16 => short(0x7f80),
    }
}

/// As `position`, but in runs that become loops over vectors, of which the first that has one is looked through.
fn first<T>(elements: &[T], is: impl Fn(&T) -> bool) -> Option<usize> {
    const RUN: usize = 1024;
    let run =
        elements.chunks(RUN).position(|run| run.iter().fold(false, |any, element| any | is(element)))?;
    elements[run * RUN..].iter().position(is).map(|at| run * RUN + at)
}

fn narrow<const N: usize>(values: &[f32], bytes: &mut [u8], round: impl Fn(f32) -> [u8; N]) {
    for (raw, &value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *raw = round(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_not_finite_is_found_wherever_it_is() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let largest = match dtype {
                Dtype::F16 => 65504.0,
                _ => f32::from_bits(0x7f7f_0000),
            };
            let finite = vec![-largest; 3000];
            let tensor = |values: &[f32]| Tensor::from_f32(vec![values.len()], dtype, values).unwrap();
            assert_eq!(tensor(&finite).first_non_finite(), None);
            for at in [0, 1023, 1024, 2999] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut values = finite.clone();
                    (values[at], values[2999]) = (bad, f32::NAN);
                    assert_eq!(tensor(&values).first_non_finite(), Some(at), "{dtype} {bad}");
                }
            }
        }
    }

    #[test]
    fn widening_and_rounding_agree_with_half() {
        let values = [0.0, -0.0, 1.0, 1.0 / 3.0, -65504.0, 1e-8, 3.0e38];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let tensor = Tensor::from_f32(vec![7], dtype, &values).unwrap();
            let expected: Vec<f32> = match dtype {
                Dtype::F32 => values.to_vec(),
                Dtype::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
                Dtype::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
            };
            assert_eq!(tensor.to_f32(), expected, "{dtype}");
            assert_eq!(tensor.first_non_finite(), (dtype == Dtype::F16).then_some(6));
        }
    }

    #[test]
    fn bytes_that_do_not_fit_the_shape_are_refused() {
        assert!(Tensor::new(vec![2, 3], Dtype::Bf16, vec![0; 11]).is_err());
        assert!(Tensor::new(vec![usize::MAX, 3], Dtype::Bf16, vec![]).is_err());
    }
}
