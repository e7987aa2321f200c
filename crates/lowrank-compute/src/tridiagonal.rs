//! A symmetric matrix brought to tridiagonal form, a panel of columns at a time.
//!
//! What bounds this is memory: every column needs a product of the whole rest of the matrix with a vector. faer changes the
//! rest for every column, which reads and writes it; here the changes of [`PANEL`] columns are put off and done by one
//! product (Dongarra, Sorensen and Hammarling, 1989), so that it is read once for each column and written once for each
//! panel. Everything else, the reflections and what comes after them, is faer's.

use crate::{Real, Reduced};
use faer::linalg::householder::{make_householder_in_place, upgrade_householder_factor};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::qr::no_pivoting::factor::recommended_block_size;
use faer::{Accum, Mat, MatRef, Par};
use pulp::Arch;

/// Columns whose changes to the rest are put off.
const PANEL: usize = 32;
/// Sums that run side by side. A constant, whatever the processor's vectors: it decides bits.
const LANES: usize = 16;

/// The parts of what this backend packed.
///
/// # Panics
/// If another backend made it.
pub(crate) fn packed<T>(reduced: &Reduced<T>) -> (usize, &[T]) {
    match reduced {
        Reduced::Packed { size, numbers } => (*size, numbers),
        Reduced::Whole(_) => panic!("kept whole by another backend"),
    }
}

/// QᵀGQ with Q as Householder reflections in blocks.
pub(crate) struct Tridiagonal<T> {
    /// [d, 1]
    pub(crate) diagonal: Mat<T>,
    /// [d, 1], the last entry unused.
    pub(crate) off_diagonal: Mat<T>,
    /// [d − 1, d − 1], used below the diagonal.
    pub(crate) reflectors: Mat<T>,
    /// [block, d − 1]
    pub(crate) coefficients: Mat<T>,
}

impl<T: Real> Tridiagonal<T> {
    /// Of the lower triangle of G.
    pub(crate) fn of(mut work: Mat<T>) -> Self {
        let size = work.nrows();
        let rest = size.saturating_sub(1);
        let taus = reduce_in_place(&mut work);
        let diagonal = Mat::from_fn(size, 1, |i, _| work[(i, i)]);
        let off_diagonal = Mat::from_fn(size, 1, |i, _| if i < rest { work[(i + 1, i)] } else { T::zero() });
        // One row up: what stood on the subdiagonal is on the diagonal now, where reflectors have an implied 1.
        for j in 0..rest {
            work.col_as_slice_mut(j).copy_within(j + 1.., j);
        }
        work.truncate(rest, rest);
        let mut coefficients = Mat::<T>::zeros(Self::block(size), rest);
        for first in (0..rest).step_by(Self::block(size)) {
            let count = Self::block(size).min(rest - first);
            let mut block = coefficients.as_mut().submatrix_mut(0, first, count, count);
            for (k, &tau) in taus[first..first + count].iter().enumerate() {
                block[(k, k)] = tau;
            }
            let essentials = work.as_ref().submatrix(first, first, rest - first, count);
            upgrade_householder_factor(block, essentials, count, 1, Par::Seq);
        }
        Self { diagonal, off_diagonal, reflectors: work, coefficients }
    }

    fn block(size: usize) -> usize {
        recommended_block_size::<T>(size, size)
    }

    /// Diagonal, off-diagonal, coefficients, and the reflectors column by column.
    pub(crate) fn packed(&self) -> Reduced<T> {
        let size = self.diagonal.nrows();
        let rest = size.saturating_sub(1);
        let mut numbers = Vec::with_capacity(2 * size + self.coefficients.nrows() * rest + rest * rest / 2);
        numbers.extend_from_slice(self.diagonal.col_as_slice(0));
        numbers.extend_from_slice(&self.off_diagonal.col_as_slice(0)[..rest]);
        for j in 0..rest {
            numbers.extend_from_slice(self.coefficients.col_as_slice(j));
        }
        for j in 0..rest {
            numbers.extend_from_slice(&self.reflectors.col_as_slice(j)[j + 1..]);
        }
        Reduced::Packed { size, numbers }
    }

    /// Diagonal \[d\] and off-diagonal [d − 1].
    pub(crate) fn ends(size: usize, numbers: &[T]) -> (&[T], &[T]) {
        let (diagonal, numbers) = numbers.split_at(size);
        (diagonal, &numbers[..size.saturating_sub(1)])
    }

