//! Fuzz target for the writer: tensors of any name, dtype and shape, and small checkpoints of any dtypes, ranks and values,
//! read back by the reader, by the safetensors crate and by the verifier's decoders.
//!
//! Shards are made in memory from the writer's layout. One input of [`ON_DISK`] also goes through files, with all documents.

use crate::outcome::{refused, sign};
use crate::planner::described;
use lowrank_model::names::Role;
use lowrank_model::pivots::factor_shapes;
use lowrank_model::plan::Size;
use lowrank_model::recipe::Goal;
use lowrank_model::{
    CostModel, Dtype, ElementBytes, ElementType, MatrixId, ModelConfig, PivotOrder, PivotSide, RankPlan,
    Recipe, Storage, StoredMatrix, Tensor, Unit,
};
use lowrank_reader::index::Index;
use lowrank_reader::{Checkpoint, family, header};
use lowrank_svd::allocate::plan_from_ranks;
use lowrank_verify::factors;
use lowrank_verify::record::Record;
use lowrank_writer::report::{BaseModel, MatrixOutcome};
use lowrank_writer::{
    Card, CheckpointWriter, CompressionReport, ConfigOf, Content, Documents, OutputTensor, ShardLayout,
    StatedDtype,
};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

/// Of so many inputs one is written to disk.
const ON_DISK: u64 = 32;
/// Longest shard that is made in memory.
const SHARD_BYTES_MAX: u64 = 1 << 20;
/// Largest model that is written.
const PARAMS_MAX: u64 = 1 << 15;

/// An input. Lists are used in turn, from their start again where they end.
#[derive(Deserialize)]
struct Input {
    /// Of the base: what is carried over.
    config: Value,
    storage: Storage,
    /// 0 is dense.
    #[serde(default)]
    ranks: Vec<usize>,
    #[serde(default)]
    dtypes: Vec<Dtype>,
    #[serde(default)]
    values: Vec<f32>,
    #[serde(default)]
    dtype: Option<Dtype>,
    shard_bytes: u64,
    /// Only laid out.
    #[serde(default)]
    tensors: Vec<Foreign>,
}

#[derive(Deserialize)]
struct Foreign {
    name: String,
    /// Absent: integers.
    dtype: Option<Dtype>,
    shape: Vec<usize>,
}

/// Lays out, writes and reads back what the input describes.
pub(crate) fn writer(bytes: &[u8]) -> u64 {
    let input: Input = match serde_json::from_slice(bytes) {
        Err(_) => return sign("no input"),
        Ok(input) => input,
    };
    let foreign = foreign(&input);
    let config = match described(&input.config) {
        Err(error) => return foreign ^ refused(error),
        Ok(config) => config,
    };
    let params = config.tensors().iter().try_fold(0_u64, |sum, spec| sum.checked_add(spec.elements()));
    if params.is_none_or(|params| params > PARAMS_MAX) {
        return foreign ^ sign("large");
    }
    let model = Written::new(&input, config);
    foreign
        ^ model.in_memory().rotate_left(1)
        ^ model.configs(&input).rotate_left(2)
        ^ model.on_disk(bytes, &input)
}

/// Any tensors at all: what is laid out can be read.
fn foreign(input: &Input) -> u64 {
    let output = |one: &Foreign| OutputTensor {
        name: one.name.clone(),
        dtype: one.dtype.map_or(ElementType::Index, ElementType::from),
        shape: one.shape.clone(),
    };
    let layout = match ShardLayout::new(input.tensors.iter().map(output).collect(), input.shard_bytes) {
        Err(error) => return refused(error),
        Ok(layout) => layout,
    };
    let mut read = 0;
    for shard in layout.shards() {
        let file_bytes = shard.file_bytes();
        let path = Path::new(&shard.name);
        // The reader's limits on names and dimensions are narrower than the format's.
        let Ok(found) = header::parse(path, &shard.header[8..], file_bytes) else { continue };
        assert_eq!(found.len(), shard.tensors.len());
        for placed in &shard.tensors {
            let entry = &found[&placed.tensor.name];
            assert_eq!(entry.begin, shard.header.len() as u64 + placed.begin);
            assert_eq!(entry.len_bytes, placed.end - placed.begin);
        }
        read += 1;
    }
    let size = layout.size();
    assert!(size.bytes <= layout.disk_bytes() && size.params <= size.bytes);
    if read == layout.shards().len() {
        let index =
            Index::parse(Path::new("i.json"), &layout.index_json()).expect("an index of ours is read");
        assert_eq!(index.weight_map.len(), input.tensors.len());
    }
    sign(&format!("laid out {}", read.min(3)))
}

