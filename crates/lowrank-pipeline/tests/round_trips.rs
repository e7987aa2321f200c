//! Plan, factor, write, read, verify, of small models of any shape: what the whole chain makes holds against the verifier,
//! which shares no code with it.

use half::{bf16, f16};
use lowrank_model::names::Role;
use lowrank_model::plan::Structures;
use lowrank_model::progress::Silent;
use lowrank_model::recipe::{ByteSize, CalibrationSettings, Goal, OutputSettings, Removal, TextChoice};
use lowrank_model::{Dtype, Layout, MatrixId, ModelConfig, Recipe, Storage, Unit};
use lowrank_pipeline::compress::{Compressed, Request, compress};
use lowrank_pipeline::workers::{CachePlace, Resources};
use lowrank_pipeline::{Interrupt, PipelineError};
use lowrank_reader::Checkpoint;
use lowrank_svd::allocate::AllocateError;
use lowrank_verify::{Depth, Verdict, VerifyOptions, verify};
use lowrank_writer::Leftover;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// How the experts' numbers are drawn.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Independent.
    Full,
    /// Of rank 1, but for rounding.
    RankOne,
    /// Every third matrix is zero.
    SomeZero,
    /// Some numbers are below the normal range of their dtype.
    Denormal,
    /// Those of a layer's experts are nearly the same.
    Alike,
}

#[derive(Debug, Clone)]
struct Model {
    config: ModelConfig,
    /// Stored tensors take them in turn.
    dtypes: Vec<Dtype>,
    layout: Layout,
    kind: Kind,
    seed: u64,
}

fn model() -> impl Strategy<Value = Model> {
    let dimensions = (1_usize..3, 1_usize..4, 1_usize..21, 1_usize..3, 1_usize..4, any::<bool>());
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)];
    let dtypes = prop::collection::vec(dtype, 1..4);
    let layout = prop_oneof![Just(Layout::HfPerExpert), Just(Layout::HfFused)];
    let kind = prop_oneof![
        3 => Just(Kind::Full),
        1 => Just(Kind::RankOne),
        1 => Just(Kind::SomeZero),
        1 => Just(Kind::Denormal),
        2 => Just(Kind::Alike),
    ];
    (dimensions, dtypes, layout, kind, any::<u64>()).prop_map(|(dimensions, dtypes, layout, kind, seed)| {
        let (heads, half_head, intermediate, layers, experts, tied) = dimensions;
        let json = json!({
            "model_type": "mixtral", "hidden_size": heads * half_head * 2, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_local_experts": experts, "num_experts_per_tok": experts.min(2),
            "num_attention_heads": heads, "num_key_value_heads": 1, "vocab_size": 40, "rope_theta": 1e4,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        });
        let config = ModelConfig::from_hf_json(&json).unwrap();
        Model { config, dtypes, layout, kind, seed }
    })
}

impl Model {
    fn values(&self, at: usize, role: Role, shape: &[usize], chance: &mut ChaCha8Rng) -> Vec<f32> {
        let count = shape.iter().product();
        let mut one = || chance.random_range(-1.0_f32..1.0);
        match (role, self.kind) {
            (Role::Norm(_), _) => vec![1.0; count],
            (Role::Expert(_), Kind::RankOne) => {
                let (rows, cols) = (shape[0], shape[1]);
                let (u, v): (Vec<f32>, Vec<f32>) =
                    ((0..rows).map(|_| one()).collect(), (0..cols).map(|_| one()).collect());
                (0..count).map(|e| u[e / cols] * v[e % cols]).collect()
            }
            (Role::Expert(id), Kind::Alike) => {
                let seed = self.seed ^ (1 + id.layer as u64 * 3 + id.projection.index() as u64);
                let mut common = ChaCha8Rng::seed_from_u64(seed);
                (0..count).map(|_| common.random_range(-1.0_f32..1.0) + 0.2 * one()).collect()
            }
            (Role::Expert(_), Kind::SomeZero) if at.is_multiple_of(3) => vec![0.0; count],
            (Role::Expert(_), Kind::Denormal) => {
                let tiny = if self.dtypes.contains(&Dtype::F16) { 1e-6 } else { 1e-39 };
                (0..count).map(|e| if e % 4 == 0 { one() * tiny } else { one() }).collect()
            }
            _ => (0..count).map(|_| one()).collect(),
        }
    }

