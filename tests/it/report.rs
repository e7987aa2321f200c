//! The report page: its data, its path, and that other commands write it.

use crate::support::{compress, run, tiny_mixtral};
use std::path::Path;
use tempfile::tempdir;

/// The JSON inside a page.
fn data(page: &Path) -> serde_json::Value {
    let html = std::fs::read_to_string(page).unwrap();
    let (_, rest) = html.split_once("id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn compress_and_verify_leave_a_page_beside_the_checkpoint() {
    let folder = tempdir().unwrap();
    let (out, page) = (folder.path().join("out"), folder.path().join("out.report.html"));
    // An earlier checkpoint of this name was verified. Its verdict does not apply to this one.
    std::fs::write(folder.path().join("out.verification.json"), "{}").unwrap();
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--quiet"]).ok();
    let found = data(&page);
    assert_eq!(found["name"], "out");
    assert_eq!(found["checkpoint"]["report"], json(&out.join("lowrank_report.json")));
    assert_eq!(found["checkpoint"]["spectra"], json(&out.join("lowrank_spectra.json")));
    assert!(found["checkpoint"]["verification"].is_null());
    let text = std::fs::read_to_string(&page).unwrap();
    assert!(!text.contains(&*folder.path().to_string_lossy()), "no path gets into the page");

    let original = tiny_mixtral();
    run([
        "verify".as_ref(),
        "--original".as_ref(),
        original.as_os_str(),
        "--compressed".as_ref(),
        out.as_os_str(),
        "--max-tokens".as_ref(),
        "512".as_ref(),
    ])
    .ok();
    let verification = json(&folder.path().join("out.verification.json"));
    assert_eq!(data(&page)["checkpoint"]["verification"], verification);
    assert_eq!(verification["verdict"], "passed");

    let again = folder.path().join("again.html");
    run(["report".as_ref(), out.as_os_str(), "--out".as_ref(), again.as_os_str()]).ok();
    assert!(
        std::fs::read(again).unwrap() == std::fs::read(page).unwrap(),
        "the same documents, the same page"
    );
}

#[test]
fn a_page_of_what_is_no_checkpoint_or_of_anothers_verdict_is_refused() {
    let folder = tempdir().unwrap();
    run(["report".as_ref(), folder.path().as_os_str()]).refused(3, &["no lowrank_report.json"]);
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    compress(&tiny_mixtral(), &a, &["--budget", "20%", "--quiet"]).ok();
    compress(&tiny_mixtral(), &b, &["--budget", "30%", "--quiet"]).ok();
    let original = tiny_mixtral();
    run([
        "verify".as_ref(),
        "--static-only".as_ref(),
        "--original".as_ref(),
        original.as_os_str(),
        "--compressed".as_ref(),
        a.as_os_str(),
    ])
    .ok();
    let verdict = folder.path().join("a.verification.json");
    run(["report".as_ref(), b.as_os_str(), "--verification".as_ref(), verdict.as_os_str()])
        .refused(14, &["a.verification.json", "another checkpoint", "verify again"]);
}

#[test]
fn a_page_that_cannot_be_written_does_not_spoil_a_compression() {
    let folder = tempdir().unwrap();
    let (out, page) = (folder.path().join("out"), folder.path().join("out.report.html"));
    std::fs::create_dir_all(page.join("in the way")).unwrap();
    let said = compress(&tiny_mixtral(), &out, &["--budget", "20%"]).ok();
    assert!(said.stderr.contains("out.report.html: the report was not written"), "{said:#?}");
    run(["report".as_ref(), out.as_os_str()]).refused(8, &["the report was not written"]);
    let left: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}
