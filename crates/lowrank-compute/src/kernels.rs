//! What a backend can do.

use crate::blocks::{for_each_block, matrix_shape};
use crate::projector::{is_last, missing, splits};
use crate::{ComputeError, Real, Reduced, Side, Split};
use lowrank_model::Tensor;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

/// Whether a product replaces what is there or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// C = A B
    Replace,
    /// C += A B
    Add,
}

/// The upper end of G = V Λ Vᵀ.
#[derive(Debug, Clone, PartialEq)]
pub struct Eigen<T> {
    /// All of Λ, falling; those of a positive semidefinite G may be slightly negative by rounding.
    pub values: Vec<T>,
    /// The first columns of V, [d, k].
    pub vectors: Array2<T>,
}

/// A Π = Q R with column pivoting; Q is not kept.
#[derive(Debug, Clone, PartialEq)]
pub struct PivotedQr<T> {
    /// Upper triangular or trapezoidal, [min(l, k), k]; the diagonal does not grow in size.
    pub r: Array2<T>,
    /// Column j of A Π is column `permutation[j]` of A.
    pub permutation: Vec<usize>,
}

/// C = L Lᵀ.
#[derive(Debug, Clone, PartialEq)]
pub struct Cholesky<T> {
    /// L [d, d]: zero above the diagonal.
    pub lower: Array2<T>,
    /// L⁻¹, of the same form.
    pub inverse: Array2<T>,
}

/// Linear algebra in one precision.
///
/// A backend must have those without a body; the others follow from them block by block, and a device overrides them to keep
/// a matrix where it computes.
pub trait Kernels<T: Real> {
    /// C = A B or C += A B: [m, k] × [k, n] → [m, n].
    fn gemm(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        c: ArrayViewMut2<'_, T>,
        accumulate: Accumulate,
    );

