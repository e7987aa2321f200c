//! How much memory a job holds at its peak: every large allocation, counted from the model's dimensions and the settings
//! before anything runs.
//!
//! A job is a row of [`Stage`]s, one after another. A stage holds some things once and others once per worker, so its peak is
//! shared + workers · per worker, and the job's peak is the largest over its stages. Everything is an upper bound: an expert
//! may see every token, and a rank may be as large as the short side. Symbols: N tokens, H hidden size, F intermediate size,
//! E experts, L layers, V vocabulary; S = 8·H² is one second moment.
//!
//! What is not counted by name, the program itself and the buffers of its products, is in `PROCESS_BYTES` and
//! `WORKER_BYTES`. `cargo xtask bench speed --only memory` holds the sums against what a run really takes.

use lowrank_calibrate::half_width::rank_reference;
use lowrank_calibrate::pair;
use lowrank_calibrate::sensitivity::WALKING_BYTES;
use lowrank_compute::blocks::BLOCK_ROWS;
use lowrank_forward::moe::BATCH_TOKENS;
use lowrank_model::block::{Attention, LatentAttention, MoeLayers};
use lowrank_model::plan::Structures;
use lowrank_model::recipe::{CalibrationSettings, PropagationScope};
use lowrank_model::widths::expert_shape;
use lowrank_model::{Dtype, MatrixShape, ModelConfig, Projection, Recipe};

/// Tokens of an expert whose activations are held together. A multiple of what one batch of the forward pass and one of
/// [`pair::Pair::add`] take, so the sums have the same bits as if all were held.
pub(crate) const TOKENS_TOGETHER: usize = 4 * pair::BATCH_TOKENS;
/// The program, its stacks, documents and headers, and what the allocator keeps for later.
const PROCESS_BYTES: u64 = 96 << 20;
/// Stack, packed tiles of products, and blocks on their way to or from the disk, of one worker.
const WORKER_BYTES: u64 = 48 << 20;
/// Columns of a moment that one task sums or makes a product of.
const STRIP: u128 = 256;
/// Up to this short side the factorisation computes in f64 throughout.
const SHORT_SIDE_F64: usize = 1024;

/// Something that is held for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// In words.
    pub what: &'static str,
    /// Exact; saturates where no machine has that much.
    pub bytes: u64,
}

/// Part of a job, with what is held at its peak.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// In words.
    pub name: &'static str,
    /// Once.
    pub shared: Vec<Holding>,
    /// Once per worker.
    pub per_worker: Vec<Holding>,
}

