//! `cargo xtask serve-test` gives outputs to the programs that people run them with, on the CPU: vLLM serves them over HTTP, with
//! our plugin or, where an output is a plain model, without it; SGLang runs outputs by our package; llama.cpp runs plain models
//! as GGUF. Tokens and log-probabilities are compared with those of transformers and of our own forward pass.

use super::demo::bundled_model;
use super::gpu_check::copy_folder;
use crate::python::{self, Transformers};
use crate::shell::{command, example, lowrank_compress, root, run as sh, target};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Original, default output and plain narrow model of one bundled model alone, by one worker
    #[arg(long)]
    small: bool,
    /// One of the programs alone
    #[arg(long, value_enum)]
    only: Option<Runtime>,
    /// Compare no logits; time servers of the bundled model and of a wide random one against vLLM's own class
    #[arg(long, conflicts_with_all = ["small", "only"])]
    throughput: bool,
    /// Use the release builds in this folder (lowrank-compress, examples/logits) and build none
    #[arg(long, value_name = "DIR")]
    built: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Runtime {
    Vllm,
    Sglang,
    Gguf,
}

/// Few tokens suffice for outputs whose quality does not matter.
const QUICK: [&str; 4] = ["--calibration-tokens", "8192", "--sensitivity-tokens", "2048"];

/// An ordinary model with narrower experts.
const PLAIN: [&str; 6] = ["--budget", "30%", "--structures", "width", "--allocation", "uniform"];
const DEFAULT: [&str; 2] = ["--budget", "30%"];
const UV: [&str; 6] = ["--budget", "21.412%", "--structures", "rank", "--storage", "uv"];
/// With a matrix of every shared expert at a rank, others as the plan says.
const UV_WITH_SHARED: [&str; 10] = [
    "--budget",
    "21.412%",
    "--structures",
    "rank",
    "--storage",
    "uv",
    "--shared-experts",
    "compress",
    "--fix-rank",
    r"shared_expert\.up_proj$=20",
];
const DEFAULT_WITH_SHARED: [&str; 6] = [
    "--budget",
    "30%",
    "--shared-experts",
    "compress",
    "--fix-rank",
    r"shared_experts\.(gate|down)_proj$=20",
];
const PIVOTED: [&str; 6] = ["--budget", "21.412%", "--structures", "rank", "--storage", "pivoted"];
const BASE: [&str; 4] = ["--budget", "50%", "--structures", "rank,width,base"];

/// Models that ship with the repository.
const BUNDLED: [&str; 4] = ["tiny-mixtral", "second-mixtral", "upcycled-distinct", "upcycled-alike"];