    /// G += BᵀB for a block B [b, d]. Only the lower triangle of G [d, d], standard layout, is written.
    fn gram_add(&self, gram: &mut Array2<T>, block: ArrayView2<'_, T>);

    /// Eigenvalues of a symmetric matrix and its first `count` eigenvectors. Reads the lower triangle.
    fn eigh(&self, gram: Array2<T>, count: usize) -> Result<Eigen<T>, ComputeError>;

    /// Eigenvalues of a symmetric matrix, falling. Reads the lower triangle.
    fn eigvalsh(&self, gram: Array2<T>) -> Result<Vec<T>, ComputeError>;

    /// Singular values of A [m, n], falling, by a direct SVD of the whole matrix and not through a Gram matrix: slow, the
    /// independent reference of tests and benchmarks.
    fn singular_values(&self, a: Array2<T>) -> Result<Vec<T>, ComputeError>;

    /// Q [l, k] with orthonormal columns that span those of Y [l, k], l ≥ k.
    fn thin_qr(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError>;

    /// QR of A [l, k] with column pivoting: the next column is the one that is farthest from those before (Businger and
    /// Golub, 1965).
    fn qr_pivoted(&self, a: Array2<T>) -> Result<PivotedQr<T>, ComputeError>;

    /// L and its inverse of a symmetric positive definite matrix. `None` if rounding finds it indefinite, and from a backend
    /// that has no such kernel. Reads the lower triangle.
    fn cholesky(&self, _matrix: ArrayView2<'_, T>) -> Option<Cholesky<T>> {
        None
    }

    /// A symmetric matrix, as far as [`Kernels::eigvalsh`] and [`Kernels::eigh`] treat it alike: most of their work.
    /// Reads the lower triangle.
    fn reduce(&self, gram: Array2<T>) -> Result<Reduced<T>, ComputeError> {
        Ok(Reduced::Whole(gram))
    }

    /// [`Kernels::eigvalsh`] of a matrix that was reduced: the same bits.
    fn reduced_values(&self, reduced: &Reduced<T>) -> Result<Vec<T>, ComputeError> {
        self.eigvalsh(whole(reduced.clone()))
    }

    /// [`Kernels::eigh`] of a matrix that was reduced: the same bits.
    fn reduced_vectors(&self, reduced: Reduced<T>, count: usize) -> Result<Eigen<T>, ComputeError> {
        self.eigh(whole(reduced), count)
    }

    /// Orthonormal columns [l, l − k] that are orthogonal to those of Y [l, k], l ≥ k.
    fn complement(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError> {
        let (len, cols) = y.dim();
        let q = self.thin_qr(y)?;
        // I − QQᵀ has them as eigenvectors of 1, and Q as those of 0.
        let mut projector = Array2::eye(len);
        self.gemm(q.mapv(|value| -value).view(), q.t(), projector.view_mut(), Accumulate::Add);
        Ok(self.eigh(projector, len - cols)?.vectors)
    }

    /// Orthonormal columns [d, k] of the span of a symmetric matrix' first k eigenvectors, where `split` says that there is a
    /// gap; from random columns Ω [d, k], by products alone. `None` if rounding closes the gap. Reads the lower triangle.
    fn upper_subspace(
        &self,
        gram: Array2<T>,
        split: &Split,
        omega: Array2<T>,
    ) -> Result<Option<Array2<T>>, ComputeError> {
        by_products(self, gram, split, omega)
    }

    /// The lower triangle of AᵀA [d, d]; zero above.
    fn gram(&self, w: &Tensor, side: Side) -> Array2<T> {
        let (_, width) = side.dims(matrix_shape(w));
        let mut gram = Array2::zeros((width, width));
        for_each_block(w, side, |_, block| self.gram_add(&mut gram, block));
        gram
    }

    /// A X: [l, d] × [d, k].
    fn apply(&self, w: &Tensor, side: Side, x: ArrayView2<'_, T>) -> Array2<T> {
        let (long, _) = side.dims(matrix_shape(w));
        let mut out = Array2::zeros((long, x.ncols()));
        for_each_block(w, side, |first, block| {
            let rows = out.slice_mut(s![first..first + block.nrows(), ..]);
            self.gemm(block, x, rows, Accumulate::Replace);
        });
        out
    }

    /// A X as [`Kernels::apply`], each element rounded to f32: for factors, half the memory in f64.
    fn project(&self, w: &Tensor, side: Side, x: ArrayView2<'_, T>) -> Array2<f32> {
        let (long, _) = side.dims(matrix_shape(w));
        let mut out = Array2::zeros((long, x.ncols()));
        let mut wide = Array2::zeros((0, 0));
        for_each_block(w, side, |first, block| {
            if wide.nrows() != block.nrows() {
                wide = Array2::zeros((block.nrows(), x.ncols()));
            }
            self.gemm(block, x, wide.view_mut(), Accumulate::Replace);
            let mut rows = out.slice_mut(s![first..first + block.nrows(), ..]);
            rows.zip_mut_with(&wide, |narrow, value| *narrow = value.as_f32());
        });
        out
    }

    /// AᵀY: [l, d]ᵀ × [l, k] → [d, k].
    fn apply_transposed(&self, w: &Tensor, side: Side, y: ArrayView2<'_, T>) -> Array2<T> {
        let (_, width) = side.dims(matrix_shape(w));
        let mut out = Array2::zeros((width, y.ncols()));
        for_each_block(w, side, |first, block| {
            let rows = y.slice(s![first..first + block.nrows(), ..]);
            self.gemm(block.reversed_axes(), rows, out.view_mut(), Accumulate::Add);
        });
        out
    }
}

/// Orthonormal columns [d, k] of the span of the first k eigenvectors of G [d, d], whose lower triangle is read, from
/// random columns Ω [d, k]. `None` if rounding closes the gap.
fn by_products<T: Real>(
    kernels: &(impl Kernels<T> + ?Sized),
    mut gram: Array2<T>,
    split: &Split,
    omega: Array2<T>,
) -> Result<Option<Array2<T>>, ComputeError> {
    let size = gram.nrows();
    let Some(steps) = split.schedule(T::EPSILON.as_f64()) else { return Ok(None) };
    mirror_lower(&mut gram);
    let (mut x, mut square) = (gram, Array2::zeros((size, size)));
    affine(&mut x, split.scale().recip(), -split.threshold / split.scale());
    let mut ended = false;
    for alpha in steps {
        kernels.gemm(x.view(), x.view(), square.view_mut(), Accumulate::Replace);
        let missing = missing(square.diag().iter().copied());
        ended = is_last(missing, T::EPSILON.as_f64());
        let alpha = if ended { 1.0 } else { alpha };
        affine(&mut square, -0.5 * alpha.powi(3), 1.5 * alpha);
        let mut next = Array2::zeros((size, size));
        kernels.gemm(x.view(), square.view(), next.view_mut(), Accumulate::Replace);
        x = next;
        if ended {
            break;
        }
    }
    let trace: f64 = x.diag().iter().map(|value| value.as_f64()).sum();
    if !ended || !splits(trace, size, split.above) {
        return Ok(None);
    }
    drop(square);
    affine(&mut x, 0.5, 0.5);
    let mut columns = omega;
    for _ in 0..2 {
        let mut image = Array2::zeros(columns.dim());
        kernels.gemm(x.view(), columns.view(), image.view_mut(), Accumulate::Replace);
        columns = kernels.thin_qr(image)?;
    }
    Ok(Some(columns))
}

/// A ← scale·A + shift·I.
fn affine<T: Real>(a: &mut Array2<T>, scale: f64, shift: f64) {
    let (scale, shift) = (T::of_f64(scale), T::of_f64(shift));
    a.mapv_inplace(|value| scale * value);
    a.diag_mut().mapv_inplace(|value| value + shift);
}

/// Copies the lower triangle of a matrix [d, d] to the upper one, square by square, so that what is read stays in the cache.
pub fn mirror_lower<T: Copy>(matrix: &mut Array2<T>) {
    const SQUARE: usize = 64;
    let size = matrix.nrows();
    for (first, left) in (0..size).step_by(SQUARE).flat_map(|i| (0..=i).step_by(SQUARE).map(move |j| (i, j)))
    {
        for i in first..size.min(first + SQUARE) {
            for j in left..i.min(left + SQUARE) {
                matrix[[j, i]] = matrix[[i, j]];
            }
        }
    }
}

/// The matrix that a backend without a form of its own keeps whole.
///
/// # Panics
/// If another backend made it.
fn whole<T: Real>(reduced: Reduced<T>) -> Array2<T> {
    match reduced {
        Reduced::Whole(gram) => gram,
        Reduced::Packed { .. } => panic!("packed by another backend"),
    }
}

/// Linear algebra in both precisions.
pub trait Backend: Kernels<f32> + Kernels<f64> + Sync {
    /// Names the backend in reports.
    fn name(&self) -> &'static str;
}