impl Stage {
    fn new(name: &'static str, shared: &[(&'static str, u128)], per_worker: &[(&'static str, u128)]) -> Self {
        let holding = |&(what, bytes): &(&'static str, u128)| Holding {
            what,
            bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
        };
        let holdings = |list: &[(&'static str, u128)]| list.iter().map(holding).collect::<Vec<_>>();
        let mut stage = Self { name, shared: holdings(shared), per_worker: holdings(per_worker) };
        stage.shared.push(Holding { what: "the program", bytes: PROCESS_BYTES });
        stage.per_worker.push(Holding { what: "stack and buffers", bytes: WORKER_BYTES });
        stage
    }

    /// With so many workers.
    pub fn bytes(&self, workers: usize) -> u64 {
        let sum =
            |holdings: &[Holding]| holdings.iter().fold(0, |sum: u64, one| sum.saturating_add(one.bytes));
        sum(&self.shared).saturating_add(sum(&self.per_worker).saturating_mul(workers as u64))
    }
}

/// All stages of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    stages: Vec<Stage>,
}

impl Demand {
    /// Of choosing ranks: spectra, and with a text second moments and sensitivities before. `dtype` is that of the stored
    /// weights.
    pub fn plan(config: &ModelConfig, dtype: Dtype, recipe: &Recipe) -> Self {
        let model = Model::new(config, dtype);
        let mut stages = vec![model.data_free()];
        if let Some(settings) = recipe.calibration() {
            let structures = recipe.measured_structures();
            stages.extend(model.collect(settings, structures));
            stages.extend(model.sensitivities(settings, structures));
            if structures.has_ranks() && structures.has_widths() {
                stages.push(model.narrowed());
            }
            if structures.has_bases() {
                stages.push(model.differences());
            }
        }
        Self { stages }
    }

    /// Of a compression: the same, and the factors. `dtype` is that of the stored weights or of the factors, the wider one.
    pub fn compress(config: &ModelConfig, dtype: Dtype, recipe: &Recipe) -> Self {
        let Self { mut stages } = Self::plan(config, dtype, recipe);
        if let Some(settings) = recipe.calibration() {
            stages.extend(Model::new(config, dtype).fit(
                settings,
                recipe.propagation.propagate,
                recipe.structures(),
            ));
        }
        Self { stages }
    }

    /// Of multiplying factors back.
    pub fn densify(config: &ModelConfig, dtype: Dtype) -> Self {
        Self { stages: vec![Model::new(config, dtype).densify()] }
    }

    /// Of several jobs, one after another.
    pub fn of_each(jobs: impl IntoIterator<Item = Self>) -> Self {
        Self { stages: jobs.into_iter().flat_map(|job| job.stages).collect() }
    }

    /// The stage that holds most with so many workers.
    pub fn peak(&self, workers: usize) -> &Stage {
        self.stages.iter().max_by_key(|stage| stage.bytes(workers)).expect("every job has a stage")
    }

    /// Most workers up to `wanted` that fit; 0 if not even one does.
    pub fn workers(&self, wanted: usize, memory_bytes: u64) -> usize {
        let fits = |&workers: &usize| self.peak(workers).bytes(workers) <= memory_bytes;
        (1..=wanted).take_while(fits).last().unwrap_or(0)
    }
}

/// Products of the dimensions of a checked config: in u128 none wraps around.
fn product(of: &[u128]) -> u128 {
    of.iter().product()
}

/// Dimensions, as bytes are counted from them.
struct Model<'a> {
    config: &'a ModelConfig,
    /// Bytes of a stored weight.
    e: u128,
    /// H
    h: u128,
    /// F
    f: u128,
    /// F, or the width of shared experts that are compressed, if that is larger.
    widest: u128,
    /// Experts of a layer that are compressed.
    experts: u128,
    layers: u128,
}

const F32: u128 = 4;
const F64: u128 = 8;

impl<'a> Model<'a> {
    fn new(config: &'a ModelConfig, dtype: Dtype) -> Self {
        let shared = config.block.shared_experts.width() * usize::from(config.compresses_shared_experts);
        Self {
            config,
            e: dtype.size_bytes().into(),
            h: config.hidden_size as u128,
            f: config.intermediate_size as u128,
            widest: config.intermediate_size.max(shared) as u128,
            experts: config.compressed_experts_per_layer() as u128,
            layers: config.num_hidden_layers as u128,
        }
    }

    /// Of the largest matrix that is compressed.
    fn shape(&self) -> MatrixShape {
        expert_shape(Projection::Gate, self.widest as usize, self.config.hidden_size)
    }

    /// The largest matrix as it is stored.
    fn stored(&self) -> u128 {
        product(&[self.h, self.widest, self.e])
    }

    /// The same in f32.
    fn wide(&self) -> u128 {
        product(&[self.h, self.widest, F32])
    }

    /// The experts of a layer as they are stored.
    fn experts_of_layer(&self) -> u128 {
        product(&[3, self.experts, self.h, self.f, self.e])
            + product(&[3, self.h, self.widest - self.f, self.e])
    }

    /// S
    fn moment(&self) -> u128 {
        product(&[self.h, self.h, F64])
    }

    /// So many moments, in quarters.
    fn quarters(&self, count: u128) -> u128 {
        product(&[self.moment(), count]) / 4
    }

    /// Hidden states of so many tokens.
    fn states(&self, tokens: usize) -> u128 {
        product(&[tokens as u128, self.h, F32])
    }

    /// Singular values of all matrices.
    fn spectra(&self) -> u128 {
        product(&[3, self.layers, self.experts, self.shape().short_side() as u128, F64])
    }

