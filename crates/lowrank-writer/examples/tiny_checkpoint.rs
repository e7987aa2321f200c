//! Writes a factored checkpoint and its dense twin from a small checkpoint, without the rest of the workspace:
//!
//! `cargo run -p lowrank-writer --example tiny_checkpoint -- BASE FACTORED DENSE`
//!
//! For trying out the format in `tests/conformance` and elsewhere. Factors come from two steps of subspace iteration:
//! near the optimum, not at it. The dense twin holds u·v of the *stored* factors in f32, so that nothing but the order
//! of summation lies between the two. Mixed on purpose: ranks differ, and every fifth matrix stays dense.

use lowrank_model::{
    CostModel, Dtype, ModelConfig, RankPlan, Recipe, Storage, Tensor, Unit, format, names,
    plan::PlannedMatrix, recipe::Goal,
};
use lowrank_writer::{
    Card, ChatTemplate, CheckpointWriter, CompressionReport, ConfigOf, Documents, OutputTensor, ShardLayout,
    StatedDtype,
    report::{BaseModel, MatrixOutcome},
};
use std::{collections::BTreeMap, error::Error, fs, path::Path, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [base, factored, dense] = args.as_slice() else {
        return Err("usage: tiny_checkpoint BASE FACTORED DENSE".into());
    };
    let config_json = serde_json::from_slice(&fs::read(base.join(format::CONFIG_FILE))?)?;
    let config = ModelConfig::from_hf_json(&config_json)?;
    let tensors = read_all(base)?;
    let before = ShardLayout::new(outputs(&tensors), u64::MAX)?.size();

    let rows = config.matrices().enumerate().map(|(at, id)| {
        let shape = config.matrix_shape(id);
        let most = lowrank_model::params::rank_max_saving(shape, Storage::Uv);
        let rank = (at % 5 != 4).then_some(most * (4 + at % 7) / 12);
        PlannedMatrix { matrix: config.named(id), shape, rank, relative_error: None, element_bytes: None }
    });
    let cost = CostModel {
        storage: Storage::Uv,
        unit: Unit::Params,
        dense_element_bytes: 2,
        factor_element_bytes: 2,
    };
    let plan = RankPlan::new(None, cost, 1, before, None, rows.collect())?;

    let (mut small, mut wide) = (BTreeMap::new(), BTreeMap::new());
    let mut outcomes = BTreeMap::new();
    for spec in config.tensors() {
        let tensor = tensors[&spec.name].clone();
        let rank = match spec.role {
            names::Role::Expert(id) => plan.ranks().get(&id).map(|&rank| (id, rank)),
            _ => None,
        };
        let Some((id, rank)) = rank else {
            small.insert(spec.name.clone(), tensor.clone());
            wide.insert(spec.name, tensor);
            continue;
        };
        let (m, n) = (spec.shape[0], spec.shape[1]);
        let w = tensor.to_f32();
        let (u, v) = factor(&w, m, n, rank);
        let u = Tensor::from_f32(vec![m, rank], Dtype::Bf16, &u)?;
        let v = Tensor::from_f32(vec![rank, n], Dtype::Bf16, &v)?;
        let product = multiply(&u.to_f32(), &v.to_f32(), m, rank, n);
        let missed: f64 = w.iter().zip(&product).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let energy: f64 = w.iter().map(|&a| f64::from(a).powi(2)).sum();
        let relative_error = (missed / energy).sqrt();
        let outcome = MatrixOutcome {
            relative_error,
            calibrated_error: None,
            excess_over_optimum: None,
            route: "subspace".into(),
            largest_coefficient: None,
            round_trip_error: None,
        };
        outcomes.insert(id, outcome);
        let (u_name, v_name) = config.factor_names(id);
        small.insert(u_name, u);
        small.insert(v_name, v);
        wide.insert(spec.name, Tensor::from_f32(spec.shape, Dtype::F32, &product)?);
    }

    let recipe = Recipe::new(Goal::Ranks(plan.ranks()));
    let report = CompressionReport::new(&plan, &outcomes, BaseModel::default(), recipe, "cpu".into(), None);
    let templates = ChatTemplate::find(&companions(base), |name| fs::read(base.join(name)).ok());
    let card = Card { base_model: Some("tiny-mixtral"), chat_templates: &templates, ..Card::default() };
    let documents = Documents::factored(
        ConfigOf::new(&config_json, StatedDtype::Asked(Dtype::Bf16)),
        &plan,
        &report,
        &card,
    )?;
    write(factored, base, &small, documents)?;
    write(dense, base, &wide, Documents::dense(&config_json, StatedDtype::Asked(Dtype::F32), &card)?)
}

