//! The default backend: faer, pure Rust, one thread per matrix.
//!
//! Always `Par::Seq`: faer's eigensolver and QR give other bits on another number of threads. Parallelism belongs to
//! the caller, over matrices.

use crate::tridiagonal::{Tridiagonal, packed};
use crate::{Accumulate, Backend, Cholesky, ComputeError, Eigen, Kernels, PivotedQr, Real, Reduced};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd_scratch, tridiagonal_self_adjoint_evd};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::matmul::triangular::BlockStructure;
use faer::linalg::matmul::{matmul, triangular};
use faer::linalg::qr::col_pivoting::factor as col_pivoting;
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::linalg::temp_mat_scratch;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2, ShapeBuilder, s};
use std::ops::Range;

/// faer on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faer;

const NAME: &str = "faer";

impl Backend for Faer {
    fn name(&self) -> &'static str {
        NAME
    }
}

impl<T: Real> Kernels<T> for Faer {
    fn gemm(
        &self,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        mut c: ArrayViewMut2<'_, T>,
        accumulate: Accumulate,
    ) {
        let (a, b) = (dense(a), dense(b));
        let accum = match accumulate {
            Accumulate::Replace => Accum::Replace,
            Accumulate::Add => Accum::Add,
        };
        match mat_mut(&mut c) {
            Some(c) => matmul(c, accum, mat(&a), mat(&b), T::one(), Par::Seq),
            // A strided output: computed beside it.
            None => {
                let mut product = c.as_standard_layout().into_owned();
                self.gemm(a.view(), b.view(), product.view_mut(), accumulate);
                c.assign(&product);
            }
        }
    }

    fn gram_add(&self, gram: &mut Array2<T>, block: ArrayView2<'_, T>) {
        let block = dense(block);
        let block = mat(&block);
        let mut gram = gram.view_mut();
        triangular::matmul(
            mat_mut(&mut gram).expect("a Gram matrix is contiguous"),
            BlockStructure::TriangularLower,
            Accum::Add,
            block.transpose(),
            BlockStructure::Rectangular,
            block,
            BlockStructure::Rectangular,
            T::one(),
            Par::Seq,
        );
    }

    fn eigh(&self, gram: Array2<T>, count: usize) -> Result<Eigen<T>, ComputeError> {
        self.reduced_vectors(self.reduce(gram)?, count)
    }

    fn eigvalsh(&self, gram: Array2<T>) -> Result<Vec<T>, ComputeError> {
        self.reduced_values(&self.reduce(gram)?)
    }

    fn reduce(&self, gram: Array2<T>) -> Result<Reduced<T>, ComputeError> {
        let mut work = Mat::<T>::zeros(gram.nrows(), gram.nrows());
        work.copy_from_triangular_lower(mat(&dense(gram.view())));
        drop(gram);
        Ok(Tridiagonal::of(work).packed())
    }

    /// In f64 also where the matrix was reduced in f32: faer's iteration for values alone loses up to 2·10⁻⁴ of an f32
    /// eigenvalue at d = 2048.
    fn reduced_values(&self, reduced: &Reduced<T>) -> Result<Vec<T>, ComputeError> {
        let (size, numbers) = packed(reduced);
        let (diagonal, off_diagonal) = Tridiagonal::<T>::ends(size, numbers);
        let column = |values: &[T]| Mat::from_fn(size, 1, |i, _| values.get(i).map_or(0.0, |v| v.as_f64()));
        let (diagonal, off_diagonal) = (column(diagonal), column(off_diagonal));
        let mut values = Mat::<f64>::zeros(size, 1);
        let params = Default::default();
        let mut memory = MemBuffer::new(temp_mat_scratch::<f64>(size, 1).array(2));
        tridiagonal_self_adjoint_evd(
            diagonal.col(0).as_diagonal(),
            off_diagonal.col(0).as_diagonal(),
            values.as_mut().col_mut(0).as_diagonal_mut(),
            None,
            Par::Seq,
            MemStack::new(&mut memory),
            params,
        )
        .map_err(|_| ComputeError::NoConvergence { backend: NAME, size })?;
        Ok((0..size).rev().map(|i| T::of_f64(values[(i, 0)])).collect())
    }