    /// u and v in f32, of the largest rank.
    fn factors(&self) -> u128 {
        let short = self.shape().short_side() as u128;
        product(&[self.h + self.widest, short, F32])
    }

    /// Of the blocks that a matrix is widened in: a block, and its image.
    fn blocks(&self) -> u128 {
        product(&[2, BLOCK_ROWS as u128, self.h.max(self.shape().short_side() as u128), F64])
    }

    /// An expert that runs: its matrices in f32, one of them still as it is stored; a shared expert's or a dense block's, if
    /// they are larger. The outputs of a shared expert are held beside those of the others.
    fn expert(&self, tokens: usize) -> (&'static str, u128) {
        let shared = self.config.block.shared_experts.width();
        let states = if shared == 0 { 0 } else { self.states(tokens) };
        let dense = match self.config.block.moe_layers {
            MoeLayers::All => 0,
            MoeLayers::Except { intermediate_size, .. } => intermediate_size,
        };
        let width = self.f.max(shared.max(dense) as u128);
        ("matrices of one expert", product(&[self.h, width, 3 * F32 + self.e]) + states)
    }

    /// What flows through it: x, gate, up, activations, y of one batch.
    fn activations(&self, tokens: usize) -> (&'static str, u128) {
        let per_token = 2 * self.h + 3 * self.widest;
        ("activations of one expert", product(&[BATCH_TOKENS.min(tokens) as u128, per_token, F32]))
    }

    /// Router logits, and the chosen experts with their weights.
    fn routing(&self, tokens: usize) -> (&'static str, u128) {
        let per_token = self.experts * F32 + self.config.num_experts_per_tok as u128 * (8 + F32);
        ("routing", product(&[tokens as u128, per_token]))
    }

    /// Attention of one layer, as stored and in f32.
    fn attention(&self) -> (&'static str, u128) {
        let parts = self.config.block.attention.parts().iter();
        let weights: u128 =
            parts.map(|&part| product(&self.config.attention_shape(part).map(|n| n as u128))).sum();
        ("matrices of the attention", weights * (self.e + F32))
    }

    /// One window in the attention: x and the output, queries, heads and their mean, keys and values, scores. A worker
    /// that waits for another may begin a second one.
    fn attended(&self, window: usize) -> (&'static str, u128) {
        let heads = self.config.num_attention_heads as u128;
        let d = self.config.head_dim as u128;
        let per_token = match self.config.block.attention {
            Attention::Grouped => {
                let keys = product(&[self.config.num_key_value_heads as u128, d]);
                self.h + 3 * heads * d + 2 * keys + 128
            }
            // Queries and keys, both latents, keys and values as they come, heads and their mean.
            Attention::Latent(latent) => {
                let LatentAttention { query_rank, key_value_rank, fixed_dim, value_dim, .. } = latent;
                let (fixed, value) = (fixed_dim as u128, value_dim as u128);
                let latents = query_rank.unwrap_or(0) as u128 + 2 * (key_value_rank as u128 + d);
                self.h + 2 * heads * (fixed + d) + latents + heads * (fixed + value) + 2 * heads * value + 128
            }
        };
        ("windows in the attention", product(&[2, window as u128, per_token, F32]))
    }

    /// Tokens of a window of the calibration text.
    fn window(&self, settings: &CalibrationSettings) -> usize {
        settings.window(self.config.hidden_size, self.config.max_position_embeddings)
    }

