//! The HTML: assets and data put together.

use crate::{CheckpointPage, ReportError, SweepPage};
use lowrank_writer::template::fill;
use serde::Serialize;
use std::path::Path;

const HTML: &str = include_str!("../assets/page.html");
const CSS: &str = include_str!("../assets/page.css");
const JS: &str = include_str!("../assets/page.js");
const CHARTS: &str = include_str!("../assets/echarts.min.js");
/// What must travel with the charts.
const LICENCES: [&str; 5] = [
    include_str!("../assets/NOTICE.echarts"),
    include_str!("../assets/LICENSE.echarts"),
    include_str!("../assets/LICENSE.zrender"),
    include_str!("../assets/LICENSE.d3"),
    include_str!("../assets/LICENSE.tslib"),
];

/// Version of the JSON inside the page.
pub const PAGE_VERSION: u32 = 1;

/// Everything that the page shows, and the JSON that others can plot again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Page {
    /// [`PAGE_VERSION`].
    pub page_version: u32,
    /// What it is about; the name of a directory, never a path.
    pub name: String,
    /// One line below the name.
    pub subtitle: String,
    /// A checkpoint.
    pub checkpoint: Option<CheckpointPage>,
    /// A sweep.
    pub sweep: Option<SweepPage>,
}

impl Page {
    /// The page of one checkpoint.
    pub fn of_checkpoint(name: String, checkpoint: CheckpointPage) -> Self {
        Self {
            page_version: PAGE_VERSION,
            name,
            subtitle: checkpoint.subtitle(),
            checkpoint: Some(checkpoint),
            sweep: None,
        }
    }

    /// The page of one sweep.
    pub fn of_sweep(name: String, sweep: SweepPage) -> Self {
        let subtitle = sweep.subtitle();
        Self { page_version: PAGE_VERSION, name, subtitle, checkpoint: None, sweep: Some(sweep) }
    }

    /// The whole file.
    pub fn html(&self) -> String {
        let json = serde_json::to_string(self).expect("plain numbers and text serialise");
        fill(
            HTML,
            &[
                ("title", &escaped(&self.name)),
                ("css", CSS),
                // Inside a script element only `<` can end it, and in JSON it stands in strings only.
                ("data", &json.replace('<', "\\u003c")),
                ("charts", CHARTS.trim_end()),
                ("js", JS),
                ("licences", &LICENCES.join("\n\n")),
                ("version", env!("CARGO_PKG_VERSION")),
            ],
        )
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        let failed = |source| ReportError::Write { path: path.to_owned(), source };
        lowrank_files::write_whole(path, self.html().as_bytes()).map_err(failed)
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    fn page(name: &str) -> Page {
        Page {
            page_version: PAGE_VERSION,
            name: name.into(),
            subtitle: String::new(),
            checkpoint: None,
            sweep: None,
        }
    }

    #[test]
    fn the_vendored_charts_are_those_of_the_readme() {
        let readme = include_str!("../assets/README.md");
        let hex: String = Sha256::digest(CHARTS).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(readme.contains(&format!("`{hex}`")), "{hex}");
    }

    #[test]
    fn text_from_outside_stays_text() {
        let html = page("</script><script>alert(1)</script>{{js}}&").html();
        assert!(!html.contains("<script>alert"), "markup in the data became markup");
        assert!(html.contains("<title>&lt;/script>&lt;script>alert(1)&lt;/script>{{js}}&amp;</title>"));
        let data = html.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
        let value: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(value["name"], "</script><script>alert(1)</script>{{js}}&");
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let html = page("a").html();
        let ours = html.replace(CHARTS.trim_end(), "").replace(&LICENCES.join("\n\n"), "");
        for word in ["http:", "https:", "//cdn", "@import", "url(", "fetch(", "import(", " src="] {
            assert!(!ours.contains(word), "{word}");
        }
        assert!(html.contains("default-src 'none'"));
        assert!(!CHARTS.contains("</script") && !JS.contains("</script"));
    }

    #[test]
    fn a_page_is_written_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.report.html");
        page("a").write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), page("a").html());
        let refused = page("a").write(&dir.path().join("no/such/folder.html"));
        assert!(matches!(refused, Err(ReportError::Write { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
