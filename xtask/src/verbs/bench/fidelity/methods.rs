//! The rows of the fidelity table: an ablation from plain SVD to the default, and expert pruning, and the budgets it singles out.

/// The budget of 10 B in Mixtral-8x7B, in percent of its expert parameters.
pub(crate) const BUDGET_USUAL: f64 = 22.2;
/// The largest budget.
pub(crate) const BUDGET_DEEP: f64 = 50.0;
/// Name of the bundled calibration passage in the documents.
pub(crate) const BUNDLED: &str = "the bundled passage";

/// One way to remove parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Method {
    /// Name in the table.
    pub(crate) name: &'static str,
    /// What is done.
    pub(crate) how: How,
    /// Who asks for this row.
    pub(crate) when: When,
}

/// When a row is measured that nobody named.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum When {
    /// Always, with `--small` too.
    Always,
    /// Except with `--small`.
    Whole,
    /// Of models with shared experts, except with `--small`.
    SharedExperts,
    /// With `--ablation`.
    Ablation,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum How {
    /// The tool without data, with these flags.
    DataFree(&'static str),
    /// The tool, calibrated, with these flags.
    Calibrated(&'static str),
    /// Removes whole experts, the same number in every layer.
    Pruned,
}

/// The method of SVD-LLM.
pub(crate) const WHITENED: &str = "whitened, uniform, u·v (as SVD-LLM)";
/// The two baselines that need no calibration text.
pub(crate) const DATA_FREE_PIVOTED: [&str; 2] = ["plain SVD, uniform, pivoted", "plain SVD, global, pivoted"];
/// Ranks alone, fitted through all layers: the default before widths.
pub(crate) const RANKS: &str = "ranks alone, with error propagation through layers";
/// Widths alone.
pub(crate) const WIDTHS: &str = "widths alone, an eighth of the tokens from the vocabulary";
/// Ranks, in some layers beside a base.
pub(crate) const BASES: &str = "ranks and shared bases, likewise";
/// Both in one plan.
pub(crate) const WIDTHS_AND_RANKS: &str = "ranks and widths, likewise";
/// The tool without flags.
pub(crate) const DEFAULT: &str = "ranks, widths and shared bases: **the default**";
/// Expert pruning, the usual alternative.
pub(crate) const PRUNED: &str = "expert pruning (as REAP), nearest ratio";

/// All rows from top to bottom. A row that begins with a plus adds one thing to the row above it.
pub(crate) const METHODS: [Method; 19] = [
    step("plain SVD, uniform, u·v", How::DataFree("--allocation uniform --storage uv")),
    step("plain SVD, global, u·v", How::DataFree("--storage uv")),
    step(DATA_FREE_PIVOTED[0], How::DataFree("--allocation uniform")),
    in_small(row(DATA_FREE_PIVOTED[1], How::DataFree(""))),
    in_small(row(
        WHITENED,
        How::Calibrated(
            "--vocabulary-share 0 --propagate none --calibration-target matrix --gate-weight none \
             --shrinkage 0.001 --sensitivity absolute --allocation uniform --storage uv",
        ),
    )),
    step(
        "+ global by absolute errors",
        How::Calibrated(
            "--vocabulary-share 0 --propagate none --calibration-target matrix --gate-weight none \
             --shrinkage 0.001 --sensitivity absolute --storage uv",
        ),
    ),
    step(
        "+ pivoted",
        How::Calibrated(
            "--vocabulary-share 0 --propagate none --calibration-target matrix --gate-weight none \
             --shrinkage 0.001 --sensitivity absolute",
        ),
    ),
    step(
        "+ router weights squared",
        How::Calibrated(
            "--vocabulary-share 0 --propagate none --calibration-target matrix --shrinkage 0.001 \
             --sensitivity absolute",
        ),
    ),
    step(
        "+ measured sensitivities",
        How::Calibrated(
            "--structures rank --vocabulary-share 0 --propagate none --calibration-target matrix --shrinkage 0.001",
        ),
    ),
    step(
        "+ errors of the expert's output, shrinkage 0.1",
        How::Calibrated("--structures rank --vocabulary-share 0 --propagate none"),
    ),
    step(
        "+ error propagation within experts",
        How::Calibrated("--structures rank --vocabulary-share 0 --propagate experts"),
    ),
    in_small(row(RANKS, How::Calibrated("--structures rank --vocabulary-share 0"))),
    row(
        "ranks alone, likewise, an eighth of the tokens from the vocabulary",
        How::Calibrated("--structures rank"),
    ),
    row(WIDTHS, How::Calibrated("--structures width")),
    row(BASES, How::Calibrated("--structures rank,base")),
    row(WIDTHS_AND_RANKS, How::Calibrated("--structures rank,width")),
    in_small(row(DEFAULT, How::Calibrated(""))),
    Method {
        when: When::SharedExperts,
        ..row("the default, shared experts compressed too", How::Calibrated("--shared-experts compress"))
    },
    in_small(row(PRUNED, How::Pruned)),
];

const fn row(name: &'static str, how: How) -> Method {
    Method { name, how, when: When::Whole }
}

const fn in_small(method: Method) -> Method {
    Method { when: When::Always, ..method }
}

const fn step(name: &'static str, how: How) -> Method {
    Method { when: When::Ablation, ..row(name, how) }
}