/// A family that vLLM's CPU build runs, beside Mixtral.
struct Family {
    /// The fixture that says how a model of it is built.
    fixture: &'static str,
    /// Classes of vLLM and of the plugin, without `ForCausalLM`.
    classes: [&'static str; 2],
    /// How it is compressed, the key of `lowrank_config` that the output then has, and how many workers serve it.
    outputs: &'static [(&'static [&'static str], &'static str, &'static [u32])],
}

const FAMILIES: [Family; 5] = [
    Family {
        fixture: "qwen3-moe",
        classes: ["Qwen3Moe", "LowRankQwen3Moe"],
        outputs: &[(&DEFAULT, "widths", &[1])],
    },
    Family {
        fixture: "qwen2-moe",
        classes: ["Qwen2Moe", "LowRankQwen2Moe"],
        outputs: &[(&UV, "ranks", &[1]), (&UV_WITH_SHARED, "compressed_shared_experts", &[1, 2])],
    },
    Family { fixture: "olmoe", classes: ["Olmoe", "LowRankOlmoe"], outputs: &[(&PIVOTED, "ranks", &[1])] },
    Family {
        fixture: "glm4-moe",
        classes: ["Glm4Moe", "LowRankGlm4Moe"],
        outputs: &[(&DEFAULT, "widths", &[1]), (&DEFAULT_WITH_SHARED, "compressed_shared_experts", &[1, 2])],
    },
    Family { fixture: "phimoe", classes: ["PhiMoE", "LowRankPhimoe"], outputs: &[(&PIVOTED, "ranks", &[1])] },
];

/// Runs this verb.
pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = target().join("serving");
    let outputs = folder.join("outputs");
    if outputs.exists() {
        std::fs::remove_dir_all(&outputs)?;
    }
    std::fs::create_dir_all(&outputs)?;
    let test = Test { tool: tool(args)?, logits: logits(args)?, folder, outputs };
    if args.throughput {
        return test.throughput();
    }
    let wanted = |runtime| args.only.is_none_or(|only| only == runtime);
    if wanted(Runtime::Vllm) {
        test.vllm(args.small)?;
    }
    if wanted(Runtime::Sglang) {
        test.sglang()?;
    }
    if wanted(Runtime::Gguf) {
        test.gguf(args.small)?;
    }
    Ok(())
}

struct Test {
    tool: PathBuf,
    logits: PathBuf,
    folder: PathBuf,
    outputs: PathBuf,
}

impl Test {
    /// Serves outputs over HTTP.
    fn vllm(&self, small: bool) -> Result<()> {
        let tiny = bundled_model();
        let default = self.compressed("default", &tiny, &DEFAULT)?;
        let mut cases =
            vec![served("original", &tiny, 1, &[]), served("default", &default, 1, &["ranks", "widths"])];
        if !small {
            let alike = self.made("heads", &fixture("upcycled-alike"))?;
            let others: [(_, _, &[&str], _); 3] = [
                ("u·v", &tiny, &UV, "ranks"),
                ("pivoted", &tiny, &PIVOTED, "ranks"),
                ("shared base", &alike, &BASE, "shared_base_layers"),
            ];
            for (name, base, settings, uses) in others {
                let output = self.compressed(name, base, settings)?;
                cases.push(served(name, &output, 1, &[uses]));
                cases.push(served(&format!("{name} two workers"), &output, 2, &[uses]));
            }
            for Family { fixture: name, classes, outputs } in FAMILIES {
                let base = self.made_as("family", name, &fixture(&format!("golden/{name}")))?;
                let [of_vllm, of_plugin] = classes;
                cases.push(of_class(of_vllm, served(name, &base, 1, &[])));
                for (settings, uses, workers) in outputs {
                    let smaller = format!("{name} {uses}");
                    let output = self.compressed(&smaller, &base, settings)?;
                    for &workers in *workers {
                        let smaller = if workers > 1 {
                            format!("{smaller} {workers} workers")
                        } else {
                            smaller.clone()
                        };
                        cases.push(of_class(of_plugin, served(&smaller, &output, workers, &[uses])));
                    }
                }
            }
        }
        for model in bundled(small) {
            let name = format!("plain {model}");
            cases.push(served(&name, &self.compressed(&name, &fixture(model), &PLAIN)?, 1, &[]));
        }
        let mut check = python::python(Transformers::V5)?;
        check.arg("tests/serving/check_vllm.py").arg(self.written("vllm.json", cases)?);
        check.arg("--vllm").arg(python::vllm()?).arg("--logits-program").arg(&self.logits);
        sh(check.arg("--work").arg(self.folder.join("vllm")))
    }

    /// Runs outputs with SGLang.
    fn sglang(&self) -> Result<()> {
        let tiny = bundled_model();
        let mut cases = vec![served("original", &tiny, 1, &[])];
        for (name, settings, uses) in [
            ("default", &DEFAULT[..], &["ranks", "widths"][..]),
            ("u·v", &UV, &["ranks"]),
            ("pivoted", &PIVOTED, &["ranks"]),
        ] {
            let output = self.compressed(&format!("{name} for SGLang"), &tiny, settings)?;
            cases.push(served(name, &output, 1, uses));
        }
        let mut check = python::python(Transformers::V5)?;
        check.arg("tests/serving/check_sglang.py").arg(self.written("sglang.json", cases)?);
        sh(check.arg("--sglang").arg(python::sglang()?).arg("--logits-program").arg(&self.logits))
    }