    /// All eigenvectors of the tridiagonal matrix, of which only the wanted ones are carried back.
    fn reduced_vectors(&self, reduced: Reduced<T>, count: usize) -> Result<Eigen<T>, ComputeError> {
        let (size, numbers) = packed(&reduced);
        let Tridiagonal { diagonal, off_diagonal, reflectors, coefficients } =
            Tridiagonal::unpacked(size, numbers);
        drop(reduced);
        // Columns one after the other, smallest eigenvalue first.
        let mut vectors = vec![T::zero(); size * size];
        let mut values = Mat::<T>::zeros(size, 1);
        let params = Default::default();
        // More than the tridiagonal part asks for, whose own size faer does not tell.
        let request = self_adjoint_evd_scratch::<T>(size, ComputeEigenvectors::Yes, Par::Seq, params);
        let mut memory = MemBuffer::new(request);
        tridiagonal_self_adjoint_evd(
            diagonal.col(0).as_diagonal(),
            off_diagonal.col(0).as_diagonal(),
            values.as_mut().col_mut(0).as_diagonal_mut(),
            Some(MatMut::from_column_major_slice_mut(&mut vectors, size, size)),
            Par::Seq,
            MemStack::new(&mut memory),
            params,
        )
        .map_err(|_| ComputeError::NoConvergence { backend: NAME, size })?;
        drop(memory);
        for low in 0..size / 2 {
            let (head, tail) = vectors.split_at_mut((size - 1 - low) * size);
            head[low * size..(low + 1) * size].swap_with_slice(&mut tail[..size]);
        }
        vectors.truncate(size * count);
        vectors.shrink_to_fit();
        if size > 1 && count > 0 {
            let block = coefficients.nrows();
            let request =
                apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(size - 1, block, count);
            let mut memory = MemBuffer::new(request);
            apply_block_householder_sequence_on_the_left_in_place_with_conj(
                reflectors.as_ref(),
                coefficients.as_ref(),
                Conj::No,
                MatMut::from_column_major_slice_mut(&mut vectors, size, count).subrows_mut(1, size - 1),
                Par::Seq,
                MemStack::new(&mut memory),
            );
        }
        let values = (0..size).rev().map(|i| values[(i, 0)]).collect();
        let vectors = Array2::from_shape_vec((size, count).f(), vectors).expect("count columns were kept");
        Ok(Eigen { values, vectors })
    }

    fn singular_values(&self, a: Array2<T>) -> Result<Vec<T>, ComputeError> {
        let (rows, cols) = a.dim();
        let size = rows.min(cols);
        let mut values = Mat::<T>::zeros(size, 1);
        let (none, params) = (ComputeSvdVectors::No, Default::default());
        let mut memory = MemBuffer::new(svd_scratch::<T>(rows, cols, none, none, Par::Seq, params));
        svd(
            mat(&dense(a.view())),
            values.as_mut().col_mut(0).as_diagonal_mut(),
            None,
            None,
            Par::Seq,
            MemStack::new(&mut memory),
            params,
        )
        .map_err(|_| ComputeError::NoConvergence { backend: NAME, size })?;
        Ok((0..size).map(|i| values[(i, 0)]).collect())
    }

    fn thin_qr(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError> {
        let cols = y.ncols();
        Ok(columns_of_q(y, 0..cols))
    }

    fn complement(&self, y: Array2<T>) -> Result<Array2<T>, ComputeError> {
        let (rows, cols) = y.dim();
        Ok(columns_of_q(y, cols..rows))
    }

    fn cholesky(&self, matrix: ArrayView2<'_, T>) -> Option<Cholesky<T>> {
        let size = matrix.nrows();
        let mut lower = Mat::<T>::zeros(size, size);
        lower.copy_from_triangular_lower(mat(&dense(matrix)));
        let params = Default::default();
        let mut memory = MemBuffer::new(cholesky_in_place_scratch::<T>(size, Par::Seq, params));
        let stack = MemStack::new(&mut memory);
        cholesky_in_place(lower.as_mut(), Default::default(), Par::Seq, stack, params).ok()?;
        let mut inverse = vec![T::zero(); size * size];
        let view = MatMut::from_column_major_slice_mut(&mut inverse, size, size);
        invert_lower_triangular(view, lower.as_ref(), Par::Seq);
        let lower =
            Array2::from_shape_fn((size, size).f(), |(i, j)| if i >= j { lower[(i, j)] } else { T::zero() });
        let inverse = Array2::from_shape_vec((size, size).f(), inverse).expect("made in this shape");
        Some(Cholesky { lower, inverse })
    }

    fn qr_pivoted(&self, a: Array2<T>) -> Result<PivotedQr<T>, ComputeError> {
        let (rows, cols) = a.dim();
        let size = rows.min(cols);
        // faer divides by the largest column.
        if a.iter().all(|value| *value == T::zero()) {
            return Ok(PivotedQr { r: Array2::zeros((size, cols)), permutation: (0..cols).collect() });
        }
        let mut reflectors = Mat::<T>::from_fn(rows, cols, |i, j| a[[i, j]]);
        drop(a);
        let block = col_pivoting::recommended_block_size::<T>(rows, cols);
        let mut coefficients = Mat::<T>::zeros(block, size);
        let (mut permutation, mut inverse) = (vec![0_usize; cols], vec![0_usize; cols]);
        let params = Default::default();
        let mut memory = MemBuffer::new(col_pivoting::qr_in_place_scratch::<usize, T>(
            rows,
            cols,
            block,
            Par::Seq,
            params,
        ));
        col_pivoting::qr_in_place(
            reflectors.as_mut(),
            coefficients.as_mut(),
            &mut permutation,
            &mut inverse,
            Par::Seq,
            MemStack::new(&mut memory),
            params,
        );
        let r =
            Array2::from_shape_fn((size, cols), |(i, j)| if i <= j { reflectors[(i, j)] } else { T::zero() });
        Ok(PivotedQr { r, permutation })
    }
}

/// B ← R⁻¹ B for R [r, r] upper triangular and B [r, n], in standard layout or its transpose.
///
/// # Panics
/// If B is in neither layout.
pub fn solve_upper<T: Real>(r: ArrayView2<'_, T>, b: &mut Array2<T>) {
    let mut b = b.view_mut();
    let b = mat_mut(&mut b).expect("an array without gaps");
    solve_upper_triangular_in_place(mat(&dense(r)), b, Par::Seq);
}

/// B ← L⁻¹ B for L [r, r] lower triangular and B [r, n] without gaps.
pub(crate) fn solve_lower<T: Real>(lower: ArrayView2<'_, T>, mut b: ArrayViewMut2<'_, T>) {
    let b = mat_mut(&mut b).expect("an array without gaps");
    solve_lower_triangular_in_place(mat(&dense(lower)), b, Par::Seq);
}

/// B ← L⁻ᵀ B, likewise.
pub(crate) fn solve_lower_transposed<T: Real>(lower: ArrayView2<'_, T>, mut b: ArrayViewMut2<'_, T>) {
    let b = mat_mut(&mut b).expect("an array without gaps");
    solve_upper_triangular_in_place(mat(&dense(lower)).transpose(), b, Par::Seq);
}

/// C −= A B, for C without gaps.
pub(crate) fn subtract_product<T: Real>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
) {
    let c = mat_mut(&mut c).expect("an array without gaps");
    matmul(c, Accum::Add, mat(&dense(a)), mat(&dense(b)), -T::one(), Par::Seq);
}

