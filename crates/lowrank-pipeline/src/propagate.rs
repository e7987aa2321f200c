//! Error propagation: factors fitted to the activations of the compressed model, layer by layer, one layer in memory.
//!
//! Two streams of hidden states run through the calibration text, the original's h and the compressed model's ĥ, and
//! each expert's gate (w1) and up (w3) are factored before its down (w2) (AA-SVD, 2604.02119):
//!
//! | Scope | x̂, inputs of w1 and w3 | ẑ, inputs of w2 |
//! |---|---|---|
//! | experts | x: ĥ is h, and w1 and w3 are fitted as without propagation | silu(ŵ1 x) ∘ ŵ3 x |
//! | layers | norm(ĥ), the tokens that the router sends there | silu(ŵ1 x̂) ∘ ŵ3 x̂ |
//!
//! The target of an expert is the original expert's output for the original's x, even for tokens that the original's
//! router sends elsewhere. Only [H, H] moments are needed: of x and x̂, and of w2's outputs with z and with ẑ.
//!
//! An expert that keeps k of its channels has w1 and w3 with k rows, and its w2 [H, k] is fitted to the targets by least
//! squares in ẑ `[k]` ([`Regression`]), whatever the scope, before it is factored, if it is.
//!
//! In a layer whose experts share a base B, gate and up are fitted as W M − B, M the map of the inputs, and down by least
//! squares as that of an expert that keeps all its channels, less its base.
//!
//! The streams use the factors as they are stored, rounded. The result depends on the model, the text and the ranks alone: a
//! resumed run starts the streams again, with the factors that the earlier run finished, and writes the same bytes.

use crate::calibration::Calibrated;
use crate::memory::TOKENS_TOGETHER;
use crate::narrow::{self, Kept, error_of_narrowed, wide};
use crate::round::round;
use crate::shared_base::{LayerBases, error_beside_base, mapped_difference, with_base};
use crate::stored::{self, FactoredMatrix};
use crate::{Interrupt, PipelineError};
use lowrank_calibrate::moments::column_energies;
use lowrank_calibrate::{CalibrateError, Fitted, Norm, Pair, Regression, RowWeights};
use lowrank_compute::Algebra;
use lowrank_compute::blocks::matrix_shape;
use lowrank_forward::math::add_scaled;
use lowrank_forward::{ExpertBatch, Forward, ForwardError, Hidden, Observer, Routing, StoredExpert};
use lowrank_model::names::Role;
use lowrank_model::recipe::{MomentSettings, PropagationScope};
use lowrank_model::{Dtype, MatrixId, MatrixShape, Projection, SHARED_EXPERT, StoredMatrix, Tensor};
use lowrank_reader::Checkpoint;
use lowrank_svd::{Metric, MomentRoot, ShrinkageTarget};
use ndarray::Array2;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Makes a matrix that is stored otherwise than the original's, best in a metric; says whether that is the metric of its
/// spectrum.
type Make<'a> =
    dyn Fn(MatrixId, Tensor, &Metric<'_>, bool) -> Result<FactoredMatrix, PipelineError> + Sync + 'a;
/// A matrix that need not be made, as it is stored.
type Finished<'a> = dyn Fn(MatrixId) -> Result<Option<StoredMatrix>, PipelineError> + Sync + 'a;
/// Takes a matrix that was made, and whether it was so.
type Take<'a> = dyn Fn(MatrixId, FactoredMatrix, bool) -> Result<(), PipelineError> + Sync + 'a;

/// The bases of a layer, if its experts share some, as they are stored.
type BasesOf<'a> = dyn Fn(usize) -> Result<Option<LayerBases>, PipelineError> + Sync + 'a;

/// What to make, and what to do with it.
pub(crate) struct Propagation<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) algebra: &'a Algebra,
    /// Matrices that become factors.
    pub(crate) ranks: &'a BTreeMap<MatrixId, usize>,
    /// Channels of the experts that keep some: all three matrices of these are made.
    pub(crate) kept: &'a Kept,
    /// Bases of layers whose experts share one.
    pub(crate) bases: &'a BasesOf<'a>,
    /// Of those, the ones to hand on; what only they depend on is made, too.
    pub(crate) wanted: &'a (dyn Fn(MatrixId) -> bool + Sync),
    pub(crate) finished: &'a Finished<'a>,
    pub(crate) make: &'a Make<'a>,
    pub(crate) take: &'a Take<'a>,
    pub(crate) interrupt: &'a Interrupt,
}

