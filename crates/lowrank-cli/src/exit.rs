//! How a command fails: with a kind, its exit code, and one line that says what, where and what to do. The table of kinds is
//! in `docs/exit-codes.md`.

use lowrank_cache::CacheError;
use lowrank_calibrate::CalibrateError;
use lowrank_forward::ForwardError;
use lowrank_model::{ErrorKind, failure};
use lowrank_pipeline::PipelineError;
use lowrank_reader::ReadError;
use lowrank_report::ReportError;
use lowrank_sweep::SweepError;
use lowrank_verify::VerifyError;
use lowrank_writer::WriteError;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::path::Path;
use std::sync::Once;

/// What a command returns.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a command failed. Its text is the line that is printed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line itself found it.
    Own { kind: ErrorKind, line: String },
    /// A checkpoint cannot be read.
    Read(ReadError),
    /// A job failed.
    Pipeline(PipelineError),
    /// There is no verdict.
    Verify(VerifyError),
    /// There is no page.
    Report(ReportError),
    /// The folder of a sweep cannot be used.
    Sweep(SweepError),
}

macro_rules! from {
    ($($variant:ident($error:ty)),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::$variant(error)
            }
        }
    )*};
}
from!(Read(ReadError), Pipeline(PipelineError), Verify(VerifyError), Report(ReportError), Sweep(SweepError));

/// A flag, a config key, or a file that one names cannot be used.
pub(crate) fn usage(line: impl Into<String>) -> Failure {
    Failure::new(ErrorKind::Usage, line)
}

/// A file that a command leaves could not be written: `what` ends the message.
pub(crate) fn unwritten(path: &Path, what: &str, error: &std::io::Error) -> Failure {
    let kind = ErrorKind::of_io(error, ErrorKind::Output);
    Failure::new(kind, format!("{}: {what}: {error}", path.display()))
}

impl Failure {
    pub(crate) fn new(kind: ErrorKind, line: impl Into<String>) -> Self {
        Self::Own { kind, line: line.into() }
    }

    /// Something that cannot fail did.
    pub(crate) fn bug(error: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Bug, error.to_string())
    }

    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Own { kind, .. } => *kind,
            Self::Read(error) => error.kind(),
            Self::Pipeline(error) => error.kind(),
            Self::Verify(error) => error.kind(),
            Self::Report(error) => error.kind(),
            Self::Sweep(error) => error.kind(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match self {
            Self::Own { line, .. } => line.clone(),
            Self::Read(error) => failure::chain(error),
            Self::Pipeline(error) => failure::chain(error),
            Self::Verify(error) => failure::chain(error),
            Self::Report(error) => failure::chain(error),
            Self::Sweep(error) => failure::chain(error),
        };
        f.write_str(&printable(&line))?;
        remedy(self).map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

/// Runs the program and gives its exit code. A failure, and a panic in any thread, is one line on stderr.
pub(crate) fn guarded(run: impl FnOnce() -> Result<()>) -> u8 {
    /// One panic may cause another, in the thread that waits for the first.
    static SAID: Once = Once::new();
    set_hook(Box::new(|panic| SAID.call_once(|| tell_panic(&panic.to_string()))));
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => 0,
        Ok(Err(failure)) => {
            eprintln!("error: {failure}");
            exit_code(failure.kind())
        }
        Err(_) => exit_code(ErrorKind::Bug),
    }
}

fn tell_panic(what: &str) {
    let mut stderr = std::io::stderr();
    let trace = Backtrace::capture();
    // Where stderr is closed there is nobody to tell.
    if trace.status() == BacktraceStatus::Captured {
        let _ = writeln!(stderr, "{trace}");
    }
    let what = printable(what);
    let _ = writeln!(stderr, "error: internal error: {what}; please report it with the command that you ran");
}

/// One line. Names of files may hold anything; a terminal must not obey them.
fn printable(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().map(|c| if c.is_control() { c.escape_debug().to_string() } else { c.into() }).collect()
}

