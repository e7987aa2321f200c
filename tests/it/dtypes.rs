//! Checkpoints whose weights have several dtypes, as merges of models from several sources have them.

use crate::support::{Outcome, compress, copy_of_model, edit_json, files, run, shard_of, tensors};
use lowrank_model::{Dtype, Tensor};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::{TempDir, tempdir};

/// A job that looks at no text.
const PLAIN: [&str; 5] = ["--budget", "20%", "--calibrate", "none", "--quiet"];

/// A copy of the bundled model, which is bf16, with other dtypes where `dtype_of` says so.
fn converted(folder: &TempDir, dtype_of: impl Fn(&str) -> Option<safetensors::Dtype>) -> PathBuf {
    let model = copy_of_model(folder);
    let all: Vec<_> = tensors(&model)
        .into_iter()
        .map(|(name, (dtype, shape, bytes))| match dtype_of(&name) {
            None => (name, (dtype, shape, bytes)),
            Some(other) => {
                let wide = Tensor::new(shape.clone(), Dtype::Bf16, bytes).unwrap().to_f32();
                let narrow = |dtype| Tensor::from_f32(shape.clone(), dtype, &wide).unwrap().into_bytes();
                let bytes = match other {
                    safetensors::Dtype::F32 => narrow(Dtype::F32),
                    safetensors::Dtype::F16 => narrow(Dtype::F16),
                    foreign => vec![0; wide.len() * foreign.bitsize() / 8],
                };
                (name, (other, shape, bytes))
            }
        })
        .collect();
    for name in files(&model).into_keys().filter(|name| name.contains(".safetensors")) {
        fs::remove_file(model.join(name)).unwrap();
    }
    let views = all
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(model.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    model
}

/// Runs `lowrank-compress COMMAND --FLAG PLACE …`.
fn command(words: &str, places: &[(&str, &Path)]) -> Outcome {
    let places = places.iter().flat_map(|(flag, place)| [OsStr::new(*flag), place.as_os_str()]);
    run(words.split(' ').map(OsStr::new).chain(places).filter(|word| !word.is_empty()))
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Parameters and bytes of the weights on disk.
fn size(dir: &Path) -> (u64, u64) {
    let (mut params, mut bytes) = (0, 0);
    for (dtype, shape, data) in tensors(dir).into_values() {
        bytes += data.len() as u64;
        // The index of a pivoted matrix.
        if dtype != safetensors::Dtype::I64 {
            params += shape.iter().product::<usize>() as u64;
        }
    }
    (params, bytes)
}

/// The expert matrix that a tensor belongs to: `model.layers.0.block_sparse_moe.experts.5.w1`.
fn matrix_of(name: &str) -> Option<&str> {
    let at = name.find(".experts.")?;
    let end = at + name[at..].find(".w")? + 3;
    Some(&name[..end])
}

#[test]
fn factors_have_the_dtype_of_their_matrix() {
    use safetensors::Dtype::{F16, F32};
    type DtypeOf = fn(&str) -> Option<safetensors::Dtype>;
    let mixtures: [(&str, DtypeOf); 3] = [
        ("all w2 are f32", |name| name.contains("w2").then_some(F32)),
        ("half the experts are f16", |name| {
            ["experts.1.", "experts.2.", "experts.5.", "experts.7."]
                .iter()
                .any(|expert| name.contains(expert))
                .then_some(F16)
        }),
        ("the last matrix, the norms and the head are f32", |name| {
            (name.contains("layers.3.block_sparse_moe.experts.7.w3")
                || name.contains("norm")
                || name.contains("lm_head"))
            .then_some(F32)
        }),
    ];
    for (what, dtype_of) in mixtures {
        let folder = tempdir().unwrap();
        let (model, out, dense) =
            (converted(&folder, dtype_of), folder.path().join("out"), folder.path().join("dense"));
        compress(&model, &out, &PLAIN).ok();
        let (base, made) = (tensors(&model), tensors(&out));
        for (name, (dtype, ..)) in made.iter().filter(|(_, (dtype, ..))| *dtype != safetensors::Dtype::I64) {
            let original = base.get(name).or_else(|| base.get(&format!("{}.weight", matrix_of(name)?)));
            assert_eq!(Some(*dtype), original.map(|(dtype, ..)| *dtype), "{what}: {name}");
        }
        let report = json_of(&out.join("lowrank_report.json"));
        for (key, dir) in [("before", &model), ("after", &out)] {
            let (params, bytes) = size(dir);
            assert_eq!(report[key], json!({ "params": params, "bytes": bytes }), "{what}: {key}");
        }
        let found = command("inspect --json", &[("", &out)]).ok().json();
        assert_eq!(json!({ "params": found["params"], "bytes": found["bytes"] }), report["after"], "{what}");
        for key in ["dtype", "torch_dtype"] {
            assert_eq!(json_of(&out.join("config.json"))[key], "bfloat16", "{what}: as the base says");
        }
        command("verify --static-only --quiet", &[("--original", &model), ("--compressed", &out)]).ok();
        command("reproduce --quick --quiet", &[("", &out), ("--model", &model)]).ok();
        command("densify --quiet", &[("--model", &out), ("--out", &dense)]).ok();
        let dtypes = |dir: &Path| {
            tensors(dir).into_iter().map(|(name, (dtype, ..))| (name, dtype)).collect::<Vec<_>>()
        };
        assert_eq!(dtypes(&dense), dtypes(&model), "{what}");
        assert_eq!(size(&dense), size(&model), "{what}");
    }
}

#[test]
fn a_size_in_bytes_counts_every_matrix_by_its_own_dtype() {
    let folder = tempdir().unwrap();
    let model = converted(&folder, |name| name.contains("experts.3.").then_some(safetensors::Dtype::F32));
    let (_, before) = size(&model);
    let out = folder.path().join("out");
    let to = |bytes: u64| {
        compress(&model, &out, &["--target-size", &bytes.to_string(), "--calibrate", "none", "--quiet"])
    };
    let asked = before / 5 * 4;
    to(asked).ok();
    let (_, after) = size(&out);
    assert!((asked - 2000..=asked).contains(&after), "{asked} asked, {after} left");
    fs::remove_dir_all(&out).unwrap();
    // The maximum that a refusal tells is exact.
    let refused = to(1000);
    refused.refused(7, &["the most that can be removed is"]);
    let (_, most) = refused.stderr.split_once("can be removed is ").unwrap();
    let most = most.split(';').next().unwrap();
    let told = to(before - most.replace(',', "").parse::<u64>().unwrap() - 1);
    told.refused(7, &[most]);
    let most: u64 = most.replace(',', "").parse().unwrap();
    to(before - most).ok();
    assert_eq!(size(&out).1, before - most);
}

#[test]
fn a_plan_of_several_dtypes_is_executed_and_refused_for_other_factors() {
    let folder = tempdir().unwrap();
    let model = converted(&folder, |name| name.contains("w1").then_some(safetensors::Dtype::F32));
    let (plan, one, two) =
        (folder.path().join("plan.json"), folder.path().join("one"), folder.path().join("two"));
    compress(&model, &one, &PLAIN).ok();
    let dry = ["--dry-run", "--plan-out", plan.to_str().unwrap()];
    compress(&model, &two, &[&PLAIN[..], &dry].concat()).ok();
    let rows = json_of(&plan)["matrices"].clone();
    assert_eq!(rows[0].get("element_bytes"), None, "like the first matrix");
    assert_eq!(rows[1]["element_bytes"], json!({ "dense": 2, "factor": 2 }));
    let by_plan = ["--plan", plan.to_str().unwrap(), "--calibrate", "none", "--quiet"];
    compress(&model, &two, &[&by_plan[..], &["--dtype", "bf16"]].concat())
        .refused(2, &["the factors of layers.0.experts.0.gate", "4 bytes", "stores 2"]);
    compress(&model, &two, &by_plan).ok();
    assert_eq!(tensors(&one), tensors(&two));
}

#[test]
fn the_config_states_another_dtype_only_if_factors_were_converted() {
    let folder = tempdir().unwrap();
    let model = copy_of_model(&folder);
    // Weights are bf16, whatever the config says.
    edit_json(&model.join("config.json"), |config| config["dtype"] = "float32".into());
    let stated = |name: &str, words: &[&str]| {
        let out = folder.path().join(name);
        compress(&model, &out, &[&PLAIN[..], words].concat()).ok();
        json_of(&out.join("config.json"))["dtype"].clone()
    };
    assert_eq!(stated("as-it-was", &[]), "float32");
    assert_eq!(stated("converted", &["--dtype", "f16"]), "float16");
    edit_json(&model.join("config.json"), |config| drop(config.as_object_mut().unwrap().remove("dtype")));
    assert_eq!(stated("silent", &[]), "bfloat16");
}

#[test]
fn a_dtype_that_no_weight_has_is_refused_by_the_name_of_its_tensor() {
    use safetensors::Dtype::{BOOL, F8_E4M3, F64, I8};
    for dtype in [F64, I8, F8_E4M3, BOOL] {
        let folder = tempdir().unwrap();
        let one = "layers.2.block_sparse_moe.experts.6.w3";
        let model = converted(&folder, |name| name.contains(one).then_some(dtype));
        let out = folder.path().join("out");
        compress(&model, &out, &PLAIN).refused(4, &[one, &dtype.to_string()]);
        assert!(fs::read_dir(folder.path()).unwrap().count() == 1, "nothing but the model");
    }
}

#[test]
fn a_run_that_fails_late_leaves_nothing_that_blocks_the_next_one() {
    let folder = tempdir().unwrap();
    let (model, out) = (copy_of_model(&folder), folder.path().join("out"));
    // Found only when this tensor is copied, after matrices were factored.
    let head = "lm_head.weight";
    crate::support::poison_all(&model, head, 0x7f80);
    compress(&model, &out, &PLAIN).refused(6, &[head]);
    assert!(fs::read_dir(folder.path()).unwrap().count() == 1, "nothing but the model");
    assert!(shard_of(&model, head).exists());
}

/// The codes of E4M3 by their number, spelled out a second time: exponent and mantissa of a positive number, rising.
fn e4m3_numbers() -> Vec<f32> {
    let number = |code: u32| match code / 8 {
        0 => code as f32 * 2.0_f32.powi(-9),
        exponent => (8 + code % 8) as f32 * 2.0_f32.powi(exponent as i32 - 10),
    };
    (0..127).map(number).collect()
}

/// Two copies of the bundled model: one whose projections are fp8 with a scale for every block, and the same widened to bf16.
fn fp8_and_widened(folder: &TempDir) -> [PathBuf; 2] {
    const SIDE: usize = 48; // divides no dimension of the model
    let numbers = e4m3_numbers();
    let base = copy_of_model(folder);
    let (mut quantised, mut widened) = (Vec::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors(&base) {
        let is_projection = name.contains("self_attn") || name.contains(".experts.");
        if !is_projection {
            quantised.push((name.clone(), (dtype, shape.clone(), bytes.clone())));
            widened.push((name, (dtype, shape, bytes)));
            continue;
        }
        let (rows, cols) = (shape[0], shape[1]);
        let values = Tensor::new(shape.clone(), Dtype::Bf16, bytes).unwrap().to_f32();
        let across = cols.div_ceil(SIDE);
        let block_of = |at: usize| at / cols / SIDE * across + at % cols / SIDE;
        let mut scales = vec![0.0_f32; rows.div_ceil(SIDE) * across];
        for (at, value) in values.iter().enumerate() {
            let scale = &mut scales[block_of(at)];
            *scale = scale.max(value.abs() / 448.0);
        }
        let code_of = |(at, value): (usize, &f32)| {
            let wanted = value.abs() / scales[block_of(at)].max(f32::MIN_POSITIVE);
            let above = numbers.partition_point(|&number| number < wanted).min(126);
            let below = above.saturating_sub(1);
            let code = if wanted - numbers[below] < numbers[above] - wanted { below } else { above };
            code as u8 | if *value < 0.0 { 0x80 } else { 0 }
        };
        let codes: Vec<u8> = values.iter().enumerate().map(code_of).collect();
        let wide: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(at, code)| {
                let magnitude = numbers[usize::from(code & 0x7f)] * scales[block_of(at)];
                if code & 0x80 == 0 { magnitude } else { -magnitude }
            })
            .collect();
        let stored = |shape: &[usize], dtype, values: &[f32]| {
            Tensor::from_f32(shape.to_vec(), dtype, values).unwrap().into_bytes()
        };
        let scales_shape = vec![rows.div_ceil(SIDE), across];
        let scales = stored(&scales_shape, Dtype::F32, &scales);
        quantised.push((format!("{name}_scale_inv"), (safetensors::Dtype::F32, scales_shape, scales)));
        quantised.push((name.clone(), (safetensors::Dtype::F8_E4M3, shape.clone(), codes)));
        let bytes = stored(&shape, Dtype::Bf16, &wide);
        widened.push((name, (safetensors::Dtype::BF16, shape, bytes)));
    }
    [("fp8", quantised), ("widened", widened)].map(|(kind, all)| {
        let to = folder.path().join(kind);
        fs::create_dir(&to).unwrap();
        for name in files(&base).into_keys().filter(|name| !name.contains(".safetensors")) {
            fs::copy(base.join(&name), to.join(&name)).unwrap();
        }
        let views = all.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        if kind == "fp8" {
            edit_json(&to.join("config.json"), |config| {
                config["quantization_config"] = json!({
                    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [SIDE, SIDE]
                });
            });
        }
        to
    })
}

#[test]
fn an_fp8_source_gives_the_factors_of_its_widened_copy_and_keeps_other_tensors() {
    let folder = tempdir().unwrap();
    let [quantised, widened] = fp8_and_widened(&folder);
    let words = ["--budget", "30%", "--calibration-tokens", "1024", "--cache", "none", "--quiet"];
    let made = |model: &Path, name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        compress(model, &out, &[&words, more].concat()).ok();
        command("verify --quiet --max-tokens 512", &[("--original", model), ("--compressed", &out)]).ok();
        out
    };
    let kept = made(&quantised, "kept", &[]);
    let expected = made(&widened, "expected", &[]);
    let (base, ours, theirs) = (tensors(&quantised), tensors(&kept), tensors(&expected));
    let mut fp8 = 0;
    for (name, tensor) in &ours {
        if name.contains(".experts.") || !name.contains("self_attn") {
            assert_eq!(tensor, &theirs[name], "{name}");
        } else {
            assert_eq!(tensor, &base[name], "{name}");
            fp8 += usize::from(tensor.0 == safetensors::Dtype::F8_E4M3);
        }
    }
    assert_eq!(fp8, 4 * 4, "four matrices of attention in four layers");
    assert_eq!(ours.len(), theirs.len() + fp8, "a tensor of scales for each");
    // Sizes count what is stored, and the budget takes the same from the experts.
    let report = |out: &Path| json_of(&out.join("lowrank_report.json"));
    let (ours, theirs) = (report(&kept), report(&expected));
    assert_eq!(ours["after"]["params"], theirs["after"]["params"]);
    let stored: u64 = tensors(&kept).values().map(|(_, _, bytes)| bytes.len() as u64).sum();
    assert_eq!(ours["after"]["bytes"], stored);
    let quantization = &json_of(&kept.join("config.json"))["quantization_config"];
    assert_eq!(quantization["weight_block_size"], json!([48, 48]));
    let unconverted: Vec<&str> =
        quantization["modules_to_not_convert"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    for module in
        ["lm_head", "model.layers.0.block_sparse_moe.experts", "model.layers.3.block_sparse_moe.gate"]
    {
        assert!(unconverted.contains(&module), "{module} of {unconverted:?}");
    }
    assert!(!unconverted.iter().any(|module| module.contains("self_attn")));
    command(&format!("reproduce {} --quick --quiet", kept.display()), &[("--model", &quantised)]).ok();
    // Without fp8 it is the same output, byte for byte.
    let wide = made(&quantised, "wide", &["--fp8", "widen"]);
    let (ours, theirs) = (files(&wide), files(&expected));
    for name in theirs.keys().filter(|name| name.ends_with(".safetensors")) {
        assert!(ours[name] == theirs[name], "{name}");
    }
    for name in ["config.json", "model.safetensors.index.json"] {
        assert_eq!(json_of(&wide.join(name)), json_of(&expected.join(name)), "{name}");
    }
    // Dense exports and models for a quantiser are bf16.
    let dense = folder.path().join("dense");
    command("densify --quiet", &[("--model", &kept), ("--out", &dense)]).ok();
    assert!(json_of(&dense.join("config.json")).get("quantization_config").is_none());
    assert!(tensors(&dense).values().all(|(dtype, _, _)| *dtype == safetensors::Dtype::BF16));
    let then = folder.path().join("then");
    let words =
        ["--target-size", "3MB", "--then", "nf4", "--calibrate", "none", "--cache", "none", "--quiet"];
    compress(&quantised, &then, &words).ok();
    assert!(tensors(&then).values().all(|(dtype, _, _)| *dtype != safetensors::Dtype::F8_E4M3));
}

#[test]
fn an_fp8_matrix_without_its_scales_is_refused_by_their_name() {
    let folder = tempdir().unwrap();
    let [quantised, _] = fp8_and_widened(&folder);
    let weight = "model.layers.1.block_sparse_moe.experts.2.w1.weight";
    let file = quantised.join("model.safetensors");
    let all = tensors(&quantised);
    let kept = all.iter().filter(|(name, _)| **name != format!("{weight}_scale_inv"));
    let views = kept
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
    let refused = run(["inspect".as_ref(), quantised.as_os_str()]);
    refused.refused(5, &[&format!("{weight}_scale_inv")]);
}