    pub(crate) fn unpacked(size: usize, numbers: &[T]) -> Self {
        let (rest, block) = (size.saturating_sub(1), Self::block(size));
        let (diagonal, off_diagonal) = Self::ends(size, numbers);
        let column = |values: &[T]| Mat::from_fn(size, 1, |i, _| values.get(i).copied().unwrap_or(T::zero()));
        let (diagonal, off_diagonal) = (column(diagonal), column(off_diagonal));
        let mut numbers = &numbers[size + rest..];
        let mut take = |count| {
            let (taken, left) = numbers.split_at(count);
            numbers = left;
            taken
        };
        let mut coefficients = Mat::zeros(block, rest);
        for j in 0..rest {
            coefficients.col_as_slice_mut(j).copy_from_slice(take(block));
        }
        let mut reflectors = Mat::zeros(rest, rest);
        for j in 0..rest {
            reflectors.col_as_slice_mut(j)[j + 1..].copy_from_slice(take(rest - j - 1));
        }
        Self { diagonal, off_diagonal, reflectors, coefficients }
    }
}

/// Brings the lower triangle of a matrix [d, d] to tridiagonal form: diagonal and subdiagonal stay, reflectors stand below.
/// → τ of each reflection I − v vᵀ/τ.
fn reduce_in_place<T: Real>(a: &mut Mat<T>) -> Vec<T> {
    // Everything that it inlines is compiled for the processor's vectors, too; never fused, so bits are the same.
    Arch::new().dispatch(|| reduce_columns(a))
}

#[inline(always)]
fn reduce_columns<T: Real>(a: &mut Mat<T>) -> Vec<T> {
    let size = a.nrows();
    let rest = size.saturating_sub(1);
    let mut taus = Vec::with_capacity(rest);
    // A becomes A − V Wᵀ − W Vᵀ: [V W] and [W V].
    let mut left = Mat::<T>::zeros(size, 2 * PANEL);
    let mut right = Mat::<T>::zeros(size, 2 * PANEL);
    let (mut v, mut w) = (vec![T::zero(); size], vec![T::zero(); size]);
    for first in (0..rest).step_by(PANEL) {
        let count = PANEL.min(rest - first);
        for k in 0..count {
            let c = first + k;
            catch_up(&mut a.col_as_slice_mut(c)[c..], &left, c, k);
            // The reflection that leaves one entry below the diagonal.
            let (head, tail) = a.as_mut().col_mut(c).subrows_mut(c + 1, rest - c).split_at_row_mut(1);
            let mut head = head;
            let tau = make_householder_in_place(&mut head[0], tail).tau;
            taus.push(tau);
            let (v, w) = (&mut v[c + 1..], &mut w[c + 1..]);
            v.copy_from_slice(&a.col_as_slice(c)[c + 1..]);
            v[0] = T::one();
            symmetric_product(a.as_ref().submatrix(c + 1, c + 1, rest - c, rest - c), v, w);
            for p in 0..k {
                let (old_v, old_w) = (&left.col_as_slice(p)[c + 1..], &left.col_as_slice(PANEL + p)[c + 1..]);
                let (along_w, along_v) = (dot(old_w, v), dot(old_v, v));
                for ((w, &old_v), &old_w) in w.iter_mut().zip(old_v).zip(old_w) {
                    *w -= old_v * along_w + old_w * along_v;
                }
            }
            let inverse = tau.recip();
            w.iter_mut().for_each(|w| *w *= inverse);
            let half = inverse * dot(w, v) / (T::one() + T::one());
            w.iter_mut().zip(&*v).for_each(|(w, &v)| *w -= half * v);
            for (matrix, of_v, of_w) in [(&mut left, k, PANEL + k), (&mut right, PANEL + k, k)] {
                matrix.col_as_slice_mut(of_v)[c + 1..].copy_from_slice(v);
                matrix.col_as_slice_mut(of_w)[c + 1..].copy_from_slice(w);
            }
        }
        let next = first + count;
        // Columns of an earlier panel that a short last one leaves are masked by their zeros.
        for k in count..PANEL {
            for column in [k, PANEL + k] {
                left.col_as_slice_mut(column).fill(T::zero());
                right.col_as_slice_mut(column).fill(T::zero());
            }
        }
        triangular::matmul(
            a.as_mut().submatrix_mut(next, next, size - next, size - next),
            BlockStructure::TriangularLower,
            Accum::Add,
            left.as_ref().subrows(next, size - next),
            BlockStructure::Rectangular,
            right.as_ref().subrows(next, size - next).transpose(),
            BlockStructure::Rectangular,
            -T::one(),
            Par::Seq,
        );
    }
    taus
}

/// What k columns of the panel change in the rows of another from `row` on.
#[inline(always)]
fn catch_up<T: Real>(column: &mut [T], left: &Mat<T>, row: usize, k: usize) {
    for p in 0..k {
        // Of this row itself: zero in v above its own reflection, and never read there.
        let (v, w) = (&left.col_as_slice(p)[row..], &left.col_as_slice(PANEL + p)[row..]);
        let (v_here, w_here) = (v[0], w[0]);
        for ((value, &v), &w) in column.iter_mut().zip(v).zip(w) {
            *value -= v * w_here + w * v_here;
        }
    }
}

