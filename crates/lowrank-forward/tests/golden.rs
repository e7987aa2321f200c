//! Logits at every position against Hugging Face transformers in f32, one checkpoint per feature.
//! `tests/golden/make_fixtures.py` made the fixtures.

use lowrank_forward::{Cpu, Device, Engine, ExpertBatch, Forward, MoeBlock, Observer, choose};
use lowrank_reader::Checkpoint;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

const TOLERANCE: f32 = 1e-4;

/// `LOWRANK_FIXTURES` moves them, for a test binary that has left the repository.
fn fixtures() -> PathBuf {
    if let Some(moved) = std::env::var_os("LOWRANK_FIXTURES") {
        return moved.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

struct Golden {
    sequences: Vec<Vec<u32>>,
    logits: Vec<Vec<f32>>, // [T, V] each
}

fn golden(name: &str) -> Golden {
    let bytes = std::fs::read(fixtures().join(format!("golden/{name}.safetensors"))).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut golden = Golden { sequences: Vec::new(), logits: Vec::new() };
    for sequence in 0.. {
        let Ok(ids) = tensors.tensor(&format!("ids.{sequence}")) else { break };
        let ids = ids.data().as_chunks::<8>().0.iter();
        golden.sequences.push(ids.map(|raw| i64::from_le_bytes(*raw) as u32).collect());
        let logits = tensors.tensor(&format!("logits.{sequence}")).unwrap();
        golden
            .logits
            .push(logits.data().as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect());
    }
    assert!(!golden.sequences.is_empty());
    golden
}

fn check_on(engine: &dyn Engine, folder: &str) {
    let name = folder.trim_start_matches("golden/");
    let golden = golden(name);
    let checkpoint = Checkpoint::open(&fixtures().join(folder)).unwrap();
    let forward = Forward::on(&checkpoint, engine);
    let hidden = forward.run(&golden.sequences, &mut ()).unwrap();
    let head = forward.head().unwrap();
    for (sequence, expected) in golden.logits.iter().enumerate() {
        let logits = head.logits(&hidden, sequence).unwrap();
        assert_eq!(logits.len(), expected.len());
        let worst = logits
            .iter()
            .zip(expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |m: f32, d| if d > m || d.is_nan() { d } else { m });
        assert!(
            worst <= TOLERANCE,
            "{name}, sequence {sequence}: logits differ by {worst:e} on {}",
            engine.describe()
        );
    }
}

macro_rules! goldens {
    ($($test:ident: $folder:literal;)*) => {
        $(
            #[test]
            fn $test() {
                check_on(&Cpu, $folder);
            }
        )*

        mod on_cuda {
            $(
                #[test]
                #[ignore = "needs a CUDA device: --include-ignored"]
                fn $test() {
                    super::check_on(&*super::choose(super::Device::Cuda).unwrap().engine, $folder);
                }
            )*
        }
    };
}

goldens! {
    tied_embeddings_equal_transformers: "golden/tied";
    a_sliding_window_equals_transformers: "golden/sliding-window";
    an_unusual_head_dim_equals_transformers: "golden/head-dim";
    fused_experts_equal_transformers: "golden/fused";
    mistrals_own_layout_equals_transformers: "golden/consolidated";
    factored_experts_equal_transformers: "golden/lowrank";
    qwen3_moe_equals_transformers: "golden/qwen3-moe";
    layers_without_experts_equal_transformers: "golden/dense-layers";
    qwen2_moe_equals_transformers: "golden/qwen2-moe";
    olmoe_equals_transformers: "golden/olmoe";
    glm4_moe_equals_transformers: "golden/glm4-moe";
    deepseek_v3_equals_transformers: "golden/deepseek-v3";
    deepseek_v2_equals_transformers: "golden/deepseek-v2";
    phimoe_equals_transformers: "golden/phimoe";
    the_bundled_model_equals_transformers: "tiny-mixtral";
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let golden = golden("tiny-mixtral");
    let checkpoint = Checkpoint::open(&fixtures().join("tiny-mixtral")).unwrap();
    let forward = Forward::new(&checkpoint);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let hidden = pool.install(|| forward.run(&golden.sequences, &mut ())).unwrap();
        hidden.states().iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(3));
}

/// Recomputes the MoE block of each layer from what the observer was shown.
#[derive(Default)]
struct Recompute {
    sums: Vec<f64>,    // [N, H] of the layer at hand
    weights: Vec<f64>, // [N]
    blocks: usize,
    hidden_size: usize,
}

impl Observer for Recompute {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let h = self.hidden_size;
        assert!(batch.tokens.is_sorted());
        for (row, (&token, &weight)) in batch.tokens.iter().zip(batch.weights).enumerate() {
            let end = (token + 1) * h;
            if self.sums.len() < end {
                self.sums.resize(end, 0.0);
            }
            for (sum, &y) in self.sums[token * h..end].iter_mut().zip(&batch.y[row * h..]) {
                *sum += f64::from(weight) * f64::from(y);
            }
            if self.weights.len() <= token {
                self.weights.resize(token + 1, 0.0);
            }
            self.weights[token] += f64::from(weight);
        }
    }

    fn block(&mut self, block: &MoeBlock<'_>) {
        assert_eq!(block.layer, self.blocks);
        assert_eq!(self.sums.len(), block.output.len());
        for (sum, &output) in self.sums.iter().zip(block.output) {
            assert!((sum - f64::from(output)).abs() <= 1e-5 * (1.0 + sum.abs()));
        }
        assert!(self.weights.iter().all(|weight| (weight - 1.0).abs() < 1e-6));
        self.sums.clear();
        self.weights.clear();
        self.blocks += 1;
    }
}

