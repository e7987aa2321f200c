//! Reductions on their way from the spectra to the factors: a file without a name, gone when the run is.
//!
//! About half a matrix of the short side each, 34 MB in f32 for an 8x7B model: too much for memory, little for the disk that
//! takes the output. What does not fit is computed again. No byte of the output depends on it.

use lowrank_model::MatrixId;
use lowrank_svd::Reduction;
use lowrank_svd::reduction::ReductionNumbers;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where reductions wait.
#[derive(Debug)]
pub struct Scratch {
    file: File,
    folder: PathBuf,
    /// Of the disk, for the output.
    reserved_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    end: u64,
    kept: BTreeMap<MatrixId, Kept>,
}

/// One matrix' place in the file.
#[derive(Debug)]
struct Kept {
    /// Without its numbers.
    reduction: Reduction,
    offset: u64,
    numbers: usize,
    is_f64: bool,
}

impl Scratch {
    /// In a folder of whose disk this much is for the output. `None` where no such file can be made.
    pub fn new(folder: &Path, reserved_bytes: u64) -> Option<Self> {
        let file = tempfile::tempfile_in(folder).ok()?;
        Some(Self { file, folder: folder.to_owned(), reserved_bytes, state: Mutex::default() })
    }

    /// Keeps a reduction, if there is room.
    pub(crate) fn keep(&self, id: MatrixId, mut reduction: Reduction) {
        let numbers = reduction.take_numbers();
        let (bytes, count, is_f64): (&[u8], usize, bool) = match &numbers {
            ReductionNumbers::F32(values) => (bytemuck::cast_slice(values), values.len(), false),
            ReductionNumbers::F64(values) => (bytemuck::cast_slice(values), values.len(), true),
        };
        let len = bytes.len() as u64;
        if lowrank_writer::check_space(&self.folder, self.reserved_bytes.saturating_add(len)).is_err() {
            return;
        }
        let offset = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let offset = state.end;
            state.end += len;
            offset
        };
        // A disk that fails here fails again where it matters, and is named there.
        if self.file.write_all_at(bytes, offset).is_ok() {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.kept.insert(id, Kept { reduction, offset, numbers: count, is_f64 });
        }
    }

    /// Brings a reduction back; `None` if it was not kept.
    pub(crate) fn take(&self, id: MatrixId) -> Option<Reduction> {
        let kept = self.state.lock().unwrap_or_else(PoisonError::into_inner).kept.remove(&id)?;
        let Kept { mut reduction, offset, numbers, is_f64 } = kept;
        let read = |bytes: &mut [u8]| -> io::Result<()> { self.file.read_exact_at(bytes, offset) };
        let numbers = if is_f64 {
            let mut values = vec![0.0_f64; numbers];
            read(bytemuck::cast_slice_mut(&mut values)).ok()?;
            ReductionNumbers::F64(values)
        } else {
            let mut values = vec![0.0_f32; numbers];
            read(bytemuck::cast_slice_mut(&mut values)).ok()?;
            ReductionNumbers::F32(values)
        };
        reduction.put_numbers(numbers);
        Some(reduction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_compute::Faer;
    use lowrank_model::{Dtype, Projection, Tensor};
    use lowrank_svd::{PrecisionChoice, SvdOptions, factor, spectrum};

    #[test]
    fn factors_have_the_same_bits_with_a_reduction_and_without_and_it_is_there_once() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(folder.path(), 0).unwrap();
        let id = |expert| MatrixId { layer: 0, expert, projection: Projection::Gate };
        let values: Vec<f32> = (0..90 * 40).map(|i: u32| ((i * i) % 1009) as f32 / 500.0 - 1.0).collect();
        let w = Tensor::from_f32(vec![90, 40], Dtype::Bf16, &values).unwrap();
        for (expert, precision) in [PrecisionChoice::F32, PrecisionChoice::F64].into_iter().enumerate() {
            let options = SvdOptions { precision, ..SvdOptions::default() };
            let (spectrum, reduction) = spectrum(&Faer, &w, &options).unwrap();
            let reduction = reduction.expect("faer reduces");
            scratch.keep(id(expert), reduction.clone());
            let back = scratch.take(id(expert));
            assert_eq!(back, Some(reduction));
            assert_eq!(scratch.take(id(expert)), None);
            let [with, without] = [back, None].map(|reduction| {
                let (spectrum, reduction) = (Some(&spectrum), reduction.as_ref());
                factor(&Faer, &w, 17, &SvdOptions { spectrum, reduction, ..options }).unwrap()
            });
            assert_eq!(with, without);
            // The reduction is used: that of another matrix gives other factors.
            let reversed: Vec<f32> = values.iter().rev().copied().collect();
            let other = Tensor::from_f32(vec![90, 40], Dtype::Bf16, &reversed).unwrap();
            let (_, reduction) = lowrank_svd::spectrum(&Faer, &other, &options).unwrap();
            let options = SvdOptions { spectrum: Some(&spectrum), reduction: reduction.as_ref(), ..options };
            assert_ne!(factor(&Faer, &w, 17, &options).unwrap(), without);
        }
    }

    #[test]
    fn a_disk_that_the_output_needs_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(folder.path(), u64::MAX).unwrap();
        let id = MatrixId { layer: 0, expert: 0, projection: Projection::Gate };
        let w = Tensor::from_f32(vec![4, 3], Dtype::F32, &[1.0; 12]).unwrap();
        let (_, reduction) = spectrum(&Faer, &w, &SvdOptions::default()).unwrap();
        scratch.keep(id, reduction.expect("faer reduces"));
        assert_eq!(scratch.take(id), None);
        assert_eq!(scratch.state.lock().unwrap().end, 0, "bytes written");
    }
}
