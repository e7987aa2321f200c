//! The Pareto front of size and error.

/// A point may be larger by one part in this many and still dominate another: a plan meets its budget only to within one
/// step, and being one step smaller should not put a point on the front.
pub const SAME_SIZE: u64 = 1000;

/// For each (size, error): whether it is on the Pareto front. A point is on the front if no other point dominates it. A point
/// dominates another if its error is not larger, its size is at most a thousandth larger, and its error or its size is
/// smaller. Equal points do not dominate each other. Errors must not be NaN.
pub fn front(points: &[(u64, f64)]) -> Vec<bool> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    // The smallest error of all points up to this one.
    let least: Vec<f64> = sorted
        .iter()
        .scan(f64::INFINITY, |least, &(_, error)| {
            *least = least.min(error);
            Some(*least)
        })
        .collect();
    let least_where = |fits: &dyn Fn(u64) -> bool| match sorted.partition_point(|&(size, _)| fits(size)) {
        0 => f64::INFINITY,
        count => least[count - 1],
    };
    let on_front = |&(size, error): &(u64, f64)| {
        least_where(&|other| other <= size + size / SAME_SIZE) >= error
            && least_where(&|other| other < size) > error
    };
    points.iter().map(on_front).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_front_is_what_no_other_beats() {
        let points = [(10, 3.0), (20, 2.0), (20, 2.5), (15, 3.0), (30, 2.0), (20, 2.0), (40, 0.0)];
        assert_eq!(front(&points), [true, true, false, false, false, true, true]);
        assert_eq!(front(&[]), Vec::<bool>::new());
        // One step smaller, but with a much larger error.
        assert_eq!(front(&[(1_000_000, 5.0), (1_000_900, 1.0), (1_002_000, 0.5)]), [false, true, true]);
    }

    proptest! {
        #[test]
        fn by_its_definition(points in prop::collection::vec((1990..2010_u64, (0..8_u8).prop_map(f64::from)), 0..20)) {
            let beats = |a: (u64, f64), b: (u64, f64)| {
                a.1 <= b.1 && a.0 <= b.0 + b.0 / 1000 && (a.0 < b.0 || a.1 < b.1)
            };
            let expected: Vec<bool> =
                points.iter().map(|&point| !points.iter().any(|&other| beats(other, point))).collect();
            prop_assert_eq!(front(&points), expected);
        }
    }
}
