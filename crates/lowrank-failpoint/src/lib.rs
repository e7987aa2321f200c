//! Fail points: places where a test can kill or stop a run, or simulate a full disk. Every write, flush and rename calls
//! [`hit`] first. Without the feature `armed` these calls compile to nothing. With it, `LOWRANK_FAILPOINT=ACTION:N` acts at
//! the N-th call in the process.
//!
//! | Action | What happens |
//! |---|---|
//! | `kill` | SIGKILL, as the kernel's out-of-memory killer would |
//! | `stop` | SIGSTOP; the test changes something and sends SIGCONT |
//! | `full` | this call and all later ones fail with "no space left on device" |
//! | `panic` | this call panics, as a bug would |
//! | `count` | nothing; the number of calls is printed to stderr after publication |

use std::io;

/// A place where a test can make the run fail.
///
/// # Errors
/// "No space left on device", where a test says so.
#[cfg(not(feature = "armed"))]
#[inline]
pub fn hit() -> io::Result<()> {
    Ok(())
}

/// Called after publication.
#[cfg(not(feature = "armed"))]
#[inline]
pub fn published() {}

#[cfg(feature = "armed")]
pub use armed::{hit, published};

#[cfg(feature = "armed")]
mod armed {
    use super::io;
    use rustix::process::{Signal, getpid, kill_process};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static REACHED: AtomicU64 = AtomicU64::new(0);

    /// Action and number of the call at which it acts.
    fn wanted() -> &'static (String, u64) {
        static WANTED: OnceLock<(String, u64)> = OnceLock::new();
        WANTED.get_or_init(|| {
            let text = std::env::var("LOWRANK_FAILPOINT").unwrap_or_default();
            let (action, place) = text.split_once(':').unwrap_or((&text, "0"));
            (action.to_owned(), place.parse().unwrap_or(0))
        })
    }

    /// Counts a call, and acts if its number has come.
    ///
    /// # Errors
    /// "No space left on device", where a test says so.
    pub fn hit() -> io::Result<()> {
        let reached = 1 + REACHED.fetch_add(1, Ordering::SeqCst);
        let (action, place) = wanted();
        match action.as_str() {
            "kill" if reached == *place => {
                let _ = kill_process(getpid(), Signal::KILL);
                loop {
                    std::thread::park();
                }
            }
            "stop" if reached == *place => {
                let _ = kill_process(getpid(), Signal::STOP);
                Ok(())
            }
            "panic" if reached == *place => panic!("fail point {place}"),
            "full" if reached >= *place => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    /// Prints the number of calls.
    pub fn published() {
        if wanted().0 == "count" {
            eprintln!("fail points: {}", REACHED.load(Ordering::SeqCst));
        }
    }
}
