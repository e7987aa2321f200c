//! Progress on stderr: bars with rate and time left on a terminal, a few plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use lowrank_model::Progress;
use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::sync::Mutex;

/// Plain lines come at these shares of a stage, in tenths.
const PLAIN_STEPS: u64 = 4;

/// Where progress is shown.
pub(crate) enum Console {
    /// Nothing at all.
    Quiet,
    /// Bars that redraw.
    Bars(Mutex<Option<ProgressBar>>),
    /// A line at the start of a stage, a few on the way and one at its end.
    Lines(Mutex<Option<Stage>>),
}

pub(crate) struct Stage {
    name: String,
    total: u64,
    unit: &'static str,
    done: u64,
    said: u64,
}

impl Console {
    pub(crate) fn new(quiet: bool) -> Self {
        if quiet {
            Self::Quiet
        } else if std::io::stderr().is_terminal() {
            Self::Bars(Mutex::new(None))
        } else {
            Self::Lines(Mutex::new(None))
        }
    }
}

/// A poisoned lock only means that another worker panicked; the counter inside is still good to print.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Progress for Console {
    fn start(&self, stage: &str, total: u64, unit: &'static str) {
        match self {
            Self::Quiet => {}
            Self::Bars(bar) => {
                let new = ProgressBar::new(total);
                let template = if unit == "bytes" {
                    "{msg:20} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} left {eta}"
                } else {
                    "{msg:20} {wide_bar} {pos}/{len} {prefix} {per_sec} left {eta}"
                };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    new.set_style(style);
                }
                new.set_prefix(unit);
                new.set_message(stage.to_owned());
                *lock(bar) = Some(new);
            }
            Self::Lines(current) => {
                eprintln!("{stage}: {total} {unit}");
                *lock(current) = Some(Stage { name: stage.to_owned(), total, unit, done: 0, said: 0 });
            }
        }
    }

    fn advance(&self, units: u64) {
        match self {
            Self::Quiet => {}
            Self::Bars(bar) => {
                if let Some(bar) = lock(bar).as_ref() {
                    bar.inc(units);
                }
            }
            Self::Lines(current) => {
                if let Some(stage) = lock(current).as_mut() {
                    stage.done += units;
                    let step = (stage.done * PLAIN_STEPS).checked_div(stage.total).unwrap_or(PLAIN_STEPS);
                    if step > stage.said && step < PLAIN_STEPS {
                        stage.said = step;
                        eprintln!("{}: {}/{} {}", stage.name, stage.done, stage.total, stage.unit);
                    }
                }
            }
        }
    }

    fn finish(&self) {
        match self {
            Self::Quiet => {}
            Self::Bars(bar) => {
                if let Some(bar) = lock(bar).take() {
                    bar.finish_and_clear();
                }
            }
            Self::Lines(current) => {
                if let Some(stage) = lock(current).take() {
                    eprintln!("{}: done", stage.name);
                }
            }
        }
    }

    fn note(&self, text: &str) {
        match self {
            Self::Quiet => {}
            Self::Bars(bar) => match lock(bar).as_ref() {
                Some(bar) => bar.println(format!("note: {text}")),
                None => eprintln!("note: {text}"),
            },
            Self::Lines(_) => eprintln!("note: {text}"),
        }
    }
}

/// The points of a sweep: stages of each are bars with its number before their names. As plain lines they would be too many
/// to read, so there are none, and what was noted of one point is not said again of the next.
pub(crate) struct PointProgress<'a> {
    pub(crate) label: String,
    pub(crate) console: &'a Console,
    pub(crate) noted: &'a Mutex<BTreeSet<String>>,
}

impl Progress for PointProgress<'_> {
    fn start(&self, stage: &str, total: u64, unit: &'static str) {
        if let Console::Bars(_) = self.console {
            self.console.start(&format!("{} {stage}", self.label), total, unit);
        }
    }

    fn advance(&self, units: u64) {
        self.console.advance(units);
    }

    fn finish(&self) {
        self.console.finish();
    }

    fn note(&self, text: &str) {
        if lock(self.noted).insert(text.to_owned()) {
            self.console.note(&format!("{} {text}", self.label));
        }
    }
}