impl Propagation<'_> {
    /// Whether a matrix is stored otherwise than the original's.
    fn makes(&self, id: MatrixId) -> bool {
        self.ranks.contains_key(&id) || self.kept.contains_key(&(id.layer, id.expert))
    }

    /// Runs inside the pool of the job.
    pub(crate) fn run(&self, calibrated: &Calibrated) -> Result<(), PipelineError> {
        let forward = Forward::on(self.checkpoint, &*calibrated.engine);
        let made = forward.config().matrices().filter(|&id| self.makes(id) && (self.wanted)(id));
        let Some(last) = made.map(|id| id.layer).max() else { return Ok(()) };
        let layers_too = calibrated.propagation().propagate == PropagationScope::Layers;
        let mut original = forward.embed(calibrated.sequences()).map_err(CalibrateError::from)?;
        let mut compressed = layers_too.then(|| original.clone());
        for layer in 0..=last {
            for stream in std::iter::once(&mut original).chain(&mut compressed) {
                forward.attention(layer, stream).map_err(CalibrateError::from)?;
            }
            let has_next = layer < last;
            let work = Layer {
                all: self,
                calibrated,
                forward: &forward,
                layer,
                bases: (self.bases)(layer)?,
                has_next,
                original: &original,
                compressed: compressed.as_ref(),
            };
            let (made, mut output) = work.make(work.experts()?)?;
            if !has_next {
                break;
            }
            if forward.config().experts_in(layer) == 0 {
                for stream in std::iter::once(&mut original).chain(&mut compressed) {
                    let input = forward.moe_input(layer, stream).map_err(CalibrateError::from)?;
                    let output =
                        forward.moe(layer, &[&input], &mut ()).map_err(CalibrateError::from)?.remove(0);
                    forward.add(stream, &output);
                }
                continue;
            }
            forward.add_kept_shared(layer, &original, &mut output).map_err(CalibrateError::from)?;
            forward.add(&mut original, &output);
            drop(output);
            if let Some(compressed) = &mut compressed {
                let expert_of = |expert| changed_expert(self.checkpoint, layer, expert, &made);
                let input = forward.moe_input(layer, compressed).map_err(CalibrateError::from)?;
                let output = forward.moe_of(layer, &[&input], &mut (), expert_of)?.remove(0);
                drop(input);
                forward.add(compressed, &output);
            }
        }
        Ok(())
    }
}

/// The same in pieces, each by whichever process.
impl Propagation<'_> {
    /// Makes what is to be made of some experts of a layer, from the hidden states before its MoE block: those of the original, and
    /// those of the compressed model, where they are others.
    pub(crate) fn of_experts(
        &self,
        calibrated: &Calibrated,
        (layer, experts): (usize, &[usize]),
        original: &Hidden,
        compressed: Option<&Hidden>,
    ) -> Result<(), PipelineError> {
        let forward = Forward::on(self.checkpoint, &*calibrated.engine);
        let work = self.at(calibrated, &forward, layer, original, compressed)?;
        let chosen = work.experts()?.into_iter().filter(|routed| experts.contains(&routed.expert));
        work.make(chosen.collect()).map(drop)
    }

    /// Hidden states of the compressed model through the MoE block of a layer whose matrices are all finished.
    pub(crate) fn through(
        &self,
        calibrated: &Calibrated,
        layer: usize,
        states: &mut Hidden,
    ) -> Result<(), PipelineError> {
        let forward = Forward::on(self.checkpoint, &*calibrated.engine);
        let input = forward.moe_input(layer, states).map_err(CalibrateError::from)?;
        let output = {
            let work = self.at(calibrated, &forward, layer, states, Some(states))?;
            let experts = forward.config().compressed_experts(layer);
            let made = experts.map(|expert| work.finished(expert)).collect::<Result<Vec<_>, _>>()?;
            let made: BTreeMap<MatrixId, StoredMatrix> = made.into_iter().flatten().collect();
            let expert_of = |expert| changed_expert(self.checkpoint, layer, expert, &made);
            forward.moe_of(layer, &[&input], &mut (), expert_of)?.remove(0)
        };
        forward.add(states, &output);
        Ok(())
    }

    fn at<'b>(
        &'b self,
        calibrated: &'b Calibrated,
        forward: &'b Forward<'b>,
        layer: usize,
        original: &'b Hidden,
        compressed: Option<&'b Hidden>,
    ) -> Result<Layer<'b>, PipelineError> {
        let bases = (self.bases)(layer)?;
        Ok(Layer { all: self, calibrated, forward, layer, bases, has_next: false, original, compressed })
    }
}