/// These numbers are public and stay: a new kind takes a new one.
const fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Bug => 1,
        ErrorKind::Usage => 2,
        ErrorKind::NoModel => 3,
        ErrorKind::Unsupported => 4,
        ErrorKind::BrokenCheckpoint => 5,
        ErrorKind::BadNumbers => 6,
        ErrorKind::BudgetImpossible => 7,
        ErrorKind::Output => 8,
        ErrorKind::NoRoom => 9,
        ErrorKind::InputOutput => 10,
        ErrorKind::VerificationMissed => 11,
        ErrorKind::NotReproduced => 12,
        ErrorKind::PointsFailed => 13,
        ErrorKind::BrokenRecord => 14,
        ErrorKind::DeviceFailed => 15,
        ErrorKind::Interrupted => 130,
        ErrorKind::Terminated => 143,
    }
}

/// What to do about a failure, where that is a matter of flags: the libraries know none.
fn remedy(failure: &Failure) -> Option<&'static str> {
    match failure {
        Failure::Pipeline(error) => of_pipeline(error),
        Failure::Verify(VerifyError::Forward(error)) => of_forward(error),
        Failure::Sweep(error) | Failure::Report(ReportError::Sweep(error)) => match error {
            SweepError::OtherSweep { .. } => Some("choose another --out, or remove the folder"),
            _ => None,
        },
        Failure::Own { .. } | Failure::Read(_) | Failure::Verify(_) | Failure::Report(_) => None,
    }
}

fn of_pipeline(error: &PipelineError) -> Option<&'static str> {
    use PipelineError as E;
    match error {
        E::Write(error) => of_write(error),
        E::Calibrate(CalibrateError::Forward(error)) => of_forward(error),
        E::Calibrate(CalibrateError::Cache(CacheError::Io { .. })) => {
            Some("--cache DIR uses another place, --cache none uses no cache")
        }
        E::Calibrate(CalibrateError::NotFinite { .. } | CalibrateError::LogitsNotFinite { .. }) => {
            Some("--calibrate none goes by the weights alone")
        }
        E::NoDevice(_) => Some("--algebra cuda needs a device, --algebra cpu does not"),
        E::NothingToMeasureOn => Some("drop --calibrate none or --sensitivity measured"),
        E::StructuresNotMeasured => Some("drop --calibrate none and --sensitivity, or --structures"),
        E::SharedBasesAndEqualExperts => {
            Some("leave `base` out of --structures, or drop --rank-groups layer and --allocation uniform")
        }
        E::UniformWidths => Some("with --allocation uniform give --structures width or rank"),
        E::PlanStorage { .. } => Some("drop --storage, or make a new plan"),
        E::PlanDtype { .. } => Some("give the --dtype that the plan was made with, or make a new plan"),
        E::WindowTooLong { .. } => Some("lower --calibration-window"),
        E::OtherTexts { .. } => Some("--calibrate names the texts that were used"),
        E::FixedRank { .. } => Some("give --fix-rank a rank in this range"),
        E::DenseAndFixed { .. } => Some("change --keep-dense or --fix-rank"),
        E::Overflow { .. } => Some("choose another --dtype"),
        E::TooLittleMemory { .. } => Some("raise --memory"),
        E::TooManyWorkers { .. } => Some("lower --workers"),
        _ => None,
    }
}

fn of_write(error: &WriteError) -> Option<&'static str> {
    match error {
        WriteError::OutExists { .. } => Some("choose another --out, or remove it"),
        WriteError::Busy { .. } => Some("wait for it, or choose another --out"),
        WriteError::OtherJob { .. } => {
            Some("run the earlier command again to resume it, or pass --restart to discard it")
        }
        WriteError::NoSpace { .. } => Some("free some space, or choose another --out"),
        WriteError::HeaderTooLarge { .. } => Some("lower --max-shard-size"),
        _ => None,
    }
}