/// Files of the base that every output gets.
fn companions(base: &Path) -> Vec<PathBuf> {
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
        .into_iter()
        .map(PathBuf::from)
        .filter(|name| base.join(name).exists())
        .collect()
}

fn outputs(tensors: &BTreeMap<String, Tensor>) -> Vec<OutputTensor> {
    tensors
        .iter()
        .map(|(name, tensor)| OutputTensor {
            name: name.clone(),
            dtype: tensor.dtype().into(),
            shape: tensor.shape().to_vec(),
        })
        .collect()
}

fn write(
    out: &Path,
    base: &Path,
    tensors: &BTreeMap<String, Tensor>,
    documents: Documents,
) -> Result<(), Box<dyn Error>> {
    let writer = CheckpointWriter::create(out, ShardLayout::new(outputs(tensors), 2_000_000)?)?;
    for (name, tensor) in tensors {
        writer.write(name, tensor)?;
    }
    let published = writer.finish(documents.with_companions(base, &companions(base))?)?;
    println!(
        "{}: {} parameters, {} bytes, {} shards",
        out.display(),
        published.params,
        published.bytes,
        published.shards
    );
    Ok(())
}

fn read_all(base: &Path) -> Result<BTreeMap<String, Tensor>, Box<dyn Error>> {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(base.join(format::INDEX_FILE))?)?;
    let map = index["weight_map"].as_object().ok_or("no weight_map")?;
    let shards: std::collections::BTreeSet<&str> = map.values().filter_map(|name| name.as_str()).collect();
    let mut all = BTreeMap::new();
    for shard in shards {
        let bytes = fs::read(base.join(shard))?;
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes)?.tensors() {
            let dtype = Dtype::parse(&format!("{:?}", view.dtype())).ok_or("foreign dtype")?;
            all.insert(name, Tensor::new(view.shape().to_vec(), dtype, view.data().to_vec())?);
        }
    }
    Ok(all)
}

/// W ≈ u·v: u an orthonormal basis of W (Wᵀ W)² Ω, v = uᵀ W.
fn factor(w: &[f32], m: usize, n: usize, rank: usize) -> (Vec<f32>, Vec<f32>) {
    let transposed = transpose(w, m, n);
    // Any start that is not orthogonal to the leading subspace will do; a fixed one keeps runs equal.
    let mut state = 1_u32;
    let start = (0..n * rank).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    let mut basis = multiply(w, &start.collect::<Vec<_>>(), m, n, rank);
    orthonormalise(&mut basis, m, rank);
    for _ in 0..2 {
        let back = multiply(&transposed, &basis, n, m, rank);
        basis = multiply(w, &back, m, n, rank);
        orthonormalise(&mut basis, m, rank);
    }
    let v = multiply(&transpose(&basis, m, rank), w, rank, m, n);
    (basis, v)
}

/// Modified Gram–Schmidt, twice, on the columns of a [rows, cols].
fn orthonormalise(a: &mut [f32], rows: usize, cols: usize) {
    let mut columns = transpose(a, rows, cols);
    for at in 0..cols {
        let (done, rest) = columns.split_at_mut(at * rows);
        let column = &mut rest[..rows];
        for _ in 0..2 {
            for other in done.chunks_exact(rows) {
                let dot: f32 = column.iter().zip(other).map(|(a, b)| a * b).sum();
                column.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let norm = column.iter().map(|a| a * a).sum::<f32>().sqrt();
        column.iter_mut().for_each(|a| *a /= norm);
    }
    a.copy_from_slice(&transpose(&columns, cols, rows));
}

fn transpose(a: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|at| a[at % rows * cols + at / rows]).collect()
}

/// [m, k] · [k, n]
fn multiply(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    for (row, a) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
            row.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
        }
    }
    out
}
