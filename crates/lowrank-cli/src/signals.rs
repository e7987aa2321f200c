//! SIGINT and SIGTERM: the first lets the matrix in flight be finished, the second ends the process at once.

use crate::exit::{Failure, Result};
use lowrank_pipeline::Interrupt;
use signal_hook::consts::{SIGINT, SIGPIPE, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Exit codes of a process that ended by a signal, as shells count.
const BASE: i32 = 128;

/// Ends the process, as other Unix tools do, when whoever reads its output has closed it (`inspect | head`).
pub(crate) fn end_on_closed_pipe() -> Result<()> {
    flag::register_conditional_shutdown(SIGPIPE, BASE + SIGPIPE, Arc::new(AtomicBool::new(true)))
        .map(|_| ())
        .map_err(|error| Failure::bug(format_args!("cannot listen to signals: {error}")))
}

/// From here on, a signal is a wish.
pub(crate) fn watch() -> Result<Interrupt> {
    let interrupt = Interrupt::default();
    let once = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds `once` unset.
        flag::register_conditional_shutdown(signal, BASE + signal, Arc::clone(&once))
            .and_then(|_| flag::register(signal, Arc::clone(&once)))
            .and_then(|_| flag::register_usize(signal, interrupt.handle(), signal as usize))
            .map_err(|error| Failure::bug(format_args!("cannot listen to signals: {error}")))?;
    }
    Ok(interrupt)
}
