//! What an allocation is asked for, and why there may be none.

use lowrank_model::display::grouped;
use lowrank_model::plan::{PlanError, RankGroups, Sensitivity, Size};
use lowrank_model::{
    CostModel, ElementBytes, ErrorKind, Family, MatrixId, MatrixShape, Spectrum, Target, Unit,
};
use std::collections::BTreeMap;

/// One matrix that may be factored.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Which matrix.
    pub name: MatrixId,
    /// [m, n]
    pub shape: MatrixShape,
    /// All its singular values, in the norm that is to count.
    pub spectrum: &'a Spectrum,
    /// s for [`Sensitivity::Measured`], at least 0, on the scale of the spectrum; not read otherwise.
    pub measured: f64,
    /// What it may become.
    pub choices: Choices,
    /// Its element sizes where they are not those of [`AllocationRequest::cost`].
    pub element_bytes: Option<ElementBytes>,
}

/// What a matrix may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choices {
    /// Any permitted rank, or dense.
    #[default]
    Any,
    /// Dense.
    Dense,
    /// This rank, which need not be a multiple of anything.
    Rank(usize),
}

/// An expert that may be narrowed. It is, unless one of its matrices must stay dense or has a given rank.
#[derive(Debug, Clone, Copy)]
pub struct ExpertCandidate<'a> {
    /// Decoder layer.
    pub layer: usize,
    /// Expert.
    pub expert: usize,
    /// Its F channels by falling importance: an expert of width k keeps the first k.
    pub order: &'a [usize],
    /// Squared error of the outputs at every width 0..=F; it does not rise.
    pub errors: &'a [f64],
    /// s of such an error, at least 0.
    pub measured: f64,
    /// Errors of ranks at some widths below F.
    pub grid: &'a [NarrowedErrors],
    /// Whether its matrices may be factored.
    pub ranks: bool,
}

/// A layer whose experts may share a base, at the cost of three dense matrices.
#[derive(Debug, Clone, Copy)]
pub struct BaseCandidate<'a> {
    /// Decoder layer.
    pub layer: usize,
    /// Singular values of W − B for every matrix W of the layer, in the norm of its own spectrum.
    pub differences: &'a BTreeMap<MatrixId, Spectrum>,
}

/// Squared errors of every rank of what stays of an expert's matrices at one width.
#[derive(Debug, Clone, PartialEq)]
pub struct NarrowedErrors {
    /// k.
    pub width: usize,
    /// By projection: of rank 0, 1, … up to the short side or beyond; they do not rise.
    pub tails: [Vec<f64>; 3],
}

/// Everything that a plan depends on.
#[derive(Debug, Clone, Copy)]
pub struct AllocationRequest<'a> {
    /// How the rows of the plan are named.
    pub family: &'static dyn Family,
    /// All expert matrices, in any order.
    pub matrices: &'a [Candidate<'a>],
    /// Experts that may be narrowed; then errors compare by [`Sensitivity::Measured`].
    pub experts: &'a [ExpertCandidate<'a>],
    /// Layers whose experts may share a base, where every matrix and expert has a choice of its own.
    pub shared_bases: &'a [BaseCandidate<'a>],
    /// How much must go.
    pub target: Target,
    /// How cost is counted, for matrices without element sizes of their own. Its unit is replaced by the target's.
    pub cost: CostModel,
    /// Ranks are multiples of this.
    pub rank_multiple: usize,
    /// No rank is below this.
    pub rank_min: usize,
    /// How errors of different matrices compare.
    pub sensitivity: Sensitivity,
    /// What shares one choice.
    pub rank_groups: RankGroups,
    /// The whole checkpoint; contains the matrices.
    pub before: Size,
}

impl AllocationRequest<'_> {
    /// The smallest permitted rank: a multiple, from [`AllocationRequest::rank_min`] on. `usize::MAX` where no number is one.
    pub(super) fn rank_floor(&self) -> usize {
        self.rank_min.max(1).checked_next_multiple_of(self.rank_multiple).unwrap_or(usize::MAX)
    }
}

/// Why there is no plan.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// More than factoring everything can remove.
    #[error(
        "cannot remove {} {unit}: with no rank below {rank_floor} and {kept_dense} of {matrices} matrices kept \
         dense{}, the most that can be removed is {}; ask for less",
        grouped(*asked),
        at_a_given_rank(*fixed),
        grouped(*most)
    )]
    Infeasible {
        /// How much must go.
        asked: u64,
        /// How much can go, exactly.
        most: u64,
        /// What is counted.
        unit: Unit,
        /// Smallest permitted rank.
        rank_floor: usize,
        /// Matrices that must stay dense.
        kept_dense: usize,
        /// Matrices whose rank is given.
        fixed: usize,
        /// All matrices.
        matrices: usize,
    },
    /// Ranks cannot be multiples of zero.
    #[error("the rank multiple is 0, expected at least 1")]
    RankMultiple,
    /// A matrix was given twice.
    #[error("{0} is given twice")]
    Duplicate(MatrixId),
    /// A spectrum of another matrix.
    #[error("{name} {shape} was given a spectrum of {values} values")]
    Spectrum {
        /// Which matrix.
        name: MatrixId,
        /// Its shape.
        shape: MatrixShape,
        /// Values in the spectrum.
        values: usize,
    },
    /// Errors of widths that no expert can have, or an order of other channels.
    #[error("the errors of the widths of the expert of {name} are not those of this expert")]
    Widths {
        /// Its first matrix.
        name: MatrixId,
    },
    /// Experts that cannot share one choice.
    #[error(
        "the experts of layer {layer} differ in shape, dtype or in what is given for them, so they cannot share ranks"
    )]
    UnlikeExperts {
        /// Decoder layer.
        layer: usize,
    },
    /// Widths beside ranks whose errors are on another scale.
    #[error("widths compare with ranks by measured sensitivities alone")]
    WidthsNotMeasured,
    /// One width for all experts beside ranks.
    #[error("one width for all experts goes with widths alone: no ranks, and no matrix that is kept dense")]
    UniformWidthsAndRanks,
    /// A sensitivity that is none.
    #[error("the measured sensitivity of {name} is {value}: it must be finite and not negative")]
    Measured {
        /// Which matrix.
        name: MatrixId,
        /// Its value, as text: NaN equals nothing.
        value: String,
    },
    /// An error that is too large to add up.
    #[error("the weighted errors of the ranks of {name} have no finite sum")]
    NotFinite {
        /// The first matrix at which they have none.
        name: MatrixId,
    },
    /// Given ranks do not fit the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl AllocateError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Infeasible { .. } => ErrorKind::BudgetImpossible,
            Self::RankMultiple
            | Self::Plan(_)
            | Self::UnlikeExperts { .. }
            | Self::WidthsNotMeasured
            | Self::UniformWidthsAndRanks => ErrorKind::Usage,
            Self::Measured { .. } | Self::NotFinite { .. } => ErrorKind::BadNumbers,
            Self::Duplicate(_) | Self::Spectrum { .. } | Self::Widths { .. } => ErrorKind::Bug,
        }
    }
}

fn at_a_given_rank(fixed: usize) -> String {
    if fixed > 0 { format!(" and {fixed} at a given rank") } else { String::new() }
}
