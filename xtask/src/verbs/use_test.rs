//! `cargo xtask use-test` does with outputs what people do next, with the programs they do it with, on the CPU: quantises them,
//! trains adapters on them, evaluates them. And it runs those blocks of the documents that want such programs.

use super::demo::bundled_model;
use crate::python;
use crate::shell::{command, lowrank_compress, root, run as sh, target};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// One part alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Quantise by these alone; repeat it
    #[arg(long, value_name = "NAME")]
    quantiser: Vec<String>,
    /// Leave out what needs vLLM
    #[arg(long)]
    without_vllm: bool,
    /// Use this release build of lowrank-compress and build none
    #[arg(long, value_name = "FILE")]
    tool: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Quantise,
    Adapters,
    Evaluate,
    Documents,
}

/// A fifth less, measured on few tokens.
const COMMON: [&str; 6] =
    ["--budget", "21.412%", "--calibration-tokens", "8192", "--sensitivity-tokens", "2048"];
/// What models of true size have by default.
const GROUPS: [&str; 2] = ["--rank-multiple", "32"];
const UV: [&str; 4] = ["--structures", "rank", "--storage", "uv"];
const PIVOTED: [&str; 4] = ["--structures", "rank", "--storage", "pivoted"];

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = target().join("use");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let tool = args.tool.clone().map_or_else(lowrank_compress, Ok)?;
    let test = Test { tool, folder };
    let wanted = |part| args.only.is_none_or(|only| only == part);
    if wanted(Part::Adapters) {
        test.adapters()?;
    }
    if wanted(Part::Evaluate) {
        test.evaluate(args.without_vllm)?;
    }
    if wanted(Part::Documents) {
        test.documents(args.without_vllm)?;
    }
    if wanted(Part::Quantise) {
        test.quantise(&args.quantiser)?;
    }
    Ok(())
}

struct Test {
    tool: PathBuf,
    folder: PathBuf,
}

impl Test {
    fn adapters(&self) -> Result<()> {
        let outputs = [self.compressed("u·v", &UV)?, self.compressed("pivoted", &PIVOTED)?];
        let mut train = python::with_users_tools()?;
        train.arg("tests/use/adapters.py").args(outputs).arg("--text").arg(text("jack_sheppard"));
        sh(train.arg("--work").arg(self.work("adapters")?))
    }

    fn evaluate(&self, without_vllm: bool) -> Result<()> {
        let mut evaluate = python::with_users_tools()?;
        evaluate.arg("tests/use/evaluate.py").arg(self.compressed("default", &[])?);
        if !without_vllm {
            evaluate.arg("--vllm").arg(python::vllm()?);
        }
        evaluate.arg("--text").arg(text("jack_sheppard"));
        sh(evaluate.arg("--work").arg(self.work("evaluate")?))
    }

    fn documents(&self, without_vllm: bool) -> Result<()> {
        let work = self.work("documents")?;
        let output = self.compressed("default to quantise", &GROUPS)?;
        let mut run = python::with_users_tools()?;
        run.arg("tests/conformance/check_snippets.py").arg(bundled_model()).arg(output).arg(&work);
        run.args(["README.md", "docs/serving.md", "python/README.md"]).env("LOWRANK_COMPRESS", &self.tool);
        if !without_vllm {
            run.arg("--vllm").arg(python::vllm()?);
        }
        sh(&mut run)
    }

    fn quantise(&self, quantisers: &[String]) -> Result<()> {
        let mut models = vec![json!({ "name": "original", "model": bundled_model() })];
        let outputs: [(&str, &[&str], &[&str]); 4] = [
            ("u·v", &UV, &GROUPS),
            ("pivoted", &PIVOTED, &GROUPS),
            ("default", &[], &GROUPS),
            ("default, any rank", &[], &[]),
        ];
        for (name, settings, groups) in outputs {
            let output = self.compressed(&format!("{name} to quantise"), &[settings, groups].concat())?;
            models.push(json!({ "name": name, "model": output }));
        }
        let file = self.folder.join("models.json");
        std::fs::write(&file, Value::from(models).to_string())?;
        let mut quantise = python::with_users_tools()?;
        quantise.arg("tests/use/quantise.py").arg(file).arg(self.folder.join("quantised.json"));
        quantise.arg("--text").arg(text("inaugural_addresses")).arg("--calibrate").arg(text("shakespeare"));
        for quantiser in quantisers {
            quantise.arg("--only").arg(quantiser);
        }
        sh(quantise.arg("--work").arg(self.work("quantise")?))
    }

    fn compressed(&self, name: &str, settings: &[&str]) -> Result<PathBuf> {
        let out = self.folder.join(name);
        if !out.exists() {
            let mut job = command(&self.tool);
            job.args(["--quiet", "--cache", "none"]).args(COMMON).args(settings);
            sh(job.arg("--model").arg(bundled_model()).arg("--out").arg(&out))?;
        }
        Ok(out)
    }

    /// A folder without spaces: compilers that vLLM calls split names at them.
    fn work(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(format!("work-{name}"));
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }
}

fn text(name: &str) -> PathBuf {
    root().join(Path::new("tests/fixtures/text").join(format!("{name}.txt")))
}
