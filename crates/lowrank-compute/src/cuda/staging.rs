//! Copies between host and device by way of pinned memory, piece by piece, so that they overlap with what the device computes.
//!
//! From ordinary memory the driver copies while the caller waits. Here the caller's numbers are moved into one of two pinned
//! pieces while the device takes the other, and an upload returns as soon as the last piece is filled: whatever is asked of the
//! stream next waits for it there, and not the host here. A download fills one piece while the other is moved out.

use super::error::{CudaError, During};
use cudarc::driver::{CudaEvent, CudaStream, result};
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Arc;

/// Long enough for full speed, short enough to fill the pipeline early.
const PIECE_BYTES: usize = if cfg!(test) { 1 << 10 } else { 4 << 20 };

/// Two pinned pieces of one stream.
#[derive(Debug)]
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    pieces: [Piece; 2],
    next: Cell<usize>,
}

/// Pinned memory that is in use until `copied`.
#[derive(Debug)]
struct Piece {
    bytes: *mut c_void,
    copied: CudaEvent,
}

// SAFETY: the memory belongs to the piece alone, and CUDA takes its address on any thread.
unsafe impl Send for Piece {}

impl Piece {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let copied = stream.context().new_event(None).during("making an event")?;
        // SAFETY: the context was made current by `new_event`; the memory is freed once, by `drop`.
        let bytes = unsafe { result::malloc_host(PIECE_BYTES, 0) }.during("pinning memory")?;
        Ok(Self { bytes, copied })
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // A failure means that the driver has shut down, which ends the copy, too.
        let _ = self.copied.synchronize();
        // SAFETY: allocated by `new`, freed once, and no copy is under way: the event was waited for.
        let _ = unsafe { result::free_host(self.bytes) };
    }
}

impl Staging {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        let pieces = [Piece::new(stream)?, Piece::new(stream)?];
        Ok(Self { stream: stream.clone(), pieces, next: Cell::new(0) })
    }

    /// A piece that nobody copies from or to.
    fn piece(&self) -> Result<&Piece, CudaError> {
        let at = self.next.get();
        self.next.set(1 - at);
        self.pieces[at].copied.synchronize().during("waiting for a copy")?;
        Ok(&self.pieces[at])
    }

    /// Copies to the device, when everything before is done. The numbers may change as soon as this returns.
    ///
    /// # Safety
    /// `to` is the address of memory of this stream that holds as many numbers.
    pub(super) unsafe fn upload<T>(&self, values: &[T], to: u64) -> Result<(), CudaError> {
        let (base, len) = (values.as_ptr().cast::<u8>(), size_of_val(values));
        for first in (0..len).step_by(PIECE_BYTES) {
            let bytes = PIECE_BYTES.min(len - first);
            let piece = self.piece()?;
            // SAFETY: `first + bytes` ends within `values`, the piece holds PIECE_BYTES, and no copy is under way from it.
            // The device's memory is large enough by the caller's promise, and the piece stays until its event has passed.
            unsafe {
                std::ptr::copy_nonoverlapping(base.add(first), piece.bytes.cast(), bytes);
                let filled = std::slice::from_raw_parts(piece.bytes.cast::<u8>(), bytes);
                result::memcpy_htod_async(to + first as u64, filled, self.stream.cu_stream())
            }
            .during("copying to the device")?;
            piece.copied.record(&self.stream).during("marking a copy")?;
        }
        Ok(())
    }

    /// Copies from the device, when everything before is done.
    ///
    /// # Safety
    /// `from` is the address of memory of this stream that holds as many numbers, and any bits are a T.
    pub(super) unsafe fn download<T>(&self, from: u64, values: &mut [T]) -> Result<(), CudaError> {
        let (base, len) = (values.as_mut_ptr().cast::<u8>(), size_of_val(values));
        let mut under_way: Option<(&Piece, usize, usize)> = None;
        let arrive = |(piece, first, bytes): (&Piece, usize, usize)| -> Result<(), CudaError> {
            piece.copied.synchronize().during("copying from the device")?;
            // SAFETY: `first + bytes` ends within `values`, and the copy into the piece has ended.
            unsafe { std::ptr::copy_nonoverlapping(piece.bytes.cast(), base.add(first), bytes) };
            Ok(())
        };
        for first in (0..len).step_by(PIECE_BYTES) {
            let bytes = PIECE_BYTES.min(len - first);
            let piece = self.piece()?;
            // SAFETY: the device's memory is large enough by the caller's promise; the piece holds PIECE_BYTES, nobody else
            // uses it, and it stays until its event has passed.
            unsafe {
                let target = std::slice::from_raw_parts_mut(piece.bytes.cast::<u8>(), bytes);
                result::memcpy_dtoh_async(target, from + first as u64, self.stream.cu_stream())
            }
            .during("copying from the device")?;
            piece.copied.record(&self.stream).during("marking a copy")?;
            if let Some(before) = under_way.replace((piece, first, bytes)) {
                arrive(before)?;
            }
        }
        under_way.map_or(Ok(()), arrive)
    }
}