/// A v for a symmetric A [d, d], whose lower triangle is read once: four columns at a time.
#[inline(always)]
fn symmetric_product<T: Real>(a: MatRef<'_, T>, v: &[T], out: &mut [T]) {
    let size = v.len();
    out.fill(T::zero());
    let column = |j: usize| a.col(j).try_as_col_major().expect("column after column").as_slice();
    let blocks = size / 4 * 4;
    for j in (0..blocks).step_by(4) {
        let columns = [0, 1, 2, 3].map(|k| column(j + k));
        for k in 0..4 {
            out[j + k] += columns[k][j + k] * v[j + k];
            for i in k + 1..4 {
                let entry = columns[k][j + i];
                out[j + i] += entry * v[j + k];
                out[j + k] += entry * v[j + i];
            }
        }
        let factors = [v[j], v[j + 1], v[j + 2], v[j + 3]];
        let sums =
            four_columns(columns.map(|column| &column[j + 4..]), factors, &v[j + 4..], &mut out[j + 4..]);
        for k in 0..4 {
            out[j + k] += sums[k];
        }
    }
    for j in blocks..size {
        let column = column(j);
        out[j] += column[j] * v[j];
        for i in j + 1..size {
            out[i] += column[i] * v[j];
            out[j] += column[i] * v[i];
        }
    }
}

/// Adds the four columns times their factors to `out`; → their products with v.
#[inline(always)]
fn four_columns<T: Real>(columns: [&[T]; 4], factors: [T; 4], v: &[T], out: &mut [T]) -> [T; 4] {
    let mut sums = [[T::zero(); LANES]; 4];
    let parts = columns.map(|column| column.as_chunks::<LANES>());
    let (v, v_tail) = v.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    let [c0, c1, c2, c3] = parts.map(|(whole, _)| whole);
    let whole = out.iter_mut().zip(v).zip(c0.iter().zip(c1)).zip(c2.iter().zip(c3));
    for (((out, v), (c0, c1)), (c2, c3)) in whole {
        for lane in 0..LANES {
            let entries = [c0[lane], c1[lane], c2[lane], c3[lane]];
            out[lane] += (entries[0] * factors[0] + entries[1] * factors[1])
                + (entries[2] * factors[2] + entries[3] * factors[3]);
            for k in 0..4 {
                sums[k][lane] += entries[k] * v[lane];
            }
        }
    }
    for (i, (out, &v)) in out_tail.iter_mut().zip(v_tail).enumerate() {
        for k in 0..4 {
            let entry = parts[k].1[i];
            *out += entry * factors[k];
            sums[k][i] += entry * v;
        }
    }
    sums.map(total)
}

/// The sum of all lanes, in pairs.
#[inline(always)]
fn total<T: Real>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Σ aᵢ bᵢ.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); LANES];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
        sums[lane] += a * b;
    }
    total(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use faer::dyn_stack::{MemBuffer, MemStack};
    use faer::linalg::evd::tridiag::{tridiag_in_place, tridiag_in_place_scratch};

    /// faer's own reduction, which is not blocked.
    #[test]
    fn every_size_agrees_with_a_reduction_column_by_column() {
        for size in [1, 2, 3, 5, 31, 32, 33, 34, 64, 65, 97, 150] {
            let mut state = size as u32;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f64::from(state >> 8) / f64::from(1 << 23) - 1.0
            };
            let lower = Mat::<f64>::from_fn(size, size, |_, _| next());
            let ours = Tridiagonal::of(lower.clone());
            let mut theirs = lower;
            let mut coefficients = Mat::zeros(4, size - 1);
            let params = Default::default();
            let mut memory = MemBuffer::new(tridiag_in_place_scratch::<f64>(size, Par::Seq, params));
            let stack = MemStack::new(&mut memory);
            tridiag_in_place(theirs.as_mut(), coefficients.as_mut(), Par::Seq, stack, params);
            let tolerance = 1e-12 * size as f64;
            for i in 0..size {
                assert!((ours.diagonal[(i, 0)] - theirs[(i, i)]).abs() < tolerance, "{size}: {i}");
                if i + 1 < size {
                    assert!(
                        (ours.off_diagonal[(i, 0)] - theirs[(i + 1, i)]).abs() < tolerance,
                        "{size}: {i}"
                    );
                }
                for j in i + 2..size {
                    assert!(
                        (ours.reflectors[(j - 1, i)] - theirs[(j, i)]).abs() < tolerance,
                        "{size}: {j} {i}"
                    );
                }
            }
            // What is stored brings everything back.
            let Reduced::Packed { size, numbers } = ours.packed() else { panic!("packed") };
            let back = Tridiagonal::<f64>::unpacked(size, &numbers);
            assert_eq!(back.coefficients, ours.coefficients);
            assert_eq!((back.diagonal, back.off_diagonal), (ours.diagonal, ours.off_diagonal));
        }
    }
}
