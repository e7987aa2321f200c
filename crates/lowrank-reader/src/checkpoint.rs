//! A validated checkpoint: everything is known from headers, weights are read on demand.
//!
//! | Layout on disk | Canonical tensor |
//! |---|---|
//! | per expert, `[F, H]` or `[H, F]` | the same bytes |
//! | fused `gate_up_proj [E, 2F, H]`, `down_proj [E, H, F]` | a contiguous run of rows |
//! | Mistral `wq [heads·d, H]`, `wk` | rows reordered within each head |
//! | factors u `[m, r]`, v `[r, n]` | not multiplied here: [`StoredMatrix::Factored`] |
//! | basis, coefficients and index of pivots | neither: [`StoredMatrix::Pivoted`] |
//! | fp8 with a scale for each block of it | bf16 |
//! | a base of a layer `[F, H]` or `[H, F]`, and factors of the difference | neither: [`StoredMatrix::OfBase`] |

mod catalog;
mod claims;
mod kept_fp8;
mod run;

pub use catalog::IgnoredTensor;
pub use kept_fp8::Fp8Scales;

use catalog::Catalog;
use claims::Claims;
use run::Run;

use crate::companions::{Beside, LeftOut};
use crate::error::{ReadError, clip};
use crate::family::{self, DescribedLayout};
use crate::folder::Folder;
use crate::shards::{self, Naming, Shard, Shards};
use crate::{cache, companions, rows};
use lowrank_model::names::Role;
use lowrank_model::plan::Size;
use lowrank_model::tensor::first_non_finite;
use lowrank_model::tensors::{MatrixLocation, RowOrder, TensorSpec};
use lowrank_model::{
    Dtype, ElementType, KeptChannels, Layout, MatrixId, ModelConfig, PivotOrder, PivotSide, Projection,
    Storage, StoredMatrix, Tensor, format,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is read at once of something long.
const BLOCK_BYTES: u64 = 1 << 19;

/// An open checkpoint. Shared freely between threads: every read states its own offset.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    config_json: Value,
    layout: Layout,
    ranks: BTreeMap<MatrixId, usize>,
    storage: Storage,
    specs: Vec<TensorSpec>,
    shards: Vec<Shard>,
    infos: Vec<ShardInfo>,
    /// Dense tensors by canonical name.
    dense: BTreeMap<String, Run>,
    /// (u, v), or (basis, coefficients), of the factored matrices.
    factored: BTreeMap<MatrixId, (Run, Run)>,
    /// Indices of the pivoted ones.
    orders: BTreeMap<MatrixId, PivotOrder>,
    ignored: Vec<IgnoredTensor>,
    beside: Beside,
    /// Whether fp8 tensors outside the experts go into an output as they are.
    keeps_fp8: bool,
    size: Size,
}

/// A file that holds weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardInfo {
    /// File name.
    pub name: String,
    /// Length of the whole file.
    pub len_bytes: u64,
}

impl Checkpoint {
    /// Finds a model: an existing folder as it is, else `org/name` in the local Hugging Face cache.
    pub fn resolve(model: &str) -> Result<PathBuf, ReadError> {
        cache::resolve(model, &|name| std::env::var_os(name).map(PathBuf::from))
    }