/// One layer of both streams.
struct Layer<'a> {
    all: &'a Propagation<'a>,
    calibrated: &'a Calibrated,
    forward: &'a Forward<'a>,
    layer: usize,
    /// That its experts share.
    bases: Option<LayerBases>,
    /// Whether layers come after it.
    has_next: bool,
    /// Hidden states of the original after the attention.
    original: &'a Hidden,
    /// Of the compressed model, where that is another.
    compressed: Option<&'a Hidden>,
}

/// Tokens that a router sends to one expert, in rising order; all of them for a shared one.
#[derive(Clone)]
struct RoutedTokens {
    tokens: Vec<usize>,
    /// What the expert's outputs are multiplied by, g.
    weights: Vec<f32>,
}

/// An expert with its tokens in both models.
struct RoutedExpert {
    expert: usize,
    /// In the compressed model: the factors are fitted to these.
    compressed: RoutedTokens,
    /// In the original.
    original: RoutedTokens,
}

/// Statistics of an expert's inputs, which w1 and w3 share.
struct InputStatistics {
    moment: Array2<f64>,
    map: Array2<f64>,
    root: Option<MomentRoot>,
}

/// In which metric a matrix is made.
enum Fit {
    /// As without propagation.
    Alone(Norm),
    /// Down of an expert that keeps some channels, or that has a base, by least squares.
    Regression {
        /// [H, k] in f32, without the base.
        down: Tensor,
        /// Of its outputs.
        moment: Array2<f64>,
        shrinkage: f64,
    },
    Inputs {
        statistics: Arc<InputStatistics>,
        rows: Vec<f64>,
        shrinkage: f64,
    },
    Outputs {
        moment: Array2<f64>,
        shrinkage: f64,
        map: Array2<f64>,
    },
}

impl Fit {
    /// What the inputs of the original's matrix are mapped by.
    fn map(&self) -> Option<&Array2<f64>> {
        match self {
            Self::Inputs { statistics, .. } => Some(&statistics.map),
            _ => None,
        }
    }

    /// For a matrix that the map was applied to.
    fn metric_of_mapped(&self) -> Metric<'_> {
        match self.metric() {
            Metric::Inputs { second_moment, row_weights, shrinkage, root, .. } => {
                Metric::Inputs { second_moment, row_weights, shrinkage, root, map: None }
            }
            metric => metric,
        }
    }

    fn metric(&self) -> Metric<'_> {
        match self {
            Self::Alone(norm) => norm.metric(),
            Self::Inputs { statistics, rows, shrinkage } => {
                let InputStatistics { moment, map, root } = &**statistics;
                let (map, root) = (Some(map), root.as_ref());
                Metric::Inputs { second_moment: moment, row_weights: rows, shrinkage: *shrinkage, map, root }
            }
            Self::Outputs { moment, shrinkage, map } => {
                Metric::Outputs { second_moment: moment, shrinkage: *shrinkage, map: Some(map) }
            }
            Self::Regression { moment, shrinkage, .. } => {
                Metric::Outputs { second_moment: moment, shrinkage: *shrinkage, map: None }
            }
        }
    }
}

