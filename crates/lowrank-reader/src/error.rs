//! Every way in which a checkpoint can lie: one variant each, naming the file and the tensor.

use lowrank_model::ErrorKind;
use lowrank_model::config::ConfigError;
pub(crate) use lowrank_model::display::clip;
use lowrank_model::pivots::PivotError;
use std::path::PathBuf;

/// Why a checkpoint was refused. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    // ── finding the model ────────────────────────────────────────────────────────────────────────────────────────
    /// Neither a folder nor in the Hugging Face cache.
    #[error(
        "`{model}` is neither a folder nor in the Hugging Face cache (looked for {}); nothing is downloaded: fetch it first with `hf download {model}`",
        looked.display()
    )]
    NotCached {
        /// What was asked for.
        model: String,
        /// Where it would have been.
        looked: PathBuf,
    },
    /// Not a folder, and not spelled like `org/name`.
    #[error("`{model}` is neither an existing folder nor a model name of the form org/name")]
    NoSuchModel {
        /// What was asked for.
        model: String,
    },
    /// A file where a model's folder was expected.
    #[error("{} is not a folder; give the folder that holds config.json and the weights", path.display())]
    NotAFolder {
        /// What was given.
        path: PathBuf,
    },
    /// No home folder, so no cache.
    #[error(
        "`{model}` is not a folder, and there is no Hugging Face cache: set HF_HUB_CACHE, HF_HOME or HOME"
    )]
    NoCache {
        /// What was asked for.
        model: String,
    },
    /// In the cache, but none of its snapshots can be used.
    #[error("`{model}` is in the Hugging Face cache ({}), but {why}", looked.display())]
    NoWholeSnapshot {
        /// What was asked for.
        model: String,
        /// Its folder in the cache.
        looked: PathBuf,
        /// What was found there, and what to do.
        why: String,
    },
    /// A ref does not hold the name of a snapshot.
    #[error("{}: `{found}` is not the name of a snapshot", path.display())]
    BadRef {
        /// The ref file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },

    // ── files ────────────────────────────────────────────────────────────────────────────────────────────────────
    /// The operating system said no.
    #[error("{}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Neither `config.json` nor `params.json`.
    #[error("{}: there is neither config.json (Hugging Face) nor params.json (Mistral){found}", dir.display())]
    NoConfig {
        /// The folder.
        dir: PathBuf,
        /// What is there instead, and what to do.
        found: String,
    },
    /// Weights in a format that this program does not read.
    #[error("{}: {what}; only safetensors are read: {advice}", path.display())]
    OtherFormat {
        /// Which file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// How its weights become safetensors.
        advice: &'static str,
    },
    /// What a server sent in place of the weights.
    #[error("{}: is a web page or the message of a server, not weights; download it again", path.display())]
    WebPage {
        /// Which file.
        path: PathBuf,
    },
    /// A shard that a downloader has not finished.
    #[error("{}: the download of `{shard}` is not finished; finish it, or remove this file if it is", path.display())]
    Unfinished {
        /// What the downloader left.
        path: PathBuf,
        /// The shard.
        shard: String,
    },
    /// A LoRA adapter without the model that it adapts.
    #[error(
        "{}: this is a LoRA adapter{}, not a model; merge it into its model first (peft: `merge_and_unload`) and give the merged folder",
        path.display(),
        base.as_ref().map_or_else(String::new, |base| format!(" of `{base}`"))
    )]
    LoneAdapter {
        /// Its config.
        path: PathBuf,
        /// The model that it names.
        base: Option<String>,
    },
    /// A LoRA adapter beside the weights of a model.
    #[error(
        "{}: there is a LoRA adapter beside the weights, which transformers attaches where peft is installed; merge it into the weights if it belongs to them, and remove it if they are merged already",
        path.display()
    )]
    AdapterBeside {
        /// Its config.
        path: PathBuf,
    },
    /// A text file far larger than any real one.
    #[error("{}: more than {limit_bytes} bytes, which no real file of this kind has", path.display())]
    FileTooLarge {
        /// Which file.
        path: PathBuf,
        /// What would have been accepted.
        limit_bytes: u64,
    },
    /// A folder, device or pipe where a file was expected.
    #[error("{}: is not a regular file", path.display())]
    NotAFile {
        /// Which file.
        path: PathBuf,
    },
    /// A symbolic link with nothing at its end: an interrupted download.
    #[error("{}: the link points to nothing; download the model again", path.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
    },
    /// A symbolic link out of the model's folder that is no weight and does not lead into a Hugging Face cache.
    #[error(
        "{}: links to {}, outside the model's folder, where only weights may lie; copy this file into the folder",
        path.display(),
        target.display()
    )]
    LeavesFolder {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The placeholder that git leaves without LFS.
    #[error("{}: is a Git LFS pointer, not weights; fetch the weights with `git lfs pull`", path.display())]
    LfsPointer {
        /// Which file.
        path: PathBuf,
    },

    // ── config ───────────────────────────────────────────────────────────────────────────────────────────────────
    /// Not JSON.
    #[error("{}: is not valid JSON", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A text that begins with a byte order mark, at which transformers stops.
    #[error("{}: begins with a byte order mark, which transformers refuses; save the file as UTF-8 without one", path.display())]
    ByteOrderMark {
        /// Which file.
        path: PathBuf,
    },
    /// A number that is no JSON, though Python writes it.
    #[error("{}: `{key}` is {constant}, which is no JSON number; write a number, or remove the key if it has a default", path.display())]
    PythonConstant {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it says.
        constant: &'static str,
    },
    /// A model that cannot be, or is not supported.
    #[error("{}", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// `lowrank_config` is absent or another program's.
    #[error("{}: `lowrank_config.format` is {found}, expected \"lowrank-compress\"", path.display())]
    ForeignFormat {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// Written by a newer program.
    #[error("{}: `lowrank_config.format_version` is {found}, this program reads {known} of a checkpoint like this", path.display())]
    FormatVersion {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
        /// What is known of a checkpoint like this.
        known: u64,
    },
    /// A width of an expert that the model does not have, or of all its channels or none.
    #[error(
        "{}: `lowrank_config.widths`: {module} is {found}, expected an expert of this model and a width from 1 to {}",
        path.display(), intermediate_size.saturating_sub(1)
    )]
    BadWidth {
        /// Which file.
        path: PathBuf,
        /// Name of the expert.
        module: String,
        /// What was found.
        found: String,
        /// F of the model.
        intermediate_size: usize,
    },
    /// A layer that can have no shared base, or has one twice, or an empty list of them.
    #[error(
        "{}: `lowrank_config.shared_base_layers`: found {found}, expected a rising list of layers with two experts or more and no \
         narrowed ones",
        path.display()
    )]
    BadSharedBase {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// Shared experts are said to be compressed otherwise than by `true`, or the model has none.
    #[error(
        "{}: `lowrank_config.compressed_shared_experts` is {found}, expected true, in a model that has shared experts",
        path.display()
    )]
    BadSharedExperts {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// The list of channels is not that of the widths.
    #[error("{}: {what}", path.display())]
    Channels {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Factors that this program cannot put together.
    #[error("{}: `lowrank_config.storage` is {found}, this program reads \"uv\" and \"pivoted\"", path.display())]
    UnknownStorage {
        /// Which file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// The rank map is absent or no map.
    #[error("{}: `{key}` is not a map from module names to ranks", path.display())]
    NoRankMap {
        /// Which file.
        path: PathBuf,
        /// Where the map belongs.
        key: &'static str,
    },
    /// A rank for something that is no expert matrix of this model.
    #[error("{}: there is a rank for `{module}`, which is no expert matrix of this model", path.display())]
    RankOfUnknownMatrix {
        /// Which file.
        path: PathBuf,
        /// The key.
        module: String,
    },
    /// A rank that cannot be.
    #[error("{}: the rank of `{module}` is {found}, expected an integer from 1 to {rank_max}", path.display())]
    BadRank {
        /// Which file.
        path: PathBuf,
        /// Which matrix.
        module: String,
        /// What was found.
        found: String,
        /// Short side of the matrix.
        rank_max: usize,
    },

    // ── shards and index ─────────────────────────────────────────────────────────────────────────────────────────
    /// No safetensors weights.
    #[error("{}: there are no weights: expected {expected}{found}", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// What was looked for.
        expected: &'static str,
        /// What is there instead, and what to do.
        found: String,
    },
    /// A shard that should be there is not.
    #[error("{}: the shard is missing; {named_by}{}; download the model again", path.display(), also(others))]
    MissingShard {
        /// The absent file.
        path: PathBuf,
        /// Why it is expected.
        named_by: String,
        /// Names of the other shards that are missing.
        others: Vec<String>,
    },
    /// A shard that nobody names: which weights are meant is unclear.
    #[error("{}: {why}; remove it or repair the index", path.display())]
    ExtraShard {
        /// The surplus file.
        path: PathBuf,
        /// Why it is surplus.
        why: String,
    },
    /// The index is empty.
    #[error("{}: `weight_map` is absent, null or empty, so no shard is named; download the index again", path.display())]
    EmptyIndex {
        /// The index.
        path: PathBuf,
    },
    /// JSON of another form than an index.
    #[error("{}: is no index of shards", path.display())]
    NoIndex {
        /// The index.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The index names a path, not a file of the folder.
    #[error("{}: `{tensor}` lies in `{shard}`, which is not a plain file name", path.display())]
    UnsafeShardName {
        /// The index.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The path it names.
        shard: String,
    },
    /// The index names a tensor twice.
    #[error("{}: `{tensor}` stands twice in `weight_map`", path.display())]
    IndexNamesTwice {
        /// The index.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// The index names a tensor that no shard has.
    #[error("{}: the index says `{tensor}` lies here, but no shard has it; index and shards are of different exports", path.display())]
    IndexedTensorAbsent {
        /// The shard that the index names.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// The tensor lies in another shard than the index says.
    #[error("{}: the index says `{tensor}` lies here, but it lies in {found_in}", path.display())]
    TensorInOtherShard {
        /// The shard that the index names.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The shard that has it.
        found_in: String,
    },
    /// A shard holds a tensor that the index does not name.
    #[error("{}: holds `{tensor}`, which the index does not name; index and shards are of different exports", path.display())]
    TensorNotIndexed {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },

    // ── headers ──────────────────────────────────────────────────────────────────────────────────────────────────
    /// The file ends inside its header.
    #[error("{}: ends inside its header ({actual_bytes} of {expected_bytes} bytes); the shard is truncated", path.display())]
    TruncatedHeader {
        /// The shard.
        path: PathBuf,
        /// End of the header.
        expected_bytes: u64,
        /// Length of the file.
        actual_bytes: u64,
    },
    /// A header larger than the format allows.
    #[error("{}: says its header has {bytes} bytes; at most {limit_bytes} are allowed, so this is no safetensors file", path.display())]
    HeaderTooLarge {
        /// The shard.
        path: PathBuf,
        /// What it says.
        bytes: u64,
        /// What the format allows.
        limit_bytes: u64,
    },
    /// A header that is not the JSON the format asks for.
    #[error("{}: the header is not valid", path.display())]
    HeaderJson {
        /// The shard.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A name that would not survive being printed.
    #[error("{}: holds a tensor whose name is too long or has control characters: `{tensor}`", path.display())]
    BadTensorName {
        /// The file.
        path: PathBuf,
        /// The name, escaped and shortened.
        tensor: String,
    },
    /// One header, one name, two tensors.
    #[error("{}: `{tensor}` stands twice in the header", path.display())]
    DuplicateInHeader {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// Two shards with the same tensor.
    #[error("{}: `{tensor}` lies here and in {other}", path.display())]
    DuplicateInShards {
        /// The later shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The earlier shard.
        other: String,
    },
    /// Far more tensors than any real checkpoint has.
    #[error("{}: there are more than {limit} tensors, which no model of this family has", path.display())]
    TooManyTensors {
        /// The shard or the index.
        path: PathBuf,
        /// What would have been accepted.
        limit: usize,
    },
    /// A dtype that the format does not know.
    #[error("{}: `{tensor}` has the unknown dtype `{dtype}`", path.display())]
    UnknownDtype {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// What the header says.
        dtype: String,
    },
    /// More dimensions than any weight has.
    #[error("{}: `{tensor}` has more than {limit} dimensions", path.display())]
    TooManyDimensions {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// What would have been accepted.
        limit: usize,
    },
    /// A size that does not fit 64 bits.
    #[error("{}: the size of `{tensor}` overflows", path.display())]
    Overflow {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
    },
    /// A tensor that ends before it begins.
    #[error("{}: `{tensor}` ends at byte {end} of the data, before it begins at {begin}", path.display())]
    ReversedOffsets {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its begin.
        begin: u64,
        /// Its end.
        end: u64,
    },
    /// Bytes that do not fit shape and dtype.
    #[error("{}: `{tensor}` is {dtype} {shape:?}, which takes {expected_bytes} bytes, but its offsets span {actual_bytes}", path.display())]
    WrongByteSize {
        /// The shard.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<u64>,
        /// What that takes.
        expected_bytes: u64,
        /// What the offsets give it.
        actual_bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("{}: `{tensor}` overlaps `{other}`", path.display())]
    Overlap {
        /// The shard.
        path: PathBuf,
        /// The later tensor.
        tensor: String,
        /// The earlier one.
        other: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{}: there is a hole of {bytes} bytes before `{tensor}`", path.display())]
    Hole {
        /// The shard.
        path: PathBuf,
        /// The tensor after the hole.
        tensor: String,
        /// Its size.
        bytes: u64,
    },
    /// The file ends before the data does.
    #[error("{}: has {actual_bytes} bytes, but `{tensor}` ends at byte {end_bytes}; the shard is truncated", path.display())]
    TruncatedShard {
        /// The shard.
        path: PathBuf,
        /// The first tensor that is cut.
        tensor: String,
        /// Where it should end.
        end_bytes: u64,
        /// Length of the file.
        actual_bytes: u64,
    },
    /// The file goes on after its last tensor.
    #[error("{}: {bytes} bytes follow the last tensor{}", path.display(), last(tensor))]
    TrailingBytes {
        /// The shard.
        path: PathBuf,
        /// The last tensor, if there is one.
        tensor: Option<String>,
        /// How many bytes follow.
        bytes: u64,
    },

    // ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────
    /// A tensor the model needs is in no shard.
    #[error("{}: `{tensor}` is missing: neither the index nor any shard has it", path.display())]
    MissingTensor {
        /// The index, or the only shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
    },
    /// A tensor of a known kind that no model of the family has, or under a name that it has elsewhere.
    #[error("{}: `{tensor}` {what}", path.display())]
    OtherTensor {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
        /// What it is, and what to do.
        what: String,
    },
    /// A tensor the model does not have.
    #[error("{}: `{tensor}` is not part of the model that the config describes", path.display())]
    ExtraTensor {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
    },
    /// Not the shape that the config implies.
    #[error("{}: `{tensor}` has shape {found:?}, the config implies {expected:?}", path.display())]
    WrongShape {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
        /// In the header.
        found: Vec<u64>,
        /// From the config.
        expected: Vec<usize>,
    },
    /// A dtype that weights may not have.
    #[error("{}: `{tensor}` is stored as {found}; only F32, F16 and BF16 weights can be read", path.display())]
    WrongDtype {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
        /// In the header.
        found: String,
    },
    /// An index of pivots with the wrong dtype or shape.
    #[error("{}: `{tensor}` is {found}, expected an index: I64 [{len}]", path.display())]
    NotAnIndex {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
        /// In the header.
        found: String,
        /// Short side of the matrix.
        len: usize,
    },
    /// An index that puts weights nowhere, or two in one place.
    #[error("{}: `{tensor}`", path.display())]
    BadPivots {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
        /// What is wrong.
        source: PivotError,
    },
    /// u and v of one matrix differ in dtype.
    #[error("{}: `{tensor}` is {found}, the matrix' other factor is {expected}", path.display())]
    FactorDtypes {
        /// The shard of u.
        path: PathBuf,
        /// Name of u.
        tensor: String,
        /// Its dtype.
        found: String,
        /// The dtype of v.
        expected: String,
    },
    /// A tensor that only quantised checkpoints have.
    #[error("{}: `{tensor}` belongs to quantised weights; give the original F32, F16 or BF16 checkpoint", path.display())]
    Quantised {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
    },
    /// Tied by the config, yet different on disk.
    #[error("{}: `{tensor}` differs from the embedding, though the config says `tie_word_embeddings`", path.display())]
    TiedHeadDiffers {
        /// The shard.
        path: PathBuf,
        /// Name in the checkpoint.
        tensor: String,
    },

    // ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────
    /// The file became shorter after it was opened.
    #[error("{}: became shorter while it was in use; `{tensor}` can no longer be read", path.display())]
    Shrank {
        /// The shard.
        path: PathBuf,
        /// What was being read.
        tensor: String,
    },
    /// The operating system could not deliver bytes that the header promised.
    #[error("{}: cannot read `{tensor}`", path.display())]
    TensorIo {
        /// The shard.
        path: PathBuf,
        /// What was being read.
        tensor: String,
        /// What it said.
        source: std::io::Error,
    },
    /// NaN or infinity in a weight.
    #[error("{}: `{tensor}` holds {value} at element {element}; the weights are damaged", path.display())]
    NotFinite {
        /// The shard.
        path: PathBuf,
        /// Canonical name, or that of a factor.
        tensor: String,
        /// Row-major index of the first offender.
        element: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// A dense read of a matrix that is stored as factors. The caller's mistake, not the file's.
    #[error("{}: `{tensor}` is stored as two factors; read it with read_matrix", path.display())]
    IsFactored {
        /// The shard of u.
        path: PathBuf,
        /// Canonical name.
        tensor: String,
    },
    /// A name that the model does not have. The caller's mistake, not the file's.
    #[error("{}: the model has no tensor `{tensor}`", path.display())]
    UnknownTensor {
        /// The folder.
        path: PathBuf,
        /// What was asked for.
        tensor: String,
    },
}

impl ReadError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { source, .. } => source.kind(),
            Self::NotCached { .. }
            | Self::NoWholeSnapshot { .. }
            | Self::NoSuchModel { .. }
            | Self::NotAFolder { .. }
            | Self::NoCache { .. }
            | Self::BadRef { .. }
            | Self::NoConfig { .. } => ErrorKind::NoModel,
            Self::LoneAdapter { .. }
            | Self::AdapterBeside { .. }
            | Self::ForeignFormat { .. }
            | Self::FormatVersion { .. }
            | Self::UnknownStorage { .. }
            | Self::UnknownDtype { .. }
            | Self::WrongDtype { .. }
            | Self::OtherFormat { .. }
            | Self::OtherTensor { .. }
            | Self::Quantised { .. } => ErrorKind::Unsupported,
            Self::FileTooLarge { .. }
            | Self::NotAFile { .. }
            | Self::DanglingLink { .. }
            | Self::LeavesFolder { .. }
            | Self::LfsPointer { .. }
            | Self::Json { .. }
            | Self::ByteOrderMark { .. }
            | Self::PythonConstant { .. }
            | Self::NoRankMap { .. }
            | Self::RankOfUnknownMatrix { .. }
            | Self::BadRank { .. }
            | Self::BadWidth { .. }
            | Self::BadSharedBase { .. }
            | Self::BadSharedExperts { .. }
            | Self::Channels { .. }
            | Self::NoWeights { .. }
            | Self::WebPage { .. }
            | Self::Unfinished { .. }
            | Self::NoIndex { .. }
            | Self::MissingShard { .. }
            | Self::ExtraShard { .. }
            | Self::EmptyIndex { .. }
            | Self::UnsafeShardName { .. }
            | Self::IndexNamesTwice { .. }
            | Self::IndexedTensorAbsent { .. }
            | Self::TensorInOtherShard { .. }
            | Self::TensorNotIndexed { .. }
            | Self::TruncatedHeader { .. }
            | Self::HeaderTooLarge { .. }
            | Self::HeaderJson { .. }
            | Self::BadTensorName { .. }
            | Self::DuplicateInHeader { .. }
            | Self::DuplicateInShards { .. }
            | Self::TooManyTensors { .. }
            | Self::TooManyDimensions { .. }
            | Self::Overflow { .. }
            | Self::ReversedOffsets { .. }
            | Self::WrongByteSize { .. }
            | Self::Overlap { .. }
            | Self::Hole { .. }
            | Self::TruncatedShard { .. }
            | Self::TrailingBytes { .. }
            | Self::MissingTensor { .. }
            | Self::ExtraTensor { .. }
            | Self::WrongShape { .. }
            | Self::NotAnIndex { .. }
            | Self::BadPivots { .. }
            | Self::FactorDtypes { .. }
            | Self::TiedHeadDiffers { .. } => ErrorKind::BrokenCheckpoint,
            Self::NotFinite { .. } => ErrorKind::BadNumbers,
            Self::Io { .. } | Self::TensorIo { .. } | Self::Shrank { .. } => ErrorKind::InputOutput,
            Self::IsFactored { .. } | Self::UnknownTensor { .. } => ErrorKind::Bug,
        }
    }
}

fn also(others: &[String]) -> String {
    match others {
        [] => String::new(),
        [one] => format!(", and so is {one}"),
        [first, .., last] => format!(", and so are {} others, {first} to {last}", others.len()),
    }
}

fn last(tensor: &Option<String>) -> String {
    tensor.as_ref().map_or_else(String::new, |tensor| format!(", `{tensor}`"))
}