fn of_forward(error: &ForwardError) -> Option<&'static str> {
    match error {
        ForwardError::NoDevice { .. } => Some("use --device cpu, or auto"),
        ForwardError::Device { .. } => Some("use --device cpu, or fewer tokens if its memory is full"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::config::ConfigError;
    use lowrank_model::plan::PlanError;
    use lowrank_model::{MatrixId, Projection, pivots::PivotError};
    use lowrank_svd::SvdError;
    use lowrank_text::TextError;
    use std::io;
    use std::process::Command;

    #[test]
    fn a_cause_is_printed_once() {
        let path = || Path::new("a/b").to_owned();
        let io = || io::Error::other("the cause");
        let json = || serde_json::from_str::<u8>("\"the cause\"").unwrap_err();
        let svd = || SvdError::NotAMatrix { shape: vec![77_077] };
        let name = MatrixId { layer: 0, expert: 0, projection: Projection::Gate };
        let config = || ConfigError::Quantised("the cause".into());
        let pivots = PivotError::Twice { index: 77_077 };
        let tensor = || "w".to_owned();
        let text = || TextError::Read { path: path(), source: io() };
        let cache = CacheError::Io { path: path(), action: "read", source: io() };
        let failures: Vec<Failure> = vec![
            ReadError::Io { path: path(), source: io() }.into(),
            ReadError::Json { path: path(), source: json() }.into(),
            ReadError::Config { path: path(), source: config() }.into(),
            ReadError::HeaderJson { path: path(), source: json() }.into(),
            ReadError::BadPivots { path: path(), tensor: tensor(), source: pivots }.into(),
            ReadError::TensorIo { path: path(), tensor: tensor(), source: io() }.into(),
            VerifyError::Text(text()).into(),
            PipelineError::Io { path: path(), source: io() }.into(),
            PipelineError::Svd { name, source: svd() }.into(),
            PipelineError::Plan(PlanError::Json("the cause".into())).into(),
            PipelineError::Calibrate(CalibrateError::Svd { name, source: svd() }).into(),
            PipelineError::Calibrate(CalibrateError::Text(text())).into(),
            PipelineError::Calibrate(CalibrateError::Cache(cache)).into(),
            PipelineError::Write(WriteError::Config(config())).into(),
            PipelineError::Write(WriteError::Io { path: path(), action: "write", source: io() }).into(),
            ReportError::Read { path: path(), source: io() }.into(),
            ReportError::Document { path: path(), source: json() }.into(),
            ReportError::Write { path: path(), source: io() }.into(),
            SweepError::Io { path: path(), action: "read", source: io() }.into(),
        ];
        for failure in failures {
            let line = failure.to_string();
            let causes = line.matches("the cause").count() + line.matches("77077").count();
            assert_eq!(causes, 1, "{line}");
        }
    }

    #[test]
    fn the_page_lists_every_kind() {
        let kinds = [
            ErrorKind::Bug,
            ErrorKind::Usage,
            ErrorKind::NoModel,
            ErrorKind::Unsupported,
            ErrorKind::BrokenCheckpoint,
            ErrorKind::BadNumbers,
            ErrorKind::BudgetImpossible,
            ErrorKind::Output,
            ErrorKind::NoRoom,
            ErrorKind::InputOutput,
            ErrorKind::VerificationMissed,
            ErrorKind::NotReproduced,
            ErrorKind::PointsFailed,
            ErrorKind::BrokenRecord,
            ErrorKind::DeviceFailed,
            ErrorKind::Interrupted,
            ErrorKind::Terminated,
        ];
        let page = include_str!("../../../docs/exit-codes.md");
        let rows = page.lines().filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            Some((cells.get(1)?.parse::<u8>().ok()?, cells.last_chunk::<2>()?[0] == "kept"))
        });
        let told: Vec<(u8, bool)> = rows.filter(|(code, _)| *code != 0).collect();
        let meant: Vec<(u8, bool)> = kinds.iter().map(|kind| (exit_code(*kind), kind.is_passing())).collect();
        assert_eq!(told, meant);
    }

    #[test]
    fn a_panic_in_a_worker_is_one_line_and_exit_code_1() {
        const CHILD: &str = "LOWRANK_TEST_PANIC";
        if std::env::var_os(CHILD).is_some() {
            let panicking = || -> Result<()> {
                rayon::scope(|scope| scope.spawn(|_| panic!("a line\nand another")));
                Ok(())
            };
            std::process::exit(guarded(panicking).into());
        }
        let name = "exit::tests::a_panic_in_a_worker_is_one_line_and_exit_code_1";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").env_remove("RUST_BACKTRACE");
        let output = child.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
        assert!(stderr.starts_with("error: internal error: panicked at "), "{stderr}");
        assert!(stderr.contains("a line and another; please report it"), "{stderr}");
    }
}