/// A small checkpoint, as it is to be written.
struct Written {
    config: ModelConfig,
    storage: Storage,
    ranks: BTreeMap<MatrixId, usize>,
    /// Of the base.
    dtypes: BTreeMap<MatrixId, Dtype>,
    before: Size,
    /// Each unit: its name, and its tensors in the order of the layout.
    units: Vec<(String, Vec<(String, Piece)>)>,
    layout: Result<ShardLayout, lowrank_writer::WriteError>,
}

/// What a tensor of the output holds.
enum Piece {
    Weights(Tensor),
    Order(PivotOrder),
}

impl Piece {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Weights(tensor) => tensor.bytes().to_vec(),
            Self::Order(order) => order.to_le_bytes(),
        }
    }

    fn content(&self) -> Content<'_> {
        match self {
            Self::Weights(tensor) => Content::Weights(tensor),
            Self::Order(order) => Content::Order(order),
        }
    }

    fn output(&self, name: &str) -> OutputTensor {
        let (dtype, shape) = match self {
            Self::Weights(tensor) => (tensor.dtype().into(), tensor.shape().to_vec()),
            Self::Order(order) => (ElementType::Index, vec![order.all().len()]),
        };
        OutputTensor { name: name.to_owned(), dtype, shape }
    }
}

impl Written {
    fn new(input: &Input, config: ModelConfig) -> Self {
        let mut ranks_in_turn = input.ranks.iter().copied().cycle();
        let mut dtypes_in_turn = input.dtypes.iter().copied().cycle();
        let mut values_in_turn = input.values.iter().copied().cycle();
        let mut tensor = |shape: &[usize], dtype: Dtype| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| values_in_turn.next().unwrap_or(0.5)).collect();
            Tensor::from_f32(shape.to_vec(), dtype, &values).expect("as many as the shape says")
        };
        let (mut ranks, mut dtypes, mut units) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut before = Size { params: 0, bytes: 0 };
        for spec in config.tensors() {
            let own = dtypes_in_turn.next().unwrap_or(Dtype::Bf16);
            before.params += spec.elements();
            before.bytes += spec.elements() * own.size_bytes();
            let Role::Expert(id) = spec.role else {
                let piece = Piece::Weights(tensor(&spec.shape, own));
                units.push((spec.name.clone(), vec![(spec.name, piece)]));
                continue;
            };
            dtypes.insert(id, own);
            let shape = config.matrix_shape(id);
            let asked = ranks_in_turn.next().unwrap_or(0);
            let most = lowrank_model::params::rank_max_saving(shape, input.storage);
            if !(1..=most).contains(&asked) {
                let piece = Piece::Weights(tensor(&spec.shape, own));
                units.push((spec.name.clone(), vec![(spec.name, piece)]));
                continue;
            }
            ranks.insert(id, asked);
            let dtype = input.dtype.unwrap_or(own);
            let pieces = match input.storage {
                Storage::Uv => {
                    let (u, v) = config.factor_names(id);
                    vec![
                        (u, Piece::Weights(tensor(&[shape.rows, asked], dtype))),
                        (v, Piece::Weights(tensor(&[asked, shape.cols], dtype))),
                    ]
                }
                Storage::Pivoted => {
                    let names = config.pivoted_names(id);
                    let [basis, coefficients] = factor_shapes(shape, asked);
                    let len = shape.short_side();
                    // Any rising pivots.
                    let pivots: Vec<usize> = (0..asked).map(|k| k * len / asked).collect();
                    vec![
                        (names.0, Piece::Weights(tensor(&basis, dtype))),
                        (names.1, Piece::Weights(tensor(&coefficients, dtype))),
                        (names.2, Piece::Order(PivotOrder::of_pivots(&pivots, len))),
                    ]
                }
            };
            units.push((spec.name, pieces));
        }
        let outputs = units.iter().flat_map(|(_, pieces)| pieces).map(|(name, piece)| piece.output(name));
        let layout = ShardLayout::new(outputs.collect(), input.shard_bytes);
        Self { config, storage: input.storage, ranks, dtypes, before, units, layout }
    }

    fn pieces(&self) -> impl Iterator<Item = &(String, Piece)> {
        self.units.iter().flat_map(|(_, pieces)| pieces)
    }

    /// The plan with these ranks, by the planner's own count.
    fn plan(&self, factors: Option<Dtype>) -> RankPlan {
        let bytes_of = |own: Dtype| ElementBytes {
            dense: own.size_bytes(),
            factor: factors.unwrap_or(own).size_bytes(),
        };
        let cost = CostModel {
            storage: self.storage,
            unit: Unit::Params,
            dense_element_bytes: 2,
            factor_element_bytes: 2,
        };
        let own = self.dtypes.iter().map(|(&id, &dtype)| (id, bytes_of(dtype))).collect();
        plan_from_ranks(&self.config, &self.ranks, cost, &own, self.before).expect("ranks that save")
    }

    /// Every shard as the writer lays it out, read by the reader and by the format's own crate.
    fn in_memory(&self) -> u64 {
        let layout = match &self.layout {
            Err(error) => {
                return sign(
                    &format!("{error:?}").chars().take_while(char::is_ascii_alphabetic).collect::<String>(),
                );
            }
            Ok(layout) => layout,
        };
        let contents: BTreeMap<&str, &Piece> =
            self.pieces().map(|(name, piece)| (name.as_str(), piece)).collect();
        for shard in layout.shards().iter().filter(|shard| shard.file_bytes() <= SHARD_BYTES_MAX) {
            let mut file = shard.header.clone();
            for placed in &shard.tensors {
                assert_eq!(file.len() as u64, shard.header.len() as u64 + placed.begin, "no gaps");
                file.extend_from_slice(&contents[placed.tensor.name.as_str()].bytes());
            }
            let path = Path::new(&shard.name);
            let found =
                header::parse(path, &shard.header[8..], file.len() as u64).expect("a header of ours is read");
            let theirs =
                safetensors::SafeTensors::deserialize(&file).expect("the format's own crate reads it");
            assert_eq!(found.len(), shard.tensors.len());
            for (name, entry) in &found {
                let data = &file[entry.begin as usize..][..entry.len_bytes as usize];
                assert_eq!(data, contents[name.as_str()].bytes(), "{name}");
                assert_eq!(theirs.tensor(name).expect("as many tensors").data(), data, "{name}");
            }
        }
        for (id, stored) in self.matrices() {
            check_decoder(&stored, self.config.matrix_shape(id));
        }
        sign(&format!("{} shards, {} factored", layout.shards().len().min(3), self.ranks.len().min(2)))
    }

    /// The factored matrices, from their bytes.
    fn matrices(&self) -> Vec<(MatrixId, StoredMatrix)> {
        let by_name: BTreeMap<&str, &[(String, Piece)]> =
            self.units.iter().map(|(name, pieces)| (name.as_str(), pieces.as_slice())).collect();
        let read = |(&id, &rank): (&MatrixId, &usize)| {
            let shape = self.config.matrix_shape(id);
            let stored = match by_name[self.config.tensor(Role::Expert(id)).name.as_str()] {
                [(_, Piece::Weights(u)), (_, Piece::Weights(v))] => {
                    StoredMatrix::Factored { u: u.clone(), v: v.clone() }
                }
                [(_, Piece::Weights(basis)), (_, Piece::Weights(coefficients)), (_, Piece::Order(order))] => {
                    let bytes = order.to_le_bytes();
                    let order = PivotOrder::from_le_bytes(&bytes, rank, shape.short_side());
                    StoredMatrix::Pivoted {
                        side: PivotSide::of(shape),
                        basis: basis.clone(),
                        coefficients: coefficients.clone(),
                        order: order.expect("an order of ours is read"),
                    }
                }
                _ => unreachable!("a matrix with a rank has factors"),
            };
            (id, stored)
        };
        self.ranks.iter().map(read).collect()
    }

    fn stated(input: &Input) -> StatedDtype {
        input.dtype.map_or(StatedDtype::OfBase(input.dtypes.first().copied()), StatedDtype::Asked)
    }

    /// The configs of the factored and of the dense output describe the base's model.
    fn configs(&self, input: &Input) -> u64 {
        let of = || ConfigOf::new(&input.config, Self::stated(input));
        let factored = lowrank_writer::config::factored(of(), &self.config, &self.ranks, self.storage);
        let dense = lowrank_writer::config::dense(of(), &self.config);
        let (factored, dense) = match (factored, dense) {
            (Ok(factored), Ok(dense)) => (factored, dense),
            (Err(error), _) | (_, Err(error)) => return refused(error),
        };
        for (json, ranks) in [(&factored, &self.ranks), (&dense, &BTreeMap::new())] {
            let bytes = serde_json::to_vec(json).expect("plain values serialise");
            let read = family::from_hugging_face(Path::new("config.json"), &bytes);
            let read = read.expect("a config of ours is read");
            assert_eq!((&read.config, &read.ranks), (&self.config, ranks));
        }
        sign("configs")
    }

    /// A part of the inputs, through files: written, published, opened, read back.
    fn on_disk(&self, bytes: &[u8], input: &Input) -> u64 {
        let (Ok(layout), true) =
            (&self.layout, sign(&String::from_utf8_lossy(bytes)).is_multiple_of(ON_DISK))
        else {
            return 0;
        };
        if layout.shards().len() > 8 {
            return sign("many shards");
        }
        let folder: TempDir = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        let plan = self.plan(input.dtype);
        let outcome = MatrixOutcome {
            relative_error: 0.5,
            calibrated_error: None,
            excess_over_optimum: None,
            route: "exact".into(),
            largest_coefficient: None,
            round_trip_error: None,
        };
        let outcomes = self.ranks.keys().map(|&id| (id, outcome.clone())).collect();
        let recipe = Recipe::new(Goal::Ranks(self.ranks.clone()));
        let report =
            CompressionReport::new(&plan, &outcomes, BaseModel::default(), recipe, "cpu".into(), None);
        let documents = Documents::factored(
            ConfigOf::new(&input.config, Self::stated(input)),
            &plan,
            &report,
            &Card::default(),
        );
        let documents = match documents {
            Err(error) => return refused(error),
            Ok(documents) => documents,
        };
        let writer = CheckpointWriter::create(&out, layout.clone()).expect("an output that can be");
        for (unit, pieces) in &self.units {
            let contents: Vec<(&str, Content<'_>)> =
                pieces.iter().map(|(name, piece)| (name.as_str(), piece.content())).collect();
            writer.write_unit(unit, &contents, String::new()).expect("a tensor of the layout");
        }
        let published = writer.finish(documents).expect("the headers hold what the plan promised");
        assert_eq!((published.params, published.bytes), (plan.after.params, plan.after.bytes));
        let record = std::fs::read(out.join(lowrank_model::format::REPORT_FILE)).expect("a report");
        let record: Record =
            serde_json::from_slice(&record).expect("the verifier's decoder reads the report");
        assert_eq!((record.before, record.after), (self.before, plan.after));
        let checkpoint = Checkpoint::open(&out).expect("an output of ours is opened");
        assert_eq!(checkpoint.size(), plan.after);
        assert_eq!(checkpoint.ranks(), &self.ranks);
        for (id, stored) in self.matrices() {
            assert_eq!(checkpoint.read_matrix(id).expect("validated when opened"), stored, "{id}");
        }
        for (unit, pieces) in &self.units {
            if let [(_, Piece::Weights(tensor))] = pieces.as_slice() {
                let spec =
                    checkpoint.specs().iter().find(|spec| spec.name == *unit).expect("a tensor of the model");
                assert_eq!(&checkpoint.read_tensor(spec).expect("validated when opened"), tensor, "{unit}");
            }
        }
        sign("on disk")
    }
}

