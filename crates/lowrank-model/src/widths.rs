//! Widths: how many of an expert's channels stay, and which.
//!
//! An expert is y = W₂ h, h = silu(W₁ x) ∘ W₃ x \[F\]. A channel is one element of h: a row of gate and of up, and a column of
//! down. An expert of width k has k of the F channels, its matrices are [k, H], [H, k] and [k, H].

use crate::{MatrixShape, Projection};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Widths of the experts that have fewer channels than the model's `intermediate_size`, by layer and expert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Widths(BTreeMap<(usize, usize), usize>);

impl Widths {
    /// Whether every expert has all channels.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Of one expert, if it is narrower than the model's.
    pub fn of(&self, layer: usize, expert: usize) -> Option<usize> {
        self.0.get(&(layer, expert)).copied()
    }

    /// Every narrowed expert, in order: layer, expert, width.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        self.0.iter().map(|(&(layer, expert), &width)| (layer, expert, width))
    }
}

impl FromIterator<(usize, usize, usize)> for Widths {
    fn from_iter<I: IntoIterator<Item = (usize, usize, usize)>>(experts: I) -> Self {
        Self(experts.into_iter().map(|(layer, expert, width)| ((layer, expert), width)).collect())
    }
}

/// Shape of a projection, out × in, of an expert with `width` channels.
pub const fn expert_shape(projection: Projection, width: usize, hidden_size: usize) -> MatrixShape {
    match projection {
        Projection::Gate | Projection::Up => MatrixShape { rows: width, cols: hidden_size },
        Projection::Down => MatrixShape { rows: hidden_size, cols: width },
    }
}

/// Channels that stay, of an expert's F. Serialised as the hexadecimal digits of a bitmap of ⌈F/8⌉ bytes; channel c is bit
/// c mod 8 of byte ⌊c/8⌋, the lowest bit first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct KeptChannels(Vec<u8>);

impl KeptChannels {
    /// From channels in any order, all below `intermediate_size`.
    ///
    /// # Panics
    /// If one is not.
    pub fn new(channels: &[usize], intermediate_size: usize) -> Self {
        let mut bitmap = vec![0; intermediate_size.div_ceil(8)];
        for &channel in channels {
            assert!(channel < intermediate_size, "channel {channel} of {intermediate_size}");
            bitmap[channel / 8] |= 1 << (channel % 8);
        }
        Self(bitmap)
    }

    /// In rising order: the order of the rows and columns that are stored.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let bits = |(byte, &bits): (usize, &u8)| {
            (0..8).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| 8 * byte + bit)
        };
        self.0.iter().enumerate().flat_map(bits)
    }

    /// How many.
    pub fn width(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether these can be channels of an expert with so many: some, but not all.
    pub fn fits(&self, intermediate_size: usize) -> bool {
        self.0.len() == intermediate_size.div_ceil(8)
            && (1..intermediate_size).contains(&self.width())
            && self.iter().all(|channel| channel < intermediate_size)
    }
}

impl From<KeptChannels> for String {
    fn from(kept: KeptChannels) -> Self {
        kept.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for KeptChannels {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const WRONG: &str = "channels are not the hexadecimal digits of a bitmap";
        let digit = |byte: u8| (byte as char).to_digit(16).ok_or(WRONG);
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err(WRONG);
        }
        let byte = |&[high, low]: &[u8; 2]| Ok::<_, Self::Error>((digit(high)? << 4 | digit(low)?) as u8);
        Ok(Self(pairs.iter().map(byte).collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_survive_json_in_rising_order() {
        let kept = KeptChannels::new(&[9, 0, 3, 11], 12);
        assert_eq!(kept.iter().collect::<Vec<_>>(), [0, 3, 9, 11]);
        assert_eq!(serde_json::to_string(&kept).unwrap(), "\"090a\"");
        assert_eq!(serde_json::from_str::<KeptChannels>("\"090a\"").unwrap(), kept);
        assert_eq!(kept.width(), 4);
    }

    #[test]
    fn channels_that_no_expert_has_do_not_fit() {
        let fits = |text: &str, size| serde_json::from_str::<KeptChannels>(text).unwrap().fits(size);
        assert!(fits("\"090a\"", 12) && fits("\"090a\"", 16));
        assert!(!fits("\"090a\"", 11), "channel 11 of 11");
        assert!(!fits("\"090a\"", 17), "too short a bitmap");
        assert!(!fits("\"0000\"", 12), "none");
        assert!(!fits("\"ff0f\"", 12), "all");
        for wrong in ["\"09a\"", "\"0g0a\"", "\"0é\"", "7"] {
            assert!(serde_json::from_str::<KeptChannels>(wrong).is_err(), "{wrong}");
        }
    }
}
