//! The lower convex hull of choices: (cost, error), by rising cost.

/// Error saved per cost between two points (cost, error).
pub(super) fn slope(from: (u64, f64), to: (u64, f64)) -> f64 {
    (from.1 - to.1) / (to.0 - from.0) as f64
}

/// The lower convex hull of `count` choices by rising cost. Slopes along it do not rise, as computed. Points on an edge are
/// kept: smaller steps waste less of the budget.
pub(super) fn lower_hull(count: usize, slope: impl Fn(usize, usize) -> f64) -> Vec<u32> {
    let mut hull: Vec<u32> = Vec::with_capacity(count);
    let mut slopes: Vec<f64> = Vec::with_capacity(count);
    for choice in 0..count {
        let slope = loop {
            let Some(&last) = hull.last() else { break None };
            let slope = slope(last as usize, choice);
            match slopes.last() {
                Some(&before) if before < slope => {
                    hull.pop();
                    slopes.pop();
                }
                _ => break Some(slope),
            }
        };
        slopes.extend(slope);
        hull.push(choice as u32);
    }
    hull
}