impl Layer<'_> {
    /// Makes what is to be made of some experts of this layer and hands it on; → that, where there are two streams, and what they
    /// add to the original's output [N, H], of use where the layer goes on.
    fn make(
        &self,
        experts: Vec<RoutedExpert>,
    ) -> Result<(BTreeMap<MatrixId, StoredMatrix>, Vec<f32>), PipelineError> {
        let mut made = BTreeMap::new();
        let mut output = vec![0.0; self.original.states().len()];
        // As many at once as there are workers: each holds two moments.
        for group in experts.chunks(rayon::current_num_threads()) {
            self.all.interrupt.check()?;
            let mut fits = Vec::new();
            for routed in group {
                made.extend(self.finished(routed.expert)?);
                fits.extend(self.input_fits(routed, &made)?);
            }
            self.factor(fits, &mut made)?;
            let mut fits = Vec::new();
            for routed in group {
                self.all.interrupt.check()?;
                fits.extend(self.output_fit(routed, &made, &mut output)?);
            }
            self.factor(fits, &mut made)?;
            if self.compressed.is_none() {
                // Nobody comes back to it.
                made.clear();
            }
        }
        Ok((made, output))
    }

    fn experts(&self) -> Result<Vec<RoutedExpert>, PipelineError> {
        let config = self.forward.config();
        let route = |states| {
            let input = self.forward.moe_input(self.layer, states)?;
            let routing = self.forward.route(self.layer, &input)?;
            let shared = match config.compresses_shared_experts && config.experts_in(self.layer) > 0 {
                true => self.forward.shared_weights(self.layer, &input)?,
                false => Vec::new(),
            };
            Ok::<_, ForwardError>((routing, shared))
        };
        let route = |states| route(states).map_err(CalibrateError::from);
        let original = route(self.original)?;
        let compressed = self.compressed.map(route).transpose()?;
        let with_tokens = |expert| {
            let of = |(routing, shared): &(Routing, Vec<f32>)| {
                if expert == SHARED_EXPERT {
                    return RoutedTokens { tokens: (0..shared.len()).collect(), weights: shared.clone() };
                }
                let (tokens, weights) = routing.routed_tokens(expert);
                RoutedTokens { tokens, weights }
            };
            let original = of(&original);
            RoutedExpert {
                expert,
                compressed: compressed.as_ref().map_or_else(|| original.clone(), of),
                original,
            }
        };
        Ok(config.compressed_experts(self.layer).map(with_tokens).collect())
    }

    fn id(&self, expert: usize, projection: Projection) -> MatrixId {
        MatrixId { layer: self.layer, expert, projection }
    }

    /// Whether anything depends on what is made of an expert: with two streams all that comes after does.
    fn matters(&self, expert: usize) -> bool {
        let wanted = |projection| {
            let id = self.id(expert, projection);
            self.all.makes(id) && (self.all.wanted)(id)
        };
        self.compressed.is_some() || Projection::ALL.into_iter().any(wanted)
    }

    fn changed(&self, expert: usize, projections: &[Projection]) -> Vec<MatrixId> {
        let ids = projections.iter().map(|&projection| self.id(expert, projection));
        ids.filter(|&id| self.matters(expert) && self.all.makes(id)).collect()
    }

    /// Channels that an expert keeps, if not all.
    fn kept(&self, expert: usize) -> Option<&[usize]> {
        self.all.kept.get(&(self.layer, expert)).map(Vec::as_slice)
    }

    /// What an earlier run made of an expert.
    fn finished(&self, expert: usize) -> Result<Vec<(MatrixId, StoredMatrix)>, PipelineError> {
        let mut found = Vec::new();
        for id in self.changed(expert, &Projection::ALL) {
            found.extend((self.all.finished)(id)?.map(|matrix| (id, self.whole(id, matrix))));
        }
        Ok(found)
    }

    /// What pieces of a matrix stand for: with a base the difference from it.
    fn whole(&self, id: MatrixId, pieces: StoredMatrix) -> StoredMatrix {
        match self.base(id) {
            Some(base) => with_base(base, pieces),
            None => pieces,
        }
    }

    /// That its factors are added to.
    fn base(&self, id: MatrixId) -> Option<&Arc<Tensor>> {
        let is_based = self.all.ranks.contains_key(&id) && !id.is_shared();
        let bases = self.bases.as_ref().filter(|_| is_based)?;
        Some(&bases[id.projection.index()])
    }

    /// Of an expert's matrices those that are still to be made.
    fn to_make(
        &self,
        expert: usize,
        projections: &[Projection],
        made: &BTreeMap<MatrixId, StoredMatrix>,
    ) -> Vec<MatrixId> {
        let mut ids = self.changed(expert, projections);
        ids.retain(|id| !made.contains_key(id));
        ids
    }

    /// For w1 and w3.
    fn input_fits(
        &self,
        routed: &RoutedExpert,
        made: &BTreeMap<MatrixId, StoredMatrix>,
    ) -> Result<Vec<(MatrixId, Fit)>, PipelineError> {
        let ids = self.to_make(routed.expert, &[Projection::Gate, Projection::Up], made);
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let kept = self.kept(routed.expert);
        let alone = |id| Ok((id, Fit::Alone(of_channels(self.calibrated.norms.of(id)?, kept))));
        let compressed = match self.compressed {
            Some(compressed) if !routed.compressed.tokens.is_empty() => compressed,
            _ => return ids.into_iter().map(alone).collect(),
        };
        let config = self.forward.config();
        let settings = self.calibrated.moments();
        let weights = self.forward.expert(self.layer, routed.expert).map_err(CalibrateError::from)?;
        let energies = match &weights.down {
            StoredMatrix::Dense(w2) => column_energies(w2),
            _ => return Err(PipelineError::AlreadyFactored(self.all.checkpoint.layout())),
        };
        let RoutedTokens { tokens, weights: router_weights } = &routed.compressed;
        let width = config.matrix_shape(self.id(routed.expert, Projection::Gate)).rows;
        let weights = weights.without_outputs(config.hidden_size, width);
        let mut row_weights = RowWeights::new(width, settings.calibration_target);
        let mut pair = Pair::new(config.hidden_size);
        for (tokens, router_weights) in
            tokens.chunks(TOKENS_TOGETHER).zip(router_weights.chunks(TOKENS_TOGETHER))
        {
            let rows = self.rows(compressed, tokens)?;
            let mut observer = RowWeightObserver {
                rows: &mut row_weights,
                counted: Vec::with_capacity(tokens.len()),
                router_weights,
                column_energies: &energies,
                settings,
            };
            let run = self.forward.expert_on(self.layer, weights.clone(), &rows, &mut observer);
            run.map_err(CalibrateError::from)?;
            pair.add(&self.rows(self.original, tokens)?, &rows, &observer.counted);
        }
        drop(weights);
        pair.check(self.layer, routed.expert)?;
        let shrinkage = self.calibrated.norms.shrinkage_of(tokens.len() as f64);
        let (map, root) = self.map(ids[0], &pair, shrinkage, ShrinkageTarget::Identity)?;
        let statistics = Arc::new(InputStatistics { moment: pair.moment, map, root });
        let fit = |id: MatrixId| {
            let rows = if id.projection == Projection::Gate { &row_weights.gate } else { &row_weights.up };
            let rows = rows_of_channels(rows.clone(), kept);
            (id, Fit::Inputs { statistics: Arc::clone(&statistics), rows, shrinkage })
        };
        Ok(ids.into_iter().map(fit).collect())
    }

    /// For w2, if it has a rank; and adds what the original's expert gives to `output` [N, H].
    fn output_fit(
        &self,
        routed: &RoutedExpert,
        made: &BTreeMap<MatrixId, StoredMatrix>,
        output: &mut [f32],
    ) -> Result<Option<(MatrixId, Fit)>, PipelineError> {
        let h = self.forward.config().hidden_size;
        let to_make = self.to_make(routed.expert, &[Projection::Down], made).pop();
        if to_make.is_none() && !self.has_next {
            return Ok(None);
        }
        let weights = self.forward.expert(self.layer, routed.expert).map_err(CalibrateError::from)?;
        let run = |weights, rows: &[f32]| {
            self.forward.expert_on(self.layer, weights, rows, &mut ()).map_err(CalibrateError::from)
        };
        // For the tokens of either stream, whatever is to be made, so that a resumed run adds the same numbers.
        let tokens: Vec<usize> =
            BTreeSet::from_iter(routed.compressed.tokens.iter().chain(&routed.original.tokens).copied())
                .into_iter()
                .collect();
        let mut y = Vec::with_capacity(tokens.len() * h); // [n, H]
        for tokens in tokens.chunks(TOKENS_TOGETHER) {
            y.extend(run(weights.clone(), &self.rows(self.original, tokens)?)?);
        }
        let y_of = |token: usize| {
            let row = tokens.binary_search(&token).expect("routed to this expert");
            &y[row * h..][..h]
        };
        for (&token, &g) in routed.original.tokens.iter().zip(&routed.original.weights) {
            add_scaled(&mut output[token * h..][..h], g, y_of(token));
        }
        let Some(id) = to_make else { return Ok(None) };
        let inputs = [Projection::Gate, Projection::Up].map(|projection| self.id(routed.expert, projection));
        let is_changed = self.compressed.is_some() || inputs.iter().any(|id| made.contains_key(id));
        if let Some(kept) = self.kept(routed.expert) {
            return self.regression_fit(routed, id, weights, made, kept, &y_of).map(|fit| Some((id, fit)));
        }
        if self.base(id).is_some() {
            let all: Vec<usize> = (0..self.forward.config().intermediate_size).collect();
            return self.regression_fit(routed, id, weights, made, &all, &y_of).map(|fit| Some((id, fit)));
        }
        let RoutedTokens { tokens, weights: router_weights } = &routed.compressed;
        let is_alone = self.calibrated.propagation().propagate == PropagationScope::None;
        if is_alone || tokens.is_empty() || !is_changed {
            return Ok(Some((id, Fit::Alone(self.calibrated.norms.of(id)?))));
        }
        let [gate, up] = [(&inputs[0], weights.gate), (&inputs[1], weights.up)]
            .map(|(id, original)| made.get(id).cloned().unwrap_or(original));
        let changed = StoredExpert { gate, down: weights.down, up };
        let shares = self.calibrated.moments().gate_weight.of_all(router_weights);
        let mut pair = Pair::new(h);
        for (tokens, shares) in tokens.chunks(TOKENS_TOGETHER).zip(shares.chunks(TOKENS_TOGETHER)) {
            let given = run(changed.clone(), &self.rows(self.compressed.unwrap_or(self.original), tokens)?)?; // [n, H]
            let wanted: Vec<f32> = tokens.iter().flat_map(|&token| y_of(token)).copied().collect(); // [n, H]
            pair.add(&wanted, &given, shares);
        }
        drop(y);
        let StoredExpert { down: StoredMatrix::Dense(w2), .. } = changed else {
            return Err(PipelineError::AlreadyFactored(self.all.checkpoint.layout()));
        };
        pair.check(self.layer, routed.expert)?;
        let shrinkage = self.calibrated.norms.shrinkage_of(tokens.len() as f64);
        let (map, _) = self.map(id, &pair, shrinkage, ShrinkageTarget::GramOf(&w2))?;
        Ok(Some((id, Fit::Outputs { moment: pair.moment, shrinkage, map })))
    }

    /// For w2 of an expert that keeps some channels, or that has a base: from the activations that its w1 and w3 give to the
    /// original's outputs.
    fn regression_fit<'y>(
        &self,
        routed: &RoutedExpert,
        id: MatrixId,
        weights: StoredExpert,
        made: &BTreeMap<MatrixId, StoredMatrix>,
        kept: &[usize],
        y_of: &dyn Fn(usize) -> &'y [f32],
    ) -> Result<Fit, PipelineError> {
        // The compressed model may send no token where the original does.
        let (stream, RoutedTokens { tokens, weights: router_weights }) =
            match (self.compressed, &routed.compressed) {
                (Some(compressed), own) if !own.tokens.is_empty() => (compressed, own),
                _ => (self.original, &routed.original),
            };
        let config = self.forward.config();
        let StoredMatrix::Dense(w2) = weights.down else {
            return Err(PipelineError::AlreadyFactored(self.all.checkpoint.layout()));
        };
        // Those of a narrowed expert are made before its w2.
        let of =
            |projection, original| made.get(&self.id(routed.expert, projection)).cloned().unwrap_or(original);
        let changed = StoredExpert {
            gate: of(Projection::Gate, weights.gate),
            down: StoredMatrix::Dense(w2.clone()),
            up: of(Projection::Up, weights.up),
        };
        let changed = changed.without_outputs(config.hidden_size, kept.len());
        let shares = self.calibrated.moments().gate_weight.of_all(router_weights);
        let mut regression = Regression::new(config.hidden_size, kept.len());
        for (tokens, shares) in tokens.chunks(TOKENS_TOGETHER).zip(shares.chunks(TOKENS_TOGETHER)) {
            let mut activations = Activations(Vec::with_capacity(tokens.len() * kept.len()));
            let rows = self.rows(stream, tokens)?;
            let run = self.forward.expert_on(self.layer, changed.clone(), &rows, &mut activations);
            run.map_err(CalibrateError::from)?;
            let wanted: Vec<f32> = tokens.iter().flat_map(|&token| y_of(token)).copied().collect(); // [n, H]
            regression.add(&wanted, &activations.0, shares);
        }
        regression.check(self.layer, routed.expert)?;
        let columns = wide(&narrow::narrowed(&w2, Projection::Down, kept));
        let shape = MatrixShape { rows: config.hidden_size, cols: kept.len() };
        let fitted = regression.fit(columns.view(), self.base(id).map(|base| &**base));
        let Fitted { down, outputs } = fitted.map_err(|source| PipelineError::Svd { name: id, source })?;
        let values: Vec<f32> = down.iter().map(|&value| value as f32).collect();
        let name = config.tensor(Role::Expert(id)).name;
        let down = round(&name, vec![shape.rows, shape.cols], Dtype::F32, &values)?;
        let shrinkage = self.calibrated.norms.shrinkage_of(tokens.len() as f64);
        Ok(Fit::Regression { down, moment: outputs, shrinkage })
    }

    /// From what is given to what is wanted, for a matrix.
    fn map(
        &self,
        id: MatrixId,
        pair: &Pair,
        shrinkage: f64,
        target: ShrinkageTarget<'_>,
    ) -> Result<(Array2<f64>, Option<MomentRoot>), PipelineError> {
        let target_interpolation = self.calibrated.propagation().target_interpolation;
        let shape = self.forward.config().matrix_shape(id);
        let (map, _) =
            self.all.algebra.run(shape, |backend| pair.map(backend, shrinkage, target_interpolation, target));
        map.map_err(|source| PipelineError::Svd { name: id, source })
    }

    /// Makes several matrices at once and hands them on.
    fn factor(
        &self,
        fits: Vec<(MatrixId, Fit)>,
        made: &mut BTreeMap<MatrixId, StoredMatrix>,
    ) -> Result<(), PipelineError> {
        let done: Result<Vec<(MatrixId, StoredMatrix)>, PipelineError> = fits
            .into_par_iter()
            .with_max_len(1)
            .map(|(id, fit)| {
                let StoredMatrix::Dense(matrix) = self.all.checkpoint.read_matrix(id)? else {
                    return Err(PipelineError::AlreadyFactored(self.all.checkpoint.layout()));
                };
                self.all.checkpoint.check_matrix_finite(id, &matrix)?;
                let kept = self.kept(id.expert);
                let base = self.base(id);
                let own = match (&fit, kept, base) {
                    (Fit::Regression { down, .. }, ..) => down.clone(),
                    (_, Some(kept), _) => narrow::narrowed(&matrix, id.projection, kept),
                    (_, None, Some(base)) => mapped_difference(&matrix, fit.map(), base),
                    (_, None, None) => matrix.clone(),
                };
                let metric = if base.is_some() { fit.metric_of_mapped() } else { fit.metric() };
                let is_alone = kept.is_none() && base.is_none() && matches!(fit, Fit::Alone(_));
                let shape = matrix_shape(&own);
                let mut factored = (self.all.make)(id, own, &metric, is_alone)?;
                let stored = stored::stored_of(&factored.pieces, shape);
                let error = match (kept, base) {
                    (Some(kept), _) => {
                        Some(error_of_narrowed(self.all.algebra, &matrix, id.projection, kept, &stored))
                    }
                    (None, Some(base)) => Some(error_beside_base(self.all.algebra, &matrix, base, &stored)),
                    (None, None) => None,
                };
                drop(stored);
                if let Some(error) = error {
                    factored.outcome.relative_error =
                        error.map_err(|source| PipelineError::Svd { name: id, source })?;
                }
                drop(matrix);
                let matrix = self.whole(id, stored::stored(&factored.pieces, shape));
                if (self.all.wanted)(id) {
                    (self.all.take)(id, factored, is_alone)?;
                }
                Ok((id, matrix))
            })
            .collect();
        made.extend(done?);
        Ok(())
    }

    /// What the experts are given for some tokens: norm(h) [n, H]. Made when it is needed, for all tokens would be as large
    /// as the hidden states.
    fn rows(&self, hidden: &Hidden, tokens: &[usize]) -> Result<Vec<f32>, CalibrateError> {
        let h = self.forward.config().hidden_size;
        let mut rows = Vec::with_capacity(tokens.len() * h);
        for &token in tokens {
            rows.extend_from_slice(&hidden.states()[token * h..][..h]);
        }
        Ok(self.forward.moe_input_of(self.layer, &rows)?)
    }
}