    /// Sums of one expert that are taken at once: rows times their weights, and each worker's strip.
    fn summing(&self, tokens: usize) -> [(&'static str, u128); 2] {
        let rows = product(&[BATCH_TOKENS.min(tokens) as u128, self.h, F64]);
        let strip = product(&[STRIP, self.h + BATCH_TOKENS.min(tokens) as u128, F64]);
        [("weighted activations", 2 * rows), ("strips of a moment", rows + strip)]
    }

    /// By the weights alone: spectrum or factors of one matrix, in f64.
    fn data_free(&self) -> Stage {
        let short = self.shape().short_side() as u128;
        let gram = product(&[short, short, F64]);
        // The reduced matrix, eigenvectors, and two more for the iteration that finds them.
        let eigen = 5 * gram;
        // The factors, and twice more in f64 to measure their error or to hold the stored form against them.
        let stored = product(&[4, self.factors()]) + 3 * gram;
        Stage::new(
            "spectra and factors by the weights alone",
            &[("singular values", self.spectra())],
            &[
                ("stored matrix and factors", 2 * self.stored()),
                ("decomposition", eigen.max(stored)),
                ("blocks of a matrix", self.blocks()),
            ],
        )
    }

    /// The pass that sums second moments.
    fn collect(&self, settings: &CalibrationSettings, structures: Structures) -> Vec<Stage> {
        let tokens = settings.calibration_tokens;
        let states = self.states(tokens);
        let embedding = product(&[self.config.vocab_size as u128, self.h, self.e]);
        let hidden = ("hidden states", states);
        let block = ("inputs and outputs of the MoE block", 2 * states);
        let [rows, strips] = self.summing(tokens);
        let [channels, channel_strips] = self.channels(structures);
        let sampled = match structures.has_widths() {
            true => product(&[self.sampled(settings) as u128, self.f + 2 * self.h, F32]),
            false => 0,
        };
        let sampled = ("activations and outputs that sensitivities are measured with", sampled);
        let (base, mean) = match structures.has_bases() {
            true => (self.wide(), product(&[self.h, self.f, F64])),
            false => (0, 0),
        };
        let base = ("base of the down matrices", base);
        vec![
            Stage::new(
                "calibration: base of the down matrices",
                &[hidden, block, base, ("what it is the mean of", mean), ("stored matrix", self.stored())],
                &[],
            ),
            Stage::new("calibration: embedding", &[hidden, ("embedding", embedding)], &[]),
            self.attend("calibration: attention", states, settings),
            Stage::new(
                "calibration: second moments",
                &[
                    hidden,
                    block,
                    self.routing(tokens),
                    self.expert(tokens),
                    self.activations(tokens),
                    ("second moments of one expert", 2 * self.moment()),
                    channels,
                    sampled,
                    base,
                    rows,
                ],
                &[strips, channel_strips],
            ),
            Stage::new(
                "calibration: second moments on their way to the cache",
                &[
                    hidden,
                    block,
                    self.routing(tokens),
                    self.activations(tokens),
                    ("second moments of one expert", 2 * self.moment()),
                    ("the same packed, in three copies", self.quarters(3)),
                ],
                &[],
            ),
        ]
    }

    /// What orders the channels of one expert, or fits its w2: the sum over its tokens, and the lower triangle of a Cholesky
    /// factor in tiles; w2 in f64, its image, and what both are made from.
    /// And the strips that each worker makes of it.
    fn channels(&self, structures: Structures) -> [(&'static str, u128); 2] {
        if !structures.need_activations() {
            return [("no second moment of activations", 0); 2];
        }
        let whole =
            product(&[self.f, self.f + (self.f + STRIP) / 2, F64]) + 4 * product(&[self.h, self.f, F64]);
        let strips = 3 * product(&[self.f, STRIP, F64]);
        [
            ("second moment of the activations and what is made of it", whole),
            ("strips of the activations' second moment", strips),
        ]
    }

    /// Errors of ranks at several widths: gate or up, its images in the norm and in its eigenbasis.
    fn narrowed(&self) -> Stage {
        Stage::new(
            "errors of widths",
            &[("singular values", self.spectra())],
            &[
                ("a matrix and its images", 3 * product(&[self.h, self.f, F64])),
                ("stored matrix", self.stored()),
                ("second moments and decomposition", self.quarters(4 * 8)),
            ],
        )
    }

    /// Errors of ranks beside a shared base: the sums that the base is the mean of, the base, and each worker's difference.
    fn differences(&self) -> Stage {
        let sums = product(&[self.h, self.f, F64]);
        Stage::new(
            "errors of shared bases",
            &[
                ("singular values", 2 * self.spectra()),
                ("a base and what it is the mean of", sums + self.wide()),
            ],
            &[
                ("stored matrix and its difference", self.stored() + 3 * self.wide()),
                ("second moments and decomposition", self.quarters(4 * 8)),
                ("blocks of a matrix", self.blocks()),
            ],
        )
    }

    fn attend(&self, name: &'static str, states: u128, settings: &CalibrationSettings) -> Stage {
        Stage::new(
            name,
            &[("hidden states", states), self.attention(), ("singular values", self.spectra())],
            &[self.attended(self.window(settings))],
        )
    }

    /// Tokens that sensitivities are measured with.
    fn sampled(&self, settings: &CalibrationSettings) -> usize {
        let wanted = settings.sensitivity_tokens(self.config.hidden_size).min(settings.calibration_tokens);
        let window = CalibrationSettings::sensitivity_window(self.window(settings));
        wanted.div_ceil(window) * window
    }

    /// Spectra in the calibrated norm, and what their errors do to the logits.
    fn sensitivities(&self, settings: &CalibrationSettings, structures: Structures) -> [Stage; 5] {
        let window = CalibrationSettings::sensitivity_window(self.window(settings));
        let tokens = self.sampled(settings);
        let one = self.states(tokens);
        let groups = 3 + u128::from(structures.has_widths());
        let image = match structures.has_widths() {
            true => product(&[self.h, self.f, F64]),
            false => 0,
        };
        let states = product(&[1 + groups * self.layers, one]);
        let shared = |more: &[(&'static str, u128)]| {
            let mut shared = vec![
                ("hidden states, one and three or four for each layer", states),
                ("singular values", self.spectra()),
            ];
            shared.extend_from_slice(more);
            shared
        };
        let rank = rank_reference(self.shape()) as u128;
        let halved = ("factors of a matrix at half its size", product(&[self.h + self.widest, rank, F32]));
        let block = ("inputs and outputs of the MoE block", 2 * one);
        let together = (WALKING_BYTES as u128).max(2 * one).min(2 * states);
        let head = product(&[self.config.vocab_size as u128, self.h, self.e + F32]);
        let logits = product(&[2, self.config.vocab_size as u128, window as u128, F32]);
        [
            self.attend("sensitivities: attention", states, settings),
            Stage::new(
                "sensitivities: spectra",
                &shared(&[block, self.routing(tokens), self.activations(tokens)]),
                &[
                    halved,
                    ("image of the matrix in its eigenbasis", image),
                    ("stored matrix", self.stored()),
                    // Of the store and of the metric, its root and the inverse of that, and the eigenvectors in four parts.
                    ("second moments and decomposition", self.quarters(4 * 8)),
                    ("blocks of a matrix", self.blocks()),
                ],
            ),
            Stage::new(
                "sensitivities: one projection at half its size",
                &shared(&[block, self.routing(tokens), self.expert(tokens), self.activations(tokens)]),
                &[halved],
            ),
            Stage::new(
                "sensitivities: states through a layer",
                &shared(&[
                    ("inputs and outputs of the MoE block, several at once", together),
                    self.expert(tokens),
                    self.activations(tokens),
                ]),
                &[],
            ),
            Stage::new("sensitivities: logits", &shared(&[("output matrix", head), ("logits", logits)]), &[]),
        ]
    }

    /// Factors, fitted layer by layer to what the factors before them give, if that is wanted.
    fn fit(
        &self,
        settings: &CalibrationSettings,
        scope: PropagationScope,
        structures: Structures,
    ) -> Vec<Stage> {
        let tokens = settings.calibration_tokens;
        let states = self.states(tokens);
        let (streams, made) = match scope {
            PropagationScope::None if !structures.need_activations() => return vec![self.factor(&[])],
            PropagationScope::None | PropagationScope::Experts => (1, 0),
            PropagationScope::Layers => (2, self.experts_of_layer()),
        };
        let hidden = ("hidden states of the original and the compressed model", streams * states);
        let output = ("outputs of the original's MoE block", states);
        let made = ("factors of one layer", made);
        let spectra = ("singular values", self.spectra());
        let routing = ("routing of both", 4 * self.routing(tokens).1);
        let (bases, mean) = match structures.has_bases() {
            true => (3 * self.stored(), product(&[self.h, self.f, F64])),
            false => (0, 0),
        };
        let bases = ("bases of the layer", bases);
        let layer = [hidden, output, made, spectra, routing, bases];
        let with = |more: &[(&'static str, u128)]| [layer.as_slice(), more].concat();
        let together = ("inputs and outputs of some tokens", 4 * self.states(TOKENS_TOGETHER.min(tokens)));
        let as_stored = ("matrices of one expert as stored", 3 * self.stored());
        let pair = ("second moments of one expert", 2 * self.moment());
        let fits = ("second moments, maps and roots of an expert", self.quarters(4 * 4));
        let [rows, strips] = self.summing(tokens);
        let run = [together, as_stored, self.expert(tokens), self.activations(tokens), pair, rows];
        let moe = ("inputs and outputs of the MoE block", 2 * states);
        let mut outputs = run.to_vec();
        outputs.push(("outputs of one expert", states));
        let [channels, channel_strips] = self.channels(structures);
        outputs.push(channels);
        vec![
            self.attend("fit: attention", streams * states, settings),
            Stage::new(
                "fit: bases of the layer",
                &[
                    hidden,
                    spectra,
                    bases,
                    ("what they are the mean of", mean),
                    ("stored matrix", self.stored()),
                ],
                &[],
            ),
            Stage::new("fit: routing", &with(&[("inputs of the MoE block", states)]), &[]),
            Stage::new("fit: inputs of the experts", &with(&run), &[fits, strips]),
            Stage::new("fit: outputs of the experts", &with(&outputs), &[fits, strips, channel_strips]),
            Stage::new(
                "fit: maps",
                // With the two of the sums: what is wanted, what it is shrunk towards, the root in three parts, and products.
                &with(&[("second moments of one expert and its map", self.quarters(4 * 10)), as_stored]),
                &[fits, ("blocks of a matrix", self.blocks())],
            ),
            self.factor(&layer),
            Stage::new(
                "fit: the compressed model's layer",
                &[
                    hidden,
                    moe,
                    made,
                    spectra,
                    routing,
                    as_stored,
                    self.expert(tokens),
                    self.activations(tokens),
                ],
                &[],
            ),
        ]
    }

    /// Factors of one matrix in a calibrated norm, with what they are measured and stored by.
    fn factor(&self, shared: &[(&'static str, u128)]) -> Stage {
        let (wide, factors) = (self.wide(), self.factors());
        let steps = if self.shape().short_side() > SHORT_SIDE_F64 {
            [
                // The shrunk moment, the reduced matrix, eigenvectors and an orthonormal basis of them.
                self.quarters(4 * 6),
                // Factors in f32 twice, the map and Gram matrix of what they miss.
                2 * wide + self.quarters(4 * 4),
                // Without a map in f32 and f64; pivoted, as they are and as they are stored.
                3 * wide + self.quarters(10),
            ]
        } else {
            [self.quarters(4 * 6), 3 * wide + self.quarters(22), 4 * factors + self.quarters(8)]
        };
        Stage::new(
            "factors in the calibrated norm",
            shared,
            &[
                ("second moments, map and root", self.quarters(4 * 4)),
                ("stored matrix and factors", 2 * self.stored()),
                ("decomposition and factors", steps.into_iter().max().expect("three steps")),
                ("blocks of a matrix", self.blocks()),
            ],
        )
    }

    /// Factors multiplied back: as stored and in f32, the product likewise.
    fn densify(&self) -> Stage {
        let matrix = 2 * self.stored() + 2 * self.wide() + self.factors();
        Stage::new("factors multiplied back", &[], &[("matrix and factors", matrix)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lowrank_model::recipe::{Goal, Removal};
    use serde_json::json;

    fn config(changed: &serde_json::Value) -> ModelConfig {
        let mut config = json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 4096,
            "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "max_position_embeddings": 32_768, "tie_word_embeddings": false,
        });
        config.as_object_mut().unwrap().extend(changed.as_object().unwrap().clone());
        ModelConfig::from_hf_json(&config).unwrap()
    }

    fn recipe(calibration: CalibrationSettings) -> Recipe {
        Recipe { calibration, ..Recipe::new(Goal::Budget(Removal::Params(1))) }
    }

    fn calibrated() -> Recipe {
        recipe(CalibrationSettings::default())
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_calibrated_default_counts_tokens_and_moments_and_the_data_free_path_neither() {
        let mixtral = config(&json!({}));
        let free = Demand::compress(&mixtral, Dtype::Bf16, &recipe(CalibrationSettings::off()));
        assert!((GIB..3 * GIB).contains(&free.peak(1).bytes(1)), "{:?}", free.peak(1));
        let with_text = Demand::compress(&mixtral, Dtype::Bf16, &calibrated());
        // Two streams of hidden states and the outputs, 1 GiB each; the factors of one layer, 2.6 GiB, and its bases, 0.3 GiB;
        // the second moment of one expert's activations and what w2 is fitted with, 4.1 GiB.
        let peak = with_text.peak(1);
        assert!((6 * GIB..29 * GIB / 2).contains(&peak.bytes(1)), "{peak:?}");
        let few = CalibrationSettings {
            calibration_tokens: 2048,
            sensitivity_tokens: Some(256),
            ..CalibrationSettings::default()
        };
        assert!(
            Demand::compress(&mixtral, Dtype::Bf16, &recipe(few)).peak(1).bytes(1) < peak.bytes(1) - 3 * GIB
        );
        let plan = Demand::plan(&mixtral, Dtype::Bf16, &calibrated());
        assert!(plan.peak(1).bytes(1) <= peak.bytes(1));
    }

    #[test]
    fn only_sensitivities_and_spectra_grow_with_the_layers() {
        let of = |layers: u32| {
            let config = config(&json!({ "num_hidden_layers": layers }));
            Demand::compress(&config, Dtype::Bf16, &calibrated())
        };
        let (few, many) = (of(2), of(64));
        for (few, many) in few.stages.iter().zip(&many.stages) {
            let grows = |one: &Holding| {
                one.what.starts_with("hidden states, one and three") || one.what.contains("at once")
            };
            let rest = |stage: &Stage| -> u64 {
                let kept = stage.shared.iter().filter(|one| !grows(one) && one.what != "singular values");
                kept.map(|one| one.bytes).sum()
            };
            if few.name != "sensitivities: attention" {
                assert_eq!(rest(few), rest(many), "{}", few.name);
            }
            assert_eq!(few.per_worker, many.per_worker, "{}", few.name);
        }
    }

    #[test]
    fn as_many_workers_run_as_fit_and_one_that_does_not_fit_none() {
        let demand = Demand::compress(&config(&json!({})), Dtype::Bf16, &calibrated());
        for workers in [1, 2, 5] {
            let needed = demand.peak(workers).bytes(workers);
            assert_eq!(demand.workers(8, needed), workers);
            assert_eq!(demand.workers(8, needed - 1), workers - 1);
            assert_eq!(demand.workers(workers, u64::MAX), workers);
        }
        assert_eq!(
            Demand::of_each([demand.clone(), demand.clone()]).peak(3).bytes(3),
            demand.peak(3).bytes(3)
        );
    }

    #[test]
    fn the_largest_dimensions_of_a_config_do_not_wrap_around() {
        let most = 1_u64 << 20;
        let huge = config(&json!({ "hidden_size": most, "intermediate_size": most, "head_dim": 128 }));
        let settings =
            CalibrationSettings { calibration_tokens: usize::MAX, ..CalibrationSettings::default() };
        let demand = Demand::compress(&huge, Dtype::F32, &recipe(settings));
        assert_eq!(demand.workers(1, u64::MAX - 1), 0, "tokens beyond every machine");
        let demand = Demand::compress(&huge, Dtype::F32, &calibrated());
        assert_eq!(demand.workers(1, 1 << 40), 0);
    }
}
