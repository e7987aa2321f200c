//! Which graphics cards hold so many bytes of weights.
//!
//! A card of N GB is counted as N·10⁹ bytes. It has a little more, which its driver takes.

use serde::Serialize;

/// Memory of cards that people have, in GB.
pub const CARDS_GB: [u64; 5] = [16, 24, 40, 48, 80];

/// One card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct GpuRoom {
    /// Its memory.
    pub card_gb: u64,
    /// Bytes left beside the weights before; absent: they do not fit.
    pub room_before: Option<u64>,
    /// Bytes left beside the weights after.
    pub room_after: Option<u64>,
}

/// All cards, for weights of so many bytes before and after.
pub fn cards(bytes_before: u64, bytes_after: u64) -> Vec<GpuRoom> {
    CARDS_GB
        .iter()
        .map(|&card_gb| {
            let room = |bytes| (card_gb * 1_000_000_000).checked_sub(bytes);
            GpuRoom { card_gb, room_before: room(bytes_before), room_after: room(bytes_after) }
        })
        .collect()
}

/// The smallest of them that holds so many bytes; absent if none does.
pub fn smallest(bytes: u64) -> Option<u64> {
    CARDS_GB.into_iter().find(|card_gb| card_gb * 1_000_000_000 >= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_billion_parameters_less_bring_mixtral_onto_one_card_of_80_gb() {
        let all = cards(93_405_585_408, 73_405_585_408);
        assert!(all.iter().all(|card| card.room_before.is_none()));
        let fits: Vec<u64> =
            all.iter().filter(|card| card.room_after.is_some()).map(|card| card.card_gb).collect();
        assert_eq!(fits, [80]);
        assert_eq!(all[4].room_after, Some(6_594_414_592));
        assert_eq!(
            (smallest(93_405_585_408), smallest(73_405_585_408), smallest(0)),
            (None, Some(80), Some(16))
        );
    }
}