/// L of C = L Lᵀ in place, zero above the diagonal; the lower triangle is read. False if rounding finds it indefinite.
pub(crate) fn factor_lower<T: Real>(matrix: &mut Array2<T>) -> bool {
    let size = matrix.nrows();
    let mut view = matrix.view_mut();
    let lower = mat_mut(&mut view).expect("an array without gaps");
    let params = Default::default();
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<T>(size, Par::Seq, params));
    let found = cholesky_in_place(lower, Default::default(), Par::Seq, MemStack::new(&mut memory), params);
    for row in 0..size {
        matrix.slice_mut(s![row, row + 1..]).fill(T::zero());
    }
    found.is_ok()
}

/// Some columns of the square Q of Y = QR.
fn columns_of_q<T: Real>(y: Array2<T>, wanted: Range<usize>) -> Array2<T> {
    let (rows, cols) = y.dim();
    assert!(rows >= cols, "QR of a wide matrix");
    let mut reflectors = Mat::<T>::from_fn(rows, cols, |i, j| y[[i, j]]);
    drop(y);
    let block = recommended_block_size::<T>(rows, cols);
    let mut coefficients = Mat::<T>::zeros(block, cols);
    let params = Default::default();
    let mut memory =
        MemBuffer::new(qr_in_place_scratch::<T>(rows, cols, block, Par::Seq, params).or(
            apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(rows, block, wanted.len()),
        ));
    let stack = MemStack::new(&mut memory);
    qr_in_place(reflectors.as_mut(), coefficients.as_mut(), Par::Seq, stack, params);
    let mut q = vec![T::zero(); rows * wanted.len()];
    let mut view = MatMut::from_column_major_slice_mut(&mut q, rows, wanted.len());
    for (place, j) in wanted.clone().enumerate() {
        view[(j, place)] = T::one();
    }
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        reflectors.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        view,
        Par::Seq,
        stack,
    );
    Array2::from_shape_vec((rows, wanted.len()).f(), q).expect("q was made in this shape")
}

/// The same array, row-major or column-major without gaps; copied only if it is neither.
fn dense<'a, T: Real>(array: ArrayView2<'a, T>) -> CowArray<'a, T, Ix2> {
    if array.is_standard_layout() || array.t().is_standard_layout() {
        return array.into();
    }
    // Not `to_owned`, which keeps negative strides.
    array.as_standard_layout().into_owned().into()
}

/// faer's view of what [`dense`] made.
fn mat<'a, T: Real>(array: &'a CowArray<'_, T, Ix2>) -> MatRef<'a, T> {
    let (rows, cols) = array.dim();
    let slice = array.as_slice_memory_order().expect("made dense");
    if array.is_standard_layout() {
        MatRef::from_row_major_slice(slice, rows, cols)
    } else {
        MatRef::from_column_major_slice(slice, rows, cols)
    }
}

/// faer's view of an array to write to, if it is row-major or column-major without gaps.
fn mat_mut<'a, T: Real>(array: &'a mut ArrayViewMut2<'_, T>) -> Option<MatMut<'a, T>> {
    let (rows, cols) = array.dim();
    if array.is_standard_layout() {
        Some(MatMut::from_row_major_slice_mut(array.as_slice_mut()?, rows, cols))
    } else if array.t().is_standard_layout() {
        Some(MatMut::from_column_major_slice_mut(array.as_slice_memory_order_mut()?, rows, cols))
    } else {
        None
    }
}
