//! Spectra thinned to a few points each, for people to look at.
//!
//! All matrices of routed experts have the same short side, so one list of indices serves them all; shared experts are left out. Points lie evenly on a
//! logarithmic axis, because that is how spectra are drawn. Values keep [`DIGITS`] decimal digits, so that the text is
//! short and reads back to the same numbers. Planning never uses these.

use crate::Spectrum;
use serde::{Deserialize, Serialize};

/// Most points of one curve.
pub const POINTS_MAX: usize = 48;
/// Significant decimal digits of a stored σ.
pub const DIGITS: usize = 5;
/// Version of `lowrank_spectra.json`.
pub const SPECTRA_VERSION: u32 = 1;

/// σ of every matrix of routed experts at a few indices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpectrumCurves {
    /// [`SPECTRA_VERSION`].
    pub spectra_version: u32,
    /// Which singular values are kept, counted from 1; the first and the last are always among them.
    pub index: Vec<usize>,
    /// One row per matrix, in stored order.
    pub matrices: Vec<SpectrumCurve>,
}

/// One matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpectrumCurve {
    /// The module's canonical name.
    pub name: String,
    /// σᵢ at the kept indices.
    pub sigma: Vec<f64>,
}

impl SpectrumCurves {
    /// Thins the spectra of modules with these names; `None` if there are none, or if they are not of one length.
    pub fn of<'a>(spectra: impl IntoIterator<Item = (String, &'a Spectrum)>) -> Option<Self> {
        let mut matrices = Vec::new();
        let mut index: Option<(usize, Vec<usize>)> = None;
        for (name, spectrum) in spectra {
            let sigma = spectrum.sigma();
            let (length, index) = index.get_or_insert_with(|| (sigma.len(), indices(sigma.len())));
            if sigma.len() != *length {
                return None;
            }
            matrices
                .push(SpectrumCurve { name, sigma: index.iter().map(|&i| rounded(sigma[i - 1])).collect() });
        }
        let (_, index) = index?;
        Some(Self { spectra_version: SPECTRA_VERSION, index, matrices })
    }

    /// Whether this can be of matrices with these names and this short side.
    pub fn fits<'a>(&self, names: impl ExactSizeIterator<Item = &'a str>, short_side: usize) -> bool {
        let rises = self.index.first() == Some(&1)
            && self.index.last() == Some(&short_side)
            && self.index.windows(2).all(|pair| pair[0] < pair[1]);
        self.spectra_version == SPECTRA_VERSION
            && rises
            && names.len() == self.matrices.len()
            && self.matrices.iter().zip(names).all(|(row, name)| {
                row.name == name
                    && row.sigma.len() == self.index.len()
                    && Spectrum::new(row.sigma.clone()).is_ok()
            })
    }
}

/// Rising indices from 1 to `length`, evenly spaced in their logarithm where there is room.
fn indices(length: usize) -> Vec<usize> {
    let last = POINTS_MAX - 1;
    let mut all: Vec<usize> = (0..=last)
        .map(|step| (length as f64).powf(step as f64 / last as f64).round() as usize)
        .map(|index| index.clamp(1, length.max(1)))
        .collect();
    all.dedup();
    all.retain(|&index| index <= length);
    all
}

/// To [`DIGITS`] significant digits.
fn rounded(value: f64) -> f64 {
    format!("{value:.*e}", DIGITS - 1).parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(expert: usize) -> String {
        format!("experts.{expert}")
    }

    fn falling(length: usize, by: f64) -> Spectrum {
        Spectrum::new((1..=length).map(|i| by / i as f64).collect()).unwrap()
    }

    #[test]
    fn a_long_spectrum_is_thinned_to_few_points_with_both_ends() {
        let (a, b) = (falling(4096, 3.0), falling(4096, 7.123_456));
        let curves = SpectrumCurves::of([(id(0), &a), (id(1), &b)]).unwrap();
        assert!((32..=POINTS_MAX).contains(&curves.index.len()), "{:?}", curves.index);
        assert_eq!((curves.index[0], *curves.index.last().unwrap()), (1, 4096));
        assert_eq!(curves.matrices[0].sigma[0], 3.0);
        assert_eq!(curves.matrices[1].sigma[0], 7.1235);
        for (&i, &sigma) in curves.index.iter().zip(&curves.matrices[1].sigma) {
            assert!((sigma / b.sigma()[i - 1] - 1.0).abs() < 1e-4, "{i}");
        }
        assert!(curves.fits(["experts.0", "experts.1"].into_iter(), 4096));
        assert!(!curves.fits(["experts.1", "experts.0"].into_iter(), 4096));
        assert!(!curves.fits(["experts.0", "experts.1"].into_iter(), 4095));
    }

    #[test]
    fn short_spectra_are_kept_without_repeats() {
        for length in 1..=POINTS_MAX {
            let curves = SpectrumCurves::of([(id(0), &falling(length, 1.0))]).unwrap();
            assert!(curves.index.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", curves.index);
            assert_eq!((curves.index[0], *curves.index.last().unwrap()), (1, length));
        }
        assert_eq!(SpectrumCurves::of([]), None);
        assert_eq!(SpectrumCurves::of([(id(0), &falling(3, 1.0)), (id(1), &falling(4, 1.0))]), None);
    }

    #[test]
    fn curves_survive_json() {
        let curves = SpectrumCurves::of([(id(0), &falling(100, 0.1))]).unwrap();
        let text = serde_json::to_string(&curves).unwrap();
        assert_eq!(serde_json::from_str::<SpectrumCurves>(&text).unwrap(), curves);
    }
}
