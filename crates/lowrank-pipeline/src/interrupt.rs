//! A wish to stop that comes from outside: each unit asks before it begins, so the one in flight is finished.

use crate::PipelineError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Set once, by a signal handler; 0 until then.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Where a handler stores the number of its signal.
    pub fn handle(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.0)
    }

    /// To be asked before each unit of work.
    pub fn check(&self) -> Result<(), PipelineError> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(PipelineError::Interrupted { signal }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_signal_stops_the_next_unit() {
        let interrupt = Interrupt::default();
        interrupt.check().unwrap();
        interrupt.handle().store(15, Ordering::Relaxed);
        assert!(matches!(interrupt.check(), Err(PipelineError::Interrupted { signal: 15 })));
    }
}
