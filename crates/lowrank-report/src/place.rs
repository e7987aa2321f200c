//! Paths of the files beside a checkpoint: `out/NAME` → `out/NAME.report.html`. They are not inside it, because the manifest
//! fixes its content.

use std::path::{Path, PathBuf};

/// Ending of the result of `verify`.
pub const VERIFICATION: &str = "verification.json";
/// Ending of the report page.
pub const REPORT: &str = "report.html";

/// The name of a directory, also for `.` and for a path that ends with `/`.
pub fn name(dir: &Path) -> String {
    let whole = || dir.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let own = dir.file_name().map(|name| name.to_string_lossy().into_owned());
    own.or_else(whole).unwrap_or_else(|| "checkpoint".into())
}

/// `NAME.what` beside a directory.
pub fn beside(dir: &Path, what: &str) -> PathBuf {
    // `.` and `..` have no name of their own.
    let named = match dir.file_name() {
        Some(_) => dir.to_owned(),
        None => dir.canonicalize().unwrap_or_else(|_| dir.to_owned()),
    };
    named.with_file_name(format!("{}.{what}", name(&named)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_lie_beside_the_checkpoint() {
        assert_eq!(beside(Path::new("a/b"), VERIFICATION), Path::new("a/b.verification.json"));
        assert_eq!(beside(Path::new("a/b/"), REPORT), Path::new("a/b.report.html"));
        let here = std::env::current_dir().unwrap();
        let expected = format!("{}.report.html", here.file_name().unwrap().to_string_lossy());
        assert_eq!(beside(Path::new("."), REPORT), here.with_file_name(expected));
    }
}
