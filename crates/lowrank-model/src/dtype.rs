//! Number formats of stored weights.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A dtype that weights may have. Anything else in a checkpoint is foreign and refused by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum Dtype {
    /// IEEE binary32
    #[cfg_attr(feature = "clap", value(aliases = ["float32", "fp32"]))]
    #[serde(alias = "float32", alias = "fp32")]
    F32,
    /// IEEE binary16
    #[cfg_attr(feature = "clap", value(aliases = ["float16", "fp16"]))]
    #[serde(alias = "float16", alias = "fp16")]
    F16,
    /// The upper half of binary32
    #[cfg_attr(feature = "clap", value(aliases = ["bfloat16"]))]
    #[serde(alias = "bfloat16")]
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The spelling in safetensors headers.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// The spelling in `config.json` (`"dtype"`, `"torch_dtype"`).
    pub const fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The unit roundoff u: rounding to nearest moves a normal number by at most this relative amount.
    pub const fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => 5.960_464_477_539_063e-8,
            Self::F16 => 4.882_812_5e-4,
            Self::Bf16 => 3.906_25e-3,
        }
    }

    /// Reads any of the usual spellings: `bf16`, `bfloat16`, `BF16`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "f32" | "float32" | "fp32" => Some(Self::F32),
            "f16" | "float16" | "fp16" => Some(Self::F16),
            "bf16" | "bfloat16" => Some(Self::Bf16),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}

/// What the elements of a stored tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// Weights: each is a parameter.
    Weight(Dtype),
    /// E4M3 weights as they are stored: each is a parameter, and a block of them has a scale.
    Fp8,
    /// Scales of fp8 weights: bytes, but no parameters.
    Scale(Dtype),
    /// Integers that say where weights belong: bytes, but no parameters.
    Index,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::Weight(dtype) | Self::Scale(dtype) => dtype.size_bytes(),
            Self::Fp8 => 1,
            Self::Index => crate::params::INDEX_ELEMENT_BYTES,
        }
    }

    /// The spelling in safetensors headers.
    pub const fn safetensors_name(self) -> &'static str {
        match self {
            Self::Weight(dtype) | Self::Scale(dtype) => dtype.safetensors_name(),
            Self::Fp8 => "F8_E4M3",
            Self::Index => "I64",
        }
    }

    /// Whether elements count as parameters.
    pub const fn is_weight(self) -> bool {
        matches!(self, Self::Weight(_) | Self::Fp8)
    }
}

impl From<Dtype> for ElementType {
    fn from(dtype: Dtype) -> Self {
        Self::Weight(dtype)
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.safetensors_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_dtype_reads_back() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert_eq!(Dtype::parse(dtype.safetensors_name()), Some(dtype));
            assert_eq!(Dtype::parse(dtype.torch_name()), Some(dtype));
        }
        assert_eq!(Dtype::parse("F8_E4M3"), None);
    }
}