/// The verifier's decoder against W multiplied out one element at a time.
fn check_decoder(stored: &StoredMatrix, shape: lowrank_model::MatrixShape) {
    let wide = |tensor: &Tensor| tensor.to_f32().into_iter().map(f64::from).collect::<Vec<f64>>();
    let (left, right, inner) = match stored {
        StoredMatrix::Dense(_) | StoredMatrix::OfBase { .. } => return,
        StoredMatrix::Factored { u, v } => (wide(u), wide(v), u.shape()[1]),
        StoredMatrix::Pivoted { side, basis, coefficients, order } => {
            // [I T] Π [r, short], where T is [r, short − r] or its transpose.
            let (r, short) = (order.rank(), shape.short_side());
            let (table, others) = (wide(coefficients), short - order.rank());
            let mut full = vec![0.0; r * short];
            order.pivots().enumerate().for_each(|(k, at)| full[k * short + at] = 1.0);
            for (column, at) in order.others().enumerate() {
                for k in 0..r {
                    full[k * short + at] = match side {
                        PivotSide::Inputs => table[k * others + column],
                        PivotSide::Outputs => table[column * r + k],
                    };
                }
            }
            match side {
                PivotSide::Inputs => (wide(basis), full, r),
                PivotSide::Outputs => {
                    let transposed = (0..short * r).map(|e| full[(e % r) * short + e / r]).collect();
                    (transposed, wide(basis), r)
                }
            }
        }
    };
    let (m, n) = (shape.rows, shape.cols);
    let terms = |e: usize| (0..inner).map(move |k| (e / n * inner + k, k * n + e % n));
    let product: Vec<f32> =
        (0..m * n).map(|e| terms(e).map(|(l, r)| left[l] * right[r]).sum::<f64>() as f32).collect();
    if product.iter().any(|value| !value.is_finite()) {
        return;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let of_product = norm(&mut product.iter().map(|&value| f64::from(value)));
    // Where terms cancel, what is left is rounding of the terms.
    let of_terms = norm(&mut (0..m * n).map(|e| terms(e).map(|(l, r)| (left[l] * right[r]).abs()).sum()));
    let dense =
        StoredMatrix::Dense(Tensor::from_f32(vec![m, n], Dtype::F32, &product).expect("m · n numbers"));
    if of_product == 0.0 {
        return;
    }
    let lost = factors::relative_error(&dense, stored) * of_product;
    // The product is rounded to f32, whose smallest number is 1.4e-45.
    let rounding = 1e-6 * of_product + 1e-12 * of_terms + 1e-44 * ((m * n) as f64).sqrt();
    assert!(lost <= rounding, "{lost:e} apart, of {of_product:e}: {stored:?}");
}