/// The matrices of an expert, those that were made in place of the original's.
fn changed_expert(
    checkpoint: &Checkpoint,
    layer: usize,
    expert: usize,
    made: &BTreeMap<MatrixId, StoredMatrix>,
) -> Result<StoredExpert, CalibrateError> {
    let matrix = |projection| {
        let id = MatrixId { layer, expert, projection };
        made.get(&id).map_or_else(|| checkpoint.read_matrix(id), |matrix| Ok(matrix.clone()))
    };
    Ok(StoredExpert {
        gate: matrix(Projection::Gate)?,
        down: matrix(Projection::Down)?,
        up: matrix(Projection::Up)?,
    })
}

/// A norm of gate or up for the rows of some channels.
fn of_channels(norm: Norm, kept: Option<&[usize]>) -> Norm {
    match norm {
        Norm::Inputs { moment, rows, shrinkage } => {
            Norm::Inputs { moment, rows: rows_of_channels(rows, kept), shrinkage }
        }
        norm => norm,
    }
}

fn rows_of_channels(rows: Vec<f64>, kept: Option<&[usize]>) -> Vec<f64> {
    match kept {
        Some(kept) => kept.iter().map(|&channel| rows[channel]).collect(),
        None => rows,
    }
}

/// Takes the activations of one expert.
struct Activations(Vec<f32>);

impl Observer for Activations {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        self.0.extend_from_slice(batch.activations);
    }
}

/// Takes the weights of one expert's rows from tokens that all were brought to it.
struct RowWeightObserver<'a> {
    rows: &'a mut RowWeights,
    counted: Vec<f64>,
    router_weights: &'a [f32],
    column_energies: &'a [f64],
    settings: MomentSettings,
}

impl Observer for RowWeightObserver<'_> {
    fn expert(&mut self, batch: &ExpertBatch<'_>) {
        let weights = &self.router_weights[batch.tokens[0]..][..batch.tokens.len()];
        let batch = ExpertBatch { weights, ..*batch };
        self.counted.extend(self.rows.add(&batch, self.column_energies, self.settings));
    }
}
