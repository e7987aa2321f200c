//! How to find spectrum and factors: the one struct of options, and when a sketch replaces the exact route.

use crate::metric::Metric;
use crate::precision::PrecisionChoice;
use crate::randomized::Sketch;
use crate::reduction::Reduction;
use lowrank_model::recipe::MethodChoice;
use lowrank_model::{MatrixId, MatrixShape, Projection, Spectrum};

/// `auto` sketches only matrices whose short side is at least this: below it the exact route takes milliseconds.
const SKETCH_SHORT_SIDE_MIN: usize = 2048;
/// `auto` sketches only ranks up to short side / this. Measured at 14336×4096 with the default options: at 1/64 eleven
/// times faster than exact with an excess of 0.13 %, at 1/20 three times and 0.33 %, at 1/10 no faster and 0.46 %.
const SKETCH_SHORT_SIDE_PER_RANK: usize = 20;
/// A sketch has at least so many columns beyond the rank (Halko, Martinsson and Tropp, 2011, advise 5 to 10).
const OVERSAMPLING_COLUMNS_MIN: usize = 16;

/// The norm, the route, and what is known already. [`crate::spectrum()`] reads the norm and the precision alone.
#[derive(Debug, Clone, Copy)]
pub struct SvdOptions<'a> {
    /// In which norm errors are measured.
    pub metric: Metric<'a>,
    /// Route.
    pub method: MethodChoice,
    /// Precision of either route.
    pub precision: PrecisionChoice,
    /// Seed of the run; only random columns depend on it.
    pub seed: u64,
    /// Tells matrices of one run apart; see [`SvdOptions::for_matrix`].
    pub stream: u64,
    /// Power iterations of the randomized route.
    pub power_iterations: usize,
    /// Sketch columns beyond the rank, as a share of it in percent; at least 16 columns.
    pub oversampling_percent: usize,
    /// The spectrum of the same W in the same norm: saves a trial in f32 and gives the excess error.
    pub spectrum: Option<&'a Spectrum>,
    /// What [`crate::spectrum()`] left of the same W in the same norm: saves work, and changes no bit.
    pub reduction: Option<&'a Reduction>,
}

impl Default for SvdOptions<'_> {
    fn default() -> Self {
        Self {
            metric: Metric::Weights,
            method: MethodChoice::Auto,
            precision: PrecisionChoice::Auto,
            seed: 0,
            stream: 0,
            power_iterations: 4,
            oversampling_percent: 50,
            spectrum: None,
            reduction: None,
        }
    }
}

impl SvdOptions<'_> {
    /// The same options with the random stream of one matrix.
    #[must_use]
    pub fn for_matrix(self, id: MatrixId) -> Self {
        let projection = match id.projection {
            Projection::Gate => 0,
            Projection::Down => 1,
            Projection::Up => 2,
        };
        Self { stream: (id.layer as u64) << 32 | (id.expert as u64) << 2 | projection, ..self }
    }

    /// The sketch of the randomized route, if that is taken.
    pub(crate) fn sketch(&self, shape: MatrixShape, rank: usize) -> Option<Sketch> {
        let short = shape.short_side();
        let is_sketched = match self.method {
            MethodChoice::Exact | MethodChoice::Projector => false,
            MethodChoice::Randomized => true,
            MethodChoice::Auto => {
                short >= SKETCH_SHORT_SIDE_MIN && rank * SKETCH_SHORT_SIDE_PER_RANK <= short
            }
        };
        let columns = rank + (rank * self.oversampling_percent / 100).max(OVERSAMPLING_COLUMNS_MIN);
        is_sketched.then(|| Sketch { columns: columns.min(short), power_iterations: self.power_iterations })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_sketches_only_small_ranks_of_large_matrices() {
        let options = SvdOptions::default();
        let mixtral = MatrixShape { rows: 14336, cols: 4096 };
        assert_eq!(options.sketch(mixtral, 2479), None);
        assert_eq!(options.sketch(mixtral, 64).map(|sketch| sketch.columns), Some(96));
        assert_eq!(options.sketch(MatrixShape { rows: 448, cols: 128 }, 1), None);
    }
}