    /// Converts plain models, and a dense export, and runs them.
    fn gguf(&self, small: bool) -> Result<()> {
        let script = "tests/serving/check_gguf.py";
        let (_, sources) = python::llama()?;
        let mut cases = Vec::new();
        for model in bundled(small) {
            let base = self.outputs.join(format!("{model} with a tokenizer.model"));
            copy_folder(&fixture(model), &base)?;
            sh(python::llama()?.0.arg(script).arg("--add-tokenizer").arg(&base))?;
            let name = format!("plain {model} as GGUF");
            let plain = self.compressed(&name, &base, &PLAIN)?;
            cases.push(json!({ "name": name, "model": plain, "same_as": plain }));
            if *model == BUNDLED[0] {
                let output = self.compressed("for a dense export", &base, &DEFAULT)?;
                let dense = self.outputs.join("dense export");
                let mut densify = command(&self.tool);
                densify.args(["densify", "--quiet", "--dtype", "f32", "--model"]).arg(&output);
                sh(densify.arg("--out").arg(&dense))?;
                cases.push(json!({ "name": "dense export", "model": dense, "same_as": output }));
            }
        }
        let work = self.folder.join("gguf");
        std::fs::create_dir_all(&work)?;
        let mut check = python::llama()?.0;
        check.arg(script).arg(self.written("gguf.json", cases)?).arg("--llama-cpp").arg(sources);
        sh(check.arg("--logits-program").arg(&self.logits).arg("--work").arg(work))
    }

    /// Times servers against that of the original.
    fn throughput(&self) -> Result<()> {
        let tiny = bundled_model();
        let mut models = vec![tiny.clone()];
        for (name, settings) in [("default", &DEFAULT[..]), ("pivoted", &PIVOTED)] {
            models.push(self.compressed(name, &tiny, settings)?);
        }
        self.timed(&models)?;
        let wide = self.made("wide", &tiny)?;
        let mut models = vec![wide.clone()];
        for (name, settings) in [("u·v", &UV), ("pivoted", &PIVOTED)] {
            let out = self.outputs.join(format!("wide {name}"));
            self.compress(&wide, &out, &["--calibrate", "none"], settings)?;
            models.push(out);
        }
        self.timed(&models)
    }

    fn timed(&self, models: &[PathBuf]) -> Result<()> {
        let mut time = python::python(Transformers::V5)?;
        time.arg("tests/serving/throughput.py").arg("--vllm").arg(python::vllm()?);
        sh(time.arg("--work").arg(self.folder.join("vllm")).args(models))
    }

    /// A model that is not bundled.
    fn made(&self, which: &str, model: &Path) -> Result<PathBuf> {
        self.made_as(which, which, model)
    }

    fn made_as(&self, which: &str, name: &str, model: &Path) -> Result<PathBuf> {
        let out = self.outputs.join(name);
        let mut make = python::python(Transformers::V5)?;
        sh(make.arg("tests/serving/make_model.py").arg(which).arg(&out).arg(model))?;
        Ok(out)
    }

    fn compressed(&self, name: &str, base: &Path, settings: &[&str]) -> Result<PathBuf> {
        let out = self.outputs.join(name);
        self.compress(base, &out, &QUICK, settings)?;
        Ok(out)
    }

    fn compress(&self, base: &Path, out: &Path, calibration: &[&str], settings: &[&str]) -> Result<()> {
        let mut job = command(&self.tool);
        job.args(["--quiet", "--cache", "none"]).args(calibration).args(settings);
        sh(job.arg("--model").arg(base).arg("--out").arg(out))
    }

    fn written(&self, name: &str, cases: Vec<Value>) -> Result<PathBuf> {
        let file = self.outputs.join(name);
        std::fs::write(&file, Value::from(cases).to_string()).with_context(|| file.display().to_string())?;
        Ok(file)
    }
}

/// A case of check_vllm.py. A model whose `lowrank_config` uses something is for the plugin; others get no plugin.
fn served(name: &str, model: &Path, workers: u32, uses: &[&str]) -> Value {
    let plugin = !uses.is_empty();
    let class = if plugin { "LowRankMixtralForCausalLM" } else { "MixtralForCausalLM" };
    json!({ "name": name, "model": model, "class": class, "plugin": plugin, "parallel": workers, "uses": uses })
}

fn tool(args: &Args) -> Result<PathBuf> {
    args.built
        .as_ref()
        .map_or_else(lowrank_compress, |built| Ok(std::path::absolute(built)?.join("lowrank-compress")))
}

/// The program that prints logits of our own forward pass.
fn logits(args: &Args) -> Result<PathBuf> {
    if let Some(built) = &args.built {
        return Ok(std::path::absolute(built)?.join("examples/logits"));
    }
    example("logits")
}

/// A case that a class of vLLM other than Mixtral's serves.
fn of_class(class: &str, mut case: serde_json::Value) -> serde_json::Value {
    case["class"] = format!("{class}ForCausalLM").into();
    case
}

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

fn bundled(small: bool) -> &'static [&'static str] {
    if small { &BUNDLED[..1] } else { &BUNDLED }
}