    /// Opens a checkpoint and checks all of it from its headers: which tensors, where, which shapes and dtypes.
    pub fn open(dir: &Path) -> Result<Self, ReadError> {
        let folder = Folder::open(dir)?;
        companions::refuse_lone_adapter(&folder)?;
        let described = family::read(&folder)?;
        let naming = match described.layout {
            DescribedLayout::Known(Layout::Consolidated) => Naming::Consolidated,
            _ => Naming::HuggingFace,
        };
        let Shards { shards, headers, index, listing } = shards::open(&folder, naming)?;
        let listing_name = listing.file_name().map(OsStr::to_os_string);
        let catalog = Catalog::new(&shards, headers, index.as_ref(), listing, &described.config)?;
        let (config, ranks, storage) = (described.config, described.ranks, described.storage);
        let layout = match described.layout {
            DescribedLayout::Known(layout) => layout,
            DescribedLayout::HuggingFace if catalog.has_fused_experts(&config) => Layout::HfFused,
            DescribedLayout::HuggingFace => Layout::HfPerExpert,
        };

        let specs = config.tensors();
        let mut claims = Claims::new(&catalog, &config, layout);
        let mut dense = BTreeMap::new();
        let mut factored = BTreeMap::new();
        let mut orders = BTreeMap::new();
        for spec in &specs {
            let location = match spec.role {
                Role::Expert(id) => config.locate_matrix(layout, id, storage, ranks.get(&id).copied()),
                role => MatrixLocation::Dense(config.locate(layout, role)),
            };
            match (location, spec.role) {
                (MatrixLocation::Factored { u, v }, Role::Expert(id)) => {
                    factored.insert(id, claims.factors(&u, &v)?);
                }
                (MatrixLocation::Pivoted { basis, coefficients, order }, Role::Expert(id)) => {
                    factored.insert(id, claims.factors(&basis, &coefficients)?);
                    let len = config.matrix_shape(id).short_side();
                    orders.insert(id, claims.order(&order, ranks[&id], len)?);
                }
                (
                    MatrixLocation::Factored { u: slice, .. }
                    | MatrixLocation::Pivoted { basis: slice, .. }
                    | MatrixLocation::Dense(slice),
                    _,
                ) => {
                    dense.insert(spec.name.clone(), claims.claim(&slice)?);
                }
            }
        }
        let ignored = claims.account_for_the_rest()?;

        let config_json = described.config_json.unwrap_or_else(|| {
            let mut json = config.to_hf_json();
            if let Some(embedding) = dense.get(&config.tensor(Role::Embedding).name) {
                json["dtype"] = embedding.dtype.torch_name().into();
                json["torch_dtype"] = embedding.dtype.torch_name().into();
            }
            json
        });
        let infos = shards
            .iter()
            .map(|shard| ShardInfo { name: shard.name.clone(), len_bytes: shard.len_bytes })
            .collect();
        let listing = listing_name.as_deref();
        let is_model =
            |name: &str| shards.iter().any(|shard| shard.name == name) || listing == Some(OsStr::new(name));
        let mut checkpoint = Self {
            dir: dir.into(),
            beside: companions::list(&folder, &is_model)?,
            config,
            config_json,
            layout,
            ranks,
            storage,
            specs,
            shards,
            infos,
            dense,
            factored,
            orders,
            ignored,
            keeps_fp8: true,
            size: Size { params: 0, bytes: 0 },
        };
        checkpoint.size = checkpoint.counted();
        Ok(checkpoint)
    }

    /// Parameters and bytes of all weights that an output of nothing but copies has.
    fn counted(&self) -> Size {
        let dense = |spec: &TensorSpec| {
            let run = self.dense.get(&spec.name)?;
            let bytes = self.kept_fp8(spec).map_or(run.bytes(), |scales| run.elements() + scales.bytes());
            Some((run.elements(), bytes))
        };
        let factors =
            self.factored.values().flat_map(|(u, v)| [u, v]).map(|run| (run.elements(), run.bytes()));
        let mut size = Size { params: 0, bytes: 0 };
        for (params, bytes) in self.specs.iter().filter_map(dense).chain(factors) {
            size.params += params;
            size.bytes += bytes;
        }
        let indices: u64 = self.orders.values().map(|order| order.all().len() as u64).sum();
        size.bytes += indices * ElementType::Index.size_bytes();
        size
    }

    /// The folder, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `config.json` as it stands; made up for layouts that have none.
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// A text that lies beside the weights; `None` if there is none, if it leads out of the folder, or if it is longer
    /// than texts are.
    pub fn text(&self, name: &str) -> Option<Vec<u8>> {
        const TEXT_BYTES_MAX: u64 = 8 << 20;
        Folder::open(&self.dir).and_then(|folder| folder.read(name, TEXT_BYTES_MAX)).ok().flatten()
    }

    /// How the tensors are spelled and packed.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The tensors of the model under canonical names, in the order in which they are written.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Parameters and bytes of all weights of the model, counted from the headers. Expert matrices of fp8 count as the bf16 that they
    /// are read as, other fp8 tensors as they are stored.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Rank of a factored matrix; `None` for a dense one.
    pub fn rank(&self, id: MatrixId) -> Option<usize> {
        self.ranks.get(&id).copied()
    }

