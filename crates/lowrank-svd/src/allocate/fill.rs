//! Repairs of the relaxed optimum: steps that fit into what is left, and steps taken back.

use super::choices::{Curve, Segment};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A possible move of one matrix to a dearer choice.
struct Move {
    gain_per_cost: f64,
    curve: usize,
    from: usize,
    to: usize,
}

impl Ord for Move {
    /// The best first; ties by name, then by the smaller step.
    fn cmp(&self, other: &Self) -> Ordering {
        let place = |step: &Self| (step.curve, step.to, step.from);
        self.gain_per_cost.total_cmp(&other.gain_per_cost).then_with(|| place(other).cmp(&place(self)))
    }
}
impl PartialOrd for Move {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Move {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Move {}

/// Spends `slack` on the moves that save most per cost, until not even the smallest move of any matrix fits.
pub(super) fn fill(curves: &[Curve], chosen: &mut [usize], mut slack: u64) {
    let mut moves = BinaryHeap::new();
    for (curve, &from) in chosen.iter().enumerate() {
        offer(&mut moves, curves, curve, from);
    }
    while let Some(Move { curve, from, to, .. }) = moves.pop() {
        if chosen[curve] != from {
            continue;
        }
        let step = curves[curve].cost(to) - curves[curve].cost(from);
        // What does not fit now never will: the slack only shrinks.
        if step <= slack {
            slack -= step;
            chosen[curve] = to;
            offer(&mut moves, curves, curve, to);
        }
    }
}

/// The next rank, the next vertex of the hull, and the dearest choice.
fn offer(moves: &mut BinaryHeap<Move>, curves: &[Curve], index: usize, from: usize) {
    let curve = &curves[index];
    if from == curve.last() {
        return;
    }
    let mut targets = [from + 1, curve.next_vertex(from).unwrap_or(from + 1), curve.last()];
    targets.sort_unstable();
    for (i, &to) in targets.iter().enumerate() {
        if i == 0 || targets[i - 1] != to {
            moves.push(Move { gain_per_cost: curve.slope(from, to), curve: index, from, to });
        }
    }
}

/// Takes the critical step, then takes back the steps before it, least useful first, until the budget is met again.
/// Returns the slack; absent if that cannot be done without the critical matrix itself.
pub(super) fn shave(
    curves: &[Curve],
    chosen: &mut [usize],
    slack: u64,
    taken: &[Segment],
    critical: Segment,
) -> Option<u64> {
    let curve = &curves[critical.curve as usize];
    let (from, to) = curve.ends(critical.vertex);
    chosen[critical.curve as usize] = to;
    let mut missing = (curve.cost(to) - curve.cost(from)) - slack;
    for segment in taken.iter().rev().filter(|segment| segment.curve != critical.curve) {
        let curve = &curves[segment.curve as usize];
        let (from, to) = curve.ends(segment.vertex);
        let step = curve.cost(to) - curve.cost(from);
        chosen[segment.curve as usize] = from;
        match missing.checked_sub(step) {
            Some(left) if left > 0 => missing = left,
            _ => return Some(step - missing),
        }
    }
    None
}
