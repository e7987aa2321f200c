//! `cargo xtask conformance` checks that an old and a new Hugging Face transformers open our checkpoints, that a checkpoint
//! gives the same logits as its dense export, that our forward pass agrees with theirs, and that we read configs as they do.

use crate::python::{Transformers, python, python_with_package};
use crate::shell::{command, example, lowrank_compress, program, root, run as sh, target};
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// How a base is compressed, with default calibration.
#[derive(Clone, Copy)]
struct Case {
    budget: &'static str,
    storage: &'static str,
    structures: &'static str,
    /// Whether shared experts are compressed, some of their matrices at a rank.
    shared_experts: bool,
}

const fn case(budget: &'static str, storage: &'static str, structures: &'static str) -> Case {
    Case { budget, storage, structures, shared_experts: false }
}

const fn with_shared_experts(case: Case) -> Case {
    Case { shared_experts: true, ..case }
}

/// Mixed ranks with some dense matrices, a large budget, widths alone and beside ranks.
const CASES: [Case; 5] = [
    case("21.412%", "uv", "rank"),
    case("21.412%", "pivoted", "rank"),
    case("45%", "pivoted", "rank"),
    case("30%", "uv", "width"),
    case("45%", "pivoted", "rank,width"),
];

/// An upcycled model, whose experts are alike.
const BASE: Case = case("50%", "pivoted", "rank,width,base");

/// A small model of every other family: `tests/golden/make_fixtures.py`.
const FAMILIES: [(&str, Case); 8] = [
    ("qwen3-moe", case("20%", "uv", "rank,width")),
    ("dense-layers", case("20%", "pivoted", "rank,width")),
    ("qwen2-moe", with_shared_experts(case("12%", "uv", "rank"))),
    ("olmoe", case("20%", "pivoted", "rank")),
    ("glm4-moe", case("20%", "pivoted", "rank")),
    ("deepseek-v3", case("20%", "uv", "rank,width")),
    ("deepseek-v2", with_shared_experts(case("12%", "pivoted", "rank,width"))),
    ("phimoe", case("20%", "uv", "rank")),
];
/// Tokens to calibrate them on.
const FAMILY_TOKENS: &str = "4096";

/// Runs this verb.
pub(crate) fn run() -> Result<()> {
    let tool = lowrank_compress()?;
    let folder = target().join("conformance");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let features =
        ["tied", "sliding-window", "head-dim"].map(|name| root().join("tests/fixtures/golden").join(name));
    let mut live = vec![super::demo::bundled_model()];
    live.extend(features);
    let bundled = super::demo::bundled_model();
    let cases = CASES.map(|case| {
        let budget = case.budget.trim_end_matches('%').replace('.', "-");
        let name = format!("cut-{budget}-{}-{}", case.storage, case.structures.replace(',', "-"));
        (name, case, bundled.clone())
    });
    let families = FAMILIES.map(|(family, case)| {
        (format!("family-{family}"), case, root().join("tests/fixtures/golden").join(family))
    });
    let alike = ("shared-base".to_owned(), BASE, root().join("tests/fixtures/upcycled-alike"));
    let (mut outputs, mut pairs) = (Vec::new(), Vec::new());
    for (name, case, base) in cases.into_iter().chain(families).chain([alike]) {
        let (factored, dense) = (folder.join(&name), folder.join(format!("{name}-dense")));
        compress(&tool, case, &base, &factored)?;
        sh(command(&tool)
            .args(["densify", "--quiet", "--dtype", "f32", "--model"])
            .arg(&factored)
            .arg("--out")
            .arg(&dense))?;
        pairs.push([factored.clone(), dense]);
        if base != bundled {
            live.push(base);
        }
        outputs.push(factored);
    }
    // One process for all: to import torch takes longer than to check a small model.
    for transformers in Transformers::ALL {
        eprintln!("-- checkpoints, {}", transformers.label());
        let mut check = python(transformers)?;
        check.arg("tests/conformance/check_checkpoint.py");
        for pair in &pairs {
            check.arg("--pair").args(pair);
        }
        sh(&mut check)?;
    }
    live.extend_from_slice(&outputs);
    live.push(plain(&tool, &bundled, &folder)?);
    every_path_loads(&[1, CASES.len() + 1, outputs.len() - 1].map(|at| outputs[at].clone()))?;
    package_works(&tool)?;
    documents_are_true(&tool, &bundled, &outputs[0], &folder)?;
    tokenizers_are_kept(&tool, &folder)?;
    pivoted_keeps_bf16(&tool, &outputs[0])?;
    forward_agrees(&Transformers::ALL, &live)?;
    forward_agrees(&[Transformers::V5], &fp8(&tool, &folder)?)?;
    configs_agree(&tool)
}