    fn write(&self, dir: &Path) {
        std::fs::create_dir(dir).unwrap();
        let mut stored: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
        let mut chance = ChaCha8Rng::seed_from_u64(self.seed);
        for (at, spec) in self.config.tensors().into_iter().enumerate() {
            let slice = self.config.locate(self.layout, spec.role);
            let values = self.values(at, spec.role, &spec.shape, &mut chance);
            let next = self.dtypes[stored.len() % self.dtypes.len()];
            let dtype = stored.get(&slice.tensor).map_or(next, |(dtype, ..)| *dtype);
            let element = dtype.size_bytes() as usize;
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                Dtype::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            };
            let length = slice.tensor_shape.iter().product::<usize>() * element;
            let whole =
                stored.entry(slice.tensor).or_insert_with(|| (dtype, slice.tensor_shape, vec![0; length]));
            let begin = slice.first_element as usize * element;
            whole.2[begin..begin + bytes.len()].copy_from_slice(&bytes);
        }
        let dtype = |dtype| match dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        };
        let views: Vec<(&String, TensorView<'_>)> = stored
            .iter()
            .map(|(name, (own, shape, bytes))| {
                (name, TensorView::new(dtype(*own), shape.clone(), bytes).unwrap())
            })
            .collect();
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_hf_json().to_string()).unwrap();
    }
}

#[derive(Debug, Clone)]
struct Job {
    storage: Storage,
    factor_dtype: Option<Dtype>,
    /// Of all expert parameters, or of the bytes of all weights.
    share: f64,
    unit: Unit,
    calibrated: bool,
    /// Of a calibrated job.
    structures: Structures,
    vocabulary_share: f64,
    shard_bytes_max: u64,
    workers: usize,
}

fn job() -> impl Strategy<Value = Job> {
    let storage = prop_oneof![Just(Storage::Uv), Just(Storage::Pivoted)];
    let dtype = prop_oneof![3 => Just(None), 1 => Just(Some(Dtype::F32)), 1 => Just(Some(Dtype::Bf16))];
    let unit = prop_oneof![Just(Unit::Params), Just(Unit::Bytes)];
    let structures = prop::sample::select(vec![
        Structures::Rank,
        Structures::Width,
        Structures::RankWidth,
        Structures::RankBase,
        Structures::RankWidthBase,
    ]);
    let calibration = (any::<bool>(), structures, prop_oneof![Just(0.0), Just(0.25)]);
    (storage, dtype, 0.01..0.6_f64, unit, calibration, 200_u64..20_000, 1_usize..3).prop_map(
        |(storage, factor_dtype, share, unit, calibration, shard_bytes_max, workers)| {
            let (calibrated, structures, vocabulary_share) = calibration;
            Job {
                storage,
                factor_dtype,
                share,
                unit,
                calibrated,
                structures,
                vocabulary_share,
                shard_bytes_max,
                workers,
            }
        },
    )
}

fn expert_params(config: &ModelConfig) -> u64 {
    config.matrices().map(|id| config.matrix_shape(id)).map(|s| (s.rows * s.cols) as u64).sum()
}