fn an_observer_sees_every_routed_token_on(engine: &dyn Engine) {
    let golden = golden("tied");
    let checkpoint = Checkpoint::open(&fixtures().join("golden/tied")).unwrap();
    let forward = Forward::on(&checkpoint, engine);
    let mut observer = Recompute { hidden_size: forward.config().hidden_size, ..Recompute::default() };
    forward.run(&golden.sequences, &mut observer).unwrap();
    assert_eq!(observer.blocks, forward.config().num_hidden_layers);
}

#[test]
fn an_observer_sees_every_routed_token_of_every_expert() {
    an_observer_sees_every_routed_token_on(&Cpu);
}

#[test]
#[ignore = "needs a CUDA device: --include-ignored"]
fn an_observer_sees_every_routed_token_of_every_expert_on_cuda() {
    an_observer_sees_every_routed_token_on(&*choose(Device::Cuda).unwrap().engine);
}

#[test]
fn a_missing_device_is_named_or_fallen_back_from() {
    let auto = choose(Device::Auto).unwrap();
    match choose(Device::Cuda) {
        Ok(_) => assert_eq!(auto.fallback, None),
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("no CUDA here: "), "{error}");
            assert!(auto.fallback.unwrap().starts_with("no CUDA here: "));
            assert_eq!(auto.engine.describe(), Cpu.describe());
        }
    }
    assert_eq!(choose(Device::Cpu).unwrap().fallback, None);
}

#[test]
fn tokens_outside_the_vocabulary_are_refused_by_place() {
    let checkpoint = Checkpoint::open(&fixtures().join("golden/tied")).unwrap();
    let error = Forward::new(&checkpoint).embed(&[vec![1, 2], vec![3, 64]]).unwrap_err().to_string();
    assert!(error.contains("token 64 at position 1 of sequence 1"), "{error}");
    assert!(Forward::new(&checkpoint).embed(&[vec![], vec![3]]).is_err());
}

#[test]
fn without_outputs_an_expert_sees_the_same_and_gives_zeros() {
    #[derive(Default)]
    struct Seen {
        gate_and_up: Vec<f32>,
    }
    impl Observer for Seen {
        fn expert(&mut self, batch: &ExpertBatch<'_>) {
            self.gate_and_up.extend(batch.gate.iter().chain(batch.up));
        }
    }
    let checkpoint = Checkpoint::open(&fixtures().join("tiny-mixtral")).unwrap();
    let forward = Forward::new(&checkpoint);
    let h = forward.config().hidden_size;
    let rows: Vec<f32> = (0..3 * h).map(|i| (i as f32).sin()).collect();
    let weights = forward.expert(1, 0).unwrap();
    let silent =
        weights.clone().without_outputs(forward.config().hidden_size, forward.config().intermediate_size);
    let (mut whole, mut less) = (Seen::default(), Seen::default());
    let y = forward.expert_on(1, weights, &rows, &mut whole).unwrap();
    assert!(y.iter().any(|&value| value != 0.0));
    assert_eq!(forward.expert_on(1, silent, &rows, &mut less).unwrap(), vec![0.0; 3 * h]);
    assert_eq!(whole.gate_and_up, less.gate_and_up);
}