/// Bases whose projections are fp8, outputs that keep them where nothing is factored, and dense exports. transformers 4 reads fp8
/// on GPUs alone.
fn fp8(tool: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for (name, side, base) in [
        ("mixtral", "32", super::demo::bundled_model()),
        ("deepseek-v3", "4", root().join("tests/fixtures/golden/deepseek-v3")),
    ] {
        let [base, out, dense] = {
            let made = ["base", "out", "dense"].map(|kind| folder.join(format!("fp8-{name}-{kind}")));
            let mut make = python(Transformers::V5)?;
            sh(make.arg("tests/conformance/make_fp8.py").arg(base).arg(&made[0]).arg(side))?;
            made
        };
        let mut job = command(tool);
        job.args(["--quiet", "--budget", "20%", "--calibration-tokens", FAMILY_TOKENS, "--cache", "none"]);
        sh(job.arg("--model").arg(&base).arg("--out").arg(&out))?;
        let config = std::fs::read_to_string(out.join("config.json"))?;
        if !config.contains("modules_to_not_convert") {
            bail!("{} keeps no fp8", out.display());
        }
        sh(command(tool).args(["densify", "--quiet", "--model"]).arg(&out).arg("--out").arg(&dense))?;
        all.extend([base, out, dense]);
    }
    Ok(all)
}

/// Runs the Python of the documents on an output.
fn documents_are_true(tool: &Path, base: &Path, output: &Path, folder: &Path) -> Result<()> {
    let scratch = folder.join("snippets");
    std::fs::create_dir_all(&scratch)?;
    let mut script = python_with_package(Transformers::V5)?;
    script.arg("tests/conformance/check_snippets.py").arg(base).arg(output).arg(scratch);
    script.args(["README.md", "docs/serving.md", "python/README.md"]);
    sh(script.env("LOWRANK_COMPRESS", tool))
}

/// Runs the tests of the Python package.
fn package_works(tool: &Path) -> Result<()> {
    for transformers in Transformers::ALL {
        eprintln!("-- the Python package, {}", transformers.label());
        let mut tests = python_with_package(transformers)?;
        tests.args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "python/tests"]);
        sh(tests.env("LOWRANK_COMPRESS", tool))?;
    }
    Ok(())
}

/// A model with narrower experts that needs no code of ours.
fn plain(tool: &Path, base: &Path, folder: &Path) -> Result<PathBuf> {
    let out = folder.join("plain");
    let settings = ["--quiet", "--budget", "30%", "--structures", "width", "--allocation", "uniform"];
    sh(command(tool).args(settings).arg("--model").arg(base).arg("--out").arg(&out))?;
    if out.join("lowrank_experts.py").exists() {
        bail!("{} has code beside it", out.display());
    }
    Ok(out)
}

/// Checks that every way to load a checkpoint, offloaded or not, gives the same logits, and that it compiles as one graph.
fn every_path_loads(outputs: &[PathBuf]) -> Result<()> {
    for transformers in Transformers::ALL {
        eprintln!("-- every way to load, {}", transformers.label());
        sh(python(transformers)?.arg("tests/conformance/check_loading.py").args(outputs))?;
    }
    for output in outputs {
        sh(python(Transformers::V5)?.arg("tests/conformance/check_compiled.py").arg(output))?;
    }
    Ok(())
}

