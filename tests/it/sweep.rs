//! Sweeps: which points run, what is refused, and that no point runs twice.

use crate::support::{Outcome, compress, files, run, tiny_mixtral, tool};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::{TempDir, tempdir};

/// A folder with a config in it.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new(config: &str) -> Self {
        let bench = Self { folder: tempdir().unwrap() };
        bench.write(config);
        bench
    }

    fn write(&self, config: &str) {
        let model = tiny_mixtral();
        let text = format!("model = {:?}\n{config}", model.to_str().unwrap());
        std::fs::write(self.folder.path().join("sweep.toml"), text).unwrap();
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = tool();
        command.arg("sweep").arg(self.folder.path().join("sweep.toml")).arg("--out").arg(self.out());
        command.args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Outcome {
        let (config, out) = (self.folder.path().join("sweep.toml"), self.out());
        let start = ["sweep".as_ref(), config.as_os_str(), "--out".as_ref(), out.as_os_str()];
        run(start.into_iter().chain(words.iter().map(AsRef::as_ref)))
    }

    fn rows(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.out().join("results.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or(0, |last| last + 1);
        text[..whole].lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn table(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.out().join("results.csv")).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

const PLANS: &str = r#"
calibrate = ["none"]
[grid]
layout = ["uv", "pivoted"]
budget = ["10%", "20%", "5.5M"]
[[point]]
budget = "20%"
keep-dense = ['layers\.0\.']
[[point]]
target-size = "9MB"
fix-rank = ['\.w2$=40', 'layers\.1\..*\.w2$=17']
"#;

#[test]
fn points_are_planned_one_row_each_and_a_failure_does_not_end_the_sweep() {
    let bench = Bench::new(PLANS);
    let dry = bench.run(&["--dry-run"]).ok();
    assert!(dry.stdout.contains("8 points; nothing was planned") && !bench.out().exists(), "{dry:?}");

    let said = bench.run(&["--json"]);
    said.refused(
        13,
        &["2 of 8 points failed", "point 3", "5,500,000", "most that can be removed is 5,449,728"],
    );
    let summary = said.json();
    assert_eq!(
        (&summary["planned"], &summary["failed"], &summary["verified"]),
        (&6.into(), &2.into(), &0.into())
    );
    let rows = bench.rows();
    assert_eq!(
        rows.iter().map(|row| row["point"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!((&rows[2]["status"], &rows[2]["params"]), (&"failed".into(), &Value::Null));
    assert_eq!(rows[0]["settings"]["storage"], "uv");
    // The same plan as `plan` makes.
    let plan = bench.folder.path().join("plan.json");
    let model = tiny_mixtral();
    let words = [
        "plan",
        "--model",
        model.to_str().unwrap(),
        "--calibrate",
        "none",
        "--layout",
        "pivoted",
        "--budget",
        "20%",
        "--json",
        "--plan-out",
        plan.to_str().unwrap(),
    ];
    let alone = run(words).ok().json();
    assert_eq!(rows[4]["params"], alone["after"]["params"]);
    assert_eq!(rows[4]["bytes"], alone["after"]["bytes"]);
    assert_eq!(rows[4]["predicted_error"], alone["optimality"]["objective"]);
    assert_eq!(rows[4]["duality_gap"], alone["optimality"]["duality_gap"]);
    assert!(rows[7]["bytes"].as_u64().unwrap() <= 9_000_000);
    // At one budget, u·v and a layer kept dense are not on the front. No other point is as small as the last one.
    let front: Vec<bool> = rows.iter().map(|row| row["on_front"].as_bool().unwrap()).collect();
    assert_eq!(front, [false, false, false, true, true, false, false, true]);
    let table = bench.table();
    assert_eq!(table.len(), 9);
    assert!(table[0].starts_with("point,id,status,") && table[1].contains(",planned,"), "{table:?}");
    assert!(bench.out().join("report.html").is_file());
}

#[test]
fn what_is_done_is_not_done_again_and_a_torn_line_costs_its_point() {
    let bench = Bench::new(PLANS);
    bench.run(&["--quiet", "--max-points", "2", "--jobs", "1"]).ok();
    let first = bench.rows();
    assert_eq!(first.len(), 2);
    bench.run(&["--quiet"]).refused(13, &["2 of 8"]);
    let (all, whole) = (bench.rows(), files(&bench.out()));
    for (before, now) in first.iter().zip(&all) {
        assert_eq!(before["plan_seconds"], now["plan_seconds"]);
    }
    // The points that failed are tried again; the others keep even their times.
    bench.run(&["--quiet"]).refused(13, &["2 of 8"]);
    assert!(files(&bench.out()) == whole);

    // The state that a kill leaves: the last line is cut off, and a temporary file is half written.
    let jsonl = bench.out().join("results.jsonl");
    let text = std::fs::read(&jsonl).unwrap();
    std::fs::write(&jsonl, &text[..text.len() - 40]).unwrap();
    std::fs::write(bench.out().join(".results.csv.partial"), "half").unwrap();
    bench.run(&["--quiet"]).refused(13, &["2 of 8"]);
    let again = bench.rows();
    assert_eq!((&again[..7], again.len()), (&all[..7], 8));
    assert_eq!(again[7]["params"], all[7]["params"]);

    // An extended grid runs only the new points, and keeps the rows of points that it no longer contains.
    bench.write(
        &PLANS.replace("\"5.5M\"", "\"30%\"").replace("[[point]]\nbudget", "[[point]]\nmin-rank = 2\nbudget"),
    );
    bench.run(&["--quiet"]).ok();
    let grown = bench.rows();
    let number = |row: &Value| row["point"].as_u64().unwrap();
    assert_eq!(grown.iter().map(number).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]);
    assert_eq!(grown[0], all[0]);
}

const FRONT: &str = r#"
compress = "pareto"
calibrate = ["none"]
[verify]
max-tokens = 512
[grid]
layout = ["uv", "pivoted"]
budget = ["10%", "40%"]
"#;

#[test]
fn the_front_is_compressed_and_verified_and_its_checkpoints_go_again() {
    let bench = Bench::new(FRONT);
    let said = bench.run(&[]).ok();
    assert!(said.stdout.contains("4 points: 4 planned, 2 verified, 0 failed"), "{said:?}");
    let rows = bench.rows();
    let verified: Vec<bool> = rows.iter().map(|row| row["status"] == "verified").collect();
    assert_eq!(verified, [false, false, true, true]);
    assert!(rows[2]["mean_kl"].as_f64().unwrap() < rows[3]["mean_kl"].as_f64().unwrap());
    assert!(rows[3]["compress_seconds"].as_f64().unwrap() > 0.0);
    let points = files(&bench.out().join("points"));
    let id = rows[3]["id"].as_str().unwrap();
    let names: Vec<&String> = points.keys().filter(|name| name.starts_with(id)).collect();
    let expected = ["plan.json", "report.html", "verification.json"].map(|what| format!("{id}.{what}"));
    assert_eq!(names, expected.iter().collect::<Vec<_>>());
    assert_eq!(points.len(), 6, "nothing else is left: {:?}", points.keys());

    // The kept plan makes the point's checkpoint again, and verify gives the same result.
    let (plan, out) = (bench.out().join(format!("points/{id}.plan.json")), bench.folder.path().join("again"));
    compress(&tiny_mixtral(), &out, &["--plan", plan.to_str().unwrap(), "--calibrate", "none", "--quiet"])
        .ok();
    let (model, max) = (tiny_mixtral(), "512");
    let verify = ["verify", "--original", model.to_str().unwrap(), "--compressed", out.to_str().unwrap()];
    let again = run(verify.into_iter().chain(["--json", "--max-tokens", max])).ok().json();
    assert_eq!(again["outcome"]["logits"]["mean_kl"], rows[3]["mean_kl"]);

    // A folder with another text, and one with another base.
    bench.write(&FRONT.replace("512", "1024"));
    bench.run(&[]).refused(8, &["another text", "--out"]);
}

/// Starts a sweep, waits until a row satisfies the condition, and sends the signal; returns the exit code.
fn signalled(bench: &Bench, signal: &str, when: impl Fn(&Value) -> bool) -> i32 {
    let mut child = bench.command(&["--quiet"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !bench.rows().iter().any(&when) {
        assert!(start.elapsed() < Duration::from_secs(120), "nothing was done");
        assert!(child.try_wait().unwrap().is_none(), "it ended before the signal");
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    child.wait().unwrap().code().unwrap_or(-1)
}

#[test]
fn a_sweep_that_is_stopped_or_killed_goes_on_without_repeating_a_point() {
    let bench = Bench::new(&FRONT.replace("\"pareto\"", "true"));
    for (signal, code, verified) in [("INT", 130, 1), ("KILL", -1, 2)] {
        let enough =
            |_: &Value| bench.rows().iter().filter(|row| row["status"] == "verified").count() >= verified;
        assert_eq!(signalled(&bench, signal, enough), code, "{signal}");
    }
    let before = bench.rows();
    bench.run(&["--quiet"]).ok();
    let after = bench.rows();
    assert_eq!(after.len(), 4);
    for (then, now) in before.iter().zip(&after) {
        assert!(now["status"] == "verified" && (then["status"] != "verified" || then == now), "{then} {now}");
    }
}

#[test]
fn a_bad_config_is_one_line_with_file_line_and_key() {
    let bench = Bench::new("");
    for (config, line, part) in [
        ("budgte = \"10%\"\n[grid]\nlayout = [\"uv\"]", 2, "budgte"),
        ("budget = \"ten\"\n[grid]\nlayout = [\"uv\"]", 2, "`budget`: `ten`"),
        ("budget = \"10%\"\n[grid]\nlayout = [\n\"uv\",\n\"vu\"]", 6, "`vu`"),
        (
            "[grid]\nbudget = [\"10%\"]\ntarget-params = [\"1M\"]",
            4,
            "`target-params` contradicts `budget` in line 3",
        ),
        ("budget = \"10%\"\n[grid]\ntarget-size = [\"9MB\"]", 4, "contradicts `budget` in line 2"),
        ("[[point]]\nbudget = \"10%\"\ntarget-size = \"9MB\"", 4, "contradicts"),
        ("layout = \"uv\"\n[grid]\nbudget = [\"10%\"]\nlayout = [\"pivoted\"]", 5, "in line 2"),
        (
            "[grid]\nbudget = [\"10%\"]\nkeep-dense = [[], [\"layers\\\\.9\"]]",
            4,
            "keep-dense `layers\\.9` matches no",
        ),
        ("budget = \"10%\"\nfix-rank = \"w4=3\"\n[grid]\nlayout = [\"uv\"]", 3, "fix-rank `w4` matches no"),
        (
            "budget = \"10%\"\n[grid]\nlayout = [\"pivoted\", \"uv\"]\nfix-rank = [\n[\"w1=64\"],\n[\"w1=100\"]]",
            7,
            "1 to 99 as uv",
        ),
        (
            "budget = \"10%\"\nkeep-dense = [\"w1\"]\n[grid]\nfix-rank = [\"w=3\"]",
            3,
            "fix-rank gives it a rank",
        ),
        ("[grid]\nbudget = []", 3, "`budget` in [grid]"),
        ("[grid]\nbudget = \"10%\"", 3, "`budget` in [grid]"),
        ("budget = \"10%\"\n[grid]", 3, "[grid] is empty"),
        ("[grid]\nbudget = [\"10%\", \"10%\"]", 3, "twice"),
        ("[grid]\nbudget = [\"10%\", \"10.0%\"]", 3, "point 2 is point 1 again"),
        (
            "[grid]\nbudget = [\"10%\"]\n[[point]]\nbudget = \"10%\"\nrank-multiple = 1",
            6,
            "point 2 is point 1 again",
        ),
        ("[grid]\nbudget = [\"10%\"]\nworkers = [1, 2]", 4, "points cannot differ in `workers`"),
        ("[grid]\nlayout = [\"uv\"]", 2, "--budget"),
        ("plan = \"plan.json\"\n[grid]\nlayout = [\"uv\"]", 2, "`plan` is no key of a sweep"),
        ("compress = \"some\"\n[grid]\nbudget = [\"1%\"]", 2, "pareto"),
        ("[verify]\ntokens = 3\n[grid]\nbudget = [\"1%\"]", 3, "tokens"),
        ("[grid]\nbudget = [\"1%\"\n", 3, "unclosed"),
        ("calibrate = \"no-such.txt\"\n[grid]\nbudget = [\"1%\"]", 2, "no-such.txt"),
        (
            "calibrate = \"none\"\n[grid]\nbudget = [\"1%\"]\nsensitivity = [\"measured\"]",
            5,
            "--sensitivity measured",
        ),
    ] {
        bench.write(config);
        bench.run(&[]).refused(2, &[&format!("sweep.toml: line {line}: "), part]);
        assert!(!bench.out().exists(), "{config}");
    }
    bench.write("budget = \"10%\"");
    bench.run(&[]).refused(2, &["sweep.toml: no points"]);
    bench.write("[grid]\nbudget = [\"1%\"]");
    bench.run(&["--max-points", "0"]).refused(2, &["--max-points"]);
}

#[test]
fn the_shipped_sweeps_are_read() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    for (name, points) in [("sweep-mixtral.toml", 481), ("sweep-tiny.toml", 35)] {
        let (config, model) = (configs.join(name), tiny_mixtral());
        let words = ["sweep".as_ref(), config.as_os_str(), "--dry-run".as_ref(), "--json".as_ref()];
        let said = run(words.into_iter().chain(["--model".as_ref(), model.as_os_str()]));
        if name == "sweep-mixtral.toml" {
            // The bundled model has 4 layers, and no rank 3072.
            said.refused(2, &["sweep-mixtral.toml: line 21", "--fix-rank"]);
            continue;
        }
        assert_eq!(said.ok().json()["points"].as_array().unwrap().len(), points);
    }
}

#[test]
fn a_given_rank_is_obeyed_recorded_and_reproduced() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out");
    compress(&tiny_mixtral(), &out, &["--budget", "20%", "--fix-rank", "\\.w2$=40", "--quiet"]).ok();
    let report: Value = serde_json::from_slice(&files(&out)["lowrank_report.json"]).unwrap();
    assert_eq!(report["recipe"]["fix-rank"], serde_json::json!(["\\.w2$=40"]));
    for row in report["matrices"].as_array().unwrap() {
        let w2 = row["name"].as_str().unwrap().ends_with("w2");
        assert!(!w2 || row["rank"] == 40, "{row}");
    }
    let model = tiny_mixtral();
    run(["reproduce".as_ref(), out.as_os_str(), "--model".as_ref(), model.as_os_str()]).ok();
}

#[test]
fn points_with_and_without_widths_share_a_text_and_keep_apart() {
    let bench = Bench::new(
        r#"
calibration-tokens = 4096
[grid]
structures = ["rank", "rank,width", "width"]
budget = ["40%"]
"#,
    );
    bench.run(&[]).ok();
    let rows = bench.rows();
    let predicted = |structures: &str| {
        let row = rows.iter().rev().find(|row| row["settings"]["structures"] == structures);
        row.unwrap_or_else(|| panic!("no row for {structures}: {rows:?}"))["predicted_error"]
            .as_f64()
            .unwrap()
    };
    // More choices cannot be worse; these two differ from either alone.
    assert!(predicted("rank,width") < predicted("rank"), "{rows:?}");
    assert!(predicted("rank,width") < predicted("width"), "{rows:?}");

    let wrong = Bench::new("calibrate = [\"none\"]\n[grid]\nstructures = [\"width\"]\nbudget = [\"40%\"]\n");
    wrong.run(&[]).refused(2, &["sweep.toml: line", "measured on"]);
}