    /// How factored matrices are stored.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Ranks of all factored matrices.
    pub fn ranks(&self) -> &BTreeMap<MatrixId, usize> {
        &self.ranks
    }

    /// Stored dtype by canonical name; for a factored matrix that of its factors.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.run(name).map(|run| run.dtype)
    }

    /// Stored dtype of an expert matrix, dense or factored.
    ///
    /// # Panics
    /// If the model has no such matrix.
    pub fn matrix_dtype(&self, id: MatrixId) -> Dtype {
        let run = match self.factored.get(&id) {
            Some((u, _)) => u,
            None => &self.dense[&self.matrix_name(id)],
        };
        run.dtype
    }

    /// Reads a dense tensor, in canonical order.
    pub fn read_tensor(&self, spec: &TensorSpec) -> Result<Tensor, ReadError> {
        if let Some(run) = self.dense.get(&spec.name) {
            return self.read(run);
        }
        let tensor = spec.name.clone();
        Err(match self.run(&spec.name) {
            Some(u) => ReadError::IsFactored { path: self.shards[u.shard].path.clone(), tensor },
            None => ReadError::UnknownTensor { path: self.dir.clone(), tensor },
        })
    }

    /// Reads an expert matrix as it is stored: in a layer with a base that and the factors of the difference.
    pub fn read_matrix(&self, id: MatrixId) -> Result<StoredMatrix, ReadError> {
        if !(self.factored.contains_key(&id) && self.config.has_base(id)) {
            return self.read_own(id);
        }
        let role = Role::SharedBase { layer: id.layer, projection: id.projection };
        let base = Arc::new(self.read_tensor(&self.config.tensor(role))?);
        Ok(StoredMatrix::OfBase { base, difference: Box::new(self.read_own(id)?) })
    }

    fn read_own(&self, id: MatrixId) -> Result<StoredMatrix, ReadError> {
        if let Some((u, v)) = self.factored.get(&id) {
            let (first, second) = (self.read(u)?, self.read(v)?);
            return Ok(match self.orders.get(&id) {
                None => StoredMatrix::Factored { u: first, v: second },
                Some(order) => StoredMatrix::Pivoted {
                    side: PivotSide::of(self.config.matrix_shape(id)),
                    basis: first,
                    coefficients: second,
                    order: order.clone(),
                },
            });
        }
        let name = self.matrix_name(id);
        match self.dense.get(&name) {
            Some(run) => self.read(run).map(StoredMatrix::Dense),
            None => Err(ReadError::UnknownTensor { path: self.dir.clone(), tensor: name }),
        }
    }

    /// Whether any of its matrices is stored as factors, or narrowed.
    pub fn is_compressed(&self) -> bool {
        !self.ranks.is_empty() || !self.config.widths.is_empty() || !self.config.shared_bases.is_empty()
    }

    /// Whether it is an ordinary model with narrower experts, made by us: it says which channels they keep.
    pub fn is_narrow(&self) -> bool {
        !self.is_compressed() && self.dir.join(format::CHANNELS_FILE).is_file()
    }

    /// A base as one of its outputs was made from it: fp8 tensors as they are there, and shared experts compressed if they are.
    #[must_use]
    pub fn taken_as_in(self, output: &Self) -> Self {
        let base = self.with_shared_experts(output.config.compresses_shared_experts);
        if output.config.fp8_blocks.is_some() { base } else { base.widened() }
    }

    /// With its shared experts among what is compressed, if it has some and they shall be.
    #[must_use]
    pub fn with_shared_experts(mut self, compressed: bool) -> Self {
        self.config = self.config.with_shared_experts(compressed);
        self.specs = self.config.tensors();
        self.size = self.counted();
        self
    }

    /// An ordinary model with narrower experts, as one with experts of `intermediate_size` channels that keep some.
    #[must_use]
    pub fn narrowed_from(mut self, intermediate_size: usize) -> Self {
        let width = self.config.intermediate_size;
        if width < intermediate_size {
            let gates = self.config.matrices().filter(|id| id.projection == Projection::Gate);
            self.config.widths = gates.map(|id| (id.layer, id.expert, width)).collect();
            self.config.intermediate_size = intermediate_size;
        }
        self
    }

    /// Channels that narrowed experts keep, by layer and expert; the others keep all.
    pub fn kept_channels(&self) -> Result<BTreeMap<(usize, usize), KeptChannels>, ReadError> {
        /// A bitmap of 2^20 channels for every one of 4,096 experts.
        const CHANNELS_BYTES_MAX: u64 = 1 << 30;
        let widths = &self.config.widths;
        if widths.is_empty() {
            return Ok(BTreeMap::new());
        }
        let path = self.dir.join(format::CHANNELS_FILE);
        let wrong = |what: String| ReadError::Channels { path: path.clone(), what };
        let read = Folder::open(&self.dir)?.read(format::CHANNELS_FILE, CHANNELS_BYTES_MAX)?;
        let json = read.ok_or_else(|| wrong("is absent, and `config.json` has widths".into()))?;
        let listed: BTreeMap<String, KeptChannels> =
            serde_json::from_slice(&json).map_err(|error| wrong(clip(&error.to_string())))?;
        let names = self.config.expert_names();
        let mut kept = BTreeMap::new();
        for (name, channels) in listed {
            let place = names.get(&name).copied();
            let width = place.and_then(|(layer, expert)| widths.of(layer, expert));
            match place {
                Some(place)
                    if width == Some(channels.width()) && channels.fits(self.config.intermediate_size) =>
                {
                    kept.insert(place, channels);
                }
                _ => {
                    let name = clip(&name);
                    return Err(wrong(format!(
                        "the channels of {name} are not those of its width in `config.json`"
                    )));
                }
            }
        }
        match widths.iter().find(|(layer, expert, _)| !kept.contains_key(&(*layer, *expert))) {
            Some((layer, expert, _)) => {
                let name = self.config.family.spelling().expert(layer, expert);
                Err(wrong(format!("{name} has a width and no channels")))
            }
            None => Ok(kept),
        }
    }

    /// Gives a tensor's bytes block by block, so that a copy of it needs no memory of its size, and refuses NaN and
    /// infinity as [`Checkpoint::check_finite`] does.
    pub fn read_in_blocks<E: From<ReadError>>(
        &self,
        spec: &TensorSpec,
        take: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(run) = self.dense.get(&spec.name).filter(|run| run.row_order == RowOrder::Canonical) else {
            let tensor = self.read_tensor(spec)?;
            self.check_finite(&spec.name, &tensor)?;
            return take(tensor.bytes());
        };
        let mut done = 0;
        self.stream(run, &mut |block: &[u8]| {
            self.refuse_non_finite(spec, run, done, block)?;
            take(block)?;
            done += block.len() as u64;
            Ok(())
        })
    }

    /// Refuses NaN and infinity in a block, before which `done` bytes lie.
    fn refuse_non_finite(
        &self,
        spec: &TensorSpec,
        run: &Run,
        done: u64,
        block: &[u8],
    ) -> Result<(), ReadError> {
        let Some(at) = first_non_finite(run.dtype, block) else { return Ok(()) };
        let size = run.dtype.size_bytes() as usize;
        let element = Tensor::new(vec![1], run.dtype, block[at * size..][..size].to_vec());
        let value = element.expect("one element").to_f32()[0];
        let element = (done / run.dtype.size_bytes()) as usize + at;
        let (path, tensor) = (self.shards[run.shard].path.clone(), spec.name.clone());
        Err(ReadError::NotFinite { path, tensor, element, value })
    }

    /// Gives the bytes of a run in stored order, block by block; of fp8 the bytes of what it is read as.
    fn stream<E: From<ReadError>>(
        &self,
        run: &Run,
        take: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(scales) = &run.scales else {
            let shard = &self.shards[run.shard];
            let end = run.bytes();
            let mut block = vec![0; BLOCK_BYTES.min(end) as usize];
            for done in (0..end).step_by(BLOCK_BYTES as usize) {
                let block = &mut block[..BLOCK_BYTES.min(end - done) as usize];
                shard.read_exact(run.begin + done, block, &run.stored_name)?;
                take(block)?;
            }
            return Ok(());
        };
        self.stream_fp8(run, scales, &mut |_, wide| take(wide))
    }

    /// Refuses NaN and infinity. `name` is canonical, or that of a factor, and says which file is blamed.
    pub fn check_finite(&self, name: &str, tensor: &Tensor) -> Result<(), ReadError> {
        let Some(element) = tensor.first_non_finite() else { return Ok(()) };
        let mut value = [0.0];
        tensor.widen(element, &mut value);
        let path = match self.run(name) {
            Some(run) => self.shards[run.shard].path.clone(),
            None => self.dir.clone(),
        };
        Err(ReadError::NotFinite { path, tensor: name.into(), element, value: value[0] })
    }

    /// Refuses NaN and infinity in an expert matrix, as [`Checkpoint::check_finite`] does.
    pub fn check_matrix_finite(&self, id: MatrixId, matrix: &Tensor) -> Result<(), ReadError> {
        self.check_finite(&self.matrix_name(id), matrix)
    }

    /// The files that hold the weights, in the order of their names.
    pub fn shards(&self) -> &[ShardInfo] {
        &self.infos
    }

    /// SHA-256 of a shard in hexadecimal, read in blocks; `progress` is told the bytes of each block and may end it.
    pub fn shard_sha256<E: From<ReadError>>(
        &self,
        name: &str,
        progress: &mut dyn FnMut(u64) -> Result<(), E>,
    ) -> Result<String, E> {
        let Some(shard) = self.shards.iter().find(|shard| shard.name == name) else {
            return Err(ReadError::UnknownTensor { path: self.dir.clone(), tensor: name.into() }.into());
        };
        let mut hash = Sha256::new();
        let mut block = vec![0; BLOCK_BYTES.min(shard.len_bytes) as usize];
        let mut offset = 0;
        while offset < shard.len_bytes {
            let bytes = BLOCK_BYTES.min(shard.len_bytes - offset);
            let block = &mut block[..bytes as usize];
            shard.read_exact(offset, block, "the whole shard")?;
            hash.update(&*block);
            offset += bytes;
            progress(bytes)?;
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Files to copy verbatim into an output: names relative to the folder, sorted.
    pub fn companions(&self) -> &[PathBuf] {
        &self.beside.companions
    }

    /// What else is in the folder, and goes into no output.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.beside.left_out
    }

    /// Refuses a model beside which an adapter lies: which of the two is meant, only its owner knows.
    pub fn refuse_adapter(&self) -> Result<(), ReadError> {
        if !self.beside.adapter {
            return Ok(());
        }
        Err(ReadError::AdapterBeside { path: companions::adapter_config(&self.dir) })
    }

    /// Tensors in the files that the model does not need.
    pub fn ignored(&self) -> &[IgnoredTensor] {
        &self.ignored
    }

    /// Where a tensor lies: by canonical name, or by that of a factor; u stands for a factored matrix.
    fn run(&self, name: &str) -> Option<&Run> {
        if let Some(run) = self.dense.get(name) {
            return Some(run);
        }
        let module = name.strip_suffix(".weight")?;
        if let Some(id) = self.config.matrix_named(module) {
            return self.factored.get(&id).map(|(u, _)| u);
        }
        let (module, _) = module.rsplit_once('.')?;
        let (u, v) = self.factored.get(&self.config.matrix_named(module)?)?;
        if v.stored_name == name || name == format!("{module}.v.weight") { Some(v) } else { Some(u) }
    }

    fn matrix_name(&self, id: MatrixId) -> String {
        self.config.tensor(Role::Expert(id)).name
    }

    fn read_run(&self, run: &Run) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; run.bytes() as usize];
        if run.scales.is_some() {
            let mut done = 0;
            self.stream(run, &mut |block| {
                bytes[done..done + block.len()].copy_from_slice(block);
                done += block.len();
                Ok::<_, ReadError>(())
            })?;
        } else {
            self.shards[run.shard].read_exact(run.begin, &mut bytes, &run.stored_name)?;
        }
        Ok(match run.row_order {
            RowOrder::Canonical => bytes,
            RowOrder::RotaryInterleaved { heads } => {
                let row_bytes = bytes.len() / run.shape[0];
                rows::deinterleave(&bytes, heads, row_bytes)
            }
        })
    }

    fn read(&self, run: &Run) -> Result<Tensor, ReadError> {
        let bytes = self.read_run(run)?;
        let tensor = Tensor::new(run.shape.clone(), run.dtype, bytes);
        Ok(tensor.expect("shape, dtype and length were checked when the checkpoint was opened"))
    }
}