/// Checks bases with chat templates in every place where transformers looks for them, compressed and multiplied back:
/// tokenizers load, and templates render, as the base's do.
fn tokenizers_are_kept(tool: &Path, folder: &Path) -> Result<()> {
    const NAMED: &str = "{{ tools }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}";
    let source = super::demo::bundled_model();
    let template = std::fs::read_to_string(source.join("chat_template.jinja"))?;
    let mut checked = Vec::new();
    for name in ["one-file", "folder", "folder-only", "listed", "processor", "none"] {
        let base = folder.join(format!("templates-{name}"));
        std::fs::create_dir(&base)?;
        for entry in std::fs::read_dir(&source)? {
            let entry = entry?;
            std::fs::copy(entry.path(), base.join(entry.file_name()))?;
        }
        if !["one-file", "folder"].contains(&name) {
            std::fs::remove_file(base.join("chat_template.jinja"))?;
        }
        if name.starts_with("folder") {
            std::fs::create_dir(base.join("additional_chat_templates"))?;
            std::fs::write(base.join("additional_chat_templates/tool_use.jinja"), NAMED)?;
        }
        if name == "listed" {
            let file = base.join("tokenizer_config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
            let named =
                |name: &str, template: &str| serde_json::json!({ "name": name, "template": template });
            config["chat_template"] = vec![named("default", &template), named("tool_use", NAMED)].into();
            std::fs::write(file, config.to_string())?;
        }
        if name == "processor" {
            let config = serde_json::json!({ "chat_template": template });
            std::fs::write(base.join("chat_template.json"), config.to_string())?;
        }
        let (out, dense) = (base.with_extension("out"), base.with_extension("dense"));
        let mut job = command(tool);
        job.args(["--quiet", "--calibrate", "none", "--budget", "10%", "--model"]).arg(&base);
        sh(job.arg("--out").arg(&out))?;
        sh(command(tool).args(["densify", "--quiet", "--model"]).arg(&out).arg("--out").arg(&dense))?;
        checked.push([base, out, dense]);
    }
    for transformers in Transformers::ALL {
        let mut check = python(transformers)?;
        check.arg("tests/conformance/check_tokenizer.py");
        for folders in &checked {
            check.arg("--of").args(folders);
        }
        sh(&mut check)?;
    }
    Ok(())
}

/// Checks that in bf16 a pivoted checkpoint is as close to the base as the same factors stored as u·v.
fn pivoted_keeps_bf16(tool: &Path, uv: &Path) -> Result<()> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(uv.join("config.json"))?)?;
    let (ranks, pivoted) = (uv.with_extension("ranks.json"), uv.with_extension("as-pivoted"));
    std::fs::write(&ranks, config["lowrank_config"]["ranks"].to_string())?;
    let base = super::demo::bundled_model();
    let mut again = command(tool);
    again.args(["--quiet", "--storage", "pivoted", "--ranks"]).arg(ranks).arg("--model").arg(&base);
    sh(again.arg("--out").arg(&pivoted))?;
    for transformers in Transformers::ALL {
        let text = root().join("tests/fixtures/text/inaugural_addresses.txt");
        let mut check = python(transformers)?;
        check.arg("tests/conformance/check_bf16.py").arg("--base").arg(&base).arg("--text").arg(text);
        check.arg("--pivoted").arg(&pivoted).arg("--uv").arg(uv);
        sh(&mut check)?;
    }
    Ok(())
}

/// Compares our logits with theirs at every position of random sequences.
fn forward_agrees(versions: &[Transformers], checkpoints: &[PathBuf]) -> Result<()> {
    let program = example("logits")?;
    for &transformers in versions {
        eprintln!("-- forward pass, {}", transformers.label());
        let mut check = python(transformers)?;
        sh(check.arg("tests/golden/check_live.py").arg("--logits-program").arg(&program).args(checkpoints))?;
    }
    Ok(())
}

/// Checks every key of a config with every value that we accept, and random edits: refused, or the same logits as theirs.
fn configs_agree(tool: &Path) -> Result<()> {
    const EDITS: &str = "200";
    let program = program("config_logits", &[])?;
    for transformers in Transformers::ALL {
        let check = || -> Result<_> {
            let mut check = python(transformers)?;
            check.arg("tests/conformance/check_configs.py").arg("--program").arg(&program);
            Ok(check)
        };
        sh(check()?.arg("--compress").arg(tool))?;
        sh(check()?.args(["--edits", EDITS]))?;
    }
    Ok(())
}

fn compress(tool: &Path, case: Case, base: &Path, out: &Path) -> Result<()> {
    let Case { budget, storage, structures, shared_experts } = case;
    let mut job = command(tool);
    job.args(["--quiet", "--budget", budget, "--storage", storage, "--structures", structures, "--model"])
        .arg(base)
        .arg("--out")
        .arg(out);
    if *base != super::demo::bundled_model() {
        job.args(["--calibration-tokens", FAMILY_TOKENS, "--cache", "none"]);
    }
    if shared_experts {
        job.args(["--shared-experts", "compress", "--fix-rank", r"shared_experts?\.(gate|down)_proj$=9"]);
    }
    sh(&mut job)
}