fn run(model: &Model, job: &Job, folder: &TempDir) -> Result<Compressed, PipelineError> {
    let (base, out, ids) =
        (folder.path().join("base"), folder.path().join("out"), folder.path().join("ids.json"));
    model.write(&base);
    let tokens: Vec<u32> = (0..96).map(|k| (k * 7 + k * k) % 40).collect();
    std::fs::write(&ids, json!(tokens).to_string()).unwrap();
    let checkpoint = Checkpoint::open(&base).unwrap();
    let goal = match job.unit {
        Unit::Params => {
            let remove = ((expert_params(&model.config) as f64 * job.share) as u64).max(1);
            Goal::Budget(Removal::Params(remove))
        }
        Unit::Bytes => {
            let stay = checkpoint.size().bytes as f64 * (1.0 - job.share / 2.0);
            Goal::TargetSize(ByteSize(stay as u64))
        }
    };
    let mut recipe = Recipe::new(goal);
    recipe.calibration = match job.calibrated {
        true => CalibrationSettings {
            calibrate: vec![TextChoice::File(ids)],
            calibration_tokens: 96,
            calibration_window: Some(16),
            sensitivity_tokens: Some(48),
            vocabulary_share: job.vocabulary_share,
            ..CalibrationSettings::default()
        },
        false => CalibrationSettings::off(),
    };
    if job.calibrated {
        recipe.plan.structures = Some(job.structures);
    }
    (recipe.factor.storage, recipe.factor.dtype) = (Some(job.storage), job.factor_dtype);
    recipe.output = OutputSettings { max_shard_size: ByteSize(job.shard_bytes_max) };
    let request = Request {
        model: "tiny",
        out: &out,
        recipe: &recipe,
        resources: &Resources { workers: job.workers, cache: CachePlace::Nowhere, ..Resources::default() },
        leftover: Leftover::Resume,
        interrupt: &Interrupt::default(),
        provenance: None,
    };
    compress(&checkpoint, request, &Silent)
}

/// Whether what is written holds against the verifier; how many layers have a base.
fn holds(model: &Model, job: &Job) -> Result<usize, TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    let done = match run(model, job, &folder) {
        Ok(done) => done,
        // So small matrices cannot give everything away.
        Err(PipelineError::Allocate(AllocateError::Infeasible { .. })) => {
            prop_assert!(!out.exists());
            return Ok(0);
        }
        Err(error) => return Err(TestCaseError::fail(error.to_string())),
    };
    let asked = done.plan.target.unwrap().remove_at_least;
    let removed = match job.unit {
        Unit::Params => done.plan.removed_params(),
        Unit::Bytes => done.plan.removed_bytes(),
    };
    prop_assert!(removed >= asked);

    let mut read = Checkpoint::open(&out).unwrap();
    // Where all experts have the same width, the output is a plain model.
    prop_assert_eq!(read.is_narrow(), done.plan.plain_width().is_some());
    if read.is_narrow() {
        read = read.narrowed_from(model.config.intermediate_size);
    }
    prop_assert_eq!(read.size(), done.plan.after);
    prop_assert_eq!(read.size().params, done.published.params);
    let ranks: BTreeMap<MatrixId, usize> = done.plan.ranks();
    prop_assert_eq!(read.ranks(), &ranks);
    prop_assert_eq!(&read.config().widths, &done.plan.widths());
    let bases: Vec<usize> = read.config().shared_bases.iter().copied().collect();
    prop_assert_eq!(&bases, &done.plan.shared_base_layers);

    let options = VerifyOptions { depth: Depth::Static, ..VerifyOptions::default() };
    let report = verify(&base, &out, &options, &Silent).unwrap();
    prop_assert_eq!(report.verdict, Verdict::Passed, "{}", report);
    let files = report.files.unwrap();
    let is_made =
        |id: &MatrixId| ranks.contains_key(id) || done.plan.widths().of(id.layer, id.expert).is_some();
    prop_assert_eq!(files.factored.len(), model.config.matrices().filter(is_made).count());
    prop_assert_eq!(files.original.params - files.compressed.params, done.plan.removed_params());
    Ok(bases.len())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_holds_against_the_verifier(model in model(), job in job()) {
        holds(&model, &job)?;
    }
}

/// Bases pay where experts are alike and many, which few of those models have.
#[test]
fn what_is_written_with_shared_bases_holds_too() {
    let mut runner = TestRunner::new(ProptestConfig { cases: 24, ..ProptestConfig::default() });
    let with_bases = Cell::new(0);
    let alike = |mut model: Model, mut job: Job| {
        (model.kind, model.config.num_local_experts, model.config.num_experts_per_tok) = (Kind::Alike, 5, 2);
        (job.calibrated, job.structures, job.share) =
            (true, Structures::RankWidthBase, 0.2 + job.share / 2.0);
        (model, job)
    };
    runner
        .run(&(model(), job()), |(model, job)| {
            let (model, job) = alike(model, job);
            with_bases.set(with_bases.get() + usize::from(holds(&model, &job)? > 0));
            Ok(())
        })
        .unwrap();
    assert!(with_bases.get() > 2, "{} of 24", with_bases.get());
}
